# SPDX-FileCopyrightText: the tritonlora authors
# SPDX-License-Identifier: Apache-2.0
"""The safetensors reader, against the safetensors library and against files that lie."""

from __future__ import annotations

import json
import os
import struct
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.torch import save_file

from tritonlora.errors import InvalidAdapter
from tritonlora.peft.safetensors_file import load_tensors, parse_header
from tritonlora.peft.stored_tensor import bytes_of

GOOD: dict[str, Any] = {
    "a": {"dtype": "F32", "shape": [2, 2], "data_offsets": [0, 16]},
    "b": {"dtype": "BF16", "shape": [3], "data_offsets": [16, 22]},
}


def entry(dtype: object = "F32", shape: object = (2, 2), offsets: object = (0, 16)) -> dict[str, object]:
    return {"dtype": dtype, "shape": shape, "data_offsets": offsets}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.int8, torch.bool])
def test_what_the_library_writes_is_read_back(dtype: torch.dtype, tmp_path: Path) -> None:
    """Tensors of the library's own files come back bit for bit, empty ones and single numbers too."""
    tensors = {"x": torch.ones(3, 5).to(dtype), "empty": torch.ones(0, 4).to(dtype), "y": torch.zeros(1).to(dtype)}
    tensors["number"] = torch.ones(()).to(dtype)
    save_file(tensors, tmp_path / "f.safetensors", metadata={"format": "pt"})
    loaded = load_tensors(tmp_path / "f.safetensors")

    assert tensors.keys() == loaded.keys()
    for name, tensor in tensors.items():
        assert str(tensor.dtype) == f"torch.{loaded[name].dtype.name}"
        assert torch.equal(tensor, loaded[name].load())


def test_header_that_is_not_aligned_is_read(tmp_path: Path) -> None:
    """Files of old writers start their data at any byte."""
    header = json.dumps({"a": entry(shape=[2], offsets=[0, 8])}).encode()
    header += b" " * (3 - (8 + len(header)) % 4)
    (tmp_path / "f").write_bytes(struct.pack("<Q", len(header)) + header + struct.pack("<2f", 1.5, -2))

    assert 3 == (8 + len(header)) % 4
    assert [1.5, -2] == load_tensors(tmp_path / "f")["a"].load().tolist()


def test_parts_of_a_tensor_are_read(tmp_path: Path) -> None:
    """From any byte of the tensor on, and no byte of its neighbours."""
    save_file({"a": torch.zeros(4), "b": torch.arange(4.0), "c": torch.zeros(4)}, tmp_path / "f")
    memory = bytearray(8)
    load_tensors(tmp_path / "f")["b"].read_at(4, memoryview(memory))

    assert (1.0, 2.0) == struct.unpack("<2f", memory)


def test_a_file_that_becomes_shorter_is_a_named_error(tmp_path: Path) -> None:
    """Where a mapped file would end the process."""
    path = tmp_path / "f"
    save_file({"a": torch.zeros(4096), "b": torch.zeros(4096)}, path)
    loaded = load_tensors(path)
    loaded["a"].load()
    os.truncate(path, path.stat().st_size - 4096)

    assert torch.equal(torch.zeros(4096), loaded["a"].load())
    with pytest.raises(InvalidAdapter, match=r"f' became shorter while it was read; fetch it again"):
        loaded["b"].load()


def test_a_file_that_is_replaced_is_not_read_as_what_it_was(tmp_path: Path) -> None:
    """Nothing of the new file is taken for the tensors of the old one."""
    save_file({"a": torch.zeros(4)}, tmp_path / "f")
    save_file({"a": torch.ones(4)}, tmp_path / "g")
    loaded = load_tensors(tmp_path / "f")
    (tmp_path / "g").replace(tmp_path / "f")

    with pytest.raises(InvalidAdapter, match=r"f' was changed after it had been looked at; try again"):
        loaded["a"].load()


def test_a_file_is_open_from_the_first_read_to_the_end_of_its_last_tensor(tmp_path: Path) -> None:
    """However many adapters there are, those that are not read take no descriptor."""
    path = tmp_path / "f"
    save_file({"a": torch.zeros(4), "b": torch.zeros(4)}, path)

    def is_open() -> bool:
        return any(link.resolve() == path for link in Path("/proc/self/fd").iterdir())

    kept = load_tensors(path).pop("b")
    assert not is_open()
    kept.load()
    assert is_open()
    del kept
    assert not is_open()


@pytest.mark.parametrize(
    ("header", "nbytes", "message"),
    [
        (b"{", 0, "not JSON"),
        (b"[]", 0, "not a JSON object"),
        (b"[" * 100_000, 0, "not JSON"),
        (b'{"a": ' * 100_000, 0, "not JSON"),
        (b'{"a": 1' + b"0" * 5000 + b"}", 0, "not JSON"),
        (b"\xff\xff", 0, "not JSON"),
        ({**GOOD, "c": 1}, 22, "'c': expected exactly dtype"),
        ({"a": {**entry(), "more": 1}}, 16, "'a': expected exactly dtype"),
        ({"a": entry(dtype="F31")}, 16, "unknown dtype 'F31'"),
        ({"a": entry(dtype=["F32"])}, 16, "unknown dtype"),
        ({"a": entry(shape=[2, -2])}, 16, "must be lists of sizes"),
        ({"a": entry(shape=[2, 2.0])}, 16, "must be lists of sizes"),
        ({"a": entry(shape=[True, 4])}, 16, "must be lists of sizes"),
        ({"a": entry(shape=[1 << 60, 4])}, 16, "must be lists of sizes"),
        ({"a": entry(shape={"x": 1})}, 16, "must be lists of sizes"),
        ({"a": entry(shape=[1 << 40, 1 << 40])}, 16, "takes 4835703278458516698824704 bytes"),
        ({"a": entry(offsets=[0, 8])}, 16, "takes 16 bytes, but its offsets"),
        ({"a": entry(offsets=[16, 0])}, 16, "takes 16 bytes, but its offsets"),
        ({"a": entry(offsets=[0, 16, 3])}, 16, "must be lists of sizes"),
        ({"a": entry(offsets=[4, 20])}, 20, "leaves a gap after 0"),
        ({"a": entry(), "b": entry(offsets=[8, 24])}, 24, "inside the tensor before it"),
        ({"a": entry()}, 15, "ends at byte 16 of 15"),
        ({"a": entry()}, 17, "1 bytes at the end belong to no tensor"),
        (b'{"a": %s, "a": %s}' % ((json.dumps(entry()).encode(),) * 2), 16, "'a' occurs more than once"),
        (
            b'{"a": {"dtype": "F32", "dtype": "F32", "shape": [4], "data_offsets": [0, 16]}}',
            16,
            "'dtype' occurs more than",
        ),
    ],
)
def test_header_that_lies_is_refused(header: bytes | dict[str, Any], nbytes: int, message: str) -> None:
    """Every byte belongs to exactly one tensor, or the error says which one is wrong."""
    text = header if isinstance(header, bytes) else json.dumps(header).encode()

    with pytest.raises(InvalidAdapter, match=message):
        parse_header(text, nbytes)


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"1234567",
        struct.pack("<Q", 2),
        struct.pack("<Q", 1 << 63) + b"{}",
        struct.pack("<Q", 100) + b"{}",
        b"\0" * 64,
    ],
)
def test_file_that_is_not_whole_is_refused(content: bytes, tmp_path: Path) -> None:
    """A header longer than the file, or none, names the file."""
    (tmp_path / "f").write_bytes(content)

    with pytest.raises(InvalidAdapter, match="is not a whole safetensors file"):
        load_tensors(tmp_path / "f")


def test_file_cut_short_is_refused(tmp_path: Path) -> None:
    """Every prefix of a good file is refused."""
    save_file({"a": torch.ones(4), "b": torch.ones(2)}, tmp_path / "good")
    whole = (tmp_path / "good").read_bytes()
    for length in range(len(whole)):
        (tmp_path / "cut").write_bytes(whole[:length])
        with pytest.raises(InvalidAdapter):
            load_tensors(tmp_path / "cut")


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=5), inner, max_size=4),
    max_leaves=10,
)
ENTRY = st.fixed_dictionaries(
    {
        "dtype": st.sampled_from(["F32", "BF16", "F16", "F64", "Q4"]) | JSON,
        "shape": st.lists(st.integers(-1, 6), max_size=3) | JSON,
        "data_offsets": st.lists(st.integers(-1, 64), min_size=2, max_size=2) | JSON,
    }
)


@settings(max_examples=300, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(header=st.dictionaries(st.text(max_size=8), ENTRY | JSON, max_size=4) | JSON, nbytes=st.integers(0, 64))
def test_no_header_does_anything_but_parse_or_be_refused(header: object, nbytes: int) -> None:
    """Whatever JSON stands there: tensors that fill the data exactly, or InvalidAdapter."""
    try:
        entries = parse_header(json.dumps(header).encode(), nbytes)
    except InvalidAdapter:
        return

    assert nbytes == sum(entry.stop - entry.start for entry in entries.values())


@settings(max_examples=300, deadline=None)
@given(position=st.integers(0, 200), value=st.integers(0, 255), drop=st.integers(0, 4))
def test_no_damaged_file_does_anything_but_load_or_be_refused(
    position: int, value: int, drop: int, tmp_path_factory: pytest.TempPathFactory
) -> None:
    """Any byte changed, any tail cut off: tensors of the file's own bytes, or InvalidAdapter."""
    path = tmp_path_factory.getbasetemp() / "damaged"
    header = json.dumps(GOOD).encode()
    content = bytearray(struct.pack("<Q", len(header)) + header + bytes(22))
    content[position % len(content)] = value
    path.write_bytes(content[: len(content) - drop])
    try:
        tensors = load_tensors(path)
    except InvalidAdapter:
        return

    assert 22 == sum(len(bytes_of(tensor.load())) for tensor in tensors.values())
