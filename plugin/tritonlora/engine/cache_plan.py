# SPDX-FileCopyrightText: the tritonlora authors
# SPDX-License-Identifier: Apache-2.0
"""Plan the engine's LoRA cache: pages and bytes of each adapter, whether all fit, and the parameters to set.

All numbers come from `lora_cache`, which follows the engine's code. Each process of the engine (a tensor-parallel and
pipeline-parallel rank) has a host cache of lora_cache_host_memory_bytes to itself, and a share of its GPU's memory.
Pipeline-parallel ranks hold different layers. So each rank is planned, and an adapter fits only if it fits on all.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from itertools import accumulate

from tritonlora.architectures.lora_modules import BY_ID, row_elements
from tritonlora.engine.lora_cache import (
    PARAMETER_NAMES,
    CacheParameters,
    PageGeometry,
    Rows,
    layer_ranges,
    parse_parameters,
    rank_geometries,
)
from tritonlora.engine.profile import EngineProfile
from tritonlora.errors import EngineMismatch, TritonLoraError, layers_text, one_message
from tritonlora.serving.dtypes import DTYPES

_USUAL_RANKS = (8, 16, 32, 64)
_DEFAULT_MAX_LORA_RANK = 64
_SHM_GROWTH = 2 * 1024**2  # a stub's region grows in steps and holds the request's other tensors too
_FRACTION_STEPS = 10_000  # a recommended fraction has four decimals
PIPELINE_REMEDY = "train it on layers of every rank, or build the engine with a smaller --pp_size"


@dataclass(frozen=True, slots=True)
class Entry:
    """One registered adapter, as the planner needs it."""

    name: str
    rows: Rows
    weights_nbytes: int
    warm: bool = True  # loaded at start by model_warmup

    @property
    def nbytes(self) -> int:
        """Bytes of lora_weights and lora_config together."""
        return self.weights_nbytes + 4 * sum(len(row) for row in self.rows)


@dataclass(frozen=True, slots=True)
class AdapterPlan:
    """The space that one adapter takes in the cache."""

    name: str
    ranks: tuple[int, ...]  # the different adapter sizes in it
    modules: tuple[str, ...]
    nbytes: int
    pages: int  # on the pipeline-parallel rank where it takes most
    pages_by_rank: tuple[int, ...]
    max_adapter_size: int  # the least lora_cache_max_adapter_size with which a page holds its widest row
    unloadable: str | None  # the reason why the engine accepts the adapter and never loads it; None: it loads it
    warm: bool


@dataclass(frozen=True, slots=True)
class RankPlan:
    """The host cache of the processes of one pipeline-parallel rank."""

    page_bytes: int
    host_pages: int
    pages: int  # pages of all adapters together
    warm_pages: int
    refusal: str | None  # the engine's error when it does not load with these parameters

    @property
    def free_pages(self) -> int:
        """Pages that are free when all adapters are cached; negative when they do not fit."""
        return self.host_pages - self.pages


@dataclass(frozen=True, slots=True)
class DevicePlan:
    """The LoRA cache in the memory of one GPU. It holds the adapters of the running batch."""

    free_bytes: int  # of the GPU's memory when the engine makes its caches
    pages: int
    refusal: str | None  # the engine's error when it does not load with these parameters
    any_in_one_batch: int  # number of different adapters that fit into one batch, even the largest ones
    most_in_one_batch: int  # number of different adapters that fit into one batch, if they are the smallest ones
    never_scheduled: tuple[str, ...]  # adapters larger than the whole cache: their requests wait for ever


@dataclass(frozen=True, slots=True)
class Recommendation:
    """The recommended value of one parameter. It equals the value in effect if nothing has to change."""

    parameter: str
    in_effect: float
    value: float
    cost_bytes: int
    cost: str  # what the bytes are


@dataclass(frozen=True, slots=True)
class CachePlan:
    """The plan: pages of each adapter, whether all fit, and parameters to set. `dataclasses.asdict` gives JSON."""

    parameters: CacheParameters
    remarks: tuple[str, ...]  # one for each parameter that could not be read
    max_lora_rank: int  # of the engine; the default of trtllm-build if it is not known
    processes: int  # tensor-parallel times pipeline-parallel, each with a host cache of its own
    min_cache_bytes: int  # the engine does not load with a smaller host cache, nor with a smaller GPU cache
    device: DevicePlan | None  # None: the GPU's free memory is not known
    ranks: tuple[RankPlan, ...]
    adapters: tuple[AdapterPlan, ...]
    recommendations: tuple[Recommendation, ...]
    room: Mapping[int, int]  # adapter size -> number of further adapters of it, on all modules and layers, that fit
    load_bytes: int  # host memory that loading takes: Triton holds all warmup files at once
    resend_shm_bytes: int  # /dev/shm that it takes to send the largest adapter

    @property
    def tightest(self) -> RankPlan:
        """The pipeline-parallel rank with the fewest free pages."""
        return min(self.ranks, key=lambda rank: rank.free_pages)

    @property
    def fits(self) -> bool:
        """Whether all adapters can be loaded, and be cached at once."""
        return not self.unloadable and all(rank.refusal is None and rank.free_pages >= 0 for rank in self.ranks)

    @property
    def unloadable(self) -> tuple[AdapterPlan, ...]:
        """The adapters that the engine would accept, and never load."""
        return tuple(adapter for adapter in self.adapters if adapter.unloadable)

    @property
    def diverging(self) -> tuple[str, ...]:
        """The adapters that take different numbers of pages on different pipeline-parallel ranks, unless all fit.

        Then one rank may evict an adapter that another rank still has.
        """
        if all(rank.free_pages >= 0 for rank in self.ranks):
            return ()
        return tuple(adapter.name for adapter in self.adapters if len({*adapter.pages_by_rank}) > 1)

    @property
    def min_gpu_bytes(self) -> int:
        """The least free memory of each GPU with which the engine loads."""
        return math.ceil(self.min_cache_bytes / self.parameters.gpu_memory_fraction)

    @property
    def warm_fits(self) -> bool:
        """Whether all warm adapters are still cached when the server is ready."""
        return all(rank.refusal is None and rank.warm_pages <= rank.host_pages for rank in self.ranks)


@dataclass(frozen=True, slots=True)
class WarmChoice:
    """The adapters to keep warm when not all fit, and the cost of the other, cold adapters."""

    warm: tuple[str, ...]
    cold: tuple[str, ...]
    resend_share: float  # the share of requests for cold adapters, which may have to carry weights
    resend_bytes: float  # the bytes of weights in a request, on average over all requests


def plan_cache(
    entries: Sequence[Entry], profile: EngineProfile, parameters: Mapping[str, str], *, gpu_memory: int | None = None
) -> CachePlan:
    """The plan for `entries` with the model's `parameters` (those of config.pbtxt, as text).

    `gpu_memory` is what is free of each GPU's memory when the engine makes its caches, in bytes; None: not known.

    EngineMismatch: the engine has no LoRA at all, its layers do not divide among its pipeline-parallel ranks, or rows
    name modules, layers or sizes that it does not take, or leave a pipeline-parallel rank without any.
    """
    _check(entries, profile)
    if profile.max_lora_rank is None:  # trtllm-build's default, unless an adapter is for an engine that takes more
        most = max((row[2] for entry in entries for row in entry.rows), default=0)
        profile = replace(profile, max_lora_rank=max(_DEFAULT_MAX_LORA_RANK, most))
    in_effect, remarks = parse_parameters(parameters)
    geometries = rank_geometries(profile, in_effect)
    pages = [_pages_by_rows(entries, geometry) for geometry in geometries]
    ranks = tuple(
        RankPlan(
            page_bytes=geometry.page_bytes,
            host_pages=geometry.host_pages,
            pages=sum(pages_of[entry.rows] for entry in entries),
            warm_pages=sum(pages_of[entry.rows] for entry in entries if entry.warm),
            refusal=geometry.too_small(),
        )
        for geometry, pages_of in zip(geometries, pages, strict=True)
    )
    why_unloadable = {rows: _why_unloadable(rows, geometries) for rows in {entry.rows for entry in entries}}
    plan = CachePlan(
        parameters=in_effect,
        remarks=tuple(remarks.values()),
        max_lora_rank=profile.rank_limit,
        processes=profile.tp_size * profile.pp_size,
        min_cache_bytes=max(geometry.min_bytes for geometry in geometries),
        device=None,
        ranks=ranks,
        adapters=tuple(
            _adapter_plan(entry, geometries, [pages_of[entry.rows] for pages_of in pages], why_unloadable[entry.rows])
            for entry in entries
        ),
        recommendations=(),
        room=_room(entries, profile, geometries, ranks),
        load_bytes=sum(entry.nbytes for entry in entries if entry.warm),
        resend_shm_bytes=max((entry.nbytes for entry in entries), default=0) + _SHM_GROWTH,
    )
    best = in_effect if plan.fits else _cheapest(entries, profile, in_effect)
    if gpu_memory is None:
        return replace(plan, recommendations=_recommendations(in_effect, best, profile))
    device = _device_plan(plan.adapters, geometries[0], in_effect, gpu_memory)
    best = _with_fraction(entries, profile, best, gpu_memory)
    recommendations = _recommendations(in_effect, best, profile, gpu_memory)
    return replace(plan, device=device, recommendations=recommendations)


def _adapter_plan(
    entry: Entry, geometries: Sequence[PageGeometry], pages_by_rank: Sequence[int], unloadable: str | None
) -> AdapterPlan:
    return AdapterPlan(
        name=entry.name,
        ranks=tuple(sorted({row[2] for row in entry.rows})),
        modules=tuple(BY_ID[module_id].name for module_id in sorted({row[0] for row in entry.rows})),
        nbytes=entry.nbytes,
        pages=max(pages_by_rank),
        pages_by_rank=tuple(pages_by_rank),
        max_adapter_size=max((geometries[0].max_size_for(row) for row in {*entry.rows}), default=0),
        unloadable=unloadable,
        warm=entry.warm,
    )


def host_pages(profile: EngineProfile, parameters: Mapping[str, str]) -> int | None:
    """The number of pages of the engine's cache; None if it depends on the adapters.

    EngineMismatch as for `plan_cache`.
    """
    if profile.max_lora_rank is None or not profile.modules:
        return None
    return plan_cache((), profile, parameters).tightest.host_pages


def what_if(
    entries: Sequence[Entry],
    profile: EngineProfile,
    parameters: Mapping[str, str],
    *,
    rank: int,
    count: int,
    gpu_memory: int | None = None,
) -> CachePlan:
    """The plan with `count` more warm adapters of adapter size `rank`, on all modules and layers.

    EngineMismatch as for `plan_cache`, and when the engine does not take that rank.
    """
    if profile.modules and not 0 < rank <= profile.rank_limit:
        raise EngineMismatch(f"{profile.source}: the engine takes ranks 1 to {profile.rank_limit}, not {rank}")
    rows = _full_rows(profile, rank)
    widths = (row_elements(rank, dims.in_features, dims.out_features) for dims in profile.modules.values())
    weights_nbytes = len(rows) * max(widths, default=0) * DTYPES[profile.dtype].itemsize
    more = [Entry(f"what-if-{number}", rows, weights_nbytes) for number in range(1, count + 1)]
    return plan_cache([*entries, *more], profile, parameters, gpu_memory=gpu_memory)


def loadable_remedy(plan: CachePlan, adapter: AdapterPlan, *, registered: bool) -> str:
    """The remedy for an unloadable adapter of `plan`; one that is not `registered` yet needs a `--what-if`."""
    size = adapter.max_adapter_size
    if size > plan.max_lora_rank:
        return f"build the engine with --max_lora_rank {size}"
    other = "" if registered else f" --what-if rank={size},count=1"
    return f"set {PARAMETER_NAMES['max_adapter_size']} to at least {size}: tritonlora plan --apply{other}"


def choose_warm(plan: CachePlan, traffic: Mapping[str, float]) -> WarmChoice:
    """Choose the warm adapters: those with the most requests for each page they take.

    `traffic` has the requests, or weights in proportion to them, by adapter name.

    Capacity for one other adapter stays free, so that loading one evicts no warm adapter. The shares are an estimate:
    the engine evicts by age, not by traffic. TritonLoraError: `traffic` names an adapter that is not in the plan.
    """
    names = {adapter.name for adapter in plan.adapters}
    if unknown := sorted(set(traffic) - names):
        raise TritonLoraError(one_message("traffic of adapters that are not registered", map(repr, unknown)))

    by_value = sorted(plan.adapters, key=lambda adapter: (-traffic.get(adapter.name, 0) / adapter.pages, adapter.name))
    budget = min(rank.host_pages for rank in plan.ranks)
    if sum(adapter.pages for adapter in plan.adapters) > budget:
        budget -= max(adapter.pages for adapter in plan.adapters)
    warm = []
    for adapter in by_value:
        if adapter.pages <= budget:
            warm.append(adapter.name)
            budget -= adapter.pages

    is_warm = {*warm}
    cold = [adapter for adapter in by_value if adapter.name not in is_warm]
    requests = sum(traffic.values()) or 1.0
    return WarmChoice(
        warm=tuple(warm),
        cold=tuple(adapter.name for adapter in cold),
        resend_share=sum(traffic.get(adapter.name, 0) for adapter in cold) / requests,
        resend_bytes=sum(traffic.get(adapter.name, 0) * adapter.nbytes for adapter in cold) / requests,
    )


def _check(entries: Sequence[Entry], profile: EngineProfile) -> None:
    if not profile.modules:
        raise EngineMismatch(f"{profile.source}: the engine has no LoRA modules, it would ignore every adapter")
    if profile.num_layers % profile.pp_size:
        raise EngineMismatch(one_message(profile.source, map("; ".join, profile.faults())))
    enabled = {dims.module.id for dims in profile.modules.values()}
    problems = []
    for entry in entries:
        modules = {row[0] for row in entry.rows} - enabled
        layers = {row[1] for row in entry.rows if not 0 <= row[1] < profile.num_layers}
        sizes = {row[2] for row in entry.rows if not 0 < row[2] <= profile.rank_limit}
        problems += [
            f"{entry.name!r}: module {_module_name(id_)} is not enabled in the engine" for id_ in sorted(modules)
        ]
        problems += [f"{entry.name!r}: layer {layer} of {profile.num_layers} layers" for layer in sorted(layers)]
        problems += [f"{entry.name!r}: rank {r}, the engine takes 1 to {profile.rank_limit}" for r in sorted(sizes)]
        idle = pipeline_problems(entry.rows, profile)
        problems += [f"{entry.name!r}: {problem}; {PIPELINE_REMEDY}" for problem in idle]
    if problems:
        raise EngineMismatch(one_message(f"adapters that are not for the engine of {profile.source}", problems))


def pipeline_problems(rows: Rows, profile: EngineProfile) -> list[str]:
    """A line for each pipeline-parallel rank without a row of the adapter. There its requests would end all others.

    Source: TensorRT-LLM `LoraManager::fillInputTensors`, which asserts that there is one.
    """
    if profile.num_layers % profile.pp_size:
        return []  # `EngineProfile.faults` says so
    layers = {row[1] for row in rows}
    return [
        f"it has no LoRA in {layers_text(mine)}, all that pipeline-parallel rank {rank} has: TensorRT-LLM fails there"
        for rank, mine in enumerate(layer_ranges(profile.num_layers, profile.pp_size))
        if layers.isdisjoint(mine)
    ]


def _module_name(module_id: int) -> str:
    return BY_ID[module_id].name if module_id in BY_ID else repr(module_id)


def _pages_by_rows(entries: Sequence[Entry], geometry: PageGeometry) -> dict[Rows, int]:
    """Rows -> pages. Each shape is packed once, since hundreds of adapters mostly share a few shapes."""
    return {rows: geometry.pages(rows) for rows in {entry.rows for entry in entries}}


def _why_unloadable(rows: Rows, geometries: Sequence[PageGeometry]) -> str | None:
    """The reason why the engine accepts these rows and never loads them on some rank; None if it loads them."""
    for geometry in geometries:
        if row := geometry.too_wide(rows):
            return (
                f"its row for {_module_name(row[0])} (rank {row[2]}) takes {geometry.row_slots(row)} slots, and a page "
                f"of the engine's LoRA cache has {geometry.slots_per_page}: the engine would accept the adapter, never "
                "load it, and fail all running requests"
            )
    return None


def _device_plan(
    adapters: Sequence[AdapterPlan], geometry: PageGeometry, parameters: CacheParameters, gpu_memory: int
) -> DevicePlan:
    """The plan of the GPU cache. All ranks have the same number of layers, so one geometry is enough."""
    nbytes = int(parameters.gpu_memory_fraction * gpu_memory)
    pages = geometry.device_pages(nbytes)
    sizes = sorted(adapter.pages for adapter in adapters)
    return DevicePlan(
        free_bytes=gpu_memory,
        pages=pages,
        refusal=geometry.device_too_small(nbytes),
        any_in_one_batch=sum(total <= pages for total in accumulate(reversed(sizes))),
        most_in_one_batch=sum(total <= pages for total in accumulate(sizes)),
        never_scheduled=tuple(adapter.name for adapter in adapters if adapter.pages > pages),
    )


def _with_fraction(
    entries: Sequence[Entry], profile: EngineProfile, parameters: CacheParameters, gpu_memory: int
) -> CacheParameters:
    """`parameters` with the least fraction of the GPU's memory that the engine, and each adapter, needs."""
    geometry = rank_geometries(profile, parameters)[0]
    pages = max((geometry.pages(rows) for rows in {entry.rows for entry in entries}), default=0)
    needed = max(geometry.min_bytes, pages * geometry.page_bytes)
    fraction = max(parameters.gpu_memory_fraction, math.ceil(needed / gpu_memory * _FRACTION_STEPS) / _FRACTION_STEPS)
    return replace(parameters, gpu_memory_fraction=min(fraction, 1.0))


def _full_rows(profile: EngineProfile, rank: int) -> Rows:
    module_ids = sorted(dims.module.id for dims in profile.modules.values())
    return tuple((module_id, layer, rank) for layer in range(profile.num_layers) for module_id in module_ids)


def _room(
    entries: Sequence[Entry], profile: EngineProfile, geometries: Sequence[PageGeometry], ranks: Sequence[RankPlan]
) -> dict[int, int]:
    sizes = {row[2] for entry in entries for row in entry.rows}.union(_USUAL_RANKS)
    room = {}
    for size in sorted(size for size in sizes if size <= profile.rank_limit):
        rows = _full_rows(profile, size)
        free = [
            rank.free_pages // geometry.pages(rows) if rank.refusal is None and not geometry.too_wide(rows) else 0
            for geometry, rank in zip(geometries, ranks, strict=True)
        ]
        room[size] = max(0, min(free))
    return room


def _cheapest(entries: Sequence[Entry], profile: EngineProfile, in_effect: CacheParameters) -> CacheParameters:
    """The parameters with which all adapters fit in the least host memory; memory is never taken away.

    A page is best when most adapters fill it. So only the sizes at which one of them just fills a page, or that are
    the rank of one, are tried. Parameters with which an adapter cannot be loaded are the last resort.
    """
    shapes = {entry.rows for entry in entries}
    largest = in_effect.max_adapter_size if not shapes else 1
    candidates = {in_effect.optimal_adapter_size} | {row[2] for rows in shapes for row in rows}
    for geometry in rank_geometries(profile, replace(in_effect, optimal_adapter_size=1, max_adapter_size=1)):
        for rows in shapes:
            largest = max(largest, *map(geometry.max_size_for, rows))
            slots = sum(placement.slots for placement in geometry.place(rows))
            candidates.add(max(1, -(-slots // geometry.slots_per_page)))

    options = []
    for optimal in {min(size, profile.rank_limit) for size in candidates}:
        option = replace(in_effect, optimal_adapter_size=optimal, max_adapter_size=largest)
        is_loadable = not any(_why_unloadable(rows, rank_geometries(profile, option)) for rows in shapes)
        options.append((is_loadable, replace(option, host_memory_bytes=_needed(entries, profile, option))))
    _, best = min(options, key=lambda one: (not one[0], one[1].host_memory_bytes, -one[1].optimal_adapter_size))
    return replace(best, host_memory_bytes=max(best.host_memory_bytes, in_effect.host_memory_bytes))


def _needed(entries: Sequence[Entry], profile: EngineProfile, parameters: CacheParameters) -> int:
    """The least lora_cache_host_memory_bytes for all adapters at once: whole pages, for some releases round down."""
    needed = 0
    for geometry in rank_geometries(profile, parameters):
        pages_of = _pages_by_rows(entries, geometry)
        pages = sum(pages_of[entry.rows] for entry in entries)
        least_pages = -(-geometry.min_bytes // geometry.page_bytes)
        needed = max(needed, max(pages, least_pages) * geometry.page_bytes)
    return needed


def _recommendations(
    in_effect: CacheParameters, best: CacheParameters, profile: EngineProfile, gpu_memory: int | None = None
) -> tuple[Recommendation, ...]:
    geometries = rank_geometries(profile, best)
    caches = sum(geometry.host_pages * geometry.page_bytes for geometry in geometries) * profile.tp_size
    costs = {
        "optimal_adapter_size": (max(g.page_bytes for g in geometries), "one page, the least an adapter takes"),
        "max_adapter_size": (max(g.min_bytes for g in geometries), "the least host cache the engine loads with"),
        "host_memory_bytes": (caches, f"host memory of all {profile.tp_size * profile.pp_size} processes"),
    }
    if gpu_memory is not None:
        costs["gpu_memory_fraction"] = (int(best.gpu_memory_fraction * gpu_memory), "memory of each GPU")
    before, after = asdict(in_effect), asdict(best)
    return tuple(
        Recommendation(PARAMETER_NAMES[attribute], before[attribute], after[attribute], *cost)
        for attribute, cost in costs.items()
    )
