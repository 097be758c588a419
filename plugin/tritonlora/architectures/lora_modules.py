# SPDX-FileCopyrightText: the tritonlora authors
# SPDX-License-Identifier: Apache-2.0
"""The LoRA modules of TensorRT-LLM: name, id, and the dim that tensor parallelism splits.

Ids appear nowhere else. Source: TensorRT-LLM cpp/include/tensorrt_llm/runtime/loraModule.h, `LoraModule::ModuleType`.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

Split = Literal["in", "out"] | None


@dataclass(frozen=True, slots=True)
class LoraModule:
    """One kind of linear layer that the engine can add a LoRA to."""

    id: int
    name: str
    split: Split  # the dim that tensor parallelism splits: A's `in`, B's `out`, or none


def row_elements(adapter_size: int, in_features: int, out_features: int, *, dora: bool = False) -> int:
    """The number of elements in a row of lora_weights: A, B and, with `dora`, the magnitude."""
    return adapter_size * (in_features + out_features) + (out_features if dora else 0)


@dataclass(frozen=True, slots=True)
class ModuleDims:
    """A module of one engine, with its full (not tensor-parallel) dims."""

    module: LoraModule
    in_features: int
    out_features: int

    def local(self, tp_size: int) -> tuple[int, int]:
        """(in, out) on one of `tp_size` tensor-parallel ranks."""
        return (
            self.in_features // tp_size if self.module.split == "in" else self.in_features,
            self.out_features // tp_size if self.module.split == "out" else self.out_features,
        )


MODULES: tuple[LoraModule, ...] = (
    LoraModule(0, "attn_qkv", "out"),
    LoraModule(1, "attn_q", "out"),
    LoraModule(2, "attn_k", "out"),
    LoraModule(3, "attn_v", "out"),
    LoraModule(4, "attn_dense", "in"),
    LoraModule(5, "mlp_h_to_4h", "out"),
    LoraModule(6, "mlp_4h_to_h", "in"),
    LoraModule(7, "mlp_gate", "out"),
    LoraModule(8, "cross_attn_qkv", "out"),
    LoraModule(9, "cross_attn_q", "out"),
    LoraModule(10, "cross_attn_k", "out"),
    LoraModule(11, "cross_attn_v", "out"),
    LoraModule(12, "cross_attn_dense", "in"),
    LoraModule(13, "moe_h_to_4h", "out"),
    LoraModule(14, "moe_4h_to_h", "in"),
    LoraModule(15, "moe_gate", "out"),
    LoraModule(16, "moe_router", None),
    LoraModule(17, "mlp_router", None),
    LoraModule(18, "mlp_gate_up", "out"),
)
BY_NAME: dict[str, LoraModule] = {module.name: module for module in MODULES}
BY_ID: dict[int, LoraModule] = {module.id: module for module in MODULES}
