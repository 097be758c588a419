# SPDX-FileCopyrightText: the tritonlora authors
# SPDX-License-Identifier: Apache-2.0
"""dlpack.py against torch, as a consumer of DLPack that shares nothing with it."""

from __future__ import annotations

import weakref

import numpy as np
import pytest
import torch

from tritonlora.serving import dlpack


@pytest.mark.parametrize("dtype", ["float16", "float32", "bfloat16"])
def test_bytes_are_the_tensor_that_was_written(dtype: str) -> None:
    """Every bit of it, whatever it means as a number, and in the same place."""
    written = np.random.default_rng(0).integers(0, 256, 3 * 5 * 8, np.uint8)
    width = getattr(torch, dtype).itemsize
    found = torch.utils.dlpack.from_dlpack(dlpack.capsule_of(written, dtype, (1, 3, 40 // width)))

    assert (getattr(torch, dtype), (1, 3, 40 // width)) == (found.dtype, tuple(found.shape))
    assert np.array_equal(written, found.reshape(-1).view(torch.uint8).numpy())
    assert written.ctypes.data == found.data_ptr()


def test_bytes_live_as_long_as_their_tensor_or_a_capsule_that_nobody_takes() -> None:
    """And no longer."""
    contents = [np.zeros(16, np.uint8), np.zeros(16, np.uint8)]
    ends = [weakref.ref(content) for content in contents]
    unused, used = (dlpack.capsule_of(contents.pop(0), "bfloat16", (2, 4)) for _ in range(2))
    found = torch.utils.dlpack.from_dlpack(used)

    assert [False, False] == [end() is None for end in ends]

    del unused, used

    assert [True, False] == [end() is None for end in ends]

    del found

    assert ends[1]() is None
