# SPDX-FileCopyrightText: the tritonlora authors
# SPDX-License-Identifier: Apache-2.0
"""The tensors of a request as numpy arrays, bfloat16 included, and as torch tensors.

The synthetic engine only looks at the tensors. torch takes seconds to import, and 200 MB of memory, so it is imported
only where a real model computes with them. numpy has no bfloat16: such an array holds the bits of its elements as
uint16, and its dtype has the name in its metadata.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from tritonlora.serving.dlpack import memory_of

if TYPE_CHECKING:
    import torch

WireArray = npt.NDArray[Any]
BFLOAT16 = np.dtype("<u2", metadata={"name": "bfloat16"})


def dtype_name(tensor: WireArray | torch.Tensor) -> str:
    """The name of the tensor's dtype, as in torch: "bfloat16", "int32"."""
    metadata = getattr(tensor.dtype, "metadata", None)
    return str(metadata["name"] if metadata else tensor.dtype).removeprefix("torch.")


def is_on_cpu(tensor: WireArray | torch.Tensor) -> bool:
    """Whether the tensor is in host memory."""
    device = getattr(tensor, "device", "cpu")  # numpy 1 has no such attribute
    return str(getattr(device, "type", device)) == "cpu"


def array_in(capsule: object) -> WireArray | None:
    """The bfloat16 tensor in a DLPack capsule, without a copy; None for a tensor of another dtype.

    The array keeps the capsule alive, and with it the memory.
    """
    found = memory_of(capsule, "bfloat16")
    if found is None:
        return None
    memory, shape = found
    return memory.view(BFLOAT16).reshape(shape)


def as_torch(tensor: WireArray | torch.Tensor) -> torch.Tensor:
    """The tensor for torch, without a copy."""
    import torch

    if isinstance(tensor, torch.Tensor):
        return tensor
    if dtype_name(tensor) == "bfloat16":
        return torch.from_numpy(tensor.view(np.int16)).view(torch.bfloat16)
    return torch.from_numpy(tensor)
