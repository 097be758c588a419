# SPDX-FileCopyrightText: the tritonlora authors
# SPDX-License-Identifier: Apache-2.0
"""TensorRT-LLM's LoRA cache: the pages that an adapter takes, and the eviction order when pages run out.

The planner predicts this cache, and the CPU engine behaves like it: both use this one implementation. Oddities of
upstream are kept on purpose, each marked "sic".

    slot   page_width elements: the smallest (in + out) of the engine's LoRA modules
    row    one (module, layer) of lora_config; it takes whole slots and never spans pages
    page   slots_per_page slots: capacity for one adapter of optimal_adapter_size on every module and layer
    task   a cached adapter, under its lora_task_id; it takes whole pages

The engine has two such caches with the same pages: one in host memory, and one in GPU memory for the adapters of the
running batch.

Sources: TensorRT-LLM cpp/tensorrt_llm/runtime/loraCache.cpp (pages, lists, eviction) and
cpp/tensorrt_llm/batch_manager/peftCacheManager.cpp (geometry, which request pins what). tests/support/golden holds
results of that code.
"""

from __future__ import annotations

import re
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Generic, TypeVar

from tritonlora.architectures.lora_modules import ModuleDims, row_elements
from tritonlora.errors import TritonLoraError
from tritonlora.pbtxt.model_config import has_template

LoraConfigRow = Sequence[int]  # (module_id, layer, adapter_size), or with a fourth value: not 0 where it has DoRA
Rows = tuple[tuple[int, ...], ...]  # the rows of one adapter; hashable

Value = TypeVar("Value")


class LoraCacheError(TritonLoraError):
    """The engine's own words for a request that the cache cannot take."""


class TaskNotCachedError(LoraCacheError):
    """A request named a task without sending weights, and the task is not cached."""


class BatchError(LoraCacheError):
    """The engine's own words for trouble that ends every request of the running batch."""


# Parameters


@dataclass(frozen=True, slots=True)
class CacheParameters:
    """The engine's lora_cache_* parameters that are in effect."""

    optimal_adapter_size: int = 8
    max_adapter_size: int = 64
    host_memory_bytes: int = 1024**3
    # Of the GPU memory that is free when the engine makes its caches. Older releases take 0.05 where nothing is set.
    gpu_memory_fraction: float = 0.02


PARAMETER_NAMES = {
    "optimal_adapter_size": "lora_cache_optimal_adapter_size",
    "max_adapter_size": "lora_cache_max_adapter_size",
    "host_memory_bytes": "lora_cache_host_memory_bytes",
    "gpu_memory_fraction": "lora_cache_gpu_memory_fraction",
}


def parse_parameters(parameters: Mapping[str, str]) -> tuple[CacheParameters, dict[str, str]]:
    """(values in effect, name -> remark for each parameter that was ignored), from config.pbtxt's `parameters`.

    A parameter that is absent, empty or a placeholder `${...}` has the engine's default (upstream:
    `getPeftCacheConfigFromParams`).
    """
    given: dict[str, Any] = {}
    remarks = {}
    for attribute, name in PARAMETER_NAMES.items():
        text = parameters.get(name, "").strip()
        if not text or has_template(text):
            continue
        parse, expected = _PARSE.get(attribute, (_positive_integer, "a whole number above 0"))
        value = parse(text)
        if value is None:
            remarks[name] = f"{name} is {text!r}, expected {expected}: the engine's default is assumed"
        else:
            given[attribute] = value
    return CacheParameters(**given), remarks


def _positive_integer(text: str) -> int | None:
    return int(text) if text.isascii() and text.isdigit() and int(text) > 0 else None


def _fraction(text: str) -> float | None:
    return float(text) if _FRACTION.fullmatch(text) and 0 < float(text) <= 1 else None


_FRACTION = re.compile(r"[0-9]*\.?[0-9]+(?:[eE][+-]?[0-9]{1,3})?", re.ASCII)
_PARSE: Mapping[str, tuple[Callable[[str], float | None], str]] = {
    "gpu_memory_fraction": (_fraction, "a number above 0, and at most 1")
}


# Geometry


@dataclass(frozen=True, slots=True)
class Placement:
    """The place of one row of lora_config in an adapter's pages."""

    page: int
    slot: int
    slots: int


@dataclass(frozen=True, slots=True)
class PageGeometry:
    """The geometry of the pages in one process of the engine: a (tensor-parallel, pipeline-parallel) rank."""

    local_dims: Mapping[int, tuple[int, int]]  # module id -> (in, out) on this rank
    layers: range  # the layers on this rank
    page_width: int  # elements in a slot
    slots_per_page: int
    element_size: int  # bytes
    min_total_slots: int  # slots of one adapter of the largest size; with fewer the engine does not load
    host_slots: int

    @property
    def page_bytes(self) -> int:
        """Bytes of one page."""
        return self.slots_per_page * self.page_width * self.element_size

    @property
    def host_pages(self) -> int:
        """Pages of the host cache, rounded up. So the cache may take up to a page more than configured."""
        return _ceil_div(self.host_slots, self.slots_per_page)

    @property
    def min_bytes(self) -> int:
        """The smallest host cache, and the smallest GPU cache, in bytes, with which the engine loads."""
        return self.min_total_slots * self.page_width * self.element_size

    def device_slots(self, nbytes: int) -> int:
        """Slots of a GPU cache of `nbytes` bytes."""
        return nbytes // (self.page_width * self.element_size)

    def device_pages(self, nbytes: int) -> int:
        """Pages of a GPU cache of `nbytes` bytes, rounded up as those of the host cache are."""
        return _ceil_div(self.device_slots(nbytes), self.slots_per_page)

    def row_slots(self, row: LoraConfigRow) -> int:
        """Slots that one row takes. KeyError if the engine has no LoRA for its module."""
        return _ceil_div(self._elements(row), self.page_width)

    def place(self, rows: Sequence[LoraConfigRow]) -> Iterator[Placement]:
        """The place of each row of this rank, in the order of `rows`. Gaps at the end of a page stay empty."""
        page = slot = 0
        for row in rows:
            if row[1] not in self.layers:
                continue
            slots = self.row_slots(row)
            if slot + slots > self.slots_per_page:
                page, slot = page + 1, 0
            yield Placement(page, slot, slots)
            slot += slots

    def pages(self, rows: Sequence[LoraConfigRow]) -> int:
        """Pages that an adapter takes: at least one, even where no row is for this rank (sic)."""
        last = 0
        for placement in self.place(rows):
            last = placement.page
        return last + 1

    def too_wide(self, rows: Sequence[LoraConfigRow]) -> LoraConfigRow | None:
        """The first row of this rank that is wider than a page, or None.

        The engine accepts an adapter with such a row, cannot load it, and never evicts it.
        """
        widest: dict[Sequence[int], LoraConfigRow] = {}  # rows of different layers take the same slots
        for row in rows:
            if row[1] in self.layers:
                widest.setdefault((row[0], *row[2:]), row)
        return next((row for row in widest.values() if self.row_slots(row) > self.slots_per_page), None)

    def max_size_for(self, row: LoraConfigRow) -> int:
        """The least lora_cache_max_adapter_size with which a page holds `row`, and that is not below its rank."""
        return max(row[2], _ceil_div(self._elements(row), max(map(sum, self.local_dims.values()))))

    def _elements(self, row: LoraConfigRow) -> int:
        module_id, _, adapter_size, *dora = row
        return row_elements(adapter_size, *self.local_dims[module_id], dora=any(dora))

    def too_small(self) -> str | None:
        """The engine's error when the host cache is too small for it to load, else None."""
        return self._refusal("host", self.host_slots)

    def device_too_small(self, nbytes: int) -> str | None:
        """The engine's error when a GPU cache of `nbytes` bytes is too small for it to load, else None."""
        return self._refusal("device", self.device_slots(nbytes))

    def _refusal(self, cache: str, slots: int) -> str | None:
        if slots >= self.min_total_slots:
            return None
        needed = f"{slots} < {self.min_total_slots}"
        return f"Not enough space allocated to {cache} LoRA cache to hold 1 max sized LoRA {needed}"


def layer_ranges(num_layers: int, pp_size: int) -> tuple[range, ...]:
    """The layers of each pipeline-parallel rank: equal shares. ValueError where `pp_size` does not divide the layers.

    Upstream's ranks then begin at rank * (num_layers // pp_size), and the LoRA of the last layers is lost.
    """
    each, remainder = divmod(num_layers, pp_size)
    if remainder:
        raise ValueError(f"{num_layers} layers do not divide among {pp_size} pipeline-parallel ranks")
    return tuple(range(rank * each, (rank + 1) * each) for rank in range(pp_size))


def page_geometry(
    modules: Mapping[str, ModuleDims],
    *,
    layers: range,
    max_lora_rank: int,
    parameters: CacheParameters,
    element_size: int = 2,
    tp_size: int = 1,
) -> PageGeometry:
    """The page geometry of a rank that has `layers`, for an engine with `modules` (not empty).

    Upstream: `PeftCacheManager::getPageManagerConfig` and `getMaxNumSlots`.
    """
    local_dims = {dims.module.id: dims.local(tp_size) for dims in modules.values()}
    sizes = [in_features + out_features for in_features, out_features in local_dims.values()]
    optimal = min(parameters.optimal_adapter_size, max_lora_rank)
    largest = min(parameters.max_adapter_size, max_lora_rank)

    page_width = min(sizes)
    slots_per_layer = sum(optimal * _ceil_div(size, page_width) for size in sizes)
    return PageGeometry(
        local_dims=local_dims,
        layers=layers,
        page_width=page_width,
        slots_per_page=max(slots_per_layer * len(layers), _ceil_div(largest * max(sizes), page_width)),
        element_size=element_size,
        min_total_slots=_ceil_div(largest * len(layers) * sum(sizes), page_width),
        host_slots=parameters.host_memory_bytes // (page_width * element_size),
    )


def _ceil_div(dividend: int, divisor: int) -> int:
    return -(-dividend // divisor)


# The cache


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
