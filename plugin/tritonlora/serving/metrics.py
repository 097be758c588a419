# SPDX-FileCopyrightText: the tritonlora authors
# SPDX-License-Identifier: Apache-2.0
"""The resolver's counts as Prometheus metrics.

The functions take values and return values: `samples` computes the value of each metric, and `publishing` publishes the
values.

The Kubernetes Gateway API Inference Extension reads the gauge `lora_requests_info` to send a request to a server that
has its adapter (docs/proposals/003-model-server-protocol). The labels of the gauge are the adapters that run and those
that wait. Its value is the time of the last change, in seconds since 1970, which tells the newest of several series.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TypeAlias

from .counters import LOADS, OUTCOMES, Counts


@dataclass(frozen=True, slots=True)
class Family:
    """A metric without its labels."""

    name: str
    description: str
    is_counter: bool


Labels: TypeAlias = "tuple[tuple[str, str], ...]"
Key: TypeAlias = "tuple[Family, Labels]"


@dataclass(frozen=True, slots=True)
class Sample:
    """A metric and its value now."""

    family: Family
    labels: Labels
    value: float


REQUESTS = Family("lora_requests_total", "Requests by lora_name (none: the base model) and outcome", is_counter=True)
LOADED = Family("lora_loads_total", "Adapters that the engine was sent, by reason", is_counter=True)
SECONDS = Family("lora_load_seconds_total", "Seconds from sending weights to the first token", is_counter=True)
RUNNING = Family("lora_requests_running", "Requests under way, those that wait included", is_counter=False)
MISSES = Family(
    "lora_unexpected_misses_total",
    "Times that the engine lacked an adapter that it should have had; requests for it may have failed",
    is_counter=True,
)
RELOADS = Family("lora_table_reloads_total", "Times that a changed adapters.json was read", is_counter=True)
FAILURES = Family("lora_table_failures_total", "Times that adapters.json could not be read", is_counter=True)
INFO = Family(
    "lora_requests_info", "Adapters that run and that wait; the value is when that last changed", is_counter=False
)
FAMILIES = (REQUESTS, LOADED, SECONDS, RUNNING, MISSES, RELOADS, FAILURES, INFO)


def samples(counts: Counts) -> Iterator[Sample]:
    """The values of all metrics except INFO."""
    for name, of_adapter in counts.items():
        adapter = ("lora_name", name)
        for outcome in OUTCOMES:
            yield Sample(REQUESTS, (adapter, ("outcome", outcome)), of_adapter[outcome])
        for reason in LOADS:
            yield Sample(LOADED, (adapter, ("reason", reason)), of_adapter[reason])
        yield Sample(SECONDS, (adapter,), of_adapter["load_seconds"])
        yield Sample(RUNNING, (adapter,), of_adapter["running"])
        yield Sample(MISSES, (adapter,), of_adapter["unexpected_misses"])
    yield Sample(RELOADS, (), sum(of_adapter["table_reloads"] for of_adapter in counts.values()))
    yield Sample(FAILURES, (), sum(of_adapter["table_failures"] for of_adapter in counts.values()))


def increments(published: Mapping[Key, float], counts: Counts) -> Iterator[Sample]:
    """The changes that bring the `published` values in step with `counts`.

    A counter never falls. A gauge without a count becomes 0.
    """
    now = dict.fromkeys(published, 0.0) | {(sample.family, sample.labels): sample.value for sample in samples(counts)}
    for (family, labels), value in now.items():
        change = value - published.get((family, labels), 0.0)
        if change > 0 or (change < 0 and not family.is_counter):
            yield Sample(family, labels, change)


def info_labels(in_use: Sequence[str], waiting: Sequence[str], max_lora: int) -> dict[str, str]:
    """The labels of INFO. An adapter of which a request waits counts as waiting, and not as running."""
    return {
        "max_lora": str(max_lora),
        "running_lora_adapters": ",".join(sorted({*in_use} - {*waiting})),
        "waiting_lora_adapters": ",".join(sorted({*waiting})),
    }
