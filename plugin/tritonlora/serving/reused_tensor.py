# SPDX-FileCopyrightText: the tritonlora authors
# SPDX-License-Identifier: Apache-2.0
"""The weights that a process has sent last, in the memory that it shares with tritonserver.

Strategy. When a tensor is sent for the first time, Triton's Python backend allocates shared memory for it and copies it
there; a tensor that has been sent lies there already, and is sent again as it is (python_backend src/pb_tensor.cc,
PbTensor::SaveToSharedMemory). So the last tensor is kept, and the next adapter of its shape is read into it, but for
what is zero in both: padding, a third of an adapter of all layers. The same adapter is not read at all. This takes no
more memory: what the backend has allocated once, it never gives back (src/shm_manager.cc, GrowIfNeeded).

The memory that a tensor was made of stays its own as long as it lives (PbTensor::~PbTensor): when it has been sent, the
pages of that memory are given back.

Rules. What was given is written to only when it has been sent: what a request carries, when it has been answered to its
end. Whether a tensor lies in shared memory is looked at, not assumed: its address must have changed.
"""

from __future__ import annotations

import mmap
from collections.abc import Callable
from typing import Generic, Protocol, TypeVar

import numpy as np

from . import dlpack
from .adapter_tensors import Memory, Ranges, Weights, whole

BLOCK_NBYTES = 1 << 14  # of zeros, or not
MOST_KNOWN = 512  # adapters of which it is known where they are zero: 2 KB each


class Tensor(Protocol):
    """A tensor of Triton's Python backend."""

    def to_dlpack(self) -> object:
        """Its memory, as a DLPack capsule."""


T = TypeVar("T", bound=Tensor)


class KeptWeights(Generic[T]):
    """The tensor of the weights that were sent last."""

    def __init__(self, new: Callable[[object], T]) -> None:
        """`new` makes a tensor of a DLPack capsule."""
        self._new = new
        self._kept: T | None = None
        self._is_out = False  # given, and not sent yet
        self._source: mmap.mmap | None = None  # what it was made of; None once it lies in shared memory
        self._form: object = None  # dtype and shape
        self._sha256 = ""  # of what is in it; "" when that is not known
        self._filled = whole(0)  # it is zero everywhere else
        self._known: dict[str, Ranges] = {}  # SHA-256 -> where that content is not zero

    def tensor(self, weights: Weights) -> T:
        """A tensor of `weights`, to be sent once; then call `sent`. Raises what reading them raises."""
        form = (weights.dtype, weights.shape)
        if self._kept is None or self._is_out or self._form != form:
            self.forget()  # before the next one is allocated
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
        """What `tensor` gave, if it was asked, has been sent: it is kept if it lies in shared memory now."""
        if self._kept is not None and self._source is not None:
            if dlpack.data_in(self._kept.to_dlpack()) == np.frombuffer(self._source, np.uint8).ctypes.data:
                self.forget()
            else:
                self._source.madvise(mmap.MADV_DONTNEED)
                self._source = None
        self._is_out = False

    def forget(self) -> None:
        """Keep nothing: the memory is free for what is sent next."""
        self._kept = self._source = None

    def _read(self, weights: Weights, memory: Memory) -> None:
        """Read them over what `memory` has."""
        self._sha256 = ""  # until all of it is there
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
    """Where there is anything but zeros, in whole blocks."""
    is_filled = np.maximum.reduceat(memory, np.arange(0, len(memory), BLOCK_NBYTES)) > 0
    edges = np.flatnonzero(np.diff(is_filled, prepend=False, append=False)) * BLOCK_NBYTES
    return np.minimum(edges, len(memory)).reshape(-1, 2)
