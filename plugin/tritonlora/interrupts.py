# SPDX-FileCopyrightText: the tritonlora authors
# SPDX-License-Identifier: Apache-2.0
"""Handles the signals that ask a program to end, and defers them while a block runs."""

from __future__ import annotations

import contextlib
import signal
import threading
from collections.abc import Callable, Iterator, Mapping
from types import FrameType

Handler = Callable[[int, FrameType | None], None]
ENDING: tuple[int, ...] = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
"""The signals that ask a program to end."""


def handle(handler: Handler) -> Mapping[int, signal._HANDLER]:
    """Set `handler` for each of ENDING, and return the handlers before.

    A signal that is ignored stays ignored: under nohup, or for a job in the background.
    """
    before = {number: signal.getsignal(number) for number in ENDING}
    ours = {number: found for number, found in before.items() if found not in (signal.SIG_IGN, None)}
    for number in ours:
        signal.signal(number, handler)
    return ours


@contextlib.contextmanager
def handled(handler: Handler) -> Iterator[None]:
    """Set `handler` as `handle` does, within the block."""
    before = handle(handler)
    try:
        yield
    finally:
        for number, found in before.items():
            signal.signal(number, found)


@contextlib.contextmanager
def held() -> Iterator[None]:
    """Defer the signals of ENDING, such as Ctrl-C, to the end of the block.

    `subprocess.Popen` returns only when the child runs its program. If a signal's handler raises before that, the child
    runs on, and its process id is lost. The signals are not blocked, because the child would inherit that.
    """
    if threading.current_thread() is not threading.main_thread():  # Python runs handlers in the main thread only
        yield
        return
    came: list[int] = []
    try:
        with handled(lambda number, _frame: came.append(number)):
            yield
    finally:
        if came:
            signal.raise_signal(came[0])
