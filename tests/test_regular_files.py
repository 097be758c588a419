# SPDX-FileCopyrightText: the tritonlora authors
# SPDX-License-Identifier: Apache-2.0
"""A FIFO, a device or a directory in the place of each file that a command reads: refused at once, by name.

Opening a FIFO waits for its other end, and /dev/zero has none.
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch

import faults
from adapters import LLAMA_CONFIG, lora_pair, write_adapter
from repositories import llm_api_repository, synthetic_adapter, synthetic_repository
from tritonlora.repository import init
from tritonlora.repository.paths import read_text
from tritonlora.serving.file_version import has_content, open_file, read_file
from upstream_configs import upstream_repository

Plant = Callable[[Path], None]


def _fifo(path: Path) -> None:
    os.mkfifo(path)


def _device(path: Path) -> None:
    path.symlink_to("/dev/zero")


def _directory(path: Path) -> None:
    path.mkdir()


KINDS = {"a FIFO": _fifo, "a device": _device, "a directory": _directory}


@pytest.fixture(params=KINDS, ids=str)
def plant(request: pytest.FixtureRequest) -> Plant:
    """`plant(path)` puts something else in the place of a file."""

    def replace(path: Path) -> None:
        path.unlink(missing_ok=True)
        path.parent.mkdir(exist_ok=True)
        KINDS[request.param](path)

    return replace


def refusal(arguments: list[str], tmp_path: Path) -> str:
    """What a command says that ends with 1, in one line."""
    log = tmp_path / "log"
    assert 1 == faults.complete(arguments, log=log), log.read_text()
    return " ".join(log.read_text().split())


def test_what_is_no_regular_file_is_not_opened(plant: Plant, tmp_path: Path) -> None:
    """The one function that opens files to read says so; one that is too long is not read."""
    plant(tmp_path / "path")
    with pytest.raises(OSError, match="not a file"):
        open_file(tmp_path / "path")
    assert not has_content(tmp_path / "path", b"")
    (tmp_path / "link").symlink_to("path")
    with pytest.raises(OSError, match="not a file"):
        open_file(tmp_path / "link")
    (tmp_path / "file").write_bytes(b"abc")
    (tmp_path / "there").symlink_to("file")

    assert b"abc" == read_file(tmp_path / "there", 3)
    with pytest.raises(OSError, match="it has 3 bytes, expected at most 2"):
        read_file(tmp_path / "there", 2)
    with pytest.raises(OSError, match="not a file"):
        read_file(tmp_path / "there", follow=False)


# Adapters, and base models


SHARDS = {"metadata": {}, "weight_map": {"a": "1.safetensors"}}


@pytest.mark.parametrize(
    "name",
    [
        "adapter_config.json",
        "adapter_model.safetensors",
        "adapter_model.bin",
        "adapter_model.safetensors.index.json",
        "adapter_model.bin.index.json",
        "1.safetensors",
    ],
)
def test_a_file_of_an_adapter(plant: Plant, tmp_path: Path, name: str) -> None:
    """Also where another one, of a format that is looked for later, is there."""
    adapter = synthetic_adapter(tmp_path / "adapter")
    weights = adapter / "adapter_model.safetensors"
    if name != "adapter_config.json":
        torch.save({"a": torch.zeros(1)}, adapter / "adapter_model.bin")
        weights.unlink()
    if name in ("adapter_model.bin.index.json", "1.safetensors"):
        (adapter / "adapter_model.bin").unlink()
    if name == "1.safetensors":
        (adapter / "adapter_model.safetensors.index.json").write_text(json.dumps(SHARDS))
    plant(adapter / name)
    message = refusal(["convert", str(adapter), str(tmp_path / "out")], tmp_path)

    assert f"{adapter / name}' is " in message
    assert "not a file" in message or "a link out of its directory" in message


@pytest.mark.parametrize(
    "name", ["config.json", "model.safetensors", "pytorch_model.bin", "model.safetensors.index.json"]
)
def test_a_file_of_a_base_model(plant: Plant, tmp_path: Path, name: str) -> None:
    """Which DoRA needs."""
    base = tmp_path / "base"
    base.mkdir()
    config = {**LLAMA_CONFIG, "architectures": ["LlamaForCausalLM"], "model_type": "llama", "dtype": "bfloat16"}
    (base / "config.json").write_text(json.dumps(config))
    pair = lora_pair("model.layers.0.self_attn.q_proj")
    pair["model.layers.0.self_attn.q_proj.lora_magnitude_vector"] = torch.ones(32)
    adapter = write_adapter(tmp_path / "adapter", pair, use_dora=True)
    plant(base / name)
    message = refusal(["convert", str(adapter), str(tmp_path / "out"), "--base", str(base)], tmp_path)

    assert str(base / name) in message
    assert "not a file" in message or "a link out of its directory" in message


# Repositories


@pytest.fixture(scope="module")
def shipped(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A repository with the CPU engine and an adapter, and with a warmup sample of the user's own."""
    opened = synthetic_repository(tmp_path_factory.mktemp("regular") / "repo", warm=["pirate"])
    (opened.warmup_directory / "mine").write_bytes(bytes(8))
    value = '{ data_type: TYPE_UINT64 dims: [ 1 ] input_data_file: "mine" }'
    width = '{ data_type: TYPE_INT32 dims: [ 1 ] input_data_file: "my_width" }'
    (opened.warmup_directory / "my_width").write_bytes(b"\1\0\0\0")
    sample = f'model_warmup {{ name: "mine" inputs {{ key: "lora_task_id" value {value} }} inputs {{ key: "beam_width" '
    opened.config_path.write_text(f"{sample} value {width} }} }}\n" + read_text(opened.config_path))
    return opened.root


READERS = {
    "lora_router/adapters.json": "list check plan add remove alias",
    "lora_router/config.pbtxt": "list check plan add remove alias init",
    "tensorrt_llm/config.pbtxt": "list check plan add remove init",
    "ensemble/config.pbtxt": "check init",
    "lora_adapters/config.pbtxt": "check init",
    "postprocessing/config.pbtxt": "check init",
    "lora_router/1/model.py": "init",
    "lora_router/1/serving/routing.py": "init",
    "tensorrt_llm/1/config.json": "check plan add",
    "tensorrt_llm/warmup/adapter_model_1.bin": "check check-deep",
    "tensorrt_llm/warmup/adapter_config_1.bin": "check check-deep plan",
    "tensorrt_llm/warmup/input_ids": "check check-fix add",
    "tensorrt_llm/warmup/lora_id_1": "check check-fix add",
    "tensorrt_llm/warmup/mine": "add",
    "tensorrt_llm/warmup/my_width": "check",
}


@pytest.mark.parametrize("name", READERS)
def test_a_file_of_a_repository(shipped: Path, plant: Plant, tmp_path: Path, name: str) -> None:
    """Each command that needs it refuses it, or `check` reports it; and every other one ends."""
    root = tmp_path / "repo"
    shutil.copytree(shipped, root)
    adapter = synthetic_adapter(tmp_path / "adapter", 5)
    plant(root / name)
    repo = ["--repo", str(root)]
    commands = {
        "list": ["list", *repo],
        "plan": ["plan", *repo],
        "check": ["check", *repo],
        "check-deep": ["check", "--deep", *repo],
        "add": ["add", "new", str(adapter), *repo],
        "alias": ["alias", "prod", "pirate", *repo],
        "init": ["init", str(root), "--dry-run"],
        "serve": ["serve", "--print-command", *repo],
        "check-fix": ["check", "--fix", *repo],
        "remove": ["remove", "pirate", *repo],
    }
    readers = READERS[name].split()
    for what, arguments in commands.items():
        if what in readers:
            message = refusal(arguments, tmp_path)
            assert Path(name).name in message or "has no 'lora_router'" in message or "has no model" in message
        else:
            assert faults.complete(arguments) in (0, 1)


@pytest.mark.parametrize("name", ["written.json", "ensemble/config.pbtxt"])
def test_a_file_that_undo_reads(plant: Plant, tmp_path: Path, name: str) -> None:
    """The record, and an original."""
    root = upstream_repository(tmp_path / "repo", "v0.18.0")
    init.init(root)
    path = root / "lora_router" / "1" / "originals" / name
    plant(path)

    assert str(path) in refusal(["init", "--undo", str(root)], tmp_path)


@pytest.mark.parametrize("name", ["ensemble/config.pbtxt", "lora_router/config.pbtxt", "lora_router/1/model.py"])
def test_a_file_that_undo_would_put_back(plant: Plant, tmp_path: Path, name: str) -> None:
    """Or take out."""
    root = upstream_repository(tmp_path / "repo", "v0.18.0")
    init.init(root)
    plant(root / name)

    assert Path(name).name in refusal(["init", "--undo", str(root)], tmp_path)
    assert (root / "lora_router" / "1" / "originals" / "written.json").is_file()


@pytest.mark.parametrize("name", ["model.yaml", "config.json"])
def test_a_file_of_the_llm_api_s_model(plant: Plant, tmp_path: Path, name: str) -> None:
    """model.yaml, and the config.json of the base model that it names."""
    base = tmp_path / "base"
    base.mkdir()
    root = llm_api_repository(tmp_path / "repo", base)
    init.init(root)
    plant(base / name if name == "config.json" else root / "tensorrt_llm" / "1" / name)

    for command in (["check"], ["add", "new", str(synthetic_adapter(tmp_path / "adapter"))]):
        message = refusal([*command, "--repo", str(root)], tmp_path)
        assert name in message
        assert "not a file" in message


def test_a_pipe_may_give_the_weights_of_plan(shipped: Path, tmp_path: Path) -> None:
    """There a FIFO is meant, as of `--weights <(curl …/metrics)`."""
    pipe, log = tmp_path / "pipe", tmp_path / "log"
    os.mkfifo(pipe)
    with ThreadPoolExecutor(1) as pool:
        writing = pool.submit(pipe.write_text, "pirate: 1\n")
        assert 0 == faults.complete(["plan", "--weights", str(pipe), "--repo", str(shipped)], log=log)
        writing.result(10)

    assert "keep warm: pirate" in log.read_text()


def test_files_of_a_repository_that_are_too_long_are_not_read(shipped: Path, tmp_path: Path) -> None:
    """A hole of a terabyte takes no room on the disk."""
    root = tmp_path / "repo"
    for name in ("lora_router/adapters.json", "tensorrt_llm/config.pbtxt", "tensorrt_llm/warmup/adapter_config_1.bin"):
        shutil.rmtree(root, ignore_errors=True)
        shutil.copytree(shipped, root)
        os.truncate(root / name, 1 << 40)
        assert "1099511627776 bytes" in refusal(["check", "--repo", str(root)], tmp_path)
