# SPDX-FileCopyrightText: the tritonlora authors
# SPDX-License-Identifier: Apache-2.0
"""listing.py: what clients are told of the adapters."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import closing
from dataclasses import replace
from pathlib import Path

import pytest

from table import TABLE
from tritonlora.adapters import Problem, with_alias
from tritonlora.listing import describe
from tritonlora.residency import Residency, open_residency
from tritonlora.routing import content_of


@pytest.fixture
def residency(tmp_path: Path) -> Iterator[Residency]:
    """Of instances that have just begun."""
    with closing(open_residency(tmp_path / "shared", {})) as residency:
        yield residency


def test_an_adapter_is_listed_with_its_aliases(tmp_path: Path, residency: Residency) -> None:
    """An alias has no line of its own: it is the same adapter."""
    table = with_alias(with_alias(TABLE, "prod", "pirate"), "canary", "pirate")
    found = describe(table, tmp_path, residency)

    assert {"pirate": ["canary", "prod"], "haiku": []} == {name: about["aliases"] for name, about in found.items()}


def test_a_malformed_entry_is_listed_with_the_reason(tmp_path: Path, residency: Residency) -> None:
    """And without what was got, which may be a path."""
    table = replace(TABLE, unavailable={"broken": (Problem("'dtype' must be one of …", "'/etc'"),)})
    about = describe(table, tmp_path, residency)["broken"]

    assert "unavailable" == about["state"]
    assert about["reason"].endswith("is malformed: 'dtype' must be one of …")


def write_files(root: Path) -> None:
    """The adapters' files, as large as they must be."""
    for entry in TABLE.entries.values():
        for file, nbytes in (
            (entry.lora_weights_file, entry.lora_weights_nbytes),
            (entry.lora_config_file, entry.lora_config_nbytes),
        ):
            (root / file).parent.mkdir(parents=True, exist_ok=True)
            (root / file).write_bytes(bytes(nbytes))


@pytest.mark.parametrize(
    ("cache_pages", "states"),
    [
        (2, {"pirate": "warm", "haiku": "loaded"}),
        (1, {"pirate": "cold", "haiku": "loaded"}),
        (0, {"pirate": "unknown", "haiku": "loaded"}),
    ],
)
def test_no_more_adapters_are_listed_as_held_than_the_cache_holds(
    tmp_path: Path, cache_pages: int, states: dict[str, str]
) -> None:
    """Of a cache whose size is not known, the one that was used last; what is not certain is said to be unknown."""
    write_files(tmp_path)
    with closing(open_residency(tmp_path / "shared", {1: 1}, cache_pages)) as mine:
        mine.accepted(2, 1)
        mine.ended()

        assert states == {name: about["state"] for name, about in describe(TABLE, tmp_path, mine).items()}


def test_an_adapter_whose_id_was_given_to_another_is_listed_as_unavailable(
    tmp_path: Path, residency: Residency
) -> None:
    """As requests for it are refused, whatever the engine holds under its id."""
    write_files(tmp_path)
    for name in ("haiku", "pirate"):
        entry = TABLE.entries[name]
        residency.accepted(entry.lora_task_id, 1)
        residency.ended()
        residency.gives(entry.lora_task_id, "another" if name == "haiku" else content_of(entry))

    found = describe(TABLE, tmp_path, residency)

    assert {"pirate": "warm", "haiku": "unavailable"} == {name: about["state"] for name, about in found.items()}
    assert "lora_task_id 2 was given to other weights" in found["haiku"]["reason"]
