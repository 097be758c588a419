# SPDX-FileCopyrightText: the tritonlora authors
# SPDX-License-Identifier: Apache-2.0
"""Take the matrices out of lora_weights again, as views. `tensors` has the format of a row."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING

from tritonlora.architectures.lora_modules import ModuleDims

if TYPE_CHECKING:
    import torch


def unpack(
    lora_weights: torch.Tensor, lora_config: torch.Tensor, modules: Mapping[int, ModuleDims]
) -> dict[tuple[int, str], tuple[torch.Tensor, torch.Tensor]]:
    """(layer, module name) -> (A (r, in), scaled B (out, r)), which are views of `lora_weights` (n, W)."""
    found = {}
    for row, (module_id, layer, rank) in zip(lora_weights, lora_config[:, :3].tolist(), strict=True):
        dims = modules[module_id]
        split, end = rank * dims.in_features, rank * (dims.in_features + dims.out_features)
        found[layer, dims.module.name] = (
            row[:split].view(rank, dims.in_features),
            row[split:end].view(dims.out_features, rank),
        )
    return found


def unpack_magnitudes(
    lora_weights: torch.Tensor, lora_config: torch.Tensor, modules: Mapping[int, ModuleDims]
) -> dict[tuple[int, str], torch.Tensor]:
    """(layer, module name) -> DoRA's normalised magnitude (out,), a view of `lora_weights`, for rows that have one."""
    found = {}
    if lora_config.shape[1] == 4:
        for row, (module_id, layer, rank, dora) in zip(lora_weights, lora_config.tolist(), strict=True):
            dims = modules[module_id]
            start = rank * (dims.in_features + dims.out_features)
            if dora:
                found[layer, dims.module.name] = row[start : start + dims.out_features]
    return found
