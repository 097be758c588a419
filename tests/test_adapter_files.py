# SPDX-FileCopyrightText: the tritonlora authors
# SPDX-License-Identifier: Apache-2.0
"""adapter_files.py: what is sent is what was registered."""

from __future__ import annotations

import hashlib
import os
import shutil
import threading
from dataclasses import replace
from pathlib import Path
from time import time

import numpy as np
import pytest
import torch

from table import entry
from tritonlora.adapter_files import BLOCK_NBYTES, AdapterFiles, check_files
from tritonlora.errors import AdapterUnavailable
from tritonlora.routing import Route

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
    (tmp_path / "shared").mkdir()
    return AdapterFiles(tmp_path, tmp_path / "shared")


def _write_tensors(root: Path, weights: bytes = WEIGHTS, config: bytes = CONFIG) -> None:
    directory = root / "tensorrt_llm" / "warmup"
    directory.mkdir(parents=True, exist_ok=True)
    (directory / "adapter_model_1.bin").write_bytes(weights)
    (directory / "adapter_config_1.bin").write_bytes(config)


def test_tensors_are_mapped_as_they_are_on_disk(files: AdapterFiles, tmp_path: Path) -> None:
    """bfloat16 from little-endian bytes, with a leading batch dim."""
    _write_tensors(tmp_path)
    weights, lora_config = files.map_tensors(REGISTERED)
    lora_weights = torch.utils.dlpack.from_dlpack(weights.capsule())
    del weights

    assert (torch.bfloat16, (1, 6, 56)) == (lora_weights.dtype, tuple(lora_weights.shape))
    assert torch.equal(torch.ones(1, 6, 56, dtype=torch.bfloat16), lora_weights)
    assert np.array_equal(np.full((1, 6, 3), 2, np.int32), lora_config)


def test_the_zeros_in_a_file_are_found(files: AdapterFiles, tmp_path: Path) -> None:
    """Blocks that are nothing else, however the file is stored; the last one is not whole."""
    nothing = b"\0" * BLOCK_NBYTES
    content = b"".join([nothing, b"\1" + nothing[1:], nothing[1:] + b"\1", nothing, b"\1" * 12008])
    registered = replace(
        REGISTERED.entry,
        lora_weights_shape=(6, len(content) // 12),
        lora_weights_sha256=hashlib.sha256(content).hexdigest(),
    )
    _write_tensors(tmp_path, content)

    weights, _ = files.map_tensors(Route("pirate", registered))

    assert [[BLOCK_NBYTES, 3 * BLOCK_NBYTES], [4 * BLOCK_NBYTES, len(content)]] == weights.filled.tolist()


def test_a_file_stays_mapped_until_it_is_let_go(files: AdapterFiles, tmp_path: Path) -> None:
    """Mapping it for every load would double what a load costs; of a file that was removed it would keep the space."""
    _write_tensors(tmp_path)
    first, second = (torch.utils.dlpack.from_dlpack(files.map_tensors(REGISTERED)[0].capsule()) for _ in range(2))

    assert first.data_ptr() == second.data_ptr()

    del first, second
    (tmp_path / REGISTERED.entry.lora_weights_file).unlink()

    assert "adapter_model_1.bin (deleted)" in Path("/proc/self/maps").read_text()

    files.unmap()

    assert "adapter_model_1.bin" not in Path("/proc/self/maps").read_text()


@pytest.mark.parametrize(("weights", "config"), [(671, 72), (673, 72), (672, 71)])
def test_a_file_of_the_wrong_size_makes_the_adapter_unavailable(
    files: AdapterFiles, tmp_path: Path, weights: int, config: int
) -> None:
    """Mapped, it would be other weights or a bus error. The message has no path of the server."""
    _write_tensors(tmp_path, (WEIGHTS * 2)[:weights], (CONFIG * 2)[:config])

    with pytest.raises(AdapterUnavailable, match="LoRA adapter 'pirate': .* bytes on the server, expected") as raised:
        files.map_tensors(REGISTERED)

    assert str(tmp_path) not in str(raised.value)


@pytest.mark.parametrize(("weights", "config"), [(WEIGHTS[::-1], CONFIG), (WEIGHTS, CONFIG[::-1])])
def test_an_altered_file_makes_the_adapter_unavailable(
    files: AdapterFiles, tmp_path: Path, weights: bytes, config: bytes
) -> None:
    """Of the same size, and also when it was right before: it would be an answer of other weights."""
    _write_tensors(tmp_path)
    files.map_tensors(REGISTERED)
    _write_tensors(tmp_path, weights, config)

    with pytest.raises(AdapterUnavailable, match="'pirate': adapter_.*_1.bin was altered on the server: its SHA-256"):
        files.map_tensors(REGISTERED)


@pytest.mark.parametrize("file", [REGISTERED.entry.lora_weights_file, REGISTERED.entry.lora_config_file])
def test_what_is_no_file_makes_the_adapter_unavailable(file: str, files: AdapterFiles, tmp_path: Path) -> None:
    """To open a FIFO would be to wait for ever."""
    _write_tensors(tmp_path)
    (tmp_path / file).unlink()
    os.mkfifo(tmp_path / file)

    with pytest.raises(AdapterUnavailable, match="'pirate': adapter_.*_1.bin cannot be read on the server: not a file"):
        files.map_tensors(REGISTERED)


def test_nobody_writes_to_weights_while_they_are_sent(files: AdapterFiles, tmp_path: Path) -> None:
    """Cut off while they are copied they would be a bus error, which ends the process."""
    _write_tensors(tmp_path)
    path = tmp_path / REGISTERED.entry.lora_weights_file
    lora_weights = torch.utils.dlpack.from_dlpack(files.map_tensors(REGISTERED)[0].capsule())
    writer = threading.Thread(target=path.write_bytes, args=(b"",))
    writer.start()
    writer.join(0.2)

    assert writer.is_alive()
    assert torch.equal(torch.ones(1, 6, 56, dtype=torch.bfloat16), lora_weights)

    del lora_weights
    writer.join(10)

    assert not writer.is_alive()


def test_weights_that_are_being_written_are_unavailable(files: AdapterFiles, tmp_path: Path) -> None:
    """And are sent when that has ended."""
    _write_tensors(tmp_path)
    with (
        (tmp_path / REGISTERED.entry.lora_weights_file).open("r+b"),
        pytest.raises(
            AdapterUnavailable, match=r"adapter_model_1.bin cannot be read .* it is being written; ask again"
        ),
    ):
        files.map_tensors(REGISTERED)

    files.map_tensors(REGISTERED)


def test_files_that_the_engine_reads_by_itself_have_their_own_size(tmp_path: Path) -> None:
    """They are the adapter as it came: only that they are there is known."""
    _write_tensors(tmp_path, b"safetensors", b"{}")
    route = Route("pirate", entry(lora_path="tensorrt_llm/warmup"))

    check_files(tmp_path, route)
    (tmp_path / route.entry.lora_config_file).unlink()
    with pytest.raises(AdapterUnavailable, match="adapter_config_1.bin is missing"):
        check_files(tmp_path, route)


@pytest.mark.parametrize("of", ["this process", "another"])
def test_a_file_is_digested_once(of: str, files: AdapterFiles, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """An adapter that is sent again costs no more than its bytes: what is looked at is whether the file is the same."""
    monkeypatch.setattr("tritonlora.versions.time.time", lambda: time() + 1)
    _write_tensors(tmp_path)
    files.map_tensors(REGISTERED)
    monkeypatch.delattr("tritonlora.adapter_files.hashlib.sha256")

    (files if of == "this process" else AdapterFiles(tmp_path, tmp_path / "shared")).map_tensors(REGISTERED)


def test_an_altered_file_with_the_times_of_the_one_before_is_seen(
    files: AdapterFiles, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As tools put one there that copy in place and keep the time of modification."""
    monkeypatch.setattr("tritonlora.versions.time.time", lambda: time() + 1)
    _write_tensors(tmp_path)
    files.map_tensors(REGISTERED)
    path = tmp_path / REGISTERED.entry.lora_weights_file
    before = path.stat()
    path.write_bytes(WEIGHTS[::-1])
    os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns))

    with pytest.raises(AdapterUnavailable, match="was altered on the server"):
        files.map_tensors(REGISTERED)


def test_the_digest_of_a_file_that_has_just_changed_is_not_kept(
    files: AdapterFiles, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It may change again within a tick of the clock, and look as it did."""
    monkeypatch.setattr("tritonlora.adapter_files.version_of", lambda _: ("a clock that stands still",))
    _write_tensors(tmp_path)
    files.map_tensors(REGISTERED)
    _write_tensors(tmp_path, WEIGHTS[::-1])

    with pytest.raises(AdapterUnavailable, match="was altered on the server"):
        files.map_tensors(REGISTERED)


def test_lost_digests_are_computed_again(files: AdapterFiles, tmp_path: Path) -> None:
    """What the processes share is in memory, where anything may happen to it."""
    _write_tensors(tmp_path)
    shutil.rmtree(tmp_path / "shared")
    files.map_tensors(REGISTERED)
    _write_tensors(tmp_path, WEIGHTS[::-1])

    with pytest.raises(AdapterUnavailable, match="was altered on the server"):
        files.map_tensors(REGISTERED)


def test_a_missing_file_makes_the_adapter_unavailable(files: AdapterFiles, tmp_path: Path) -> None:
    """Named, and again without the server's path."""
    with pytest.raises(AdapterUnavailable, match="adapter_model_1.bin is missing on the server") as raised:
        files.map_tensors(REGISTERED)

    assert str(tmp_path) not in str(raised.value)
