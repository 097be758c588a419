# SPDX-FileCopyrightText: the tritonlora authors
# SPDX-License-Identifier: Apache-2.0
"""DoRA's magnitudes as the engine takes them: divided by the row norms of the adapted weight.

The engine multiplies `W0 x + scaling B A x` by them (`norm_dora_magnitude` in TensorRT-LLM
tensorrt_llm/lora_manager.py), so they can be made only with the base model's weights at hand. One of these is in memory
at a time.
"""

from __future__ import annotations

import torch

from tritonlora.peft.adapter import AdapterModule

_ROWS_AT_A_TIME = 1024


def normalised_magnitude(module: AdapterModule, weight: torch.Tensor) -> torch.Tensor:
    """magnitude / norm of each row of (W0 + scaling * B @ A), float32, (out,). `weight` is W0, (out, in)."""

    if module.magnitude is None:
        raise ValueError(f"{module.path!r} has no magnitude")
    lora_a = module.lora_A.load().float()
    norms = [
        torch.linalg.vector_norm(rows.float() + module.scaling * (lora_b.float() @ lora_a), dim=1)
        for rows, lora_b in zip(
            torch.split(weight, _ROWS_AT_A_TIME), torch.split(module.lora_B.load(), _ROWS_AT_A_TIME), strict=True
        )
    ]
    return module.magnitude.load().reshape(-1).float() / torch.cat(norms)
