# SPDX-FileCopyrightText: the tritonlora authors
# SPDX-License-Identifier: Apache-2.0
"""Commands that are killed at each of their operations on files, and what later commands make of what is left."""

from __future__ import annotations

import errno
import logging
import math
import os
import re
import shutil
import signal
import stat
import threading
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest

import faults
from repositories import let_time_pass, llm_api_repository, synthetic_adapter, synthetic_repository
from tritonlora import files
from tritonlora.check import checks
from tritonlora.check.findings import Finding
from tritonlora.cli import commands as cli
from tritonlora.errors import InvalidAdapter
from tritonlora.repository import add, generated, paths, registry, undo, upkeep
from tritonlora.repository.paths import read_table, read_text
from tritonlora.repository.state import read_state
from upstream_configs import protobuf, upstream_repository

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


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A repository with two warm adapters that nobody asks for any more."""
    root = tmp_path_factory.mktemp("stopped") / "repo"
    opened = synthetic_repository(root, warm=["pirate", "haiku"], topology="resolve")
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
    for at in faults.stops(arguments, base, root):
        opened = paths.open_repository(root)
        assert kept <= read_table(opened).entries.keys()
        assert [] == unloadable(root), at
        errors = [one for one in checks.check(opened, deep=True) if one.severity == "error"]
        assert not [one for one in errors if "warms up" not in one.problem]
        in_config = {int(sample.name.split("_")[1]) for sample in protobuf(read_text(opened.config_path)).model_warmup}
        named_but_retired += not in_config.isdisjoint(read_table(opened).retired_lora_task_ids)
        let_time_pass(opened)

        with pytest.raises(InvalidAdapter, match="NaN"):
            add.add(opened, "refused", refused)
        assert [] == unloadable(root), at
        checks.check(opened)
        assert [] == unloadable(root), at

        assert 0 == cli.main(["check", "--fix", "--repo", str(root)])
        assert [] == unloadable(root)
        left = [
            one for one in checks.check(opened, deep=True) if "an `add` that was stopped left it" not in one.problem
        ]
        assert [] == left

        if command[0] == "add" or "pirate" in read_table(opened).entries:
            assert 0 == cli.main(arguments)
        elif "haiku" in read_table(opened).entries and "haiku" not in wanted:
            assert 0 == cli.main(["remove", "haiku", "--repo", str(root)])
        assert wanted == read_table(opened).entries.keys()
        assert [] == checks.check(opened, deep=True)
        assert [] == unloadable(root)
        let_time_pass(opened)
        upkeep.repair(opened)
        ids = {entry.lora_task_id for entry in read_table(opened).entries.values()}
        assert {f"adapter_model_{task_id}.bin" for task_id in ids} == {
            path.name for path in opened.warmup_directory.glob("adapter_model_*")
        }, "the files of ids that nobody has any more are gone"
    if what == "a replacement":
        assert named_but_retired, "the state that this is all about never came about"


def test_a_killed_command_leaves_what_was_copied_before_its_operation(base: Path, tmp_path: Path) -> None:
    """So that `faults.stops` need not kill it. Only the random parts of temporary names differ."""

    def left(root: Path) -> dict[str, tuple[int, bytes | None]]:
        return {
            re.sub(r"\.[0-9a-f]{8}\.", ".", path.relative_to(root).as_posix()): (
                path.lstat().st_mode,
                path.read_bytes() if path.is_file() else None,
            )
            for path in root.rglob("*")
        }

    root, killed = tmp_path / "repo", tmp_path / "killed" / "repo"
    command = ["remove", "pirate", "haiku", "--repo"]
    seen = 0
    for at in faults.stops([*command, str(root)], base, root):
        shutil.rmtree(killed, ignore_errors=True)
        shutil.copytree(base, killed)
        outcome = faults.run([*command, str(killed)], killed, faults.MOST if at is None else at)
        assert outcome == (
            faults.Outcome(0, faulted=False) if at is None else faults.Outcome(-signal.SIGKILL, faulted=True)
        )
        assert left(root) == left(killed), at
        seen += any(path.name.endswith(files.TEMPORARY_SUFFIX) for path in killed.rglob("*"))
    assert seen


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
    opened = paths.open_repository(tmp_path / "repo")
    named = opened.root / model / "warmup"
    named.mkdir(exist_ok=True)
    (named / "x").mkdir()
    (named / "mine").symlink_to(opened.warmup_directory / "adapter_model_1.bin")
    config = opened.root / model / "config.pbtxt"
    if model != "tensorrt_llm" and not file.startswith("../../") and file != "mine":
        file = f"x/../../../tensorrt_llm/warmup/{file.removeprefix('./x/../')}"
    config.write_text(read_text(config) + _sample("mine", file))
    registry.remove(opened, "pirate", "haiku")
    let_time_pass(opened)
    upkeep.repair(opened)

    assert (named / file).is_file()
    assert {"adapter_model_1.bin", "adapter_config_1.bin", "lora_id_1"} == {
        path.name for path in opened.warmup_directory.iterdir() if path.name.split(".")[0].endswith(("_1", "_2"))
    }
    assert [] == checks.check(opened)


@pytest.mark.parametrize("name", ["tensorrt_llm", "postprocessing"])
def test_while_a_config_cannot_be_read_no_adapter_s_file_goes(base: Path, tmp_path: Path, name: str) -> None:
    """Nobody can say what it names. When it can be read again, they go."""
    shutil.copytree(base, tmp_path / "repo")
    opened = paths.open_repository(tmp_path / "repo")
    registry.remove(opened, "pirate")
    let_time_pass(opened)
    config = opened.root / name / "config.pbtxt"
    text = read_text(config)
    config.write_text(text + 'model_warmup { name: "')
    generated.sweep(read_state(opened))

    assert (opened.warmup_directory / "adapter_model_1.bin").exists()
    config.write_text(text)
    assert [] == generated.sweep(read_state(opened))
    assert not (opened.warmup_directory / "adapter_model_1.bin").exists()


def test_a_file_that_cannot_be_deleted_stops_no_other_command(base: Path, adapter: Path, tmp_path: Path) -> None:
    """It is in nobody's way. `check` names it, and `check --fix` ends with 1 as long as it is there."""
    root = tmp_path / "repo"
    shutil.copytree(base, root)
    opened = paths.open_repository(root)
    registry.remove(opened, "pirate")
    let_time_pass(opened)

    def deleting_fails(arguments: list[str], error: int) -> faults.Outcome:
        command = [*arguments, "--repo", str(root)]
        return faults.run(command, opened.warmup_directory, 0, error=error, operations=faults.DELETIONS)

    assert faults.Outcome(0, faulted=True) == deleting_fails(["add", "new", str(adapter)], errno.EACCES)
    assert {"haiku", "new"} == read_table(opened).entries.keys()
    [left] = [one for one in checks.check(opened) if "removed or replaced" in one.problem]

    assert faults.Outcome(1, faulted=True) == deleting_fails(["check", "--fix"], errno.EBUSY)
    assert [left] == checks.check(opened)
    assert 0 == cli.main(["check", "--fix", "--repo", str(root)])
    assert [] == checks.check(opened)


# convert


@pytest.mark.parametrize("file_format", ["bin", "npy"])
def test_what_a_killed_convert_leaves_the_next_one_removes(adapter: Path, tmp_path: Path, file_format: str) -> None:
    """Both files belong together, or the second one is not there; no temporary file is left, of either format."""
    base, out = tmp_path / "base", tmp_path / "out"
    base.mkdir()
    options = [str(adapter), str(out), "--dtype", "float16", "--format"]
    names = {"bin": ["adapter_config.bin", "adapter_model.bin"]}
    names["npy"] = ["model.lora_config.npy", "model.lora_weights.npy"]
    assert 0 == faults.complete(["convert", *options, file_format])
    wanted = {path.name: path.read_bytes() for path in out.iterdir()}
    assert names[file_format] == sorted(wanted)
    left = 0
    for _ in faults.stops(["convert", *options, file_format], base, out):
        found = {path.name: path.read_bytes() for path in out.iterdir()}
        left += any(name.startswith(".") for name in found)
        assert all(wanted[name] == content for name, content in found.items() if not name.startswith("."))
        other = "npy" if file_format == "bin" else "bin"
        assert 0 == cli.main(["convert", *options, other])
        assert {*names[other], *(name for name in found if name in wanted)} == {path.name for path in out.iterdir()}
        assert 0 == cli.main(["convert", *options, file_format])
        assert wanted == {path.name: path.read_bytes() for path in out.iterdir() if path.name in names[file_format]}
    assert left, "the state that this is all about never came about"


def test_convert_removes_nobody_else_s_file(adapter: Path, tmp_path: Path) -> None:
    """Nor one that another process is writing, nor one of another user's, nor what only looks like one."""
    suffix = files.TEMPORARY_SUFFIX
    names = {
        *(f"adapter_model.bin.01234567{suffix}", f".adapter_model.bin.0123456{suffix}"),
        *(f".adapter_model.bin.0123456g{suffix}", f".notes.01234567{suffix}", ".adapter_model.bin.01234567"),
        *(f".x.adapter_model.bin.01234567{suffix}", f".adapter_model.bin.01234567{suffix}.old"),
    }
    for name in names:
        (tmp_path / name).write_text("mine")
    (tmp_path / f".adapter_model.bin.89abcdef{suffix}").symlink_to("nowhere")
    (tmp_path / f".adapter_config.bin.89abcdef{suffix}").mkdir()
    foreign = tmp_path / f".adapter_model.bin.fedcba98{suffix}"
    foreign.write_text("another user's")
    if os.geteuid() == 0:
        os.chown(foreign, 1234, 1234)
    else:
        foreign.rename(tmp_path / "adapter.txt")
    ours = tmp_path / f".adapter_model.bin.76543210{suffix}"
    ours.write_text("half")
    before = {path.name for path in tmp_path.iterdir()} - {ours.name}
    with files.temporary_name(tmp_path / "adapter_model.bin") as being_written:
        assert 0 == faults.complete(["convert", str(adapter), str(tmp_path)])
        assert {*before, being_written.name, "adapter_model.bin", "adapter_config.bin"} == {
            path.name for path in tmp_path.iterdir()
        }


# Modes


@pytest.mark.parametrize("umask", [0o077, 0o022, 0o000], ids=oct)
@pytest.mark.parametrize("kind", ["engine model", "LLM API"])
def test_a_server_of_another_user_can_read_all_that_is_written_and_others_cannot_write_it(
    adapter: Path, tmp_path: Path, umask: int, kind: str
) -> None:
    """Whatever the umask is, and however private the adapter. What was there keeps its mode."""
    if kind == "engine model":
        root = upstream_repository(tmp_path / "repo", "v0.18.0")
    else:
        root = llm_api_repository(tmp_path / "repo", tmp_path / "nowhere")
    (root / "tensorrt_llm" / "config.pbtxt").chmod(0o640)
    private = shutil.copytree(adapter, tmp_path / "adapters" / "one")
    other = synthetic_adapter(tmp_path / "adapters" / "two", 3)
    for path in (*private.iterdir(), *other.iterdir()):
        path.chmod(0o600)
    before = {path: path.lstat().st_mode for path in root.rglob("*")}
    repo = ["--repo", str(root)]
    for arguments in (
        ["init", str(root)],
        *([["init", str(root), "--topology", "resolve"]] if kind == "engine model" else []),
        ["add", "pirate", str(private), "--dtype", "bfloat16", *repo],
        ["add", "pirate", str(other), "--dtype", "bfloat16", *repo],
        ["add", "--all", str(tmp_path / "adapters"), "--dtype", "bfloat16", *repo],
        ["alias", "prod", "pirate", *repo],
        ["remove", "one", *repo],
        ["check", "--fix", *repo],
    ):
        log = tmp_path / "log"
        code = faults.complete(arguments, umask=umask, log=log)
        assert code == 0 or arguments[0] == "check", log.read_text()
    found = {path: path.lstat().st_mode for path in root.rglob("*")}
    new = {path: mode for path, mode in found.items() if path not in before}

    assert {path: mode for path, mode in found.items() if path in before} == before
    assert any(path.name.startswith("adapter_model") for path in new)
    for path, mode in new.items():
        private_copy = path == root / undo.ORIGINALS / "tensorrt_llm" / "config.pbtxt"
        needed = 0o640 if private_copy else 0o555 if stat.S_ISDIR(mode) else 0o444
        assert needed == mode & needed, path
        assert 0 == mode & 0o002, path


# check beside a writer


@pytest.mark.parametrize("lock", ["", "no lock"])
def test_check_beside_a_writer_finds_nothing_that_is_not_there(base: Path, tmp_path: Path, lock: str) -> None:
    """Whatever that one is just doing, also when it is the first one ever; with the digests compared."""
    root = tmp_path / "repo"
    shutil.copytree(base, root)
    if lock:
        (root / "lora_router" / ".lock").unlink()
    opened = paths.open_repository(root)
    adapters = [synthetic_adapter(tmp_path / f"adapter-{seed}", 20 + seed) for seed in range(4)]
    commands = [["add", f"n{seed}", str(adapter)] for seed, adapter in enumerate(adapters)]
    commands += [["add", "n0", str(adapters[1])], ["remove", "n1", "n2"], ["add", "n1", str(adapters[2])]]
    commands += [["add", "n1", str(adapters[2]), "--no-warmup"], ["check", "--fix"], ["remove", "n0"]]
    codes: list[int] = []

    def write() -> None:
        codes.extend(faults.complete([*command, "--repo", str(root)]) for command in commands)

    writer = threading.Thread(target=write)
    writer.start()
    looks = 0
    while writer.is_alive():
        assert [] == checks.check(opened, deep=True)
        looks += 1
        writer.join(0.02)  # or the readers' lock keeps it waiting
    writer.join()

    assert [0] * len(commands) == codes
    assert looks > 1


@pytest.mark.parametrize("first_ever", [False, True])
def test_check_waits_for_a_writer_that_is_half_way(
    base: Path, adapter: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, first_ever: bool
) -> None:
    """Stopped between adapters.json and config.pbtxt until `check` says that it waits.

    There is no lock before the `first_ever` writer comes, so that `check` has looked at what is half written.
    """
    root = tmp_path / "repo"
    shutil.copytree(base, root)
    opened = paths.open_repository(root)
    if first_ever:
        (root / "lora_router" / ".lock").unlink()
    half_way, waits = threading.Event(), threading.Event()
    write_bytes, findings = files.write_bytes, checks._findings
    looks: list[int] = []

    def stop_half_way(path: Path, content: bytes, **options: Any) -> None:
        if path == opened.config_path:
            half_way.set()
            assert waits.wait(60)
        write_bytes(path, content, **options)

    class Waits(logging.Handler):
        def emit(self, record: logging.LogRecord) -> None:
            if record.getMessage().startswith("waiting for another tritonlora"):
                waits.set()

    with ThreadPoolExecutor(1) as pool:
        adding: list[Future[add.Added]] = []

        def begin() -> None:
            adding.append(pool.submit(add.add, opened, "pirate", adapter))
            assert half_way.wait(60)

        def look(*arguments: Any) -> list[Finding]:
            if not looks and first_ever:
                begin()
            looks.append(len(found := findings(*arguments)))
            return found

        monkeypatch.setattr(files, "SILENT_WAIT_SECONDS", 0.01)
        monkeypatch.setattr(undo, "write_bytes", stop_half_way)
        monkeypatch.setattr(checks, "_findings", look)
        handler = Waits()
        logging.getLogger("tritonlora.files").addHandler(handler)
        try:
            if not first_ever:
                begin()
            assert [] == checks.check(opened)
            adding[0].result(60)
        finally:
            waits.set()
            logging.getLogger("tritonlora.files").removeHandler(handler)
    assert (2 if first_ever else 1) == len(looks)
    assert bool(looks[0]) == first_ever


def test_check_writes_nothing(base: Path, tmp_path: Path) -> None:
    """A repository that is mounted read-only can be checked: with a lock, and without."""
    root = tmp_path / "repo"
    shutil.copytree(base, root)
    for _ in range(2):
        before = {path: path.lstat().st_mtime_ns for path in (root, *root.rglob("*"))}
        outcome = faults.run(["check", "--deep", "--repo", str(root)], root, 0, error=errno.EROFS)
        assert faults.Outcome(0, faulted=False) == outcome
        assert before == {path: path.lstat().st_mtime_ns for path in (root, *root.rglob("*"))}
        (root / "lora_router" / ".lock").unlink(missing_ok=True)
