# SPDX-FileCopyrightText: the tritonlora authors
# SPDX-License-Identifier: Apache-2.0
"""The sizes of a model, and the dims of its LoRA modules, which follow from them."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from tritonlora.architectures.lora_modules import BY_NAME, ModuleDims


@dataclass(frozen=True, slots=True)
class Sizes:
    """The sizes of a model."""

    hidden: int
    layers: int
    heads: int
    kv_heads: int
    head_size: int
    mlp: int
    experts: int = 0


# Module -> (in, out), as names of entries in `module_dims`. TensorRT-LLM cpp/tensorrt_llm/runtime/loraModule.cpp,
# `createLoraModules`; `attention` is heads * head_size.
MODULE_DIMS: Mapping[str, tuple[str, str]] = {
    "attn_qkv": ("hidden", "qkv"),
    "attn_q": ("hidden", "attention"),
    "attn_k": ("hidden", "kv"),
    "attn_v": ("hidden", "kv"),
    "attn_dense": ("attention", "hidden"),
    "mlp_h_to_4h": ("hidden", "mlp"),
    "mlp_4h_to_h": ("mlp", "hidden"),
    "mlp_gate": ("hidden", "mlp"),
    "cross_attn_qkv": ("hidden", "qkv"),
    "cross_attn_q": ("hidden", "attention"),
    "cross_attn_k": ("hidden", "kv"),
    "cross_attn_v": ("hidden", "kv"),
    "cross_attn_dense": ("attention", "hidden"),
    "moe_h_to_4h": ("hidden_by_expert", "mlp_by_expert"),
    "moe_4h_to_h": ("mlp_by_expert", "hidden_by_expert"),
    "moe_gate": ("hidden_by_expert", "mlp_by_expert"),
    "moe_router": ("hidden", "experts"),
    "mlp_router": ("hidden", "one"),
    "mlp_gate_up": ("hidden", "two_mlp"),
}


def module_dims(names: Iterable[str], sizes: Sizes, *, dense_in: int) -> dict[str, ModuleDims]:
    """Module name -> full dims, in the order of ids. `dense_in` is the number of inputs of attn_dense."""
    dims = {
        "one": 1,
        "hidden": sizes.hidden,
        "attention": sizes.heads * sizes.head_size,
        "kv": sizes.kv_heads * sizes.head_size,
        "qkv": (sizes.heads + 2 * sizes.kv_heads) * sizes.head_size,
        "mlp": sizes.mlp,
        "two_mlp": 2 * sizes.mlp,
        "experts": sizes.experts,
        "hidden_by_expert": sizes.hidden * sizes.experts,
        "mlp_by_expert": sizes.mlp * sizes.experts,
    }
    found = {}
    for name in sorted(names, key=lambda name: BY_NAME[name].id):
        inward, outward = MODULE_DIMS[name]
        in_features = dense_in if name in ("attn_dense", "cross_attn_dense") else dims[inward]
        found[name] = ModuleDims(BY_NAME[name], in_features, dims[outward])
    return found


def size_in(config: Mapping[str, Any], keys: Sequence[str], problems: list[str], missing: int | None = None) -> int:
    key = next((key for key in keys if config.get(key) is not None), None)
    if key is None:
        if missing is None:
            problems.append(f"{' or '.join(repr(key) for key in keys)} is missing")
        return missing or 0
    value = config[key]
    if isinstance(value, bool) or not isinstance(value, int) or not 0 < value < 1 << 31:
        problems.append(f"{key!r} is {value!r}, expected a positive integer")
        return missing or 0
    return value
