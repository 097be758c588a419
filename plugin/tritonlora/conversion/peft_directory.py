# SPDX-FileCopyrightText: the tritonlora authors
# SPDX-License-Identifier: Apache-2.0
"""Copy a checked PEFT adapter to the directory that TensorRT-LLM's LLM API reads.

The tensors are the adapter's own, bit for bit, in one safetensors file under PEFT's names. The LLM API reads neither
shards nor other spellings (TensorRT-LLM tensorrt_llm/lora_manager.py, `load_from_hf` and HF_LORA_PATTERN).
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING

from tritonlora.errors import InvalidAdapter, UnsupportedAdapter, one_message
from tritonlora.peft.adapter import Adapter
from tritonlora.peft.adapter_config import parse_config
from tritonlora.peft.checkpoint import read_json_bytes
from tritonlora.peft.stored_tensor import bytes_of
from tritonlora.serving.dtypes import Dtype

if TYPE_CHECKING:
    import torch


def check_for_llm_api(adapter: Adapter) -> None:
    """Refuse an adapter that the LLM API would read wrongly. Raises UnsupportedAdapter, which lists every reason."""
    config = adapter.config
    problems = []
    if config.use_dora:
        problems.append(
            "it uses DoRA: the LLM API expects normalised magnitudes, and PEFT stores magnitudes that are not; merge "
            "the adapter into the base model"
        )
    alphas = []
    for path, module in adapter.modules.items():
        read = config.lora_alpha / (math.sqrt(module.r) if config.use_rslora else module.r)
        if module.scaling != read:
            alphas.append(f"{path!r} has the scaling {module.scaling:g}, and would get {read:g}")
    if alphas:
        more = f" (and {len(alphas) - 1} more)" if len(alphas) > 1 else ""
        problems.append(f"the LLM API ignores alpha_pattern: {alphas[0]}{more}; train with one lora_alpha")
    if problems:
        raise UnsupportedAdapter(
            one_message(f"the LLM API cannot take the adapter in {str(adapter.directory)!r}", problems)
        )


def copy_adapter(adapter: Adapter, weights: Path, config: Path) -> None:
    """Write adapter_model.safetensors to `weights` and adapter_config.json to `config`.

    Raises InvalidAdapter when either file has changed since the adapter was read.
    """
    source = adapter.directory / "adapter_config.json"
    content = read_json_bytes(source)
    if parse_config(content) != adapter.config:
        raise InvalidAdapter(f"{str(source)!r} was changed after it had been looked at; try again")
    tensors = {
        f"base_model.model.{path}.lora_{matrix}.weight": tensor
        for path, module in sorted(adapter.modules.items())
        for matrix, tensor in (("A", module.lora_A), ("B", module.lora_B))
    }
    header = {name: (tensor.dtype, tensor.shape) for name, tensor in tensors.items()}
    save_safetensors(weights, header, (tensor.load() for tensor in tensors.values()))
    config.write_bytes(content)


def save_safetensors(
    path: Path, header: Mapping[str, tuple[Dtype, tuple[int, ...]]], tensors: Iterable[torch.Tensor]
) -> None:
    """Write one safetensors file: 8 bytes of header length, the header as JSON, the tensors, each in C order.

    `header` has the names, dtypes and shapes of the `tensors`, in their order. One tensor is in memory at a time.
    """
    entries: dict[str, object] = {"__metadata__": {"format": "pt"}}
    offset = 0
    for name, (dtype, shape) in header.items():
        nbytes = math.prod(shape) * dtype.itemsize
        entries[name] = {
            "dtype": dtype.safetensors,
            "shape": list(shape),
            "data_offsets": [offset, offset + nbytes],
        }
        offset += nbytes
    text = json.dumps(entries, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    with path.open("wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        for tensor in tensors:
            file.write(bytes_of(tensor))
