# SPDX-FileCopyrightText: the tritonlora authors
# SPDX-License-Identifier: Apache-2.0
"""metrics.py: counts as metrics."""

from __future__ import annotations

from tritonlora.serving import metrics
from tritonlora.serving.counters import BASE, COLUMNS, Counts


def row(**counted: float) -> dict[str, float]:
    """Counts of an adapter."""
    return dict.fromkeys(COLUMNS, 0.0) | counted


def test_each_count_becomes_a_sample_with_its_labels() -> None:
    """Those that are 0 say so, and table events belong to no adapter."""
    counts = {
        BASE: row(OK=2, table_reloads=1, table_failures=4),
        "pirate": row(OK=1, UNAVAILABLE=3, first_use=1, evicted=2, load_seconds=0.5, running=1, unexpected_misses=5),
    }

    assert {
        ("lora_requests_total", (("lora_name", ""), ("outcome", "OK")), 2),
        ("lora_requests_total", (("lora_name", "pirate"), ("outcome", "OK")), 1),
        ("lora_requests_total", (("lora_name", "pirate"), ("outcome", "UNAVAILABLE")), 3),
        ("lora_loads_total", (("lora_name", "pirate"), ("reason", "first_use")), 1),
        ("lora_loads_total", (("lora_name", "pirate"), ("reason", "evicted")), 2),
        ("lora_load_seconds_total", (("lora_name", "pirate"),), 0.5),
        ("lora_requests_running", (("lora_name", "pirate"),), 1),
        ("lora_unexpected_misses_total", (("lora_name", "pirate"),), 5),
        ("lora_table_reloads_total", (), 1),
        ("lora_table_failures_total", (), 4),
    } == {(sample.family.name, sample.labels, sample.value) for sample in metrics.samples(counts) if sample.value}


def test_a_counter_never_falls_and_what_is_counted_no_more_does_not_run() -> None:
    """Whatever the counts do."""
    published: dict[metrics.Key, float] = {}

    def publish(counts: Counts) -> dict[tuple[str, str], float]:
        for sample in list(metrics.increments(published, counts)):
            key = (sample.family, sample.labels)
            published[key] = published.get(key, 0.0) + sample.value
        return {(family.name, dict(labels)["lora_name"]): value for (family, labels), value in published.items()}

    requests, running = ("lora_requests_total", "pirate"), ("lora_requests_running", "pirate")

    assert {requests: 3, running: 2} == publish({"pirate": row(OK=3, running=2)})
    assert {requests: 3, running: 0} == publish({})
    assert {requests: 3, running: 1} == publish({"pirate": row(OK=1, running=1)})
    assert {requests: 5, running: 0} == publish({"pirate": row(OK=5)})


def test_the_gateway_is_told_what_runs_and_what_waits() -> None:
    """In the words of its protocol. What waits does not run."""

    assert {
        "max_lora": "4",
        "running_lora_adapters": "pirate",
        "waiting_lora_adapters": "haiku",
    } == metrics.info_labels(["pirate", "haiku", "pirate"], ["haiku", "haiku"], 4)
