# SPDX-FileCopyrightText: the tritonlora authors
# SPDX-License-Identifier: Apache-2.0
"""pins.py: which adapter is touched or loaded next. test_admission.py has what comes of it."""

from __future__ import annotations

from collections.abc import Callable

import pytest

from tritonlora.serving.engine_cache import EngineCache
from tritonlora.serving.pins import PIN_SECONDS, YIELD_SECONDS, Pins

LOAD, TOUCH = True, False


def use(cache: EngineCache, *task_ids: int, since: float = 0.0) -> None:
    """Requests that have used these adapters, one a second, and have ended."""
    for now, task_id in enumerate(task_ids, start=1):
        cache.begin(task_id, 1, with_weights=not cache.are_believed([task_id]))
        cache.send(task_id, None, since + now, with_weights=False)
        cache.see(task_id, since + now)
        cache.end(task_id, since + now)


def carry(cache: EngineCache) -> None:
    """A request that takes the adapter's weights to the engine, and may fail."""
    cache.begin(1, 1, with_weights=True)
    cache.send(1, 4, 0.5, with_weights=True)
    for _ in range(20):
        cache.heard(0.6, 0.7)


@pytest.fixture
def cache() -> EngineCache:
    """Three pages, of which adapter 1 has the one that is evicted first."""
    cache = EngineCache(3, {}, 0.0)
    use(cache, 3, 4, 5, 1, 4, 5)
    return cache


@pytest.fixture
def pins(cache: EngineCache) -> Pins:
    pins = Pins(cache)
    pins.keep({1: 1, 2: 1})
    return pins


@pytest.mark.parametrize(
    ("warm", "comes"),
    [
        ({1: 1}, lambda _: None),
        ({}, lambda cache: use(cache, 1)),
        ({}, lambda cache: cache.expect({1: 1}, 0.5)),
        ({}, carry),
    ],
    ids=["at the engine's start", "by a load", "at a later start of the engine", "with a request"],
)
def test_a_pinned_adapter_that_may_be_gone_is_touched_and_one_that_is_gone_is_loaded(
    warm: dict[int, int], comes: Callable[[EngineCache], None]
) -> None:
    cache = EngineCache(4, warm, 0.0)
    pins = Pins(cache)
    pins.keep({1: 1})
    assert (None if warm else (1, LOAD)) == pins.to_bring(0.0, is_queue_empty=True)

    comes(cache)
    cache.lose(1)

    assert (1, TOUCH) == pins.to_bring(1.0, is_queue_empty=True)
    pins.touch(1)
    assert not cache.miss(1)
    pins.probed()
    assert pins.to_bring(1.0, is_queue_empty=True) is None
    assert (1, LOAD) == pins.to_bring(1.0 + PIN_SECONDS, is_queue_empty=True)


def test_while_requests_wait_one_pinned_adapter_comes_back_in_a_time(cache: EngineCache, pins: Pins) -> None:
    use(cache, 1, since=10)

    assert [(2, LOAD), None, (2, LOAD), (2, LOAD)] == [
        pins.to_bring(now, is_queue_empty=is_queue_empty)
        for now, is_queue_empty in ((20.0, False), (20.1, False), (20.1, True), (20.1 + PIN_SECONDS, False))
    ]


def test_a_pinned_adapter_that_was_put_off_is_loaded_at_once_when_it_is_pinned_anew(
    cache: EngineCache, pins: Pins
) -> None:
    use(cache, 1, since=10)
    pins.put_off(2, 60.0)
    assert pins.to_bring(20.0, is_queue_empty=True) is None

    pins.keep({1: 1, 2: 1})

    assert (2, LOAD) == pins.to_bring(20.0, is_queue_empty=True)


def test_a_pinned_adapter_is_touched_before_others_evict_it(cache: EngineCache, pins: Pins) -> None:
    """Others are requests' adapters, and other pinned ones. While the touch is under way, nothing may overtake it."""
    new = {9: 1}
    assert (1, TOUCH) == pins.to_bring(10.0, is_queue_empty=True)
    assert (True, False, 1) == (pins.are_at_risk(new, 10.0), pins.has_capacity(new, 10.0), pins.to_touch(new))
    assert pins.to_touch({9: 2}) is None  # no touch makes two pages free beside two pinned adapters
    assert pins.has_capacity({1: 1}, 10.0)

    pins.touch(1)
    cache.begin(1, 1, with_weights=False)
    assert (True, 1) == (pins.are_at_risk(new, 10.0), pins.to_touch(new))

    pins.probed()
    assert (False, None) == (pins.are_at_risk(new, 10.0), pins.to_touch(new))  # what is in use is not evicted

    cache.see(1, 10.0)
    cache.end(1, 10.0)
    assert (False, True, None) == (pins.are_at_risk(new, 10.0), pins.has_capacity(new, 10.0), pins.to_touch(new))
    assert (2, LOAD) == pins.to_bring(10.0 + PIN_SECONDS, is_queue_empty=True)


def test_a_pinned_adapter_waits_for_pages_that_no_request_uses(cache: EngineCache, pins: Pins) -> None:
    """Then the engine would evict adapter 1 for it, so that adapter 1 is touched first."""
    for task_id in (4, 5):
        cache.begin(task_id, 1, with_weights=False)
    use(cache, 1, since=10)

    assert pins.to_bring(20.0, is_queue_empty=True) is None
    cache.end(4, 20.0)
    assert (1, TOUCH) == pins.to_bring(20.0, is_queue_empty=True)


def test_nothing_is_at_risk_where_nothing_is_pinned(pins: Pins) -> None:
    """Not even if the engine has no capacity."""
    assert pins.are_at_risk({9: 4}, 10.0)
    pins.keep({})
    assert not pins.are_at_risk({9: 4}, 10.0)


def test_pinned_adapters_that_yield_are_not_at_risk(pins: Pins) -> None:
    """For a time, and for no more than the engine can take."""
    pins.yield_from(10.0)
    before, after = 9.9 + YIELD_SECONDS, 10.0 + YIELD_SECONDS

    assert [False, True] == [pins.are_at_risk({9: 1}, now) for now in (before, after)]
    assert [True, False] == [pins.has_capacity({9: 1}, now) for now in (before, after)]
    assert not pins.has_capacity({9: 4}, before)


def test_a_touch_comes_early_if_half_of_the_pages_for_others_would_endanger_a_pin(cache: EngineCache) -> None:
    pins = Pins(cache)
    pins.keep({1: 1})  # two pages for others

    assert 1 == pins.to_touch_early()
    use(cache, 1, 5, since=10)
    assert pins.to_touch_early() is None
    pins.keep({})
    assert pins.to_touch_early() is None
