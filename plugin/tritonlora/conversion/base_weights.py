# SPDX-FileCopyrightText: the tritonlora authors
# SPDX-License-Identifier: Apache-2.0
"""Find the base model's weights that a DoRA adapter needs in the base model's checkpoint. No weight is read yet."""

from __future__ import annotations

from collections.abc import Collection
from pathlib import Path

from tritonlora.architectures.layers import locate
from tritonlora.errors import InvalidAdapter, UnsupportedAdapter, merge_layers, one_message
from tritonlora.peft.adapter import Adapter
from tritonlora.peft.checkpoint import load_checkpoint
from tritonlora.peft.stored_tensor import StoredTensor

# A quantised tensor is no weight without its scales. torch counts float8 as floating-point, so the dtypes are named.
_UNQUANTISED = ("float64", "float32", "bfloat16", "float16")


def base_weights(adapter: Adapter, conv1d: Collection[str], base: Path) -> dict[str, StoredTensor]:
    """Path of each DoRA module -> the base model's weight in the checkpoint `base`.

    A weight's shape is (out, in), or (in, out) for a path in `conv1d`. Raises UnsupportedAdapter, which names each
    weight that is missing, ambiguous, quantised or of another shape.
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
                f"{path!r}: {'several weights fit: ' + ', '.join(names) if names else 'no weight has its name'}"
            )
            continue
        weight = tensors[names[0]]
        expected = (module.lora_B.shape[0], module.lora_A.shape[1])
        expected = expected[::-1] if path in conv1d else expected
        if weight.shape != expected or weight.dtype.name not in _UNQUANTISED:
            problems.append(f"{path!r}: {names[0]!r} is {weight.dtype.name} {weight.shape}, expected floats {expected}")
        found[path] = weight
    if problems:
        raise UnsupportedAdapter(
            one_message(
                f"{str(base)!r} is not the unquantised base model of this DoRA adapter; give its base model",
                merge_layers(problems),
            )
        )
    return found


def _candidates(tensors: Collection[str], path: str) -> list[str]:
    """The names in the checkpoint that may be the weight of `path`. Prefixes before the layer number may differ."""
    exact = f"{path}.weight"
    if exact in tensors:
        return [exact]
    parts = path.split(".")
    number = next(position for position, part in enumerate(parts) if part.isdecimal())
    tail = ".".join(parts[number - 1 :]) + ".weight"
    same_tail = (name for name in tensors if name == tail or name.endswith(f".{tail}"))
    return [name for name in same_tail if locate(name.removesuffix(".weight"))]  # leaves out a vision tower's
