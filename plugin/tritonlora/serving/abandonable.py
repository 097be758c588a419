# SPDX-FileCopyrightText: the tritonlora authors
# SPDX-License-Identifier: Apache-2.0
"""A thread that works for another one, which leaves it behind when it is stuck in something that cannot be ended; and
when it is held to be: after a `Silence` that is too long.
"""

from __future__ import annotations

import math
import threading
import time
import traceback
from collections.abc import Callable
from queue import Empty, SimpleQueue

LOOK_SECONDS = 0.5

Task = Callable[[], None]


class Worker:
    """One thread at a time."""

    def __init__(self) -> None:
        self._begin()

    def do(self, task: Task, is_stuck: Callable[[], bool]) -> bool:
        """Have `task` done, which says itself what goes wrong; False when it was left behind, since it `is_stuck`."""
        self._tasks.put(task)
        while True:
            try:
                self._done.get(timeout=LOOK_SECONDS)
            except Empty:
                if is_stuck():
                    self._begin()
                    return False
            else:
                return True

    def end(self) -> None:
        """No more tasks."""
        self._tasks.put(None)
        self._thread.join()

    def _begin(self) -> None:
        # Queues of its own, so that a thread that was left behind, should it go on, is heard by nobody.
        self._tasks: SimpleQueue[Task | None] = SimpleQueue()
        self._done: SimpleQueue[None] = SimpleQueue()
        self._thread = threading.Thread(target=_work, args=(self._tasks, self._done), daemon=True)
        self._thread.start()


class Silence:
    """For how long somebody who was asked has said nothing. One thread notes it, others may look."""

    def __init__(self, before: float, between: float) -> None:
        """The seconds that are too long: before the first answer, and between two."""
        self._before = before
        self._between = between
        self.ended()

    def asked(self) -> None:
        """Somebody is asked now."""
        self._has_begun = False
        self._heard_at = time.monotonic()

    def heard(self) -> None:
        """An answer has come."""
        # In this order: who looks in between must not take the wait for the first answer for one after it.
        self._heard_at = time.monotonic()
        self._has_begun = True

    def ended(self) -> None:
        """The last answer has come: nobody is waited for."""
        self._has_begun = False
        self._heard_at = math.inf

    def seconds(self) -> float:
        """Of the silence now; below 0 when nobody is waited for."""
        return time.monotonic() - self._heard_at

    def is_too_long(self) -> bool:
        """Whether no more answers can be hoped for."""
        return self.seconds() > (self._between if self._has_begun else self._before)


def _work(tasks: SimpleQueue[Task | None], done: SimpleQueue[None]) -> None:
    while (task := tasks.get()) is not None:
        try:
            task()
        except Exception:  # noqa: BLE001  the next task is another request
            traceback.print_exc()
        del task  # with all that it holds, before the next one comes
        done.put(None)
