# SPDX-FileCopyrightText: the tritonlora authors
# SPDX-License-Identifier: Apache-2.0
"""The dtypes of tensors, with the name that each format has for a dtype."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Dtype:
    """One dtype. "" and None mean that the format lacks the dtype, or that tritonlora does not need the name."""

    name: str  # in torch, and in TensorRT-LLM's config.json
    itemsize: int  # bytes of an element
    safetensors: str
    triton: str = ""  # data_type in a config.pbtxt
    numpy: str = ""  # in the header of a .npy file; numpy has no bfloat16
    dlpack: tuple[int, int] | None = None  # (DLDataTypeCode, bits)


_ALL = (
    Dtype("bfloat16", 2, "BF16", "TYPE_BF16", "", (4, 16)),
    Dtype("float16", 2, "F16", "TYPE_FP16", "<f2", (2, 16)),
    Dtype("float32", 4, "F32", "TYPE_FP32", "<f4", (2, 32)),
    Dtype("float64", 8, "F64"),
    Dtype("float8_e4m3fn", 1, "F8_E4M3"),
    Dtype("float8_e5m2", 1, "F8_E5M2"),
    Dtype("int64", 8, "I64"),
    Dtype("int32", 4, "I32", "TYPE_INT32", "<i4"),
    Dtype("int16", 2, "I16"),
    Dtype("int8", 1, "I8"),
    Dtype("uint8", 1, "U8"),
    Dtype("bool", 1, "BOOL"),
)
DTYPES: Mapping[str, Dtype] = {dtype.name: dtype for dtype in _ALL}
BY_SAFETENSORS: Mapping[str, Dtype] = {dtype.safetensors: dtype for dtype in _ALL}
LORA_DTYPES = ("bfloat16", "float16", "float32")
"""The dtypes that an adapter's matrices, and lora_weights, can have."""
