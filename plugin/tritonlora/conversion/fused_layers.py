# SPDX-FileCopyrightText: the tritonlora authors
# SPDX-License-Identifier: Apache-2.0
"""Take fused layers apart, and join separate layers to the engine's fused modules.

- A fused layer of the base model becomes one fused row, where the engine has LoRA for the fused module. Otherwise it
  becomes one row for each part: the rows share A and divide the rows of B. The result is exact.
- Separate layers of the base model become one fused row, where the engine has LoRA only for the fused module. Their A
  are put one below the other, and their B on the diagonal. The result is exact, too.
- With tensor parallelism the engine gives each rank one contiguous piece of a fused row. The parts of the row are
  therefore interleaved by rank (`interleave_fused_lora_weights_for_tp` in TensorRT-LLM tensorrt_llm/lora_manager.py).
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping

from tritonlora.architectures.families import FUSED, Leaf
from tritonlora.architectures.lora_modules import BY_NAME
from tritonlora.conversion.misfits import Misfits
from tritonlora.conversion.rows import JoinedSource, Piece, Row
from tritonlora.engine.profile import EngineProfile
from tritonlora.peft.adapter import AdapterModule


def parts_of(leaf: Leaf, out_features: int, profile: EngineProfile | None) -> dict[str, Piece] | str:
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


def indivisible(fused: str, out_features: int, profile: EngineProfile) -> str:
    """The reason why the parts of a fused module do not divide among the engine's ranks; "" if they do.

    A head is never split. With fewer key-value heads than ranks the engine repeats heads; slices cannot do that.
    """
    divisible = out_features // 2 if fused == "mlp_gate_up" else profile.num_kv_heads
    return f"its parts do not divide by the engine's tp_size, {profile.tp_size}" if divisible % profile.tp_size else ""


def only_fused(name: str, profile: EngineProfile) -> str:
    """The engine's fused module that `name` is a part of, if the engine has LoRA only for the fused one; else ""."""
    if name in profile.modules:
        return ""
    return next((fused for fused, parts in FUSED.items() if name in parts and fused in profile.modules), "")


def joined(
    layer: int, fused: str, modules: Mapping[str, AdapterModule], profile: EngineProfile, misfits: Misfits
) -> tuple[Row, JoinedSource]:
    """The row of the engine's module `fused`, joined from its parts, `modules`; reasons against it go to `misfits`."""
    dims, ranks = profile.modules[fused], profile.tp_size
    if fused == "mlp_gate_up":
        sizes = dict.fromkeys(FUSED[fused], dims.out_features // 2)
    else:
        sizes = dict.fromkeys(FUSED[fused], profile.head_size * profile.num_kv_heads)
        sizes[FUSED[fused][0]] = profile.head_size * profile.num_heads
    for name, module in modules.items():
        found, expected = (module.lora_A.shape[1], module.lora_B.shape[0]), (dims.in_features, sizes[name])
        if found != expected:
            reason = (
                f"it is {found[0]} -> {found[1]} in the adapter, but {expected[0]} -> {expected[1]} in {profile.what}, "
                f"in its {fused}; the adapter was most likely trained on another base model"
            )
            misfits.add(name, reason, layer)
    row = Row(BY_NAME[fused], layer, sum(module.r for module in modules.values()))
    for reason in _against_joining(row, modules, profile):
        misfits.add(", ".join(modules), reason, layer)
    places: dict[str, list[tuple[int, int]]] = {name: [] for name in FUSED[fused]}
    start = 0
    for _ in range(ranks):
        for name, shares in places.items():
            shares.append((start, start + sizes[name] // ranks))
            start += sizes[name] // ranks
    parts = tuple((modules[name].path, tuple(places[name])) for name in FUSED[fused] if name in modules)
    return row, JoinedSource(parts, dims.out_features)


def _against_joining(row: Row, modules: Mapping[str, AdapterModule], profile: EngineProfile) -> Iterator[str]:
    """The reasons why the engine cannot take a joined row."""
    fused, rank = row.module.name, row.adapter_size
    apart = f"build it with {' '.join(FUSED[fused])} among its --lora_target_modules"
    if reason := indivisible(fused, profile.modules[fused].out_features, profile):
        yield reason
    if any(module.magnitude is not None for module in modules.values()):
        yield f"the engine has LoRA only for {fused}, and DoRA of its parts cannot be joined; {apart}"
    if rank > profile.rank_limit:
        yield (
            f"the engine has LoRA only for {fused}, in which they take the sum of their ranks, {rank}, and its "
            f"max_lora_rank is {profile.max_lora_rank}; build it with --max_lora_rank {rank}, or {apart}"
        )
    if row.layer >= profile.num_layers:
        yield f"{profile.what} has {profile.num_layers} layers, and not this one"
