# SPDX-FileCopyrightText: the tritonlora authors
# SPDX-License-Identifier: Apache-2.0
"""engine_cache.py: what is told of all adapters agrees with what decides about one."""

from __future__ import annotations

import random
from datetime import datetime, timedelta, timezone

import pytest

from table import entry
from tritonlora.serving.adapter_table import AdapterTable
from tritonlora.serving.engine_cache import EngineCache
from tritonlora.serving.server_process import warmed_at_start


@pytest.mark.parametrize("seed", range(40))
def test_what_is_listed_as_held_is_what_requests_go_on_for(seed: int) -> None:
    """After every event of a random life, for each adapter; and the pages are theirs."""
    chance = random.Random(seed)  # noqa: S311
    pages = [chance.randint(1, 3) for _ in range(chance.randint(2, 10))]
    warm = {task_id: pages[task_id] for task_id in range(chance.randint(0, len(pages)))}
    cache, now = EngineCache(chance.randint(2, 12), warm, 0.0, is_fresh=seed % 2 == 0), 0.0
    under_way: list[tuple[int, float]] = []
    held_at_some_time = set[int]()
    for _ in range(60):
        now += chance.choice([0.0, 0.5])
        task_id = chance.randrange(len(pages))
        match chance.choice(["begin", "begin", "end", "end", "lose"]):
            case "begin":
                cache.begin(task_id, pages[task_id], with_weights=chance.random() < 0.5)
                cache.send(task_id, None, now, with_weights=False)
                under_way.append((task_id, now))
            case "end" if under_way:
                done, sent_at = under_way.pop(chance.randrange(len(under_way)))
                cache.see(done, sent_at)
                cache.end(done, now)
            case "lose" if under_way:
                cache.lose(under_way[0][0])
        believed = {task_id for task_id in range(len(pages)) if cache.are_believed([task_id])}
        states = cache.states()
        certain = {task_id for task_id, is_certain in states.items() if is_certain}
        held_at_some_time |= believed

        assert believed <= certain
        assert len(certain - believed) <= 1  # the one that was used last
        assert {task_id: pages[task_id] for task_id in certain} == cache.held()
        assert (cache.next_to_probe(warm=True) in believed) if believed else cache.next_to_probe(warm=True) is None

    assert held_at_some_time


def test_adapters_that_may_have_come_too_late_for_the_warmup_may_have_evicted_others() -> None:
    """And may not be there."""
    cache = EngineCache(4, dict.fromkeys(range(1, 7), 1), 0.0, late={4, 5, 6})

    assert [3] == [task_id for task_id in range(1, 7) if cache.are_held([task_id], 0.0)]


def test_adapters_that_came_while_the_engine_may_start_may_evict_others() -> None:
    """Those that were known before are as they were."""
    cache = EngineCache(4, dict.fromkeys((1, 2, 3), 1), 0.0)
    before = [cache.are_held([task_id], 0.0) for task_id in (1, 2, 3)]
    cache.expect(dict.fromkeys((1, 2, 3), 1), 0.1)
    known = [cache.are_held([task_id], 0.1) for task_id in (1, 2, 3)]
    cache.expect(dict.fromkeys((1, 2, 3, 4, 5), 1), 0.1)

    assert [True] * 3 == before == known
    assert [False, True, True, False, False] == [cache.are_held([task_id], 0.1) for task_id in range(1, 6)]


def test_the_warmup_of_a_server_is_known_by_when_its_adapters_were_added() -> None:
    """In the second before the start, or later: maybe not."""
    started_at = datetime(2026, 1, 1, 12, tzinfo=timezone.utc)
    table = AdapterTable(
        {
            f"n{number}": entry(number, warm=number != 2, added_at=added.isoformat(), pages=number)
            for number, added in enumerate(
                (started_at - timedelta(seconds=seconds) for seconds in (60, 60, 1, 0.5, -3)), start=1
            )
        }
    )

    assert ({1: 1, 3: 3, 4: 4, 5: 5}, {4, 5}) == warmed_at_start(table, started_at.timestamp())


@pytest.mark.parametrize("pages", [0, 1])
def test_of_a_cache_whose_size_is_not_known_nothing_is_certain(pages: int) -> None:
    """The pages of an adapter may not be known either: 0. A later one may have evicted it."""
    cache = EngineCache(0, {}, 0.0)
    for task_id in (1, 2):
        cache.begin(task_id, pages, with_weights=True)
        cache.see(task_id, 0.1)
        cache.end(task_id, 0.2)

    assert (False, False) == (cache.are_held([1], 0.3), cache.fits_all)
    assert {1: False, 2: True} == cache.states()
