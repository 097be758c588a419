# SPDX-FileCopyrightText: the tritonlora authors
# SPDX-License-Identifier: Apache-2.0
"""cli.py: words in, exit codes and data out."""

from __future__ import annotations

import builtins
import io
import json
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import typer
from rich.console import Console

from adapters import write_adapter
from repositories import SYNTHETIC_GEOMETRY, set_cache_pages, synthetic_adapter, synthetic_repository
from tritonlora import __version__, extras
from tritonlora.check import checks
from tritonlora.cli import commands, output
from tritonlora.files import publish
from tritonlora.interrupts import ENDING
from tritonlora.machine import free_ports
from tritonlora.repository import init, paths, registry, upkeep
from tritonlora.repository.paths import read_table
from tritonlora.repository.shipped import shipped_models
from upstream_configs import protobuf, upstream_repository

NO_RESTART, RESTART = (f"note: {text}\n" for text in (output.NO_RESTART, output.RESTART))
COMMANDS = (
    *("demo", "init", "add", "compose", "remove", "alias", "list", "warm", "sync", "export", "plan", "check"),
    *("convert", "serve", "openai", "generate", "top", "bench"),
)


@pytest.fixture(autouse=True)
def _signals() -> Any:
    """main() installs handlers; the tests' own come back afterwards."""
    before = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)}
    yield
    for number, handler in before.items():
        signal.signal(number, handler)


@pytest.fixture(scope="module")
def sound(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A repository with two adapters."""
    return synthetic_repository(
        tmp_path_factory.mktemp("cli") / "repo", warm=["pirate"], cold=["haiku"], topology="resolve"
    ).root


@pytest.fixture
def repo(sound: Path, tmp_path: Path) -> Path:
    """A copy of it."""
    return Path(shutil.copytree(sound, tmp_path / "repo"))


@pytest.fixture(scope="module")
def adapter(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An adapter to add."""
    return synthetic_adapter(tmp_path_factory.mktemp("adapter") / "new", 9)


def run(capsys: pytest.CaptureFixture[str], *arguments: object) -> tuple[int, str, str]:
    """(exit code, stdout, stderr) of a command."""
    code = commands.main([str(argument) for argument in arguments])
    captured = capsys.readouterr()
    return code, captured.out, captured.err


@pytest.mark.parametrize("width", [60, 80])
@pytest.mark.parametrize(
    "command",
    [(), *[(command,) for command in COMMANDS], *[("bench", part) for part in ("convert", "mix", "openai", "route")]],
)
def test_every_command_has_help(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, command: Sequence[str], width: int
) -> None:
    """On stdout, with exit code 0. It fits the terminal, has no frames, and no name of an option is cut off."""
    monkeypatch.setenv("COLUMNS", str(width))
    code, out, _ = run(capsys, *command, "--help")
    group: Any = typer.main.get_command(commands.app)
    for name in command:
        group = group.commands[name]
    shown = [parameter for parameter in group.params if not getattr(parameter, "hidden", False)]
    named = {one for parameter in shown for one in parameter.opts if one.startswith("--")}

    assert code == 0
    assert out.startswith("Usage: ")
    assert "─" not in out
    assert max(map(len, out.splitlines())) <= width
    assert named <= {*re.findall(r"--[a-z-]+", out)}
    assert getattr(group, "commands", {}).keys() <= {*re.findall(r"^  (\w+) ", out, re.MULTILINE)}


@pytest.mark.parametrize(
    ("words", "code", "message"),
    [
        (("nowhere",), 1, "error: there is no model repository at 'nowhere'"),
        (("REPO", "--repo", "REPO"), 2, "give REPO once: as the first argument, or with --repo"),
        (("--url", "http://localhost:8001"), 2, "'http://localhost:8001' is not HOST:PORT; give the gRPC endpoint"),
    ],
)
def test_a_door_that_could_never_be_ready_does_not_begin(
    capsys: pytest.CaptureFixture[str], words: Sequence[str], code: int, message: str
) -> None:
    """Before it listens."""
    found, out, err = run(capsys, "openai", "--port", free_ports().http, *words)

    assert (code, "") == (found, out)
    assert message in " ".join(err.split())


def test_every_command_is_in_the_docs() -> None:
    """In the table of commands, which has no other."""
    group = typer.main.get_command(commands.app)
    page = (Path(__file__).parents[2] / "plugin" / "docs" / "commands.md").read_text()
    table = page[: page.index("\n## ")]

    assert set(COMMANDS) == set(group.commands) == set(re.findall(r"^\| `(\w+)", table, re.MULTILINE))  # type: ignore[attr-defined]


def test_the_version_is_that_of_the_package(capsys: pytest.CaptureFixture[str]) -> None:
    """--version."""
    assert (0, f"tritonlora {__version__}\n", "") == run(capsys, "--version")


@pytest.mark.parametrize(
    "arguments",
    [
        ("nonsense",),
        ("add",),
        ("add", "a", "--repo", "b"),
        ("compose", "mix", "--repo", "b"),
        ("compose", "mix", "pirate", "--repo", "b"),
        ("compose", "mix", "pirate=x", "--repo", "b"),
        ("compose", "mix", "=1", "--repo", "b"),
        ("compose", "mix", "pirate=1", "pirate=2", "--repo", "b"),
        ("compose", "mix", "pirate=1", "--rank", "0", "--repo", "b"),
        ("add", "a", "--all", "b", "--repo", "c"),
        ("add", "a", "b", "--repo", ".", "--task-id", "0"),
        ("list",),
        ("list", "--repo"),
        ("list", "--repo", "a", "--url", "b"),
        ("bench", "convert", "--ranks", "x"),
        ("list", "--repo", ""),
        ("warm", "./repo", "pirate"),
        ("serve", "repo", "--http-prt", "8000"),
        ("serve", "repo", "other"),
        ("warm", "pirate", "--repo", "repo"),
        ("init", ""),
    ],
)
def test_wrong_words_are_usage(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, arguments: Sequence[str]
) -> None:
    """Exit code 2, and the reason on stderr."""
    monkeypatch.delenv("TRITONLORA_REPO", raising=False)
    code, out, err = run(capsys, *arguments)

    assert (2, "") == (code, out)
    assert err


@pytest.mark.parametrize("command", ["convert", "route"])
@pytest.mark.parametrize("plot", ["nowhere/x.png", "x.pdf", "directory.png", "closed/x.png"])
def test_a_plot_that_cannot_be_drawn_is_usage(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path, command: str, plot: str
) -> None:
    """Before anything is measured."""
    monkeypatch.setattr(f"tritonlora.bench.{command}.run", lambda *_, **__: pytest.fail("it was measured"))
    monkeypatch.setattr("os.access", lambda path, _: path.is_dir() and path.name != "closed")
    for name in ("directory.png", "closed"):
        (tmp_path / name).mkdir()
    code, _, err = run(capsys, "bench", command, "--plot", tmp_path / plot)

    assert (2, True) == (code, "--plot" in err)


@pytest.mark.parametrize(
    ("extra", "command"),
    [
        ("convert", ["add", "joker", "adapter", "--repo", "models"]),
        ("convert", ["add", "--all", "adapters", "--repo", "models"]),
        ("convert", ["convert", "adapter", "out"]),
        ("demo", ["demo"]),
        ("bench", ["bench", "convert"]),
        ("bench", ["bench", "route"]),
    ],
)
def test_a_command_that_lacks_an_extra_says_what_to_install(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path, extra: str, command: list[str]
) -> None:
    """In one line that names the first missing module and the whole command."""
    monkeypatch.chdir(tmp_path)
    for name in ("adapter", "adapters/one"):
        (tmp_path / name).mkdir(parents=True)
        (tmp_path / name / "adapter_config.json").write_text("{}")
    init.create_repository(tmp_path / "models")
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    code, out, err = run(capsys, *command)
    modules = ", ".join(extras.MODULES[extra])

    assert (1, "") == (code, out)
    assert f"error: {modules}: not installed; run: pip install 'tritonlora[{extra}]'\n" == err


def test_a_refusal_is_one_message_on_stderr(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    """Exit code 1, no traceback."""
    code, out, err = run(capsys, "list", "--repo", tmp_path / "nowhere")

    assert (1, "") == (code, out)
    assert err.startswith("error: there is no model repository at")
    assert "Traceback" not in err


@pytest.mark.parametrize("command", ["list", "init", "serve"])
@pytest.mark.parametrize("scheme", ["s3", "gs"])
def test_a_repository_in_an_object_store_is_refused(
    capsys: pytest.CaptureFixture[str], command: str, scheme: str
) -> None:
    """Triton could load its models, and adapters that are not warm would fail."""
    code, _, err = run(capsys, command, f"{scheme}://bucket/models")

    assert (1, True) == (code, f"must be a directory, and {scheme}: is an object store; copy the repository" in err)


def test_list_prints_a_line_for_each_adapter(capsys: pytest.CaptureFixture[str], repo: Path, sound: Path) -> None:
    """Tab-separated in a pipe, without colours."""
    sources = sound.with_name("repo-adapters")
    for alias in ("prod", "play"):
        run(capsys, "alias", alias, "pirate", "--repo", repo)
    code, out, err = run(capsys, "list", "--repo", repo)

    assert (0, "") == (code, err)
    assert [line.split("\t") for line in out.splitlines()] == [
        ["lora_name", "lora_task_id", "rank", "modules", "size", "pages", "start", "aliases", "source", "pinned"],
        ["haiku", "2", "8", "attn_q,attn_v", "8.0 KiB", "1", "on first use", "", str(sources / "haiku"), ""],
        ["pirate", "1", "8", "attn_q,attn_v", "8.0 KiB", "1", "warm", "play,prod", str(sources / "pirate"), ""],
    ]


def test_the_repository_may_come_from_the_environment(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, repo: Path
) -> None:
    """TRITONLORA_REPO."""
    monkeypatch.setenv("TRITONLORA_REPO", str(repo))
    code, out, _ = run(capsys, "list", "--json")

    assert code == 0
    assert {"haiku", "pirate"} == json.loads(out).keys()


def test_the_repository_is_the_first_argument_of_every_command(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, repo: Path, adapter: Path
) -> None:
    """Wherever it comes from, the other words are the same: an argument, --repo, or TRITONLORA_REPO."""
    monkeypatch.delenv("TRITONLORA_REPO", raising=False)
    sequence: tuple[tuple[object, ...], ...] = (
        ("init",), ("list",), ("plan",), ("check",), ("serve", "--print-command", "--", "--log-verbose=1"),
        ("add", "new", adapter), ("alias", "prod", "new"), ("remove", "prod", "new"),
        ("add", "--all", adapter.parent, "--no-warmup"), ("remove", "new"),
    )  # fmt: skip
    said = []
    for way in ("argument", "--repo", "environment", "argument beats environment"):
        root = Path(shutil.copytree(repo, repo.parent / way.replace(" ", "_") / "repo"))
        if way.endswith("environment"):
            monkeypatch.setenv("TRITONLORA_REPO", str(root if way == "environment" else repo.parent / "nowhere"))
        words = {"--repo": ["--repo", root], "environment": []}.get(way, [root])
        said.append([run(capsys, command, *words, *rest)[:2] for command, *rest in sequence])
        said[-1] = [(code, out.replace(str(root), "REPO")) for code, out in said[-1]]

    assert [0] * len(sequence) == [code for code, _ in said[0]]
    assert said[0] == said[1] == said[2] == said[3]


@pytest.mark.parametrize("words", [("list",), ("add", "new", "a"), ("remove", "./nowhere"), ("alias", "a", "b")])
def test_without_a_repository_a_command_says_how_to_give_one(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, words: Sequence[str]
) -> None:
    """Exit code 2."""
    monkeypatch.delenv("TRITONLORA_REPO", raising=False)
    code, _, err = run(capsys, *words)

    assert code == 2
    assert "REPO" in err


@pytest.mark.parametrize(
    ("url", "message"),
    [
        (None, "; is the server running?"),
        ("nowhere:port", "'nowhere:port' is not HOST:PORT"),
        ("ftp://nowhere", "'ftp://nowhere' is not HOST:PORT"),
    ],
)
def test_list_of_a_server_that_is_not_there_is_refused(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, repo: Path, url: str | None, message: str
) -> None:
    """The repository of the environment does not answer in its place."""
    monkeypatch.setenv("TRITONLORA_REPO", str(repo))
    url = url or f"http://127.0.0.1:{free_ports().http}"
    code, out, err = run(capsys, "list", "--url", url)

    assert (1, "") == (code, out)
    assert message in err
    assert url in err


def test_a_word_that_was_taken_for_the_repository_is_named(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """Where nothing else gives REPO."""
    monkeypatch.delenv("TRITONLORA_REPO", raising=False)
    code, _, err = run(capsys, "add", "pirate", "adapters/pirate")
    why = "; 'pirate' was taken for REPO: TRITONLORA_REPO is not set, and there is no --repo"

    assert (2, True) == (code, f"expected 2 words after REPO, got 'adapters/pirate'{why}" in " ".join(err.split()))
    monkeypatch.setenv("TRITONLORA_REPO", str(tmp_path))
    code, _, err = run(capsys, "add", "pirate")
    assert (2, True) == (code, "expected 2 words after REPO, got 'pirate'" in err)
    assert "taken" not in err


def test_add_and_remove(capsys: pytest.CaptureFixture[str], repo: Path, adapter: Path) -> None:
    """The whole way, said in a line each."""
    assert (0, "new would be added: lora_task_id 3, 8.0 KiB\n") == run(
        capsys, "add", "new", adapter, "--repo", repo, "--dry-run"
    )[:2]
    assert (0, "new added: lora_task_id 3, 8.0 KiB\n") == run(capsys, "add", "new", adapter, "--repo", repo)[:2]
    assert (0, "new is unchanged: lora_task_id 3, 8.0 KiB\n") == run(capsys, "add", "new", adapter, "--repo", repo)[:2]
    starts = ("at start -> on its first request", "on its first request -> at start")
    for option, start in zip(("--no-warmup", "--warmup"), starts, strict=True):
        assert (0, f"new is loaded {start}: lora_task_id 3, 8.0 KiB\n") == run(
            capsys, "add", "new", adapter, "--repo", repo, option
        )[:2]
    assert (0, "adapter new removed: its lora_task_id 3 is never used again\n") == run(
        capsys, "remove", "new", "--repo", repo
    )[:2]
    code, out, _ = run(capsys, "add", "new", adapter, "--repo", repo, "--no-warmup", "--task-id", "9", "--json")
    entry = json.loads(out)["entry"]
    assert (0, 9, False) == (code, entry["lora_task_id"], entry["warm"])


def test_an_alias_is_given_switched_and_taken_away(capsys: pytest.CaptureFixture[str], repo: Path) -> None:
    """A line for each; the adapters stay."""
    assert (0, "alias prod added: its requests go to pirate\n", NO_RESTART) == run(
        capsys, "alias", "prod", "pirate", "--repo", repo
    )
    assert (0, "alias prod is unchanged: its requests go to pirate\n", "") == run(
        capsys, "alias", "prod", "pirate", "--repo", repo
    )
    assert (0, "alias prod changed: its requests went to pirate, and go to haiku now\n", NO_RESTART) == run(
        capsys, "alias", "prod", "haiku", "--repo", repo
    )
    code, _, err = run(capsys, "remove", "haiku", "--repo", repo)
    assert (1, "error: adapter 'haiku' has aliases: prod;") == (code, err[:41])
    code, out, _ = run(capsys, "list", "--repo", repo, "--json")
    assert (0, [["prod"], []]) == (code, [one["aliases"] for one in json.loads(out).values()])
    code, out, _ = run(capsys, "alias", "prod", "pirate", "--repo", repo, "--json")
    assert (0, {"alias": "prod", "name": "pirate", "before": "haiku"}) == (code, json.loads(out))
    assert (0, "alias prod removed: requests for it are refused now; pirate stays\n") == run(
        capsys, "remove", "prod", "--repo", repo
    )[:2]
    assert (0, "adapter haiku removed: its lora_task_id 2 is never used again\n") == run(
        capsys, "remove", "haiku", "--repo", repo
    )[:2]


def test_an_alias_is_divided_and_led_back(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, repo: Path
) -> None:
    """With REPO in any place. The list has the shares."""
    run(capsys, "alias", "prod", "pirate", "--repo", repo)
    divided = (0, "alias prod changed: its requests went to pirate, and go to haiku 10 %, pirate 90 % now\n")
    assert divided == run(capsys, "alias", repo, "prod", "pirate=90", "haiku=10")[:2]
    assert "haiku\t2\t8\tattn_q,attn_v\t8.0 KiB\t1\ton first use\tprod 10 %\t" in run(capsys, "list", repo)[1]
    assert {"haiku": {"prod": 10}, "pirate": {"prod": 90}} == {
        name: about["shares"] for name, about in json.loads(run(capsys, "list", repo, "--json")[1]).items()
    }
    monkeypatch.setenv("TRITONLORA_REPO", str(repo))
    led_back = "alias prod changed: its requests went to haiku 10 %, pirate 90 %, and go to pirate now\n"
    assert (0, led_back) == run(capsys, "alias", "prod", "pirate")[:2]
    code, out, _ = run(capsys, "alias", "prod", "haiku=50", "pirate=50", "--json")
    shares = {"haiku": 50, "pirate": 50}
    assert (0, {"alias": "prod", "name": shares, "before": "pirate"}) == (code, json.loads(out))
    removed = "alias prod removed: requests for it are refused now; haiku, pirate stay\n"
    assert (0, removed) == run(capsys, "remove", "prod")[:2]


@pytest.mark.parametrize(
    ("words", "code", "message"),
    [
        (["pirate=90", "haiku=20"], 1, "error: cannot divide 'prod': the shares must add up to 100, got 110\n"),
        (["pirate=90", "nobody=10"], 1, "error: cannot divide 'prod': no adapter 'nobody' is registered; available: "),
        (["pirate=90", "haiku"], 2, "'haiku' has no share; give each adapter a whole percentage, such as haiku=10"),
        (["pirate=90%", "haiku=10%"], 2, "'pirate=90%' has no share; give each adapter a whole percentage, such as"),
        (["pirate=50", "pirate=50"], 2, "'pirate' is given twice; give each adapter once"),
    ],
)
def test_shares_that_cannot_be_are_refused(
    capsys: pytest.CaptureFixture[str], repo: Path, words: list[str], code: int, message: str
) -> None:
    """Nothing is written."""
    before = (repo / "lora_router" / "adapters.json").read_bytes()
    found, _, err = run(capsys, "alias", repo, "prod", *words)

    assert (code, True) == (found, message in " ".join(err.replace("│", "").split()) + "\n"), err
    assert before == (repo / "lora_router" / "adapters.json").read_bytes()


def test_several_are_removed_at_once(capsys: pytest.CaptureFixture[str], repo: Path) -> None:
    """An adapter together with its aliases, in any order; or none, when one of them is not there."""
    run(capsys, "alias", "prod", "pirate", "--repo", repo)
    assert 1 == run(capsys, "remove", "pirate", "haiku", "--repo", repo)[0]
    assert 1 == run(capsys, "remove", "pirate", "prod", "nobody", "--repo", repo)[0]
    assert {"haiku", "pirate"} == json.loads(run(capsys, "list", "--repo", repo, "--json")[1]).keys()
    code, out, _ = run(capsys, "remove", "pirate", "prod", "--repo", repo, "--json")
    assert (0, ["prod", "pirate"]) == (code, [one["name"] for one in json.loads(out)])
    assert {"haiku"} == json.loads(run(capsys, "list", "--repo", repo, "--json")[1]).keys()


def test_add_says_what_it_did_to_an_adapter_that_there_was(
    capsys: pytest.CaptureFixture[str], repo: Path, adapter: Path
) -> None:
    """A lost file is put back; what a dry run would do depends on the content."""
    run(capsys, "add", "new", adapter, "--repo", repo)
    code, out, _ = run(capsys, "add", "new", adapter, "--repo", repo, "--dry-run")
    assert 0 == code
    assert out == "new would be added: lora_task_id 3 -> 4 (or 3 stays, if its content is the same), 8.0 KiB\n"
    (repo / "tensorrt_llm" / "warmup" / "adapter_model_3.bin").unlink()
    code, out, err = run(capsys, "add", "--all", adapter.parent, "--repo", repo)

    assert (0, "new is complete again: lora_task_id 3, 8.0 KiB\n") == (code, out)
    lost = "note: new: tensorrt_llm/warmup/adapter_model_3.bin was missing or altered, and is there again\n"
    assert lost + NO_RESTART == err
    other = synthetic_adapter(adapter.parent.parent / "other" / "new", 10)
    assert (0, "new replaced: lora_task_id 3 -> 4, 8.0 KiB\n", NO_RESTART) == run(
        capsys, "add", "new", other, "--repo", repo
    )


def test_compose_says_what_the_sum_is_and_how_far_a_compressed_one_is_off(
    capsys: pytest.CaptureFixture[str], repo: Path
) -> None:
    """What was composed goes to stdout; the errors of the worst layers are a note."""
    code, out, err = run(capsys, "compose", repo, "mix", "pirate=0.7", "haiku=-0.3")

    assert (0, "mix = 0.7 pirate - 0.3 haiku, rank 16\nmix added: lora_task_id 3, 16.0 KiB\n") == (code, out)
    assert NO_RESTART == err
    code, out, err = run(capsys, "compose", repo, "mix", "pirate=0.7", "haiku=-0.3", "--rank=8", "--json")
    assert (0, [8], 4) == (code, json.loads(out)["ranks"], json.loads(out)["added"]["entry"]["lora_task_id"])
    worst = max(json.loads(out)["errors"].items(), key=lambda item: item[1])
    assert re.fullmatch(
        r"note: compressed to rank [0-9]+: the relative error is 0\.\d+ over all layers; the worst layers: "
        rf"{worst[0]} {worst[1]:.2g}, model.*, model.*\n{NO_RESTART}",
        err,
    )
    code, out, err = run(capsys, "compose", repo, "mix", "pirate=nan", "haiko=1")
    assert (1, "") == (code, out)
    assert "the weight of 'pirate' is nan" in err
    assert "no adapter 'haiko' is registered" in err


def test_add_all(capsys: pytest.CaptureFixture[str], repo: Path, tmp_path: Path) -> None:
    """A line for each; exit code 1 when one was refused."""
    for number in range(3):
        synthetic_adapter(tmp_path / "all" / f"n{number}", number)
    (tmp_path / "all" / "n1" / "adapter_config.json").write_text("{")
    code, out, err = run(capsys, "add", "--all", tmp_path / "all", "--repo", repo)

    assert code == 1
    assert [line.split(":")[0] for line in out.splitlines()] == ["n0 added", "n2 added"]
    assert err.startswith("n1 refused: ")


def test_add_all_takes_what_add_takes_and_names_the_rest(
    capsys: pytest.CaptureFixture[str], repo: Path, tmp_path: Path
) -> None:
    """A run with one checkpoint is an adapter. Why the others are none is said, and makes the exit code 1."""
    runs = tmp_path / "runs"
    synthetic_adapter(runs / "finished", 1)
    synthetic_adapter(runs / "one" / "checkpoint-5", 2)
    for number in (3, 4):
        synthetic_adapter(runs / "two" / f"checkpoint-{number}", number)
    for name in ("empty", "merged", "..data"):
        (runs / name).mkdir()
    (runs / "merged" / "model.safetensors").write_bytes(b"x")
    (runs / "README.md").write_text("runs")
    before = read_table(paths.open_repository(repo))
    dry = run(capsys, "add", "--all", runs, "--repo", repo, "--dry-run")

    assert before == read_table(paths.open_repository(repo))
    code, out, err = run(capsys, "add", "--all", runs, "--repo", repo)
    assert 1 == code == dry[0]
    assert ["finished added", "one added"] == [line.split(":")[0] for line in out.splitlines()]
    assert out.replace(" added", " would be added") == dry[1]
    assert err == dry[2] + NO_RESTART
    reasons = dict(line.split(" refused: ") for line in dry[2].splitlines())
    assert reasons.keys() == {"empty", "merged", "two"}
    assert "is empty" in reasons["empty"]
    assert "is a whole model, and no adapter" in reasons["merged"]
    assert "it holds several adapters, give one: " in reasons["two"]


def test_add_all_that_is_interrupted_says_how_far_it_came(
    capsys: pytest.CaptureFixture[str], repo: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What was finished is registered."""
    for number in range(9):
        synthetic_adapter(tmp_path / "all" / f"n{number}", number)
    advanced = []

    def interrupt(*_: object) -> None:
        advanced.append(True)
        if len(advanced) == 3:
            signal.raise_signal(signal.SIGINT)

    monkeypatch.setattr("rich.progress.Progress.advance", interrupt)
    code, out, err = run(capsys, "add", "--all", tmp_path / "all", "--repo", repo)
    registered = [name for name in read_table(paths.open_repository(repo)).entries if name.startswith("n")]

    assert (130, "", True) == (code, out, 3 <= len(registered) <= 9)
    assert f"note: {len(registered)} of 9 are registered; the same command adds the others\ninterrupted\n" == err
    assert [] == checks.check(paths.open_repository(repo))


def test_plan_says_whether_all_fit_and_sets_what_it_recommends(capsys: pytest.CaptureFixture[str], repo: Path) -> None:
    """A cache of one page for two adapters, before and after --apply."""
    set_cache_pages(paths.open_repository(repo), 1)
    code, out, _ = run(capsys, "plan", "--repo", repo)

    assert code == 0
    assert "NOT all adapters fit: 2 of 1 pages" in out
    recommended = re.search(r"^recommended: lora_cache_optimal_adapter_size: (\d+ -> \d+);", out, re.MULTILINE)
    assert recommended
    assert "\nlora_cache_max_adapter_size = 8 stays; the least host cache the engine loads with: " in out

    code, out, err = run(capsys, "plan", "--repo", repo, "--apply")
    assert (0, True) == (code, err.endswith(RESTART))
    assert f"\nset lora_cache_optimal_adapter_size: {recommended[1]};" in out
    assert "\nall adapters fit: 2 of " in out, "with what was set"
    code, out, err = run(capsys, "plan", "--repo", repo, "--apply", "--json")
    assert (0, {}, "") == (code, json.loads(out)["applied"], err), "nothing is left to set"
    pages = paths.read_config(repo / "lora_resolver" / "config.pbtxt").parameters["cache_pages"]
    assert f"\nall adapters fit: 2 of {pages} pages" in run(capsys, "plan", "--repo", repo)[1]


def test_plan_answers_what_if(capsys: pytest.CaptureFixture[str], repo: Path) -> None:
    """For adapters that are not there; --apply makes room for them."""
    set_cache_pages(paths.open_repository(repo), 100)
    code, out, _ = run(capsys, "plan", "--repo", repo, "--what-if", "rank=16,count=200")

    assert code == 0
    assert ["pirate", "haiku"] == [line.split("\t")[0] for line in out.splitlines()[1:3]][::-1]
    assert "NOT all adapters fit: 402 of 100 pages" in out
    run(capsys, "plan", "--repo", repo, "--what-if", "rank=16,count=200", "--apply")
    assert "\nall adapters fit: " in run(capsys, "plan", "--repo", repo, "--what-if", "rank=16,count=200")[1]


@pytest.mark.parametrize(
    "text", ["rank=16", "count=1", "rank=0,count=1", "rank=x,count=1", "16,200", "rank=1,count=1,a=1"]
)
def test_a_what_if_that_is_none_is_usage(capsys: pytest.CaptureFixture[str], repo: Path, text: str) -> None:
    """Exit code 2."""
    assert 2 == run(capsys, "plan", "--repo", repo, "--what-if", text)[0]


def test_plan_says_which_adapters_to_keep_warm(capsys: pytest.CaptureFixture[str], repo: Path, tmp_path: Path) -> None:
    """By weights, in a cache with room for one besides the one that comes and goes."""
    set_cache_pages(paths.open_repository(repo), 1)
    weights = tmp_path / "weights"
    weights.write_text("haiku: 3\npirate: 1\n")
    code, out, _ = run(capsys, "plan", "--repo", repo, "--weights", weights)

    assert code == 0
    assert "\nkeep warm: none\nload on first use: haiku, pirate\n100.0% of requests may carry weights again, " in out
    choice = json.loads(run(capsys, "plan", "--repo", repo, "--weights", weights, "--json")[1])["warm_choice"]
    assert 1.0 == choice["resend_share"]
    weights.write_text("nobody: 3")
    assert (1, "") == run(capsys, "plan", "--repo", repo, "--weights", weights)[:2]
    code, _, err = run(capsys, "plan", "--repo", repo, "--weights", "localhost:8002")
    assert (2, True) == (code, "to ask a server, give http://HOST:8002/metrics" in " ".join(err.split()))
    weights.write_bytes(b"\xff\x00")
    code, _, err = run(capsys, "plan", "--repo", repo, "--weights", weights)
    assert (1, True) == (code, f"error: '{weights}' is not text: " in err)


def test_plan_keeps_the_busy_adapters_warm(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, repo: Path
) -> None:
    """With --apply, in the cache that is applied, too; from the metrics, here through a pipe. Ids stay."""
    opened = paths.open_repository(repo)
    set_cache_pages(opened, 2)
    before = {name: entry.lora_task_id for name, entry in read_table(opened).entries.items()}
    metrics = "".join(f'lora_requests_total{{lora_name="{name}",outcome="OK"}} 5\n' for name in ("haiku", "pirate"))
    for expected in ({"haiku": True}, {}):
        monkeypatch.setattr("sys.stdin", io.StringIO(metrics))
        code, out, _ = run(capsys, "plan", repo, "--weights", "-", "--apply")
        said = "haiku is loaded at start from the server's next start on\n" if expected else ""
        assert (0, True) == (code, out.endswith(f" a request on average\n{said}"))

    table = read_table(opened)
    assert before == {name: entry.lora_task_id for name, entry in table.entries.items()}
    assert {"haiku": True, "pirate": True} == {name: entry.warm for name, entry in table.entries.items()}
    assert [] == [one for one in checks.check(opened, deep=True) if one.severity == "error"]
    registry.keep_warm(opened, ["haiku"])
    samples = protobuf(paths.read_text(opened.config_path)).model_warmup
    assert ["haiku"] == [name for name, one in read_table(opened).entries.items() if one.warm]
    assert 1 == len(samples)


def test_plan_cannot_ask_a_server_that_is_not_there(capsys: pytest.CaptureFixture[str], repo: Path) -> None:
    """One error with the address."""
    url = f"http://127.0.0.1:{free_ports().metrics}/metrics"
    code, out, err = run(capsys, "plan", repo, "--weights", url)

    assert (1, "", True) == (code, out, err.startswith(f"error: no answer from {url}: "))


def test_plan_can_be_made_from_the_base_model(capsys: pytest.CaptureFixture[str], repo: Path, tmp_path: Path) -> None:
    """Where the engine is not, its config.json stands for it."""
    opened = paths.open_repository(repo)
    shutil.copytree(opened.target_directory / "1", tmp_path / "base")
    upkeep.set_parameters(opened, {"gpt_model_path": "/nowhere"})
    code, _, err = run(capsys, "plan", "--repo", repo)

    assert (1, True) == (code, "or give the base model's directory with --base" in err)
    assert 0 == run(capsys, "plan", "--repo", repo, "--base", tmp_path / "base")[0]


def test_check_is_silent_about_nothing_and_fails_on_errors(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, repo: Path
) -> None:
    """Exit code 1 on an error; --fix."""
    free = free_ports()
    ports = ("--http-port", free.http, "--grpc-port", free.grpc, "--metrics-port", free.metrics)
    assert (0, "no problem found\n", "") == run(capsys, "check", "--repo", repo, *ports)

    (repo / "tensorrt_llm" / "warmup" / "input_ids").unlink()
    code, out, err = run(capsys, "check", "--repo", repo, *ports)

    assert code == 1
    assert out.startswith("error: warmup/input_ids: it is missing or altered")
    assert "\n  remedy: tritonlora check --fix\n" in out
    assert f"note: for these commands: export TRITONLORA_REPO={repo.resolve()}\n" == err
    monkeypatch.setenv("TRITONLORA_REPO", str(repo))
    assert (1, out, "") == run(capsys, "check", *ports)
    config = repo / "lora_router" / "config.pbtxt"
    config.write_text(config.read_text().replace("TYPE_INT32", "TYPE_INT64", 1))
    code, out, err = run(capsys, "check", "--repo", repo, "--fix", "--json", *ports)
    assert (0, "[]\n") == (code, out)
    assert err == (
        f"note: changed {config}\nnote:   input input_ids: TYPE_INT64 [-1] -> TYPE_INT32 [-1]\n"
        f"note: wrote {repo}/tensorrt_llm/warmup/input_ids\n{RESTART}"
    )
    assert (0, "[]\n", "") == run(capsys, "check", "--repo", repo, "--fix", "--json", *ports)


def test_init_shows_a_diff_and_then_says_what_it_wrote(capsys: pytest.CaptureFixture[str], repo: Path) -> None:
    """On a repository whose router is out of step."""
    config = repo / "lora_router" / "config.pbtxt"
    text = config.read_text()
    config.write_text(text.replace("TYPE_INT32", "TYPE_INT64", 1))
    code, out, _ = run(capsys, "init", repo, "--dry-run")

    assert code == 0
    assert {"-    data_type: TYPE_INT64", "+    data_type: TYPE_INT32"} <= set(out.splitlines())
    said = f"changed {config}\n  input input_ids: TYPE_INT64 [-1] -> TYPE_INT32 [-1]\n"
    assert (0, said, RESTART) == run(capsys, "init", repo)
    assert text == config.read_text()
    assert (0, "nothing to do: names lead to the engine already\n", "") == run(capsys, "init", repo)


def test_init_can_be_undone(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    """It says what it does to which file; notes go to stderr."""
    root = upstream_repository(tmp_path / "r[/bold]:x:", "v0.18.0")  # no markup
    ensemble = root / "ensemble" / "config.pbtxt"
    before = ensemble.read_bytes()
    code, out, _ = run(capsys, "init", root, "--dry-run")
    assert re.search(r"^\+\+\+ .*/r\[/bold\]:x:/lora_router/1/model\.py: new, \d+ lines$", out, re.MULTILINE)
    assert (0, True, False) == (code, '+      model_name: "lora_resolver"' in out, "+import" in out)
    code, out, err = run(capsys, "init", root)
    assert re.search(rf"^wrote {re.escape(str(root / 'lora_router'))} \(\d+ files\)$", out, re.MULTILINE)
    assert (0, True) == (
        code,
        out.endswith(
            "ensembles resolve: tokens go from the engine straight on (--topology forward: through lora_router)\n"
        ),
    )
    assert "note: 'tensorrt_llm_bls' calls 'tensorrt_llm' itself" in err
    code, out, _ = run(capsys, "init", root, "--undo", "--dry-run")
    assert (0, True, False) == (code, '-      model_name: "lora_resolver"' in out.splitlines(), "\n-import" in out)
    code, out, _ = run(capsys, "init", root, "--undo", "--json")

    assert (0, before) == (code, ensemble.read_bytes())
    assert {"path": str(ensemble), "change": "changed"} in json.loads(out)
    assert 1 == run(capsys, "init", root, "--undo")[0]
    assert 2 == run(capsys, "init", root, "--undo", "--target", "x")[0]
    assert 2 == run(capsys, "init", root, "--dry-run", "--output", tmp_path / "copy")[0]
    code, out, _ = run(capsys, "init", root, "--output", tmp_path / "copy")
    assert (0, True) == (code, f"changed {tmp_path / 'copy' / 'ensemble' / 'config.pbtxt'}\n" in out)
    assert before == ensemble.read_bytes()


def test_convert_writes_both_files(capsys: pytest.CaptureFixture[str], adapter: Path, tmp_path: Path) -> None:
    """Raw, and as .npy where numpy can say it; nothing half-written when it is refused."""
    code, out, _ = run(capsys, "convert", adapter, tmp_path / "raw")
    rows = np.fromfile(tmp_path / "raw" / "adapter_config.bin", "<i4").reshape(-1, 3)

    assert code == 0
    assert out.splitlines()[0].endswith("adapter_model.bin: bfloat16 [4, 1024]")
    assert [[1, 0, 8], [3, 0, 8], [1, 1, 8], [3, 1, 8]] == rows.tolist()

    code, _, err = run(capsys, "convert", adapter, tmp_path / "npy", "--format", "npy")
    assert (1, "error: .npy has no bfloat16") == (code, err[:27])
    assert not (tmp_path / "npy").exists()

    assert run(capsys, "convert", adapter, tmp_path / "npy", "--format", "npy", "--dtype", "float16")[0] == 0
    weights = np.load(tmp_path / "npy" / "model.lora_weights.npy")
    raw = np.fromfile(tmp_path / "raw" / "adapter_model.bin", "<u2").astype(np.uint32) << 16
    assert (np.float16, (1, 4, 1024)) == (weights.dtype, weights.shape)
    assert np.allclose(weights.reshape(-1).astype(np.float32), raw.view(np.float32), rtol=1e-3, atol=1e-6)
    assert (1, 4, 3) == np.load(tmp_path / "npy" / "model.lora_config.npy").shape


def test_convert_does_not_overwrite_an_adapter(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    """PEFT's file may have the very name."""
    adapter, other = synthetic_adapter(tmp_path / "adapter"), synthetic_adapter(tmp_path / "elsewhere" / "other", 5)
    (adapter / "adapter_model.bin").write_bytes(b"mine")
    # Its own, another's, and its own in a directory of its name, as PEFT saves what is not called "default".
    for source in (adapter, other, tmp_path):
        code, _, err = run(capsys, "convert", source, adapter)

        assert (1, True) == (code, f"{str(adapter)!r} holds a PEFT adapter (adapter_config.json), whose own w" in err)
        assert "; choose another output directory" in err
        assert (adapter / "adapter_model.bin").read_bytes() == b"mine"
    assert 0 == run(capsys, "convert", other, adapter, "--format", "npy", "--dtype", "float16")[0]


@pytest.mark.parametrize("name", ["adapter_model.bin", "adapter_config.bin"])
def test_convert_writes_both_files_or_none(
    name: str, capsys: pytest.CaptureFixture[str], adapter: Path, tmp_path: Path
) -> None:
    """Where one cannot be written, the other is what it was."""
    out = tmp_path / "out"
    (out / name).mkdir(parents=True)
    code, _, err = run(capsys, "convert", adapter, out)

    assert (1, True) == (code, f"{name}' is a directory; choose another output directory" in err)
    assert [out / name] == list(out.iterdir())


def test_convert_that_is_stopped_leaves_no_files_of_two_adapters(
    adapter: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """After the first file has got its name, for good."""
    other = synthetic_adapter(tmp_path / "other", 5)
    out = tmp_path / "out"
    commands.main(["convert", str(adapter), str(out)])

    def publish_and_stop(temporary: Path, path: Path, **options: Any) -> None:
        publish(temporary, path, **options)
        raise SystemExit

    monkeypatch.setattr("tritonlora.conversion.convert.publish", publish_and_stop)
    commands.main(["convert", str(other), str(out)])

    assert ["adapter_model.bin"] == [path.name for path in out.iterdir()]


def test_convert_that_fails_makes_no_directory(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    """Whatever it was that failed."""
    names = [f"model.layers.0.self_attn.q_proj.lora_{matrix}.weight" for matrix in "AB"]
    broken = write_adapter(tmp_path / "broken", {name: torch.full((2, 2), torch.nan) for name in names})
    code, _, err = run(capsys, "convert", broken, tmp_path / "new" / "out")

    assert (1, True) == (code, "NaN or infinite" in err)
    assert not (tmp_path / "new").exists()


def test_a_path_that_the_system_refuses_is_an_error_by_name(
    capsys: pytest.CaptureFixture[str], adapter: Path, tmp_path: Path
) -> None:
    """Wherever that is noticed."""
    for arguments in ((adapter, tmp_path / ("x" * 300)), (tmp_path / ("x" * 300), tmp_path / "out")):
        code, _, err = run(capsys, "convert", *arguments)

        assert (1, True, False) == (code, "File name too long" in err, "Traceback" in err)


def test_serve_prints_the_command_that_it_would_run(capsys: pytest.CaptureFixture[str], repo: Path) -> None:
    """With the arguments after -- at the end."""
    code, out, _ = run(
        capsys, "serve", "--repo", repo, "--print-command", "--http-port", "9000", "--", "--log-verbose=1"
    )

    assert code == 0
    assert f"--model-repository={repo}" in out
    assert "--http-port=9000" in out
    assert re.search(r" --backend-config=python,shm-region-prefix-name=tritonlora_ ", out)
    assert out.endswith(" --log-verbose=1\n")


def test_the_command_that_serve_prints_has_no_relative_path(
    capsys: pytest.CaptureFixture[str], repo: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A unit of systemd runs it elsewhere."""
    monkeypatch.chdir(repo.parent)

    assert f"--model-repository={repo}" in run(capsys, "serve", repo.name, "--print-command")[1]


EXPLICIT, BOTH = ["--model-control-mode=explicit"], ["lora_router", "tensorrt_llm"]


@pytest.mark.parametrize(
    ("topology", "words", "loaded"),
    [
        ("forward", [*EXPLICIT, "--load-model=ensemble"], ["ensemble", "tensorrt_llm"]),
        ("forward", ["--model-control-mode", "explicit", "--load-model", "lora_router"], ["tensorrt_llm"]),
        ("forward", [*EXPLICIT, *(f"--load-model={one}" for one in BOTH)], BOTH),
        ("forward", [*EXPLICIT, "--load-model=*"], ["*"]),
        ("forward", [*EXPLICIT, "--load-model=preprocessing"], ["preprocessing"]),
        ("forward", EXPLICIT, []),
        ("forward", ["--load-model=ensemble"], ["ensemble"]),
        ("resolve", [*EXPLICIT, "--load-model=ensemble"], ["ensemble"]),
        ("resolve", [*EXPLICIT, "--load-model=lora_resolver"], ["lora_resolver", "tensorrt_llm"]),
    ],
)  # fmt: skip
def test_in_explicit_mode_the_engine_is_loaded_with_the_models_that_ask_it(
    capsys: pytest.CaptureFixture[str], repo: Path, topology: str, words: list[str], loaded: list[str]
) -> None:
    """Triton knows the models that an ensemble names, and none that a model asks by BLS."""
    init.init(repo, topology=topology)
    _, out, _ = run(capsys, "serve", repo, "--print-command", "--", *words)

    assert loaded == re.findall(r"--load-model=(\S+)", out.replace("'", ""))


@pytest.mark.parametrize(
    ("words", "remedies"),
    [
        (["--http-port=9000"], ["'--http-port': give --http-port before the --"]),
        (["--grpc-port", "9"], ["'--grpc-port': give --grpc-port before the --"]),
        (["--metrics-address=::"], ["'--metrics-address': give --address before the --"]),
        (["--model-repository=s3://bucket"], ["'--model-repository': adapters lie in the repository that has lora_r"]),
        (["--model-control-mode=poll"], ["'--model-control-mode' poll: Triton would load a second engine beside"]),
        (["--model-control-mode", "poll"], ["leave it out, as new adapters are served without it"]),
        (
            ["--allow-http=false", "--http-address=::"],
            ["'--allow-http': leave it out", "'--http-address': give --addr"],
        ),
    ],
)
def test_serve_refuses_to_tell_tritonserver_what_it_must_know_itself(
    capsys: pytest.CaptureFixture[str], repo: Path, words: list[str], remedies: list[str]
) -> None:
    """It would wait at its own port forever."""
    code, out, err = run(capsys, "serve", "--repo", repo, "--print-command", "--", "--log-verbose=1", *words)

    assert (1, "") == (code, out)
    assert [True] * len(remedies) == [remedy in err for remedy in remedies]
    assert "log-verbose" not in err


def test_serve_starts_nothing_where_triton_would_keep_responses(capsys: pytest.CaptureFixture[str], repo: Path) -> None:
    """Each file is named, with what to do; a config that cannot be read is left to Triton."""
    for model in ("ensemble", "lora_router", "preprocessing"):
        with (repo / model / "config.pbtxt").open("a") as config:
            config.write("response_cache { enable: true }\n")
    (repo / "postprocessing" / "config.pbtxt").write_text('name: "')
    for words in ([], ["--print-command"]):
        code, out, err = run(capsys, "serve", "--repo", repo, *words)

        assert (1, "") == (code, out)
        assert "response_cache is on. Triton's response cache keeps an error as an empty success" in err
        assert [f"{model}/config.pbtxt: take response_cache out of it" for model in ("ensemble", "lora_router")] == [
            line.strip() for line in err.splitlines()[1:]
        ]


@pytest.mark.parametrize("address", ["192.0.2.1", "2001:db8::1", "no such host", "a..b"])
def test_serve_says_where_it_cannot_listen(capsys: pytest.CaptureFixture[str], repo: Path, address: str) -> None:
    """An address of nobody, or a name of none: that is no port in use."""
    code, out, err = run(capsys, "serve", "--repo", repo, "--address", address)

    assert (1, "") == (code, out)
    assert f"error: cannot listen at {address}" in err.replace("[", "").replace("]", "")
    assert "give --address an address of this machine" in err


@pytest.mark.parametrize("option", ["--grpc-port", "--openai-port"])
def test_serve_names_the_port_that_is_taken(capsys: pytest.CaptureFixture[str], repo: Path, option: str) -> None:
    """Before any model is loaded, and with its option."""
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        words = [word for one, free in free_ports().by_option.items() if one != option for word in (one, free)]
        code, out, err = run(capsys, "serve", repo, *words, option, port, "--ready-timeout", 0)

    assert (1, "") == (code, out)
    assert f"error: in use already: port {port} ({option}); stop what listens there, or give another port\n" == err


def test_serve_looks_a_name_up(capsys: pytest.CaptureFixture[str], repo: Path) -> None:
    """As tritonserver does not: it would listen nowhere."""
    _, out, _ = run(capsys, "serve", "--repo", repo, "--address", "localhost", "--print-command")

    assert "-address=localhost" not in out
    assert "--grpc-address=127.0.0.1" in out or "--grpc-address='[::1]'" in out


def test_generate_without_a_server_says_so(capsys: pytest.CaptureFixture[str]) -> None:
    """Exit code 1, with the address."""
    code, _, err = run(capsys, "generate", "hello", "--url", "127.0.0.1:9")

    assert code == 1
    assert "no answer from 127.0.0.1:9" in err


@pytest.mark.parametrize("url", ["host:port", "ftp://a", ":::"])
def test_a_url_that_is_none_is_refused(capsys: pytest.CaptureFixture[str], url: str) -> None:
    """Before anything is sent."""
    code, _, err = run(capsys, "generate", "hello", "--url", url)

    assert code == 1
    assert f"{url!r} is not HOST:PORT" in err


def test_the_module_can_be_run(repo: Path) -> None:
    """python -m tritonlora, with its exit codes."""
    command = [sys.executable, "-m", "tritonlora", "list", "--repo", str(repo / "nowhere")]
    done = subprocess.run(command, capture_output=True, text=True, check=False)

    assert (1, "") == (done.returncode, done.stdout)


STRICT = {**os.environ, "PYTHONIOENCODING": "utf-8:strict"}


def test_a_name_that_is_no_text_is_written_with_escapes(adapter: Path, tmp_path: Path) -> None:
    """Also where stdout takes nothing but UTF-8: by then the files are there."""
    command = [sys.executable, "-m", "tritonlora", "convert", str(adapter), f"{tmp_path}/\udcff"]
    done = subprocess.run(command, capture_output=True, check=False, env=STRICT)

    assert (0, b"note: layers were taken for") == (done.returncode, done.stderr[:27])
    assert rb"/\udcff/adapter_model.bin: bfloat16" in done.stdout


@pytest.mark.parametrize("command", ["add", "convert"])
def test_ctrl_c_while_torch_is_imported_counts_after_it(
    repo: Path, adapter: Path, tmp_path: Path, command: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In its midst, some of torch's modules swallow it, and others are left half-imported."""
    imported: list[str] = []
    original = builtins.__import__

    def interrupted(name: str, *arguments: Any, **options: Any) -> Any:
        if name == "torch" and not imported:
            signal.raise_signal(signal.SIGINT)
            imported.append(name)
        return original(name, *arguments, **options)

    monkeypatch.setattr(builtins, "__import__", interrupted)
    arguments = {"add": ["new", str(adapter), "--repo", str(repo)], "convert": [str(adapter), str(tmp_path / "out")]}
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        code = commands.main([command, *arguments[command]])
    finally:
        signal.signal(signal.SIGINT, before)

    assert (130, ["torch"]) == (code, imported)
    assert not (tmp_path / "out").exists()


def test_the_first_column_of_a_table_is_whole_on_a_narrow_terminal(monkeypatch: pytest.MonkeyPatch) -> None:
    """It is the name, which a user copies."""
    printed = io.StringIO()
    monkeypatch.setattr(output, "stdout", Console(width=40, force_terminal=True, file=printed))
    name = "a-name-of-28-characters-long"
    output.print_table(("lora_name", *"abcd"), [(name, *["modules,and,more"] * 4)])

    assert name in printed.getvalue()


@pytest.mark.parametrize(
    ("width", "name", "expected"),
    [
        (60, "support", ["lora_name  id  modules", "support    3   attn_q, mlp_4h_to_h,", f"{'':15}attn_dense"]),
        (80, "support" * 9, [*["support" * 9], "  id: 3", "  modules: attn_q,mlp_4h_to_h,attn_dense"]),
    ],
)
def test_a_table_fits_the_terminal_and_leaves_out_what_is_empty(
    monkeypatch: pytest.MonkeyPatch, width: int, name: str, expected: list[str]
) -> None:
    """As columns, whose lists wrap; or as blocks of lines where a name is too long for that. Nothing is cut off."""
    printed = io.StringIO()
    monkeypatch.setattr(output, "stdout", Console(width=width, force_terminal=True, color_system=None, file=printed))
    modules = "attn_q,mlp_4h_to_h,attn_dense"
    row = (name, "3", modules, "8.0 KiB", "on first use", "")
    output.print_table(("lora_name", "lora_task_id", "modules", "size", "start", "aliases"), [row])
    lines = printed.getvalue().splitlines()

    assert expected == [line[: len(start)] for line, start in zip(lines, expected, strict=False)]
    assert max(map(len, lines)) <= width
    assert {name, *modules.split(","), "8.0", "KiB", "on", "first", "use"} <= {
        *re.split(r"[\s,:]+", printed.getvalue())
    }
    assert "aliases" not in printed.getvalue()


def test_shipped_files_are_read_in_any_locale(tmp_path: Path) -> None:
    """They are UTF-8, whatever the locale says of files."""
    root = upstream_repository(tmp_path / "repo", "v0.18.0")
    command = [sys.executable, "-m", "tritonlora", "init", str(root)]
    ascii_only = {**os.environ, "LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0"}
    done = subprocess.run(command, capture_output=True, check=False, env=ascii_only)

    assert 0 == done.returncode, done.stderr
    assert [] == init.plan_init(root)


def test_a_prompt_that_is_no_text_is_refused() -> None:
    """Where it comes from standard input."""
    command = [sys.executable, "-m", "tritonlora", "generate", "-"]
    done = subprocess.run(command, input=b"\xff", capture_output=True, check=False, env=STRICT)

    assert (1, True) == (done.returncode, done.stderr.startswith(b"error: '<stdin>' is not text: "))


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [("list >&-", (0, "")), ("generate --url 127.0.0.1:9 - <&-", (1, "error: no answer from 127.0.0.1:9"))],
)
def test_a_stream_that_is_closed_is_dev_null(repo: Path, arguments: str, expected: tuple[int, str]) -> None:
    """Python has none in its place."""
    environment = {**os.environ, "TRITONLORA_REPO": str(repo)}
    command = f"exec {sys.executable} -m tritonlora {arguments}"
    done = subprocess.run(["sh", "-c", command], capture_output=True, text=True, check=False, env=environment)

    assert expected == (done.returncode, done.stderr.partition(": Connection refused")[0])


def test_list_does_not_import_torch(repo: Path) -> None:
    """It has to answer at once."""
    code = f"""
import sys
from tritonlora.cli.commands import main
assert main(["list", "--repo", {str(repo)!r}]) == 0
assert not {{"torch", "transformers", "tritonclient"}} & set(sys.modules)
"""
    assert subprocess.run([sys.executable, "-c", code], check=False, stdout=subprocess.DEVNULL).returncode == 0


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_an_interrupted_add_leaves_everything_as_it_was(repo: Path, tmp_path: Path, number: signal.Signals) -> None:
    """Exit code 130, and no half-written file; stopped while it waits for the lock, which comes before it writes."""
    import filelock

    adapter = synthetic_adapter(tmp_path / "adapter", 3)
    before = sorted(repo.rglob("*"))
    with filelock.FileLock(repo / "lora_router" / ".lock"):
        process = subprocess.Popen(
            [sys.executable, "-m", "tritonlora", "add", "new", str(adapter), "--repo", str(repo)],
            stderr=subprocess.PIPE,
            text=True,
        )
        assert process.stderr
        assert process.stderr.readline().startswith("waiting for another tritonlora")
        process.send_signal(number)
        _, err = process.communicate(timeout=30)

    assert (130, "interrupted") == (process.returncode, err.splitlines()[-1])
    assert before == sorted(repo.rglob("*"))


@pytest.mark.parametrize("number", ENDING)
def test_ctrl_c_while_the_command_line_is_imported_is_no_traceback(tmp_path: Path, number: signal.Signals) -> None:
    """The first tenth of a second."""
    (tmp_path / "typer.py").write_text(f"import signal; signal.raise_signal({int(number)})")
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(tmp_path), *sys.path])}
    command = [sys.executable, "-m", "tritonlora", "--version"]
    done = subprocess.run(command, capture_output=True, text=True, check=False, env=environment)

    assert (130, "", "") == (done.returncode, done.stdout, done.stderr)


@pytest.mark.parametrize("when", ["atexit.register(signal.raise_signal, signal.SIGINT)", "last = Last()"])
def test_ctrl_c_when_all_is_done_is_no_traceback(when: str) -> None:
    """Nor a second one, which comes when the first has been dealt with; nor when Python has let go of its handlers."""
    code = f"""
import atexit, signal, sys
from tritonlora import __main__
from tritonlora.cli import commands

class Last:
    def __del__(self, raise_signal=signal.raise_signal, number=signal.SIGINT):
        raise_signal(number)

commands.app = lambda _: signal.raise_signal(signal.SIGINT)
{when}
sys.exit(__main__.main())
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)

    assert (130, "interrupted\n") == (done.returncode, done.stderr)


def test_the_command_is_the_module() -> None:
    """`tritonlora` is `python -m tritonlora`, which is what the tests run."""
    project = (Path(__file__).parents[2] / "pyproject.toml").read_text()

    assert '\ntritonlora = "tritonlora.__main__:main"\n' in project


def test_the_geometry_of_the_tests_is_the_shipped_one() -> None:
    """repositories.py reads what install copies."""
    shipped = shipped_models() / "tensorrt_llm" / "1" / "config.json"

    assert json.loads(shipped.read_text()) == SYNTHETIC_GEOMETRY
