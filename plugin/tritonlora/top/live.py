# SPDX-FileCopyrightText: the tritonlora authors
# SPDX-License-Identifier: Apache-2.0
"""Look at a server again and again, and show each view on a terminal.

A thread looks at the server. So keys and a new size of the window have their effect while the server does not answer.
"""

from __future__ import annotations

import contextlib
import os
import queue
import select
import signal
import socket
import sys
import termios
import threading
import time
import tty
from collections.abc import Callable, Iterator
from dataclasses import replace

from rich.console import Console
from rich.control import Control
from rich.screen import Screen
from rich.text import Text

from tritonlora import interrupts
from tritonlora.errors import TritonLoraError
from tritonlora.top.look import Look
from tritonlora.top.screen import SORTS, Head, draw
from tritonlora.top.view import NOTHING, View, view_of

REDRAW_SECONDS = 1.0  # the longest time between two drawings
DEFAULT_SIZE = (80, 24)  # of a terminal that does not say
_LEFT, _RIGHT = ("\x1b[D", "\x1bOD"), ("\x1b[C", "\x1bOC")  # arrow keys


def views(look: Callable[[], Look], interval: float, wait: Callable[[float], object] = time.sleep) -> Iterator[View]:
    """A view every `interval` seconds, until `wait` returns something true. The first view has no rates.

    The view of a look that failed has a problem and nothing else. The view of the look after that has no rates.
    """
    before = None
    ended: object = False
    while not ended:
        started = time.monotonic()
        try:
            now = look()
            view, before = view_of(before, now), now
        except TritonLoraError as error:
            view, before = replace(NOTHING, problem=str(error)), None
        yield view
        ended = wait(max(0.0, interval - (time.monotonic() - started)))


def watch(look: Callable[[], Look], console: Console, *, url: str, interval: float, sort: str) -> None:
    """Show views on the terminal of `console` until the key q is pressed, or a signal ends the program."""
    arrived: queue.SimpleQueue[View | BaseException] = queue.SimpleQueue()
    stop = threading.Event()
    ours, theirs = socket.socketpair()  # a byte for each event that the loop below waits for
    theirs.setblocking(False)

    def wake(*_: object) -> None:
        with contextlib.suppress(OSError):  # full: the loop is awake; closed: the loop has ended
            theirs.send(b"\0")

    def look_on() -> None:
        try:
            for view in views(look, interval, stop.wait):
                arrived.put(view)
                wake()
        except BaseException as error:  # noqa: BLE001  raised in the loop below
            arrived.put(error)
            wake()

    started = heard = time.monotonic()
    view = latest = NOTHING
    with contextlib.closing(ours), contextlib.closing(theirs), _terminal(console, wake) as keyboard:
        threading.Thread(target=look_on, name="top-look", daemon=True).start()
        try:
            while True:
                while not arrived.empty():
                    view = _raised(arrived.get())
                    if view.problem is None:
                        latest, heard = view, time.monotonic()
                now = time.monotonic()
                head = Head(url, now - started, now - heard)
                shown = view if view.problem is None else replace(latest, is_ready=None, problem=view.problem)
                _show(console, shown, head, sort)
                ready, _, _ = select.select([ours.fileno(), *keyboard], [], [], REDRAW_SECONDS)
                if ours.fileno() in ready:
                    ours.recv(1 << 12)
                for number in keyboard & {*ready}:
                    pressed = os.read(number, 1 << 10).decode(errors="replace")
                    if "q" in pressed.lower():
                        return
                    if not pressed:
                        keyboard.discard(number)  # a terminal that has gone would be ready for ever
                    sort = SORTS[(SORTS.index(sort) + _steps(pressed)) % len(SORTS)]
        finally:
            stop.set()


def _steps(pressed: str) -> int:
    """The number of columns to the right, or below 0 to the left, that keys lead to."""
    return sum(pressed.count(key) for key in (">", *_RIGHT)) - sum(pressed.count(key) for key in ("<", *_LEFT))


def _raised(arrived: View | BaseException) -> View:
    if isinstance(arrived, BaseException):
        raise arrived
    return arrived


def _show(console: Console, view: View, head: Head, sort: str) -> None:
    size = os.get_terminal_size(sys.stdout.fileno())
    console.size = size if 0 not in size else DEFAULT_SIZE  # without this, COLUMNS would fix it
    lines = draw(view, head, sort, width=console.width, height=console.height, keys=True)
    with console:  # one write
        console.control(Control.home())
        console.print(Screen(Text("\n").join(lines)), end="")


@contextlib.contextmanager
def _terminal(console: Console, on_resize: Callable[..., None]) -> Iterator[set[int]]:
    """The alternate screen, without cursor and echo. Yields the file descriptor of the keyboard, if there is one.

    However the block ends, the terminal is as it was before.
    """
    number = sys.stdin.fileno() if sys.stdin.isatty() else None
    before = None if number is None else termios.tcgetattr(number)
    resized = signal.getsignal(signal.SIGWINCH)
    try:
        with interrupts.held():
            signal.signal(signal.SIGWINCH, on_resize)
            if number is not None:
                tty.setcbreak(number)
                _disable_suspension(number)
            console.set_alt_screen(True)
            console.show_cursor(False)
        yield set() if number is None else {number}
    finally:
        with interrupts.held():
            console.show_cursor(True)
            console.set_alt_screen(False)
            if number is not None and before is not None:
                termios.tcsetattr(number, termios.TCSADRAIN, before)
            signal.signal(signal.SIGWINCH, resized)


def _disable_suspension(keyboard: int) -> None:
    """Let Ctrl-Z do nothing: the shell would be left with the alternate screen, without a cursor."""
    attributes = termios.tcgetattr(keyboard)
    attributes[6][termios.VSUSP] = b"\0"
    termios.tcsetattr(keyboard, termios.TCSADRAIN, attributes)
