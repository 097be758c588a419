# SPDX-FileCopyrightText: the tritonlora authors
# SPDX-License-Identifier: Apache-2.0
"""sync and export: words in, a plan and exit codes out."""

from __future__ import annotations

import io
import json
import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import TypeVar

import pytest

from repositories import synthetic_adapter, synthetic_repository
from tritonlora.cli import commands, output
from tritonlora.cli.desired_state import LOOK_SECONDS, RETRY_SECONDS, follow
from tritonlora.errors import DesiredStateError
from tritonlora.repository import paths
from tritonlora.repository.paths import read_table

NO_RESTART, RESTART = (f"note: {text}\n" for text in (output.NO_RESTART, output.RESTART))


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A directory with a repository without adapters, and with two adapters' directories."""
    directory = tmp_path_factory.mktemp("desired")
    synthetic_repository(directory / "repo", topology="resolve")
    for seed, name in enumerate("ab"):
        synthetic_adapter(directory / "adapters" / name, seed)
    return directory


@pytest.fixture
def place(base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A copy of it, which is the current directory."""
    shutil.copytree(base, tmp_path / "place")
    monkeypatch.chdir(tmp_path / "place")
    monkeypatch.delenv("TRITONLORA_REPO", raising=False)
    return tmp_path / "place"


def run(capsys: pytest.CaptureFixture[str], *arguments: object) -> tuple[int, str, str]:
    """(exit code, stdout, stderr) of a command."""
    code = commands.main([str(argument) for argument in arguments])
    captured = capsys.readouterr()
    return code, captured.out, captured.err


TWO = """\
adapters:
  pirate-v3: adapters/a
  pirate-v4: {source: adapters/b, warm: false}
aliases:
  prod: {pirate-v3: 90, pirate-v4: 10}
"""


def test_a_plan_is_printed_carried_out_and_then_there_is_nothing_to_do(
    capsys: pytest.CaptureFixture[str], place: Path
) -> None:
    """What changes has a line. A dry run writes nothing. What is removed is named, too."""
    Path("two.yaml").write_text(TWO)
    plan = (
        f"+ adapter pirate-v3: from {place}/adapters/a, loaded at start\n"
        f"+ adapter pirate-v4: from {place}/adapters/b, loaded on its first request\n"
        "+ alias prod: pirate-v3 90 %, pirate-v4 10 %\n"
        "plan: 3 to add, 0 to change, 0 to remove\n"
    )
    before = Path("repo/lora_router/adapters.json").read_bytes()

    assert (0, plan, "") == run(capsys, "sync", "repo", "two.yaml", "--dry-run")
    assert before == Path("repo/lora_router/adapters.json").read_bytes()
    code, out, err = run(capsys, "sync", "--repo", "repo", "two.yaml")
    assert (0, plan, NO_RESTART) == (code, out[: len(plan)], err)
    assert [
        "pirate-v3 added: lora_task_id 1, 8.0 KiB",
        "pirate-v4 added: lora_task_id 2, 8.0 KiB",
    ] == sorted(out[len(plan) :].splitlines()[:-1])
    assert out.endswith("\ndone: the repository is as two.yaml says\n")
    nothing = "nothing to do: the repository is as two.yaml says\n"
    assert (0, nothing, "") == run(capsys, "sync", "repo", "two.yaml")

    Path("two.yaml").write_text("adapters:\n  pirate-v4: adapters/a\naliases:\n  prod: pirate-v4\n")
    code, out, _ = run(capsys, "sync", "repo", "two.yaml")
    assert (0, True) == (
        code,
        out.startswith(
            f"~ adapter pirate-v4: from {place}/adapters/a, with a new lora_task_id if its content has changed; "
            "loaded on its first request -> loaded at start\n"
            "~ alias prod: pirate-v3 90 %, pirate-v4 10 % -> pirate-v4\n"
            "plan: 0 to add, 2 to change, 0 to remove; 1 not in two.yaml stay (--prune removes them)\n"
        ),
    )
    assert (
        0,
        "- adapter pirate-v3: lora_task_id 1 is retired\nplan: 0 to add, 0 to change, 1 to remove\n"
        "done: the repository is as two.yaml says\n",
        NO_RESTART,
    ) == run(capsys, "sync", "repo", "two.yaml", "--prune")


def test_settings_that_a_running_server_lacks_are_named(capsys: pytest.CaptureFixture[str], place: Path) -> None:
    """As `add` names them: the first bfloat16 adapter of a repository for float16 changes configs."""
    for name in ("tensorrt_llm", "lora_resolver"):
        path = place / "repo" / name / "config.pbtxt"
        path.write_text(path.read_text().replace("TYPE_BF16", "TYPE_FP16"))
    Path("two.yaml").write_text(TWO)
    code, _, err = run(capsys, "sync", "repo", "two.yaml")

    assert (
        0,
        "note: tensorrt_llm/config.pbtxt: input lora_weights: TYPE_FP16 [-1, -1] -> TYPE_BF16 [-1, -1]\n"
        "note: lora_resolver/config.pbtxt: output lora_weights: TYPE_FP16 [-1, -1] -> TYPE_BF16 [-1, -1]\n"
        f"{RESTART}",
    ) == (code, err)


def test_what_export_prints_is_as_the_repository_is(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, place: Path
) -> None:
    """As YAML and as JSON, which is YAML, too; through a pipe."""
    Path("two.yaml").write_text(TWO)
    run(capsys, "sync", "repo", "two.yaml")
    monkeypatch.setenv("TRITONLORA_REPO", "repo")
    code, text, _ = run(capsys, "export")

    assert (0, text.replace(str(place / "adapters"), "adapters")) == (code, TWO_EXPORTED)
    for exported in (text, run(capsys, "export", "--json")[1]):
        monkeypatch.setattr("sys.stdin", io.TextIOWrapper(io.BytesIO(exported.encode())))
        assert (0, "nothing to do: the repository is as standard input says\n", "") == run(capsys, "sync", "-")


TWO_EXPORTED = """\
adapters:
  pirate-v3: adapters/a
  pirate-v4:
    source: adapters/b
    warm: false
aliases:
  prod:
    pirate-v3: 90
    pirate-v4: 10
"""


def test_a_bad_adapter_is_in_the_exit_code(capsys: pytest.CaptureFixture[str], place: Path) -> None:
    """The others are there. The data of --json is on stdout alone."""
    Path("three.yaml").write_text(TWO.replace("adapters:\n", "adapters:\n  bad: adapters/none\n", 1))
    code, out, err = run(capsys, "sync", "repo", "three.yaml", "--json")
    said = json.loads(out)

    assert (1, f"bad refused: there is nothing at '{place}/adapters/none'") == (code, err.partition(";")[0])
    assert ["pirate-v3", "pirate-v4"] == sorted(one["name"] for one in said["added"])
    assert [("bad", True)] == [(one["name"], one["error"] in err) for one in said["refused"]]
    assert ["pirate-v3", "pirate-v4", "prod"] == [one["name"] for one in said["changes"]]
    assert {"pirate-v3", "pirate-v4"} == read_table(paths.open_repository(Path("repo"))).entries.keys()


@pytest.mark.parametrize(
    ("words", "code", "message"),
    [
        (["repo", "no.yaml"], 1, "error: cannot read no.yaml: No such file or directory"),
        (["repo", "."], 1, "error: cannot read .: "),
        (["repo", "bad.yaml"], 1, "error: bad.yaml: it cannot be used: line 1: the file must be a mapping with"),
        (["bad.yaml"], 2, "expected 1 word after REPO, got ''"),
        (["repo", "bad.yaml", "--watch", "--dry-run"], 2, "--watch goes without --dry-run and --json"),
        (["repo", "-", "--watch"], 2, "--watch goes without --dry-run and --json, and needs a FILE"),
    ],
)
def test_what_cannot_be_is_refused(
    capsys: pytest.CaptureFixture[str], place: Path, words: list[str], code: int, message: str
) -> None:
    """In one message."""
    (place / "bad.yaml").write_text("- a\n")
    found, _, err = run(capsys, "sync", *words)

    assert (code, True) == (found, message in " ".join(err.replace("│", "").split())), err


T = TypeVar("T", bytes, bool)


class Stopped(BaseException):
    """Ends `follow`."""


def value_or_error(one: T | str) -> T:
    """The value; a str is raised as an error."""
    if isinstance(one, str):
        raise DesiredStateError(one)
    return one


def followed(contents: Iterator[bytes | str], results: Iterator[bool | str]) -> list[tuple[float, bytes]]:
    """What `follow` acts on, and when. A look gives the next of `contents`, an act of `results`; a str is an error."""
    acted: list[tuple[float, bytes]] = []
    now = 0.0

    def read() -> bytes:
        content = next(contents, None)
        if content is None:
            raise Stopped
        return value_or_error(content)

    def act(content: bytes) -> bool:
        acted.append((now, content))
        return value_or_error(next(results))

    def wait(seconds: float) -> None:
        nonlocal now
        now += seconds

    with pytest.raises(Stopped):
        follow(read, act, wait)
    return acted


def test_a_watched_file_is_acted_on_when_its_content_changes(capsys: pytest.CaptureFixture[str]) -> None:
    """Once each, whatever else happens to it. While it cannot be read, that is said once."""
    contents: list[bytes | str] = [b"1", b"1", "gone", "gone", b"1", b"2", b"2"]

    acted = followed(iter(contents), iter([True] * 2))

    assert [(0.0, b"1"), (5 * LOOK_SECONDS, b"2")] == acted
    assert "error: gone\n" == capsys.readouterr().err


def test_a_sync_that_failed_is_tried_again(capsys: pytest.CaptureFixture[str]) -> None:
    """A source may be there a minute later. What succeeded is not repeated, nor is the same error printed twice."""
    looks = round(RETRY_SECONDS / LOOK_SECONDS)

    acted = followed(iter([b"1"] * (4 * looks + 2)), iter([False, "down", "down", True]))

    assert [(RETRY_SECONDS * number, b"1") for number in range(4)] == acted
    assert "error: down\n" == capsys.readouterr().err


def test_a_config_map_that_kubernetes_replaces_is_followed_until_sigterm(place: Path) -> None:
    """Its files are links through ..data, a link that is replaced; the watched path itself never changes."""
    mount = place / "mount"
    for number, text in enumerate([TWO, TWO.replace("90", "50").replace("10", "50"), "adapters: {}\n"]):
        (mount / f"..{number}").mkdir(parents=True)
        (mount / f"..{number}" / "adapters.yaml").write_text(text.replace("adapters/", f"{place}/adapters/"))
    (mount / "..data").symlink_to("..0")
    (mount / "adapters.yaml").symlink_to("..data/adapters.yaml")
    command = [sys.executable, "-m", "tritonlora", "sync", "repo", "mount/adapters.yaml", "--prune", "--watch"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        for number in (1, 2):
            line = next(line for line in process.stdout if line.startswith("plan: "))
            assert "plan: 3 to add" in line if number == 1 else "plan: 0 to add, 1 to change" in line
            (mount / "..new").symlink_to(f"..{number}")
            (mount / "..new").rename(mount / "..data")
        assert "0 to change, 3 to remove" in next(line for line in process.stdout if line.startswith("plan: "))
        assert next(process.stdout).startswith("done: ")
        os.kill(process.pid, signal.SIGTERM)

        assert 0 == process.wait(timeout=30)
