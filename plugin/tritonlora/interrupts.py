# SPDX-FileCopyrightText: the tritonlora authors
# SPDX-License-Identifier: Apache-2.0
"""The signals that ask for the end: who handles them, and when they wait."""

from __future__ import annotations

import contextlib
import signal
import threading
from collections.abc import Callable, Iterator, Mapping
from types import FrameType

Handler = Callable[[int, FrameType | None], None]
ENDING: tuple[int, ...] = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
"""The signals that ask for the end."""


def handle(handler: Handler) -> Mapping[int, signal._HANDLER]:
    """`handler` for each of these, unless it is ignored (nohup, a job in the background); the handlers before."""
    before = {number: signal.getsignal(number) for number in ENDING}
    ours = {number: found for number, found in before.items() if found not in (signal.SIG_IGN, None)}
    for number in ours:
        signal.signal(number, handler)
    return ours


@contextlib.contextmanager
def handled(handler: Handler) -> Iterator[None]:
    """The same within the block."""
    before = handle(handler)
    try:
        yield
    finally:
        for number, found in before.items():
            signal.signal(number, found)


@contextlib.contextmanager
def held() -> Iterator[None]:
    """Ctrl-C and its like take effect at the end of the block instead of in its midst.

    `subprocess.Popen` returns only when the child runs its program. An exception from a signal's handler before that
    leaves a child behind that nobody has a name for. Signals are not blocked, as the child would inherit that.
    """
    if threading.current_thread() is not threading.main_thread():  # Python runs handlers in the main thread alone
        yield
        return
    came: list[int] = []
    try:
        with handled(lambda number, _frame: came.append(number)):
            yield
    finally:
        if came:
            signal.raise_signal(came[0])
