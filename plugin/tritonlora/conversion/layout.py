# SPDX-FileCopyrightText: the tritonlora authors
# SPDX-License-Identifier: Apache-2.0
"""Plan the rows that an adapter becomes, from shapes alone, or list every reason why it cannot be converted.

There is one row for each (layer, module), sorted by (layer, module id).

- A fused layer of the base model becomes one fused row, where the engine has LoRA for the fused module. Otherwise it
  becomes one row for each part: the rows share A and divide the rows of B. The result is exact.
- Separate layers of the base model become one fused row, where the engine has LoRA only for the fused module. Their A
  are put one below the other, and their B on the diagonal. The result is exact, too.
- With tensor parallelism the engine gives each rank one contiguous piece of a fused row. The parts of the row are
  therefore interleaved by rank (`interleave_fused_lora_weights_for_tp` in TensorRT-LLM tensorrt_llm/lora_manager.py).
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from itertools import pairwise
from pathlib import Path

from tritonlora.architectures.families import FUSED, Leaf
from tritonlora.architectures.layers import CONV1D, families_of, likely_families, why_none, why_probably_none
from tritonlora.architectures.lora_modules import BY_NAME, LoraModule
from tritonlora.conversion.base_weights import base_weights
from tritonlora.conversion.coverage import coverage_remarks
from tritonlora.engine.profile import EngineProfile
from tritonlora.errors import EngineMismatch, Problems, UnsupportedAdapter, error_of, layers_text
from tritonlora.peft.adapter import Adapter, AdapterModule
from tritonlora.serving.dtypes import DTYPES, LORA_DTYPES

_MAX_NBYTES = 1 << 37  # of lora_weights: rank 512 for all layers of a model of 405 billion weights takes half of it


@dataclass(frozen=True, slots=True)
class Row:
    """One row of lora_config: module, layer, rank, and whether the row carries DoRA."""

    module: LoraModule
    layer: int
    adapter_size: int  # r
    dora: bool = False


@dataclass(frozen=True, slots=True)
class Piece:
    """Some outputs of a linear layer: `out.view(groups, -1)[first:last, start:stop]`, in that order."""

    groups: int
    first: int
    last: int
    start: int
    stop: int

    @property
    def size(self) -> int:
        """The number of outputs."""
        return (self.last - self.first) * (self.stop - self.start)

    def ranges(self, outputs: int) -> Iterator[tuple[int, int]]:
        """(start, stop) of each range that the piece takes, in order, from a layer with `outputs` outputs."""
        width = outputs // self.groups
        return ((group * width + self.start, group * width + self.stop) for group in range(self.first, self.last))

    def share(self, rank: int, ranks: int) -> Piece:
        """Share number `rank`, from 0, of `ranks` equal shares. The piece has to span all groups."""
        if self.groups > 1:
            groups = self.groups // ranks
            return Piece(self.groups, rank * groups, (rank + 1) * groups, self.start, self.stop)
        width = (self.stop - self.start) // ranks
        start = self.start + rank * width
        return Piece(1, 0, 1, start, start + width)


@dataclass(frozen=True, slots=True)
class RowSource:
    """The module, and the outputs of it, that a row takes its values from."""

    path: str  # of the AdapterModule
    pieces: tuple[Piece, ...] = ()  # the outputs taken, in order; empty: all outputs, in the module's own order
    in_features: int = 0  # the engine's number of inputs, if larger than the module's: zeros follow A; 0: the module's

    def ranges(self, outputs: int) -> list[tuple[int, int]]:
        """(start, stop) of each range of outputs taken, in order, from a module with `outputs` outputs."""
        return [taken for piece in self.pieces for taken in piece.ranges(outputs)] or [(0, outputs)]


@dataclass(frozen=True, slots=True)
class JoinedSource:
    """The modules that a fused row joins: their A one below the other, and their B on the diagonal."""

    parts: tuple[tuple[str, tuple[tuple[int, int], ...]], ...]  # (path, (start, stop) of its outputs in the row's B)
    out_features: int  # of the row's B

    @property
    def path(self) -> str:
        """The paths of all parts, separated by commas, for messages."""
        return ", ".join(path for path, _ in self.parts)


@dataclass(frozen=True, slots=True)
class Layout:
    """The rows, shapes and dtype of an adapter's lora_weights and lora_config, known before any weights are read."""

    rows: tuple[Row, ...]
    width: int  # W: elements in a row
    dtype: str  # "bfloat16", "float16", "float32"
    sources: tuple[RowSource | JoinedSource, ...] = ()  # one for each row
    conv1d: frozenset[str] = frozenset()  # paths of modules whose weight is (in, out) in the base model
    remarks: tuple[str, ...] = ()  # for the user; remarks on the adapter's values are not among them
    without_tensors: tuple[str, ...] = ()  # those of the remarks that name layers without tensors

    @property
    def weights_shape(self) -> tuple[int, int]:
        """The shape of lora_weights, (n, W)."""
        return (len(self.rows), self.width)

    @property
    def config_shape(self) -> tuple[int, int]:
        """The shape of lora_config: (n, 3), or (n, 4) where a row carries DoRA."""
        return (len(self.rows), 4 if any(row.dora for row in self.rows) else 3)

    @property
    def weights_nbytes(self) -> int:
        """The size of lora_weights in bytes."""
        return len(self.rows) * self.width * DTYPES[self.dtype].itemsize


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
    problems: Problems = {UnsupportedAdapter: [], EngineMismatch: []}
    misfits = Misfits()
    if dtype not in LORA_DTYPES:
        problems[EngineMismatch].append(f"dtype is {dtype!r}, expected one of {', '.join(LORA_DTYPES)}")
    if profile is not None and not engine_reads:
        problems[EngineMismatch] += [f"{problem}; {remedy}" for problem, remedy in profile.faults()]
    if profile is not None and not profile.modules:
        problem = "the engine has no LoRA: it would ignore the adapter, and its responses would be the base model's"
        raise EngineMismatch(f"{profile.source!r}: {problem}; {_enable((), engine_reads=engine_reads)}")
    if profile is not None and profile.dtype != dtype:
        problems[EngineMismatch].append(f"dtype is {dtype!r}, but the engine takes only its own, {profile.dtype!r}")
    if base is None and any(module.magnitude is not None for module in adapter.modules.values()):
        problems[UnsupportedAdapter].append("DoRA needs the base model's weights; give them with --base CHECKPOINT")
    planned: list[tuple[Row, RowSource | JoinedSource]] = []
    apart: dict[tuple[int, str], dict[str, AdapterModule]] = {}  # (layer, the engine's fused module) -> its parts
    dims: dict[int, dict[str, tuple[int, int]]] = {}  # layer -> module -> (in, out)
    width = 0
    kinds = {id(module.leaves): module for module in adapter.modules.values()}  # layers repeat
    architectures = (profile.architecture if profile is not None else "", adapter.config.base_model_class)
    families = likely_families(
        (module.leaves for module in kinds.values()), architectures, conv1d=adapter.config.fan_in_fan_out
    )
    leaf_of = {kind: _leaf_of(module, families, profile) for kind, module in kinds.items()}
    conv1d = {kind: _is_conv1d(module, families, adapter) for kind, module in kinds.items()}
    for module in adapter.modules.values():
        leaf = leaf_of[id(module.leaves)]
        if isinstance(leaf, str):
            misfits.add(module.name, leaf, module.layer)
            continue
        for row, source, out_features in _rows_of(module, leaf, profile, misfits):
            if profile is not None and not engine_reads and (fused := _only_fused(row.module.name, profile)):
                apart.setdefault((row.layer, fused), {})[row.module.name] = module
                continue
            in_features = source.in_features or module.lora_A.shape[1]
            if profile is not None:
                _check_row(row, module, out_features, profile, misfits)
            planned.append((row, source))
            dims.setdefault(row.layer, {})[row.module.name] = (module.lora_A.shape[1], out_features)
            magnitude = out_features if row.dora else 0
            width = max(width, row.adapter_size * (in_features + out_features) + magnitude)
            if profile is not None and profile.mlp_width and row.module.name in profile.modules:
                width = max(width, row.adapter_size * (in_features + profile.modules[row.module.name].out_features))
    if profile is not None:
        for (layer, fused), parts in apart.items():
            row, joined = _joined(layer, fused, parts, profile, misfits)
            planned.append((row, joined))
            fused_dims = profile.modules[fused]
            width = max(width, row.adapter_size * (fused_dims.in_features + fused_dims.out_features))
    if not engine_reads:
        problems[UnsupportedAdapter] += _other_models(architectures, adapter.config.base_model_name_or_path or "")
        for layer, of_layer in dims.items() if profile is None else ():
            for text in _disagreements(of_layer):
                misfits.add("", text, layer)
    planned.sort(key=lambda item: (item[0].layer, item[0].module.id))
    for (row, first), (other, second) in pairwise(planned):
        if (row.layer, row.module) == (other.layer, other.module):
            problems[UnsupportedAdapter].append(
                f"{first.path!r} and {second.path!r} are both {row.module.name} of layer {row.layer}"
            )
    nbytes = len(planned) * width * (DTYPES[dtype].itemsize if dtype in LORA_DTYPES else 1)
    if nbytes > _MAX_NBYTES:
        problems[UnsupportedAdapter].append(
            f"lora_weights takes {nbytes} bytes, {len(planned)} rows as wide as the widest; expected at most "
            f"{_MAX_NBYTES}"
        )
    problems[EngineMismatch] += misfits.lines(profile, engine_reads=engine_reads)
    into = f" for {profile.source!r}" if profile is not None else ""
    if any(problems.values()):
        raise error_of(f"cannot convert the adapter in {str(adapter.directory)!r}{into}", problems)
    rows, sources = tuple(row for row, _ in planned), tuple(source for _, source in planned)
    transposed = frozenset(path for path, module in adapter.modules.items() if conv1d[id(module.leaves)])
    without_tensors = tuple(coverage_remarks(adapter, families, profile))
    remarks = [*adapter.remarks, *without_tensors]
    if profile is not None and not engine_reads and families_of(profile.architecture).isdisjoint(families):
        remarks.append(
            f"the adapter's layers have the names of {' or '.join(sorted(families))}; checkpoints of the model, a "
            f"{profile.architecture}, are stored under these names, too, and the sizes fit"
        )
    if apart and profile is not None:
        fused_modules = " and ".join(sorted({fused for _, fused in apart}))
        remarks.append(
            f"the engine has LoRA only for {fused_modules}: the LoRAs of several layers were joined into one, whose "
            "rank is the sum of theirs, and which takes as much more memory"
        )
    layout = Layout(rows, width, dtype, sources, transposed, tuple(remarks), without_tensors)
    if base is not None and layout.config_shape[1] == 4:
        base_weights(adapter, layout.conv1d, base)
    return layout


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


def _rows_of(
    module: AdapterModule, leaf: Leaf, profile: EngineProfile | None, misfits: Misfits
) -> Iterator[tuple[Row, RowSource, int]]:
    """(row, source, outputs) for each row that `module` becomes."""
    out_features = module.lora_B.shape[0]
    dora = module.magnitude is not None
    if len(leaf.modules) == 1:
        row = Row(BY_NAME[leaf.modules[0]], module.layer, module.r, dora)
        yield row, RowSource(module.path, in_features=_wider_in(row.module.name, profile)), out_features
        return
    parts = _parts(leaf, out_features, profile)
    if isinstance(parts, str):
        misfits.add(module.name, parts, module.layer)
        return
    if profile is not None and leaf.fused in profile.modules:
        shares = [parts[name] for name in leaf.fused_order]
        # A head is never split. With fewer key-value heads than ranks the engine repeats heads; slices cannot do that.
        divisible = out_features // 2 if leaf.fused == "mlp_gate_up" else profile.num_kv_heads
        if divisible % profile.tp_size:
            reason = f"its parts do not divide by the engine's tp_size, {profile.tp_size}"
            misfits.add(module.name, reason, module.layer)
            return
        pieces = tuple(piece.share(rank, profile.tp_size) for rank in range(profile.tp_size) for piece in shares)
        yield Row(BY_NAME[leaf.fused], module.layer, module.r, dora), RowSource(module.path, pieces), out_features
        return
    for name, piece in parts.items():
        yield Row(BY_NAME[name], module.layer, module.r, dora), RowSource(module.path, (piece,)), piece.size


def _wider_in(name: str, profile: EngineProfile | None) -> int:
    """The engine's number of inputs for the module `name`, if it differs from the layer's own number; else 0."""
    if profile is None or name not in profile.modules:
        return 0
    inputs = profile.modules[name].in_features
    return inputs if inputs != profile.layer_dims(name)[0] else 0


def _only_fused(name: str, profile: EngineProfile) -> str:
    """The engine's fused module that `name` is a part of, if the engine has LoRA only for the fused one; else ""."""
    if name in profile.modules:
        return ""
    return next((fused for fused, parts in FUSED.items() if name in parts and fused in profile.modules), "")


def _joined(
    layer: int, fused: str, modules: Mapping[str, AdapterModule], profile: EngineProfile, misfits: Misfits
) -> tuple[Row, JoinedSource]:
    """The row of the engine's module `fused`, joined from its parts, `modules`; reasons against it go to `misfits`."""
    dims, ranks, names = profile.modules[fused], profile.tp_size, ", ".join(modules)
    sizes = dict.fromkeys(FUSED[fused], profile.head_size * profile.num_kv_heads)
    if fused == "mlp_gate_up":
        sizes = dict.fromkeys(FUSED[fused], dims.out_features // 2)
    else:
        sizes[FUSED[fused][0]] = profile.head_size * profile.num_heads
    for name, module in modules.items():
        found, expected = (module.lora_A.shape[1], module.lora_B.shape[0]), (dims.in_features, sizes[name])
        if found != expected:
            reason = (
                f"it is {found[0]} -> {found[1]} in the adapter, but {expected[0]} -> {expected[1]} in {profile.what}, "
                f"in its {fused}; the adapter was most likely trained on another base model"
            )
            misfits.add(name, reason, layer)
    if (sizes["mlp_gate"] if fused == "mlp_gate_up" else profile.num_kv_heads) % ranks:
        misfits.add(names, f"its parts do not divide by the engine's tp_size, {ranks}", layer)
    if any(module.magnitude is not None for module in modules.values()):
        reason = f"the engine has LoRA only for {fused}, and DoRA of its parts cannot be joined; {_apart(fused)}"
        misfits.add(names, reason, layer)
    rank = sum(module.r for module in modules.values())
    if rank > profile.rank_limit:
        reason = (
            f"the engine has LoRA only for {fused}, in which they take the sum of their ranks, {rank}, and its "
            f"max_lora_rank is {profile.max_lora_rank}; build it with --max_lora_rank {rank}, or {_apart(fused)}"
        )
        misfits.add(names, reason, layer)
    if layer >= profile.num_layers:
        misfits.add(names, f"{profile.what} has {profile.num_layers} layers, and not this one", layer)
    places: dict[str, list[tuple[int, int]]] = {name: [] for name in FUSED[fused]}
    start = 0
    for _ in range(ranks):
        for name, shares in places.items():
            shares.append((start, start + sizes[name] // ranks))
            start += sizes[name] // ranks
    parts = tuple((modules[name].path, tuple(places[name])) for name in FUSED[fused] if name in modules)
    return Row(BY_NAME[fused], layer, rank), JoinedSource(parts, dims.out_features)


def _apart(fused: str) -> str:
    return f"build it with {' '.join(FUSED[fused])} among its --lora_target_modules"


def _parts(leaf: Leaf, out_features: int, profile: EngineProfile | None) -> dict[str, Piece] | str:
    """Module -> its outputs within a fused layer, or, as a text, the reason why they cannot be told apart."""
    if leaf.fused == "mlp_gate_up":
        if out_features % 2:
            return f"lora_B has {out_features} outputs, expected two equal halves"
        sizes, groups = [out_features // 2] * 2, 1
    else:
        if profile is None or not profile.head_size:
            return (
                "a fused layer, which only the number of heads can take apart; give the config.json of the engine or "
                "of the base model (--base)"
            )
        heads, kv_heads, head_size = profile.num_heads, profile.num_kv_heads, profile.head_size
        if out_features != (heads + 2 * kv_heads) * head_size:
            return (
                f"lora_B has {out_features} outputs, but {heads} heads and {kv_heads} key-value heads of {head_size} "
                f"make {(heads + 2 * kv_heads) * head_size}; the adapter is of another base model"
            )
        groups = kv_heads if leaf.by_head_group else 1
        sizes = [heads * head_size // groups, *[kv_heads * head_size // groups] * 2]
    parts, start = {}, 0
    for name, size in zip(leaf.modules, sizes, strict=True):
        parts[name] = Piece(groups, 0, groups, start, start + size)
        start += size
    return parts


def _check_row(row: Row, module: AdapterModule, out_features: int, profile: EngineProfile, misfits: Misfits) -> None:
    name, in_features = row.module.name, module.lora_A.shape[1]
    dims = profile.modules.get(name)
    if dims is None:
        misfits.disabled.setdefault(name, set()).add(row.layer)
    elif (in_features, out_features) != (expected := profile.layer_dims(name)):
        reason = (
            f"it is {in_features} -> {out_features} in the adapter, but {expected[0]} -> {expected[1]} in "
            f"{profile.what}; {_likely_cause(name, in_features, out_features, profile)}"
        )
        misfits.add(name, reason, row.layer)
    elif expected != (dims.in_features, dims.out_features) and (profile.tp_size > 1 or row.dora):
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


@dataclass(frozen=True, slots=True)
class Misfits:
    """The reasons why modules do not fit the engine. Modules and layers with the same reason share one line."""

    reasons: dict[str, dict[str, set[int]]] = field(default_factory=dict)  # reason -> module or layer's name -> layers
    disabled: dict[str, set[int]] = field(default_factory=dict)  # modules that the engine has no LoRA for -> layers

    def add(self, name: str, reason: str, layer: int) -> None:
        """Note `reason` for the module or layer `name`, in `layer`. `name` is "" if `reason` names the modules."""
        self.reasons.setdefault(reason, {}).setdefault(name, set()).add(layer)

    def lines(self, profile: EngineProfile | None, *, engine_reads: bool) -> list[str]:
        """A line for each reason: "attn_q, attn_k: reason (layers 0 to 31)"."""
        reasons = dict(self.reasons)
        if self.disabled and profile is not None:
            enabled = ", ".join(profile.modules)
            reason = (
                f"not among the LoRA target modules, which are: {enabled}; "
                f"{_enable([*profile.modules, *self.disabled], engine_reads=engine_reads)}, or train without them"
                if profile.max_lora_rank is not None
                else "the base model has no such layer; the adapter was most likely trained on another base model"
            )
            reasons[reason] = self.disabled
        return [line for reason, names in reasons.items() for line in _lines(reason, names)]


def _lines(reason: str, names: Mapping[str, set[int]]) -> Iterator[str]:
    by_layers: dict[str, list[str]] = {}
    for name, layers in names.items():
        by_layers.setdefault(layers_text(layers), []).append(name)
    for layers_in_words, same in by_layers.items():
        subject = f"{', '.join(same)}: " if any(same) else ""
        yield f"{subject}{reason} ({layers_in_words})"


def _enable(modules: Iterable[str], *, engine_reads: bool) -> str:
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


def _disagreements(dims: Mapping[str, tuple[int, int]]) -> Iterator[str]:
    """Name dims of one layer that differ here and are equal in every model that TensorRT-LLM has LoRA for.

    `dims`: module -> (in, out). A difference means that a layer is not what its name says. With an engine's profile
    this check is not needed: each of the dims is compared with the engine's.
    """
    for one, side, other, other_side in _EQUAL:
        if one in dims and other in dims and dims[one][side] != dims[other][other_side]:
            yield (
                f"{one} has {dims[one][side]} {_SIDES[side]}, and {other} {dims[other][other_side]} "
                f"{_SIDES[other_side]}, and these are equal in every model that TensorRT-LLM has LoRA for; give the "
                "base model's config.json (--base), or merge the adapter into it"
            )


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
