# SPDX-FileCopyrightText: the tritonlora authors
# SPDX-License-Identifier: Apache-2.0
"""TensorRT-LLM's LoRA cache: the tasks in it, the requests that pin them, and the eviction order when pages run out.

A task is a cached adapter, under its lora_task_id. `engine.lora_cache` counts the pages that it takes. Oddities of
upstream are kept on purpose, each marked "sic".

Sources: TensorRT-LLM cpp/tensorrt_llm/runtime/loraCache.cpp (lists, eviction) and
cpp/tensorrt_llm/batch_manager/peftCacheManager.cpp (which request pins what). tests/support/golden holds results of
that code.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from typing import Generic, TypeVar

from tritonlora.errors import TritonLoraError

Value = TypeVar("Value")


class LoraCacheError(TritonLoraError):
    """The engine's own words for a request that the cache cannot take."""


class TaskNotCachedError(LoraCacheError):
    """A request named a task without sending weights, and the task is not cached."""


class BatchError(LoraCacheError):
    """The engine's own words for trouble that ends every request of the running batch."""


@dataclass(slots=True)
class _Task(Generic[Value]):
    pages: list[int]
    loaded: bool = False
    done: bool = False
    value: Value | None = None
    load_error: str = ""  # the reason why the task could not be loaded; upstream reports it once


@dataclass(slots=True)
class LoraCache(Generic[Value]):
    """Tasks, their pages, and the two lists that decide about eviction. Not thread-safe: one thread owns it.

    The caller keeps a value for each task. `load` sets the value, and the eviction of the task drops it.
    """

    total_pages: int
    free_pages: deque[int] = field(init=False)
    tasks: dict[int, _Task[Value]] = field(init=False, default_factory=dict)
    # Both lists have their newest entry last; dicts, because a task leaves from anywhere in them.
    in_progress: dict[int, None] = field(init=False, default_factory=dict)
    done: dict[int, None] = field(init=False, default_factory=dict)

    def __post_init__(self) -> None:
        self.free_pages = deque(range(self.total_pages))

    def __contains__(self, task_id: int) -> bool:
        """Whether the task has an entry, loaded or not."""
        return task_id in self.tasks

    def value(self, task_id: int) -> Value | None:
        """The value that a cached task was loaded with; None before it is loaded."""
        return self.tasks[task_id].value

    def pages(self, task_id: int) -> tuple[int, ...]:
        """The pages of a cached task."""
        return tuple(self.tasks[task_id].pages)

    def put(self, task_id: int, pages: int) -> None:
        """Give the task `pages` pages, and evict other tasks if needed. A task that is cached is only bumped (sic).

        Raises LoraCacheError when there are too few pages. Other tasks may have been evicted nevertheless (sic).
        """
        if task_id in self.tasks:
            self.bump(task_id)
            return
        self.tasks[task_id] = _Task(self._claim_with_evict(pages))
        self.in_progress[task_id] = None

    def bump(self, task_id: int) -> None:
        """Make a cached task the newest one in progress. Without effect on a task that is not cached."""
        if task_id in self.tasks:
            self.done.pop(task_id, None)
            self.in_progress.pop(task_id, None)
            self.in_progress[task_id] = None
            self.tasks[task_id].done = False

    def load(self, task_id: int, value: Value) -> None:
        """Note that the task's weights are in its pages: it can be evicted when it is done. Works only once (sic)."""
        task = self.tasks[task_id]
        if task.loaded:
            return
        task.value, task.loaded = value, True
        if task.done:
            self.mark_done(task_id)

    def mark_done(self, task_id: int) -> None:
        """Note that no request uses the task. It can be evicted now, the least recently done task first."""
        task = self.tasks.get(task_id)
        if task is None:
            return
        task.done = True
        if task.loaded and task_id in self.in_progress:
            del self.in_progress[task_id]
            self.done[task_id] = None

    def _claim_with_evict(self, pages: int) -> list[int]:
        if pages > len(self.free_pages):
            # sic: only an empty list counts as full. With too few pages to gain, everything that is done goes first
            # and the claim fails after that, because upstream's loop hides the iterator that its check looks at.
            if not self.done:
                raise LoraCacheError("Cache is full. There are no done tasks to evict")
            self._evict(pages - len(self.free_pages))
        if pages > len(self.free_pages):
            raise LoraCacheError("[TensorRT-LLM][ERROR] Assertion failed: pageIds.has_value()")
        return [self.free_pages.popleft() for _ in range(pages)]

    def _evict(self, pages: int) -> None:
        freed: list[int] = []
        while self.done and len(freed) < pages:
            task_id = next(iter(self.done))
            del self.done[task_id]
            freed += self.tasks.pop(task_id).pages
        self.free_pages.extendleft(freed)


@dataclass(slots=True)
class PeftCache(Generic[Value]):
    """The cache with the requests that use each task. A task is pinned while a request for it is active.

    Upstream: `PeftCacheManager::addRequestPeft` and `updateTaskState`. Here a task is loaded at once.
    """

    cache: LoraCache[Value]
    requests: dict[int, set[int]] = field(init=False, default_factory=dict)  # task id -> the requests that use it

    def add(
        self,
        task_id: int,
        request_id: int,
        weights: tuple[int, Callable[[], Value]] | None = None,
        *,
        load_error: str = "",
    ) -> None:
        """Take a request for a task.

        `weights` are the pages that the request's weights take and a function that loads them; None if it carries none.
        Weights for a cached task are not loaded (sic). Raises TaskNotCachedError or LoraCacheError with the engine's
        text; the request is then not taken. With a `load_error` the request is taken, and its task stays cached without
        being loaded or evicted (sic), until `check_batch` raises the error.
        """
        if weights is None and task_id not in self.cache:
            raise TaskNotCachedError(f"LoRA task {task_id} not found in cache. Please send LoRA weights with request")
        if weights is None or task_id in self.cache:
            self.cache.bump(task_id)
        else:
            pages, load = weights
            value = load()  # before the pages are claimed: a request whose weights are broken must not pin any
            try:
                self.cache.put(task_id, pages)
            except LoraCacheError as error:
                raise LoraCacheError(f"Error storing task={task_id} in PEFT cache -- {error}") from error
            if load_error:
                self.cache.tasks[task_id].load_error = load_error
            else:
                self.cache.load(task_id, value)
        self.requests.setdefault(task_id, set()).add(request_id)

    def check_batch(self, task_ids: Iterable[int]) -> None:
        """BatchError when one of these tasks, those of the running requests, could not be loaded.

        Upstream: `PeftCacheManager::ensureBatch`. The first time it tells why, and later that the task is still being
        loaded; either way all running requests end.
        """
        for task_id in dict.fromkeys(task_ids):
            task = self.cache.tasks[task_id]
            if not task.loaded:
                text, task.load_error = task.load_error, ""
                processing = f"can't move a processing task taskId={task_id}"
                raise BatchError(text or f"Caught exception during copyTask ensure batch -- {processing}")

    def finish(self, task_id: int, request_id: int) -> None:
        """Unpin the task from a request that has ended, in whatever way."""
        users = self.requests.get(task_id, set())
        users.discard(request_id)
        if not users:
            self.requests.pop(task_id, None)
            self.cache.mark_done(task_id)
