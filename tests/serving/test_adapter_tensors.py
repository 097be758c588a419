# SPDX-FileCopyrightText: the tritonlora authors
# SPDX-License-Identifier: Apache-2.0
"""adapter_files.py: what is sent is what was registered."""

from __future__ import annotations

import errno
import hashlib
import os
from pathlib import Path
from time import time
from typing import Any

import numpy as np
import pytest

from table import entry
from tritonlora.errors import AdapterUnavailable
from tritonlora.serving import adapter_tensors
from tritonlora.serving.adapter_tensors import AdapterFiles, check_files, whole
from tritonlora.serving.routing import Route

WEIGHTS = b"\x80\x3f" * (6 * 56)  # 0x3f80 is 1.0
CONFIG = b"\x02\x00\x00\x00" * 18
REGISTERED = Route(
    "pirate",
    entry(
        lora_weights_sha256=hashlib.sha256(WEIGHTS).hexdigest(), lora_config_sha256=hashlib.sha256(CONFIG).hexdigest()
    ),
)


@pytest.fixture
def files(tmp_path: Path) -> AdapterFiles:
    """Those of a repository in `tmp_path`."""
    return AdapterFiles(tmp_path)


def _write_tensors(root: Path, weights: bytes = WEIGHTS, config: bytes = CONFIG) -> None:
    directory = root / "tensorrt_llm" / "warmup"
    directory.mkdir(parents=True, exist_ok=True)
    (directory / "adapter_model_1.bin").write_bytes(weights)
    (directory / "adapter_config_1.bin").write_bytes(config)


def _read(files: AdapterFiles, route: Route = REGISTERED) -> tuple[bytes, list[list[int]]]:
    """lora_weights and the rows of lora_config, as they are sent."""
    weights = files.weights(route)
    memory = np.empty(weights.nbytes, np.uint8)
    weights.read(memory, whole(weights.nbytes))
    return memory.tobytes(), files.config(route)[0].tolist()


@pytest.mark.parametrize("threads", [1, 2])
def test_tensors_are_as_they_are_on_disk(
    threads: int, files: AdapterFiles, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of one file, in one thread or two."""
    monkeypatch.setattr(adapter_tensors, "PARALLEL_NBYTES", 0 if threads == 2 else 1 << 30)
    _write_tensors(tmp_path)
    weights = files.weights(REGISTERED)

    assert ("bfloat16", (1, 6, 56), len(WEIGHTS)) == (weights.dtype, weights.shape, weights.nbytes)
    assert (WEIGHTS, [[2, 2, 2]] * 6) == _read(files)
    assert np.int32 == files.config(REGISTERED).dtype


def test_what_memory_has_already_is_not_read(files: AdapterFiles, tmp_path: Path) -> None:
    """Only the ranges are; all of it must be what was registered."""
    _write_tensors(tmp_path)
    memory = np.frombuffer(bytearray(WEIGHTS), np.uint8)
    memory[10:20] = memory[30:40] = 0
    files.weights(REGISTERED).read(memory, np.array([[10, 20], [30, 40]]))

    assert WEIGHTS == memory.tobytes()

    memory[5] = 0
    with pytest.raises(AdapterUnavailable, match="'pirate': adapter_model_1.bin was altered on the server"):
        files.weights(REGISTERED).read(memory, np.array([[10, 20], [30, 40]]))


def test_no_file_stays_open(files: AdapterFiles, tmp_path: Path) -> None:
    """One that was removed would keep the space."""
    _write_tensors(tmp_path)
    _read(files)

    held = {os.path.realpath(link) for link in Path("/proc/self/fd").iterdir()}
    assert [] == [path for path in held if path.startswith(str(tmp_path))]
    assert str(tmp_path) not in Path("/proc/self/maps").read_text()


@pytest.mark.parametrize(("weights", "config"), [(671, 72), (673, 72), (672, 71)])
def test_a_file_of_the_wrong_size_makes_the_adapter_unavailable(
    files: AdapterFiles, tmp_path: Path, weights: int, config: int
) -> None:
    """Mapped, it would be other weights or a bus error. The message has no path of the server."""
    _write_tensors(tmp_path, (WEIGHTS * 2)[:weights], (CONFIG * 2)[:config])

    with pytest.raises(AdapterUnavailable, match="LoRA adapter 'pirate': .* bytes on the server, expected") as raised:
        _read(files)

    assert str(tmp_path) not in str(raised.value)


@pytest.mark.parametrize(("weights", "config"), [(WEIGHTS[::-1], CONFIG), (WEIGHTS, CONFIG[::-1])])
def test_an_altered_file_makes_the_adapter_unavailable(
    files: AdapterFiles, tmp_path: Path, weights: bytes, config: bytes
) -> None:
    """Of the same size, and also when it was right before: it would be an answer of other weights."""
    _write_tensors(tmp_path)
    _read(files)
    _write_tensors(tmp_path, weights, config)

    with pytest.raises(AdapterUnavailable, match="'pirate': adapter_.*_1.bin was altered on the server: its SHA-256"):
        _read(files)


@pytest.mark.parametrize("file", [REGISTERED.entry.lora_weights_file, REGISTERED.entry.lora_config_file])
def test_what_is_no_file_makes_the_adapter_unavailable(file: str, files: AdapterFiles, tmp_path: Path) -> None:
    """To open a FIFO would be to wait for ever."""
    _write_tensors(tmp_path)
    (tmp_path / file).unlink()
    os.mkfifo(tmp_path / file)

    with pytest.raises(AdapterUnavailable, match="'pirate': adapter_.*_1.bin cannot be read on the server: not a file"):
        _read(files)


@pytest.mark.parametrize("threads", [1, 2])
@pytest.mark.parametrize("written", [b"", WEIGHTS[:100], WEIGHTS[::-1]])
def test_weights_that_are_written_while_they_are_read_are_unavailable(
    written: bytes, threads: int, files: AdapterFiles, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What was read may be some of one content and some of another. They are sent when that has ended."""
    monkeypatch.setattr(adapter_tensors, "PARALLEL_NBYTES", 0 if threads == 2 else 1 << 30)
    monkeypatch.setattr("tritonlora.serving.file_version.time.time", lambda: time() + 1)
    _write_tensors(tmp_path)
    _read(files)
    path, preadv = tmp_path / REGISTERED.entry.lora_weights_file, os.preadv

    def write_meanwhile(*arguments: Any) -> int:
        if os.fstat(arguments[0]).st_size:
            count = preadv(*arguments)
            path.write_bytes(written)
            return min(count, 50)
        return preadv(*arguments)

    with monkeypatch.context() as patched:
        patched.setattr(os, "preadv", write_meanwhile)
        with pytest.raises(
            AdapterUnavailable, match=r"'pirate': adapter_model_1.bin cannot be read .* it is being written; ask again"
        ):
            _read(files)
    _write_tensors(tmp_path)

    assert WEIGHTS == _read(files)[0]


def test_weights_whose_times_are_set_while_they_are_read_are_sent(
    files: AdapterFiles, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """`add` does that to the files that it replaces, and to requests on the way nothing has changed."""
    monkeypatch.setattr("tritonlora.serving.file_version.time.time", lambda: time() + 1)
    _write_tensors(tmp_path)
    before, preadv = _read(files), os.preadv

    def touch_meanwhile(descriptor: int, *arguments: Any) -> int:
        count = preadv(descriptor, *arguments)
        os.utime(descriptor, (1, 1))
        return count

    monkeypatch.setattr(os, "preadv", touch_meanwhile)

    assert before == _read(files)


@pytest.mark.parametrize("half", [0, 1])
def test_weights_of_which_a_part_cannot_be_read_are_unavailable(
    half: int, files: AdapterFiles, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whichever thread it is that fails."""
    monkeypatch.setattr(adapter_tensors, "PARALLEL_NBYTES", 0)
    monkeypatch.setattr("tritonlora.serving.file_version.time.time", lambda: time() + 1)
    _write_tensors(tmp_path)
    _read(files)
    preadv = os.preadv

    def fail(descriptor: int, memory: Any, start: int) -> int:
        if (start >= len(WEIGHTS) // 2) == bool(half):
            raise OSError(errno.EIO, os.strerror(errno.EIO))
        return preadv(descriptor, memory, start)

    monkeypatch.setattr(os, "preadv", fail)
    with pytest.raises(AdapterUnavailable, match="'pirate': adapter_model_1.bin cannot be read .* Input/output error"):
        _read(files)


def test_an_altered_file_is_read_once(files: AdapterFiles, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each request for it would take as long as one that is answered."""
    monkeypatch.setattr("tritonlora.serving.file_version.time.time", lambda: time() + 1)
    _write_tensors(tmp_path, WEIGHTS[::-1])
    with pytest.raises(AdapterUnavailable, match="was altered on the server"):
        _read(files)
    monkeypatch.delattr(os, "preadv")
    with pytest.raises(AdapterUnavailable, match="was altered on the server"):
        _read(files)


def test_files_that_the_engine_reads_by_itself_have_their_own_size(tmp_path: Path) -> None:
    """They are the adapter as it came: only that they are there is known."""
    _write_tensors(tmp_path, b"safetensors", b"{}")
    route = Route("pirate", entry(lora_path="tensorrt_llm/warmup"))

    check_files(tmp_path, route)
    (tmp_path / route.entry.lora_config_file).unlink()
    with pytest.raises(AdapterUnavailable, match="adapter_config_1.bin is missing"):
        check_files(tmp_path, route)


def test_a_file_is_digested_once(files: AdapterFiles, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """An adapter that is sent again costs no more than its bytes: what is looked at is whether the file is the same."""
    monkeypatch.setattr("tritonlora.serving.file_version.time.time", lambda: time() + 1)
    _write_tensors(tmp_path)
    _read(files)
    entry = REGISTERED.entry
    files.forget_all_but({entry.lora_weights_file, entry.lora_config_file})
    monkeypatch.delattr("tritonlora.serving.adapter_tensors.hashlib.sha256")

    _read(files)
    files.forget_all_but({entry.lora_config_file})
    with pytest.raises(AttributeError):
        _read(files)


def test_an_altered_file_with_the_times_of_the_one_before_is_seen(
    files: AdapterFiles, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As tools put one there that copy in place and keep the time of modification."""
    monkeypatch.setattr("tritonlora.serving.file_version.time.time", lambda: time() + 1)
    _write_tensors(tmp_path)
    _read(files)
    path = tmp_path / REGISTERED.entry.lora_weights_file
    before = path.stat()
    path.write_bytes(WEIGHTS[::-1])
    os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns))

    with pytest.raises(AdapterUnavailable, match="was altered on the server"):
        _read(files)


def test_the_digest_of_a_file_that_has_just_changed_is_not_kept(
    files: AdapterFiles, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It may change again within a tick of the clock, and look as it did."""
    monkeypatch.setattr("tritonlora.serving.adapter_tensors.version_of", lambda _: ("a clock that stands still",))
    _write_tensors(tmp_path)
    _read(files)
    _write_tensors(tmp_path, WEIGHTS[::-1])

    with pytest.raises(AdapterUnavailable, match="was altered on the server"):
        _read(files)


def test_a_missing_file_makes_the_adapter_unavailable(files: AdapterFiles, tmp_path: Path) -> None:
    """Named, and again without the server's path."""
    with pytest.raises(AdapterUnavailable, match="adapter_model_1.bin is missing on the server") as raised:
        _read(files)

    assert str(tmp_path) not in str(raised.value)
