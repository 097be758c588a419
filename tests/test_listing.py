# SPDX-FileCopyrightText: the tritonlora authors
# SPDX-License-Identifier: Apache-2.0
"""listing.py: what clients are told of the adapters."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

from table import TABLE
from tritonlora.adapters import Problem, with_alias
from tritonlora.listing import describe


def test_an_adapter_is_listed_with_its_aliases(tmp_path: Path) -> None:
    """An alias has no line of its own: it is the same adapter."""
    table = with_alias(with_alias(TABLE, "prod", "pirate"), "canary", "pirate")
    found = describe(table, tmp_path, lambda _: False)

    assert {"pirate": ["canary", "prod"], "haiku": []} == {name: about["aliases"] for name, about in found.items()}


def test_a_malformed_entry_is_listed_with_the_reason(tmp_path: Path) -> None:
    """And without what was got, which may be a path."""
    table = replace(TABLE, unavailable={"broken": (Problem("'dtype' must be one of …", "'/etc'"),)})
    about = describe(table, tmp_path, lambda _: False)["broken"]

    assert "unavailable" == about["state"]
    assert about["reason"].endswith("is malformed: 'dtype' must be one of …")
