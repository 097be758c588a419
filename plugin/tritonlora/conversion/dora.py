# SPDX-FileCopyrightText: the tritonlora authors
# SPDX-License-Identifier: Apache-2.0
"""Normalise DoRA's magnitudes for the engine: divide them by the row norms of the adapted weight.

The engine multiplies `W0 x + scaling B A x` by the normalised magnitudes (`norm_dora_magnitude` in TensorRT-LLM
tensorrt_llm/lora_manager.py). The row norms need the base model's weights, W0. One of these weights is in memory at a
time.
"""

from __future__ import annotations

import torch

from tritonlora.peft.adapter import AdapterModule

_ROWS_AT_A_TIME = 1024


def normalised_magnitude(module: AdapterModule, weight: torch.Tensor) -> torch.Tensor:
    """The module's magnitude divided by the norm of each row of (W0 + scaling * B @ A): float32, (out,).

    `weight` is W0, (out, in). Raises ValueError where the module has no magnitude.
    """

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
