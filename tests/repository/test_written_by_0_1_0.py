# SPDX-FileCopyrightText: the tritonlora authors
# SPDX-License-Identifier: Apache-2.0
"""A repository that tritonlora 0.1.0's `init` and `add` wrote, when its models' code was a list of files."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

import faults
from repositories import synthetic_adapter, written_by_0_1_0
from tritonlora.check import checks
from tritonlora.pbtxt.model_config import parse_config
from tritonlora.repository import add, init, paths, registry, undo
from tritonlora.repository.shipped import code_of


@pytest.fixture
def former(tmp_path: Path) -> Path:
    """Upstream's templates of v0.18.0 after 0.1.0's `init`, with the warm adapter pirate."""
    return written_by_0_1_0(tmp_path, "after")


def contents(root: Path) -> dict[str, bytes]:
    """Every file of a repository."""
    files = (path for path in root.rglob("*") if path.is_file() and path.name != ".lock")
    return {path.relative_to(root).as_posix(): path.read_bytes() for path in files}


def test_check_tells_that_its_code_is_older(former: Path) -> None:
    """With what to do about it."""
    found = checks.check(paths.open_repository(former))

    assert {"lora_router/1", "lora_adapters/1"} == {one.where for one in found if "of tritonlora 0.1.0" in one.problem}
    assert f"tritonlora init {former} puts 0.2.0 there; or install tritonlora 0.1.0" in {one.remedy for one in found}


def test_init_upgrades_it(former: Path) -> None:
    """Nothing of the former code is left, and what `init` writes into a fresh repository is there."""
    init.init(former)
    after = contents(former)
    models = ("lora_router", "lora_adapters")

    assert [] == [name for name in after if "/tritonlora/" in name and name.startswith(models)]
    assert all(after[name] == text.encode() for model in models for name, text in code_of(model).items())
    assert ["postprocessing/config.pbtxt"] == [one.where for one in checks.check(paths.open_repository(former))]
    ensemble = parse_config(after["ensemble/config.pbtxt"].decode())
    assert "lora_split_key" in [one.name for one in ensemble.inputs]
    assert [] == init.init(former)


def test_adapters_can_be_changed_before_and_after(former: Path, tmp_path: Path) -> None:
    """`add` and `remove` know its files."""
    opened = paths.open_repository(former)
    add.add(opened, "haiku", synthetic_adapter(tmp_path / "haiku", 1))
    init.init(former)
    registry.remove(opened, "pirate")

    assert ["haiku"] == [*paths.read_table(opened).entries]
    assert [] == [one for one in checks.check(opened) if one.severity == "error"]


@pytest.mark.parametrize("upgrade", [False, True], ids=["as it is", "upgraded"])
def test_undo_restores_what_was_there_before(former: Path, tmp_path: Path, upgrade: bool) -> None:
    """Byte for byte."""
    if upgrade:
        init.init(former)
    registry.remove(paths.open_repository(former), "pirate")
    undo.undo(former)

    assert contents(written_by_0_1_0(tmp_path, "before")) == contents(former)
    assert not os.path.lexists(former / "lora_router")


def test_an_upgrade_that_is_killed_at_any_operation_leaves_models_that_load(tmp_path: Path) -> None:
    """Each model has all of the code that its model.py imports, be it 0.1.0's or that of now; `init` completes it."""
    base, root = written_by_0_1_0(tmp_path, "after"), tmp_path / "repo"
    before, models = contents(base), ("lora_router", "lora_adapters")
    for at in faults.stops(["init", str(root)], base, root, step=13):
        after = contents(root)
        for model in models:
            now = code_of(model)
            former = {name: text for name, text in before.items() if name.startswith(f"{model}/1/tritonlora/")}
            is_new = after[f"{model}/1/model.py"] == now[f"{model}/1/model.py"].encode()
            needed = {name: text.encode() for name, text in now.items()} if is_new else former
            assert needed.items() <= after.items(), at
        init.init(root)
        assert [] == [name for name in contents(root) if "/tritonlora/" in name and name.startswith(models)]
