# SPDX-FileCopyrightText: the tritonlora authors
# SPDX-License-Identifier: Apache-2.0
"""Makes DLPack capsules of bytes, as tensors of any dtype, bfloat16 included, without torch.

numpy has no bfloat16. torch in each process of the router would cost ten times as much memory as the rest of the
process. DLPack describes a tensor in six fields, which this module fills in.

numpy can make a capsule of integers, whose dtype could then be changed. This was tried, and needs half as much code.
But the Python backend's process then dies of a stack overflow at the first weights that the resolver sends (Triton
2.51, numpy 1.26).

Source: dmlc/dlpack include/dlpack/dlpack.h.
"""

from __future__ import annotations

import ctypes
import math
from typing import ClassVar

import numpy as np
import numpy.typing as npt

from .dtypes import DTYPES

_CPU = 1  # kDLCPU


class _Device(ctypes.Structure):
    _fields_: ClassVar = [("device_type", ctypes.c_int32), ("device_id", ctypes.c_int32)]


class _DataType(ctypes.Structure):
    _fields_: ClassVar = [("code", ctypes.c_uint8), ("bits", ctypes.c_uint8), ("lanes", ctypes.c_uint16)]


class _Tensor(ctypes.Structure):
    _fields_: ClassVar = [
        ("data", ctypes.c_void_p),
        ("device", _Device),
        ("ndim", ctypes.c_int32),
        ("dtype", _DataType),
        ("shape", ctypes.POINTER(ctypes.c_int64)),
        ("strides", ctypes.c_void_p),  # NULL: dense, row by row
        ("byte_offset", ctypes.c_uint64),
    ]


_Deleter = ctypes.CFUNCTYPE(None, ctypes.c_void_p)


class _ManagedTensor(ctypes.Structure):
    _fields_: ClassVar = [("dl_tensor", _Tensor), ("manager_ctx", ctypes.c_void_p), ("deleter", _Deleter)]


# The objects that each living tensor is made of, by the address of its _ManagedTensor.
_alive: dict[int, tuple[object, ...]] = {}


def _forget(address: int) -> None:
    del _alive[address]


_delete = _Deleter(_forget)

_NAME = b"dltensor"  # the name of a capsule that was not consumed yet
_is_capsule = ctypes.pythonapi.PyCapsule_IsValid
_is_capsule.argtypes = (ctypes.c_void_p, ctypes.c_char_p)
_address_in = ctypes.pythonapi.PyCapsule_GetPointer
_address_in.restype = ctypes.c_void_p
_address_in.argtypes = (ctypes.c_void_p, ctypes.c_char_p)


def _forget_unused(capsule: int) -> None:
    if _is_capsule(capsule, _NAME):
        _forget(_address_in(capsule, _NAME))


_destroy = _Deleter(_forget_unused)

_new_capsule = ctypes.pythonapi.PyCapsule_New
_new_capsule.restype = ctypes.py_object
_new_capsule.argtypes = (ctypes.c_void_p, ctypes.c_char_p, _Deleter)


def capsule_of(content: npt.NDArray[np.uint8], dtype: str, shape: tuple[int, ...]) -> object:
    """`content` as a DLPack capsule ("dltensor") on the CPU, for one consumer. Nothing is copied.

    `dtype` is one of float16, float32, bfloat16. `content` has the elements of `shape` row by row, little-endian, and
    nothing else. It is kept alive until the consumer deletes the tensor, or until a capsule that was not consumed is
    deleted.
    """
    code, bits = DTYPES[dtype].dlpack or (0, 0)
    dims = (ctypes.c_int64 * len(shape))(*shape)
    tensor = _Tensor(content.ctypes.data, _Device(_CPU, 0), len(shape), _DataType(code, bits, 1), dims, None, 0)
    managed = _ManagedTensor(tensor, None, _delete)
    address = ctypes.addressof(managed)
    _alive[address] = (managed, dims, content)
    capsule: object = _new_capsule(address, _NAME, _destroy)
    return capsule


def data_in(capsule: object) -> int:
    """The address of the first element of the tensor in a capsule ("dltensor"). ValueError for any other object."""
    tensor: _Tensor = _ManagedTensor.from_address(_address_in(id(capsule), _NAME)).dl_tensor
    return int(tensor.data) + int(tensor.byte_offset)


def memory_of(capsule: object, dtype: str) -> tuple[npt.NDArray[np.uint8], tuple[int, ...]] | None:
    """The bytes of the tensor in a capsule ("dltensor"), without a copy, and its shape; None if its dtype is another.

    The array keeps the capsule alive. ValueError for another object, and for a tensor that is not dense on the CPU.
    """
    tensor: _Tensor = _ManagedTensor.from_address(_address_in(id(capsule), _NAME)).dl_tensor
    if (tensor.dtype.code, tensor.dtype.bits) != DTYPES[dtype].dlpack:
        return None
    shape = tuple(tensor.shape[: tensor.ndim])
    dense = [math.prod(shape[number + 1 :]) for number in range(len(shape))]
    strides = [*(ctypes.c_int64 * len(shape)).from_address(tensor.strides)] if tensor.strides else dense
    if tensor.device.device_type != _CPU or strides != dense:
        raise ValueError("expected a dense tensor on the CPU")
    buffer = (ctypes.c_uint8 * (math.prod(shape) * DTYPES[dtype].itemsize)).from_address(data_in(capsule))
    buffer.owner = capsule  # the array keeps the buffer alive
    return np.ctypeslib.as_array(buffer), shape


def memory_at(address: int, nbytes: int) -> npt.NDArray[np.uint8]:
    """The memory of another owner as (nbytes,) uint8, without a copy. The owner must keep it alive meanwhile."""
    return np.ctypeslib.as_array((ctypes.c_uint8 * nbytes).from_address(address))
