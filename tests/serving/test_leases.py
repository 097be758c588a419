# SPDX-FileCopyrightText: the tritonlora authors
# SPDX-License-Identifier: Apache-2.0
"""leases.py: what the router's messages make of the adapters' use."""

from __future__ import annotations

import itertools
from collections.abc import Callable

import pytest

from table import entry
from tritonlora.errors import AdapterUnavailable, ClientLeft, InvalidRequest
from tritonlora.serving.dispatcher import Request
from tritonlora.serving.leases import MOST_MISSES, Key, Lease, Leases
from tritonlora.serving.routing import Route
from tritonlora.serving.tickets import Ticket

ROUTES = [Route(f"n{number}", entry(number)) for number in (1, 2)]
KEY: Key = ("a router", 7)


class Sender:
    """In the place of a dispatcher: it passes on what it does not hold up, and notes what becomes of tickets."""

    def __init__(self) -> None:
        self.log: list[tuple[str, int]] = []
        self.holds_up = False
        self.held_up: list[Ticket] = []

    def ask(self, ticket: Ticket, request: Request) -> None:
        if self.holds_up:
            self.held_up.append(ticket)
        else:
            self._note("ask", ticket)
            request.pass_on(with_weights=False)

    def leave(self, ticket: Ticket) -> bool:
        return ticket in self.held_up

    def end(self, ticket: Ticket, *, had_it: bool) -> None:
        self._note("end" if had_it else "failed", ticket)

    def lost(self, ticket: Ticket) -> None:
        self._note(f"lost {ticket.misses}", ticket)

    def leave_behind(self, ticket: Ticket) -> None:
        self._note("left behind", ticket)

    def _note(self, what: str, ticket: Ticket) -> None:
        [task_id] = ticket.adapters
        self.log.append((what, task_id))


class Message:
    """A message of the router's that waits for its response."""

    def __init__(self, lease: Lease) -> None:
        self.lease = lease
        self.answer: str | Exception = ""

    def pass_on(self, *, with_weights: bool) -> None:
        assert not with_weights
        self.answer = "passed on"

    def fail(self, error: Exception) -> None:
        self.lease.give_up()
        self.answer = error


@pytest.fixture
def sender() -> Sender:
    return Sender()


@pytest.fixture
def living() -> set[str]:
    """The routers whose processes live."""
    return {"a router"}


@pytest.fixture
def leases(sender: Sender, living: set[str]) -> Leases:
    return Leases(sender, living.__contains__)


def new_lease(routes: list[Route] = ROUTES) -> Lease:
    def new_ticket(route: Route, misses: int) -> Ticket:
        return Ticket({route.entry.lora_task_id: 1}, 4, 0.0, 30, is_routers=True, misses=misses)

    return Lease(routes, new_ticket)


def enter(leases: Leases, lease: Lease, key: Key = KEY) -> Message:
    message = Message(lease)
    leases.enter(key, lease, message)
    return message


def test_the_rows_of_a_batch_use_one_adapter_after_the_other(leases: Leases, sender: Sender) -> None:
    """Each until the next one begins, and the last one until the end."""
    lease = new_lease()
    assert "passed on" == enter(leases, lease).answer
    leases.row(KEY, 1, Message(lease))
    assert lease is leases.end(KEY, had_it=True, is_over=True)

    assert [("ask", 1), ("end", 1), ("ask", 2), ("end", 2)] == sender.log
    assert leases.end(KEY, had_it=True, is_over=True) is None


def test_the_base_model_uses_no_adapter(leases: Leases, sender: Sender) -> None:
    """It waits for nothing."""
    assert "passed on" == enter(leases, new_lease([])).answer
    leases.end(KEY, had_it=True, is_over=True)

    assert [] == sender.log


def test_a_lost_adapter_is_asked_for_again_and_not_for_ever(leases: Leases, sender: Sender) -> None:
    """Each row anew."""
    lease = new_lease()
    enter(leases, lease)
    for _ in range(MOST_MISSES):
        message = Message(lease)
        leases.lost(KEY, message)
        assert "passed on" == message.answer
    with pytest.raises(AdapterUnavailable, match="lost the adapter 4 times in a row; ask again"):
        leases.lost(KEY, Message(lease))

    once = [(("ask", 1), (f"lost {misses}", 1)) for misses in range(MOST_MISSES + 1)]
    assert [*itertools.chain(*once)] == sender.log

    leases.row(KEY, 1, Message(lease))
    leases.lost(KEY, Message(lease))
    assert [("ask", 2), ("lost 0", 2), ("ask", 2)] == sender.log[-3:]


def test_a_request_that_failed_confirms_no_belief(leases: Leases, sender: Sender) -> None:
    """The engine may not have had the adapter."""
    enter(leases, new_lease())
    leases.end(KEY, had_it=False, is_over=True)

    assert ("failed", 1) == sender.log[-1]


def test_a_request_that_the_engine_may_still_work_on_is_left_behind(leases: Leases, sender: Sender) -> None:
    """As after a stall."""
    enter(leases, new_lease())
    leases.end(KEY, had_it=False, is_over=False)

    assert ("left behind", 1) == sender.log[-1]


def test_who_leaves_while_it_waits_is_refused_at_once(leases: Leases, sender: Sender) -> None:
    """Its ticket is gone, so that nothing is left to end."""
    sender.holds_up = True
    message = enter(leases, new_lease())
    leases.leave(KEY)
    leases.end(KEY, had_it=False, is_over=True)

    assert isinstance(message.answer, ClientLeft)
    assert [] == sender.log


def test_who_does_not_wait_cannot_leave(leases: Leases, sender: Sender) -> None:
    """It ends as ever."""
    message = enter(leases, new_lease())
    leases.leave(KEY)
    leases.leave(("a router", 8))
    leases.end(KEY, had_it=True, is_over=True)

    assert ("passed on", [("ask", 1), ("end", 1)]) == (message.answer, sender.log)


@pytest.mark.parametrize("is_waiting", [True, False])
def test_the_requests_of_a_router_that_has_ended_end(
    leases: Leases, sender: Sender, living: set[str], is_waiting: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Those of the others go on."""
    monkeypatch.setattr("tritonlora.serving.leases.SWEEP_SECONDS", 0.0)
    living.add("another")
    enter(leases, new_lease(), ("another", 7))
    sender.log.clear()
    sender.holds_up = is_waiting
    lease = new_lease()
    message = enter(leases, lease)
    assert [] == leases.sweep()
    living.remove("a router")

    assert [lease] == leases.sweep()
    assert isinstance(message.answer, ClientLeft) == is_waiting
    assert ([] if is_waiting else [("ask", 1), ("left behind", 1)]) == sender.log
    assert leases.find(("another", 7))


@pytest.mark.parametrize(
    "late", [lambda leases, message: leases.row(KEY, 1, message), lambda leases, message: leases.lost(KEY, message)]
)
def test_a_message_about_a_request_that_is_not_known_is_refused(
    leases: Leases, late: Callable[[Leases, Message], None]
) -> None:
    """As of a router whose resolver was loaded again meanwhile."""
    with pytest.raises(InvalidRequest, match="does not know this request; ask again"):
        late(leases, Message(new_lease()))
