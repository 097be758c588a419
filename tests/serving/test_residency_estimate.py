# SPDX-FileCopyrightText: the tritonlora authors
# SPDX-License-Identifier: Apache-2.0
"""estimate.py: what the resolver takes for granted."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from dataclasses import dataclass, field

import pytest
from hypothesis import given
from hypothesis import strategies as st

from table import entry
from tritonlora.serving.adapter_table import AdapterTable, with_adapter, with_warm, without_adapter
from tritonlora.serving.residency_estimate import SETTLE_SECONDS, ResidencyEstimate, started_at, warmed_at_start

LONGEST, RESEND = 60.0, 10.0


def table_of(*pages: int | None) -> AdapterTable:
    """Adapters with the ids 1 and so on, which take so many pages."""
    table = AdapterTable()
    for task_id, size in enumerate(pages, 1):
        table = with_adapter(table, f"n{task_id}", entry(task_id, pages=size))
    return table


def ask(estimate: ResidencyEstimate, task_id: int, now: float) -> bool:
    """Whether a request brings its weights."""
    sends = estimate.must_send(task_id, now)
    if sends:
        estimate.sent(task_id, now)
    return sends


@dataclass
class Engine:
    """A cache that evicts the adapter whose last request ended longest ago, of those that are not in use."""

    room: int
    held: dict[int, tuple[int, float]] = field(default_factory=dict)  # id -> pages, when its last request ends

    def ask(self, task_id: int, pages: int, now: float, ends: float, *, weights: bool) -> bool:
        """Whether a request that is in use until `ends` finds its adapter."""
        before = self.held.pop(task_id, None)
        if before is None:
            if not weights:
                return False
            for other, (_, ended) in sorted(self.held.items(), key=lambda item: item[1][1]):
                if sum(size for size, _ in self.held.values()) + pages > self.room and ended <= now:
                    del self.held[other]
            if sum(size for size, _ in self.held.values()) + pages > self.room:
                return True  # an error of another kind: every adapter is in use
        self.held[task_id] = (pages, max(ends, before[1] if before else ends))
        return True


REQUESTS = st.lists(st.tuples(st.floats(0, 30), st.integers(1, 6), st.floats(0, LONGEST)), max_size=80)


@given(REQUESTS, st.lists(st.integers(1, 3), min_size=6, max_size=6), st.integers(1, 14), st.integers(0, 6))
def test_the_engine_has_every_adapter_that_goes_by_its_id_alone(
    requests: list[tuple[float, int, float]], pages: list[int], room: int, warm: int
) -> None:
    """Whatever was asked for when, and however long that took, within the longest request."""
    engine = Engine(room)
    for task_id in range(1, warm + 1):
        engine.ask(task_id, pages[task_id - 1], 0, 0, weights=True)
    estimate = ResidencyEstimate(
        table_of(*pages), range(1, warm + 1), [], room, resend_seconds=RESEND, longest_request_seconds=LONGEST
    )
    now = 0.0
    for pause, task_id, takes in requests:
        now += pause
        sends = ask(estimate, task_id, now)

        assert engine.ask(task_id, pages[task_id - 1], now, now + takes, weights=sends)


def test_an_adapter_comes_with_its_weights_until_they_have_arrived_and_now_and_then() -> None:
    """So that a request that the engine refused does no harm for long."""
    estimate = ResidencyEstimate(table_of(1, 1), [], [], 2, resend_seconds=RESEND)
    times = (0.0, SETTLE_SECONDS / 2, SETTLE_SECONDS, RESEND - 0.1, RESEND, RESEND + 0.1)

    assert [True, True, False, False, True, False] == [ask(estimate, 1, now) for now in times]


def test_weights_that_could_not_be_sent_are_not_believed_to_be_there() -> None:
    """Their file was missing, say: `sent` was not called."""
    estimate = ResidencyEstimate(table_of(1), [], [], 1)

    assert [True, True, True] == [estimate.must_send(1, now) for now in (0.0, 1.0, 2.0)]


def test_where_all_fit_those_of_the_start_never_come_with_weights() -> None:
    """As long as what has replaced others fits beside them."""
    table = table_of(1, 1)
    estimate = ResidencyEstimate(table, [1, 2], [], 3)
    assert not ask(estimate, 1, 0)
    estimate.see(with_adapter(table, "n2", entry(3, pages=1)))
    assert not ask(estimate, 1, 0)
    estimate.see(with_adapter(table, "n2", entry(4, pages=1)))

    assert ask(estimate, 1, 0)


def test_adapters_that_came_and_went_unseen_may_have_evicted_others() -> None:
    """Between two requests."""
    table = table_of(1)
    estimate = ResidencyEstimate(table, [1], [], 9)
    more = with_adapter(table, "n2", entry(2, pages=1))
    estimate.see(without_adapter(more, "n2"))

    assert ask(estimate, 1, 0)


def test_a_resolver_that_is_loaded_later_knows_that_there_were_others() -> None:
    """Which its table says nothing of but their ids; those that the engine has never had are no matter."""
    table = with_adapter(with_adapter(table_of(1, 1), "n2", entry(3, pages=1)), "n2", entry(4, pages=1))
    assert (2, 3) == tuple(table.retired_lora_task_ids)

    assert ask(ResidencyEstimate(table, [1], [], 9), 1, 0)
    assert ask(ResidencyEstimate(table, [1], [2], 9), 1, 0)
    assert not ask(ResidencyEstimate(table, [1], [2, 3], 9), 1, 0)


def test_an_adapter_that_is_warm_no_more_is_not_there_after_the_engine_is_loaded_again() -> None:
    """Of which the resolver is told nothing."""
    table = table_of(1)
    estimate = ResidencyEstimate(table, [1], [], 9)
    estimate.see(with_warm(table, "n1", False))

    assert ask(estimate, 1, 0)


@pytest.mark.parametrize(
    ("pages", "cache_pages"), [((1, 1), 0), ((1, None), 9), ((5, 5), 9)], ids=["cache", "adapter", "too small"]
)
def test_where_it_is_not_known_that_all_fit_being_warmed_means_nothing(
    pages: tuple[int | None, ...], cache_pages: int
) -> None:
    """The cache's size, or an adapter's."""
    estimate = ResidencyEstimate(table_of(*pages), [1, 2], [], cache_pages)

    assert ask(estimate, 1, 0)


def test_one_of_several_resolvers_does_not_know_what_others_have_sent() -> None:
    """Only that where all fit, all stay."""
    estimate = ResidencyEstimate(table_of(1, 1), [1], [], 9, sees_all=False)

    assert [False, False] == [ask(estimate, 1, now) for now in (0.0, 1.0)]
    assert [True, True] == [ask(estimate, 2, now) for now in (0.0, 1.0)]


def test_only_what_was_warm_before_the_server_started_was_warmed_by_it() -> None:
    """Not in the same second."""
    times = {"early": "00", "close": "09", "late": "11"}
    table = with_adapter(AdapterTable(), "cold", entry(4, warm=False, added_at="2026-01-01T00:00:00+00:00"))
    for task_id, (name, second) in enumerate(times.items(), 5):
        table = with_adapter(table, name, entry(task_id, added_at=f"2026-01-01T00:00:{second}+00:00"))
    started = 1767225609.5  # 2026-01-01T00:00:09.5Z

    assert {5} == warmed_at_start(table, started)


def test_started_at_is_when_the_process_was_started() -> None:
    """To the tick, and to the second in which the machine booted."""
    before = time.time()
    with subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE) as child:
        after = time.time()
        found = started_at(child.pid)
        child.communicate(b"\n")

    assert before - 1.1 <= found <= after + 1.1
    assert started_at(os.getpid()) < found
