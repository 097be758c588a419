# SPDX-FileCopyrightText: the tritonlora authors
# SPDX-License-Identifier: Apache-2.0
"""A real tritonserver on a repository that a killed command has left."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

import faults
from repositories import let_time_pass, synthetic_adapter, synthetic_repository
from tritonlora.errors import InvalidAdapter
from tritonlora.launch import client
from tritonlora.launch.server import Server
from tritonlora.repository import add, paths
from tritonlora.repository.paths import read_table, read_text
from upstream_configs import protobuf


def warmed_up(root: Path) -> set[int]:
    """The ids that config.pbtxt's samples load."""
    samples = protobuf(read_text(root / "tensorrt_llm" / "config.pbtxt")).model_warmup
    return {int(sample.name.split("_")[1]) for sample in samples}


def test_a_replacement_that_was_killed_and_a_command_that_was_refused_leave_what_triton_loads(
    launch: Callable[..., Server], tmp_path: Path
) -> None:
    """Killed between adapters.json and config.pbtxt: this warms up an id that has retired, ten minutes ago by now."""
    base, root = synthetic_repository(tmp_path / "base", warm=["pirate", "haiku"]).root, tmp_path / "repo"
    new, refused = synthetic_adapter(tmp_path / "new", 7), synthetic_adapter(tmp_path / "refused", 8)
    weights = refused / "adapter_model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-2] + b"\xff\xff")
    opened = paths.open_repository(base)
    for at in range(100):
        shutil.rmtree(root, ignore_errors=True)
        shutil.copytree(base, root)
        opened = paths.open_repository(root)
        outcome = faults.run(["add", "pirate", str(new), "--repo", str(root)], root, at)
        assert outcome.faulted, "it came to its end without this ever having been so"
        if warmed_up(root) & {*read_table(opened).retired_lora_task_ids}:
            break
    let_time_pass(opened)
    with pytest.raises(InvalidAdapter, match="NaN"):
        add.add(opened, "refused", refused)
    assert {1, 2} == warmed_up(root)
    assert {"pirate": 3, "haiku": 2} == {name: one.lora_task_id for name, one in read_table(opened).entries.items()}
    server = launch(root)

    for name, task_id in {"pirate": 3, "haiku": 2}.items():
        assert f"[{task_id}]hello" == "".join(
            client.generate("hello", lora_name=name, max_tokens=8, url=server.http_url)
        )
