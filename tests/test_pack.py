# SPDX-FileCopyrightText: the tritonlora authors
# SPDX-License-Identifier: Apache-2.0
"""Packed rows against PEFT's own weights."""

from __future__ import annotations

from pathlib import Path

import torch

from adapters import write_adapter
from tritonlora.pack import lora_config, pack, plan_layout
from tritonlora.peft import load_adapter


def test_golden_vector_of_the_engine_is_reproduced(tmp_path: Path) -> None:
    """r=2, 3 -> 4, alpha 4: A as it stands, then twice B, and [module, layer, rank]."""
    a = torch.tensor([[1.0, 2, 3], [4, 5, 6]])
    b = torch.tensor([[1.0, 2], [3, 4], [5, 6], [7, 8]])
    path = "model.layers.0.self_attn.q_proj"
    directory = write_adapter(tmp_path, {f"{path}.lora_A.weight": a, f"{path}.lora_B.weight": b})
    adapter = load_adapter(directory)
    layout = plan_layout(adapter, dtype="bfloat16")
    out = torch.zeros(layout.weights_shape, dtype=torch.bfloat16)
    pack(adapter, layout, out)

    assert [[1, 2, 3, 4, 5, 6, 2, 4, 6, 8, 10, 12, 14, 16]] == out.tolist()
    assert [[1, 0, 2]] == lora_config(layout).tolist()
