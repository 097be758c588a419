# SPDX-FileCopyrightText: the tritonlora authors
# SPDX-License-Identifier: Apache-2.0
"""Convert an adapter to lora_weights, in a file, and lora_config. `unpack` is the way back.

    row[0          : r*in      ] = A, row-major, (r, in)          as PEFT stores it
    row[r*in       : r*(in+out)] = scaling * B, row-major, (out, r)
    row[r*(in+out) : +out      ] = DoRA's normalised magnitude, only where the fourth column of lora_config is 1
    row[           : W         ] = 0

Source: `LoraCache::copyToPages` in TensorRT-LLM cpp/tensorrt_llm/runtime/loraCache.cpp reads rows of this form. Weights
are full, not split by tensor-parallel rank. A is only cast. B is scaled in float32 and rounded once.

Strategy: each row is filled, checked with one sum and written with one call, while it is in the processor's cache.
Padding is never written: it is a hole in the file.
"""

from __future__ import annotations

import contextlib
import functools
import os
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from queue import SimpleQueue
from threading import Thread
from typing import NamedTuple, TypeAlias

import torch

from tritonlora.conversion.base_weights import base_weights
from tritonlora.conversion.dora import normalised_magnitude
from tritonlora.conversion.rows import JoinedSource, Layout
from tritonlora.conversion.values import ValueNotes, all_finite
from tritonlora.errors import UnsupportedAdapter
from tritonlora.peft.adapter import Adapter
from tritonlora.peft.stored_tensor import StoredTensor, bytes_of
from tritonlora.serving.dtypes import DTYPES


def lora_config(layout: Layout) -> torch.Tensor:
    """lora_config of the layout: int32, of shape `layout.config_shape`."""
    columns = layout.config_shape[1]
    rows = [(row.module.id, row.layer, row.adapter_size, int(row.dora))[:columns] for row in layout.rows]
    return torch.tensor(rows, dtype=torch.int32).view(layout.config_shape)


def convert_file(
    adapter: Adapter,
    layout: Layout,
    path: Path,
    *,
    header: bytes = b"",
    base: Path | None = None,
    allow_nonfinite: bool = False,
) -> tuple[str, ...]:
    """Write `header` and then lora_weights, raw and little-endian, to the file `path`, which is created or emptied.

    Returns remarks on the values. The file is written in place: give a temporary name, and rename the file when this
    returns. `base` is the base model's checkpoint, for DoRA.

    Raises InvalidAdapter, which names each tensor with NaN or infinite values, unless `allow_nonfinite`. Raises
    UnsupportedAdapter, which names each tensor that is too large for `layout.dtype` or becomes zero in it. Raises
    OSError with the file's name, for example on a full disk.
    """
    filler = _Filler(adapter, layout, base)
    try:
        with path.open("wb", buffering=0) as file:
            _write_at(file.fileno(), memoryview(header), 0)
            os.ftruncate(file.fileno(), len(header) + layout.weights_nbytes)
            _write_rows(filler, layout, file.fileno(), len(header))
    except OSError as error:
        raise OSError(error.errno, error.strerror, str(path)) from error
    filler.notes.raise_unfit(adapter, allow_nonfinite=allow_nonfinite)
    return filler.notes.remarks(adapter)


def check_values(adapter: Adapter, layout: Layout, *, allow_nonfinite: bool = False) -> tuple[str, ...]:
    """Raise the errors that `convert_file` raises on values, and return its remarks, without writing a file."""
    filler = _Filler(adapter, layout, None)
    place = _Place(torch.empty(layout.width, dtype=getattr(torch, layout.dtype)))
    with _threads(layout):
        for index in range(len(layout.rows)):
            filler.fill(index, place)
    filler.notes.raise_unfit(adapter, allow_nonfinite=allow_nonfinite)
    return filler.notes.remarks(adapter)


@contextlib.contextmanager
def _threads(layout: Layout) -> Iterator[None]:
    """Limit torch to one thread, unless DoRA's norms are computed. More threads do not pay off for a single row."""
    threads = torch.get_num_threads()
    torch.set_num_threads(threads if layout.config_shape[1] == 4 else 1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)


class _Part(NamedTuple):
    """Some elements of a row, as a tensor and as the same memory in bytes."""

    values: torch.Tensor
    memory: memoryview


class _Place:
    """Memory that rows are filled into in turn. Slices are kept: making one takes as long as copying 20 KiB."""

    def __init__(self, row: torch.Tensor) -> None:
        self._row = _Part(row, bytes_of(row))
        self._parts: dict[tuple[int, int], _Part] = {}

    def part(self, start: int, stop: int) -> _Part:
        """Elements `start` to `stop` of the row."""
        found = self._parts.get((start, stop))
        if found is None:
            values, memory = self._row
            found = _Part(values[start:stop], memory[start * values.itemsize : stop * values.itemsize])
            self._parts[start, stop] = found
        return found


class _Filler:
    """Fills the rows of one adapter in turn, and notes what it sees of their values."""

    def __init__(self, adapter: Adapter, layout: Layout, base: Path | None) -> None:
        self._adapter = adapter
        self._layout = layout
        weights: Mapping[str, StoredTensor] = {}
        if base is not None and layout.config_shape[1] == 4:
            weights = base_weights(adapter, layout.conv1d, base)
        # The rows of a fused layer share its magnitudes, and computing these reads the whole weight of the base model.
        # maxsize=2: at most one row of another layer comes between the rows of gate and up. The function is no method:
        # a reference cycle would keep the files open.
        self._magnitude_of = functools.lru_cache(maxsize=2)(
            functools.partial(_normalised_magnitude, adapter, layout, weights)
        )
        self._scratch = bytearray()
        self.notes = ValueNotes(layout.dtype)

    def fill(self, index: int, place: _Place) -> memoryview:
        """Fill row number `index` into the start of `place`, and return the bytes of the row without its padding."""
        source = self._layout.sources[index]
        if isinstance(source, JoinedSource):
            return self._fill_joined(source, place)
        module = self._adapter.modules[source.path]
        lora_a, lora_b, ranges = module.lora_A, module.lora_B, source.ranges(module.lora_B.shape[0])
        outputs = sum(stop - start for start, stop in ranges)
        b_start = module.r * source.in_features or lora_a.numel
        end = b_end = b_start + outputs * module.r
        row_a, row_b = place.part(0, lora_a.numel), place.part(b_start, b_end)
        if b_start > lora_a.numel:
            place.part(lora_a.numel, b_start).values.zero_()
        uncast = self._read(lora_a, [(0, module.r)], row_a)
        if uncast is not row_a.values:
            row_a.values.copy_(uncast)
        _multiply(self._read(lora_b, ranges, row_b), module.scaling, row_b.values)
        self.notes.look_for_zero(module.path, row_a.values, row_b.values)
        if module.magnitude is not None:
            magnitude = self._magnitude_of(module.path)
            end += outputs
            row_magnitude, taken = place.part(b_end, end), torch.cat([magnitude[start:stop] for start, stop in ranges])
            row_magnitude.values.copy_(taken)
        if self._layout.dtype == "float16":  # values below 3e-8 become zero in float16
            self.notes.look_for_vanished("lora_A", module.path, row_a.values, lambda: _taken(lora_a, [(0, module.r)]))
            self.notes.look_for_vanished(
                "lora_B", module.path, row_b.values, lambda: _taken(lora_b, ranges).float() * module.scaling
            )
        row = place.part(0, end)
        if not all_finite(row.values):
            self.notes.look_for_nonfinite("lora_A", module.path, row_a.values, _taken(lora_a, [(0, module.r)]))
            self.notes.look_for_nonfinite("lora_B", module.path, row_b.values, _taken(lora_b, ranges))
            if module.magnitude is not None:
                self.notes.look_for_nonfinite(
                    "normalised lora_magnitude_vector", module.path, row_magnitude.values, taken
                )
        return row.memory

    def _fill_joined(self, source: JoinedSource, place: _Place) -> memoryview:
        """Fill a row joined from several modules into `place`: A one below the other, B block-diagonal."""
        modules = [(self._adapter.modules[path], outputs) for path, outputs in source.parts]
        rank = sum(module.r for module, _ in modules)
        start, column = 0, 0
        b_start = sum(module.lora_A.numel for module, _ in modules)
        row = place.part(0, b_start + source.out_features * rank)
        row_b = row.values[b_start:].view(source.out_features, rank).zero_()
        for module, outputs in modules:
            row_a = row.values[start : start + module.lora_A.numel]
            a, b = module.lora_A.load().view(-1), module.lora_B.load()
            row_a.copy_(a)
            scaled = torch.empty(b.shape, dtype=row_a.dtype)
            _multiply(b.clone(), module.scaling, scaled)
            self.notes.look_for_zero(module.path, a, b.view(-1))
            taken = 0
            for first, last in outputs:
                row_b[first:last, column : column + module.r] = scaled[taken : taken + last - first]
                taken += last - first
            for what, original, converted, factor in (("lora_A", a, row_a, 1.0), ("lora_B", b, scaled, module.scaling)):
                if self._layout.dtype == "float16":
                    scaled_original = functools.partial(torch.mul, original.float(), factor)
                    self.notes.look_for_vanished(what, module.path, converted, scaled_original)
                if not all_finite(converted):
                    self.notes.look_for_nonfinite(what, module.path, converted, original)
            start += module.lora_A.numel
            column += module.r
        return row.memory

    def _read(self, stored: StoredTensor, ranges: Sequence[tuple[int, int]], part: _Part) -> torch.Tensor:
        """Read the rows `ranges` of a matrix, flat: into `part`, if `part` has the matrix's dtype.

        Otherwise into memory that the next call overwrites: new memory would cost a page fault for every page.
        """
        values, memory = part
        if stored.dtype.name != self._layout.dtype:
            nbytes = len(values) * stored.dtype.itemsize
            if len(self._scratch) < nbytes:
                self._scratch = bytearray(nbytes)
            memory = memoryview(self._scratch)
            values = torch.frombuffer(memory, dtype=getattr(torch, stored.dtype.name), count=len(values))
        row_nbytes = stored.nbytes // stored.shape[0]
        for start, stop in ranges:
            nbytes = (stop - start) * row_nbytes
            stored.read_at(start * row_nbytes, memory[:nbytes])
            memory = memory[nbytes:]
        return values


def _taken(stored: StoredTensor, ranges: Sequence[tuple[int, int]]) -> torch.Tensor:
    """The rows `ranges` of a matrix, flat, in the stored dtype."""
    rows = stored.load()
    return torch.cat([rows[start:stop] for start, stop in ranges]).view(-1)


def _normalised_magnitude(
    adapter: Adapter, layout: Layout, weights: Mapping[str, StoredTensor], path: str
) -> torch.Tensor:
    if path not in weights:
        raise UnsupportedAdapter("DoRA needs the base model's weights; give them with --base CHECKPOINT")
    weight = weights[path].load()
    return normalised_magnitude(adapter.modules[path], weight.T if path in layout.conv1d else weight)


def _multiply(tensor: torch.Tensor, scaling: float, out: torch.Tensor) -> None:
    """Set `out` to `tensor` * `scaling`, rounded once. `tensor` may be `out`; its values may be overwritten."""
    # A tensor times a number is computed in float32 and rounded once, to the tensor's own dtype.
    if tensor.dtype is out.dtype:
        torch.mul(tensor, scaling, out=out)
    else:
        out.copy_(tensor.float().mul_(scaling))


# Handing a batch over takes as long as writing about a hundred KiB, so a batch is much larger. A much larger batch
# would leave the processor's cache before it is written. Of three batches, one is filled, one is written, one waits.
_BATCH_NBYTES = 2 << 20
_BATCHES = 3
_Batch: TypeAlias = "list[_Place]"


def _write_rows(filler: _Filler, layout: Layout, descriptor: int, start: int) -> None:
    """Fill the rows, a batch at a time, while another thread writes the batch before."""
    count, row_nbytes = len(layout.rows), layout.width * DTYPES[layout.dtype].itemsize
    size = max(1, min(count, _BATCH_NBYTES // row_nbytes))
    free: SimpleQueue[_Batch] = SimpleQueue()
    filled: SimpleQueue[tuple[_Batch, list[tuple[memoryview, int]]] | None] = SimpleQueue()
    errors: list[OSError] = []

    def write() -> None:
        while (job := filled.get()) is not None:
            batch, contents = job
            try:
                for content, offset in contents:
                    _write_at(descriptor, content, offset)
            except OSError as error:
                errors.append(error)
            free.put(batch)

    for _ in range(_BATCHES):
        batch_rows = torch.empty((size, layout.width), dtype=getattr(torch, layout.dtype))
        free.put([_Place(row) for row in batch_rows])
    writer = Thread(target=write)
    writer.start()
    try:
        with _threads(layout):
            for first in range(0, count, size):
                batch = free.get()
                if errors:
                    break
                contents = [
                    (filler.fill(index, place), start + index * row_nbytes)
                    for index, place in zip(range(first, count), batch, strict=False)
                ]
                filled.put((batch, contents))
    finally:
        filled.put(None)
        writer.join()
    if errors:
        raise errors[0]


def _write_at(descriptor: int, content: memoryview, offset: int) -> None:
    while content:
        written = os.pwrite(descriptor, content, offset)
        content, offset = content[written:], offset + written
