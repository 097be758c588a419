# SPDX-FileCopyrightText: the tritonlora authors
# SPDX-License-Identifier: Apache-2.0
"""adapters.py: the table of adapters."""

from __future__ import annotations

from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from table import TABLE, entry
from tritonlora.errors import AdapterTableError, one_message
from tritonlora.serving.adapter_table import (
    AdapterTable,
    as_written,
    available,
    check_name,
    pins,
    with_adapter,
    with_alias,
    with_entry,
    without_adapter,
    without_alias,
)
from tritonlora.serving.adapter_table_json import parse, render


@given(st.lists(st.sampled_from(["add a", "add b", "add c", "remove a", "remove b", "remove c"]), max_size=12))
def test_a_task_id_is_never_given_twice(steps: list[str]) -> None:
    """Whatever is added, replaced and removed, and through a render and parse each time."""
    table = AdapterTable()
    given_ids = []
    for step in steps:
        verb, name = step.split()
        if verb == "add":
            given_ids.append(table.next_lora_task_id)
            table = with_adapter(table, name, entry(table.next_lora_task_id))
        elif name in table.entries:
            table = without_adapter(table, name)
        table = parse(render(table))

    assert sorted(set(given_ids)) == given_ids
    assert set(given_ids) == set(table.retired_lora_task_ids) | {e.lora_task_id for e in table.entries.values()}


def test_an_id_of_another_adapter_is_refused() -> None:
    """--task-id must not collide."""
    with pytest.raises(AdapterTableError, match="lora_task_id 1 was given to adapter 'pirate'.*next free one is 3"):
        with_adapter(TABLE, "new", entry(1))


def test_a_retired_id_is_refused() -> None:
    """The engine may still hold the old weights under it."""
    with pytest.raises(AdapterTableError, match="lora_task_id 1 was given to an adapter that was removed"):
        with_adapter(without_adapter(TABLE, "pirate"), "new", entry(1))


def test_replacing_an_adapter_retires_its_id() -> None:
    """New content, new id."""
    table = with_adapter(TABLE, "pirate", entry(3))

    assert (1,) == table.retired_lora_task_ids
    assert 3 == table.entries["pirate"].lora_task_id


@pytest.mark.parametrize("task_id", [0, -1, 2**31])
def test_an_id_out_of_range_is_refused(task_id: int) -> None:
    """Ids are positive and fit 32 bits."""
    with pytest.raises(AdapterTableError, match="out of range"):
        with_adapter(AdapterTable(), "a", entry(task_id))


@pytest.mark.parametrize("name", ["a", "A-1_b.c", "0", "x" * 128])
def test_a_legal_name_passes(name: str) -> None:
    """Letters, digits, dot, underscore, dash."""
    check_name(name)


@pytest.mark.parametrize("name", ["", ".a", "-a", "a/b", "../a", "a b", "a,b", "ä", "a\n", "x" * 129])
def test_an_illegal_name_is_refused(name: str) -> None:
    """Separators and path parts never get in."""
    with pytest.raises(AdapterTableError, match="not a legal adapter name"):
        check_name(name)


def test_removing_an_unknown_adapter_names_those_there_are() -> None:
    """A typo is easy to see."""
    with pytest.raises(AdapterTableError, match="no adapter 'pirat' is registered; available: haiku, pirate"):
        without_adapter(TABLE, "pirat")


def test_available_is_cut_to_a_count() -> None:
    """Thousands of names never reach a client."""
    table = AdapterTable({f"n{i:03}": entry(i + 1) for i in range(25)}, 26)

    assert available(table).endswith("n018, n019 and 5 more")


# Aliases

PROD = with_alias(TABLE, "prod", "pirate")


def test_an_alias_leads_to_an_adapter_until_it_is_led_to_another() -> None:
    """Versions and canaries."""
    assert {"prod": {"pirate": 100}} == PROD.aliases
    assert {"prod": {"haiku": 100}} == with_alias(PROD, "prod", "haiku").aliases
    assert {} == without_alias(PROD, "prod").aliases


def test_an_alias_of_an_alias_leads_to_the_adapter_of_that_moment() -> None:
    """A canary does not move when production does."""
    table = with_alias(with_alias(PROD, "canary", "prod"), "prod", "haiku")

    assert {"prod": {"haiku": 100}, "canary": {"pirate": 100}} == table.aliases


def test_an_alias_follows_an_adapter_that_is_replaced() -> None:
    """It leads to a name, whatever its content."""
    table = with_adapter(PROD, "pirate", entry(3))

    assert 3 == table.entries[str(as_written(table.aliases["prod"]))].lora_task_id


@pytest.mark.parametrize(
    ("alias", "name", "message"),
    [
        ("a/b", "pirate", "'a/b' is not a legal adapter name"),
        ("haiku", "pirate", "'haiku' is an adapter; an alias needs a name of its own"),
        ("new", "nobody", "no adapter 'nobody' is registered; available: haiku, pirate, prod"),
    ],
)
def test_an_alias_that_cannot_be_is_refused(alias: str, name: str, message: str) -> None:
    """Adapters and aliases share one namespace."""
    with pytest.raises(AdapterTableError, match=message):
        with_alias(PROD, alias, name)


def test_an_alias_is_divided_between_adapters() -> None:
    """An alias of it is divided likewise. A name in the shares may be an alias of one adapter."""
    table = with_alias(PROD, "canary", {"prod": 90, "haiku": 10})

    assert {"pirate": 90, "haiku": 10} == table.aliases["canary"] == with_alias(table, "new", "canary").aliases["new"]
    assert {"pirate": 100} == with_alias(table, "canary", {"pirate": 100}).aliases["canary"]
    assert {"pirate": {"canary": 90, "prod": 100}, "haiku": {"canary": 10}} == table.aliases_by_name()
    with pytest.raises(AdapterTableError, match="'haiku' has aliases: canary; .* tritonlora alias canary OTHER"):
        without_adapter(table, "haiku")


@pytest.mark.parametrize(
    ("shares", "problems"),
    [
        ({}, ["the shares must add up to 100, got 0"]),
        ({"pirate": 90, "haiku": 20}, ["the shares must add up to 100, got 110"]),
        (
            {"pirate": 0, "haiku": 101, "nobody": 1.5, "split": True},
            [
                "the share of 'pirate' must be a whole number from 1 to 100, got 0",
                "the share of 'haiku' must be a whole number from 1 to 100, got 101",
                "the share of 'nobody' must be a whole number from 1 to 100, got 1.5",
                "the share of 'split' must be a whole number from 1 to 100, got True",
                "no adapter 'nobody' is registered; available: haiku, pirate, prod, split",
                "'split' is divided between adapters itself; name adapters",
            ],
        ),
        ({"pirate": 50, "prod": 50}, ["adapter 'pirate' is named twice"]),
    ],
)
def test_shares_that_cannot_be_are_refused_with_all_problems(shares: dict[str, int], problems: list[str]) -> None:
    """At once."""
    with pytest.raises(AdapterTableError) as error:
        with_alias(with_alias(PROD, "split", {"pirate": 50, "haiku": 50}), "new", shares)

    assert one_message("cannot divide 'new'", problems) == str(error.value)


def test_an_adapter_cannot_take_the_name_of_an_alias() -> None:
    """Requests by it would change their meaning."""
    with pytest.raises(
        AdapterTableError, match="'prod' is an alias of adapter 'pirate'; use .* tritonlora remove prod"
    ):
        with_adapter(PROD, "prod", entry(3))


def test_an_adapter_that_has_aliases_is_not_removed() -> None:
    """They are named, and so is what to do."""
    table = with_alias(PROD, "canary", "pirate")

    with pytest.raises(AdapterTableError, match="'pirate' has aliases: canary, prod; .* tritonlora alias canary OTHER"):
        without_adapter(table, "pirate")


@pytest.mark.parametrize(
    "changed",
    [
        with_adapter(PROD, "new", entry(3)),
        with_entry(PROD, "pirate", replace(PROD.entries["pirate"], warm=False)),
        without_adapter(PROD, "haiku"),
    ],
)
def test_aliases_stay_when_something_else_changes(changed: AdapterTable) -> None:
    """Whatever else is written."""
    assert PROD.aliases == changed.aliases


def test_pins_leave_the_capacity_for_the_largest_other_adapter() -> None:
    """The smallest ids come first. Without known sizes nothing is kept."""
    entries = {f"n{number}": entry(number, pages=2, pinned=True) for number in (1, 2, 3)}
    table = AdapterTable({**entries, "other": entry(9, pages=3)}, 10)

    assert {1: 2, 2: 2, 3: 2} == pins(table, 9)
    assert {1: 2, 2: 2} == pins(table, 8)
    assert {1: 2, 2: 2, 3: 2} == pins(AdapterTable(entries, 10), 6)
    assert [{}, {}] == [pins(table, 0), pins(with_entry(table, "n1", replace(entries["n1"], pages=None)), 9)]
