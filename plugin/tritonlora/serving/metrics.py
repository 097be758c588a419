# SPDX-FileCopyrightText: the tritonlora authors
# SPDX-License-Identifier: Apache-2.0
"""What the resolver counts and believes, as Prometheus metrics.

The functions take values and return values. `publishing` applies the changes that they compute to Triton's metrics.

The Kubernetes Gateway API Inference Extension reads the gauge `lora_requests_info` to send a request to a server that
has its adapter (docs/proposals/003-model-server-protocol). The labels of the gauge are the adapters that run and those
that wait. Its value is the time of the last change, in seconds since 1970, which tells the newest of several series.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Literal, TypeAlias

from .adapter_table import AdapterEntry
from .counters import BASE, COLUMNS, LOADS, MOST_NAMES, OTHERS, OUTCOMES, RESULTS, UNKNOWN, Counts, Histogram


@dataclass(frozen=True, slots=True)
class Family:
    """A metric without the values of its labels."""

    name: str
    type: Literal["counter", "gauge", "histogram"]
    labels: tuple[str, ...]
    description: str


@dataclass(frozen=True, slots=True)
class Sample:
    """A metric and a value."""

    family: Family
    labels: tuple[str, ...]  # the values of `family.labels`, in their order
    value: float


REQUESTS = Family(
    "lora_requests_total",
    "counter",
    ("lora_name", "outcome"),
    "Requests by lora_name (none: the base model; (unknown): refused before the adapter was known) and outcome",
)
LOADED = Family("lora_loads_total", "counter", ("lora_name", "reason"), "Adapters that the engine was sent, by reason")
SECONDS = Family(
    "lora_load_seconds_total", "counter", ("lora_name",), "Seconds from sending weights to the first token"
)
RUNNING = Family(
    "lora_requests_running", "gauge", ("lora_name",), "Requests under way in lora_router, those that wait included"
)
WAITING = Family(
    "lora_requests_waiting", "gauge", ("lora_name",), "Requests that wait in the resolver for a load or for pages"
)
LOOKUPS = Family(
    "lora_cache_requests_total",
    "counter",
    ("lora_name", "result"),
    "Requests that went on to the engine: hit, by id at once; miss, at once with the weights; wait, after waiting",
)
MISSES = Family(
    "lora_unexpected_misses_total",
    "counter",
    ("lora_name",),
    "Times that the engine lacked an adapter that it should have had; requests for it may have failed",
)
RESIDENT = Family(
    "lora_adapter_loaded",
    "gauge",
    ("lora_name", "rank", "pinned"),
    "1: the resolver believes that the engine holds the adapter; 0: not",
)
PAGES = Family("lora_cache_pages", "gauge", (), "Pages of the engine's adapter cache")
PAGES_USED = Family("lora_cache_pages_used", "gauge", (), "Pages of the adapters that the engine is believed to hold")
LOAD_TIMES = Family("lora_load_seconds", "histogram", (), "Seconds of a load by the resolver, to the first token")
WAIT_TIMES = Family(
    "lora_wait_seconds", "histogram", (), "Seconds from a request's arrival at the resolver until it went on"
)
FIRST_TOKEN_TIMES = Family(
    "lora_time_to_first_token_seconds",
    "histogram",
    (),
    "Seconds from a streamed request's arrival at an instance of lora_router to its first response",
)
RELOADS = Family("lora_table_reloads_total", "counter", (), "Times that a changed adapters.json was read")
FAILURES = Family("lora_table_failures_total", "counter", (), "Times that adapters.json could not be read")
INFO = Family(
    "lora_requests_info",
    "gauge",
    ("max_lora", "running_lora_adapters", "waiting_lora_adapters"),
    "Adapters that run and that wait; the value is when that last changed",
)
FAMILIES = (
    *(REQUESTS, LOOKUPS, RUNNING, WAITING, LOADED, SECONDS, MISSES, RESIDENT, PAGES, PAGES_USED),
    *(LOAD_TIMES, WAIT_TIMES, FIRST_TOKEN_TIMES, RELOADS, FAILURES, INFO),
)

# Column of the counts -> its metric, and the labels after lora_name.
_OF_ADAPTERS: dict[str, tuple[Family, tuple[str, ...]]] = {
    **{outcome: (REQUESTS, (outcome,)) for outcome in OUTCOMES},
    **{reason: (LOADED, (reason,)) for reason in LOADS},
    **{result: (LOOKUPS, (result,)) for result in RESULTS},
    "running": (RUNNING, ()),
    "waiting": (WAITING, ()),
    "load_seconds": (SECONDS, ()),
    "unexpected_misses": (MISSES, ()),
}
_OF_TABLE = {"table_reloads": RELOADS, "table_failures": FAILURES}  # counted in the row of BASE
HISTOGRAMS = {LOAD_TIMES: "load", WAIT_TIMES: "wait", FIRST_TOKEN_TIMES: "first_token"}  # of `counters.TIMES`

Published: TypeAlias = "Mapping[Family, Mapping[tuple[str, ...], float]]"  # family -> labels -> value
# Family -> for each of its buckets, as in `counters.Histogram`, the number of values and their sum.
Observed: TypeAlias = "Mapping[Family, Histogram]"


@dataclass(frozen=True, slots=True)
class Snapshot:
    """What the resolver counts and believes at one time."""

    counts: Counts
    times: Mapping[str, Histogram]
    in_use: Collection[str]  # lora_names
    waiting: Collection[str]
    adapters: Mapping[str, AdapterEntry]  # all that are registered, by lora_name
    held: Mapping[int, int] | None  # lora_task_id -> pages, that the engine is believed to hold; None: it is not known
    pages: int  # of the engine's adapter cache; 0: not known


def changed(before: Counts, now: Counts) -> Counts:
    """The rows that differ. A row that is gone has zeros."""
    rows = {name: row for name, row in now.items() if row != before.get(name)}
    return rows | {name: dict.fromkeys(COLUMNS, 0.0) for name in before.keys() - now.keys()}


def samples_of_rows(rows: Counts) -> Iterator[Sample]:
    """The values of counted columns.

    They show from 0 on, so that Prometheus sees the first increase. Outcomes show once they are counted, and so does
    all that is counted for the base model.
    """
    for name, row in rows.items():
        for column, (family, labels) in _OF_ADAPTERS.items():
            if row[column] or (name not in (BASE, UNKNOWN) and family is not REQUESTS):
                yield Sample(family, (name, *labels), row[column])


def samples_of_state(snapshot: Snapshot, now: float) -> Iterator[Sample]:
    """The values of all other metrics except histograms. `now` is in seconds since 1970."""
    base = snapshot.counts.get(BASE, {})
    for column, family in _OF_TABLE.items():
        yield Sample(family, (), base.get(column, 0.0))
    if snapshot.held is not None:
        if snapshot.pages:
            yield Sample(PAGES, (), snapshot.pages)
            yield Sample(PAGES_USED, (), sum(snapshot.held.values()))
        yield from _residents(snapshot.adapters, snapshot.held)
    yield Sample(INFO, info_labels(snapshot.in_use, snapshot.waiting, len(snapshot.adapters)), now)


def _residents(adapters: Mapping[str, AdapterEntry], held: Collection[int]) -> Iterator[Sample]:
    others = 0
    for number, (name, entry) in enumerate(adapters.items()):
        is_held = entry.lora_task_id in held
        if number < MOST_NAMES:
            pinned = "true" if entry.pinned else "false"
            yield Sample(RESIDENT, (name, _rank(entry), pinned), is_held)
        else:
            others += is_held
    if len(adapters) > MOST_NAMES:
        yield Sample(RESIDENT, (OTHERS, "", ""), others)


def gauges_of(adapters: Mapping[str, AdapterEntry]) -> Iterator[tuple[Family, tuple[str, ...]]]:
    """The family and labels of each series of a gauge that a resolver may have published for these adapters."""
    yield from ((PAGES, ()), (PAGES_USED, ()), (RESIDENT, (OTHERS, "", "")))
    for name in (BASE, OTHERS, *adapters):
        yield from ((RUNNING, (name,)), (WAITING, (name,)))
    for name, entry in adapters.items():
        yield from ((RESIDENT, (name, _rank(entry), pinned)) for pinned in ("false", "true"))


def _rank(entry: AdapterEntry) -> str:
    return str(max(entry.adapter_sizes, default=0))


def info_labels(in_use: Collection[str], waiting: Collection[str], max_lora: int) -> tuple[str, str, str]:
    """The labels of INFO. An adapter of which a request waits counts as waiting, and not as running."""
    running = sorted({*in_use} - {*waiting})
    return str(max_lora), ",".join(running), ",".join(sorted({*waiting}))


def outdated(published: Published, samples: Iterable[Sample]) -> list[Family]:
    """The families with labels that no longer hold: of an adapter that left the table, or of INFO before a change."""
    now = {(sample.family, sample.labels) for sample in samples}
    return [family for family in (RESIDENT, INFO) if any((family, labels) not in now for labels in published[family])]


def increments(published: Published, samples: Iterable[Sample]) -> Iterator[Sample]:
    """The changes that bring the `published` values in step with `samples`. A counter never falls."""
    for sample in samples:
        before = published[sample.family].get(sample.labels)
        if before is None:
            yield sample
        elif sample.family is not INFO:  # its series keep the time at which they began
            change = sample.value - before
            if change > 0 or (change < 0 and sample.family.type == "gauge"):
                yield Sample(sample.family, sample.labels, change)


def observations(observed: Observed, times: Mapping[str, Histogram]) -> Iterator[tuple[Family, int, int, float]]:
    """(family, bucket, number, value): so many values to observe, which bring `observed` in step with `times`.

    Each value is the mean of those that were measured, so that counts and sums are theirs.
    """
    for family, what in HISTOGRAMS.items():
        for bucket, (number, total) in enumerate(times[what]):
            number_before, total_before = observed[family][bucket]
            if new := number - number_before:
                yield family, bucket, new, (total - total_before) / new
