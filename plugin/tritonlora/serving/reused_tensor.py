# SPDX-FileCopyrightText: the tritonlora authors
# SPDX-License-Identifier: Apache-2.0
"""Reuses the shared memory of the weights that a process has sent last.

Strategy. When a tensor is sent for the first time, Triton's Python backend allocates shared memory for it and copies it
there. A tensor that was sent before lies in shared memory already, and is sent again without a copy (python_backend
src/pb_tensor.cc, PbTensor::SaveToSharedMemory). So this module keeps the last tensor, and reads the next adapter of the
same shape into it. Byte ranges that are zero in both adapters are skipped: such padding is a third of an adapter of all
layers. The same adapter is not read again. Keeping a tensor costs no memory: the backend never frees shared memory that
it has allocated (src/shm_manager.cc, GrowIfNeeded).

A tensor keeps the memory that it was made of for as long as it lives (PbTensor::~PbTensor). The pages of that memory
are freed once the tensor was sent.

Rules. Never write to a tensor before Triton is done with it: for a request, after its final response. Never assume that
a tensor lies in shared memory: check that its address has changed.
"""

from __future__ import annotations

import mmap
from collections.abc import Callable
from typing import Generic, Protocol, TypeVar

import numpy as np

from . import dlpack
from .adapter_tensors import Memory, Ranges, Weights, whole

BLOCK_NBYTES = 1 << 14  # the unit in which zero bytes are skipped
MOST_KNOWN = 512  # adapters whose ranges that are not zero are remembered, 2 KB each


class Tensor(Protocol):
    """A tensor of Triton's Python backend."""

    def to_dlpack(self) -> object:
        """The tensor's memory, as a DLPack capsule."""


T = TypeVar("T", bound=Tensor)


class KeptWeights(Generic[T]):
    """The tensor of the weights that were sent last."""

    def __init__(self, new: Callable[[object], T]) -> None:
        """`new` makes a tensor of a DLPack capsule."""
        self._new = new
        self._kept: T | None = None
        self._is_out = False  # `tensor` has returned it, and `sent` was not called yet
        self._source: mmap.mmap | None = None  # the memory it was made of; None once it lies in shared memory
        self._form: object = None  # dtype and shape
        self._sha256 = ""  # of its content; "" when the content is not known
        self._filled = whole(0)  # all bytes outside of these ranges are zero
        self._known: dict[str, Ranges] = {}  # SHA-256 -> the ranges of that content that are not zero

    def tensor(self, weights: Weights) -> T:
        """A tensor of `weights`, to be sent once; then call `sent`. Raises what `weights.read` raises."""
        form = (weights.dtype, weights.shape)
        if self._kept is None or self._is_out or self._form != form:
            self.forget()  # frees the old tensor before the next one is allocated
            self._source = mmap.mmap(-1, weights.nbytes, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
            memory = np.frombuffer(self._source, np.uint8)
            self._filled = whole(weights.nbytes)
            self._read(weights, memory)
            self._kept, self._form = self._new(dlpack.capsule_of(memory, *form)), form
        elif self._sha256 != weights.sha256:
            self._read(weights, dlpack.memory_at(dlpack.data_in(self._kept.to_dlpack()), weights.nbytes))
        self._is_out = True
        return self._kept

    def sent(self) -> None:
        """Note that the tensor was sent. It is kept if it lies in shared memory now. Without a tensor, do nothing."""
        if self._kept is not None and self._source is not None:
            if dlpack.data_in(self._kept.to_dlpack()) == np.frombuffer(self._source, np.uint8).ctypes.data:
                self.forget()
            else:
                self._source.madvise(mmap.MADV_DONTNEED)
                self._source = None
        self._is_out = False

    def forget(self) -> None:
        """Keep no tensor, so that its memory is free for the next one."""
        self._kept = self._source = None

    def _read(self, weights: Weights, memory: Memory) -> None:
        """Read the weights into `memory`, which is zero outside of `self._filled`."""
        self._sha256 = ""  # until all bytes are read
        known = self._known.get(weights.sha256)
        if known is None or not np.array_equal(known, self._filled):
            self._filled = whole(weights.nbytes)
        weights.read(memory, self._filled)
        if known is None:
            if len(self._known) == MOST_KNOWN:
                self._known.clear()
            known = self._known[weights.sha256] = filled_ranges(memory)
        self._sha256, self._filled = weights.sha256, known


def filled_ranges(memory: Memory) -> Ranges:
    """The ranges of `memory` that are not all zero, in whole blocks of BLOCK_NBYTES."""
    is_filled = np.maximum.reduceat(memory, np.arange(0, len(memory), BLOCK_NBYTES)) > 0
    edges = np.flatnonzero(np.diff(is_filled, prepend=False, append=False)) * BLOCK_NBYTES
    return np.minimum(edges, len(memory)).reshape(-1, 2)
