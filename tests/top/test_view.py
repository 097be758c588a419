# SPDX-FileCopyrightText: the tritonlora authors
# SPDX-License-Identifier: Apache-2.0
"""view.py: two looks at a server in, a view out."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest

from tritonlora import exposition
from tritonlora.errors import ServerError
from tritonlora.top.look import Look
from tritonlora.top.view import FIGURES, Row, View, document, quantile, summed, view_of

BEFORE = """\
lora_requests_total{lora_name="pirate",outcome="OK",version="1"} 100
lora_requests_total{lora_name="pirate",outcome="UNAVAILABLE",version="1"} 1
lora_requests_total{lora_name="",outcome="OK",version="1"} 5
lora_loads_total{lora_name="pirate",reason="first_use",version="1"} 1
lora_loads_total{lora_name="pirate",reason="evicted",version="1"} 3
lora_load_seconds_total{lora_name="pirate",version="1"} 0.2
lora_wait_seconds_bucket{le="0.1"} 10
lora_wait_seconds_bucket{le="0.2"} 10
lora_wait_seconds_bucket{le="+Inf"} 10
"""
AFTER = """\
lora_requests_total{lora_name="pirate",outcome="OK",version="1"} 118
lora_requests_total{lora_name="pirate",outcome="UNAVAILABLE",version="1"} 3
lora_requests_total{lora_name="pirate",outcome="CANCELLED",version="1"} 4
lora_requests_total{lora_name="",outcome="OK",version="1"} 5
lora_requests_total{lora_name="haiku",outcome="OK",version="1"} 2
lora_loads_total{lora_name="pirate",reason="first_use",version="1"} 1
lora_loads_total{lora_name="pirate",reason="evicted",version="1"} 5
lora_load_seconds_total{lora_name="pirate",version="1"} 0.3
lora_requests_running{lora_name="pirate",version="1"} 7
lora_requests_waiting{lora_name="pirate",version="1"} 2
lora_adapter_loaded{lora_name="pirate",rank="8",pinned="true",version="1"} 1
lora_adapter_loaded{lora_name="haiku",rank="8",pinned="false",version="1"} 0
lora_cache_requests_total{lora_name="pirate",result="hit",version="1"} 60
lora_cache_requests_total{lora_name="pirate",result="miss",version="1"} 2
lora_cache_requests_total{lora_name="pirate",result="wait",version="1"} 18
lora_cache_pages 16
lora_cache_pages_used 12
lora_wait_seconds_bucket{le="0.1"} 20
lora_wait_seconds_bucket{le="0.2"} 110
lora_wait_seconds_bucket{le="+Inf"} 110
"""


def seen(text: str, seconds: float = 0.0, states: dict[str, str] | None = None) -> Look:
    """A look at a server with these metrics."""
    return Look(seconds, is_ready=True, samples=exposition.parse(text), states=states)


def row(view: View, name: str) -> Row:
    """The only row of that adapter."""
    [found] = [one for one in view.rows if one.lora_name == name]
    return found


def test_rates_are_gains_by_seconds_and_counts_are_those_of_the_second_look() -> None:
    """A client that left is a request, and no error."""
    view = view_of(seen(BEFORE, 10.0), seen(AFTER, 14.0, {"pirate": "warm", "haiku": "cold"}))
    pirate = row(view, "pirate")

    assert (6.0, 0.5) == (pirate.requests_per_second, pirate.loads_per_second)
    assert (7, 2, 6, 3) == (pirate.running, pirate.waiting, pirate.loads, pirate.errors)
    assert 0.3 == pirate.load_seconds
    assert (0.75, 0.025, 0.225) == pirate.shares
    assert ("warm", True) == (pirate.state, pirate.pinned)
    assert (16, 12, True) == (view.cache_pages, view.cache_pages_used, view.is_ready)
    assert 6.5 == view.total.requests_per_second


def test_an_adapter_that_was_not_there_before_has_gained_all_that_it_has() -> None:
    """Its counters began at 0, between the two looks."""
    haiku = row(view_of(seen(BEFORE, 10.0), seen(AFTER, 14.0)), "haiku")

    assert (0.5, 0.0, None) == (
        haiku.requests_per_second,
        haiku.loads,
        haiku.shares,
    )


def test_a_restart_between_the_looks_gives_no_negative_rate() -> None:
    """What is there now was counted since."""
    view = view_of(seen(AFTER, 10.0), seen(BEFORE, 12.0))

    assert (101 / 2, 3 / 2) == (row(view, "pirate").requests_per_second, row(view, "pirate").loads_per_second)
    assert all((one.requests_per_second or 0.0) >= 0 for one in view.rows)
    assert (0.05, 0.099) == (view.wait_p50, view.wait_p99)


def test_without_a_look_before_there_are_no_rates() -> None:
    """All else is there."""
    view = view_of(None, seen(AFTER))

    assert (None, None, None) == (row(view, "pirate").requests_per_second, view.wait_p50, view.total.loads_per_second)
    assert 6 == row(view, "pirate").loads


def test_an_older_server_lacks_figures_and_not_rows() -> None:
    """Of a metric that it does not have, nothing is known: that is not 0."""
    view = view_of(seen(BEFORE), seen(BEFORE, 2.0, {"cold1": "cold"}))
    cold = row(view, "cold1")

    assert (None, None, None) == (cold.running, cold.waiting, cold.shares)
    assert (0.0, 0.0, "cold", None) == (cold.requests_per_second, cold.errors, cold.state, cold.pinned)
    assert (None, None) == (view.cache_pages, view.first_token_p50)


@pytest.mark.parametrize(
    ("listed", "value", "state"),
    [
        ("warm", 1, "warm"),
        ("unavailable", 0, "unavailable"),
        ("unknown", 1, "loaded"),
        ("unknown", 0, "unknown"),
        (None, 1, "loaded"),
        (None, 0, "cold"),
        ("unknown", None, "unknown"),
        (None, None, None),
    ],
)
def test_the_state_is_the_listings_and_else_what_the_resolver_believes(
    listed: str | None, value: int | None, state: str | None
) -> None:
    """The listing knows of files that are missing; without the size of the cache it does not know what is held."""
    text = 'lora_requests_total{lora_name="a",outcome="OK"} 1\n'
    text += "" if value is None else f'lora_adapter_loaded{{lora_name="a",pinned="false",rank="8"}} {value}\n'

    assert state == row(view_of(None, seen(text, states=None if listed is None else {"a": listed})), "a").state


def test_what_is_counted_and_no_longer_registered_was_removed() -> None:
    """The base model and the rows of all others and of refused requests are never registered."""
    text = "".join(
        f'lora_requests_total{{lora_name="{name}",outcome="OK"}} 1\n' for name in ("gone", "", "*", "(unknown)")
    )
    view = view_of(None, seen(text, states={}))

    assert {"gone": "removed", "": None, "*": None, "(unknown)": None} == {
        one.lora_name: one.state for one in view.rows
    }


def test_a_sum_knows_what_any_of_its_rows_knows() -> None:
    """And nothing of what none knows."""
    some = Row("a", "warm", True, **dict.fromkeys(FIGURES, 1.0))
    none = Row("b", "cold", False, **dict.fromkeys(FIGURES))

    assert Row("2 more", None, None, **dict.fromkeys(FIGURES, 2.0)) == summed("2 more", [some, none, some])
    assert replace(none, lora_name="", state=None, pinned=None) == summed("", [none]) == summed("", [])


@pytest.mark.parametrize(
    ("buckets", "q", "expected"),
    [
        ({0.1: 10, 0.2: 20, math.inf: 20}, 0.5, 0.1),
        ({0.1: 10, 0.2: 20, math.inf: 20}, 0.75, 0.15),
        ({0.1: 0, 0.2: 0, 0.4: 4, math.inf: 4}, 0.5, 0.3),
        ({0.1: 0, 0.2: 4, math.inf: 100}, 0.99, 0.2),
        ({0.1: 0, math.inf: 0}, 0.5, None),
        ({}, 0.5, None),
    ],
)
def test_quantiles_are_promql_s(buckets: dict[float, float], q: float, expected: float | None) -> None:
    """By hand: histogram_quantile spreads the observations of a bucket evenly."""
    assert expected == pytest.approx(quantile(buckets, q))


def test_a_histogram_without_bounds_is_refused() -> None:
    """By name."""
    with pytest.raises(ServerError, match="expected a number as le"):
        view_of(seen(""), seen('lora_wait_seconds_bucket{le="soon"} 1', 1.0))


def test_the_document_has_the_totals_and_every_adapter() -> None:
    """As JSON has them."""
    found = document(view_of(seen(BEFORE), seen(AFTER, 4.0)))

    assert (6.5, 7, 2, 0.5) == tuple(
        found[name] for name in ("requests_per_second", "running", "waiting", "loads_per_second")
    )
    assert ["", "haiku", "pirate"] == [one["lora_name"] for one in found["adapters"]]
    assert (0.3, 60) == (found["adapters"][2]["load_seconds"], found["adapters"][2]["hits"])
    assert None is found["problem"]
