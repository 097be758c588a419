# SPDX-FileCopyrightText: the tritonlora authors
# SPDX-License-Identifier: Apache-2.0
"""DoRA's magnitudes as the engine takes them: divided by the row norms of the adapted weight.

The engine multiplies `W0 x + scaling B A x` by them (`norm_dora_magnitude` in TensorRT-LLM
tensorrt_llm/lora_manager.py), so they can be made only with the base model's weights at hand. One of these is in memory
at a time.
"""

from __future__ import annotations

from collections.abc import Collection
from pathlib import Path

import torch

from tritonlora.checkpoint import load_checkpoint
from tritonlora.errors import InvalidAdapter, UnsupportedAdapter, merge_layers, one_message
from tritonlora.locate import locate
from tritonlora.peft import Adapter, AdapterModule
from tritonlora.stored import StoredTensor

_ROWS_AT_A_TIME = 1024
# What quantised checkpoints store are not weights without their scales; float8 counts as floating-point in torch, too.
_UNQUANTISED = (torch.float64, torch.float32, torch.bfloat16, torch.float16)


def base_weights(adapter: Adapter, conv1d: Collection[str], base: Path) -> dict[str, StoredTensor]:
    """Path of each DoRA module -> the base model's weight in the checkpoint `base`: (out, in), or (in, out) where the
    path is one of `conv1d`.

    Raises UnsupportedAdapter naming each weight that is not there, or not as the adapter needs it.
    """
    try:
        tensors = load_checkpoint(base, "model.safetensors", "pytorch_model.bin")
    except InvalidAdapter as error:
        raise UnsupportedAdapter(f"cannot read the base model's weights, which DoRA needs: {error}") from error
    found, problems = {}, []
    for path, module in adapter.modules.items():
        if module.magnitude is None:
            continue
        names = _candidates(tensors, path)
        if len(names) != 1:
            problems.append(
                f"{path!r}: {'several weights fit: ' + ', '.join(names) if names else 'no weight is there'}"
            )
            continue
        weight = tensors[names[0]]
        expected = (module.lora_B.shape[0], module.lora_A.shape[1])
        expected = expected[::-1] if path in conv1d else expected
        if weight.shape != expected or weight.dtype not in _UNQUANTISED:
            problems.append(f"{path!r}: {names[0]!r} is {weight.dtype} {weight.shape}, expected floats {expected}")
        found[path] = weight
    if problems:
        raise UnsupportedAdapter(
            one_message(
                f"{str(base)!r} is not the unquantised base model of this DoRA adapter; give that one",
                merge_layers(problems),
            )
        )
    return found


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


def _candidates(tensors: Collection[str], path: str) -> list[str]:
    """The checkpoint's names for the weight of `path`; what stands before its layers may differ."""
    exact = f"{path}.weight"
    if exact in tensors:
        return [exact]
    parts = path.split(".")
    number = next(position for position, part in enumerate(parts) if part.isdecimal())
    tail = ".".join(parts[number - 1 :]) + ".weight"
    same_tail = (name for name in tensors if name == tail or name.endswith(f".{tail}"))
    return [name for name in same_tail if locate(name.removesuffix(".weight"))]  # not a vision tower's
