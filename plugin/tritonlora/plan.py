# SPDX-FileCopyrightText: the tritonlora authors
# SPDX-License-Identifier: Apache-2.0
"""Does it fit: adapters + engine + config.pbtxt's parameters -> pages, bytes, and the parameters to set.

All numbers come from `cache`, so that they are the engine's own. Each process of the engine (a tensor-parallel and
pipeline-parallel rank) has a host cache of lora_cache_host_memory_bytes to itself; pipeline-parallel ranks hold other
layers, so each is planned, and an adapter fits only if it fits on every one.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace

from tritonlora.adapters import ITEMSIZES
from tritonlora.cache import (
    PARAMETER_NAMES,
    CacheParameters,
    PageGeometry,
    layer_ranges,
    page_geometry,
    parse_parameters,
)
from tritonlora.engine import EngineProfile
from tritonlora.errors import EngineMismatch, TritonLoraError, one_message
from tritonlora.modules import BY_ID

Rows = tuple[tuple[int, ...], ...]  # lora_config, row by row

_USUAL_RANKS = (8, 16, 32, 64)
_DEFAULT_MAX_LORA_RANK = 64
_SHM_GROWTH = 2 * 1024**2  # a stub's region grows in steps and holds the request's other tensors too


@dataclass(frozen=True, slots=True)
class Entry:
    """One registered adapter, as the planner needs it."""

    name: str
    rows: Rows  # (module_id, layer, adapter_size), or with a fourth value: 1 where the row has DoRA
    weights_nbytes: int
    warm: bool = True  # loaded at start by model_warmup

    @property
    def nbytes(self) -> int:
        """Bytes of lora_weights and lora_config together."""
        return self.weights_nbytes + 4 * sum(len(row) for row in self.rows)


@dataclass(frozen=True, slots=True)
class AdapterPlan:
    """What one adapter takes."""

    name: str
    ranks: tuple[int, ...]  # the different adapter sizes in it
    modules: tuple[str, ...]
    nbytes: int
    pages: int  # on the pipeline-parallel rank where it takes most
    warm: bool


@dataclass(frozen=True, slots=True)
class RankPlan:
    """The host cache of the processes of one pipeline-parallel rank."""

    page_bytes: int
    host_pages: int
    pages: int  # that all adapters take together
    warm_pages: int
    refusal: str | None  # the engine's words when it does not even load with these parameters

    @property
    def free_pages(self) -> int:
        """Pages left with every adapter cached; negative when they do not fit."""
        return self.host_pages - self.pages


@dataclass(frozen=True, slots=True)
class Recommendation:
    """The value to set one parameter to. Equal to the one in effect where nothing has to change."""

    parameter: str
    in_effect: int
    value: int
    cost_bytes: int
    cost: str  # what the bytes are


@dataclass(frozen=True, slots=True)
class CachePlan:
    """Whether the adapters fit, and what to do about it. Plain values: `dataclasses.asdict` gives JSON."""

    parameters: CacheParameters
    remarks: tuple[str, ...]  # about parameters that could not be read
    processes: int  # tensor-parallel times pipeline-parallel, each with a host cache of its own
    ranks: tuple[RankPlan, ...]
    adapters: tuple[AdapterPlan, ...]
    recommendations: tuple[Recommendation, ...]
    room: Mapping[int, int]  # adapter size -> how many more adapters of it, on all modules and layers, still fit
    load_bytes: int  # host memory that loading takes: Triton holds all warmup files at once
    resend_shm_bytes: int  # /dev/shm that the router needs for each adapter it sends at one time

    @property
    def tightest(self) -> RankPlan:
        """The pipeline-parallel rank with the least room."""
        return min(self.ranks, key=lambda rank: rank.free_pages)

    @property
    def fits(self) -> bool:
        """Whether all adapters can be cached at once."""
        return all(rank.refusal is None and rank.free_pages >= 0 for rank in self.ranks)

    @property
    def warm_fits(self) -> bool:
        """Whether all warm adapters are still cached when the server is ready."""
        return all(rank.refusal is None and rank.warm_pages <= rank.host_pages for rank in self.ranks)


@dataclass(frozen=True, slots=True)
class WarmChoice:
    """Which adapters to keep warm when not all fit, and what the others cost."""

    warm: tuple[str, ...]
    cold: tuple[str, ...]
    resend_share: float  # of all requests, those for a cold adapter: each may have to carry weights
    resend_bytes: float  # that a request has to carry on average


def plan_cache(entries: Sequence[Entry], profile: EngineProfile, parameters: Mapping[str, str]) -> CachePlan:
    """The plan for `entries` with the model's `parameters` (those of config.pbtxt, as text).

    EngineMismatch: the engine has no LoRA at all, or rows name modules, layers or sizes that it does not take.
    """
    _check(entries, profile)
    if profile.max_lora_rank is None:  # trtllm-build's default, unless an adapter is for an engine that takes more
        most = max((row[2] for entry in entries for row in entry.rows), default=0)
        profile = replace(profile, max_lora_rank=max(_DEFAULT_MAX_LORA_RANK, most))
    in_effect, remarks = parse_parameters(parameters)
    geometries = _geometries(profile, in_effect)
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
    plan = CachePlan(
        parameters=in_effect,
        remarks=tuple(remarks.values()),
        processes=profile.tp_size * profile.pp_size,
        ranks=ranks,
        adapters=tuple(
            AdapterPlan(
                name=entry.name,
                ranks=tuple(sorted({row[2] for row in entry.rows})),
                modules=tuple(BY_ID[module_id].name for module_id in sorted({row[0] for row in entry.rows})),
                nbytes=entry.nbytes,
                pages=max(pages_of[entry.rows] for pages_of in pages),
                warm=entry.warm,
            )
            for entry in entries
        ),
        recommendations=(),
        room=_room(entries, profile, geometries, ranks),
        load_bytes=sum(entry.nbytes for entry in entries if entry.warm),
        resend_shm_bytes=max((entry.nbytes for entry in entries), default=0) + _SHM_GROWTH,
    )
    best = in_effect if plan.fits else _cheapest(entries, profile, in_effect)
    return replace(plan, recommendations=_recommendations(in_effect, best, profile))


def what_if(
    entries: Sequence[Entry], profile: EngineProfile, parameters: Mapping[str, str], *, rank: int, count: int
) -> CachePlan:
    """The plan with `count` more warm adapters of adapter size `rank`, on all modules and layers.

    EngineMismatch as for `plan_cache`, and when the engine does not take that rank.
    """
    if profile.modules and not 0 < rank <= profile.rank_limit:
        raise EngineMismatch(f"{profile.source}: the engine takes ranks 1 to {profile.rank_limit}, not {rank}")
    rows = _full_rows(profile, rank)
    width = max((rank * (dims.in_features + dims.out_features) for dims in profile.modules.values()), default=0)
    weights_nbytes = len(rows) * width * ITEMSIZES[profile.dtype]
    more = [Entry(f"what-if-{number}", rows, weights_nbytes) for number in range(1, count + 1)]
    return plan_cache([*entries, *more], profile, parameters)


def choose_warm(plan: CachePlan, traffic: Mapping[str, float]) -> WarmChoice:
    """Keep those warm that answer most requests for each page; `traffic` has the requests (or a weight) by name.

    Room for one of the others stays free, so that loading one evicts no warm adapter. The shares are an estimate:
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
    if problems:
        raise EngineMismatch(one_message(f"adapters that are not for the engine of {profile.source}", problems))


def _module_name(module_id: int) -> str:
    return BY_ID[module_id].name if module_id in BY_ID else repr(module_id)


def _geometries(profile: EngineProfile, parameters: CacheParameters) -> list[PageGeometry]:
    return [
        page_geometry(
            profile.modules,
            layers=layers,
            max_lora_rank=profile.rank_limit,
            parameters=parameters,
            element_size=ITEMSIZES[profile.dtype],
            tp_size=profile.tp_size,
        )
        for layers in layer_ranges(profile.num_layers, profile.pp_size)
    ]


def _pages_by_rows(entries: Sequence[Entry], geometry: PageGeometry) -> dict[Rows, int]:
    """Hundreds of adapters mostly share a few shapes: each is packed once."""
    return {rows: geometry.pages(rows) for rows in {entry.rows for entry in entries}}


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
            rank.free_pages // geometry.pages(rows) if rank.refusal is None else 0
            for geometry, rank in zip(geometries, ranks, strict=True)
        ]
        room[size] = max(0, min(free))
    return room


def _cheapest(entries: Sequence[Entry], profile: EngineProfile, in_effect: CacheParameters) -> CacheParameters:
    """The parameters with which all adapters fit in the least host memory; memory is never taken away.

    A page is best when most adapters fill it. So only the sizes at which one of them just fills a page, or that are
    the rank of one, are tried.
    """
    largest = max((row[2] for entry in entries for row in entry.rows), default=in_effect.max_adapter_size)
    candidates = {in_effect.optimal_adapter_size} | {row[2] for entry in entries for row in entry.rows}
    for geometry in _geometries(profile, replace(in_effect, optimal_adapter_size=1, max_adapter_size=1)):
        for rows in {entry.rows for entry in entries}:
            slots = sum(placement.slots for placement in geometry.place(rows))
            candidates.add(max(1, -(-slots // geometry.slots_per_page)))

    options = []
    for optimal in {min(size, profile.rank_limit) for size in candidates}:
        option = replace(in_effect, optimal_adapter_size=optimal, max_adapter_size=largest)
        options.append(replace(option, host_memory_bytes=_needed(entries, profile, option)))
    best = min(options, key=lambda option: (option.host_memory_bytes, -option.optimal_adapter_size))
    return replace(best, host_memory_bytes=max(best.host_memory_bytes, in_effect.host_memory_bytes))


def _needed(entries: Sequence[Entry], profile: EngineProfile, parameters: CacheParameters) -> int:
    """The least lora_cache_host_memory_bytes for all adapters at once: whole pages, for some releases round down."""
    needed = 0
    for geometry in _geometries(profile, parameters):
        pages_of = _pages_by_rows(entries, geometry)
        pages = sum(pages_of[entry.rows] for entry in entries)
        least_pages = -(-geometry.min_host_bytes // geometry.page_bytes)
        needed = max(needed, max(pages, least_pages) * geometry.page_bytes)
    return needed


def _recommendations(
    in_effect: CacheParameters, best: CacheParameters, profile: EngineProfile
) -> tuple[Recommendation, ...]:
    geometries = _geometries(profile, best)
    caches = sum(geometry.host_pages * geometry.page_bytes for geometry in geometries) * profile.tp_size
    costs = {
        "optimal_adapter_size": (max(g.page_bytes for g in geometries), "one page, the least an adapter takes"),
        "max_adapter_size": (max(g.min_host_bytes for g in geometries), "the least host cache the engine loads with"),
        "host_memory_bytes": (caches, f"host memory of all {profile.tp_size * profile.pp_size} processes"),
    }
    values = asdict(best)
    return tuple(
        Recommendation(PARAMETER_NAMES[attribute], before, values[attribute], *costs[attribute])
        for attribute, before in asdict(in_effect).items()
    )
