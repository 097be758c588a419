# SPDX-FileCopyrightText: the tritonlora authors
# SPDX-License-Identifier: Apache-2.0
"""The plan against worked-out figures, and against the cache itself on random adapters."""

from __future__ import annotations

import json
import math
from collections.abc import Iterable
from dataclasses import asdict, replace

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from tritonlora.architectures.lora_modules import BY_NAME, ModuleDims
from tritonlora.cpu_engine.peft_cache import LoraCache, LoraCacheError, PeftCache
from tritonlora.engine.cache_plan import CachePlan, Entry, choose_warm, loadable_remedy, plan_cache, what_if
from tritonlora.engine.lora_cache import CacheParameters, layer_ranges, page_geometry
from tritonlora.engine.profile import EngineProfile
from tritonlora.errors import EngineMismatch, TritonLoraError

MIB = 2**20


def profile_of(
    dims: dict[str, tuple[int, int]],
    *,
    num_layers: int,
    tp_size: int = 1,
    pp_size: int = 1,
    max_lora_rank: int | None = 64,
) -> EngineProfile:
    modules = {name: ModuleDims(BY_NAME[name], *in_out) for name, in_out in dims.items()}
    return EngineProfile(
        "an engine", "LlamaForCausalLM", "bfloat16", num_layers, modules, max_lora_rank, tp_size, pp_size
    )


LLAMA_2_7B = profile_of(
    {
        "attn_q": (4096, 4096),
        "attn_k": (4096, 4096),
        "attn_v": (4096, 4096),
        "attn_dense": (4096, 4096),
        "mlp_h_to_4h": (4096, 11008),
        "mlp_4h_to_h": (11008, 4096),
        "mlp_gate": (4096, 11008),
    },
    num_layers=32,
)  # a page of 40 MiB for rank 8; 26 of them in the default 1 GiB


def llama_adapter(
    name: str, rank: int, modules: tuple[int, ...] = (1, 2, 3, 4, 5, 6, 7), *, warm: bool = True
) -> Entry:
    rows = tuple((module, layer, rank) for layer in range(32) for module in modules)
    return Entry(name, rows, len(rows) * rank * (4096 + 11008) * 2, warm)


def recommended(plan: CachePlan) -> dict[str, str]:
    return {item.parameter: str(item.value) for item in plan.recommendations}


def test_adapters_that_fit_are_told_so_and_nothing_changes() -> None:
    """Three ranks on Llama-2-7B with no parameter set: 1, 2 and 8 of 26 pages, and the defaults stay."""
    plan = plan_cache([llama_adapter("a", 8), llama_adapter("b", 16), llama_adapter("c", 64)], LLAMA_2_7B, {})

    assert plan.fits
    assert [("a", 1), ("b", 2), ("c", 8)] == [(adapter.name, adapter.pages) for adapter in plan.adapters]
    assert (40 * MIB, 26, 11, 15) == (
        plan.tightest.page_bytes,
        plan.tightest.host_pages,
        plan.tightest.pages,
        plan.tightest.free_pages,
    )
    assert [(item.in_effect, item.in_effect) for item in plan.recommendations] == [
        (item.in_effect, item.value) for item in plan.recommendations
    ]


def test_room_says_how_many_more_fit() -> None:
    """One of 26 pages is taken: 25 more of rank 8, 12 of rank 16, 6 of rank 32, 3 of rank 64."""
    plan = plan_cache([llama_adapter("a", 8)], LLAMA_2_7B, {})

    assert {8: 25, 16: 12, 32: 6, 64: 3} == plan.room


def test_adapters_that_do_not_fit_get_parameters_with_which_they_do() -> None:
    """Thirty adapters of rank 8 take 30 pages of 40 MiB; the parameters recommended hold exactly these."""
    entries = [llama_adapter(f"a{number}", 8) for number in range(30)]
    plan = plan_cache(entries, LLAMA_2_7B, {"lora_cache_host_memory_bytes": "${lora_cache_host_memory_bytes}"})
    applied = plan_cache(entries, LLAMA_2_7B, recommended(plan))

    assert not plan.fits
    assert {
        "lora_cache_optimal_adapter_size": "8",
        "lora_cache_max_adapter_size": "8",
        "lora_cache_host_memory_bytes": str(30 * 40 * MIB),
    } == recommended(plan)
    assert [40 * MIB, 39_976_960, 30 * 40 * MIB] == [item.cost_bytes for item in plan.recommendations]
    assert (True, 0) == (applied.fits, applied.tightest.free_pages)


def test_pages_made_for_larger_adapters_are_recommended_away_before_memory() -> None:
    """Pages for rank 64 hold 4 adapters of rank 8 in 1 GiB; pages for rank 8 hold all ten in the same memory."""
    entries = [llama_adapter(f"a{number}", 8) for number in range(10)]
    plan = plan_cache(entries, LLAMA_2_7B, {"lora_cache_optimal_adapter_size": "64"})

    assert (False, 4) == (plan.fits, plan.tightest.host_pages)
    assert ["8", "8", str(2**30)] == list(recommended(plan).values())


def test_adapters_on_few_modules_get_smaller_pages() -> None:
    """Only q and v of seven modules at rank 8: a page for rank 2 on all modules is what one fills."""
    entries = [llama_adapter(f"a{number}", 8, (1, 3)) for number in range(100)]
    plan = plan_cache(entries, LLAMA_2_7B, {})

    assert {"lora_cache_optimal_adapter_size": "2", "lora_cache_host_memory_bytes": str(2**30)}.items() <= recommended(
        plan
    ).items()


def test_an_engine_that_would_not_load_does_not_fit() -> None:
    """Less memory than one adapter of the max size takes is refused in the engine's words."""
    plan = plan_cache([], LLAMA_2_7B, {"lora_cache_host_memory_bytes": "1000000"})

    assert not plan.fits
    assert "Not enough space allocated to host LoRA cache to hold 1 max sized LoRA 61 < 19520" == plan.tightest.refusal
    assert {8: 0, 16: 0, 32: 0, 64: 0} == plan.room


def test_loading_and_resending_have_their_price() -> None:
    """Loading holds the files of all warm adapters; a re-send needs the largest adapter in /dev/shm."""
    entries = [llama_adapter("a", 8), llama_adapter("b", 16), llama_adapter("c", 32, warm=False)]
    plan = plan_cache(entries, LLAMA_2_7B, {})

    assert sum(224 * (rank * 15104 * 2 + 12) for rank in (8, 16)) == plan.load_bytes
    assert 224 * (32 * 15104 * 2 + 12) + 2 * MIB == plan.resend_shm_bytes


def test_warm_adapters_are_counted_apart() -> None:
    """Thirty adapters do not fit in 26 pages, twenty of them warm do."""
    entries = [llama_adapter(f"a{number}", 8, warm=number < 20) for number in range(30)]
    plan = plan_cache(entries, LLAMA_2_7B, {})

    assert (False, True, 20) == (plan.fits, plan.warm_fits, plan.tightest.warm_pages)


def test_what_if_adds_adapters_on_all_modules() -> None:
    """25 more of rank 8 fit next to one, 26 do not."""
    fits = [what_if([llama_adapter("a", 8)], LLAMA_2_7B, {}, rank=8, count=count).fits for count in (25, 26)]

    assert [True, False] == fits


def test_processes_of_all_ranks_are_counted_and_planned() -> None:
    """Two pipeline ranks with two layers each, split in two: four caches, where an adapter takes one or two pages."""
    profile = profile_of({"attn_q": (64, 64)}, num_layers=4, tp_size=2, pp_size=2)
    parameters = {"lora_cache_max_adapter_size": "8", "lora_cache_host_memory_bytes": "100000"}
    plan = plan_cache([Entry("a", ((1, 0, 8), (1, 2, 8), (1, 3, 16)), 4096)], profile, parameters)

    assert [(2 * 8 * 96 * 2, 33, 1), (2 * 8 * 96 * 2, 33, 2)] == [
        (rank.page_bytes, rank.host_pages, rank.pages) for rank in plan.ranks
    ]
    assert (4, 2, (1, 2), 2 * (33 * 3072 + 33 * 3072)) == (
        plan.processes,
        plan.adapters[0].pages,
        plan.adapters[0].pages_by_rank,
        plan.recommendations[-1].cost_bytes,
    )


# What the engine accepts and cannot serve


ONE_MODULE = profile_of({"attn_dense": (4096, 4096)}, num_layers=32, pp_size=4, max_lora_rank=128)


def one_module_adapter(name: str, rank: int, layers: Iterable[int] = range(32)) -> Entry:
    rows = tuple((BY_NAME["attn_dense"].id, layer, rank) for layer in layers)
    return Entry(name, rows, len(rows) * rank * 8192 * 2)


def test_an_adapter_with_a_row_wider_than_a_page_does_not_fit() -> None:
    """With default parameters the engine has pages for it and never loads it; what is recommended makes it loadable."""
    plan = plan_cache([one_module_adapter("wide", 128), one_module_adapter("small", 8)], ONE_MODULE, {})
    applied = plan_cache([one_module_adapter("wide", 128)], ONE_MODULE, recommended(plan))

    assert not plan.fits
    assert ["wide"] == [adapter.name for adapter in plan.unloadable]
    assert "takes 128 slots, and a page of the engine's LoRA cache has 64" in str(plan.unloadable[0].unloadable)
    assert "128" == recommended(plan)["lora_cache_max_adapter_size"]
    assert (True, ()) == (applied.fits, applied.unloadable)


@pytest.mark.parametrize(
    ("max_lora_rank", "registered", "remedy"),
    [
        (128, True, "set lora_cache_max_adapter_size to at least 128: tritonlora plan --apply"),
        (
            128,
            False,
            "set lora_cache_max_adapter_size to at least 128: tritonlora plan --apply --what-if rank=128,count=1",
        ),
        (127, True, "build the engine with --max_lora_rank 128"),
    ],
)
def test_the_remedy_for_a_row_wider_than_a_page_is_a_parameter_or_another_engine(
    max_lora_rank: int, registered: bool, remedy: str
) -> None:
    """The page cannot become wider than the engine's max_lora_rank makes it."""
    plan = replace(plan_cache([one_module_adapter("wide", 128)], ONE_MODULE, {}), max_lora_rank=max_lora_rank)

    assert remedy == loadable_remedy(plan, plan.adapters[0], registered=registered)


def test_nothing_more_fits_of_a_rank_that_cannot_be_loaded() -> None:
    """A page of 64 slots holds no row of rank 128."""
    plan = plan_cache([one_module_adapter("small", 8), one_module_adapter("wide", 128)], ONE_MODULE, {})

    assert (0, True) == (plan.room[128], plan.room[64] > 0)


def test_an_adapter_without_layers_on_a_pipeline_rank_is_refused() -> None:
    """Layers 16 to 23 are all that rank 2 has."""
    missing = [*range(16), *range(24, 32)]
    with pytest.raises(
        EngineMismatch, match="'x': it has no LoRA in layers 16 to 23, all that pipeline-parallel rank 2"
    ):
        plan_cache([one_module_adapter("x", 8, missing)], ONE_MODULE, {})


def test_layers_that_do_not_divide_among_the_ranks_are_refused() -> None:
    """TensorRT-LLM would lose the LoRA of the last ones."""
    engine = replace(ONE_MODULE, num_layers=30)
    with pytest.raises(EngineMismatch, match="30 layers do not divide among its 4 pipeline-parallel ranks"):
        plan_cache([], engine, {})


def test_adapters_with_other_pages_on_other_ranks_are_named_where_not_all_fit() -> None:
    """Ranks would evict different adapters. Where all fit, none is evicted."""
    uneven = one_module_adapter("uneven", 8, [0, 8, 16, *range(24, 32)])
    uneven = replace(uneven, rows=tuple((*row[:2], 64) if row[1] >= 24 else row for row in uneven.rows))
    entries = [uneven, one_module_adapter("even", 8)]
    roomy = plan_cache(entries, ONE_MODULE, {})
    narrow = plan_cache(entries, ONE_MODULE, {"lora_cache_host_memory_bytes": str(8 * roomy.ranks[0].page_bytes)})

    assert (1, 1, 1, 8) == narrow.adapters[0].pages_by_rank
    assert ((), ("uneven",)) == (roomy.diverging, narrow.diverging)


# The GPU's cache


def test_the_gpus_cache_is_planned_from_its_free_memory() -> None:
    """Llama-2-7B, pages of 40 MiB: 2 % of 10 GiB are 204 MiB, 6 pages; an adapter of rank 64 takes 8 and never runs."""
    entries = [llama_adapter("a", 8), llama_adapter("b", 16), llama_adapter("c", 64)]
    parameters = {"lora_cache_max_adapter_size": "32"}
    plan = plan_cache(entries, LLAMA_2_7B, parameters, gpu_memory=10 * 1024 * MIB)
    applied = plan_cache(entries, LLAMA_2_7B, recommended(plan), gpu_memory=10 * 1024 * MIB)

    assert plan.device is not None
    assert (6, None, 0, 2, ("c",)) == (
        plan.device.pages,
        plan.device.refusal,
        plan.device.any_in_one_batch,
        plan.device.most_in_one_batch,
        plan.device.never_scheduled,
    )
    assert "0.0313" == recommended(plan)["lora_cache_gpu_memory_fraction"]  # 8 pages of 40 MiB
    assert applied.device is not None
    assert (9, 1, 2, ()) == (
        applied.device.pages,
        applied.device.any_in_one_batch,
        applied.device.most_in_one_batch,
        applied.device.never_scheduled,
    )


def test_a_gpu_with_too_little_memory_is_refused_in_the_engines_words() -> None:
    """One adapter of lora_cache_max_adapter_size must fit: 320 MiB for rank 64, of which 2 % of 10 GiB is less."""
    plan = plan_cache([], LLAMA_2_7B, {}, gpu_memory=10 * 1024 * MIB)
    least = plan_cache([], LLAMA_2_7B, {}, gpu_memory=plan.min_gpu_bytes)

    assert plan.device is not None
    assert (
        "Not enough space allocated to device LoRA cache to hold 1 max sized LoRA 13107 < 19520" == plan.device.refusal
    )
    assert least.device is not None
    assert least.device.refusal is None


def test_without_the_gpus_memory_nothing_is_said_of_its_cache() -> None:
    """No fraction is recommended either."""
    plan = plan_cache([], LLAMA_2_7B, {})

    assert plan.device is None
    assert "lora_cache_gpu_memory_fraction" not in recommended(plan)


def test_a_plan_is_json() -> None:
    """`asdict` of a plan goes through json."""
    plan = plan_cache([llama_adapter("a", 8)], LLAMA_2_7B, {})

    assert ["attn_q", "attn_k", "attn_v", "attn_dense", "mlp_h_to_4h", "mlp_4h_to_h", "mlp_gate"] == json.loads(
        json.dumps(asdict(plan))
    )["adapters"][0]["modules"]


def test_an_engine_without_lora_is_refused() -> None:
    """Such an engine takes every adapter and ignores it."""
    with pytest.raises(EngineMismatch, match="the engine has no LoRA modules, it would ignore every adapter"):
        plan_cache([], profile_of({}, num_layers=2), {})


def test_rows_that_are_not_the_engines_are_all_named() -> None:
    """Module, layer and rank of every adapter, in one error."""
    profile = profile_of({"attn_q": (64, 64)}, num_layers=2)
    with pytest.raises(EngineMismatch) as refused:
        plan_cache([Entry("a", ((7, 0, 8), (1, 2, 8)), 0), Entry("b", ((99, 0, 65),), 0)], profile, {})

    assert [
        "adapters that are not for the engine of an engine:",
        "  'a': module mlp_gate is not enabled in the engine",
        "  'a': layer 2 of 2 layers",
        "  'b': module 99 is not enabled in the engine",
        "  'b': rank 65, the engine takes 1 to 64",
    ] == str(refused.value).splitlines()


@pytest.mark.parametrize(("rank", "assumed"), [(8, 64), (128, 128)])
def test_without_an_engine_the_rank_it_takes_is_assumed(rank: int, assumed: int) -> None:
    """A base model has no max_lora_rank: it is trtllm-build's default, or the larger rank of an adapter."""
    entries, parameters = [llama_adapter("a", rank)], {"lora_cache_max_adapter_size": "256"}
    unknown, engine = replace(LLAMA_2_7B, max_lora_rank=None), replace(LLAMA_2_7B, max_lora_rank=assumed)

    assert plan_cache(entries, engine, parameters) == plan_cache(entries, unknown, parameters)
    assert what_if([], engine, {}, rank=rank, count=1) == what_if([], unknown, {}, rank=rank, count=1)


def test_the_busiest_adapters_stay_warm() -> None:
    """30 of one page for 26: one page stays free for a cold one, so 25 are warm, and the rest carry weights."""
    entries = [llama_adapter(f"a{number:02}", 8) for number in range(30)]
    traffic = {f"a{number:02}": float(number) for number in range(30)}
    choice = choose_warm(plan_cache(entries, LLAMA_2_7B, {}), traffic)

    assert {f"a{number:02}" for number in range(5, 30)} == set(choice.warm)
    assert 10 / 435 == choice.resend_share
    assert pytest.approx(10 / 435 * entries[0].nbytes) == choice.resend_bytes


def test_everything_stays_warm_when_everything_fits() -> None:
    """Without traffic too."""
    choice = choose_warm(plan_cache([llama_adapter("a", 8), llama_adapter("b", 8)], LLAMA_2_7B, {}), {})

    assert (("a", "b"), (), 0.0) == (choice.warm, choice.cold, choice.resend_share)


def test_traffic_of_unknown_adapters_is_refused() -> None:
    """A misspelt name would otherwise count as no traffic."""
    with pytest.raises(TritonLoraError, match="not registered: 'b'"):
        choose_warm(plan_cache([llama_adapter("a", 8)], LLAMA_2_7B, {}), {"b": 1.0})


def test_what_if_of_a_rank_that_the_engine_does_not_take_is_refused() -> None:
    """Once, not once for each adapter."""
    with pytest.raises(EngineMismatch, match="^an engine: the engine takes ranks 1 to 64, not 65$"):
        what_if([], LLAMA_2_7B, {}, rank=65, count=200)


SMALL = {"attn_q": (16, 16), "attn_k": (16, 8), "attn_v": (16, 8), "attn_dense": (16, 16), "mlp_4h_to_h": (48, 16)}
LAYERS = 4


@st.composite
def adapters(draw: st.DrawFn) -> list[Entry]:
    module_ids = [BY_NAME[name].id for name in SMALL]
    row = st.tuples(st.sampled_from(module_ids), st.integers(1, 16), st.integers(-1, 1))
    of_layer = st.lists(row, min_size=1, max_size=5, unique_by=lambda row: row[0])  # no pipeline rank is without rows
    layers = draw(st.lists(st.tuples(*[of_layer] * LAYERS), max_size=8))
    return [
        Entry(f"a{number}", tuple((id_, layer, r, dora) for layer in range(LAYERS) for id_, r, dora in each[layer]), 0)
        for number, each in enumerate(layers)
    ]


def all_stay(entries: list[Entry], profile: EngineProfile, parameters: CacheParameters) -> bool:
    """Whether the caches of all pipeline ranks take all adapters with a request open on each."""
    for layers in layer_ranges(profile.num_layers, profile.pp_size):
        geometry = page_geometry(
            profile.modules,
            layers=layers,
            max_lora_rank=profile.rank_limit,
            parameters=parameters,
            tp_size=profile.tp_size,
        )
        cache = PeftCache(LoraCache[str](geometry.host_pages))
        try:
            for number, entry in enumerate(entries):
                cache.add(number, number, (geometry.pages(entry.rows), entry.name.__str__))
        except LoraCacheError:
            return False
    return True


@settings(max_examples=150, deadline=None)
@example(entries=[], tp_size=1, pp_size=1, optimal=17, memory=20_000)
@given(
    entries=adapters(),
    tp_size=st.sampled_from([1, 2, 4]),
    pp_size=st.sampled_from([1, 2, 4]),
    optimal=st.integers(1, 20),
    memory=st.integers(20_000, 200_000),
)
def test_plan_and_cache_agree(entries: list[Entry], tp_size: int, pp_size: int, optimal: int, memory: int) -> None:
    """A plan says that all fit exactly when the cache takes all of them at once; what it recommends always fits."""
    profile = profile_of(SMALL, num_layers=LAYERS, tp_size=tp_size, pp_size=pp_size, max_lora_rank=16)
    parameters = {"lora_cache_optimal_adapter_size": str(optimal), "lora_cache_host_memory_bytes": str(memory)}
    plan = plan_cache(entries, profile, parameters)
    better = plan_cache(entries, profile, recommended(plan))

    assert all_stay(entries, profile, plan.parameters) == all(rank.free_pages >= 0 for rank in plan.ranks)
    # A row of the engine's highest rank with DoRA's magnitude on top can be wider than any page of one layer.
    assert better.fits or (better.unloadable and pp_size == LAYERS)
    assert all_stay(entries, profile, better.parameters)
    assert better.parameters.host_memory_bytes >= plan.parameters.host_memory_bytes


def upstreams_pages(
    entry: Entry, profile: EngineProfile, layers: range, optimal: int, memory: int
) -> tuple[int, int, int]:
    """(bytes of a page, pages of the host cache, pages of the adapter), as upstream's formulas have them.

    TensorRT-LLM `getPageManagerConfig`, `getMaxNumSlots` and `determineNumPages`, written down once more, with 64 for
    lora_cache_max_adapter_size and 2 bytes a value.
    """
    split_in = {"attn_dense", "mlp_4h_to_h"}

    def local(name: str) -> tuple[int, int]:
        inward, outward = SMALL[name]
        tp = profile.tp_size
        return (inward // tp, outward) if name in split_in else (inward, outward // tp)

    one_dim = {name: sum(local(name)) for name in SMALL}
    width = min(one_dim.values())
    opt, largest = min(optimal, profile.rank_limit), min(64, profile.rank_limit)
    per_layer = sum(opt * math.ceil(one / width) for one in one_dim.values())
    slots_per_page = max(per_layer * len(layers), math.ceil(largest * max(one_dim.values()) / width))
    page = used = 0
    for module_id, layer, r, dora in entry.rows:
        if layer not in layers:
            continue
        name = next(name for name in SMALL if BY_NAME[name].id == module_id)
        slots = math.ceil((r * one_dim[name] + (local(name)[1] if dora else 0)) / width)
        if used + slots > slots_per_page:
            page, used = page + 1, 0
        used += slots
    return slots_per_page * width * 2, math.ceil(memory // (width * 2) / slots_per_page), page + 1


@settings(max_examples=300, deadline=None)
@given(
    entries=adapters(),
    tp_size=st.sampled_from([1, 2, 4]),
    pp_size=st.sampled_from([1, 2, 4]),
    optimal=st.integers(1, 20),
    memory=st.integers(20_000, 200_000),
)
def test_a_plan_has_upstreams_figures(
    entries: list[Entry], tp_size: int, pp_size: int, optimal: int, memory: int
) -> None:
    """Page size, pages of the cache, and pages of every adapter on every pipeline rank."""
    profile = profile_of(SMALL, num_layers=LAYERS, tp_size=tp_size, pp_size=pp_size, max_lora_rank=16)
    parameters = {"lora_cache_optimal_adapter_size": str(optimal), "lora_cache_host_memory_bytes": str(memory)}
    plan = plan_cache(entries, profile, parameters)
    layers = [range(LAYERS // pp_size * rank, LAYERS // pp_size * (rank + 1)) for rank in range(pp_size)]
    expected = [[upstreams_pages(entry, profile, each, optimal, memory) for entry in entries] for each in layers]

    assert [max(ranks) for ranks in zip(*[[pages for *_, pages in each] for each in expected], strict=True)] == [
        adapter.pages for adapter in plan.adapters
    ]
    for each, rank in zip(expected, plan.ranks, strict=True):
        assert {(rank.page_bytes, rank.host_pages)} >= {(size, total) for size, total, _ in each}
        assert sum(pages for *_, pages in each) == rank.pages
