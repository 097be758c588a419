# SPDX-FileCopyrightText: the tritonlora authors
# SPDX-License-Identifier: Apache-2.0
"""The counts of requests, loads and reloads, for each adapter, and how long loads and waits took."""

from __future__ import annotations

import threading
from bisect import bisect_left
from typing import TypeAlias

# The outcomes of requests: "OK", or the name of a Triton error code.
OUTCOMES = (
    "OK",
    "UNKNOWN",
    "INTERNAL",
    "NOT_FOUND",
    "INVALID_ARG",
    "UNAVAILABLE",
    "UNSUPPORTED",
    "ALREADY_EXISTS",
    "CANCELLED",
)
LOADS = ("first_use", "evicted")  # the reasons of loads
RESULTS = ("hit", "miss", "wait")  # how requests found the engine's cache, see `tickets.Ticket.result`
GAUGES = ("running", "waiting")  # columns that also fall
COLUMNS = (*OUTCOMES, *LOADS, *RESULTS, *GAUGES, "load_seconds", "unexpected_misses", "table_reloads", "table_failures")

BASE = ""  # the row of the base model
UNKNOWN = "(unknown)"  # the row of requests that were refused before their adapter was known; it is not a legal name
OTHERS = "*"  # the row of all adapters beyond MOST_NAMES; it is not a legal name
MOST_NAMES = 1024

TIMES = ("load", "wait", "first_token")  # what `Statistics.took` measures
BUCKETS = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0)  # upper bounds, s

Row: TypeAlias = "dict[str, float]"
Counts: TypeAlias = "dict[str, Row]"
# For each bucket, and for the one above the last bound: the number of values in it, and their sum in seconds.
Histogram: TypeAlias = "list[tuple[int, float]]"


class Statistics:
    """Counts by lora_name and column, and histograms of TIMES. Thread-safe."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._rows: Counts = {}
        self._times: dict[str, Histogram] = {name: [(0, 0.0)] * (len(BUCKETS) + 1) for name in TIMES}

    def add(self, lora_name: str, column: str, amount: float = 1.0) -> None:
        """Add `amount` to a column, one of COLUMNS, of an adapter."""
        with self._lock:
            add_to(self._rows, lora_name, column, amount)

    def took(self, what: str, seconds: float) -> None:
        """Note how long something took. `what` is one of TIMES."""
        bucket = bisect_left(BUCKETS, seconds)
        with self._lock:
            number, total = self._times[what][bucket]
            self._times[what][bucket] = (number + 1, total + seconds)

    def counts(self) -> Counts:
        """A copy of the counts, of the adapters for which something was counted."""
        with self._lock:
            return {name: dict(row) for name, row in self._rows.items()}

    def times(self) -> dict[str, Histogram]:
        """A copy of the histograms."""
        with self._lock:
            return {name: [*histogram] for name, histogram in self._times.items()}


def add_to(counts: Counts, lora_name: str, column: str, amount: float) -> None:
    """Add `amount` to a column of an adapter, or of OTHERS when the counts have MOST_NAMES rows already."""
    row = counts.get(lora_name)
    if row is None:
        name = lora_name if len(counts) < MOST_NAMES else OTHERS
        row = counts.setdefault(name, dict.fromkeys(COLUMNS, 0.0))
    row[column] += amount
