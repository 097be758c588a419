# SPDX-FileCopyrightText: the tritonlora authors
# SPDX-License-Identifier: Apache-2.0
"""`add` and `list` with sources that are not directories."""

from __future__ import annotations

import hashlib
import importlib.util
import json
import shutil
import signal
from collections.abc import Iterator
from importlib.machinery import ModuleSpec
from pathlib import Path
from typing import Any

import pytest

from repositories import synthetic_adapter
from source_server import SourceServer, running
from tritonlora.cli import commands, output
from tritonlora.repository import init
from tritonlora.sources import download

NO_RESTART = f"note: {output.NO_RESTART}\n"


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[SourceServer]:
    """A web server."""
    with running(tmp_path_factory.mktemp("web")) as found:
        (found.root / "web").mkdir()
        yield found


@pytest.fixture(scope="module")
def empty(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The shipped repository."""
    root = tmp_path_factory.mktemp("sources") / "repo"
    init.create_repository(root)
    return root


@pytest.fixture
def repo(empty: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A copy of it, and a cache; the handlers that main() installs go away."""
    monkeypatch.setenv(download.CACHE_VARIABLE, str(tmp_path / "cache"))
    monkeypatch.setenv("TRITONLORA_REPO", str(tmp_path / "repo"))
    before = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)}
    yield Path(shutil.copytree(empty, tmp_path / "repo"))
    for number, handler in before.items():
        signal.signal(number, handler)


def run(capsys: pytest.CaptureFixture[str], *arguments: object) -> tuple[int, str, str]:
    """(exit code, stdout, stderr) of a command."""
    code = commands.main([str(argument) for argument in arguments])
    captured = capsys.readouterr()
    return code, captured.out, captured.err


def archive(server: SourceServer, directory: Path, seed: int) -> str:
    """Put an archive of an adapter on the server; the beginning of its ETag, as it is printed."""
    path = shutil.make_archive(str(server.root / "web" / "pirate"), "zip", synthetic_adapter(directory, seed))
    return f'"{hashlib.md5(Path(path).read_bytes(), usedforsecurity=False).hexdigest()}"'[:12]


def test_add_says_where_an_adapter_is_from_and_whether_that_has_moved(
    capsys: pytest.CaptureFixture[str], repo: Path, server: SourceServer, tmp_path: Path
) -> None:
    """The secrets of its URL are nowhere."""
    url = f"{server.url}/web/pirate.zip"
    secret = f"{url.replace('http://', 'http://user:sesame@')}?token=sesame"
    first = archive(server, tmp_path / "one", 1)
    said = [run(capsys, "add", "pirate", secret), run(capsys, "add", "pirate", secret)]
    second = archive(server, tmp_path / "two", 2)
    said += [run(capsys, "add", "pirate", secret), run(capsys, "list"), run(capsys, "list", "--json")]

    assert [
        (0, f"pirate added: lora_task_id 1, 8.0 KiB; from {url} ({first})\n", NO_RESTART),
        (0, f"pirate is unchanged: lora_task_id 1, 8.0 KiB; {url} is still at {first}\n", ""),
        (
            0,
            f"pirate replaced: lora_task_id 1 -> 2, 8.0 KiB; {url} has moved from {first} to {second}\n",
            NO_RESTART,
        ),
    ] == said[:3]
    assert f"\t{url} ({second})\t" in said[3][1]
    assert (url, True) == (
        json.loads(said[4][1])["pirate"]["source"]["location"],
        json.loads(said[4][1])["pirate"]["source"]["revision"].startswith(second),
    )
    assert "sesame" not in str(said)
    for path in (*repo.rglob("*"), *(tmp_path / "cache").rglob("*")):
        assert not path.is_file() or b"sesame" not in path.read_bytes()


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["org/pirate"], "there is no such directory; for the repository of the hub, give hf://org/pirate"),
        (
            ["{url}", "--allow-source", "hf://org"],
            "pirate.zip is not a source that --allow-source allows; allowed: hf://org",
        ),
        (["{url}", "--offline"], "was not downloaded on this machine before; run the command once without --offline"),
        (["http://example.com/a"], "comes over plain http, which others on the network can change"),
        (["nothing://a/b"], "there is no source nothing://"),
        (["{url}x"], "there is no adapter_config.json in it"),
    ],
)
def test_a_source_that_is_not_taken_changes_nothing(
    capsys: pytest.CaptureFixture[str], repo: Path, server: SourceServer, words: list[str], message: str
) -> None:
    """One error, exit code 1."""
    before = (repo / "lora_router" / "adapters.json").read_bytes()
    arguments = [word.format(url=f"{server.url}/web/pirate.zip") for word in words]
    code, out, err = run(capsys, "add", "pirate", *arguments)

    assert (1, "", 1) == (code, out, err.count("error:"))
    assert message in err
    assert before == (repo / "lora_router" / "adapters.json").read_bytes()


def test_a_name_is_looked_at_before_anything_is_fetched(
    capsys: pytest.CaptureFixture[str], repo: Path, server: SourceServer
) -> None:
    """A download may take an hour."""
    server.requests()
    code, _, err = run(capsys, "add", "a/b", f"{server.url}/web/pirate.zip")

    assert (1, True, []) == (code, "'a/b' is not a legal adapter name" in err, server.requests())


@pytest.mark.parametrize(
    ("source", "module", "extra"), [("hf://a/b", "huggingface_hub", "hub"), ("s3://a/b", "s3fs", "s3")]
)
def test_a_missing_extra_is_named(
    capsys: pytest.CaptureFixture[str],
    repo: Path,
    monkeypatch: pytest.MonkeyPatch,
    source: str,
    module: str,
    extra: str,
) -> None:
    """Directories and archives need none."""
    find: Any = importlib.util.find_spec

    def without(name: str, package: str | None = None) -> ModuleSpec | None:
        found: ModuleSpec | None = None if name == module else find(name, package)
        return found

    monkeypatch.setattr(importlib.util, "find_spec", without)
    code, _, err = run(capsys, "add", "pirate", source)

    assert code == 1
    assert f"pip install 'tritonlora[{extra}]'" in err
