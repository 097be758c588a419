# SPDX-FileCopyrightText: the tritonlora authors
# SPDX-License-Identifier: Apache-2.0
"""Compute a view of a server from two looks at it.

Rates and quantiles are those between the two looks. All other figures are those of the second look: counts since the
server's start, and what is so now. A figure is None where the server does not have its metric, or where there was no
first look. A counter that fell was reset: the server has started again, and has counted from 0 since.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Iterable, Iterator, Mapping
from dataclasses import asdict, dataclass, fields
from typing import Any, TypeAlias

from tritonlora.errors import ServerError
from tritonlora.exposition import Labels, Samples
from tritonlora.serving.counters import BASE, OTHERS, OUTCOMES, UNKNOWN
from tritonlora.top.look import Look

LOADED, COLD, REMOVED = "loaded", "cold", "removed"
_ERRORS = {*OUTCOMES} - {"OK", "CANCELLED"}  # a client that leaves is no error of the server


@dataclass(frozen=True, slots=True)
class Row:
    """One adapter, or several together."""

    lora_name: str  # BASE: the base model; OTHERS: all adapters without counters of their own; or UNKNOWN
    state: str | None
    pinned: bool | None
    requests_per_second: float | None
    running: float | None  # those that wait included
    waiting: float | None
    loads: float | None
    loads_per_second: float | None
    load_seconds: float | None  # of the loads by the resolver; a load with a request's own weights is not timed
    hits: float | None
    misses: float | None
    waits: float | None
    errors: float | None

    @property
    def shares(self) -> tuple[float, float, float] | None:
        """The shares of hits, misses and waits among the requests that looked for an adapter in the engine's cache."""
        counts = [count or 0.0 for count in (self.hits, self.misses, self.waits)]
        return (counts[0] / sum(counts), counts[1] / sum(counts), counts[2] / sum(counts)) if sum(counts) else None


FIGURES = tuple(field.name for field in fields(Row))[3:]


@dataclass(frozen=True, slots=True)
class View:
    """A server and its adapters. Times are in seconds."""

    is_ready: bool | None
    problem: str | None  # why there was no look at the server
    has_metrics: bool  # any of tritonlora's
    cache_pages: float | None
    cache_pages_used: float | None
    wait_p50: float | None
    wait_p99: float | None
    load_p50: float | None
    load_p99: float | None
    first_token_p50: float | None
    first_token_p99: float | None
    rows: tuple[Row, ...]  # by name

    @property
    def total(self) -> Row:
        """All rows together."""
        return summed("", self.rows)


NOTHING = View(None, None, False, None, None, None, None, None, None, None, None, ())


def view_of(before: Look | None, now: Look) -> View:
    """The view of two looks at a server. Without a look `before` it has no rates and quantiles."""
    gained = None if before is None else _gained(before.samples, now.samples)
    wait, load, first = (
        _buckets(gained, f"lora_{what}_seconds_bucket") for what in ("wait", "load", "time_to_first_token")
    )
    return View(
        is_ready=now.is_ready,
        problem=None,
        has_metrics=any(metric.startswith("lora_") for metric, _ in now.samples),
        cache_pages=_value(now.samples, "lora_cache_pages"),
        cache_pages_used=_value(now.samples, "lora_cache_pages_used"),
        wait_p50=quantile(wait, 0.5),
        wait_p99=quantile(wait, 0.99),
        load_p50=quantile(load, 0.5),
        load_p99=quantile(load, 0.99),
        first_token_p50=quantile(first, 0.5),
        first_token_p99=quantile(first, 0.99),
        rows=tuple(_rows(gained, now, now.seconds - before.seconds if before else 0.0)),
    )


def summed(name: str, rows: Iterable[Row]) -> Row:
    """Several rows as one. A figure that none of them has is None."""
    rows = tuple(rows)
    figures: dict[str, float | None] = {}
    for figure in FIGURES:
        known = [value for row in rows if (value := getattr(row, figure)) is not None]
        figures[figure] = sum(known) if known else None
    return Row(name, None, None, **figures)


def quantile(buckets: Mapping[float, float], q: float) -> float | None:
    """The `q` quantile of a histogram, as PromQL's histogram_quantile estimates it; None without an observation.

    `buckets` are cumulative: upper bound -> number of observations up to it. Within a bucket, observations are taken to
    be spread evenly. In the last bucket, which has no upper bound, the quantile is the lower bound.
    """
    total = buckets.get(math.inf, 0.0)
    if not total > 0:
        return None
    lower, below = 0.0, 0.0
    for bound, count in sorted(buckets.items()):
        if count >= q * total and count > below:
            return lower if bound == math.inf else lower + (bound - lower) * (q * total - below) / (count - below)
        lower, below = bound, count
    return None


def document(view: View) -> dict[str, Any]:
    """A view as the JSON fields of `top --json`."""
    total = view.total
    whole = {name: value for name, value in asdict(view).items() if name not in ("rows", "has_metrics")}
    sums = {name: getattr(total, name) for name in ("requests_per_second", "loads_per_second", "running", "waiting")}
    return {**whole, **sums, "adapters": [asdict(row) for row in view.rows]}


def _gained(before: Samples, now: Samples) -> Samples:
    """What each counter gained."""
    return {key: value - before.get(key, 0.0) if value >= before.get(key, 0.0) else value for key, value in now.items()}


def _buckets(gained: Samples | None, metric: str) -> dict[float, float]:
    """A histogram's upper bounds -> observations up to each bound. Series with other labels are added up."""
    found: dict[float, float] = {}
    for (name, labels), value in (gained or {}).items():
        if name == metric:
            bound = _bound(labels)
            found[bound] = found.get(bound, 0.0) + value
    return found


def _bound(labels: Labels) -> float:
    try:
        return float(dict(labels)["le"])
    except (KeyError, ValueError):
        raise ServerError(
            f"the metrics have a histogram with labels {dict(labels)!r:.200}, expected a number as le"
        ) from None


def _value(samples: Samples, metric: str) -> float | None:
    values = [value for (name, _), value in samples.items() if name == metric]
    return sum(values) if values else None


_Series: TypeAlias = "dict[str, list[tuple[dict[str, str], float]]]"  # metric -> labels and value of each series


def _series(samples: Samples) -> _Series:
    found: _Series = {}
    for (metric, labels), value in samples.items():
        found.setdefault(metric, []).append((dict(labels), value))
    return found


def _sums(series: _Series, metric: str, **only: Collection[str]) -> dict[str, float] | None:
    """lora_name -> the sum of the series that have one of the values `only` in each label; None without the metric."""
    if metric not in series:
        return None
    found: dict[str, float] = {}
    for labels, value in series[metric]:
        if all(labels.get(label) in values for label, values in only.items()):
            name = labels.get("lora_name", BASE)
            found[name] = found.get(name, 0.0) + value
    return found


def _rows(gained: Samples | None, now: Look, seconds: float) -> Iterator[Row]:
    series, rates = _series(now.samples), _series({key: value / seconds for key, value in (gained or {}).items()})
    results = {
        result: _sums(series, "lora_cache_requests_total", result=[result]) for result in ("hit", "miss", "wait")
    }
    figures = {
        "requests_per_second": _sums(rates, "lora_requests_total"),
        "running": _sums(series, "lora_requests_running"),
        "waiting": _sums(series, "lora_requests_waiting"),
        "loads": _sums(series, "lora_loads_total"),
        "loads_per_second": _sums(rates, "lora_loads_total"),
        "load_seconds": _sums(series, "lora_load_seconds_total"),
        "hits": results["hit"],
        "misses": results["miss"],
        "waits": results["wait"],
        "errors": _sums(series, "lora_requests_total", outcome=_ERRORS),
    }
    loaded, pinned = (_sums(series, "lora_adapter_loaded", **only) for only in ({}, {"pinned": ["true"]}))
    counted = {labels["lora_name"] for found in series.values() for labels, _ in found if "lora_name" in labels}
    for name in sorted({*(now.states or ()), *counted}):
        row = {figure: None if sums is None else sums.get(name, 0.0) for figure, sums in figures.items()}
        yield Row(name, _state(name, now.states, loaded), None if pinned is None else name in pinned, **row)


def _state(name: str, states: Mapping[str, str] | None, loaded: Mapping[str, float] | None) -> str | None:
    """The listing's state. Where the listing does not know, or is not there, what the resolver believes, a metric.

    An adapter that the resolver does not take for loaded may be there all the same, if the listing does not know.
    """
    if name in (BASE, OTHERS, UNKNOWN):
        return None
    listed = None if states is None else states.get(name, REMOVED)
    if listed in (None, "unknown") and loaded is not None and name in loaded:
        return LOADED if loaded[name] else listed or COLD
    return listed
