# SPDX-FileCopyrightText: the tritonlora authors
# SPDX-License-Identifier: Apache-2.0
"""counters.py: counts by adapter and column."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor

import pytest

from tritonlora.serving import counters
from tritonlora.serving.counters import BASE, BUCKETS, COLUMNS, OTHERS, TIMES, Statistics


def nonzero(counts: counters.Counts) -> dict[str, dict[str, float]]:
    """What was counted."""
    return {name: {column: value for column, value in row.items() if value} for name, row in counts.items()}


def test_counts_are_added_up_by_adapter_and_column() -> None:
    """The base model is an adapter without a name. Threads lose nothing."""
    counted = Statistics()
    counted.add("pirate", "load_seconds", 0.25)
    counted.add(BASE, "NOT_FOUND")
    with ThreadPoolExecutor(4) as pool:
        list(pool.map(lambda _: counted.add("pirate", "OK"), range(1000)))

    assert {BASE: {"NOT_FOUND": 1.0}, "pirate": {"OK": 1000.0, "load_seconds": 0.25}} == nonzero(counted.counts())


def test_the_number_of_names_is_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    """What has no room is counted together."""
    monkeypatch.setattr(counters, "MOST_NAMES", 2)
    counted = Statistics()
    for name in ("a", "b", "c", "d", "a"):
        counted.add(name, "OK")

    assert {"a": {"OK": 2.0}, "b": {"OK": 1.0}, OTHERS: {"OK": 2.0}} == nonzero(counted.counts())


def test_every_adapter_has_every_column() -> None:
    """So that whoever reads them needs no defaults. What was read does not change."""
    counted = Statistics()
    assert {} == counted.counts()
    counted.add("pirate", "OK")
    before = counted.counts()
    counted.add("pirate", "OK")

    assert [("pirate", list(COLUMNS))] == [(name, list(row)) for name, row in before.items()]
    assert 1.0 == before["pirate"]["OK"]


def test_times_are_counted_and_added_up_by_bucket() -> None:
    """A bound belongs to its bucket. What is longer than the last one has a bucket, too."""
    counted = Statistics()
    before = counted.times()
    for seconds in (0.0, BUCKETS[0], BUCKETS[0] * 1.01, BUCKETS[-1], 1000.0, 2000.0):
        counted.took("wait", seconds)
    after = counted.times()

    assert {name: [(0, 0.0)] * (len(BUCKETS) + 1) for name in TIMES} == before
    assert [(2, BUCKETS[0]), (1, BUCKETS[0] * 1.01), (1, BUCKETS[-1]), (2, 3000.0)] == [
        bucket for bucket in after["wait"] if bucket[0]
    ]
    assert (2, 3000.0) == after["wait"][-1]
    assert before["load"] == after["load"]
