# SPDX-FileCopyrightText: the tritonlora authors
# SPDX-License-Identifier: Apache-2.0
"""adapters_json.py: the text of the table, and what is served of a table with something wrong in it."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from table import TABLE
from tritonlora.errors import AdapterTableError
from tritonlora.serving.adapter_table import AdapterTable, Source, with_alias, with_entry
from tritonlora.serving.adapter_table_json import REPAIR, TableReader, parse, parse_sound, render, unavailable


def document(**changes: Any) -> dict[str, Any]:
    """The JSON document of TABLE, with one adapter's fields changed."""
    whole: dict[str, Any] = json.loads(render(TABLE))
    whole["adapters"]["pirate"].update(changes)
    return whole


def test_render_and_parse_are_inverse() -> None:
    """What was written is what is read."""
    assert TABLE == parse(render(TABLE))


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
    """Each with its reason, and with what can be done."""
    with pytest.raises(AdapterTableError, match=message) as caught:
        parse(text)
    assert REPAIR in str(caught.value)


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
        ({"pages": 0}, "'pages' must be an integer from 1 to 2147483648, or null"),
        ({"pages": 10**30}, "'pages' must be an integer from 1 to"),
        ({"lora_weights_file": "x\udcff"}, "'lora_weights_file' must be a path relative"),
        ({"lora_config_file": "x\ud800"}, "'lora_config_file' must be a path relative"),
        ({"base_model_name_or_path": "\ud800"}, "'base_model_name_or_path' must be a string"),
        ({"modules": ["attn_q", "\ud800"]}, "'modules' must be a list of module names"),
        ({"lora_weights_sha256": "\ud800" * 64}, "'lora_weights_sha256' must be 64 lowercase hexadecimal"),
        ({"lora_weights_sha256": "a" * 63}, "'lora_weights_sha256' must be 64 lowercase hexadecimal"),
        ({"lora_weights_sha256": "a" * 64 + "\n"}, "'lora_weights_sha256' must be 64 lowercase hexadecimal"),
        ({"lora_config_sha256": "\0" * 64}, "'lora_config_sha256' must be 64 lowercase hexadecimal"),
        ({"lora_config_sha256": "A" * 64}, "'lora_config_sha256' must be 64 lowercase hexadecimal"),
        ({"added_at": "junk"}, "'added_at' must be a time in ISO 8601"),
        ({"adapter_sizes": [0]}, "'adapter_sizes' must be"),
        ({"source": "hf://org/name"}, "'source' must be an object with location, revision and sha256, or null"),
        ({"source": {"location": "", "revision": None, "sha256": "a" * 64}}, "'source' must be an object"),
        ({"source": {"location": "x", "revision": 1, "sha256": "a" * 64}}, "'source' must be an object"),
        ({"source": {"location": "x", "revision": "1", "sha256": "a"}}, "'source' must be an object"),
        ({"pinned": "yes"}, "'pinned' must be true or false, got 'yes'"),
    ],
)
def test_a_bad_field_is_named_with_its_adapter(changes: dict[str, Any], message: str) -> None:
    """The user sees which adapter and which field."""
    with pytest.raises(AdapterTableError, match=f"adapter '(pirate|haiku)': {message}"):
        parse(json.dumps(document(**changes)))


def test_a_source_is_read_back_and_its_unknown_keys_are_ignored() -> None:
    """A later version may add some. An entry of an earlier version has no source."""
    source = Source("hf://org/name", "0" * 40, "a" * 64)
    table = with_entry(TABLE, "pirate", replace(TABLE.entries["pirate"], source=source))
    whole = json.loads(render(table))
    del whole["adapters"]["haiku"]["source"]
    whole["adapters"]["pirate"]["source"]["later"] = 1

    assert table == parse(render(table)) == parse(json.dumps(whole))
    assert source == parse(render(table)).entries["pirate"].source


def test_a_pin_is_read_back_and_an_entry_of_an_earlier_version_has_none() -> None:
    """Older code ignores the field, so that the schema_version stays."""
    table = with_entry(TABLE, "pirate", replace(TABLE.entries["pirate"], pinned=True))
    whole = json.loads(render(table))
    del whole["adapters"]["haiku"]["pinned"]

    assert table == parse(json.dumps(whole))
    assert 1 == whole["schema_version"]


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


# Reading again and again

LINES = render(with_alias(TABLE, "prod", "pirate")).splitlines()
BROKEN = [line.replace('"bfloat16"', '"int8"') for line in LINES if "bfloat16" in line]
PIECES = [*LINES, *(f"{line.rstrip(',')}{comma}" for line in LINES[-4:-2] + BROKEN for comma in (",", ""))]
PIECES += ["", "  }", "}", ",", '"x": {', '    "x": {}, "y": {},', '  "adapters": {']
EDITS = st.tuples(st.integers(0, len(LINES)), st.integers(0, 2), st.lists(st.sampled_from(PIECES), max_size=2))


def outcome(read: Callable[[str], AdapterTable], text: str) -> object:
    """The table, or the error's text."""
    try:
        return read(text)
    except AdapterTableError as error:
        return str(error)


@given(st.lists(st.lists(EDITS, max_size=3), min_size=1, max_size=4))
def test_reading_again_gives_what_reading_for_the_first_time_gives(edits: list[list[Any]]) -> None:
    """Whatever lines are put in, taken out, doubled or torn apart in between."""
    reader = TableReader()
    for versions in edits:
        lines = LINES
        for place, gone, pieces in versions:
            lines = [*lines[:place], *pieces, *lines[place + gone :]]
        text = "\n".join(lines) + "\n"

        assert outcome(parse_sound, text) == outcome(reader.read, text)


@pytest.mark.parametrize("second", [LINES[-4].rstrip(","), *BROKEN[:1]])
def test_a_name_that_stands_twice_is_found_when_one_is_known(second: str) -> None:
    """Also when one of the two cannot be served."""
    reader = TableReader()
    reader.read("\n".join(LINES))
    lines = [*LINES[:-4], LINES[-4], LINES[-3] + ",", second.rstrip(","), *LINES[-2:]]

    with pytest.raises(AdapterTableError, match="'haiku' stands twice"):
        reader.read("\n".join(lines))


def test_an_entry_that_has_not_changed_is_the_same_object() -> None:
    """Its line is not parsed again."""
    reader = TableReader()
    before = reader.read(render(TABLE))
    after = reader.read(
        render(with_alias(with_entry(TABLE, "haiku", replace(TABLE.entries["haiku"], warm=True)), "prod", "pirate"))
    )

    assert before.entries["pirate"] is after.entries["pirate"]
    assert after.entries["haiku"].warm


@pytest.mark.parametrize("layout", [{"indent": 2}, {"separators": (",", ":")}, {"indent": 1, "sort_keys": True}])
def test_other_layouts_are_read_too(layout: dict[str, Any]) -> None:
    """By whatever the table was edited, or an earlier version."""
    text = json.dumps(document(), **layout)

    assert TABLE == TableReader().read(text.replace("\n", "\r\n")) == parse(text)


def test_adapters_that_share_a_line_are_both_read() -> None:
    """By whoever joins lines."""
    text = render(TABLE).replace(',\n    "pirate"', ', "pirate"')

    assert len(LINES) - 2 == len(text.splitlines())
    assert TABLE == TableReader().read(text)


# Versions and aliases


def test_a_table_without_aliases_is_one_that_the_first_version_reads() -> None:
    """Whoever has no use for aliases can go back."""
    document = json.loads(render(TABLE))

    assert 1 == document["schema_version"]
    assert "aliases" not in document


def test_a_table_with_aliases_is_one_that_the_first_version_refuses() -> None:
    """It would not know the names, and lose them when it writes."""
    table = with_alias(TABLE, "prod", "pirate")

    assert 2 == json.loads(render(table))["schema_version"]
    assert table == parse(render(table))


def test_a_divided_alias_needs_the_third_version() -> None:
    """Code that does not know shares would refuse the alias, or give its requests to nobody."""
    table = with_alias(with_alias(TABLE, "prod", {"pirate": 90, "haiku": 10}), "one", "pirate")
    document = json.loads(render(table))

    assert 3 == document["schema_version"]
    assert {"one": "pirate", "prod": {"haiku": 10, "pirate": 90}} == document["aliases"]
    assert table == parse(render(table)) == TableReader().read(render(table))


def test_a_value_in_shares_is_not_for_clients() -> None:
    """It may be a path."""
    table = parse_sound(json.dumps({**document(), "aliases": {"prod": {"pirate": "/srv"}}}))

    assert "/srv" in str(table.unavailable["prod"][0])
    assert "/srv" not in table.unavailable["prod"][0].rule


def test_a_newer_table_is_refused_whole() -> None:
    """Nobody knows what it means."""
    with pytest.raises(
        AdapterTableError, match="schema_version 4, expected 1 or 2 or 3; if a newer .* run init of that version"
    ):
        parse_sound(json.dumps({**document(), "schema_version": 4}))


@pytest.mark.parametrize(
    ("aliases", "message"),
    [
        ([], "'aliases' must be an object"),
        ({"a/b": "pirate"}, "'a/b': the name is not legal"),
        ({"prod": "nobody"}, "'prod': it is an alias of 'nobody', which is not registered"),
        ({"prod": "other", "other": "pirate"}, "'prod': it is an alias of 'other', which is not registered"),
        ({"prod": 1}, "'prod': it must be the name of an adapter, or an object of shares, got 1"),
        ({"prod": {}}, "'prod': the shares must add up to 100, got 0"),
        ({"prod": {"pirate": 60, "haiku": 60}}, "'prod': the shares must add up to 100, got 120"),
        (
            {"prod": {"pirate": "90", "nobody": 10}},
            "(?s)'prod': the share of 'pirate' must be .* got '90'.*'prod': it is an alias of 'nobody', which is not",
        ),
        ({"haiku": "pirate"}, "'haiku' is the name of an adapter and of an alias"),
    ],
)
def test_a_bad_alias_is_named(aliases: object, message: str) -> None:
    """Commands refuse the table."""
    with pytest.raises(AdapterTableError, match=message):
        parse(json.dumps({**document(), "aliases": aliases}))


# What can be served


@pytest.mark.parametrize(
    ("changes", "rule"),
    [
        ({"dtype": "int8"}, "'dtype' must be one of bfloat16, float16, float32"),
        ({"lora_weights_file": "/srv/x.bin"}, "'lora_weights_file' must be a path relative to the model repository"),
        ({"lora_config_shape": [7, 3]}, "lora_weights_shape and lora_config_shape have different row counts"),
        ({"lora_task_id": None}, "'lora_task_id' must be an integer from 1"),
        ({"lora_weights_sha256": "\0" * 64}, "'lora_weights_sha256' must be 64 lowercase hexadecimal digits"),
    ],
)
def test_an_adapter_with_a_malformed_entry_is_unavailable_and_the_others_are_there(
    changes: dict[str, Any], rule: str
) -> None:
    """With what it must be; what it is is not for clients."""
    table = parse_sound(json.dumps(document(**changes)))
    (problem,) = table.unavailable["pirate"]

    assert {"haiku": TABLE.entries["haiku"]} == table.entries
    assert problem.rule.startswith(rule)
    assert "/srv" not in problem.rule
    assert [f"adapter 'pirate': {problem}"] == list(unavailable(table))


@pytest.mark.parametrize("fields", [None, [], 1, "x"])
def test_an_entry_that_is_no_object_is_unavailable(fields: object) -> None:
    """Whatever it is."""
    whole = document()
    whole["adapters"]["pirate"] = fields

    assert {"pirate"} == parse_sound(json.dumps(whole)).unavailable.keys()


def test_an_alias_of_an_adapter_that_is_unavailable_stays_one() -> None:
    """A request by it gets that adapter's reason; neither is offered."""
    table = parse_sound(json.dumps({**document(dtype="int8"), "aliases": {"prod": "pirate"}}))

    assert {"prod": {"pirate": 100}} == table.aliases
    assert ("haiku",) == table.names


@pytest.mark.parametrize(
    ("whole", "message"),
    [
        (document(lora_task_id=2), "lora_task_id 2 is also that of"),
        (document(lora_task_id=9), "is not below next_lora_task_id"),
        ({**document(), "retired_lora_task_ids": [1]}, "is retired"),
        ({**document(), "next_lora_task_id": None}, "'next_lora_task_id' must be"),
        ({**document(), "aliases": {"haiku": "pirate"}}, "the name of an adapter and of an alias"),
    ],
)
def test_a_table_that_could_lead_to_a_wrong_adapter_is_refused_whole(whole: dict[str, Any], message: str) -> None:
    """The engine answers by id, so ids must be beyond doubt, and so must names."""
    with pytest.raises(AdapterTableError, match=message):
        parse_sound(json.dumps(whole))


def test_a_table_that_lacks_adapters_is_not_written() -> None:
    """Writing it would lose them."""
    with pytest.raises(ValueError, match="lacks the adapters"):
        render(parse_sound(json.dumps(document(dtype="int8"))))
