# SPDX-FileCopyrightText: the tritonlora authors
# SPDX-License-Identifier: Apache-2.0
"""shares.py: which adapter responds to a request for an alias that is divided between adapters."""

from __future__ import annotations

import os
import random
from collections import Counter

import pytest

from tritonlora.serving.shares import choose

REQUESTS = 10_000
KEYS = [f"user-{number}".encode() for number in range(REQUESTS)]
SHARES = [{"v3": 90, "v4": 10}, {"v3": 50, "v4": 50}, {"v3": 99, "v4": 1}, {"a": 60, "b": 25, "c": 10, "d": 5}]


@pytest.mark.parametrize("shares", SHARES)
@pytest.mark.parametrize("has_key", [True, False])
def test_the_shares_hold_within_one_percent(
    shares: dict[str, int], has_key: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of 10,000 requests, by keys and at random. The random numbers are the same in each run of this test."""
    monkeypatch.setattr(os, "urandom", random.Random(7).randbytes)  # noqa: S311  reproducible
    found = Counter(choose(shares, key if has_key else None) for key in KEYS)

    assert shares.keys() == found.keys()
    for name, share in shares.items():
        assert abs(found[name] / REQUESTS - share / 100) < 0.01


def test_a_key_leads_to_one_adapter_for_good() -> None:
    """A Perl program computed these by the same formula: they must not change, since users would move."""
    shares = {"pirate-v3": 90, "pirate-v4": 10}
    keys = {"user-1": 3, "user-7": 4, "user-8": 3, "user-21": 4, "ärger": 4, "\0": 3, "x" * 5000: 3}

    assert [f"pirate-v{version}" for version in keys.values()] == [choose(shares, key.encode()) for key in keys]
    assert "pirate-v3" == choose({"pirate-v3": 100}, b"user-7")


@pytest.mark.parametrize(("before", "after"), [((90, 10), (80, 20)), ((50, 50), (10, 90)), ((99, 1), (98, 2))])
def test_only_the_keys_between_two_shares_move(before: tuple[int, int], after: tuple[int, int]) -> None:
    """From the adapter whose share falls to the other one, and none the other way."""
    moves = Counter(
        (choose({"v3": before[0], "v4": before[1]}, key), choose({"v3": after[0], "v4": after[1]}, key)) for key in KEYS
    )

    assert 0 == moves["v4", "v3"]
    assert abs(moves["v3", "v4"] / REQUESTS - (before[0] - after[0]) / 100) < 0.01


def test_the_keys_of_a_third_adapter_stay_when_two_are_joined_by_a_new_one() -> None:
    """A new adapter takes its share from the others, and moves no key between them."""
    before, after = {"a": 60, "b": 40}, {"a": 54, "b": 36, "c": 10}

    assert {"c"} == {choose(after, key) for key in KEYS if choose(after, key) != choose(before, key)}


def test_the_order_of_the_shares_says_nothing() -> None:
    """A table that was written anew divides as before."""
    assert [choose({"b": 40, "a": 60}, key) for key in KEYS[:200]] == [
        choose({"a": 60, "b": 40}, key) for key in KEYS[:200]
    ]
