# SPDX-FileCopyrightText: the tritonlora authors
# SPDX-License-Identifier: Apache-2.0
"""Run a task on a thread that is abandoned if the engine stalls.

A thread that waits inside Triton cannot be ended. `Worker` abandons the thread and starts another one. `Silence`
measures for how long the engine has sent nothing.
"""

from __future__ import annotations

import math
import threading
import time
import traceback
from collections.abc import Callable
from queue import Empty, SimpleQueue

LOOK_SECONDS = 0.1  # between two checks whether the task is stuck

Task = Callable[[], None]


class Worker:
    """One thread that does tasks, one after the other. An abandoned thread is replaced by a new one."""

    def __init__(self) -> None:
        self._begin()

    def do(self, task: Task, is_stuck: Callable[[], bool]) -> bool:
        """Do `task` on the thread and wait for its end. False: `is_stuck` became true, and the thread was abandoned.

        `task` reports its own errors.
        """
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
        """End the thread, once its task is done."""
        self._tasks.put(None)
        self._thread.join()

    def _begin(self) -> None:
        # Each thread has its own queues. An abandoned thread that goes on later cannot end the task of its successor.
        self._tasks: SimpleQueue[Task | None] = SimpleQueue()
        self._done: SimpleQueue[None] = SimpleQueue()
        self._thread = threading.Thread(target=_work, args=(self._tasks, self._done), daemon=True)
        self._thread.start()


class Silence:
    """How long the engine has sent nothing. One thread writes to it; any thread may read it."""

    def __init__(self, before: float, between: float) -> None:
        """Set the limits in seconds: `before` the first response, and `between` two responses."""
        self._before = before
        self._between = between
        self.ended()

    def asked(self) -> None:
        """Note that a request is being sent to the engine now."""
        self._has_begun = False
        self._heard_at = time.monotonic()

    def heard(self) -> None:
        """Note that a response has come."""
        # In this order: a thread that reads in between must not apply the limit `between` to the wait for the first
        # response.
        self._heard_at = time.monotonic()
        self._has_begun = True

    def ended(self) -> None:
        """Note that the last response has come."""
        self._has_begun = False
        self._heard_at = math.inf

    def seconds(self) -> float:
        """The seconds since the last sign of the engine; negative while no response is awaited."""
        return time.monotonic() - self._heard_at

    def is_too_long(self) -> bool:
        """Whether the engine has been silent for longer than the limit."""
        return self.seconds() > (self._between if self._has_begun else self._before)


def _work(tasks: SimpleQueue[Task | None], done: SimpleQueue[None]) -> None:
    while (task := tasks.get()) is not None:
        try:
            task()
        except Exception:  # noqa: BLE001  the next task is another request
            traceback.print_exc()
        del task  # frees what the task refers to before the next one comes
        done.put(None)
