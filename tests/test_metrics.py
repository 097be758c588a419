# SPDX-FileCopyrightText: the tritonlora authors
# SPDX-License-Identifier: Apache-2.0
"""metrics.py: what is counted under which labels, against a stand-in for Triton's families."""

from __future__ import annotations

from typing import Any

from tritonlora import metrics
from tritonlora.metrics import Metrics


class Series:
    """One metric."""

    def __init__(self, values: dict[tuple[str, ...], float], key: tuple[str, ...]) -> None:
        self._values, self._key = values, key

    def increment(self, by: float) -> None:
        """Add."""
        self._values[self._key] = self._values.get(self._key, 0) + by

    def set(self, value: float) -> None:
        """Replace."""
        self._values[self._key] = value


def measured() -> tuple[Metrics, dict[tuple[str, ...], float]]:
    """Metrics, and the series that they set: (name, label values) -> value."""
    values: dict[tuple[str, ...], float] = {}

    class Family:
        def __init__(self, name: str, description: str, kind: Any) -> None:
            assert description
            assert kind in ("counter", "gauge")
            self._name = name

        def Metric(self, labels: dict[str, str]) -> Series:  # noqa: N802  Triton's name
            return Series(values, (self._name, *labels.values()))

    return Metrics(Family, "counter", "gauge"), values


def test_a_request_is_in_flight_until_it_ends_and_then_counted_with_its_outcome() -> None:
    """By adapter; the base model has a name that no adapter can have."""
    counts, values = measured()
    with counts.request("pirate") as one, counts.request(None):
        assert 1 == values["lora_router_requests_in_flight", "pirate"]
        one.outcome = "cancelled"

    assert 0 == values["lora_router_requests_in_flight", "pirate"]
    assert 1 == values["lora_router_requests_total", "pirate", "cancelled"]
    assert 1 == values["lora_router_requests_total", "(base)", "ok"]


def test_names_beyond_the_bound_share_one_label() -> None:
    """However many adapters come and go."""
    counts, values = measured()
    for number in range(metrics.MOST_NAMES + 50):
        counts.loaded(f"n{number}", "first_use", 0.1)
    names = {key[1] for key in values if key[0] == "lora_router_loads_total"}

    assert len(names) <= metrics.MOST_NAMES
    assert "(other)" in names


def test_lora_requests_info_lists_who_runs_and_who_waits_but_not_the_base_model() -> None:
    """Comma separated; an adapter that runs does not wait."""
    counts, values = measured()
    with counts.request("b") as one, counts.request("a"), counts.request("b"), counts.request(None):
        one.runs = True
        counts.publish_info(4)

    assert ("lora_requests_info", "4", "b", "a") in values
