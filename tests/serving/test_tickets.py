# SPDX-FileCopyrightText: the tritonlora authors
# SPDX-License-Identifier: Apache-2.0
"""tickets.py: how requests come into the queue and leave it."""

from __future__ import annotations

import pytest

from tritonlora.serving import tickets
from tritonlora.serving.errors import AdapterUnavailable
from tritonlora.serving.tickets import Queue, Ticket


def joined(queue: Queue, *task_ids: int, patience: float = 30, only_loads: bool = False) -> Ticket:
    """A request for these adapters that has joined the queue at the time 0."""
    ticket = Ticket(dict.fromkeys(task_ids, 1), 4, 0.0, patience, only_loads=only_loads)
    queue.join(ticket, 0.0)
    return ticket


def test_requests_for_the_same_adapters_leave_together_in_the_order_in_which_they_came() -> None:
    """They keep their place when the first of them leaves alone."""
    queue = Queue()
    first, other, second, third = (joined(queue, task_id) for task_id in (1, 2, 1, 1))

    assert queue.leave(first)
    assert not queue.leave(first)
    assert queue.head is not None
    assert [second, third] == queue.take(queue.head)
    assert (False, True) == (queue.leave(second), queue.leave(other))
    assert queue.head is None


def test_all_requests_for_an_adapter_leave_with_it() -> None:
    """Also those with rows for other adapters."""
    queue = Queue()
    both, one, other = joined(queue, 1, 2), joined(queue, 1), joined(queue, 2)

    assert (True, True) == (queue.has([2, 1]), queue.has([2]))
    assert [both, one] == queue.take_all_for(1)
    assert (False, True) == (queue.has([2, 1]), queue.has([2]))
    assert [other] == queue.take_all_for(2)


def test_requests_leave_at_their_deadline_and_loads_count_as_none_that_wait() -> None:
    queue = Queue()
    late = [joined(queue, 1, patience=2), joined(queue, 1, 2, patience=1)]
    joined(queue, 1)
    joined(queue, 3, only_loads=True)

    assert {1: 3, 2: 1} == queue.waiting()
    assert [] == queue.take_expired(0.5)
    assert late == queue.take_expired(2.0)
    assert {1: 1} == queue.waiting()


def test_a_full_queue_refuses_a_request_until_another_one_leaves(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tickets, "MOST_WAITING", 3)
    queue = Queue()
    first, _, third = joined(queue, 1), joined(queue, 1), joined(queue, 2)
    for leave in (
        lambda: queue.leave(first),
        lambda: queue.take_all_for(2),
        lambda: queue.take_expired(30.0),
    ):
        with pytest.raises(AdapterUnavailable, match="3 requests wait for LoRA adapters to be loaded; ask again"):
            joined(queue, 1)
        assert leave()
        while queue.waiting().total() < 3:
            joined(queue, 2)
    assert not queue.leave(third)
