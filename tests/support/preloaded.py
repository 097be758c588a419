# SPDX-FileCopyrightText: the tritonlora authors
# SPDX-License-Identifier: Apache-2.0
"""`tritonlora` for the docs' blocks, as forks of one process that has imported torch and the commands.

The blocks run some fifty commands, and importing takes most of a command's time. `commands()` starts the process, in
which this module is the program. The program `tritonlora` sends that process its words, directory, environment and
standard streams. A fork takes these over, runs `documented_tritonlora`, and its exit code becomes that of the program.
"""

from __future__ import annotations

import contextlib
import os
import signal
import socket
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path

# The program. It imports as little as it can.
_PROGRAM = """#!{python} -IS
import os, socket, sys
with socket.socket(socket.AF_UNIX) as connection:
    connection.connect({address!r})
    environment = [f"{{name}}={{value}}" for name, value in os.environ.items()]
    words = [os.getcwd(), str(len(sys.argv) - 1), *sys.argv[1:], *environment]
    content = "\\0".join(words).encode("utf-8", "surrogateescape")
    socket.send_fds(connection, [len(content).to_bytes(8, "little") + content[:1]], [0, 1, 2])
    connection.sendall(content[1:])
    status = connection.recv(1)
sys.exit(status[0] if status else 1)
"""


@contextlib.contextmanager
def commands(directory: Path) -> Iterator[Path]:
    """The program `tritonlora` in `directory`, which works until the context ends."""
    address, program = directory / "socket", directory / "tritonlora"
    process = subprocess.Popen([sys.executable, __file__, str(address)], stdin=subprocess.PIPE, stdout=subprocess.PIPE)
    try:
        assert process.stdout is not None
        assert process.stdout.readline() == b"ready\n"
        program.write_text(_PROGRAM.format(python=sys.executable, address=str(address)))
        program.chmod(0o755)
        yield program
    finally:
        process.communicate()  # it ends with its stdin


def _serve(address: str) -> None:
    """Fork for each connection at `address`, until stdin ends."""
    import torch  # noqa: F401
    import typer._adapters  # noqa: F401  typer imports it when it parses its first command

    import documented_tritonlora
    import tritonlora.cli.adapters
    import tritonlora.cli.convert
    import tritonlora.cli.repository
    import tritonlora.cli.server
    import tritonlora.conversion.convert  # noqa: F401

    listener = socket.socket(socket.AF_UNIX)
    listener.bind(address)
    listener.listen()
    threading.Thread(target=lambda: (sys.stdin.read(), os._exit(0)), daemon=True).start()
    signal.signal(signal.SIGCHLD, signal.SIG_IGN)  # nobody waits for a fork: it says itself how it ended
    os.write(1, b"ready\n")
    while True:
        connection, _ = listener.accept()
        head, descriptors, _, _ = socket.recv_fds(connection, 9, 3)
        if os.fork() == 0:
            status = 1
            with contextlib.suppress(SystemExit):
                status = documented_tritonlora.main(_take_over(connection, head, descriptors))
            sys.stdout.flush()
            sys.stderr.flush()
            connection.sendall(bytes([status]))
            os._exit(0)
        for descriptor in descriptors:
            os.close(descriptor)
        connection.close()


def _take_over(connection: socket.socket, head: bytes, descriptors: list[int]) -> list[str]:
    """Take the streams, directory and environment of the program that has connected. Returns its words."""
    signal.signal(signal.SIGCHLD, signal.SIG_DFL)
    content = head[8:]
    while len(content) < int.from_bytes(head[:8], "little"):
        content += connection.recv(1 << 16)
    for number, descriptor in enumerate(descriptors):
        os.dup2(descriptor, number)
        os.close(descriptor)
    directory, count, *rest = os.fsdecode(content).split("\0")
    os.chdir(directory)
    os.environ.clear()
    os.environ.update({name: value for name, _, value in (one.partition("=") for one in rest[int(count) :])})
    return rest[: int(count)]


if __name__ == "__main__":
    _serve(sys.argv[1])
