# SPDX-FileCopyrightText: the tritonlora authors
# SPDX-License-Identifier: Apache-2.0
"""desired_state.py: the file that says which adapters and aliases a repository should have."""

from __future__ import annotations

import re
from dataclasses import replace

import pytest
import yaml

from table import TABLE, entry
from tritonlora.errors import DesiredStateError
from tritonlora.repository.desired_state import (
    MOST_BYTES,
    MOST_PROBLEMS,
    DesiredState,
    WantedAdapter,
    parse,
    render,
)
from tritonlora.serving.adapter_table import AdapterTable, Source, with_adapter, with_alias

WHOLE_FILE = b"""\
# a comment
adapters:
  pirate-v3: adapters/pirate
  pirate-v4: {source: "hf://org/pirate", warm: false}
  haiku: {}
  2024: /2024.zip
  on: ~/on
aliases:
  canary: pirate-v4
  prod:
    pirate-v3: 90
    pirate-v4: 10
"""


def problems(content: bytes) -> list[str]:
    """What is wrong with a file, a line each."""
    with pytest.raises(DesiredStateError) as error:
        parse(content)
    heading, _, rest = str(error.value).partition(":")
    assert heading == "it cannot be used"
    return [line.strip() for line in rest.strip().splitlines()]


def test_a_file_is_read() -> None:
    """Names are taken as they are written, whatever YAML would make of them."""
    assert parse(WHOLE_FILE) == DesiredState(
        {
            "pirate-v3": WantedAdapter("adapters/pirate"),
            "pirate-v4": WantedAdapter("hf://org/pirate", warm=False),
            "haiku": WantedAdapter(None),
            "2024": WantedAdapter("/2024.zip"),
            "on": WantedAdapter("~/on"),
        },
        {"canary": {"pirate-v4": 100}, "prod": {"pirate-v3": 90, "pirate-v4": 10}},
    )
    assert DesiredState() == parse(b"adapters: {}") == parse(b"\xef\xbb\xbf---\nadapters: {}\n...\n")


def test_all_problems_are_told_at_once_each_with_its_line() -> None:
    """In the order of the lines."""
    content = b"""\
adapters: &all
  list: [x]
  list: y
  a/b: z
  nothing:
  misspelt: {source: 5, warm: 'true', wrm: true}
  nested: {source: {a: b}, warm: no}
  tagged: !!python/object:os.system x
  repeated: *all
  <<: *all
foo: bar
aliases:
  tagged: misspelt
  sum: {misspelt: 50, nested: 40}
  kinds: {misspelt: 5.5, nested: '7', tagged: [1]}
  unknown: nobody
  of_alias: sum
  list: [a]
"""
    found = problems(content)

    assert [int(line.split()[1].rstrip(":")) for line in found] == [
        1, 2, 3, 4, 5, 6, 6, 7, 7, 8, 9, 10, 10, 11, 13, 14, 15, 15, 15, 15, 16, 17, 18, 18,
    ]  # fmt: skip
    for line in (
        "line 1: anchors are not taken, got &all; write the value itself",
        "line 2: adapter 'list' must be a source, or a mapping with source, warm and pinned, got a list",
        "line 3: 'list' stands twice; first in line 2",
        "line 5: the source of adapter 'nothing' must be a directory or an address, got nothing",
        "line 6: adapter 'misspelt': 'wrm' is not known; expected source, warm or pinned",
        "line 6: warm of adapter 'misspelt' must be true or false, got 'true'",
        "line 8: tags are not taken, got 'tag:yaml.org,2002:python/object:os.system'",
        "line 9: anchors are not taken, got *all; write the value itself",
        "line 11: 'foo' is not known; expected adapters or aliases",
        "line 13: 'tagged' is the name of an adapter and of an alias",
        "line 14: alias 'sum': the shares must add up to 100, got 90",
        "line 15: the share of 'nested' in alias 'kinds' must be a whole number, got '7'",
        "line 15: the share of 'tagged' in alias 'kinds' must be a whole number, got a list",
        "line 16: alias 'unknown' leads to 'nobody', which is not among the adapters of this file",
        "line 17: alias 'of_alias' leads to 'sum', which is an alias; name adapters",
        "line 18: alias 'list' must be the name of an adapter, or a mapping of adapters to percentages, got a list",
    ):
        assert line in found


@pytest.mark.parametrize(
    ("content", "expected"),
    [
        (b"", "line 1: it is empty; for a repository without adapters write: adapters: {}"),
        (b"# nothing\n~\n", "line 1: it is empty; for a repository without adapters write: adapters: {}"),
        (b"aliases: {}", "line 1: adapters is missing; for a repository without adapters write: adapters: {}"),
        (b"adapters:\n", "line 1: adapters must be a mapping of names to sources, got nothing"),
        (b"- a\n- b\n", "line 1: the file must be a mapping with adapters and aliases, got a list"),
        (b"text", "line 1: the file must be a mapping with adapters and aliases, got 'text'"),
        (b"adapters: {}\n---\nadapters: {}\n", "line 2: a second document begins; a file has one"),
        (b"adapters: {}\nadapters: {}\n", "line 2: 'adapters' stands twice; first in line 1"),
        (b"adapters:\n  ? [a]\n  : b\n", "line 2: a key of adapters must be a name, got a list"),
        (b"adapters:\n  a: b\n c: d\n", "line 3: it is not YAML: did not find expected key"),
        (b"adapters:\n\ta: b\n", "line 2: it is not YAML: found character that cannot start any token"),
        (b"adapters:\n  a: \x00", "line 2: it is not YAML: control characters are not allowed, got #x00"),
        (b"adapters:\n  a: \xff", "line 2: it is not YAML: invalid leading UTF-8 octet, got #xff"),
    ],
)
def test_a_file_of_another_kind_is_refused(content: bytes, expected: str) -> None:
    """An empty file is no order to remove everything."""
    assert [expected] == problems(content)


@pytest.mark.parametrize("closed", [True, False])
def test_nesting_that_is_too_deep_is_a_problem(closed: bool) -> None:
    """Neither the stack nor the memory runs out."""
    found = problems(b"adapters: {a: " + b"[" * 100_000 + b"]" * 100_000 * closed)

    assert "line 1: adapter 'a' must be a source, or a mapping with source, warm and pinned, got a list" == found[0]
    assert found[1].startswith("line 1: it is not YAML: ")


def test_anchors_that_multiply_are_not_followed() -> None:
    """Nine levels of nine would be a billion values."""
    levels = [f"l{n}: &l{n} [{', '.join([f'*l{n - 1}'] * 9) if n else 'x'}]" for n in range(10)]

    assert len(problems("\n".join(levels).encode())) == MOST_PROBLEMS + 1


def test_a_file_that_is_too_large_is_refused_before_it_is_parsed() -> None:
    """A million entries are that large. The largest file that is read is read in seconds, and its problems are told."""
    million = b"adapters:\n" + b"".join(b"  a%d: /a\n" % number for number in range(1_000_000))
    with pytest.raises(DesiredStateError, match=f"it has {len(million)} bytes, and at most {MOST_BYTES} are read"):
        parse(million)

    repeated = b"adapters:\n" + b"  a: /x\n" * 40_000
    assert [*problems(repeated)[:1], problems(repeated)[-1]] == [
        "line 3: 'a' stands twice; first in line 2",
        f"and {39_999 - MOST_PROBLEMS} more",
    ]


NOTED = Source("hf://org/pirate", "abc", "c" * 64)


def test_a_table_is_written_as_a_file_that_means_it() -> None:
    """Without a source where none is known, or where the adapter was composed of others."""
    table = with_alias(with_alias(TABLE, "prod", {"pirate": 90, "haiku": 10}), "on", "haiku")
    pirate = replace(table.entries["pirate"], source=NOTED)
    table = replace(table, entries={**table.entries, "pirate": pirate})
    table = with_adapter(table, "7", entry(7, source=Source("compose:a=0.7,b=0.3", None, "c" * 64), warm=False))
    text = render(table)

    assert parse(text.encode()) == DesiredState(
        {
            "7": WantedAdapter(None, warm=False),
            "haiku": WantedAdapter(None, warm=False),
            "pirate": WantedAdapter("hf://org/pirate"),
        },
        table.aliases,
    )
    assert {"7", "haiku", "pirate"} == yaml.safe_load(text)["adapters"].keys()  # other tools take no name for a number
    assert DesiredState() == parse(render(AdapterTable()).encode())
    assert not re.search("[&*]", text)
