# SPDX-FileCopyrightText: the tritonlora authors
# SPDX-License-Identifier: Apache-2.0
"""Adapter -> lora_weights and lora_config, in memory or in a file, and back.

    row[0          : r*in      ] = A, row-major, (r, in)          as PEFT stores it
    row[r*in       : r*(in+out)] = scaling * B, row-major, (out, r)
    row[r*(in+out) : +out      ] = DoRA's normalised magnitude, only where the fourth column of lora_config is 1
    row[           : W         ] = 0

Source: what the engine reads, `LoraCache::copyToPages` in TensorRT-LLM cpp/tensorrt_llm/runtime/loraCache.cpp. Weights
are full, not split by tensor-parallel rank. A is only cast; B is scaled in float32 and rounded once.

Strategy: one row at a time, straight from the mapped adapter to its place with one call. What is A in the right dtype
already is only looked at, never copied, and padding is never written: it is a hole in the file.
"""

from __future__ import annotations

import math
import os
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from tritonlora.errors import InvalidAdapter, UnsupportedAdapter, one_message
from tritonlora.layout import ITEMSIZES, Layout, Piece, Row, plan_layout
from tritonlora.modules import ModuleDims

if TYPE_CHECKING:
    import torch

    from tritonlora.peft import Adapter, AdapterModule

__all__ = [
    "Layout",
    "Row",
    "check_values",
    "convert_file",
    "lora_config",
    "npy_header",
    "pack",
    "plan_layout",
    "unpack",
    "unpack_magnitudes",
]

_NPY_DTYPES = {"float16": "<f2", "float32": "<f4", "int32": "<i4"}


def lora_config(layout: Layout) -> torch.Tensor:
    """lora_config, int32, shape `layout.config_shape`."""
    import torch

    columns = layout.config_shape[1]
    rows = [(row.module.id, row.layer, row.adapter_size, int(row.dora))[:columns] for row in layout.rows]
    return torch.tensor(rows, dtype=torch.int32).view(layout.config_shape)


def pack(
    adapter: Adapter, layout: Layout, out: torch.Tensor, *, base: Path | None = None, allow_nonfinite: bool = False
) -> None:
    """Fill `out` (shape `layout.weights_shape`, `layout.dtype`, contiguous, all zero), which may be a mapped file.

    `base` is the base model's checkpoint, for DoRA. Raises InvalidAdapter naming each tensor with NaN or infinite
    values (unless `allow_nonfinite`), and UnsupportedAdapter naming each that is too large for `layout.dtype`.
    """

    def put(index: int, blocks: Sequence[torch.Tensor]) -> None:
        start = 0
        for block in blocks:
            out[index, start : start + block.numel()].copy_(block.view(-1))
            start += block.numel()

    _convert(adapter, layout, base, allow_nonfinite, put)


def convert_file(
    adapter: Adapter,
    layout: Layout,
    path: Path,
    *,
    header: bytes = b"",
    base: Path | None = None,
    allow_nonfinite: bool = False,
) -> None:
    """Write `header` and then lora_weights, raw and little-endian, to the file `path`, which is created or emptied.

    The file is written in place: give a temporary name, and rename it when this returns. Raises as `pack` does, and
    OSError with the file's name (a full disk).
    """
    import torch

    itemsize = ITEMSIZES[layout.dtype]
    with path.open("wb", buffering=0) as file:

        def put(index: int, blocks: Sequence[torch.Tensor]) -> None:
            data = [block.view(torch.uint8).numpy().data.cast("B") for block in blocks]
            _write_at(file.fileno(), data, len(header) + index * layout.width * itemsize)

        try:
            _write_at(file.fileno(), [memoryview(header)], 0)
            os.ftruncate(file.fileno(), len(header) + layout.weights_nbytes)
            _convert(adapter, layout, base, allow_nonfinite, put)
        except OSError as error:
            raise OSError(error.errno, error.strerror, str(path)) from error


def check_values(adapter: Adapter, layout: Layout, *, allow_nonfinite: bool = False) -> None:
    """Refuse the values that `convert_file` refuses, without writing any."""
    _convert(adapter, layout, None, allow_nonfinite, lambda _index, _blocks: None)


def npy_header(shape: Sequence[int], dtype: str) -> bytes:
    """What stands before the raw bytes in a .npy file (version 1.0, C order) of `shape` and `dtype`.

    Raises UnsupportedAdapter for bfloat16, which .npy cannot say.
    """
    if dtype not in _NPY_DTYPES:
        raise UnsupportedAdapter(
            f".npy has no {dtype}: TensorRT-LLM's loadNpy (lora_prefetch_dir) reads neither that nor the raw type that "
            "numpy writes for it; convert to float16 for an engine of float16, or use the raw format"
        )
    sizes = ", ".join(str(size) for size in shape) + ("," if len(shape) == 1 else "")
    text = f"{{'descr': '{_NPY_DTYPES[dtype]}', 'fortran_order': False, 'shape': ({sizes}), }}"
    start = len(b"\x93NUMPY\x01\x00") + 2
    padded = text + " " * (-(start + len(text) + 1) % 64) + "\n"
    return b"\x93NUMPY\x01\x00" + len(padded).to_bytes(2, "little") + padded.encode("ascii")


def unpack(
    lora_weights: torch.Tensor, lora_config: torch.Tensor, modules: Mapping[int, ModuleDims]
) -> dict[tuple[int, str], tuple[torch.Tensor, torch.Tensor]]:
    """(layer, module name) -> (A (r, in), scaled B (out, r)), views of `lora_weights` (n, W)."""
    found = {}
    for row, (module_id, layer, rank) in zip(lora_weights, lora_config[:, :3].tolist(), strict=True):
        dims = modules[module_id]
        split, end = rank * dims.in_features, rank * (dims.in_features + dims.out_features)
        found[layer, dims.module.name] = (
            row[:split].view(rank, dims.in_features),
            row[split:end].view(dims.out_features, rank),
        )
    return found


def unpack_magnitudes(
    lora_weights: torch.Tensor, lora_config: torch.Tensor, modules: Mapping[int, ModuleDims]
) -> dict[tuple[int, str], torch.Tensor]:
    """(layer, module name) -> DoRA's normalised magnitude (out,), a view, for the rows that carry one."""
    found = {}
    if lora_config.shape[1] == 4:
        for row, (module_id, layer, rank, dora) in zip(lora_weights, lora_config.tolist(), strict=True):
            dims = modules[module_id]
            start = rank * (dims.in_features + dims.out_features)
            if dora:
                found[layer, dims.module.name] = row[start : start + dims.out_features]
    return found


def _convert(
    adapter: Adapter,
    layout: Layout,
    base: Path | None,
    allow_nonfinite: bool,
    put: Callable[[int, Sequence[torch.Tensor]], None],
) -> None:
    """`put(row, the blocks it starts with)` for each row in turn; blocks are contiguous, in layout.dtype.

    Raises the problems of all modules together, at the end.
    """
    import torch

    dtype: torch.dtype = getattr(torch, layout.dtype)
    weights: Mapping[str, torch.Tensor] = {}
    if base is not None and layout.config_shape[1] == 4:
        from tritonlora.dora import base_weights

        weights = base_weights(adapter, base)
    nonfinite: set[str] = set()
    too_large: set[str] = set()

    # One thread: writes to one file exclude each other, and a second thread would wait for them in vain. Waking torch's
    # own threads for each small block costs more than they save, unless DoRA's norms of the base weights are computed.
    threads = torch.get_num_threads()
    torch.set_num_threads(threads if weights else 1)
    try:
        for index, source in enumerate(layout.sources):
            module = adapter.modules[source.path]
            blocks = _blocks(module, source.pieces, dtype, weights)
            if not allow_nonfinite and not _all_finite(*blocks):
                originals = {
                    "lora_A": module.lora_A,
                    "lora_B": module.lora_B,
                    "lora_magnitude_vector": module.magnitude,
                }
                for (what, original), block in zip(originals.items(), blocks, strict=False):
                    if original is not None and not _all_finite(block):
                        (too_large if _all_finite(original) else nonfinite).add(f"{what} of {source.path!r}")
            put(index, blocks)
    finally:
        torch.set_num_threads(threads)
    if nonfinite:
        raise InvalidAdapter(one_message("NaN or infinite values (--allow-nonfinite converts them)", sorted(nonfinite)))
    if too_large:
        raise UnsupportedAdapter(
            one_message(f"values too large for {layout.dtype}; convert to bfloat16", sorted(too_large))
        )


def _blocks(
    module: AdapterModule, pieces: tuple[Piece, ...], dtype: torch.dtype, base_weights: Mapping[str, torch.Tensor]
) -> list[torch.Tensor]:
    """The values of one row: A, B, and DoRA's magnitude where there is one."""
    lora_b = _take(module.lora_B, pieces)
    # A tensor times a number is computed in float32 and rounded once, whatever the tensor's dtype.
    scaled = lora_b * module.scaling if lora_b.dtype is dtype else (lora_b.float() * module.scaling).to(dtype)
    blocks = [module.lora_A.to(dtype).contiguous(), scaled.contiguous()]
    if module.magnitude is not None:
        from tritonlora.dora import normalised_magnitude

        if module.path not in base_weights:
            raise UnsupportedAdapter("DoRA needs the base model's weights; give them with --base CHECKPOINT")
        magnitude = normalised_magnitude(module, base_weights[module.path])
        blocks.append(_take(magnitude, pieces).to(dtype).contiguous())
    return blocks


def _take(tensor: torch.Tensor, pieces: tuple[Piece, ...]) -> torch.Tensor:
    """The outputs that `pieces` name, of a tensor that has the outputs in its first dim."""
    import torch

    if not pieces:
        return tensor
    rest = tensor.shape[1:]
    chosen = [
        tensor.reshape(p.groups, -1, *rest)[p.first : p.last, p.start : p.stop].reshape(-1, *rest) for p in pieces
    ]
    return chosen[0] if len(chosen) == 1 else torch.cat(chosen)


def _all_finite(*tensors: torch.Tensor) -> bool:
    # NaN and infinities survive a sum, which is far cheaper than looking at each value; a sum may overflow by itself.
    return math.isfinite(sum(tensor.sum().item() for tensor in tensors)) or all(
        bool(tensor.isfinite().all()) for tensor in tensors
    )


def _write_at(descriptor: int, buffers: list[memoryview], offset: int) -> None:
    while buffers:
        written = os.pwritev(descriptor, buffers, offset)
        offset += written
        while buffers and written >= len(buffers[0]):
            written -= len(buffers.pop(0))
        if buffers:
            buffers[0] = buffers[0][written:]
