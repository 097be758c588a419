# SPDX-FileCopyrightText: the tritonlora authors
# SPDX-License-Identifier: Apache-2.0
"""adapters.py: the table of adapters."""

from __future__ import annotations

import json
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from table import TABLE, entry
from tritonlora.adapters import (
    AdapterTable,
    available,
    check_name,
    parse,
    render,
    with_adapter,
    without_adapter,
)
from tritonlora.errors import AdapterTableError


def document(**changes: Any) -> dict[str, Any]:
    """The JSON document of TABLE, with one adapter's fields changed."""
    whole: dict[str, Any] = json.loads(render(TABLE))
    whole["adapters"]["pirate"].update(changes)
    return whole


def test_render_and_parse_are_inverse() -> None:
    """What was written is what is read."""
    assert TABLE == parse(render(TABLE))


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


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "not JSON"),
        ("[]", "must hold an object"),
        ("{}", "schema_version None, expected 1"),
        ("[" * 100_000, "not JSON"),
        ('{"schema_version": 1, "schema_version": 1}', "'schema_version' stands twice"),
        ('{"schema_version": 1}', "(?s)'adapters' must be an object.*'next_lora_task_id'.*'retired_lora_task_ids'"),
    ],
)
def test_a_document_that_is_no_table_is_refused(text: str, message: str) -> None:
    """Each with its reason."""
    with pytest.raises(AdapterTableError, match=message):
        parse(text)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"lora_task_id": "1"}, "'lora_task_id' must be an integer from 1, got '1'"),
        ({"lora_task_id": True}, "'lora_task_id' must be"),
        ({"lora_task_id": 2}, "lora_task_id 2 is also that of adapter"),
        ({"lora_task_id": 9}, "lora_task_id 9 is not below next_lora_task_id 3"),
        ({"lora_weights_file": "/etc/passwd"}, "'lora_weights_file' must be a path relative to the model repository"),
        ({"lora_config_file": "a/../../b"}, "'lora_config_file' must be a path relative"),
        ({"dtype": "int8"}, "'dtype' must be one of"),
        ({"lora_weights_shape": [6, 0]}, "'lora_weights_shape' must be two positive"),
        ({"lora_config_shape": [6, 5]}, r"'lora_config_shape' must be \[n, 3\] or \[n, 4\]"),
        ({"lora_config_shape": [7, 3]}, ".*different row counts"),
        ({"warm": 1}, "'warm' must be true or false"),
        ({"pages": 0}, "'pages' must be a positive integer or null"),
        ({"adapter_sizes": [0]}, "'adapter_sizes' must be"),
    ],
)
def test_a_bad_field_is_named_with_its_adapter(changes: dict[str, Any], message: str) -> None:
    """The user sees which adapter and which field."""
    with pytest.raises(AdapterTableError, match=f"adapter '(pirate|haiku)': {message}"):
        parse(json.dumps(document(**changes)))


def test_an_adapter_under_a_retired_id_is_refused() -> None:
    """A hand-edited table cannot bring an id back."""
    with pytest.raises(AdapterTableError, match="adapter 'pirate': lora_task_id 1 is retired"):
        parse(json.dumps({**document(), "retired_lora_task_ids": [1]}))


def test_all_problems_are_reported_at_once() -> None:
    """One run, the whole list."""
    whole = document(dtype="int8", warm="yes")
    whole["adapters"]["a/b"] = whole["adapters"].pop("haiku")

    with pytest.raises(AdapterTableError, match="(?s)'dtype'.*'warm'.*'a/b': the name is not legal"):
        parse(json.dumps(whole))
