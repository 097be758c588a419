# SPDX-FileCopyrightText: the tritonlora authors
# SPDX-License-Identifier: Apache-2.0
"""engine_cache.py: what is told of all adapters agrees with what decides about one."""

from __future__ import annotations

import random

import pytest

from tritonlora.serving.engine_cache import EngineCache


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
        assert sum(pages[task_id] for task_id in certain) == cache.pages_held
        assert (cache.least_recent(warm=True) in believed) if believed else cache.least_recent(warm=True) is None

    assert held_at_some_time
