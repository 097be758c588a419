# SPDX-FileCopyrightText: the tritonlora authors
# SPDX-License-Identifier: Apache-2.0
"""dlpack.py against torch, as a consumer of DLPack that shares nothing with it."""

from __future__ import annotations

import gc
import weakref
from pathlib import Path

import numpy as np
import pytest
import torch

from tritonlora import dlpack


@pytest.mark.parametrize("dtype", ["float16", "float32", "bfloat16"])
def test_a_mapped_file_is_the_tensor_that_was_written(tmp_path: Path, dtype: str) -> None:
    """Every bit of it, whatever it means as a number."""
    written = torch.randint(0, 256, (3 * 5 * 8,), dtype=torch.uint8)
    (tmp_path / "weights.bin").write_bytes(written.numpy().tobytes())
    width = getattr(torch, dtype).itemsize
    capsule = dlpack.capsule_of(dlpack.mapped(tmp_path / "weights.bin"), dtype, (1, 3, 40 // width))
    found = torch.utils.dlpack.from_dlpack(capsule)

    assert (getattr(torch, dtype), (1, 3, 40 // width)) == (found.dtype, tuple(found.shape))
    assert torch.equal(written, found.reshape(-1).view(torch.uint8))


def test_a_capsule_that_nobody_takes_lets_go_of_what_it_is_made_of(tmp_path: Path) -> None:
    """As a tensor does that is let go of: a lease may be among it."""
    (tmp_path / "weights.bin").write_bytes(b"\x80\x3f" * 8)
    leases = [np.zeros(1), np.zeros(1)]
    ends = [weakref.ref(lease) for lease in leases]
    content = dlpack.mapped(tmp_path / "weights.bin")
    unused, used = (dlpack.capsule_of(content, "bfloat16", (2, 4), leases.pop(0)) for _ in range(2))
    found = torch.utils.dlpack.from_dlpack(used)
    del unused, used

    assert [True, False] == [end() is None for end in ends]

    del found

    assert ends[1]() is None


def test_a_mapping_lives_as_long_as_its_tensor(tmp_path: Path) -> None:
    """Even when the file is gone, and no longer."""
    (tmp_path / "weights.bin").write_bytes(b"\x80\x3f" * 8)
    found = torch.utils.dlpack.from_dlpack(
        dlpack.capsule_of(dlpack.mapped(tmp_path / "weights.bin"), "bfloat16", (2, 4))
    )
    (tmp_path / "weights.bin").unlink()
    gc.collect()

    assert torch.equal(torch.ones(2, 4, dtype=torch.bfloat16), found)

    del found

    assert "weights.bin" not in Path("/proc/self/maps").read_text()
