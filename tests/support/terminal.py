# SPDX-FileCopyrightText: the tritonlora authors
# SPDX-License-Identifier: Apache-2.0
"""A command on a terminal of its own."""

from __future__ import annotations

import contextlib
import fcntl
import os
import pty
import select
import struct
import subprocess
import sys
import termios
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any


class Terminal:
    """A terminal on which a command runs. `written` is what the command wrote so far."""

    def __init__(self, process: subprocess.Popen[bytes], master: int) -> None:
        self.process = process
        self.written = b""
        self._master = master

    def settings(self) -> list[Any]:
        """As the terminal's settings are now."""
        return termios.tcgetattr(self._master)

    def press(self, keys: bytes) -> None:
        """Press keys. Those of signals are signals."""
        os.write(self._master, keys)

    def resize(self, columns: int, lines: int) -> None:
        """Give the terminal another size."""
        fcntl.ioctl(self._master, termios.TIOCSWINSZ, struct.pack("HHHH", lines, columns, 0, 0))

    def await_text(self, text: bytes, seconds: float = 30.0) -> bytes:
        """Read until the command writes `text`, and return what was written since the call."""
        return self._read(lambda new: text in new, seconds, text)

    def await_end(self, seconds: float = 30.0) -> int:
        """Read until the command has ended, and return its status."""
        self._read(lambda _: self.process.poll() is not None, seconds, b"its end")
        return self.process.returncode

    def _read(self, is_enough: Callable[[bytes], bool], seconds: float, what: bytes) -> bytes:
        new, deadline = b"", time.monotonic() + seconds
        while not is_enough(new):
            assert time.monotonic() < deadline, (what, new)
            if select.select([self._master], [], [], 0.05)[0]:
                with contextlib.suppress(OSError):  # the command has closed it
                    new += os.read(self._master, 1 << 16)
        self.written += new
        return new


@contextlib.contextmanager
def on_terminal(words: Sequence[str], *, columns: int = 80, lines: int = 24, **more: str) -> Iterator[Terminal]:
    """`tritonlora WORDS` on a terminal. The process is killed at the end of the block if it still runs.

    `more` are environment variables.
    """
    master, slave = pty.openpty()
    unset = ("NO_COLOR", "COLUMNS", "LINES", "FORCE_COLOR")
    environment = {name: value for name, value in os.environ.items() if name not in unset}
    environment |= {"TERM": "xterm-256color", **more}
    try:
        fcntl.ioctl(master, termios.TIOCSWINSZ, struct.pack("HHHH", lines, columns, 0, 0))
        process = subprocess.Popen(
            [sys.executable, "-c", _AS_LEADER, *words],
            stdin=slave,
            stdout=slave,
            stderr=slave,
            env=environment,
            start_new_session=True,
        )
        try:
            yield Terminal(process, master)
        finally:
            process.kill()
            process.wait()
    finally:
        os.close(slave)
        os.close(master)


# The terminal becomes the session's own, so that Ctrl-C and a new size reach the command.
_AS_LEADER = """
import fcntl, sys, termios
fcntl.ioctl(0, termios.TIOCSCTTY, 0)
from tritonlora.__main__ import main
raise SystemExit(main())
"""
