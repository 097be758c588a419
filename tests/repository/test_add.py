# SPDX-FileCopyrightText: the tritonlora authors
# SPDX-License-Identifier: Apache-2.0
"""add.py: adapters in and out of a repository, whole or not at all."""

from __future__ import annotations

import contextlib
import copy
import errno
import gc
import hashlib
import itertools
import json
import os
import re
import resource
import shutil
import struct
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import filelock
import numpy as np
import pytest
import torch

import faults
from adapters import lora_pair, write_adapter
from engine_configs import ENGINE
from repositories import let_time_pass, synthetic_adapter
from tritonlora import files
from tritonlora.check import checks
from tritonlora.check.findings import Finding
from tritonlora.conversion import tensors
from tritonlora.errors import AdapterTableError, EngineMismatch, InvalidAdapter, RepositoryError, TritonLoraError
from tritonlora.peft import adapter as peft
from tritonlora.repository import add, generated, init, paths, registry, upkeep
from tritonlora.repository.add import Options
from tritonlora.repository.paths import Repository, read_table, read_text
from upstream_configs import protobuf, upstream_repository


@pytest.fixture(scope="module")
def empty(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The shipped repository, without adapters."""
    root = tmp_path_factory.mktemp("register") / "repo"
    init.create_repository(root)
    return root


@pytest.fixture
def opened(empty: Path, tmp_path: Path) -> Repository:
    """A fresh copy of it."""
    shutil.copytree(empty, tmp_path / "repo")
    return paths.open_repository(tmp_path / "repo")


@pytest.fixture(scope="module")
def adapters(tmp_path_factory: pytest.TempPathFactory) -> Callable[[int], Path]:
    """`adapters(seed)`: a small adapter's directory."""
    directory = tmp_path_factory.mktemp("adapters")
    return lambda seed: synthetic_adapter(directory / str(seed), seed)


def snapshot(root: Path) -> dict[str, bytes]:
    """Every file's bytes, but for the lock's."""
    return {
        str(path.relative_to(root)): path.read_bytes()
        for path in sorted(root.rglob("*"))
        if path.is_file() and path.name != ".lock"
    }


def errors(opened: Repository) -> list[Finding]:
    """What check calls an error."""
    return [finding for finding in checks.check(opened, deep=True) if finding.severity == "error"]


# Adding


def test_add_says_which_settings_a_running_server_does_not_have_yet(
    opened: Repository, adapters: Callable[[int], Path]
) -> None:
    """The declared type, in the engine's model and in the resolver; once it is right, nothing."""
    init.init(opened.root, topology="resolve")
    for name in ("tensorrt_llm", "lora_resolver"):
        path = opened.root / name / "config.pbtxt"
        path.write_text(read_text(path).replace("TYPE_BF16", "TYPE_FP16"))
    expected = (
        "tensorrt_llm/config.pbtxt: input lora_weights: TYPE_FP16 [-1, -1] -> TYPE_BF16 [-1, -1]",
        "lora_resolver/config.pbtxt: output lora_weights: TYPE_FP16 [-1, -1] -> TYPE_BF16 [-1, -1]",
    )

    assert expected == add.add(opened, "pirate", adapters(0), dry_run=True).settings
    assert expected == add.add(opened, "pirate", adapters(0)).settings
    assert () == add.add(opened, "haiku", adapters(1)).settings


def test_add_warns_where_the_python_backend_cannot_read_the_adapter(
    tmp_path: Path, adapters: Callable[[int], Path]
) -> None:
    """Upstream's tensorrt_llm may be a Python model, which reads tensors through numpy; float16 it can read."""
    root = upstream_repository(tmp_path / "repo", "v0.18.0")
    config = root / "tensorrt_llm" / "config.pbtxt"
    config.write_text(read_text(config).replace('backend: "tensorrtllm"', 'backend: "python"'))
    init.init(root)
    opened = paths.open_repository(root)
    remarks = {
        dtype: add.add(opened, "pirate", adapters(0), Options(dtype=dtype), dry_run=True).remarks
        for dtype in ("bfloat16", "float16")
    }

    warnings = [one for one in remarks["bfloat16"] if one not in remarks["float16"]]
    assert ["backend 'python' reads lora_weights through numpy, which has no bfloat16"] == [
        one.partition(":")[0] for one in warnings
    ]


def test_an_added_adapter_is_on_disk_in_the_table_and_in_the_config(
    opened: Repository, adapters: Callable[[int], Path]
) -> None:
    """Files, table and warmup block say the same, read by independent means."""
    added = add.add(opened, "pirate", adapters(0))
    entry = json.loads(opened.table_path.read_text())["adapters"]["pirate"]
    sample = protobuf(read_text(opened.config_path)).model_warmup[0]
    weights = opened.root / entry["lora_weights_file"]
    n, width = entry["lora_weights_shape"]

    assert (1, "bfloat16", True, "base") == (
        entry["lora_task_id"],
        entry["dtype"],
        entry["warm"],
        entry["base_model_name_or_path"],
    )
    assert hashlib.sha256(weights.read_bytes()).hexdigest() == entry["lora_weights_sha256"]
    assert n * width * 2 == weights.stat().st_size
    assert [n, width] == list(sample.inputs["lora_weights"].dims)
    assert "adapter_model_1.bin" == sample.inputs["lora_weights"].input_data_file
    assert struct.pack("<Q", 1) == (opened.warmup_directory / "lora_id_1").read_bytes()
    rows = np.fromfile(opened.root / entry["lora_config_file"], "<i4").reshape(n, 3).tolist()
    assert [[1, 0, 8], [3, 0, 8], [1, 1, 8], [3, 1, 8]] == rows
    assert not added.unchanged
    assert [] == errors(opened)


def test_every_byte_outside_the_block_and_the_changed_values_stays(
    opened: Repository, adapters: Callable[[int], Path]
) -> None:
    """The user's comments and order are the user's."""
    text = "# mine\r\n" + read_text(opened.config_path).replace("\n", "\r\n").replace("TYPE_BF16", "TYPE_FP16")
    opened.config_path.write_bytes(text.encode())
    before, weights, after = text.partition('name: "lora_weights"')
    add.add(opened, "pirate", adapters(0))

    changed = before + weights + after.replace("TYPE_FP16", "TYPE_BF16", 1)
    now = read_text(opened.config_path)
    assert now.startswith(changed)
    assert now[len(changed) :].startswith("# tritonlora: model_warmup")
    assert "\n" not in now.replace("\r\n", "")


def test_the_same_content_again_changes_nothing(opened: Repository, adapters: Callable[[int], Path]) -> None:
    """Not even a time stamp."""
    add.add(opened, "pirate", adapters(0))
    before = snapshot(opened.root)

    assert add.add(opened, "pirate", adapters(0)).unchanged
    assert before == snapshot(opened.root)


@pytest.mark.parametrize("file", ["adapter_model_1.bin", "adapter_config_1.bin"])
@pytest.mark.parametrize("is_gone", [True, False])
def test_the_same_content_again_puts_back_a_file_that_was_lost(
    opened: Repository, adapters: Callable[[int], Path], file: str, is_gone: bool
) -> None:
    """Under its id: the remedy of `check`, and of a server that does not start. As of one that was cut."""
    add.add(opened, "pirate", adapters(0))
    before = snapshot(opened.root)
    path = opened.warmup_directory / file
    path.unlink() if is_gone else os.truncate(path, path.stat().st_size - 1)
    added = add.add(opened, "pirate", adapters(0))

    assert not added.unchanged
    assert (f"tensorrt_llm/warmup/{file} was missing or altered, and is there again",) == added.remarks
    assert before == snapshot(opened.root)


def test_other_content_under_an_old_name_gets_a_new_id(opened: Repository, adapters: Callable[[int], Path]) -> None:
    """The engine would silently keep the old weights; requests that are under way may still send the old files."""
    assert add.add(opened, "pirate", adapters(0)).was is None
    assert 1 == add.add(opened, "pirate", adapters(1), dry_run=True).was
    assert 1 == add.add(opened, "pirate", adapters(1)).was
    assert add.add(opened, "pirate", adapters(1)).was is None
    table = read_table(opened)

    assert (2, (1,)) == (table.entries["pirate"].lora_task_id, table.retired_lora_task_ids)
    assert (opened.warmup_directory / "adapter_model_1.bin").exists()
    assert [] == errors(opened)

    add.add(opened, "pirate", adapters(2))

    assert (opened.warmup_directory / "adapter_model_1.bin").exists()
    for path in opened.warmup_directory.glob("*_1.bin"):
        os.utime(path, (0, time.time() - generated.FILES_STAY_SECONDS - 1))
    add.add(opened, "haiku", adapters(3))

    assert [2, 3, 4] == sorted(
        int(path.stem.split("_")[-1]) for path in opened.warmup_directory.glob("adapter_model_*")
    )


def test_what_was_replaced_stays_when_another_adapter_is_removed(
    opened: Repository, adapters: Callable[[int], Path]
) -> None:
    """Requests under way may still send it, and that one; `check` says nothing of either, and --fix leaves them."""
    add.add(opened, "pirate", adapters(0))
    add.add(opened, "haiku", adapters(1))
    let_time_pass(opened)
    add.add(opened, "pirate", adapters(2))
    registry.remove(opened, "haiku")
    upkeep.repair(opened)

    assert 3 == len(list(opened.warmup_directory.glob("adapter_model_*")))
    assert [] == checks.check(opened)


def test_warm_can_be_switched_without_a_new_id(opened: Repository, adapters: Callable[[int], Path]) -> None:
    """The content is the same."""
    add.add(opened, "pirate", adapters(0))
    add.add(opened, "pirate", adapters(0), Options(warm=False))

    entry = read_table(opened).entries["pirate"]
    assert (1, False) == (entry.lora_task_id, entry.warm)
    assert 0 == len(protobuf(read_text(opened.config_path)).model_warmup)


def test_nobody_waits_while_an_adapter_is_read(
    opened: Repository, adapters: Callable[[int], Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whoever made it decides how long that takes."""
    load_adapter, read = peft.load_adapter, []

    def load(path: Path, base: Path | None) -> peft.Adapter:
        with filelock.FileLock(opened.table_path.parent / ".lock").acquire(timeout=0):
            read.append(path)
        return load_adapter(path, base)

    monkeypatch.setattr(add, "load_adapter", load)
    add.add(opened, "pirate", adapters(0))
    add.add_all(opened, {"haiku": adapters(1), "bard": adapters(2)})

    assert [adapters(seed) for seed in range(3)] == read
    assert {"pirate", "haiku", "bard"} == read_table(opened).entries.keys()


def test_an_adapter_that_changes_while_the_lock_is_waited_for_is_refused(
    opened: Repository, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What was read of it is not what would be converted."""
    adapter, locked = synthetic_adapter(tmp_path / "adapter"), files.locked

    @contextlib.contextmanager
    def change_meanwhile(directory: Path) -> Iterator[None]:
        with locked(directory):
            synthetic_adapter(tmp_path / "adapter", 1)
            yield

    monkeypatch.setattr(add, "locked", change_meanwhile)
    with pytest.raises(InvalidAdapter, match="was changed after it had been looked at; try again"):
        add.add(opened, "pirate", adapter)

    assert {} == read_table(opened).entries


def test_a_dry_run_needs_no_lock(opened: Repository, adapters: Callable[[int], Path]) -> None:
    """Whoever may only read can ask, and nobody waits for the answer."""
    with files.locked(opened.table_path.parent):
        add.add(opened, "pirate", adapters(0), dry_run=True)
    (opened.table_path.parent / ".lock").unlink()
    add.add(opened, "pirate", adapters(0), dry_run=True)

    assert not (opened.table_path.parent / ".lock").exists()


def test_a_dry_run_writes_nothing(opened: Repository, adapters: Callable[[int], Path]) -> None:
    """But says what it would do."""
    before = snapshot(opened.root)

    assert 1 == add.add(opened, "pirate", adapters(0), dry_run=True).entry.lora_task_id
    assert before == snapshot(opened.root)


def test_removing_gives_the_config_back_and_retires_the_id(opened: Repository, adapters: Callable[[int], Path]) -> None:
    """Byte for byte; and the next adapter does not get the id. When its files have stayed for long enough, they go."""
    before = read_text(opened.config_path)
    add.add(opened, "pirate", adapters(0))
    registry.remove(opened, "pirate")
    assert before == read_text(opened.config_path)
    let_time_pass(opened)
    upkeep.repair(opened)

    assert [] == list(opened.warmup_directory.glob("*_1*"))
    assert 2 == add.add(opened, "pirate", adapters(0)).entry.lora_task_id


def test_a_table_that_is_lost_is_not_an_empty_one(opened: Repository, adapters: Callable[[int], Path]) -> None:
    """Ids would be given again, to adapters that the running server knows as others, and files written over."""
    add.add(opened, "pirate", adapters(0))
    opened.table_path.unlink()
    before = snapshot(opened.root)
    with pytest.raises(AdapterTableError, match=r"adapters\.json is missing, and there are adapters .*from a backup"):
        add.add(opened, "haiku", adapters(1))
    with pytest.raises(AdapterTableError, match=re.escape(f"To begin anew, delete {opened.warmup_directory}, add")):
        init.init(opened.root)
    assert before == snapshot(opened.root)

    shutil.rmtree(opened.warmup_directory)
    init.init(opened.root)
    assert 1 == add.add(opened, "haiku", adapters(1)).entry.lora_task_id


def test_the_users_own_warmup_samples_keep_their_ids_and_files(
    opened: Repository, adapters: Callable[[int], Path]
) -> None:
    """An id that another sample loads would be answered by that adapter."""
    mine = 'model_warmup { name: "mine" inputs { key: "lora_task_id" value { input_data_file: "lora_id_1" } } }\n'
    opened.config_path.write_text(read_text(opened.config_path) + mine)
    opened.warmup_directory.mkdir()
    (opened.warmup_directory / "lora_id_1").write_bytes(struct.pack("<Q", 1))

    assert 2 == add.add(opened, "pirate", adapters(0)).entry.lora_task_id
    assert mine in read_text(opened.config_path)
    with pytest.raises(RepositoryError, match="lora_task_id 1 is loaded by a model_warmup sample of your own"):
        add.add(opened, "haiku", adapters(1), task_id=1)


def test_a_file_that_the_user_s_own_warmup_reads_is_not_written_over(
    opened: Repository, adapters: Callable[[int], Path]
) -> None:
    """Of the same name and with other content; the same content is shared."""
    sample = 'model_warmup { name: "mine" inputs { key: "input_ids" value { input_data_file: "input_ids" } } }\n'
    opened.config_path.write_text(read_text(opened.config_path) + sample)
    opened.warmup_directory.mkdir()
    mine = opened.warmup_directory / "input_ids"
    mine.write_bytes(struct.pack("<8i", *range(8)))
    before = read_text(opened.config_path)
    with pytest.raises(
        RepositoryError, match="own read warmup/input_ids, which tritonlora writes, too; rename your files"
    ):
        add.add(opened, "pirate", adapters(0))

    assert (before, 32) == (read_text(opened.config_path), mine.stat().st_size)
    assert {} == read_table(opened).entries
    mine.write_bytes(struct.pack("<4i", 1, 2, 3, 4))
    add.add(opened, "pirate", adapters(0))


# Refusing


@pytest.mark.parametrize(
    ("name", "seed", "options", "message"),
    [
        ("a/b", 0, {}, "'a/b' is not a legal adapter name"),
        ("haiku", 1, {"task_id": 1}, "lora_task_id 1 was given to adapter 'pirate'"),
        ("haiku", 1, {"options": Options(dtype="float16")}, "has dtype bfloat16, not float16"),
    ],
)
def test_a_refused_adapter_leaves_everything_as_it_was(
    opened: Repository,
    adapters: Callable[[int], Path],
    name: str,
    seed: int,
    options: dict[str, Any],
    message: str,
) -> None:
    """One clear error."""
    add.add(opened, "pirate", adapters(0))
    before = snapshot(opened.root)

    with pytest.raises(TritonLoraError, match=message):
        add.add(opened, name, adapters(seed), **options)

    assert before == snapshot(opened.root)


def test_a_broken_adapter_leaves_everything_as_it_was(opened: Repository, tmp_path: Path) -> None:
    """Found out in the middle of the conversion: its last tensor has a NaN."""
    adapter = synthetic_adapter(tmp_path / "broken")
    file = adapter / "adapter_model.safetensors"
    content = bytearray(file.read_bytes())
    content[-2:] = b"\xff\xff"
    file.write_bytes(content)
    before = snapshot(opened.root)

    with pytest.raises(InvalidAdapter, match="NaN"):
        add.add(opened, "broken", adapter)

    assert before == snapshot(opened.root)


def test_an_adapter_of_a_rank_that_the_engine_has_not_is_refused(opened: Repository, tmp_path: Path) -> None:
    """Before a byte is written."""
    with pytest.raises(EngineMismatch, match="rank 128"):
        add.add(opened, "big", synthetic_adapter(tmp_path / "big", r=128))

    assert not opened.warmup_directory.exists()


def test_a_base_model_takes_adapters_of_any_rank(opened: Repository, tmp_path: Path) -> None:
    """max_lora_rank is the engine's, and there is none."""
    shutil.copytree(opened.target_directory / "1", tmp_path / "base")
    upkeep.set_parameters(opened, {"gpt_model_path": "/nowhere"})
    adapter = synthetic_adapter(tmp_path / "big", r=128)
    added = add.add(opened, "big", adapter, Options(dtype="float32", base=tmp_path / "base"))

    assert ((128,), True) == (added.entry.adapter_sizes, added.entry.pages is not None)


def test_the_base_model_says_which_architecture_an_engine_is(tmp_path: Path) -> None:
    """Where the engine's own name for it is not known: a Nemotron's up_proj has no gate."""
    config = {"num_hidden_layers": 2, "hidden_size": 64, "num_attention_heads": 4, "intermediate_size": 96}
    engine = copy.deepcopy(ENGINE)
    engine["pretrained_config"] |= {**config, "architecture": "NewForCausalLM", "head_size": 16, "mapping": {}}
    engine["pretrained_config"]["num_key_value_heads"] = 4
    engine["build_config"]["lora_config"]["lora_target_modules"] = ["mlp_h_to_4h", "mlp_4h_to_h"]
    base = {**config, "architectures": ["NemotronForCausalLM"], "model_type": "nemotron", "num_key_value_heads": 4}
    for name, content in (("engine", engine), ("base", base)):
        (tmp_path / name).mkdir()
        (tmp_path / name / "config.json").write_text(json.dumps(content))
    init.init(upstream_repository(tmp_path / "repo", "v0.18.0"))
    opened = paths.open_repository(tmp_path / "repo")
    upkeep.set_parameters(opened, {"gpt_model_path": str(tmp_path / "engine")})
    pair = lora_pair("model.layers.0.mlp.up_proj", r=4, in_features=64, out_features=96)
    adapter = write_adapter(tmp_path / "adapter", pair, r=4, target_modules=["up_proj"])

    with pytest.raises(EngineMismatch, match=r"up_proj: .* \(--base\)"):
        add.add(opened, "nemo", adapter)
    added = add.add(opened, "nemo", adapter, Options(base=tmp_path / "base"))
    assert ("mlp_h_to_4h",) == added.entry.modules

    (tmp_path / "base" / "config.json").write_text(json.dumps(base | {"num_hidden_layers": 3, "head_dim": 8}))


@pytest.mark.parametrize(
    ("changed", "problem"),
    [
        ({"num_hidden_layers": 3}, "layers: 2 and 3"),
        ({"num_key_value_heads": 4}, "key-value heads: 2 and 4"),
        ({"head_dim": 8}, "head size: 16 and 8"),
        ({"hidden_size": 32, "head_dim": 16}, "hidden size: 64 and 32"),
        (
            {"architectures": ["NemotronForCausalLM"], "model_type": "nemotron"},
            "architecture: LlamaForCausalLM and NemotronFor",
        ),
    ],
)
def test_a_base_model_that_the_engine_was_not_built_from_is_refused(
    adapters: Callable[[int], Path], tmp_path: Path, changed: dict[str, Any], problem: str
) -> None:
    """By what of it no build of an engine changes; an architecture that nobody knows is not held against it."""
    hugging_face = {"architectures": ["LlamaForCausalLM"], "model_type": "llama", "hidden_size": 64}
    hugging_face |= {
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "intermediate_size": 96,
        "num_key_value_heads": 2,
    }
    engine = copy.deepcopy(ENGINE)
    engine["pretrained_config"] |= {**hugging_face, "architecture": "LlamaForCausalLM", "head_size": 16, "mapping": {}}
    for name, content in (("engine", engine), ("same", hugging_face), ("other", hugging_face | changed)):
        (tmp_path / name).mkdir()
        (tmp_path / name / "config.json").write_text(json.dumps(content))
    init.init(upstream_repository(tmp_path / "repo", "v0.18.0"))
    opened = paths.open_repository(tmp_path / "repo")
    upkeep.set_parameters(opened, {"gpt_model_path": str(tmp_path / "engine")})
    unknown = tmp_path / "unknown" / "config.json"
    unknown.parent.mkdir()
    unknown.write_text(json.dumps({"architectures": ["NewForCausalLM"]}))

    for base in ("same", "unknown"):
        assert add.add(opened, base, adapters(0), Options(base=tmp_path / base), dry_run=True)
    with pytest.raises(EngineMismatch, match=rf"--base .*/other is not the model that .* in --base: .*{problem}"):
        add.add(opened, "pirate", adapters(0), Options(base=tmp_path / "other"))


def test_an_adapter_of_another_base_model_is_remarked(opened: Repository, tmp_path: Path) -> None:
    """By the name that PEFT noted, of which the directory says nothing: an engine is of one model."""
    seeds = itertools.count()

    def remarks(name: str, base: str | None) -> tuple[str, ...]:
        adapter = synthetic_adapter(tmp_path / name, next(seeds))
        config = json.loads((adapter / "adapter_config.json").read_text())
        (adapter / "adapter_config.json").write_text(json.dumps({**config, "base_model_name_or_path": base}))
        return add.add(opened, name, adapter).remarks

    assert () == remarks("a", "Qwen/Qwen3-8B")
    assert () == remarks("a", "meta-llama/Llama-3.1-8B"), "it replaces that"
    assert () == remarks("bb", "/models/llama-3.1-8b/")
    for base in (None, ".", "/hub/models--meta-llama--Llama-3.1-8B/snapshots/0e9e39f249a16976918f6564b8830bc894c89659"):
        assert () == remarks("ccc", base)
    assert () == remarks("ccc", "/models/llama-3.1-8b")
    assert (
        "it was trained on 'Qwen/Qwen3-8B', and adapter 'ccc' on '/models/llama-3.1-8b': are both of the engine's "
        "model?",
    ) == remarks("dddd", "Qwen/Qwen3-8B")


def test_a_path_that_looks_like_a_name_on_the_hub_is_noted_as_a_path(
    opened: Repository, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Where it leads somewhere, from where `add` was called: clients are told names, and no paths."""
    (tmp_path / "models" / "llama").mkdir(parents=True)
    monkeypatch.chdir(tmp_path)
    adapter = synthetic_adapter(tmp_path / "adapter")
    config = json.loads((adapter / "adapter_config.json").read_text())
    noted = {
        "models/llama": str(tmp_path / "models" / "llama"),
        "models/llama/": str(tmp_path / "models" / "llama"),
        **{name: name for name in ("models/mistral", "models", ".", "./models", "/", "/models/llama", "")},
    }
    for name, expected in noted.items():
        (adapter / "adapter_config.json").write_text(json.dumps({**config, "base_model_name_or_path": name}))

        assert expected == add.add(opened, "pirate", adapter, dry_run=True).entry.base_model_name_or_path


def test_a_table_that_cannot_be_read_is_named(opened: Repository, adapters: Callable[[int], Path]) -> None:
    """With its path."""
    opened.table_path.write_text("{")

    with pytest.raises(AdapterTableError, match=f"^{re.escape(str(opened.table_path))}: adapters.json is not JSON"):
        add.add(opened, "pirate", adapters(0))


def test_without_an_engine_the_dtype_must_be_given(opened: Repository, adapters: Callable[[int], Path]) -> None:
    """A guess would be a silent wrong answer."""
    upkeep.set_parameters(opened, {"gpt_model_path": "/nowhere"})

    with pytest.raises(EngineMismatch, match="give --dtype, or --base"):
        add.add(opened, "pirate", adapters(0))

    added = add.add(opened, "pirate", adapters(0), Options(dtype="bfloat16"))
    assert "were not checked against it" in added.remarks[0]
    with pytest.raises(EngineMismatch, match="'pirate' is registered as bfloat16, and all adapters of an engine share"):
        add.add(opened, "haiku", adapters(1), Options(dtype="float32"))


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        ("input [ {", r"config\.pbtxt: line 1, column"),
        ("input [ { name: 'lora_weights' data_type: ${x} dims: [ -1, -1 ] } ]", r"config\.pbtxt: .*lora_"),
    ],
)
def test_a_config_that_cannot_be_edited_is_named(
    opened: Repository, adapters: Callable[[int], Path], damage: str, message: str
) -> None:
    """With file, line and column, and nothing written."""
    opened.config_path.write_text(damage)
    before = snapshot(opened.root)

    with pytest.raises(RepositoryError, match=message):
        add.add(opened, "pirate", adapters(0), Options(dtype="bfloat16"))

    assert before == snapshot(opened.root)


def test_a_repository_without_a_router_or_an_engine_is_named(tmp_path: Path, empty: Path) -> None:
    """With what to do."""
    with pytest.raises(RepositoryError, match="there is no model repository at"):
        paths.open_repository(tmp_path / "nowhere")
    with pytest.raises(RepositoryError, match="has no 'lora_router'; put it there with: tritonlora init"):
        paths.open_repository(tmp_path)
    shutil.copytree(empty / "lora_router", tmp_path / "lora_router")
    with pytest.raises(RepositoryError, match="has no model 'tensorrt_llm'"):
        paths.open_repository(tmp_path)


# Stopping half-way


def test_a_full_disk_leaves_everything_as_it_was(
    opened: Repository, adapters: Callable[[int], Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The file system says so in the middle of the weights."""

    def full(*_args: object, **_kwargs: object) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    before = snapshot(opened.root)
    monkeypatch.setattr(tensors, "convert_file", full)

    with pytest.raises(RepositoryError, match="No space left on device"):
        add.add(opened, "pirate", adapters(0))

    assert before == snapshot(opened.root)


def test_commands_at_the_same_time_take_turns(opened: Repository, adapters: Callable[[int], Path]) -> None:
    """Four processes add four adapters: all are there, each under an id of its own."""
    commands = [["add", f"n{number}", str(adapters(number)), "--repo", str(opened.root)] for number in range(4)]
    with ThreadPoolExecutor(4) as pool:
        exit_codes = [*pool.map(faults.complete, commands)]
    table = read_table(opened)

    assert [0] * 4 == exit_codes
    assert {"n0", "n1", "n2", "n3"} == table.entries.keys()
    assert [1, 2, 3, 4] == sorted(entry.lora_task_id for entry in table.entries.values())
    assert [] == checks.check(opened, deep=True)


def test_a_file_is_whole_or_not_there(tmp_path: Path) -> None:
    """What was there before stays when writing fails."""
    path = tmp_path / "file"
    files.write_text(path, "before")

    def stop_half_way() -> None:
        with files.temporary_name(path) as temporary:
            temporary.write_text("half")
            raise OSError("in the middle")

    with pytest.raises(OSError, match="in the middle"):
        stop_half_way()

    assert ("before", [path]) == (path.read_text(), list(tmp_path.iterdir()))


def test_weights_are_those_of_the_adapter(opened: Repository, adapters: Callable[[int], Path]) -> None:
    """A as it is stored and B times scaling, unpacked from the file by hand."""
    add.add(opened, "pirate", adapters(0))
    torch.manual_seed(0)
    lora_A, lora_B = torch.randn(8, 64).bfloat16(), torch.randn(64, 8).bfloat16()  # the order of synthetic_adapter
    row = torch.from_file(
        str(opened.warmup_directory / "adapter_model_1.bin"), size=4 * 1024, dtype=torch.bfloat16
    ).view(4, -1)[0]

    assert torch.equal(lora_A.reshape(-1), row[: 8 * 64])
    assert torch.equal((lora_B * 2).reshape(-1), row[8 * 64 : 8 * 64 + 64 * 8])


def test_a_directory_of_adapters_is_added_at_once(opened: Repository, tmp_path: Path) -> None:
    """Each under an id of its own; the bad ones are reported, and stop nobody."""
    directories = {f"n{number}": synthetic_adapter(tmp_path / f"n{number}", number) for number in range(5)}
    (directories["n2"] / "adapter_model.safetensors").write_bytes(b"short")
    directories["a b"] = directories["n0"]
    done: list[str] = []
    results = add.add_all(opened, directories, on_done=lambda one: done.append(one.name))
    refused = {one.name: one.error for one in results if isinstance(one, add.Refused)}
    table = read_table(opened)

    assert sorted(directories) == sorted(done)
    assert {"n2", "a b"} == refused.keys()
    assert "'a b' is not a legal adapter name" in refused["a b"]
    assert {"n0", "n1", "n3", "n4"} == table.entries.keys()
    assert 4 == len({entry.lora_task_id for entry in table.entries.values()})
    assert [] == checks.check(opened, deep=True)

    before = snapshot(opened.root)
    again = add.add_all(opened, {name: directories[name] for name in table.entries})
    assert all(isinstance(one, add.Added) and one.unchanged for one in again)
    assert before == snapshot(opened.root)


def test_more_adapters_are_added_than_files_can_be_open(opened: Repository, tmp_path: Path) -> None:
    """A directory of a thousand adapters is no more to the limit (`ulimit -n`) than one of two."""
    directories = {f"n{number}": synthetic_adapter(tmp_path / f"n{number}", number) for number in range(40)}
    limits = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (len(list(Path("/proc/self/fd").iterdir())) + 20, limits[1]))
    gc.disable()  # nothing waits for it
    try:
        results = add.add_all(opened, directories)
    finally:
        gc.enable()
        resource.setrlimit(resource.RLIMIT_NOFILE, limits)

    assert {add.Added} == {type(one) for one in results}
    assert directories.keys() == read_table(opened).entries.keys()


def test_an_interrupted_directory_keeps_what_was_finished(opened: Repository, tmp_path: Path) -> None:
    """Registered, warm and sound."""
    directories = {f"n{number}": synthetic_adapter(tmp_path / f"n{number}", number) for number in range(6)}

    def stop_at_once(_: object) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        add.add_all(opened, directories, on_done=stop_at_once)

    assert read_table(opened).entries
    assert [] == checks.check(opened, deep=True), "files that nobody has a name for"


def test_a_config_that_takes_no_adapter_is_refused_before_any_is_converted(opened: Repository, tmp_path: Path) -> None:
    """It is one for all of them."""
    add.add(opened, "pirate", synthetic_adapter(tmp_path / "pirate"))
    text = opened.config_path.read_text()
    opened.config_path.write_text(text + "\ninput { name: 'mine' data_type: TYPE_INT32 dims: [ 1 ] }\n")
    before = snapshot(opened.root)

    with pytest.raises(RepositoryError, match=r"config\.pbtxt: .*'mine'"):
        add.add_all(opened, {"haiku": synthetic_adapter(tmp_path / "haiku", 1)}, Options(warm=False))

    assert before == snapshot(opened.root)


def test_one_that_is_refused_before_it_is_converted_takes_nobody_s_id(
    opened: Repository, adapters: Callable[[int], Path]
) -> None:
    """Nor are its weights written, which would be another's under the same id."""
    add.add(opened, "pirate", adapters(9))
    registry.alias(opened, "aa", "pirate")
    results = add.add_all(opened, {"aa": adapters(0), "bb": adapters(1)})

    assert [("aa", True), ("bb", False)] == [(one.name, isinstance(one, add.Refused)) for one in results]
    assert {"pirate", "bb"} == read_table(opened).entries.keys()
    assert [] == errors(opened)


@pytest.mark.parametrize("model", ["lora_router", "lora_adapters"])
def test_shares_are_not_written_for_code_that_cannot_read_them(
    opened: Repository, adapters: Callable[[int], Path], model: str
) -> None:
    """The server would go on with the table before; `init` puts newer code there."""
    add.add_all(opened, {"pirate": adapters(0), "haiku": adapters(1)})
    (opened.root / model / "1" / "serving" / "__init__.py").write_text('__version__ = "0.1.0"\n')
    before, shares = snapshot(opened.root), {"pirate": 90, "haiku": 10}

    with pytest.raises(RepositoryError, match=f"{model} runs code .* cannot divide .* tritonlora init {opened.root}, "):
        registry.alias(opened, "prod", shares)
    assert before == snapshot(opened.root)
    registry.alias(opened, "prod", "pirate")
    init.init(opened.root)
    assert shares == registry.alias(opened, "prod", shares).name
    assert shares == read_table(opened).aliases["prod"]


def test_a_disk_that_is_full_half_way_is_no_lost_adapter(
    opened: Repository, adapters: Callable[[int], Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The message says what could not be written, not that nothing was; and the same command completes it."""

    def no_space(*_: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device", "warmup/input_ids")

    with monkeypatch.context() as full:
        full.setattr("tritonlora.repository.undo.write_bytes", no_space)
        with pytest.raises(RepositoryError) as caught:
            add.add(opened, "pirate", adapters(0))

    assert "cannot write to warmup/input_ids: No space left on device; put that right and run the command again" == str(
        caught.value
    )
    assert {} == read_table(opened).entries  # nor is it served
    add.add(opened, "pirate", adapters(0))
    assert [] == errors(opened)


def test_a_disk_that_is_full_for_real_is_one_message(opened: Repository, adapters: Callable[[int], Path]) -> None:
    """The kernel refuses the write in the middle of the weights (a limit on the size of files)."""
    before = snapshot(opened.root)
    code = """
import resource, sys
from tritonlora.cli.commands import main
resource.setrlimit(resource.RLIMIT_FSIZE, (4096, 4096))
sys.exit(main(["add", "pirate", sys.argv[1], "--repo", sys.argv[2]]))
"""
    command = [sys.executable, "-c", code, str(adapters(0)), str(opened.root)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)

    assert (1, "") == (done.returncode, done.stdout)
    assert "error: cannot write to" in done.stderr
    assert "File too large" in done.stderr
    assert before == snapshot(opened.root)
