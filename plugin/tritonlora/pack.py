# SPDX-FileCopyrightText: the tritonlora authors
# SPDX-License-Identifier: Apache-2.0
"""Adapter -> lora_weights and lora_config rows, and back.

    row[0          : r*in      ] = A, row-major, (r, in)          as PEFT stores it
    row[r*in       : r*(in+out)] = scaling * B, row-major, (out, r)
    row[r*(in+out) : +out      ] = DoRA's magnitude / row norm, only where the fourth column of lora_config is 1
    row[           : W         ] = 0

Source: what the engine reads, `LoraCache::copyToPages` in TensorRT-LLM cpp/tensorrt_llm/runtime/loraCache.cpp. Weights
are full, not split by tensor-parallel rank. A is only cast; B is scaled in float32 and rounded once.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING

from tritonlora.errors import InvalidAdapter, UnsupportedAdapter, one_message
from tritonlora.layout import Layout, Piece, Row, plan_layout
from tritonlora.modules import ModuleDims

if TYPE_CHECKING:
    import torch

    from tritonlora.peft import Adapter, AdapterModule

__all__ = ["Layout", "Row", "lora_config", "pack", "plan_layout", "unpack"]


def lora_config(layout: Layout) -> torch.Tensor:
    """lora_config, int32, shape `layout.config_shape`."""
    import torch

    columns = layout.config_shape[1]
    rows = [(row.module.id, row.layer, row.adapter_size, int(row.dora))[:columns] for row in layout.rows]
    return torch.tensor(rows, dtype=torch.int32).view(layout.config_shape)


def pack(adapter: Adapter, layout: Layout, out: torch.Tensor, *, allow_nonfinite: bool = False) -> None:
    """Fill `out` (shape `layout.weights_shape`, `layout.dtype`, all zero), which may be a mapped file.

    Padding is not touched. Raises InvalidAdapter naming each module with NaN or infinite weights (unless
    `allow_nonfinite`) and UnsupportedAdapter naming each whose values overflow `layout.dtype`.
    """
    flat = out.view(-1)
    for start, block in _blocks(adapter, layout, allow_nonfinite):
        flat[start : start + block.numel()].copy_(block.reshape(-1))


def unpack(
    lora_weights: torch.Tensor, lora_config: torch.Tensor, modules: Mapping[int, ModuleDims]
) -> dict[tuple[int, str], tuple[torch.Tensor, torch.Tensor]]:
    """(layer, module name) -> (A (r, in), scaled B (out, r)), views of `lora_weights` (n, W)."""
    found = {}
    for row, (module_id, layer, rank) in zip(lora_weights, lora_config[:, :3].tolist(), strict=True):
        dims = modules[module_id]
        split, end = rank * dims.in_features, rank * (dims.in_features + dims.out_features)
        found[layer, dims.module.name] = (
            row[:split].view(rank, dims.in_features),
            row[split:end].view(dims.out_features, rank),
        )
    return found


def _blocks(adapter: Adapter, layout: Layout, allow_nonfinite: bool) -> Iterator[tuple[int, torch.Tensor]]:
    """(first element in lora_weights, values in `layout.dtype`) of A and of B, for one row after the other.

    Only one block is held at a time. The problems of all modules are raised at the end.
    """
    import torch

    dtype: torch.dtype = getattr(torch, layout.dtype)
    nonfinite: list[str] = []
    overflowing: list[str] = []
    for index, source in enumerate(layout.sources):
        module = adapter.modules[source.path]
        start = index * layout.width
        for what in ("lora_A", "lora_B"):
            block = module.lora_A.to(dtype) if what == "lora_A" else _scaled_b(module, source.pieces).to(dtype)
            if not allow_nonfinite and not _all_finite(block):
                tensor = getattr(module, what)
                (nonfinite if not _all_finite(tensor) else overflowing).append(f"{what} of {source.path!r}")
            yield start, block
            start += block.numel()
    if nonfinite:
        raise InvalidAdapter(
            one_message("NaN or infinite values (--allow-nonfinite converts them all the same)", nonfinite)
        )
    if overflowing:
        raise UnsupportedAdapter(one_message(f"values too large for {layout.dtype}; convert to bfloat16", overflowing))


def _scaled_b(module: AdapterModule, pieces: tuple[Piece, ...]) -> torch.Tensor:
    return _take(module.lora_B.float() * module.scaling, pieces)


def _take(tensor: torch.Tensor, pieces: tuple[Piece, ...]) -> torch.Tensor:
    """The outputs that `pieces` name, of a tensor that has them in its first dim."""
    import torch

    if not pieces:
        return tensor
    rest = tensor.shape[1:]
    return torch.cat(
        [
            tensor.reshape(piece.groups, -1, *rest)[piece.first : piece.last, piece.start : piece.stop].reshape(
                -1, *rest
            )
            for piece in pieces
        ]
    )


def _all_finite(tensor: torch.Tensor) -> bool:
    import torch

    # NaN and infinities survive a sum, which is much faster than looking at each; a sum may overflow by itself.
    return math.isfinite(tensor.sum(dtype=torch.float32).item()) or bool(tensor.isfinite().all())
