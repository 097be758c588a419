# SPDX-FileCopyrightText: the tritonlora authors
# SPDX-License-Identifier: Apache-2.0
"""`init --undo` that is killed at each of its operations on files, or refused by the file system, and the next one."""

from __future__ import annotations

import errno
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

import faults
from repositories import added, files
from tritonlora.cli import commands
from tritonlora.files import TEMPORARY_SUFFIX
from tritonlora.pbtxt.model_config import parse_config
from tritonlora.repository import init, registry, undo
from tritonlora.repository.paths import read_text
from upstream_configs import upstream_repository

FEW = 3  # modules


@pytest.fixture(scope="module")
def done(tmp_path_factory: pytest.TempPathFactory) -> dict[str, tuple[Path, dict[str, bytes | None]]]:
    """Topology -> a repository with all that tritonlora has ever done, and what was there before.

    Each model has a few modules of its code: to delete one more is the same operation in the same place.
    """
    made = {}
    for topology in ("forward", "resolve"):
        root = upstream_repository(tmp_path_factory.mktemp(topology) / "repo", "v0.18.0")
        before = files(root)
        init.init(root, topology=topology)
        registry.remove(added(root, "pirate"), "pirate")
        modules = [path for model in undo.OURS for path in sorted((root / model).glob("1/serving/*.py"))[FEW:]]
        undo.delete_recorded(root, modules)
        (root / "tensorrt_llm" / f".killed.0{TEMPORARY_SUFFIX}").mkdir()
        made[topology] = root, before
    return made


def faults_of_undo(base: Path, root: Path, **options: Any) -> Iterator[faults.Outcome]:
    """`init --undo` with its first, second, … operation failing, on fresh copies of `base`; until none fails."""
    for at in range(1000):
        shutil.rmtree(root, ignore_errors=True)
        shutil.copytree(base, root, symlinks=True)
        outcome = faults.run(["init", "--undo", str(root)], root, at, **options)
        yield outcome
        if not outcome.faulted:
            assert at > 10, "it was seen to do next to nothing"
            return
    pytest.fail("it never came to its end")


@pytest.mark.parametrize("topology", ["forward", "resolve"])
def test_an_undo_that_was_killed_is_finished_by_the_next_one(
    done: dict[str, tuple[Path, dict[str, bytes | None]]], tmp_path: Path, topology: str
) -> None:
    """At any of its operations; and the repository loads in between."""
    base, before = done[topology]
    root = tmp_path / "repo"
    for at in faults.stops(["init", "--undo", str(root)], base, root):
        configs = {path.parent.name: parse_config(read_text(path)) for path in root.glob("*/config.pbtxt")}
        steps = {step.model_name for config in configs.values() for step in config.steps}
        assert steps <= configs.keys()
        if at is not None:
            assert 0 == commands.main(["init", "--undo", str(root)])
        assert before == files(root)


@pytest.mark.parametrize(
    ("operations", "error"),
    [(faults.DELETIONS, errno.EBUSY), (faults.OPERATIONS, errno.EACCES)],
    ids=["deletions", "all"],
)
def test_an_undo_that_is_refused_by_the_file_system_says_so_and_is_finished_by_the_next_one(
    done: dict[str, tuple[Path, dict[str, bytes | None]]], tmp_path: Path, operations: frozenset[str], error: int
) -> None:
    """It never ends with 0 and something left."""
    base, before = done["resolve"]
    root = tmp_path / "repo"
    refused = 0
    for outcome in faults_of_undo(base, root, error=error, operations=operations):
        assert outcome.exit_code in (0, 1)
        if outcome.exit_code == 1:
            refused += 1
            assert 0 == commands.main(["init", "--undo", str(root)])
        assert before == files(root)
    assert refused
