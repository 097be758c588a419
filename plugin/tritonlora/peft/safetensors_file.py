# SPDX-FileCopyrightText: the tritonlora authors
# SPDX-License-Identifier: Apache-2.0
"""Open safetensors files. The header is read at once, a tensor's bytes when the tensor is used.

Rule: every byte of the data must belong to exactly one tensor. So no header can point outside the file, share bytes
between tensors, or hide bytes. Loaders of trusted files check less.
"""

from __future__ import annotations

import math
import os
import struct
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import NamedTuple

from tritonlora import strict_json
from tritonlora.errors import InvalidAdapter, one_message
from tritonlora.peft.stored_tensor import StoredFile, StoredTensor
from tritonlora.serving.dtypes import BY_SAFETENSORS, Dtype
from tritonlora.serving.file_version import open_file

MAX_HEADER_BYTES = 32 << 20
_FIELDS = frozenset({"dtype", "shape", "data_offsets"})


class TensorEntry(NamedTuple):
    """One tensor of a header. `start` and `stop` are in bytes from the end of the header."""

    dtype: Dtype
    shape: tuple[int, ...]
    start: int
    stop: int


def parse_header(header: bytes, data_nbytes: int) -> dict[str, TensorEntry]:
    """Name -> entry of each tensor in `header` (the JSON only), which describes `data_nbytes` bytes of data.

    Raises InvalidAdapter with every problem: duplicate names, unknown dtypes, impossible shapes, tensors that overlap,
    leave a gap or lie outside the data.
    """
    try:
        raw, repeated = strict_json.parse(header)
    except (ValueError, RecursionError) as error:
        raise InvalidAdapter(f"the header is not JSON: {error}") from error
    if not isinstance(raw, dict):
        raise InvalidAdapter("the header is not a JSON object")
    problems = [f"{name!r} occurs more than once" for name in dict.fromkeys(repeated)]
    entries: dict[str, TensorEntry] = {}
    for name, value in raw.items():
        if name != "__metadata__":
            entry = _parse_entry(value)
            if isinstance(entry, TensorEntry):
                entries[name] = entry
            else:
                problems.append(f"{name!r}: {entry}")
    problems += _misplaced(entries, data_nbytes) if not problems else []
    if problems:
        raise InvalidAdapter(one_message("the header is malformed", problems))
    return entries


def load_tensors(path: Path) -> dict[str, StoredTensor]:
    """The tensors of the file `path`, by name; none is read yet. Raises InvalidAdapter."""
    try:
        with open(open_file(path), "rb", buffering=0) as file:  # noqa: PTH123  a descriptor
            found = os.fstat(file.fileno())
            nbytes = found.st_size
            (header_nbytes,) = struct.unpack("<Q", file.read(8).ljust(8, b"\0")) if nbytes >= 8 else (0,)
            if not 2 <= header_nbytes <= min(nbytes - 8, MAX_HEADER_BYTES):
                raise InvalidAdapter(
                    f"{str(path)!r} is not a whole safetensors file: {nbytes} bytes with a header of {header_nbytes} "
                    f"(at most {MAX_HEADER_BYTES}); fetch it again"
                )
            header = file.read(header_nbytes)
    except OSError as error:
        raise InvalidAdapter(f"cannot read {str(path)!r}: {error.strerror}") from error
    data_start = 8 + header_nbytes
    try:
        entries = parse_header(header, nbytes - data_start)
    except InvalidAdapter as error:
        raise InvalidAdapter(f"{str(path)!r} is broken; fetch or save it again: {error}") from error
    stored = StoredFile(path, found)
    return {name: stored.tensor(entry.dtype, entry.shape, data_start + entry.start) for name, entry in entries.items()}


def _parse_entry(value: object) -> TensorEntry | str:
    if not isinstance(value, dict) or value.keys() != _FIELDS:
        return "expected exactly dtype, shape and data_offsets"
    shape, offsets = value["shape"], value["data_offsets"]
    dtype = BY_SAFETENSORS.get(value["dtype"]) if isinstance(value["dtype"], str) else None
    if dtype is None:
        return f"unknown dtype {value['dtype']!r}"
    if not _is_sizes(shape) or not _is_sizes(offsets) or len(offsets) != 2:
        return "shape and data_offsets must be lists of sizes"
    start, stop = offsets
    expected = math.prod(shape) * dtype.itemsize
    if stop - start != expected:
        return f"{dtype.name} {shape} takes {expected} bytes, but its offsets {offsets} span {stop - start}"
    return TensorEntry(dtype, tuple(shape), start, stop)


def _is_sizes(value: object) -> bool:
    # The bounds keep products and messages small; no file has 2**48 bytes.
    if type(value) is not list or len(value) > 8:
        return False
    return not [size for size in value if type(size) is not int or not 0 <= size < 1 << 48]


def _misplaced(entries: Mapping[str, TensorEntry], data_nbytes: int) -> Iterable[str]:
    end = 0
    for name, entry in sorted(entries.items(), key=lambda item: (item[1].start, item[1].stop)):
        if entry.stop > data_nbytes:
            yield f"{name!r} ends at byte {entry.stop} of {data_nbytes}: the file is cut short, or the header is wrong"
        elif entry.start < end:
            yield f"{name!r} starts at byte {entry.start}, inside the tensor before it, which ends at {end}"
        elif entry.start > end:
            yield f"{name!r} starts at byte {entry.start}, which leaves a gap after {end}"
        end = max(end, entry.stop)
    if end < data_nbytes:
        yield f"{data_nbytes - end} bytes at the end belong to no tensor"
