# SPDX-FileCopyrightText: the tritonlora authors
# SPDX-License-Identifier: Apache-2.0
"""Commands that are killed at each of their operations on files, and what later commands make of what is left."""

from __future__ import annotations

import errno
import math
import shutil
import signal
from collections.abc import Iterator
from pathlib import Path

import pytest

import faults
from repositories import let_time_pass, synthetic_adapter, synthetic_repository
from tritonlora import check, cli, generated, register, repository
from tritonlora.errors import InvalidAdapter
from tritonlora.repository import read_table, read_text
from upstream_configs import protobuf

ITEMSIZES = {"TYPE_INT32": 4, "TYPE_UINT64": 8, "TYPE_BF16": 2}


def unloadable(root: Path) -> list[str]:
    """Why Triton would not load a model: files of warmup samples that are missing, or not as long as their dims say."""
    problems = []
    for path in root.glob("*/config.pbtxt"):
        config = protobuf(read_text(path))
        types = {spec.name: spec.data_type for spec in config.input}
        for sample in config.model_warmup:
            for name, value in sample.inputs.items():
                file = path.parent / "warmup" / value.input_data_file
                kind = (
                    type(value).DESCRIPTOR.fields_by_name["data_type"].enum_type.values_by_number[value.data_type].name
                )
                assert types[name] == value.data_type
                expected = math.prod(value.dims) * ITEMSIZES[kind]
                if not file.is_file() or file.stat().st_size != expected:
                    problems.append(f"{path.parent.name}: {sample.name}: {file.name}")
    return problems


def everything(root: Path) -> dict[str, bytes | None]:
    """Every file and directory in a repository, but for the lock's."""
    return {
        path.relative_to(root).as_posix(): path.read_bytes() if path.is_file() else None
        for path in root.rglob("*")
        if path.name != ".lock" and "__pycache__" not in path.parts
    }


def stops(arguments: list[str], base: Path, root: Path) -> Iterator[int]:
    """Kill a command before its first, second, … operation, each time on a fresh copy of `base` at `root`.

    The last time it comes to its end.
    """
    for at in range(1000):
        shutil.rmtree(root, ignore_errors=True)
        shutil.copytree(base, root, symlinks=True)
        outcome = faults.run(arguments, root, at)
        assert outcome.exit_code == (-signal.SIGKILL if outcome.faulted else 0)
        yield at
        if not outcome.faulted:
            assert at > 5, "it was seen to do next to nothing"
            return
    pytest.fail("it never came to its end")


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A repository with two warm adapters that nobody asks for any more."""
    opened = synthetic_repository(tmp_path_factory.mktemp("stopped") / "repo", warm=["pirate", "haiku"])
    let_time_pass(opened)
    return opened.root


@pytest.fixture(scope="module")
def adapter(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Another adapter."""
    return synthetic_adapter(tmp_path_factory.mktemp("adapter"), 7)


@pytest.fixture(scope="module")
def refused(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An adapter whose last value is NaN, which is found out when all the others are written."""
    directory = synthetic_adapter(tmp_path_factory.mktemp("refused"), 8)
    file = directory / "adapter_model.safetensors"
    file.write_bytes(file.read_bytes()[:-2] + b"\xff\xff")
    return directory


COMMANDS = {
    "a new adapter": (["add", "new", "ADAPTER"], {"pirate", "haiku"}, {"pirate", "haiku", "new"}),
    "a replacement": (["add", "pirate", "ADAPTER"], {"pirate", "haiku"}, {"pirate", "haiku"}),
    "a removal": (["remove", "pirate"], {"haiku"}, {"haiku"}),
    "two removals": (["remove", "pirate", "haiku"], set(), set()),
}


@pytest.mark.parametrize("what", COMMANDS)
def test_killed_at_any_operation_the_repository_loads_and_whatever_comes_next_keeps_it_so(
    base: Path, adapter: Path, refused: Path, tmp_path: Path, what: str
) -> None:
    """No adapter is lost. Ten minutes later an `add` is refused, and deletes nothing that a warmup sample reads.

    `check` tells what is wrong, `check --fix` puts it right, and the same command again completes it.
    """
    command, kept, wanted = COMMANDS[what]
    root = tmp_path / "repo"
    arguments = [*(str(adapter) if one == "ADAPTER" else one for one in command), "--repo", str(root)]
    named_but_retired = 0
    for at in stops(arguments, base, root):
        opened = repository.open_repository(root)
        assert kept <= read_table(opened).entries.keys()
        assert [] == unloadable(root), at
        errors = [one for one in check.check(opened, deep=True) if one.severity == "error"]
        assert not [one for one in errors if "warms up" not in one.problem]
        in_config = {int(sample.name.split("_")[1]) for sample in protobuf(read_text(opened.config_path)).model_warmup}
        named_but_retired += not in_config.isdisjoint(read_table(opened).retired_lora_task_ids)
        let_time_pass(opened)

        with pytest.raises(InvalidAdapter, match="NaN"):
            register.add(opened, "refused", refused)
        assert [] == unloadable(root), at
        check.check(opened)
        assert [] == unloadable(root), at

        assert 0 == cli.main(["check", "--fix", "--repo", str(root)])
        assert [] == unloadable(root)
        left = [one for one in check.check(opened, deep=True) if "an `add` that was stopped left it" not in one.problem]
        assert [] == left

        if command[0] == "add" or "pirate" in read_table(opened).entries:
            assert 0 == cli.main(arguments)
        elif "haiku" in read_table(opened).entries and "haiku" not in wanted:
            assert 0 == cli.main(["remove", "haiku", "--repo", str(root)])
        assert wanted == read_table(opened).entries.keys()
        assert [] == check.check(opened, deep=True)
        assert [] == unloadable(root)
        let_time_pass(opened)
        register.repair(opened)
        ids = {entry.lora_task_id for entry in read_table(opened).entries.values()}
        assert {f"adapter_model_{task_id}.bin" for task_id in ids} == {
            path.name for path in opened.warmup_directory.glob("adapter_model_*")
        }, "the files of ids that nobody has any more are gone"
    if what == "a replacement":
        assert named_but_retired, "the state that this is all about never came about"


def _sample(name: str, file: str) -> str:
    return f'model_warmup {{ name: "{name}" inputs {{ key: "lora_weights" value {{ input_data_file: "{file}" }} }} }}\n'


@pytest.mark.parametrize(
    "file",
    [
        "adapter_model_1.bin",
        "./x/../adapter_model_1.bin",
        "../warmup/adapter_model_1.bin",
        "../../tensorrt_llm/warmup/adapter_model_1.bin",
        "mine",
    ],
)
@pytest.mark.parametrize("model", ["tensorrt_llm", "postprocessing"])
def test_what_a_sample_of_the_user_s_own_names_stays(base: Path, tmp_path: Path, file: str, model: str) -> None:
    """However the name is written, through a link, in any model; with all files of that id. Those of others go."""
    shutil.copytree(base, tmp_path / "repo")
    opened = repository.open_repository(tmp_path / "repo")
    named = opened.root / model / "warmup"
    named.mkdir(exist_ok=True)
    (named / "x").mkdir()
    (named / "mine").symlink_to(opened.warmup_directory / "adapter_model_1.bin")
    config = opened.root / model / "config.pbtxt"
    if model != "tensorrt_llm" and not file.startswith("../../") and file != "mine":
        file = f"x/../../../tensorrt_llm/warmup/{file.removeprefix('./x/../')}"
    config.write_text(read_text(config) + _sample("mine", file))
    register.remove(opened, "pirate", "haiku")
    let_time_pass(opened)
    register.repair(opened)

    assert (named / file).is_file()
    assert {"adapter_model_1.bin", "adapter_config_1.bin", "lora_id_1"} == {
        path.name for path in opened.warmup_directory.iterdir() if path.name.split(".")[0].endswith(("_1", "_2"))
    }
    assert [] == check.check(opened)


@pytest.mark.parametrize("name", ["tensorrt_llm", "postprocessing"])
def test_while_a_config_cannot_be_read_no_adapter_s_file_goes(base: Path, tmp_path: Path, name: str) -> None:
    """Nobody can say what it names. When it can be read again, they go."""
    shutil.copytree(base, tmp_path / "repo")
    opened = repository.open_repository(tmp_path / "repo")
    register.remove(opened, "pirate")
    let_time_pass(opened)
    config = opened.root / name / "config.pbtxt"
    text = read_text(config)
    config.write_text(text + 'model_warmup { name: "')
    generated.sweep(opened, read_table(opened))

    assert (opened.warmup_directory / "adapter_model_1.bin").exists()
    config.write_text(text)
    assert [] == generated.sweep(opened, read_table(opened))
    assert not (opened.warmup_directory / "adapter_model_1.bin").exists()


def test_a_file_that_cannot_be_deleted_stops_no_other_command(base: Path, adapter: Path, tmp_path: Path) -> None:
    """It is in nobody's way. `check` names it, and `check --fix` ends with 1 as long as it is there."""
    root = tmp_path / "repo"
    shutil.copytree(base, root)
    opened = repository.open_repository(root)
    register.remove(opened, "pirate")
    let_time_pass(opened)

    def deleting_fails(arguments: list[str], error: int) -> faults.Outcome:
        command = [*arguments, "--repo", str(root)]
        return faults.run(command, opened.warmup_directory, 0, error=error, operations=faults.DELETIONS)

    assert faults.Outcome(0, faulted=True) == deleting_fails(["add", "new", str(adapter)], errno.EACCES)
    assert {"haiku", "new"} == read_table(opened).entries.keys()
    [left] = [one for one in check.check(opened) if "removed or replaced" in one.problem]

    assert faults.Outcome(1, faulted=True) == deleting_fails(["check", "--fix"], errno.EBUSY)
    assert [left] == check.check(opened)
    assert 0 == cli.main(["check", "--fix", "--repo", str(root)])
    assert [] == check.check(opened)
