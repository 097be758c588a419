# SPDX-FileCopyrightText: the tritonlora authors
# SPDX-License-Identifier: Apache-2.0
"""Requests that are to go on to the engine, and the queue of those that wait: first in, first out by adapter."""

from __future__ import annotations

import math
from collections import Counter, OrderedDict
from collections.abc import Collection, Mapping
from dataclasses import dataclass, field

from .errors import AdapterUnavailable

MOST_WAITING = 10_000  # requests in the queue
# Weights up to this size go along with requests until the engine is known to have them. Larger ones take more time on
# their way than a load takes longer, so each is sent once, by a load.
MOST_CARRIED_NBYTES = 1 << 24


@dataclass(eq=False, slots=True)
class Ticket:
    """A request that is to go on to the engine. `Admission` sets the last four."""

    adapters: Mapping[int, int]  # lora_task_id -> pages, for the adapters of its rows; not empty
    tokens: float  # the most that the engine produces for it, plus its prompt in `admission.PROMPT_TOKENS_A_STEP`
    arrived_at: float
    patience: float  # seconds that it may wait
    takes_weights: bool = True  # the request may carry weights
    is_routers: bool = False  # the router tells its end, and asks again after a miss
    only_loads: bool = False  # no request follows: it ends when it goes on
    misses: int = 0  # how often the engine lacked the adapter when the router sent the request
    number: int = -1
    sent_at: float = math.inf
    with_weights: bool = False
    has_waited: bool = False

    @property
    def result(self) -> str:
        """How the request has found the engine's cache: one of `counters.RESULTS`."""
        return "wait" if self.has_waited else "miss" if self.with_weights else "hit"

    @property
    def deadline(self) -> float:
        """The time at which the request is refused if it still waits."""
        return self.arrived_at + self.patience


@dataclass(eq=False, slots=True)
class Group:
    """The requests that wait for the same adapters."""

    adapters: Mapping[int, int]
    arrived_at: float
    tickets: dict[Ticket, None] = field(default_factory=dict)  # in the order in which they came
    loaded: set[int] = field(default_factory=set)  # adapters that were loaded since the group came to the head
    found: set[int] = field(default_factory=set)  # adapters that probes have found since the last load of the group
    weights: int = -1  # how many requests and loads with weights there were, up to that load
    spares_pins_until: float | None = None  # set when the group is at the head, and may evict a pinned adapter


class Queue:
    """The requests that wait. Not thread-safe."""

    def __init__(self) -> None:
        self._groups: OrderedDict[frozenset[int], Group] = OrderedDict()
        self._size = 0  # tickets

    @property
    def head(self) -> Group | None:
        """The requests whose turn is next."""
        return next(iter(self._groups.values()), None)

    def has(self, adapters: Collection[int]) -> bool:
        """Whether a request waits for exactly these adapters."""
        return frozenset(adapters) in self._groups

    def join(self, ticket: Ticket, now: float) -> None:
        """Add a request, behind those for the same adapters. AdapterUnavailable when MOST_WAITING wait already."""
        if self._size >= MOST_WAITING:
            raise AdapterUnavailable(f"{self._size} requests wait for LoRA adapters to be loaded; ask again")
        self._groups.setdefault(frozenset(ticket.adapters), Group(ticket.adapters, now)).tickets[ticket] = None
        self._size += 1

    def leave(self, ticket: Ticket) -> bool:
        """Take a request out; False when it has left the queue already."""
        key = frozenset(ticket.adapters)
        group = self._groups.get(key)
        if group is None or ticket not in group.tickets:
            return False
        del group.tickets[ticket]
        self._size -= 1
        if not group.tickets:
            del self._groups[key]
        return True

    def take(self, group: Group) -> list[Ticket]:
        """Take the requests of a group out."""
        del self._groups[frozenset(group.adapters)]
        self._size -= len(group.tickets)
        return [*group.tickets]

    def take_all_for(self, task_id: int) -> list[Ticket]:
        """Take the requests that wait for this adapter out."""
        groups = [group for group in self._groups.values() if task_id in group.adapters]
        return [ticket for group in groups for ticket in self.take(group)]

    def take_expired(self, now: float) -> list[Ticket]:
        """Take the requests whose deadline has passed out."""
        late = [ticket for group in self._groups.values() for ticket in group.tickets if ticket.deadline <= now]
        for ticket in late:
            self.leave(ticket)
        return late

    def waiting(self) -> Counter[int]:
        """The adapters that clients' requests wait for, with the number of those requests."""
        waiting = Counter[int]()
        for group in self._groups.values():
            if number := sum(not ticket.only_loads for ticket in group.tickets):
                waiting.update(dict.fromkeys(group.adapters, number))
        return waiting
