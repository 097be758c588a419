# SPDX-FileCopyrightText: the tritonlora authors
# SPDX-License-Identifier: Apache-2.0
"""hf://: huggingface_hub against a small server of the hub's API, in a process of its own."""

from __future__ import annotations

import json
import logging
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import huggingface_hub
import pytest

from repositories import synthetic_adapter
from source_server import TOKEN, SourceServer, running
from tritonlora.errors import SourceError
from tritonlora.peft.adapter import load_adapter
from tritonlora.sources.fetch import fetched, pinned, resolved
from tritonlora.sources.policy import Policy

WEIGHTS = "adapter_model.safetensors"
TEMPLATE = "chat_template.jinja"
FIRST, SECOND = "1" * 40, "2" * 40


@pytest.fixture(scope="module")
def served(tmp_path_factory: pytest.TempPathFactory) -> Iterator[SourceServer]:
    """A hub with an adapter in two commits, in folders, in private and gated repositories, and a whole model."""
    root = tmp_path_factory.mktemp("hub")
    for name in ("pirate", "pirate-private", "pirate-gated"):
        repository = root / "hub" / "org" / name
        for number, commit in enumerate((FIRST, SECOND)):
            synthetic_adapter(repository / commit, number)
            (repository / commit / "optimizer.pt").write_bytes(bytes(10_000))
            (repository / commit / TEMPLATE).write_text(f"template {number}")
            synthetic_adapter(repository / commit / "checkpoint-10" / "last", number + 5)
        (repository / "refs.json").write_text(json.dumps({"main": SECOND, "v1": FIRST, "refs/pr/1": FIRST}))
    model = root / "hub" / "org" / "model"
    (model / FIRST).mkdir(parents=True)
    (model / FIRST / "model.safetensors").write_bytes(b"x")
    (model / "refs.json").write_text(json.dumps({"main": FIRST}))
    folders = root / "hub" / "org" / "folders"
    for folder in ("a", "b/c"):
        synthetic_adapter(folders / FIRST / folder)
    (folders / "refs.json").write_text(json.dumps({"main": FIRST}))
    with running(root) as server:
        yield server


@pytest.fixture
def hub(served: SourceServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> SourceServer:
    """The hub, with an empty cache."""
    monkeypatch.setenv("HF_ENDPOINT", served.url)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_DOWNLOAD_TIMEOUT", 1)
    for variable in ("HF_TOKEN", "HUGGING_FACE_HUB_TOKEN"):
        monkeypatch.delenv(variable, raising=False)
    monkeypatch.setattr(huggingface_hub.constants, "HF_TOKEN_PATH", str(tmp_path / "token"))
    served.fault()
    served.requests()
    return served


def enter(*arguments: Any, **options: Any) -> None:
    """Fetch an adapter, and do nothing with it."""
    with fetched(*arguments, **options):
        pass


@pytest.mark.parametrize(
    ("text", "commit", "folder"),
    [
        ("hf://org/pirate", SECOND, ""),
        ("hf://org/pirate@v1", FIRST, ""),
        (f"hf://org/pirate@{FIRST}", FIRST, ""),
        ("hf://org/pirate@refs/pr/1/checkpoint-10/last", FIRST, "checkpoint-10/last"),
    ],
)
def test_an_adapter_comes_from_the_hub_pinned_to_its_commit(
    hub: SourceServer, text: str, commit: str, folder: str
) -> None:
    """Only the files that it needs, with its chat template. The second time none is sent; offline, nothing is asked."""
    seen: dict[str, int] = {}
    original = hub.root / "hub" / "org" / "pirate" / commit / folder
    with fetched(text, on_progress=lambda file, done, _: seen.update({file: done})) as first:
        assert pinned(original).source.sha256 == first.source.sha256
        assert (text, commit) == (first.source.location, first.source.revision)
        assert 4 == len(load_adapter(first.directory).modules)
    names = ("adapter_config.json", WEIGHTS, *(() if folder else (TEMPLATE,)))
    assert {name: (original / name).stat().st_size for name in names} == seen
    assert {*names} == {one["path"].rpartition("/")[2] for one in hub.requests() if "/resolve/" in one["path"]}
    with fetched(text) as again:
        assert first.source == again.source
    assert not [one for one in hub.requests() if one["method"] == "GET" and "/resolve/" in one["path"]]
    assert (text, commit) == resolved(text)
    hub.requests()
    assert (text, commit) == resolved(text, Policy(offline=True))
    with fetched(text, Policy(offline=True)) as offline:
        assert first.source == offline.source
    assert [] == hub.requests()


def test_a_private_repository_opens_with_the_hub_s_own_token(
    hub: SourceServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    """HF_TOKEN is sent, and is in no error."""
    with pytest.raises(SourceError, match="hf://org/pirate-private: it does not exist, or is private; .* set HF_TOKEN"):
        enter("hf://org/pirate-private")
    monkeypatch.setenv("HF_TOKEN", TOKEN)
    hub.requests()
    enter("hf://org/pirate-private")
    assert {f"Bearer {TOKEN}"} == {one["Authorization"] for one in hub.requests()}


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("hf://org/nowhere", "it does not exist, or is private; look for a misspelling, or set HF_TOKEN"),
        ("hf://org/pirate-gated", "access to it is gated; ask for it on its page, and set HF_TOKEN"),
        ("hf://org/pirate@v9", "it has no revision 'v9'; look for a misspelling"),
        ("hf://org/model", "there is no adapter_config.json in it; give a PEFT adapter's repository"),
        ("hf://org/folders", "give one: hf://org/folders/a, hf://org/folders/b/c"),
        ("hf://org/folders/b", "give one: hf://org/folders/b/c"),
    ],
)
def test_what_is_not_there_is_named(hub: SourceServer, tmp_path: Path, text: str, message: str) -> None:
    """Nothing is left of it but what huggingface_hub notes."""
    with pytest.raises(SourceError, match=f"^{text}: .*{message}"):
        enter(text)
    assert [] == [*(tmp_path / "cache").glob("**/snapshots/*")]


def test_a_bare_name_gets_the_hint(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Unless there is such a directory."""
    monkeypatch.chdir(tmp_path)
    with pytest.raises(
        SourceError, match="there is no such directory; for the repository of the hub, give hf://org/pirate"
    ):
        enter("org/pirate")
    synthetic_adapter(tmp_path / "org" / "pirate")
    enter("org/pirate")


@pytest.mark.parametrize(
    ("fault", "message"),
    [
        (
            {"corrupt": True},
            rf"{WEIGHTS} came with the digest [0-9a-f]+, expected [0-9a-f]+, as the hub says; try again",
        ),
    ],
)
def test_a_lying_hub_is_found_out(hub: SourceServer, tmp_path: Path, fault: dict[str, Any], message: str) -> None:
    """What is wrong does not stay in the cache: the next command gets the right file."""
    hub.fault(**{f"resolve/{SECOND}/{WEIGHTS}": fault})
    with pytest.raises(SourceError, match=f"hf://org/pirate: .*({message})"):
        enter("hf://org/pirate")
    assert WEIGHTS not in {path.name for path in (tmp_path / "cache").rglob("*")}
    hub.fault()
    enter("hf://org/pirate")


@pytest.mark.parametrize(
    ("status", "message"), [(418, "status 418; try again later"), (403, "status 403; set HF_TOKEN")]
)
def test_a_hub_that_does_not_answer_rightly_is_named(hub: SourceServer, status: int, message: str) -> None:
    """With the status alone."""
    hub.fault(**{"api/models": {"status": status}})
    with pytest.raises(SourceError, match=f"hf://org/pirate: the hub .*{message}"):
        enter("hf://org/pirate")


def test_a_corrupted_config_is_found_by_git_s_digest(hub: SourceServer) -> None:
    """Small files have no SHA-256 on the hub."""
    hub.fault(**{"adapter_config.json": {"corrupt": True}})
    with pytest.raises(
        SourceError, match="adapter_config.json came with the digest [0-9a-f]{40}, expected [0-9a-f]{40},"
    ):
        enter("hf://org/pirate")


def test_an_interrupted_download_goes_on(hub: SourceServer, monkeypatch: pytest.MonkeyPatch) -> None:
    """By huggingface_hub itself, whose warnings, which hold URLs, are not printed."""
    said: list[logging.LogRecord] = []
    monkeypatch.setattr(logging.getLogger("huggingface_hub"), "handle", said.append)
    monkeypatch.setattr(logging.getLogger("huggingface_hub.file_download"), "handle", said.append)
    hub.fault(**{f"resolve/{SECOND}/{WEIGHTS}": {"cut": 5000, "times": 2}})
    with fetched("hf://org/pirate") as found:
        assert pinned(hub.root / "hub" / "org" / "pirate" / SECOND).source.sha256 == found.source.sha256
    asked = [one for one in hub.requests() if one["method"] == "GET" and one["path"].endswith(WEIGHTS)]
    assert 2 == len(asked)
    assert [] == [record.getMessage() for record in said]


def test_a_hub_that_is_not_there_is_named(hub: SourceServer, monkeypatch: pytest.MonkeyPatch) -> None:
    """What is cached is taken only where the user says so: the branch may have moved."""
    enter("hf://org/pirate")
    monkeypatch.setenv("HF_ENDPOINT", "http://127.0.0.1:1")
    with pytest.raises(SourceError, match=r"hf://org/pirate: the hub cannot be reached; .* or give --offline"):
        enter("hf://org/pirate")
    enter("hf://org/pirate", Policy(offline=True))
    with pytest.raises(SourceError, match="hf://org/pirate@v1: it is not in the hub's cache on this machine"):
        enter("hf://org/pirate@v1", Policy(offline=True))


def test_files_that_repositories_share_in_the_cache_are_read(hub: SourceServer, tmp_path: Path) -> None:
    """huggingface_hub 2 keeps them beside the repositories, and links to them from there; a folder is deeper."""
    enter("hf://org/pirate@v1/checkpoint-10/last")
    snapshot = tmp_path / "cache" / "models--org--pirate" / "snapshots" / FIRST / "checkpoint-10" / "last"
    blob = (snapshot / WEIGHTS).resolve()
    shared = tmp_path / "cache" / "blobs" / "ab" / ("ab" * 32)
    shared.parent.mkdir(parents=True)
    shutil.move(blob, shared)
    blob.symlink_to(shared)

    assert 4 == len(load_adapter(snapshot).modules)
