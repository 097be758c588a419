# SPDX-FileCopyrightText: the tritonlora authors
# SPDX-License-Identifier: Apache-2.0
"""metrics.py: what the resolver counts and believes, as metrics."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import replace

import pytest

from documentation import DOCS, Page
from table import entry
from tritonlora.serving import metrics
from tritonlora.serving.adapter_table import AdapterEntry
from tritonlora.serving.counters import BASE, BUCKETS, COLUMNS, OTHERS, UNKNOWN, Counts, Row, Statistics

Series = dict[tuple[str, ...], float]  # name and labels -> value


def row(**counted: float) -> Row:
    """Counts of an adapter."""
    return dict.fromkeys(COLUMNS, 0.0) | counted


EMPTY = metrics.Snapshot(counts={}, times=Statistics().times(), in_use=(), waiting=(), adapters={}, held={}, pages=0)


class Published:
    """Series that follow snapshots, as `publishing` has them follow."""

    def __init__(self) -> None:
        self.values: dict[metrics.Family, dict[tuple[str, ...], float]] = {family: {} for family in metrics.FAMILIES}
        self.changes = 0  # of the last snapshot
        self._rows: Counts = {}

    def publish(self, now: float = 0.0, **fields: object) -> Series:
        """The series after a snapshot with these fields."""
        snapshot = replace(EMPTY, **fields)  # type: ignore[arg-type]
        state = [*metrics.samples_of_state(snapshot, now)]
        for family in metrics.outdated(self.values, state):
            self.values[family].clear()
        rows = metrics.samples_of_rows(metrics.changed(self._rows, snapshot.counts))
        increments = [*metrics.increments(self.values, [*rows, *state])]
        for sample in increments:
            known = self.values[sample.family]
            known[sample.labels] = known.get(sample.labels, 0.0) + sample.value
        self._rows, self.changes = snapshot.counts, len(increments)
        return {
            (family.name, *labels): value for family, series in self.values.items() for labels, value in series.items()
        }


def of(name: str, series: Series) -> Series:
    """The labels and values of one metric."""
    return {key[1:]: value for key, value in series.items() if key[0] == name}


def test_each_count_becomes_a_sample_with_its_labels() -> None:
    """Table events belong to no adapter."""
    counts = {
        BASE: row(OK=2, table_reloads=1, table_failures=4),
        "pirate": row(
            OK=1, UNAVAILABLE=3, first_use=1, evicted=2, hit=4, miss=5, wait=6, load_seconds=0.5, running=1, waiting=7,
            unexpected_misses=5,
        ),
    }  # fmt: skip

    assert {
        ("lora_requests_total", "", "OK"): 2,
        ("lora_requests_total", "pirate", "OK"): 1,
        ("lora_requests_total", "pirate", "UNAVAILABLE"): 3,
        ("lora_loads_total", "pirate", "first_use"): 1,
        ("lora_loads_total", "pirate", "evicted"): 2,
        ("lora_cache_requests_total", "pirate", "hit"): 4,
        ("lora_cache_requests_total", "pirate", "miss"): 5,
        ("lora_cache_requests_total", "pirate", "wait"): 6,
        ("lora_load_seconds_total", "pirate"): 0.5,
        ("lora_requests_running", "pirate"): 1,
        ("lora_requests_waiting", "pirate"): 7,
        ("lora_unexpected_misses_total", "pirate"): 5,
        ("lora_table_reloads_total",): 1,
        ("lora_table_failures_total",): 4,
    } == {key: value for key, value in Published().publish(counts=counts).items() if value}


def test_what_alerts_look_for_is_there_before_it_happens() -> None:
    """An increase from nothing to 1 is none to Prometheus. Outcomes show once they have happened."""
    found = Published().publish(counts={"pirate": row(hit=1), BASE: row(OK=1), UNKNOWN: row(NOT_FOUND=1)}, pages=4)

    assert 0 == found["lora_unexpected_misses_total", "pirate"]
    assert 0 == found["lora_table_failures_total",]
    assert {("", "OK"): 1, ("(unknown)", "NOT_FOUND"): 1} == of("lora_requests_total", found)
    assert {"lora_requests_total"} == {name for name, *labels in found if labels[:1] in ([BASE], [UNKNOWN])}
    assert {family.name for family in metrics.FAMILIES if family.type != "histogram"} - {"lora_adapter_loaded"} == {
        name for name, *_ in found
    }


def test_a_counter_never_falls_and_what_is_counted_no_more_does_not_run() -> None:
    """Whatever the counts do. Rows that are as they were change nothing."""
    published = Published()

    def publish(**counts: Row) -> tuple[float, float]:
        found = published.publish(counts=counts)
        return found["lora_requests_total", "pirate", "OK"], found["lora_requests_running", "pirate"]

    assert (3, 2) == publish(pirate=row(OK=3, running=2))
    assert (3, 2) == publish(pirate=row(OK=3, running=2))
    assert 0 == published.changes
    assert (3, 0) == publish()
    assert (3, 1) == publish(pirate=row(OK=1, running=1))
    assert (5, 0) == publish(pirate=row(OK=5))


def test_an_adapter_is_loaded_or_not_and_leaves_no_series_behind() -> None:
    """None with its name, when it leaves the table; and none with the rank of the content that it had before."""
    published = Published()

    def publish(held: set[int], **adapters: AdapterEntry) -> Series:
        return of("lora_adapter_loaded", published.publish(held=dict.fromkeys(held, 1), adapters=adapters))

    before, after = entry(1, adapter_sizes=(2, 8)), entry(3, adapter_sizes=(16,))
    other = {("haiku", "4", "true"): 1.0}
    haiku = entry(2, adapter_sizes=(4,), pinned=True)

    assert {("pirate", "8", "false"): 0.0, **other} == publish({2}, pirate=before, haiku=haiku)
    assert {("pirate", "8", "false"): 1.0, **other} == publish({1, 2}, pirate=before, haiku=haiku)
    assert {("pirate", "16", "false"): 0.0, **other} == publish({1, 2}, pirate=after, haiku=haiku)
    assert {("pirate", "16", "false"): 1.0, **other} == publish({2, 3}, pirate=after, haiku=haiku)
    assert other == publish({2, 3}, haiku=haiku)


def test_adapters_beyond_the_bound_are_one_series(monkeypatch: pytest.MonkeyPatch) -> None:
    """Its value is their number."""
    monkeypatch.setattr(metrics, "MOST_NAMES", 1)
    adapters = {name: entry(number) for number, name in enumerate("abcd")}
    found = Published().publish(held={0: 1, 2: 1, 3: 1}, adapters=adapters)

    assert {("a", "8", "false"): 1, (OTHERS, "", ""): 2} == of("lora_adapter_loaded", found)


def test_what_is_not_known_is_not_told() -> None:
    """Of an engine that reads adapters by itself, or whose cache has an unknown size."""
    found = Published().publish(held=None, pages=8, adapters={"pirate": entry()})

    assert not {name for name, *_ in found} & {"lora_adapter_loaded", "lora_cache_pages", "lora_cache_pages_used"}


def test_pages_rise_and_fall() -> None:
    """Those that are used."""
    published = Published()
    published.publish(pages=8, held={1: 3, 2: 2})
    found = published.publish(pages=8, held={1: 3})

    assert (8, 3) == (found["lora_cache_pages",], found["lora_cache_pages_used",])


def test_the_gateway_is_told_what_runs_and_what_waits() -> None:
    """In the words of its protocol. What waits does not run. One series at a time, with the time at which it began."""
    published = Published()

    def info(now: float, in_use: list[str], waiting: list[str]) -> Series:
        adapters: Mapping[str, AdapterEntry] = {name: entry() for name in "abcd"}
        return of("lora_requests_info", published.publish(now, in_use=in_use, waiting=waiting, adapters=adapters))

    assert {("4", "pirate", "haiku"): 7} == info(7, ["pirate", "haiku", "pirate"], ["haiku", "haiku"])
    assert {("4", "pirate", "haiku"): 7} == info(8, ["pirate"], ["haiku"])
    assert {("4", "pirate", ""): 9} == info(9, ["pirate"], [])


def test_what_is_observed_has_the_counts_and_the_sum_of_what_was_measured() -> None:
    """In the buckets of each value, round after round."""
    measured, observed = Statistics(), {family: [(0, 0.0)] * (len(BUCKETS) + 1) for family in metrics.HISTOGRAMS}
    values: dict[str, list[float]] = {}
    for seconds in ([0.0004, 0.0008, 0.3, 99.0], [], [0.0006, 0.3, 0.4]):
        for one in seconds:
            measured.took("wait", one)
        times = measured.times()
        for family, _, number, value in metrics.observations(observed, times):
            values.setdefault(family.name, []).extend([value] * number)
        observed = {family: times[what] for family, what in metrics.HISTOGRAMS.items()}

    assert ["lora_wait_seconds"] == [*values]
    assert pytest.approx([0.0006, 0.0006, 0.0006, 0.3, 0.35, 0.35, 99.0]) == sorted(values["lora_wait_seconds"])


def test_the_page_has_every_metric_with_its_type_and_labels() -> None:
    """And no other one of the resolver's."""
    lines = [line for line in Page(DOCS / "metrics.md").text.splitlines() if line.startswith("| `lora_")]
    cells = [[cell.strip() for cell in line.split("|")[1:4]] for line in lines]

    assert [(f"`{family.name}`", family.type, family.labels) for family in metrics.FAMILIES] == [
        (name, kind, tuple(re.findall(r"`(\w+)`", labels))) for name, kind, labels in cells
    ]
