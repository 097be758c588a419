# SPDX-FileCopyrightText: the tritonlora authors
# SPDX-License-Identifier: Apache-2.0
"""The planner, the cache, the validation and the converter against results of TensorRT-LLM's own code.

golden/lora_cache.json holds what its C++ gave when it was run on a CPU; its `fields` say how to read each section.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch

from tritonlora.architectures.lora_modules import BY_ID, LoraModule, ModuleDims
from tritonlora.conversion.rows import Layout, Row, RowSource
from tritonlora.conversion.tensors import convert_file, lora_config
from tritonlora.conversion.unpack import unpack, unpack_magnitudes
from tritonlora.cpu_engine.peft_cache import LoraCache, LoraCacheError, PeftCache, TaskNotCachedError
from tritonlora.cpu_engine.request import LoraInputs
from tritonlora.cpu_engine.validation import check_lora_tensors
from tritonlora.engine.cache_plan import Entry, plan_cache
from tritonlora.engine.lora_cache import CacheParameters, PageGeometry, layer_ranges, page_geometry
from tritonlora.engine.profile import EngineProfile
from tritonlora.errors import EngineMismatch
from tritonlora.peft.adapter import Adapter, AdapterModule
from tritonlora.peft.adapter_config import AdapterConfig
from tritonlora.peft.stored_tensor import in_memory

GOLDEN: dict[str, Any] = json.loads((Path(__file__).parents[1] / "support" / "golden" / "lora_cache.json").read_text())
Modules = Sequence[tuple[int, int, int]]  # [id, in, out]


def modules_of(modules: Modules) -> dict[str, ModuleDims]:
    """By name; an id that has no module here gets one of its own, without a split."""
    found = {}
    for id_, in_features, out_features in modules:
        module = BY_ID.get(id_, LoraModule(id_, f"module {id_}", None))
        found[module.name] = ModuleDims(module, in_features, out_features)
    return found


def geometry_of(
    layers: int, pp: int, pp_rank: int, tp: int, max_lora_rank: int, parameters: CacheParameters, modules: Modules,
    *, element_size: int = 2,
) -> PageGeometry:  # fmt: skip
    return page_geometry(
        modules_of(modules),
        layers=layer_ranges(layers, pp)[pp_rank],
        max_lora_rank=max_lora_rank,
        parameters=parameters,
        element_size=element_size,
        tp_size=tp,
    )


def profile_of(layers: int, max_lora_rank: int, modules: Modules, **other: Any) -> EngineProfile:
    values = {"dtype": "bfloat16", **other}
    return EngineProfile(
        source="an engine",
        architecture="LlamaForCausalLM",
        num_layers=layers,
        modules=modules_of(modules),
        max_lora_rank=max_lora_rank,
        **values,
    )


def numbered(section: str) -> pytest.MarkDecorator:
    """One test for each case of a section, with its number as the name."""
    return pytest.mark.parametrize("case", [pytest.param(case, id=str(i)) for i, case in enumerate(GOLDEN[section])])


@numbered("geometry")
def test_pages_have_upstream_s_geometry(case: list[Any]) -> None:
    """Page width, slots in a page and pages of the host cache; or the words with which the engine does not load."""
    layers, pp, pp_rank, tp, max_lora_rank, optimal, largest, host_bytes, element_size, modules, expected = case
    parameters = CacheParameters(optimal, largest, host_bytes)
    geometry = geometry_of(layers, pp, pp_rank, tp, max_lora_rank, parameters, modules, element_size=element_size)

    got = geometry.too_small() or [geometry.page_width, geometry.slots_per_page, geometry.host_pages]
    assert expected == got


@numbered("pages")
def test_adapters_take_as_many_pages_as_upstream_gives_them(case: list[Any]) -> None:
    """`determineNumPages`, DoRA's magnitudes and pipeline-parallel ranks included."""
    layers, pp, pp_rank, tp, max_lora_rank, optimal, largest, modules, rows, page, expected = case
    geometry = geometry_of(layers, pp, pp_rank, tp, max_lora_rank, CacheParameters(optimal, largest), modules)

    assert (page, expected) == ([geometry.page_width, geometry.slots_per_page], geometry.pages(rows))


@numbered("placement")
def test_rows_lie_where_upstream_copies_them(case: list[Any]) -> None:
    """`copyToPages` on an empty cache: page, slot and slots of each row."""
    layers, tp, max_lora_rank, optimal, largest, host_bytes, modules, rows, page, expected = case
    geometry = geometry_of(layers, 1, 0, tp, max_lora_rank, CacheParameters(optimal, largest, host_bytes), modules)

    assert page == [geometry.page_width, geometry.slots_per_page, geometry.host_pages]
    assert expected == [[at.page, at.slot, at.slots] for at in geometry.place(rows)]


@numbered("events")
def test_the_cache_does_what_upstream_s_does(case: list[Any]) -> None:
    """Any order of requests and ends gives the same errors, evictions, lists, free pages and pages of each task."""
    pages, events, done, in_progress, free_pages, pages_of = case
    peft = PeftCache(LoraCache[int](pages))
    errors = {
        "not found in cache. Please send LoRA weights with request": "miss",
        "There are no done tasks to evict": "full",
        "pageIds.has_value()": "short",
    }
    for kind, task, request, *rest in events:
        if kind == "fin":
            peft.finish(task, request)
            continue
        needed, outcome, evicted = rest
        before, got = set(peft.cache.tasks), "ok"
        try:
            peft.add(task, request, (needed, partial(int, task)) if kind == "w" else None)
        except (TaskNotCachedError, LoraCacheError) as error:
            got = next(name for text, name in errors.items() if text in str(error))
        assert (outcome, set(evicted)) == (got, before - set(peft.cache.tasks))

    cache = peft.cache
    assert done == [*reversed(cache.done)]
    assert in_progress == sorted(cache.in_progress)
    assert free_pages == list(cache.free_pages)
    assert pages_of == {str(task): list(cache.pages(task)) for task in sorted(cache.tasks)}


def tensor_of(shape: Sequence[int] | None, dtype: str, values: Sequence[int] = ()) -> torch.Tensor | None:
    if shape is None:
        return None
    tensor = torch.zeros(tuple(shape), dtype=getattr(torch, dtype))
    return torch.tensor(values, dtype=tensor.dtype).reshape(shape) if values else tensor


@numbered("validation")
def test_requests_are_refused_in_upstream_s_words(case: list[Any]) -> None:
    """`loraValidateRequestTensors`: which message, or none."""
    layers, max_lora_rank, dtype, modules, has_id, weights, weights_dtype, config, config_dtype, values, expected = case
    profile = profile_of(layers, max_lora_rank, modules, dtype=dtype)
    lora = LoraInputs(1 if has_id else None, tensor_of(weights, weights_dtype), tensor_of(config, config_dtype, values))
    got = None
    try:
        check_lora_tensors(lora, profile)
    except LoraCacheError as error:
        got = str(error).removeprefix("[TensorRT-LLM][ERROR] Assertion failed: ")

    assert expected == got


@numbered("slices")
def test_each_rank_reads_its_part_of_what_is_converted(case: list[Any], tmp_path: Path) -> None:
    """The converter writes A and B as upstream reads them, and the module table says how upstream cuts them by rank.

    The magnitudes are given as they are: the converter makes them from a base model, which is not here.
    """
    layers, tp, pp, modules, rows, width, flat, ranks = case
    weights = torch.tensor(flat, dtype=torch.int16).reshape(len(rows), width)
    dims = {one.module.id: one for one in modules_of(modules).values()}
    rows = [[*row, 0][:4] for row in rows]
    adapter, layout = adapter_of(weights, rows, dims, width)
    path = tmp_path / "lora_weights"
    convert_file(adapter, layout, path)
    wire = torch.frombuffer(bytearray(path.read_bytes()), dtype=torch.int16).reshape(len(rows), width)
    config = torch.tensor(rows, dtype=torch.int32)
    matrices = torch.zeros_like(weights)
    for number, (module_id, _, r, _) in enumerate(rows):
        end = r * (dims[module_id].in_features + dims[module_id].out_features)
        matrices[number, :end] = weights[number, :end]

    assert torch.equal(matrices, wire)
    assert torch.equal(config[:, :3], lora_config(layout))
    assert expected_slices(ranks) == slices_of(weights, config, dims, layers, tp, pp)


def adapter_of(
    weights: torch.Tensor, rows: Sequence[Sequence[int]], dims: Mapping[int, ModuleDims], width: int
) -> tuple[Adapter, Layout]:
    """The adapter whose conversion is to give `weights`, with a scaling of 1."""
    modules, layout_rows, sources = {}, [], []
    for number, (values, (module_id, layer, r, _)) in enumerate(zip(weights, rows, strict=True)):
        of, path = dims[module_id], f"module.{number}"
        end = r * (of.in_features + of.out_features)
        a, b = values[: r * of.in_features], values[r * of.in_features : end]
        modules[path] = AdapterModule(
            path=path,
            layer=layer,
            leaves={},
            lora_A=in_memory(a.clone().view(torch.bfloat16).reshape(r, of.in_features)),
            lora_B=in_memory(b.clone().view(torch.bfloat16).reshape(of.out_features, r)),
            scaling=1.0,
        )
        layout_rows.append(Row(of.module, layer, r))
        sources.append(RowSource(path))
    layout = Layout(tuple(layout_rows), width, "bfloat16", tuple(sources))
    return Adapter(Path("adapter"), AdapterConfig("base", 1, 1.0), modules), layout


Slice = tuple[int, int, list[int], list[int], list[int]]


def slices_of(
    wire: torch.Tensor, config: torch.Tensor, dims: Mapping[int, ModuleDims], layers: int, tp: int, pp: int
) -> list[list[Slice]]:
    """What each rank has: its layers, and of each matrix the part along the dim that its module is split by."""
    matrices, magnitudes = unpack(wire, config, dims), unpack_magnitudes(wire, config, dims)
    found = []
    for rank_layers in layer_ranges(layers, pp):
        for tp_rank in range(tp):
            of_rank: list[Slice] = []
            for module_id, layer, *_ in config.tolist():
                if layer not in rank_layers:
                    continue
                module = dims[module_id].module
                a, b = matrices[layer, module.name]
                magnitude = magnitudes.get((layer, module.name), torch.empty(0, dtype=wire.dtype))
                if module.split == "in":
                    a = a.chunk(tp, dim=1)[tp_rank]
                if module.split == "out":
                    b = b.chunk(tp, dim=0)[tp_rank]
                    magnitude = magnitude.chunk(tp)[tp_rank] if len(magnitude) else magnitude
                of_rank.append((module_id, layer, *([*t.reshape(-1).tolist()] for t in (a, b, magnitude))))
            found.append(of_rank)
    return found


def expected_slices(ranks: Sequence[Sequence[Sequence[Any]]]) -> list[list[Slice]]:
    return [[(module, layer, a, b, m or []) for module, layer, a, b, m in rank] for rank in ranks]


@numbered("loads")
def test_an_adapter_loads_where_each_of_its_rows_fits_a_page(case: list[Any]) -> None:
    """And where one does not, the plan says so, although it has pages for it."""
    layers, max_lora_rank, optimal, largest, host_bytes, modules, rows, page, pages, loads = case
    parameters = CacheParameters(optimal, largest, host_bytes)
    geometry = geometry_of(layers, 1, 0, 1, max_lora_rank, parameters, modules)

    assert (page, pages) == ([geometry.page_width, geometry.slots_per_page], geometry.pages(rows))
    assert loads == (geometry.too_wide(rows) is None)


@numbered("pipeline")
def test_an_adapter_needs_a_row_on_each_pipeline_rank(case: list[Any]) -> None:
    """Where `fillInputTensors` fails an assertion on some rank, the adapter is refused before."""
    layers, pp, rows, ranks = case
    module_ids = sorted({row[0] for row in rows})
    profile = profile_of(layers, 64, [(id_, 16, 16) for id_ in module_ids], pp_size=pp)
    entry = Entry("x", tuple(map(tuple, rows)), 0)
    if any(isinstance(rank, str) for rank in ranks):
        with pytest.raises(EngineMismatch, match="pipeline"):
            plan_cache([entry], profile, {})
    else:
        assert 1 == len(plan_cache([entry], profile, {}).adapters)


def test_all_sections_are_read() -> None:
    """None of the file is left out here."""
    read = {"geometry", "pages", "placement", "events", "validation", "slices", "loads", "pipeline"}

    assert read == GOLDEN.keys() - {"about", "fields"}
