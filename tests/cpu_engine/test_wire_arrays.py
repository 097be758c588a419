# SPDX-FileCopyrightText: the tritonlora authors
# SPDX-License-Identifier: Apache-2.0
"""wire_arrays.py against torch, which has bfloat16."""

from __future__ import annotations

import gc
import weakref

import numpy as np
import pytest
import torch

from tritonlora.cpu_engine.wire_arrays import array_in, as_torch, dtype_name, is_on_cpu
from tritonlora.serving.dlpack import capsule_of


def test_a_bfloat16_tensor_is_read_without_torch_and_given_to_torch_unchanged() -> None:
    """Bit for bit, and row by row."""
    expected = torch.randn(1, 4, 6).bfloat16()
    array = array_in(expected.__dlpack__())

    assert array is not None
    assert ("bfloat16", "bfloat16", (1, 4, 6)) == (dtype_name(array), dtype_name(array[0, 1:]), array.shape)
    assert is_on_cpu(array)
    assert torch.equal(expected, as_torch(array))
    assert torch.equal(expected[0, 1:], as_torch(array[0, 1:]))


@pytest.mark.parametrize("dtype", ["float16", "float32", "int32"])
def test_other_tensors_have_their_numpy_names(dtype: str) -> None:
    """As have torch's own."""
    tensor = torch.ones(2, 3, dtype=getattr(torch, dtype))

    assert dtype == dtype_name(tensor) == dtype_name(tensor.numpy())
    assert array_in(tensor.__dlpack__()) is None
    assert torch.equal(tensor, as_torch(tensor.numpy()))
    assert tensor is as_torch(tensor)


def test_the_array_keeps_the_memory_of_the_tensor() -> None:
    """Also when nothing else does; and no longer than that."""
    content = np.arange(12, dtype=np.uint8)
    owner = weakref.ref(content)
    array = array_in(capsule_of(content, "bfloat16", (2, 3)))
    del content
    gc.collect()

    assert array is not None
    assert owner() is not None
    assert bytes(range(12)) == array.tobytes()
    part = array[1]
    del array
    gc.collect()
    assert bytes(range(6, 12)) == part.tobytes()
    del part
    gc.collect()
    assert owner() is None


def test_a_tensor_that_is_not_dense_is_refused() -> None:
    """Rather than read in the wrong order."""
    transposed = torch.ones(2, 3).bfloat16().T

    with pytest.raises(ValueError, match="dense"):
        array_in(transposed.__dlpack__())
