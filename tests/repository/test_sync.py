# SPDX-FileCopyrightText: the tritonlora authors
# SPDX-License-Identifier: Apache-2.0
"""sync.py: a repository becomes what a desired state says."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

import huggingface_hub
import pytest

import faults
from repositories import synthetic_adapter, synthetic_repository
from source_server import SourceServer, running
from tritonlora.check import checks
from tritonlora.cli import commands as cli
from tritonlora.repository import add, desired_state, generated, paths, registry
from tritonlora.repository.add import Added, Refused
from tritonlora.repository.desired_state import DesiredState, WantedAdapter
from tritonlora.repository.paths import Repository, read_table
from tritonlora.repository.state import State
from tritonlora.repository.sync import apply, located, plan_sync
from tritonlora.serving.adapter_table import AdapterTable, with_entry
from tritonlora.serving.adapter_table_json import render
from tritonlora.sources.fetch import fetched
from tritonlora.sources.policy import Policy


@pytest.fixture(scope="module")
def adapters(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Three adapters' directories."""
    directory = tmp_path_factory.mktemp("adapters")
    return {name: synthetic_adapter(directory / name, seed) for seed, name in enumerate("abc")}


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory, adapters: dict[str, Path]) -> Path:
    """A repository with pirate (a) and haiku (b), and the alias prod of pirate."""
    opened = synthetic_repository(tmp_path_factory.mktemp("sync") / "repo", topology="resolve")
    for name, source in (("pirate", "a"), ("haiku", "b")):
        with fetched(str(adapters[source])) as found:
            add.add(opened, name, found)
    registry.alias(opened, "prod", "pirate")
    return opened.root


@pytest.fixture
def opened(base: Path, tmp_path: Path) -> Repository:
    """A copy of it."""
    return paths.open_repository(Path(shutil.copytree(base, tmp_path / "repo")))


@pytest.fixture
def wanted(adapters: dict[str, Path]) -> Callable[..., DesiredState]:
    """`wanted(pirate="a", …)`: a desired state with adapters from these directories, and prod leading to pirate."""

    def state(aliases: dict[str, dict[str, int]] | None = None, **sources: str) -> DesiredState:
        found = {name: WantedAdapter(str(adapters.get(source, source))) for name, source in sources.items()}
        return DesiredState(found, {"prod": {"pirate": 100}} if aliases is None else aliases)

    return state


def contents(root: Path) -> dict[str, tuple[int, bytes]]:
    """Every file of a repository, with its inode, which another one has that replaces it."""
    files = (path for path in root.rglob("*") if path.is_file() and path.name != ".lock")
    return {str(path.relative_to(root)): (path.stat().st_ino, path.read_bytes()) for path in files}


def ids(table: AdapterTable) -> dict[str, int]:
    """The lora_task_id of each adapter."""
    return {name: entry.lora_task_id for name, entry in table.entries.items()}


def sync(opened: Repository, desired: DesiredState, *, prune: bool = False) -> list[Added | Refused]:
    """Plan and apply."""
    return apply(opened, plan_sync(opened, desired, prune=prune))


def test_what_is_as_it_should_be_is_not_touched(opened: Repository, wanted: Callable[..., DesiredState]) -> None:
    """No byte is written. The file that `export` writes asks for no change, either."""
    before = contents(opened.root)
    exported = desired_state.parse(desired_state.render(read_table(opened)).encode())
    for desired in (
        wanted(pirate="a", haiku="b"),
        exported,
        replace(exported, adapters={"haiku": WantedAdapter(None)}),
    ):
        plan = plan_sync(opened, desired)

        assert [] == [*plan.changes()]
        assert [] == apply(opened, plan)
    assert before == contents(opened.root)


def test_adapters_and_aliases_change_together(
    opened: Repository, wanted: Callable[..., DesiredState], monkeypatch: pytest.MonkeyPatch
) -> None:
    """One is new, one has other content and a new id, one is no longer warm. The table is written once."""
    written: list[AdapterTable] = []
    write = generated.write

    def noted(state: State, table: AdapterTable, files: generated.Rendered | None) -> State:
        written.append(table)
        return write(state, table, files)

    monkeypatch.setattr(generated, "write", noted)
    desired = wanted({"prod": {"pirate": 90, "new": 10}, "old": {"pirate": 100}}, pirate="c", new="b", haiku="b")
    desired = replace(desired, adapters={**desired.adapters, "haiku": WantedAdapter(None, warm=False)})
    results = sync(opened, desired)
    table = read_table(opened)

    assert {"pirate", "new"} == {one.name for one in results if isinstance(one, Added)}
    assert [table] == written
    assert {"haiku": 2, "pirate": 3, "new": 4} == ids(table)
    assert {"haiku": False, "pirate": True, "new": True} == {name: one.warm for name, one in table.entries.items()}
    assert desired.aliases == table.aliases
    assert [] == [one for one in checks.check(opened, deep=True) if one.severity == "error"]
    assert [] == [*plan_sync(opened, desired).changes()]


def test_what_is_not_in_the_file_is_removed_only_when_asked(
    opened: Repository, wanted: Callable[..., DesiredState]
) -> None:
    """With its aliases, and from under an alias that leads elsewhere from now on."""
    desired = wanted({"prod": {"haiku": 100}}, haiku="b")
    plan = plan_sync(opened, desired)

    assert ("pirate",) == plan.unmanaged
    assert ["prod"] == [one.name for one in plan.changes()]
    assert [] == sync(opened, desired, prune=True)
    assert ({"haiku": 2}, (1,)) == (ids(read_table(opened)), read_table(opened).retired_lora_task_ids)
    assert [] == sync(opened, DesiredState(), prune=True)
    assert AdapterTable({}, 3, (1, 2)) == read_table(opened)


def test_a_bad_adapter_stops_no_other(
    opened: Repository, wanted: Callable[..., DesiredState], adapters: dict[str, Path], tmp_path: Path
) -> None:
    """An alias that should lead to it stays as it is, and so does the adapter that the alias leads to."""
    cut = Path(shutil.copytree(adapters["c"], tmp_path / "cut"))
    (cut / "adapter_model.safetensors").write_bytes(b"")
    absent = str(tmp_path / "org" / "name")
    aliases = {"prod": {"new": 50, "cut": 50}, "fresh": {"new": 100}, "lost": {"absent": 100}, "cut2": {"cut": 100}}
    desired = wanted(aliases, new="c", cut=str(cut), absent=absent, unknown="")
    desired = replace(desired, adapters={**desired.adapters, "unknown": WantedAdapter(None)})
    results = sync(opened, desired, prune=True)
    refused = {one.name: one.error for one in results if isinstance(one, Refused)}

    assert {"cut", "absent", "unknown", "prod", "lost", "cut2", "pirate"} == refused.keys()
    assert f"there is nothing at {absent!r}; for the Hugging Face hub write hf://org/name" == refused["absent"]
    assert "it is not registered, and has no source here; give its source" == refused["unknown"]
    assert "it leads to 'absent', which is not registered" == refused["lost"]
    assert "it leads to 'cut', which is not registered" == refused["cut2"] == refused["prod"]
    assert "'pirate' has aliases: prod" in refused["pirate"]
    assert {"pirate": 1, "new": 3} == ids(read_table(opened))
    assert {"prod": {"pirate": 100}, "fresh": {"new": 100}} == read_table(opened).aliases


def test_the_same_content_from_another_place_keeps_its_id(
    opened: Repository, wanted: Callable[..., DesiredState], adapters: dict[str, Path], tmp_path: Path
) -> None:
    """The table notes the new place; nothing is converted."""
    moved = Path(shutil.copytree(adapters["a"], tmp_path / "moved"))
    desired = wanted(pirate=str(moved))
    plan = plan_sync(opened, desired)

    assert {} == plan.to_convert
    assert [("change", "pirate")] == [(one.action, one.name) for one in plan.changes()]
    assert [] == apply(opened, plan)
    source = read_table(opened).entries["pirate"].source
    assert (1, str(moved)) == (ids(read_table(opened))["pirate"], source.location if source else "")


def test_an_adapter_of_unknown_origin_is_compared_by_its_content(
    opened: Repository, wanted: Callable[..., DesiredState], adapters: dict[str, Path]
) -> None:
    """It keeps its id, and the table notes where it came from."""
    add.add(opened, "old", adapters["c"])
    table = read_table(opened)
    table = with_entry(table, "old", replace(table.entries["old"], source=None))  # as an older version wrote it
    opened.table_path.write_text(render(table))
    desired = wanted(pirate="a", old="c")

    assert [("change", "old")] == [(one.action, one.name) for one in plan_sync(opened, desired).changes()]
    sync(opened, desired)
    assert 3 == ids(read_table(opened))["old"]
    assert [] == [*plan_sync(opened, desired).changes()]


def test_a_file_that_was_lost_is_written_again(opened: Repository, wanted: Callable[..., DesiredState]) -> None:
    """Under the same id."""
    lost = opened.root / read_table(opened).entries["pirate"].lora_weights_file
    content = lost.read_bytes()
    lost.unlink()
    sync(opened, wanted(pirate="a"))

    assert (1, content) == (ids(read_table(opened))["pirate"], lost.read_bytes())


@pytest.fixture(scope="module")
def hub(tmp_path_factory: pytest.TempPathFactory, adapters: dict[str, Path]) -> Iterator[SourceServer]:
    """A hub whose repository org/pirate has two commits: adapters c and a."""
    root = tmp_path_factory.mktemp("hub")
    for commit, name in ((FIRST, "c"), (SECOND, "a")):
        shutil.copytree(adapters[name], root / "hub" / "org" / "pirate" / commit)
    with running(root) as server:
        yield server


FIRST, SECOND = "1" * 40, "2" * 40


def test_a_source_that_has_moved_is_fetched_again(
    opened: Repository, hub: SourceServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """And one that has not is only asked for its revision, of which the plan tells. Offline, nothing is asked."""
    monkeypatch.setenv("HF_ENDPOINT", hub.url)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
    branches = hub.root / "hub" / "org" / "pirate" / "refs.json"
    desired = DesiredState({"new": WantedAdapter("hf://org/pirate")}, {})
    for task_id, commit, action in ((3, FIRST, "add"), (4, SECOND, "change")):
        branches.write_text(json.dumps({"main": commit}))
        (moved,) = plan_sync(opened, desired).changes()
        assert (action, "hf://org/pirate", commit) == (moved.action, moved.after["source"], moved.after["revision"])
        sync(opened, desired)
        hub.requests()
        assert [] == [*plan_sync(opened, desired).changes()]
        assert not [one for one in hub.requests() if "/resolve/" in one["path"]]
        source = read_table(opened).entries["new"].source
        assert (task_id, commit) == (ids(read_table(opened))["new"], source.revision if source else None)
    assert [] == [*plan_sync(opened, desired, Policy(offline=True)).changes()]
    assert [] == hub.requests()


def test_no_credentials_of_a_source_are_in_a_plan(opened: Repository, hub: SourceServer) -> None:
    """Neither of a source that can be reached, nor in the error of one that cannot."""
    (hub.root / "web").mkdir(exist_ok=True)
    (hub.root / "web" / "x.zip").write_bytes(b"x")
    sources = {name: f"{hub.url}/web/{name}.zip?token=sesame" for name in ("x", "absent")}
    plan = plan_sync(opened, DesiredState({name: WantedAdapter(source) for name, source in sources.items()}, {}))

    assert (["x"], ["absent"]) == ([one.name for one in plan.changes()], [one.name for one in plan.refused])
    assert "sesame" not in f"{[*plan.changes()]} {plan.refused}"


def test_relative_sources_are_beside_the_file(tmp_path: Path) -> None:
    """Addresses and absolute paths stay as they are."""
    sources = {"a": "adapters/a", "b": "/abs/b", "c": "hf://org/c", "d": None}
    desired = DesiredState({name: WantedAdapter(source) for name, source in sources.items()})

    assert {"a": str(tmp_path / "adapters" / "a"), "b": "/abs/b", "c": "hf://org/c", "d": None} == {
        name: one.source for name, one in located(desired, tmp_path).adapters.items()
    }


def test_killed_at_any_operation_the_same_sync_completes_it(
    base: Path, adapters: dict[str, Path], tmp_path: Path
) -> None:
    """A new adapter, a removal and an alias at once. Before that, no adapter of the file is lost."""
    file, root = tmp_path / "desired.yaml", tmp_path / "repo"
    file.write_text(f"adapters:\n  pirate: {adapters['a']}\n  new: {adapters['c']}\naliases:\n  prod: new\n")
    command = ["sync", str(root), str(file), "--prune"]
    for at in faults.stops(command, base, root, step=5):
        opened = paths.open_repository(root)
        assert "pirate" in read_table(opened).entries, at
        assert [] == [
            one for one in checks.check(opened, deep=True) if one.severity == "error" and "warms up" not in one.problem
        ]
        assert 0 == cli.main(command)
        assert {"pirate", "new"} == read_table(opened).entries.keys()
        assert {"prod": {"new": 100}} == read_table(opened).aliases
        assert [] == [one for one in checks.check(opened, deep=True) if one.severity == "error"]
