# SPDX-FileCopyrightText: the tritonlora authors
# SPDX-License-Identifier: Apache-2.0
"""The LoRA host cache against the vectors of TensorRT-LLM's own unit tests, and against its own invariants."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, rule

from tritonlora.architectures.lora_modules import BY_NAME, ModuleDims
from tritonlora.cpu_engine.peft_cache import BatchError, LoraCache, LoraCacheError, PeftCache, TaskNotCachedError
from tritonlora.engine.lora_cache import CacheParameters, PageGeometry, layer_ranges, page_geometry, parse_parameters

Rows = list[tuple[int, ...]]


def modules_of(**dims: tuple[int, int]) -> dict[str, ModuleDims]:
    return {name: ModuleDims(BY_NAME[name], *in_out) for name, in_out in dims.items()}


# hidden 16, mlp 32, 13 modules: the model of upstream's peftCacheManagerTest and loraCacheTest
SMALL = modules_of(
    attn_qkv=(16, 48),
    attn_q=(16, 16),
    attn_k=(16, 16),
    attn_v=(16, 16),
    attn_dense=(16, 16),
    mlp_h_to_4h=(16, 32),
    mlp_4h_to_h=(32, 16),
    mlp_gate=(16, 32),
    cross_attn_qkv=(16, 48),
    cross_attn_q=(16, 16),
    cross_attn_k=(16, 16),
    cross_attn_v=(16, 16),
    cross_attn_dense=(16, 16),
)


def small(parameters: CacheParameters = CacheParameters(), max_lora_rank: int = 64) -> PageGeometry:  # noqa: B008
    return page_geometry(
        SMALL, layers=range(2), max_lora_rank=max_lora_rank, parameters=parameters, element_size=4, tp_size=2
    )


def custom(dims: dict[int, tuple[int, int]], *, page_width: int, slots_per_page: int) -> PageGeometry:
    return PageGeometry(dims, range(2), page_width, slots_per_page, 4, 0, 0)


# Geometry


def test_page_geometry_is_that_of_upstreams_test_model() -> None:
    """peftCacheManagerTest getPageManagerConfig: page width 24, 288 slots in a page."""
    geometry = small()

    assert (24, 288) == (geometry.page_width, geometry.slots_per_page)


@pytest.mark.parametrize(
    ("module_layers", "pages"),
    [(65536, 456), (16584, 116), (2 * 8 * 128, 15), (2 * 8 * 92, 11)],
)
def test_slots_round_up_to_whole_pages(module_layers: int, pages: int) -> None:
    """The same test's explicit counts: each module layer takes ceil(40 / 24) = 2 slots."""
    geometry = small()
    slots = module_layers * 2
    counted = PageGeometry(geometry.local_dims, range(2), 24, 288, 4, 0, slots)

    assert pages == counted.host_pages


def test_host_memory_becomes_pages() -> None:
    """peftCacheManagerTest with hostCacheSize 1e8 and maxAdapterSize 8: 3617 pages of the same geometry."""
    geometry = small(CacheParameters(8, 8, 100_000_000))

    assert (24, 288, 3617) == (geometry.page_width, geometry.slots_per_page, geometry.host_pages)


@pytest.mark.parametrize(("dims", "element_size", "slots"), [((128, 128), 2, 195), ((192, 192), 4, 65)])
def test_host_memory_becomes_slots(dims: tuple[int, int], element_size: int, slots: int) -> None:
    """peftCacheManagerTest getMaxNumSlots with hostCacheSize 100000, page widths 256 and 384."""
    geometry = page_geometry(
        modules_of(attn_q=dims),
        layers=range(1),
        max_lora_rank=64,
        parameters=CacheParameters(host_memory_bytes=100_000),
        element_size=element_size,
    )

    assert slots == geometry.host_slots


def llama_like(hidden: int, mlp: int, heads: int, kv_heads: int, *, only_qkv: bool = False) -> dict[str, ModuleDims]:
    kv = hidden // heads * kv_heads
    qkv = modules_of(attn_q=(hidden, hidden), attn_k=(hidden, kv), attn_v=(hidden, kv))
    rest = modules_of(
        attn_dense=(hidden, hidden), mlp_h_to_4h=(hidden, mlp), mlp_4h_to_h=(mlp, hidden), mlp_gate=(hidden, mlp)
    )
    return qkv if only_qkv else qkv | rest


@pytest.mark.parametrize(
    ("modules", "layers", "page_width", "slots", "mebibytes", "pages_of_ranks", "host_pages"),
    [
        pytest.param(llama_like(4096, 11008, 32, 32), 32, 8192, 2560, 40.00, (1, 2, 8), 26, id="Llama-2-7B"),
        pytest.param(llama_like(4096, 14336, 32, 8), 32, 5120, 4608, 45.00, (1, 2, 8), 23, id="Llama-3-8B"),
        pytest.param(llama_like(3584, 18944, 28, 4), 28, 4096, 5376, 42.00, (1, 2, 8), 25, id="Qwen2.5-7B"),
        pytest.param(llama_like(2048, 5632, 32, 4), 22, 2304, 3168, 13.92, (1, 2, 8), 74, id="TinyLlama"),
        pytest.param(llama_like(896, 4864, 14, 2), 24, 1024, 4608, 9.00, (1, 2, 8), 114, id="Qwen2.5-0.5B"),
        pytest.param(llama_like(4096, 1, 32, 32, only_qkv=True), 32, 8192, 768, 12.00, (1, 2, 8), 86, id="Llama-2 qkv"),
        pytest.param(llama_like(2048, 1, 32, 4, only_qkv=True), 22, 2304, 704, 3.09, (1, 2, 9), 331, id="Tiny qkv"),
    ],
)
def test_real_models_have_the_worked_out_pages(
    modules: dict[str, ModuleDims],
    layers: int,
    page_width: int,
    slots: int,
    mebibytes: float,
    pages_of_ranks: tuple[int, ...],
    host_pages: int,
) -> None:
    """Page width, slots, size, pages of adapters of rank 8, 16 and 64, and what 1 GiB holds, for seven engines."""
    geometry = page_geometry(modules, layers=range(layers), max_lora_rank=64, parameters=CacheParameters())
    ranks = [
        geometry.pages([(dims.module.id, layer, r) for layer in range(layers) for dims in modules.values()])
        for r in (8, 16, 64)
    ]

    assert (page_width, slots, mebibytes) == (
        geometry.page_width,
        geometry.slots_per_page,
        round(geometry.page_bytes / 2**20, 2),
    )
    assert (pages_of_ranks, host_pages) == (tuple(ranks), geometry.host_pages)


def test_a_cache_below_one_max_sized_adapter_is_refused_in_the_engines_words() -> None:
    """An engine whose cache cannot hold one adapter of the max size does not load."""
    enough = small(CacheParameters(8, 64, small().min_bytes))
    short = small(CacheParameters(8, 64, small().min_bytes - 1))

    assert enough.too_small() is None
    assert "Not enough space allocated to host LoRA cache to hold 1 max sized LoRA 1962 < 1963" == short.too_small()


def test_adapter_sizes_are_capped_by_the_engines_max_rank() -> None:
    """The cache of an engine with max rank 4 has pages for rank 4, whatever the parameters say."""
    assert small(max_lora_rank=4) == small(CacheParameters(4, 4), max_lora_rank=64)


@pytest.mark.parametrize(
    ("ranks", "pages"),
    [
        ([(0, 64), (1, 64)], 2),
        ([(0, 32), (0, 32), (0, 64)], 2),
        ([(0, 32), (0, 32), (0, 64), (0, 24)], 3),
        ([(0, 60), (0, 1), (0, 1), (0, 1), (0, 1)], 2),
        ([(0, 60), (0, 1), (0, 1), (0, 1), (0, 64), (0, 1)], 4),
    ],
)
def test_rows_fill_pages_in_order(ranks: list[tuple[int, int]], pages: int) -> None:
    """loraCacheTest determineNumPages: attn_qkv 8 -> 12, page width 16, 80 slots in a page."""
    geometry = custom({0: (8, 12)}, page_width=16, slots_per_page=80)

    assert pages == geometry.pages([(0, layer, r) for layer, r in ranks])


def test_rows_are_packed_where_upstream_packs_them() -> None:
    """loraCacheTest basicPutGet: (page, slot, slots) of 26 rows, page width 64, 64 slots in a page."""
    thin = {BY_NAME[f"{kind}attn_{x}"].id for kind in ("", "cross_") for x in "qkv"}
    rows: Rows = [(id, layer, 4 if id in thin else 8) for id in range(13) for layer in range(2)]  # noqa: A001
    geometry = custom(dict(small().local_dims), page_width=64, slots_per_page=64)

    # fmt: off
    assert [
        (0, 0, 5), (0, 5, 5), (0, 10, 2), (0, 12, 2), (0, 14, 2), (0, 16, 2), (0, 18, 2), (0, 20, 2), (0, 22, 3),
        (0, 25, 3), (0, 28, 4), (0, 32, 4), (0, 36, 4), (0, 40, 4), (0, 44, 4), (0, 48, 4), (0, 52, 5), (0, 57, 5),
        (0, 62, 2), (1, 0, 2), (1, 2, 2), (1, 4, 2), (1, 6, 2), (1, 8, 2), (1, 10, 3), (1, 13, 3),
    ] == [(at.page, at.slot, at.slots) for at in geometry.place(rows)]
    # fmt: on


@pytest.mark.parametrize(
    ("module", "r", "slots"),
    [("attn_qkv", 8, 14), ("attn_q", 4, 4), ("attn_k", 4, 4), ("attn_dense", 8, 8), ("mlp_gate", 8, 11)],
)
def test_a_row_takes_whole_slots(module: str, r: int, slots: int) -> None:
    """peftCacheManagerTest putGet: the slots of one row at page width 24."""
    assert slots == small().row_slots((BY_NAME[module].id, 0, r))


def test_a_dora_row_takes_its_magnitudes_too() -> None:
    """A fourth column of 1 adds `out` elements, 0 adds none."""
    geometry = custom({0: (8, 8)}, page_width=16, slots_per_page=80)

    assert (4, 4, 5) == tuple(geometry.row_slots(row) for row in [(0, 0, 4), (0, 0, 4, 0), (0, 0, 4, 1)])


def test_rows_of_other_pipeline_ranks_take_no_slots() -> None:
    """A rank packs only its own layers, and an adapter without any of them still takes a page there."""
    rows: Rows = [(0, layer, 64) for layer in range(4)]
    geometry = custom({0: (8, 12)}, page_width=16, slots_per_page=80)  # layers 0 and 1

    assert 2 == geometry.pages(rows)
    assert 1 == geometry.pages(rows[2:])


def test_layers_are_shared_out_to_pipeline_ranks() -> None:
    """Contiguous, in equal shares. Layers that do not divide are refused: upstream loses the LoRA of some."""
    assert (range(4), range(4, 8), range(8, 12)) == layer_ranges(12, 3)
    with pytest.raises(ValueError, match="10 layers do not divide among 3"):
        layer_ranges(10, 3)


# A row that is wider than a page


def test_the_first_row_that_is_wider_than_a_page_is_found() -> None:
    """80 slots of 16 elements hold (8 + 12) * 64 elements, and no more; rows of other ranks do not count."""
    geometry = custom({0: (8, 12)}, page_width=16, slots_per_page=80)

    assert geometry.too_wide([(0, 0, 64), (0, 1, 64)]) is None
    assert (0, 1, 65) == geometry.too_wide([(0, 0, 64), (0, 1, 65), (0, 1, 66)])
    assert geometry.too_wide([(0, 0, 64), (0, 2, 65)]) is None


@pytest.mark.parametrize(("dora", "size"), [(0, 65), (1, 66), (-1, 66)])
def test_the_max_adapter_size_that_a_row_needs_makes_the_page_wide_enough(dora: int, size: int) -> None:
    """It is the rank, and one more where DoRA's magnitudes come on top; any flag but 0 is DoRA."""
    modules, row = modules_of(attn_dense=(16, 16)), (4, 0, 65, dora)

    def page(max_adapter_size: int) -> PageGeometry:
        parameters = CacheParameters(optimal_adapter_size=1, max_adapter_size=max_adapter_size)
        return page_geometry(modules, layers=range(1), max_lora_rank=99, parameters=parameters)

    assert size == page(1).max_size_for(row)
    assert page(size).too_wide([row]) is None
    assert row == page(size - 1).too_wide([row])


def test_a_task_that_cannot_be_loaded_is_accepted_and_never_goes() -> None:
    """Upstream tells why once, and later that the task is being loaded. Its pages stay taken without any request."""
    cache = PeftCache(LoraCache[str](1))
    for request in (1, 2):
        cache.add(1, request, (1, lambda: "weights"), load_error="slice 9 exceeds buffer size 8")
        with pytest.raises(BatchError) as told:
            cache.check_batch([1])
        cache.finish(1, request)
        assert ("slice 9 exceeds" in str(told.value)) == (request == 1)

    assert "Caught exception during copyTask ensure batch -- can't move a processing task taskId=1" == str(told.value)
    with pytest.raises(LoraCacheError, match="no done tasks"):
        cache.add(2, 3, (1, lambda: "other weights"))


def test_parameters_left_out_or_unfilled_have_the_engines_defaults() -> None:
    """Absent, empty and `${...}` mean the default; what is no number is said."""
    parameters, remarks = parse_parameters(
        {
            "lora_cache_optimal_adapter_size": "${lora_cache_optimal_adapter_size}",
            "lora_cache_max_adapter_size": "many",
            "lora_cache_host_memory_bytes": "4096",
        }
    )

    assert CacheParameters(8, 64, 4096) == parameters
    remark = "lora_cache_max_adapter_size is 'many', expected a whole number above 0: the engine's default is assumed"
    assert {"lora_cache_max_adapter_size": remark} == remarks


@pytest.mark.parametrize(
    ("text", "fraction", "remarks"),
    [("0.25", 0.25, 0), ("1", 1.0, 0), ("5e-2", 0.05, 0), ("0", 0.02, 1), ("1.5", 0.02, 1), ("nan", 0.02, 1)],
)
def test_the_share_of_gpu_memory_is_a_fraction(text: str, fraction: float, remarks: int) -> None:
    """Anything else has the engine's default, and is remarked on."""
    parameters, said = parse_parameters({"lora_cache_gpu_memory_fraction": text})

    assert (fraction, remarks) == (parameters.gpu_memory_fraction, len(said))


# The cache


def running(*tasks: int, pages: int = 3) -> PeftCache[str]:
    """A cache in which each task has one page and one request, with the task's id as request id."""
    cache = PeftCache(LoraCache[str](pages))
    for task in tasks:
        cache.add(task, task, (1, f"weights of {task}".__str__))
    return cache


def test_a_new_task_is_refused_when_every_task_is_in_use() -> None:
    """Scenario 1: three pages, three running tasks, and the fourth gets the engine's text; nothing changes."""
    cache = running(1, 2, 3)

    with pytest.raises(LoraCacheError) as refused:
        cache.add(4, 4, (1, lambda: "weights of 4"))

    assert "Error storing task=4 in PEFT cache -- Cache is full. There are no done tasks to evict" == str(refused.value)
    assert {1, 2, 3} == set(cache.cache.tasks)


def test_a_finished_task_makes_room() -> None:
    """Scenario 2: task 1 goes for task 4, is then missed, and task 4 answers to its id alone."""
    cache = running(1, 2, 3)
    cache.finish(1, 1)
    cache.add(4, 4, (1, lambda: "weights of 4"))
    cache.add(4, 5)

    with pytest.raises(TaskNotCachedError) as missed:
        cache.add(1, 6)

    assert "LoRA task 1 not found in cache. Please send LoRA weights with request" == str(missed.value)
    assert {2, 3, 4} == set(cache.cache.tasks)


def test_the_least_recently_finished_task_goes_first() -> None:
    """Scenario 3: finished in order 1, 2, 3, then 1 is used again, so 2 goes."""
    cache = running(1, 2, 3)
    for task in (1, 2, 3):
        cache.finish(task, task)
    cache.add(1, 4)
    cache.finish(1, 4)
    cache.add(4, 5, (1, lambda: "weights of 4"))

    assert {1, 3, 4} == set(cache.cache.tasks)


def test_finished_tasks_are_lost_even_when_they_do_not_make_enough_room() -> None:
    """Scenario 4: two pages are needed, only task 1 can go: it goes, and the request fails all the same."""
    cache = running(1, 2, 3)
    cache.finish(1, 1)

    with pytest.raises(
        LoraCacheError, match=r"^Error storing task=5 in PEFT cache -- .*Assertion failed: pageIds\.has_value\(\)"
    ):
        cache.add(5, 5, (2, lambda: "weights of 5"))

    assert {2, 3} == set(cache.cache.tasks)
    assert 1 == len(cache.cache.free_pages)


def test_new_weights_under_a_cached_id_are_ignored() -> None:
    """Scenario 5: the first weights stay until the task is evicted."""
    cache = running(1)
    cache.finish(1, 1)
    cache.add(1, 2, (1, lambda: "other weights"))

    assert "weights of 1" == cache.cache.value(1)


def test_warming_more_tasks_than_fit_leaves_the_first_ones_out() -> None:
    """Scenario 6: four tasks one after the other through three pages; none fails, and the first is missed after."""
    cache = running()
    for task in (1, 2, 3, 4):
        cache.add(task, task, (1, f"weights of {task}".__str__))
        cache.finish(task, task)

    with pytest.raises(TaskNotCachedError, match="LoRA task 1 not found in cache"):
        cache.add(1, 5)


def test_a_task_stays_pinned_until_its_last_request_ends() -> None:
    """Two requests for task 1: the end of one does not make it evictable."""
    cache = running(1, pages=1)
    cache.add(1, 2)
    cache.finish(1, 1)

    with pytest.raises(LoraCacheError, match="There are no done tasks to evict"):
        cache.add(2, 3, (1, lambda: "weights of 2"))


def test_a_refused_request_pins_nothing() -> None:
    """A task that could not be stored can be stored later and becomes evictable when its request ends."""
    cache = running(1, pages=1)
    with pytest.raises(LoraCacheError, match="no done tasks"):
        cache.add(2, 2, (1, lambda: "weights of 2"))
    cache.finish(1, 1)
    cache.add(2, 3, (1, lambda: "weights of 2"))
    cache.finish(2, 3)

    assert [2] == list(cache.cache.done)


def test_freed_pages_are_used_again_last_freed_first() -> None:
    """Claims come from the front of the free list and releases go there."""
    cache = LoraCache[None](6)
    for task, pages in ((1, 2), (2, 3)):
        cache.put(task, pages)
        cache.load(task, None)
        cache.mark_done(task)
    first = cache.pages(2)
    cache.put(3, 5)

    assert (2, 3, 4) == first
    assert (4, 3, 2, 1, 0) == cache.pages(3)


def test_a_task_that_is_done_before_it_is_loaded_becomes_evictable_when_it_is_loaded() -> None:
    """markTaskDone on a task that still loads is only noted."""
    cache = LoraCache[None](1)
    cache.put(1, 1)
    cache.mark_done(1)
    before = list(cache.done)
    cache.load(1, None)

    assert ([], [1]) == (before, list(cache.done))


class AnyUse(RuleBasedStateMachine):
    """Any order of requests and ends keeps every page in one place."""

    total = 7

    def __init__(self) -> None:
        super().__init__()
        self.cache = PeftCache(LoraCache[int](self.total))
        self.active: list[tuple[int, int]] = []
        self.requests = 0

    @rule(task=st.integers(0, 9), pages=st.none() | st.integers(1, 4))
    def request(self, task: int, pages: int | None) -> None:
        self.requests += 1
        cached = task in self.cache.cache
        try:
            self.cache.add(task, self.requests, None if pages is None else (pages, lambda: task))
        except TaskNotCachedError:
            assert not cached
            assert pages is None
        except LoraCacheError:
            assert not cached
            assert task not in self.cache.cache
        else:
            self.active.append((task, self.requests))

    @rule(data=st.data())
    def finish(self, data: st.DataObject) -> None:
        if self.active:
            self.cache.finish(*self.active.pop(data.draw(st.integers(0, len(self.active) - 1))))

    @invariant()
    def every_page_is_free_or_one_tasks(self) -> None:
        lru = self.cache.cache
        claimed = [page for task in lru.tasks for page in lru.pages(task)]

        assert list(range(self.total)) == sorted([*claimed, *lru.free_pages])

    @invariant()
    def tasks_in_use_are_cached_and_the_others_can_go(self) -> None:
        lru = self.cache.cache
        used = {task for task, _ in self.active}

        assert used == set(lru.in_progress)
        assert set(lru.tasks) - used == set(lru.done)


TestAnyUse = AnyUse.TestCase
TestAnyUse.settings = settings(max_examples=40, stateful_step_count=30, deadline=None)


@settings(max_examples=100, deadline=None)
@given(
    rows=st.lists(st.tuples(st.integers(0, 12), st.integers(0, 7), st.integers(1, 64), st.integers(0, 1)), max_size=60),
    optimal=st.integers(1, 64),
    pp_rank=st.integers(0, 3),
    tp_size=st.sampled_from([1, 2, 4, 8]),
)
def test_every_row_lies_in_one_page_and_no_two_overlap(rows: Rows, optimal: int, pp_rank: int, tp_size: int) -> None:
    """Rows of this rank are laid one after the other, inside a page that the count includes."""
    geometry = page_geometry(
        SMALL,
        layers=layer_ranges(8, 4)[pp_rank],
        max_lora_rank=64,
        parameters=CacheParameters(optimal_adapter_size=optimal),
        tp_size=tp_size,
    )
    placed = list(geometry.place(rows))
    ends = [(at.page, at.slot + at.slots) for at in placed]

    assert len(placed) == sum(row[1] in geometry.layers for row in rows)
    assert all((at.page, at.slot) >= end for at, end in zip(placed[1:], ends, strict=False))
    assert all(at.page < geometry.pages(rows) for at in placed)
