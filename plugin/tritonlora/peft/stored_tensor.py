# SPDX-FileCopyrightText: the tritonlora authors
# SPDX-License-Identifier: Apache-2.0
"""A tensor in a file: its dtype and shape, and a function that reads its bytes.

Bytes are read into the caller's memory, not mapped. Reading costs no page faults. A file that becomes shorter meanwhile
is an error; with a mapping it would end the process.
"""

from __future__ import annotations

import math
import os
import weakref
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

from tritonlora.errors import InvalidAdapter
from tritonlora.serving.dtypes import DTYPES, Dtype
from tritonlora.serving.file_version import open_file, version_of

if TYPE_CHECKING:
    import torch


class StoredTensor(NamedTuple):
    """A tensor whose bytes are read on request."""

    dtype: Dtype
    shape: tuple[int, ...]
    # read_at(start, memory) fills the memory with the tensor's bytes from `start` on, row-major. Raises InvalidAdapter.
    read_at: Callable[[int, memoryview], None]

    @property
    def numel(self) -> int:
        """The number of elements."""
        return math.prod(self.shape)

    @property
    def nbytes(self) -> int:
        """The size of all elements in bytes."""
        return self.numel * self.dtype.itemsize

    def load_bytes(self) -> bytes:
        """Read the bytes of all elements, row-major. Raises InvalidAdapter."""
        content = bytearray(self.nbytes)
        self.read_at(0, memoryview(content))
        return bytes(content)

    def load(self) -> torch.Tensor:
        """Read the tensor into new memory. Raises InvalidAdapter."""
        import torch

        tensor = torch.empty(self.shape, dtype=getattr(torch, self.dtype.name))
        self.read_at(0, bytes_of(tensor))
        return tensor


class StoredFile:
    """A file of tensors, opened when the first tensor is read and closed when no tensor refers to it any more.

    So only the adapters that are being converted have open files.
    """

    def __init__(self, path: Path, found: os.stat_result) -> None:
        """`found`: the file's status when its header was read. Reading a file that changed since is InvalidAdapter."""
        self._path = path
        self._version = version_of(found)
        self._descriptor: int | None = None

    def tensor(self, dtype: Dtype, shape: tuple[int, ...], start: int) -> StoredTensor:
        """The tensor whose bytes begin at byte `start` of the file."""
        return StoredTensor(dtype, shape, partial(self._read_at, start))

    def _read_at(self, base: int, start: int, memory: memoryview) -> None:
        start += base
        try:
            descriptor = self._open() if self._descriptor is None else self._descriptor
            while memory:
                count = os.preadv(descriptor, (memory,), start)
                if not count:
                    raise InvalidAdapter(f"{str(self._path)!r} became shorter while it was read; fetch it again")
                memory, start = memory[count:], start + count
        except OSError as error:
            raise InvalidAdapter(f"cannot read {str(self._path)!r}: {error.strerror}") from error

    def _open(self) -> int:
        descriptor = open_file(self._path)
        if version_of(os.fstat(descriptor)) != self._version:
            os.close(descriptor)
            raise InvalidAdapter(f"{str(self._path)!r} was changed after it had been looked at; try again")
        self._descriptor = descriptor
        weakref.finalize(self, os.close, descriptor)
        return descriptor


def in_memory(tensor: torch.Tensor) -> StoredTensor:
    """A StoredTensor that copies from `tensor`, which is in memory."""
    name = str(tensor.dtype).removeprefix("torch.")
    dtype = DTYPES.get(name) or Dtype(name, tensor.itemsize, "")
    return computed(dtype, tuple(tensor.shape), tensor.detach)


def computed(dtype: Dtype, shape: tuple[int, ...], make: Callable[[], torch.Tensor]) -> StoredTensor:
    """A StoredTensor whose bytes are those of the tensor that `make` returns, which is called for each read."""

    def copy(start: int, memory: memoryview) -> None:
        memory[:] = bytes_of(make().contiguous())[start : start + len(memory)]

    return StoredTensor(dtype, shape, copy)


def bytes_of(tensor: torch.Tensor) -> memoryview:
    """The memory of a contiguous tensor, as bytes."""
    import torch

    return tensor.view(-1).view(torch.uint8).numpy().data
