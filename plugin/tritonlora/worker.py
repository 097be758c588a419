# SPDX-FileCopyrightText: the tritonlora authors
# SPDX-License-Identifier: Apache-2.0
"""A thread that works for another one, which leaves it behind when it is stuck in something that cannot be ended.

This file runs inside a plain Triton container: standard library only.
"""

from __future__ import annotations

import threading
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


def _work(tasks: SimpleQueue[Task | None], done: SimpleQueue[None]) -> None:
    while (task := tasks.get()) is not None:
        try:
            task()
        except Exception:  # noqa: BLE001  the next task is another request
            traceback.print_exc()
        del task  # with all that it holds, before the next one comes
        done.put(None)
