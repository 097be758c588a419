# SPDX-FileCopyrightText: the tritonlora authors
# SPDX-License-Identifier: Apache-2.0
"""registry.py: which adapters may be pinned, what the commands make of a pin, and what `check` says."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest

from repositories import forget_cache_pages, set_cache_pages, synthetic_adapter, synthetic_repository
from tritonlora.check import checks
from tritonlora.cli import commands
from tritonlora.errors import AdapterTableError, RepositoryError
from tritonlora.files import write_text
from tritonlora.repository import add, desired_state, init, paths, registry
from tritonlora.repository.desired_state import DesiredState, WantedAdapter
from tritonlora.repository.paths import Repository, read_table
from tritonlora.repository.registry import Pinned, pin
from tritonlora.repository.sync import apply, plan_sync
from tritonlora.serving.adapter_table import with_entry
from tritonlora.serving.adapter_table_json import render

TOO_MANY = (
    "the 2 pinned adapters take 2 pages of the engine's LoRA cache, and the largest other adapter takes 1; it has 2"
)


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Three adapters of a page each, and an alias of two of them."""
    root = tmp_path_factory.mktemp("pins") / "repo"
    opened = synthetic_repository(root, cold=["pirate", "haiku", "other"], topology="resolve")
    registry.alias(opened, "prod", {"pirate": 50, "haiku": 50})
    return root


@pytest.fixture
def opened(base: Path, tmp_path: Path) -> Repository:
    """A copy of it."""
    return paths.open_repository(Path(shutil.copytree(base, tmp_path / "repo")))


def pinned(opened: Repository) -> set[str]:
    return {name for name, entry in read_table(opened).entries.items() if entry.pinned}


def test_an_alias_pins_the_adapters_that_it_leads_to(opened: Repository) -> None:
    """Nothing else of the table changes. The second time nothing is new."""
    before = read_table(opened)
    assert [Pinned("haiku", True, False, 1), Pinned("pirate", True, False, 1)] == pin(opened, ["prod"])
    table = read_table(opened)

    assert {"pirate", "haiku"} == pinned(opened)
    assert before == replace(table, entries={name: replace(one, pinned=False) for name, one in table.entries.items()})
    assert [True, True] == [one.before for one in pin(opened, ["haiku", "pirate"])]
    pin(opened, ["prod"], pinned=False)
    assert before == read_table(opened)


def test_pins_leave_room_for_the_largest_other_adapter(opened: Repository) -> None:
    """The numbers are in the message, and nothing is changed. `check` says the same of a table that has them."""
    set_cache_pages(opened, 2)
    with pytest.raises(RepositoryError) as raised:
        pin(opened, ["prod"])
    assert str(raised.value).startswith(f"cannot pin 'haiku', 'pirate': {TOO_MANY}; let some go, with tritonlora warm")
    pin(opened, ["pirate"])
    assert {"pirate"} == pinned(opened)
    assert [] == checks.check(opened)

    table = read_table(opened)
    entries = {name: replace(one, pinned=name != "other") for name, one in table.entries.items()}
    write_text(opened.table_path, render(replace(table, entries=entries)))
    assert [TOO_MANY] == [one.problem for one in checks.check(opened)]
    pin(opened, ["haiku"], pinned=False)
    assert [] == checks.check(opened)


def test_all_adapters_may_be_pinned_if_all_fit(opened: Repository) -> None:
    """There is no other adapter to leave room for."""
    set_cache_pages(opened, 3)
    pin(opened, ["prod", "other"])

    assert {"pirate", "haiku", "other"} == pinned(opened)


def without_pages(opened: Repository) -> None:
    table = read_table(opened)
    entry = replace(table.entries["pirate"], pages=None)
    write_text(opened.table_path, render(with_entry(table, "pirate", entry)))


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (forget_cache_pages, "the size of the engine's LoRA cache is not known; run tritonlora plan --apply"),
        (without_pages, "the number of pages of 'pirate' is not known; run tritonlora plan --apply"),
        (lambda _: None, "no adapter 'nobody' is registered; available: haiku, other, pirate, prod"),
    ],
)
def test_what_cannot_be_kept_is_not_pinned(
    opened: Repository, damage: Callable[[Repository], None], message: str
) -> None:
    """Nothing is changed."""
    damage(opened)
    with pytest.raises((RepositoryError, AdapterTableError), match=message):
        pin(opened, ["pirate", "nobody"] if "nobody" in message else ["pirate"])

    assert not pinned(opened)


def test_a_pin_stays_with_the_name_until_the_adapter_is_removed(opened: Repository, tmp_path: Path) -> None:
    """Other content under the name has it, too, and the same content again."""
    pin(opened, ["other"])
    for seed in (7, 7):
        add.add(opened, "other", synthetic_adapter(tmp_path / "other", seed))
        assert {"other"} == pinned(opened)
    registry.remove(opened, "other")
    add.add(opened, "other", synthetic_adapter(tmp_path / "other", 7))

    assert not pinned(opened)


def test_a_pin_is_not_written_for_code_that_knows_none(opened: Repository) -> None:
    """The resolver would ignore it; `init` puts newer code there."""
    (opened.root / "lora_resolver" / "1" / "serving" / "__init__.py").write_text('__version__ = "0.1.0"\n')
    with pytest.raises(RepositoryError, match="lora_resolver runs code .* cannot .* pin adapters; .* tritonlora init"):
        pin(opened, ["pirate"])
    init.init(opened.root)
    pin(opened, ["pirate"])

    assert {"pirate"} == pinned(opened)


def test_sync_pins_and_lets_go_and_export_says_so(opened: Repository) -> None:
    """The plan shows it. Pins that do not fit are refused, and the rest is done."""
    desired = desired_state.parse(b"adapters: {pirate: {pinned: true}, haiku: {}, other: {warm: true}}")
    pin(opened, ["haiku"])
    plan = plan_sync(opened, desired)
    changes = {one.name: (one.before["pinned"], one.after["pinned"]) for one in plan.changes()}
    assert {"pirate": (False, True), "haiku": (True, False), "other": (False, False)} == changes
    assert [] == apply(opened, plan)
    assert {"pirate"} == pinned(opened)
    exported = desired_state.parse(desired_state.render(read_table(opened)).encode())
    assert {"pirate"} == {name for name, one in exported.adapters.items() if one.pinned}
    assert [] == [*plan_sync(opened, exported).changes()]

    set_cache_pages(opened, 2)
    more = DesiredState(
        {name: WantedAdapter(warm=name != "other", pinned=name != "other") for name in exported.adapters}
    )
    [refused] = apply(opened, plan_sync(opened, more))

    assert ("haiku", True) == (refused.name, TOO_MANY in refused.error)  # type: ignore[union-attr]
    assert {"pirate"} == pinned(opened)
    assert not read_table(opened).entries["other"].warm


def test_sync_adds_a_pinned_adapter(opened: Repository, tmp_path: Path) -> None:
    """In one step with its conversion. Its line of the plan says so."""
    source = synthetic_adapter(tmp_path / "new", 8)
    known = {name: WantedAdapter(warm=False) for name in read_table(opened).entries}
    plan = plan_sync(opened, DesiredState({**known, "new": WantedAdapter(str(source), pinned=True)}))
    [change] = [one for one in plan.changes() if one.kind == "adapter"]
    apply(opened, plan)

    assert ("new", True) == (change.name, change.after["pinned"])
    assert {"new"} == pinned(opened)


def test_the_commands_pin_list_and_let_go(opened: Repository, capsys: pytest.CaptureFixture[str]) -> None:
    """No server is asked for that."""
    root = str(opened.root)

    def run(*words: str) -> tuple[int, str]:
        return commands.main([*words]), capsys.readouterr().out

    assert (0, "pirate pinned: 1 page of the engine's cache\n") == run("warm", root, "pirate", "--pin")
    assert (0, "pirate was pinned already\n") == run("warm", root, "pirate", "--pin")
    columns, *rows = (line.split("\t") for line in run("list", root)[1].splitlines())
    assert {"pirate": "yes", "haiku": "", "other": ""} == {row[0]: row[columns.index("pinned")] for row in rows}
    code, out = run("warm", "prod", "--unpin", "--repo", root, "--json")
    assert (0, {"pirate": [True, False], "haiku": [False, False]}) == (
        code,
        {one["name"]: [one["before"], one["pinned"]] for one in json.loads(out)["pins"]},
    )
    for words in (("--pin", "--unpin"), ("--repo", root), ("--unpin", "--url", "localhost:1")):
        assert (2, "") == run("warm", "pirate", *words)
