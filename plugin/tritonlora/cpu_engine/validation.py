# SPDX-FileCopyrightText: the tritonlora authors
# SPDX-License-Identifier: Apache-2.0
"""Check a request's LoRA tensors as the engine does: in its order and with its messages.

Sources: TensorRT-LLM cpp/tensorrt_llm/executor/loraConfig.cpp (when the request is made) and
cpp/tensorrt_llm/runtime/loraUtils.cpp `loraValidateRequestTensors` (when the executor takes it).
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from tritonlora.architectures.lora_modules import BY_ID, row_elements
from tritonlora.cpu_engine.peft_cache import LoraCacheError
from tritonlora.cpu_engine.request import LoraInputs
from tritonlora.cpu_engine.wire_arrays import WireArray, dtype_name, is_on_cpu
from tritonlora.engine.profile import EngineProfile

if TYPE_CHECKING:
    import torch

Rows = list[list[int]]


def check_lora_config(lora: LoraInputs) -> None:
    """Check as `executor::LoraConfig` does, before a request is queued."""
    weights, config = _squeeze(lora.weights), _squeeze(lora.config)
    if config is not None:
        _expect(config.ndim == 2, "Expected config tensor to have 2 dimensions")
        _expect(is_on_cpu(config), "Expected lora config to be in CPU memory")
        _expect(dtype_name(config) == "int32", "Expected lora config tensor to have type kINT32")
    if weights is not None:
        _expect(config is not None, "Request for LoRA inference with lora weights must also have lora config")
        _expect(weights.ndim == 2, "Expected weights tensor to have 2 dimensions")
        _expect(is_on_cpu(weights), "Expected lora weights to be in CPU memory")
        same = config is not None and len(weights) == len(config)
        _expect(same, "Expected dim 0 of lora weights and lora config to have the same size")


def check_lora_tensors(lora: LoraInputs, profile: EngineProfile) -> Rows | None:
    """Check weights against the engine: the rows of lora_config, or None if the request carries an id alone."""
    weights, config = lora.weights, lora.config
    _expect(lora.task_id is not None, "lora_task_id must be set for LoRA inference")
    if weights is None and config is None:
        return None
    if weights is None or config is None:
        raise _failed("Request for LoRA inference must have both lora_weights and lora_keys")
    _expect(weights.ndim == 3, "Invalid shape for lora_weights tensor")
    _expect(config.ndim == 3, "Invalid shape for lora_keys tensor")
    for tensor in (weights, config):
        _expect(tensor.shape[0] == 1, "Expected batch dimension to be 1 for each lora request")
    for tensor in (weights, config):
        _expect(is_on_cpu(tensor), "Expected lora weights to be in CPU memory")
    got = dtype_name(config)
    _expect(got == "int32", f"Expected  lora keys to have TYPE_INT32 but was {got}")
    _expect(weights.shape[1] == config.shape[1], "Expected dim1 lora_weights and lora_keys to have the same size")
    _expect(config.shape[2] in (3, 4), "Expected dim2 of lora_keys to have a size in [3, 4]")
    _expect(dtype_name(weights) == profile.dtype, "Expected lora weights to be the same data type as base model")
    rows: Rows = config[0].tolist()
    for row in rows:
        _check_row(row, weights.shape[2], profile)
    return rows


def _check_row(row: list[int], width: int, profile: EngineProfile) -> None:
    module_id, layer, adapter_size, *dora = row
    _expect(0 <= layer < profile.num_layers, "Expected layerId to be in the range [0, numModelLayers)")
    _expect(adapter_size > 0, "Expected adapterSize to be > 0")
    name = BY_ID[module_id].name if module_id in BY_ID else "INVALID"
    _expect(name in profile.modules, f"lora module {name} not enabled for this model")
    dims = profile.modules[name]
    elements = row_elements(adapter_size, dims.in_features, dims.out_features, dora=any(dora))
    _expect(elements <= width, f"lora_weights has to few values for {name}")
    _expect(
        adapter_size <= profile.rank_limit,
        f"Invalid low_rank ({adapter_size}). low_rank must be smaller than mMaxLowRank ({profile.rank_limit})",
    )


def _squeeze(tensor: WireArray | torch.Tensor | None) -> WireArray | torch.Tensor | None:
    """The tensor without its batch dimension, if that is 1."""
    return tensor[0] if tensor is not None and tensor.ndim == 3 and len(tensor) == 1 else tensor


def _expect(holds: bool, message: str) -> None:
    if not holds:
        raise _failed(message)


def _failed(message: str) -> LoraCacheError:
    return LoraCacheError(f"[TensorRT-LLM][ERROR] Assertion failed: {message}")
