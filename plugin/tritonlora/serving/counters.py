# SPDX-FileCopyrightText: the tritonlora authors
# SPDX-License-Identifier: Apache-2.0
"""The counts of requests, loads and reloads, for each adapter."""

from __future__ import annotations

import threading

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
COLUMNS = (*OUTCOMES, *LOADS, "load_seconds", "running", "unexpected_misses", "table_reloads", "table_failures")

BASE = ""  # the row of the base model, and of requests that name no known adapter
OTHERS = "*"  # the row of all adapters beyond MOST_NAMES; it is not a legal name
MOST_NAMES = 1024

Counts = dict[str, dict[str, float]]


class Statistics:
    """Counts by lora_name and column. Thread-safe."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._rows: Counts = {}

    def add(self, lora_name: str, column: str, amount: float = 1.0) -> None:
        """Add `amount` to a column, one of COLUMNS, of an adapter."""
        with self._lock:
            row = self._rows.get(lora_name)
            if row is None:
                name = lora_name if len(self._rows) < MOST_NAMES else OTHERS
                row = self._rows.setdefault(name, dict.fromkeys(COLUMNS, 0.0))
            row[column] += amount

    def counts(self) -> Counts:
        """A copy of the counts, of the adapters for which something was counted."""
        with self._lock:
            return {name: dict(row) for name, row in self._rows.items()}
