# SPDX-FileCopyrightText: the tritonlora authors
# SPDX-License-Identifier: Apache-2.0
"""The parameters and the pages of TensorRT-LLM's LoRA cache.

`cache_plan` predicts this cache, and the CPU engine has one like it: both count pages here. Oddities of upstream are
kept on purpose, each marked "sic".

    slot   page_width elements: the smallest (in + out) of the engine's LoRA modules
    row    one (module, layer) of lora_config; it takes whole slots and never spans pages
    page   slots_per_page slots: capacity for one adapter of optimal_adapter_size on every module and layer
    task   a cached adapter, under its lora_task_id; it takes whole pages

The engine has two such caches with the same pages: one in host memory, and one in GPU memory for the adapters of the
running batch.

Sources: TensorRT-LLM cpp/tensorrt_llm/runtime/loraCache.cpp (pages) and
cpp/tensorrt_llm/batch_manager/peftCacheManager.cpp (geometry). tests/support/golden holds results of that code.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from tritonlora.architectures.lora_modules import ModuleDims, row_elements
from tritonlora.engine.profile import EngineProfile
from tritonlora.pbtxt.model_config import has_template
from tritonlora.serving.dtypes import DTYPES

LoraConfigRow = Sequence[int]  # (module_id, layer, adapter_size), or with a fourth value: not 0 where it has DoRA
Rows = tuple[tuple[int, ...], ...]  # the rows of one adapter; hashable

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


def rank_geometries(profile: EngineProfile, parameters: CacheParameters) -> list[PageGeometry]:
    """The page geometry of each pipeline-parallel rank of an engine. ValueError as for `layer_ranges`."""
    return [
        page_geometry(
            profile.modules,
            layers=layers,
            max_lora_rank=profile.rank_limit,
            parameters=parameters,
            element_size=DTYPES[profile.dtype].itemsize,
            tp_size=profile.tp_size,
        )
        for layers in layer_ranges(profile.num_layers, profile.pp_size)
    ]


def _ceil_div(dividend: int, divisor: int) -> int:
    return -(-dividend // divisor)
