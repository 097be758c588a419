# SPDX-FileCopyrightText: the tritonlora authors
# SPDX-License-Identifier: Apache-2.0
"""Plan the rows that an adapter becomes, from shapes alone, or list every reason why it cannot be converted.

There is one row for each (layer, module), sorted by (layer, module id). `fused_layers` has the rows of fused layers.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from itertools import pairwise
from pathlib import Path
from typing import NamedTuple

from tritonlora.architectures.families import Leaf
from tritonlora.architectures.layers import CONV1D, families_of, likely_families, why_none, why_probably_none
from tritonlora.architectures.lora_modules import BY_NAME, row_elements
from tritonlora.conversion import fused_layers
from tritonlora.conversion.base_weights import base_weights
from tritonlora.conversion.coverage import coverage_remarks
from tritonlora.conversion.misfits import Misfits
from tritonlora.conversion.rows import JoinedSource, Layout, Row, RowSource
from tritonlora.engine.profile import EngineProfile
from tritonlora.errors import EngineMismatch, Problems, UnsupportedAdapter, error_of
from tritonlora.peft.adapter import Adapter, AdapterModule
from tritonlora.serving.dtypes import DTYPES, LORA_DTYPES

_MAX_NBYTES = 1 << 37  # of lora_weights: rank 512 for all layers of a model of 405 billion weights takes half of it


class _Planned(NamedTuple):
    """One row, and the dims of the layer that it is for."""

    row: Row
    source: RowSource | JoinedSource
    in_features: int
    out_features: int


def plan_layout(
    adapter: Adapter,
    *,
    dtype: str,
    profile: EngineProfile | None = None,
    base: Path | None = None,
    engine_reads: bool = False,
) -> Layout:
    """Plan the rows that `adapter` becomes, in `dtype`, for the engine of `profile`.

    `base` is the base model's checkpoint, which only DoRA needs. `engine_reads`: the engine reads the adapter from disk
    itself and maps the layers' names itself. A base model that has other layers under these names is then no error.

    Raises UnsupportedAdapter or EngineMismatch with every reason why the adapter cannot be converted.
    """
    if profile is not None and not profile.modules:
        problem = "the engine has no LoRA: it would ignore the adapter, and its responses would be the base model's"
        raise EngineMismatch(f"{profile.source!r}: {problem}; {_enable_lora((), engine_reads=engine_reads)}")
    architectures = (profile.architecture if profile is not None else "", adapter.config.base_model_class)
    kinds = {id(module.leaves): module for module in adapter.modules.values()}  # layers repeat
    families = likely_families(
        (module.leaves for module in kinds.values()), architectures, conv1d=adapter.config.fan_in_fan_out
    )
    leaf_of = {kind: _leaf_of(module, families, profile) for kind, module in kinds.items()}
    misfits = Misfits()
    planned = _plan_rows(adapter, leaf_of, profile, misfits, engine_reads=engine_reads)
    width = max((_elements(one, profile) for one in planned), default=0)
    problems: Problems = {
        UnsupportedAdapter: [
            *_missing_base(adapter, base),
            *(() if engine_reads else _other_models(architectures, adapter.config.base_model_name_or_path or "")),
            *_planned_twice(planned),
            *_too_large(len(planned), width, dtype),
        ],
        EngineMismatch: [*_engine_problems(dtype, profile, engine_reads=engine_reads), *misfits.lines()],
    }
    if any(problems.values()):
        into = f" for {profile.source!r}" if profile is not None else ""
        raise error_of(f"cannot convert the adapter in {str(adapter.directory)!r}{into}", problems)
    transposed = {kind for kind, module in kinds.items() if _is_conv1d(module, families, adapter)}
    without_tensors = tuple(coverage_remarks(adapter, families, profile))
    layout = Layout(
        rows=tuple(one.row for one in planned),
        width=width,
        dtype=dtype,
        sources=tuple(one.source for one in planned),
        conv1d=frozenset(path for path, module in adapter.modules.items() if id(module.leaves) in transposed),
        remarks=(
            *adapter.remarks,
            *without_tensors,
            *(() if engine_reads else _stored_otherwise(families, profile)),
            *_joined_remarks(planned),
        ),
        without_tensors=without_tensors,
    )
    if base is not None and layout.config_shape[1] == 4:
        base_weights(adapter, layout.conv1d, base)
    return layout


def _plan_rows(
    adapter: Adapter,
    leaf_of: Mapping[int, Leaf | str],
    profile: EngineProfile | None,
    misfits: Misfits,
    *,
    engine_reads: bool,
) -> list[_Planned]:
    """All rows, sorted. `leaf_of` has the leaf of each kind of layer, or the reason why it is not known."""
    planned: list[_Planned] = []
    apart: dict[tuple[int, str], dict[str, AdapterModule]] = {}  # (layer, the engine's fused module) -> its parts
    for module in adapter.modules.values():
        leaf = leaf_of[id(module.leaves)]
        if isinstance(leaf, str):
            misfits.add(module.name, leaf, module.layer)
            continue
        for one in _rows_of(module, leaf, profile, misfits):
            name = one.row.module.name
            if profile is not None and not engine_reads and (fused := fused_layers.only_fused(name, profile)):
                apart.setdefault((one.row.layer, fused), {})[name] = module
                continue
            if profile is not None:
                _check_row(one, profile, misfits)
            planned.append(one)
    if profile is not None:
        for (layer, fused), parts in apart.items():
            row, source = fused_layers.joined(layer, fused, parts, profile, misfits)
            planned.append(_Planned(row, source, profile.modules[fused].in_features, source.out_features))
        _check_enabled(planned, profile, misfits, engine_reads=engine_reads)
    elif not engine_reads:
        _check_without_engine(planned, misfits)
    return sorted(planned, key=lambda one: (one.row.layer, one.row.module.id))


def _leaf_of(module: AdapterModule, families: frozenset[str], profile: EngineProfile | None) -> Leaf | str:
    """The leaf that `module` is in `families`, or, as a text, the reason why it is not known."""
    leaves = list(dict.fromkeys(leaf for family, leaf in module.leaves.items() if family in families))
    if not leaves:
        model = profile.architecture if profile is not None else "the base model"
        return (
            f"{model} has no such layer that a LoRA can be sent for; the adapter was most likely trained on another "
            "base model"
        )
    # With one key-value head, all orders of a fused q, k and v are the same. Without a profile, no order can be used.
    if len({leaf.modules for leaf in leaves}) == 1 and (profile is None or profile.num_kv_heads <= 1):
        return leaves[0]
    if len(leaves) > 1:
        meanings = sorted({", ".join(leaf.modules) for leaf in leaves})
        differ = f"is {' or '.join(meanings)}" if len(meanings) > 1 else "has its outputs in one order or another"
        return (
            f"a layer of this name {differ}, by the architecture, which is not known; give the config.json of the base "
            "model (--base)"
        )
    return leaves[0]


def _is_conv1d(module: AdapterModule, families: frozenset[str], adapter: Adapter) -> bool:
    """Whether the base model's layer is a Conv1D, whose weight is (in, out).

    The families decide it where they agree, as in PEFT the layer's own type does. `fan_in_fan_out` may be wrong: PEFT
    ignores it on a quantised layer and on a layer of the other type.
    """
    kinds = {family in CONV1D for family in families.intersection(module.leaves)}
    return kinds.pop() if len(kinds) == 1 else adapter.config.fan_in_fan_out


def _rows_of(module: AdapterModule, leaf: Leaf, profile: EngineProfile | None, misfits: Misfits) -> Iterator[_Planned]:
    """Each row that `module` becomes."""
    in_features, out_features = module.lora_A.shape[1], module.lora_B.shape[0]
    dora = module.magnitude is not None
    if len(leaf.modules) == 1:
        row = Row(BY_NAME[leaf.modules[0]], module.layer, module.r, dora)
        source = RowSource(module.path, in_features=_wider_in(row.module.name, profile))
        yield _Planned(row, source, in_features, out_features)
        return
    parts = fused_layers.parts_of(leaf, out_features, profile)
    if isinstance(parts, str):
        misfits.add(module.name, parts, module.layer)
    elif profile is not None and leaf.fused in profile.modules:
        if reason := fused_layers.indivisible(leaf.fused, out_features, profile):
            misfits.add(module.name, reason, module.layer)
            return
        shares = [parts[name] for name in leaf.fused_order]
        pieces = tuple(piece.share(rank, profile.tp_size) for rank in range(profile.tp_size) for piece in shares)
        row = Row(BY_NAME[leaf.fused], module.layer, module.r, dora)
        yield _Planned(row, RowSource(module.path, pieces), in_features, out_features)
    else:
        for name, piece in parts.items():
            row = Row(BY_NAME[name], module.layer, module.r, dora)
            yield _Planned(row, RowSource(module.path, (piece,)), in_features, piece.size)


def _wider_in(name: str, profile: EngineProfile | None) -> int:
    """The engine's number of inputs for the module `name`, if it differs from the layer's own number; else 0."""
    if profile is None or name not in profile.modules:
        return 0
    inputs = profile.modules[name].in_features
    return inputs if inputs != profile.layer_dims(name)[0] else 0


def _elements(one: _Planned, profile: EngineProfile | None) -> int:
    """The elements of a row. The engine's LoRA for a layer may be larger than the layer."""
    dims = profile.modules.get(one.row.module.name) if profile is not None else None
    sizes = (one.in_features, one.out_features) if dims is None else (dims.in_features, dims.out_features)
    return row_elements(one.row.adapter_size, *sizes, dora=one.row.dora)


# Reasons against it


def _engine_problems(dtype: str, profile: EngineProfile | None, *, engine_reads: bool) -> Iterator[str]:
    """What is wrong with the dtype, and with the engine itself."""
    if dtype not in LORA_DTYPES:
        yield f"dtype is {dtype!r}, expected one of {', '.join(LORA_DTYPES)}"
    if profile is not None and not engine_reads:
        yield from (f"{problem}; {remedy}" for problem, remedy in profile.faults())
    if profile is not None and profile.dtype != dtype:
        yield f"dtype is {dtype!r}, but the engine takes only its own, {profile.dtype!r}"


def _missing_base(adapter: Adapter, base: Path | None) -> Iterator[str]:
    if base is None and any(module.magnitude is not None for module in adapter.modules.values()):
        yield "DoRA needs the base model's weights; give them with --base CHECKPOINT"


def _planned_twice(planned: Sequence[_Planned]) -> Iterator[str]:
    for one, other in pairwise(planned):
        row = one.row
        if (row.layer, row.module) == (other.row.layer, other.row.module):
            yield f"{one.source.path!r} and {other.source.path!r} are both {row.module.name} of layer {row.layer}"


def _too_large(count: int, width: int, dtype: str) -> Iterator[str]:
    nbytes = count * width * (DTYPES[dtype].itemsize if dtype in LORA_DTYPES else 1)
    if nbytes > _MAX_NBYTES:
        yield f"lora_weights takes {nbytes} bytes, {count} rows as wide as the widest; expected at most {_MAX_NBYTES}"


def _check_row(one: _Planned, profile: EngineProfile, misfits: Misfits) -> None:
    """Note the reasons why the engine cannot take a row. `_check_enabled` looks for modules without LoRA."""
    row, found = one.row, (one.in_features, one.out_features)
    name, dims = row.module.name, profile.modules.get(row.module.name)
    if dims is not None and found != (expected := profile.layer_dims(name)):
        reason = (
            f"it is {found[0]} -> {found[1]} in the adapter, but {expected[0]} -> {expected[1]} in {profile.what}; "
            f"{_likely_cause(name, *found, profile)}"
        )
        misfits.add(name, reason, row.layer)
    elif dims is not None and found != (dims.in_features, dims.out_features) and (profile.tp_size > 1 or row.dora):
        reason = (
            "TensorRT-LLM's LoRA takes this layer of the first Qwen to be twice as wide as it is: it would split the "
            "weights, or read the magnitudes, in the wrong places; use an engine with tp_size 1, without DoRA"
        )
        misfits.add(name, reason, row.layer)
    if row.adapter_size > profile.rank_limit:
        reason = (
            f"rank {row.adapter_size} is larger than the engine's max_lora_rank, {profile.max_lora_rank}; raise that "
            f"to {row.adapter_size} (trtllm-build --max_lora_rank, or lora_config in model.yaml)"
        )
        misfits.add(name, reason, row.layer)
    if row.layer >= profile.num_layers:
        misfits.add(name, f"{profile.what} has {profile.num_layers} layers, and not this one", row.layer)


def _check_enabled(
    planned: Sequence[_Planned], profile: EngineProfile, misfits: Misfits, *, engine_reads: bool
) -> None:
    """Note the rows of modules that the engine has no LoRA for. One remedy names all these modules."""
    disabled = [one.row for one in planned if one.row.module.name not in profile.modules]
    names = [*profile.modules, *dict.fromkeys(row.module.name for row in disabled)]
    reason = (
        f"not among the LoRA target modules, which are: {', '.join(profile.modules)}; "
        f"{_enable_lora(names, engine_reads=engine_reads)}, or train without them"
        if profile.max_lora_rank is not None
        else "the base model has no such layer; the adapter was most likely trained on another base model"
    )
    for row in disabled:
        misfits.add(row.module.name, reason, row.layer)


def _enable_lora(modules: Iterable[str], *, engine_reads: bool) -> str:
    """The remedy that enables LoRA for `modules`. Without modules, it names examples."""
    names = sorted(modules, key=lambda name: BY_NAME[name].id)
    if engine_reads:
        return f"name them in lora_target_modules of model.yaml: {', '.join(names) or 'attn_q, attn_k, attn_v, …'}"
    targets = " ".join(names) or "attn_q attn_k attn_v …"
    return f"build the engine with trtllm-build --lora_plugin auto --lora_target_modules {targets}"


def _likely_cause(name: str, in_features: int, out_features: int, profile: EngineProfile) -> str:
    if name in ("attn_dense", "cross_attn_dense") and in_features == profile.num_heads * profile.head_size:
        return (
            "TensorRT-LLM takes this module to be hidden x hidden, which this model's is not; merge the adapter into "
            "the base model, or train without that layer (o_proj)"
        )
    if name in _KEYS_AND_VALUES and out_features == profile.num_kv_heads * profile.head_size:
        return (
            f"it has more ranks (tp_size {profile.tp_size}) than key-value heads ({profile.num_kv_heads}) "
            "and repeats these; build it for fewer ranks, or train without that layer"
        )
    return "the adapter was most likely trained on another base model"


def _other_models(architectures: Iterable[str], name: str) -> Iterator[str]:
    """The reason why the base model cannot have LoRA here: it has other layers under names that tritonlora knows.

    The `architectures` decide it ("": not known). If none of them is known, the base model's `name` does.
    """
    known = [architecture for architecture in architectures if architecture]
    for architecture in known:
        if why := why_none(architecture):
            yield f"{architecture}: {why}; merge the adapter into the base model"
            return
    if not known and (why := why_probably_none(name)):
        yield (
            f"the base model is {name!r} by name: {why}; merge the adapter into it, or, if it is another model, "
            "give its config.json (--base)"
        )


def _check_without_engine(planned: Sequence[_Planned], misfits: Misfits) -> None:
    """Note dims of one layer that differ and are equal in every model that TensorRT-LLM has LoRA for.

    A difference means that a layer is not what its name says. With an engine's profile this check is not needed: each
    of the dims is compared with the engine's.
    """
    by_layer: dict[int, dict[str, tuple[int, int]]] = {}  # layer -> module -> (in, out)
    for one in planned:
        by_layer.setdefault(one.row.layer, {})[one.row.module.name] = (one.in_features, one.out_features)
    for layer, dims in by_layer.items():
        for one_name, side, other, other_side in _EQUAL:
            if one_name in dims and other in dims and dims[one_name][side] != dims[other][other_side]:
                reason = (
                    f"{one_name} has {dims[one_name][side]} {_SIDES[side]}, and {other} {dims[other][other_side]} "
                    f"{_SIDES[other_side]}, and these are equal in every model that TensorRT-LLM has LoRA for; give "
                    "the base model's config.json (--base), or merge the adapter into it"
                )
                misfits.add("", reason, layer)


_SIDES = ("inputs", "outputs")
_IN, _OUT = range(2)
_EQUAL_IN_ATTENTION = (
    ("q", _OUT, "dense", _IN),
    ("q", _IN, "k", _IN),
    ("q", _IN, "v", _IN),
    ("k", _IN, "v", _IN),
    ("k", _OUT, "v", _OUT),
)
_EQUAL = (
    *(
        (f"{attention}_{one}", side, f"{attention}_{other}", other_side)
        for attention in ("attn", "cross_attn")
        for one, side, other, other_side in _EQUAL_IN_ATTENTION
    ),
    ("mlp_h_to_4h", _OUT, "mlp_gate", _OUT),
    ("mlp_h_to_4h", _OUT, "mlp_4h_to_h", _IN),
    ("mlp_gate", _OUT, "mlp_4h_to_h", _IN),
)
_KEYS_AND_VALUES = ("attn_k", "attn_v", "cross_attn_k", "cross_attn_v")


# Remarks


def _stored_otherwise(families: frozenset[str], profile: EngineProfile | None) -> Iterator[str]:
    if profile is not None and families_of(profile.architecture).isdisjoint(families):
        yield (
            f"the adapter's layers have the names of {' or '.join(sorted(families))}; checkpoints of the model, a "
            f"{profile.architecture}, are stored under these names, too, and the sizes fit"
        )


def _joined_remarks(planned: Sequence[_Planned]) -> Iterator[str]:
    if joined := sorted({one.row.module.name for one in planned if isinstance(one.source, JoinedSource)}):
        yield (
            f"the engine has LoRA only for {' and '.join(joined)}: the LoRAs of several layers were joined into one, "
            "whose rank is the sum of theirs, and which takes as much more memory"
        )
