# SPDX-FileCopyrightText: the tritonlora authors
# SPDX-License-Identifier: Apache-2.0
"""The weights that a process has sent last, in the memory that it shares with tritonserver.

Strategy. When a tensor is sent for the first time, Triton's Python backend allocates shared memory for it and copies it
there, in one thread; a tensor that has been sent lies there already, and is sent again as it is (python_backend
src/pb_tensor.cc, PbTensor::SaveToSharedMemory). So the last tensor is kept, and the next adapter of its shape is copied
over it, here, in two threads, and without what is zero in both: padding. The same adapter is not copied at all. This
takes no more memory: what the backend has allocated once, it never gives back (src/shm_manager.cc, GrowIfNeeded).

Rules. One request at a time: what is kept is written to only when the request before has been answered to its end.
Whether a tensor lies in shared memory is looked at, not assumed: its address must have changed.

This file runs inside a plain Triton container: standard library and numpy only.
"""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Generic, Protocol, TypeVar

import numpy as np
import numpy.typing as npt

from tritonlora import dlpack
from tritonlora.adapter_files import Ranges, Weights

PARALLEL_NBYTES = 4 << 20  # less is copied before another thread has begun
NOWHERE: Ranges = np.zeros((0, 2), np.int64)


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
        self._source = 0  # the address of what it was made of; 0 once it lies in shared memory
        self._form: object = None  # dtype and shape
        self._sha256 = ""  # of what is in it; "" when that is not known
        self._filled = NOWHERE  # it is zero everywhere else

    def tensor(self, weights: Weights) -> T:
        """A tensor of `weights`, to be sent once, before `weights` goes; then call `sent`."""
        form = (weights.dtype, weights.shape)
        if self._kept is None or self._source or self._form != form:
            self.forget()  # before the next one is allocated
            self._kept, self._form = self._new(dlpack.capsule_of(weights.content, *form)), form
            self._source = weights.content.ctypes.data
        elif self._sha256 != weights.sha256:
            self._sha256 = ""  # until all of it is there
            if not np.array_equal(self._filled, weights.filled):
                self._filled = np.array([[0, len(weights.content)]])
            memory = dlpack.memory_at(dlpack.data_in(self._kept.to_dlpack()), len(weights.content))
            _copy(weights.content, memory, self._filled)
        self._sha256, self._filled = weights.sha256, weights.filled
        return self._kept

    def sent(self) -> None:
        """What `tensor` gave, if it was asked, has been sent: it is kept if it lies in shared memory now."""
        if self._kept is not None and self._source:
            if dlpack.data_in(self._kept.to_dlpack()) == self._source:
                self.forget()
            self._source = 0

    def forget(self) -> None:
        """Keep nothing: the memory is free for what is sent next, and so is the file that the tensor was made of."""
        self._kept = None


def _copy(source: npt.NDArray[np.uint8], target: npt.NDArray[np.uint8], ranges: Ranges) -> None:
    """In two threads where it is worth it: on many machines one does not take all of the memory's speed."""

    def copy(ranges: Ranges) -> None:
        for start, stop in ranges.tolist():
            np.copyto(target[start:stop], source[start:stop])

    starts, stops = ranges.T
    if (stops - starts).sum() < PARALLEL_NBYTES:
        copy(ranges)
        return
    middles = (starts + stops) // 2
    with ThreadPoolExecutor(1) as pool:
        other = pool.submit(copy, np.column_stack((middles, stops)))
        copy(np.column_stack((starts, middles)))
    other.result()  # or what went wrong with it
