# SPDX-FileCopyrightText: the tritonlora authors
# SPDX-License-Identifier: Apache-2.0
"""Adapter -> lora_weights and lora_config rows, and back.

One row for each (layer, module), sorted by (layer, module id). contract.md, section 4.1:

    row[0          : r*in      ] = A, row-major, (r, in)          as PEFT stores it
    row[r*in       : r*(in+out)] = scaling * B, row-major, (out, r)
    row[r*(in+out) : W         ] = 0
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

from tritonlora.modules import LoraModule, ModuleDims

if TYPE_CHECKING:
    import torch

    from tritonlora.engine import EngineProfile
    from tritonlora.peft import Adapter


@dataclass(frozen=True, slots=True)
class Row:
    """What one row of lora_config says."""

    module: LoraModule
    layer: int
    adapter_size: int  # r
    dora: bool = False


@dataclass(frozen=True, slots=True)
class Layout:
    """The shape of an adapter's two tensors, known before a byte of weights is read."""

    rows: tuple[Row, ...]
    width: int  # W: elements in a row
    dtype: str  # "bfloat16", "float16", "float32"

    @property
    def weights_shape(self) -> tuple[int, int]:
        """(n, W)."""
        return (len(self.rows), self.width)

    @property
    def config_shape(self) -> tuple[int, int]:
        """(n, 3), or (n, 4) where a row carries DoRA."""
        return (len(self.rows), 4 if any(row.dora for row in self.rows) else 3)

    @property
    def weights_nbytes(self) -> int:
        """Bytes of lora_weights."""
        return len(self.rows) * self.width * {"bfloat16": 2, "float16": 2, "float32": 4}[self.dtype]


def plan_layout(adapter: Adapter, *, dtype: str, profile: EngineProfile | None = None) -> Layout:
    """The rows `adapter` becomes; raises every reason why it cannot, in one error."""
    raise NotImplementedError


def lora_config(layout: Layout) -> torch.Tensor:
    """lora_config, int32, shape `layout.config_shape`."""
    raise NotImplementedError


def pack(adapter: Adapter, layout: Layout, out: torch.Tensor) -> None:
    """Fill `out` (shape `layout.weights_shape`, `layout.dtype`, all zero), which may be a mapped file."""
    raise NotImplementedError


def unpack(
    lora_weights: torch.Tensor, lora_config: torch.Tensor, modules: Mapping[int, ModuleDims]
) -> dict[tuple[int, str], tuple[torch.Tensor, torch.Tensor]]:
    """(layer, module name) -> (A (r, in), scaled B (out, r)), views of `lora_weights` (n, W)."""
    raise NotImplementedError
