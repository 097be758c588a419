# SPDX-FileCopyrightText: the tritonlora authors
# SPDX-License-Identifier: Apache-2.0
"""When a request may go on to the engine, so that the engine's LoRA cache refuses none.

| the engine | the request |
|---|---|
| certainly holds the adapter | goes on at once, by its lora_task_id alone |
| certainly has capacity for it | goes on at once, and the weights go along |
| neither | waits in a queue, until the adapter was loaded or one of the two is certain |

The adapter at the head of the queue is loaded by a request of our own, which is repeated while the cache is full of
adapters in use. Such requests run one at a time. Between them probes, requests of a few tokens, tell when the requests
that went on have ended, and whether the engine still has what it is believed to hold.

The queue is first in, first out by adapter. A request for a held adapter overtakes it, for a second at most.

Order matters: weights that reach the engine evict an adapter, and an id that was sent before must have arrived. So
whoever sends weights waits until `is_due`.

Times are seconds of any one clock. Nothing here knows Triton, threads or files.
"""

from __future__ import annotations

import itertools
import math
from collections import OrderedDict, deque
from collections.abc import Mapping
from dataclasses import dataclass, field

from .engine_cache import ARRIVAL_SECONDS, EngineCache
from .errors import AdapterUnavailable

OVERTAKING_SECONDS = 1.0
BELIEF_SECONDS = 1.0  # between probes of what the engine is believed to hold
ASKED_SECONDS = 3.0  # after the last request, beliefs are let go
RETRY_SECONDS = 0.005  # between two tries to load an adapter while the cache is full
PROBE_TOKENS = 2, 16  # the first one's, and at most
MOST_WAITING = 10_000  # requests
CAUTION_SECONDS = 10.0  # no weights go along for so long after the engine was not as was believed
PROMPT_TOKENS_A_STEP = 64  # of a prompt, that an engine certainly takes in within the time for a token


@dataclass(eq=False, slots=True)
class Ticket:
    """A request that wants to go on to the engine. `number` and what follows are the queue's."""

    adapters: Mapping[int, int]  # lora_task_id -> pages, of its rows; not empty
    tokens: float  # that the engine produces for it at most, its prompt's share included
    arrived_at: float
    patience: float  # seconds that it may wait
    takes_weights: bool = True  # they may go along
    must_take_weights: bool = False  # others load adapters too, so that nothing is certain
    number: int = -1
    with_weights: bool = False

    @property
    def deadline(self) -> float:
        """When it is refused."""
        return self.arrived_at + self.patience


@dataclass(frozen=True, slots=True)
class Load:
    """Send the engine this adapter's weights with a request of one token."""

    task_id: int
    number: int


@dataclass(frozen=True, slots=True)
class Probe:
    """Send the engine a request of so many tokens, by id alone; None: for the base model."""

    task_id: int | None
    tokens: int


@dataclass(frozen=True, slots=True)
class Pause:
    """There is nothing to do for so many seconds, unless a request comes."""

    seconds: float


Step = Load | Probe | Pause


@dataclass(eq=False, slots=True)
class _Group:
    """The requests that wait for the same adapters."""

    adapters: Mapping[int, int]
    arrived_at: float
    tickets: list[Ticket] = field(default_factory=list)
    loaded: set[int] = field(default_factory=set)  # since it has come to the head


class Admission:
    """Decides for each request, and what is to be done next. Not thread-safe."""

    def __init__(self, cache: EngineCache, now: float, *, cautious_for: float = 0.0) -> None:
        """Nothing waits. For so many seconds no weights go along: requests may be under way that nobody knows of."""
        self._cache = cache
        self._groups: OrderedDict[frozenset[int], _Group] = OrderedDict()  # the queue
        self._waiting = 0  # tickets in it
        self._released: list[list[Ticket]] = []
        self._numbers = itertools.count()
        self._unsent: dict[int, None] = {}  # numbers of what was decided and has not arrived; they only grow
        self._under_way: deque[tuple[float, int]] = deque()  # (when it has arrived, number) of those that were sent
        self._asked_at = self._belief_probed_at = now
        self._probe_tokens = PROBE_TOKENS[0]
        self._probes_warm = False  # the next belief that is probed may be about a warm adapter
        self._retry_at = self._probe_at = -math.inf
        self._cautious_until = now + cautious_for

    # Requests

    def ask(self, ticket: Ticket, now: float) -> bool:
        """Whether the request may go on at once, with its weights where the ticket says so; else it waits.

        Of one that goes on, call `sent` or `dropped`. AdapterUnavailable when too many wait.
        """
        self._asked_at = now
        key, must_wait = frozenset(ticket.adapters), self._must_wait(now)
        is_held = not must_wait and self._cache.are_held(ticket.adapters, now)
        has_capacity = not must_wait and key not in self._groups and self._may_carry([ticket], now)
        if ticket.must_take_weights or is_held or has_capacity:
            self._begin(ticket, with_weights=ticket.must_take_weights or not is_held)
            return True
        if self._waiting >= MOST_WAITING:
            raise AdapterUnavailable(f"{self._waiting} requests wait for LoRA adapters to be loaded; ask again")
        self._groups.setdefault(key, _Group(ticket.adapters, now)).tickets.append(ticket)
        self._waiting += 1
        self._probe_tokens = PROBE_TOKENS[0]
        return False

    def leave(self, ticket: Ticket) -> bool:
        """Take a request out of the queue; False when it is not there any more."""
        group = self._groups.get(frozenset(ticket.adapters))
        if group is None or ticket not in group.tickets:
            return False
        self._drop(group, [ticket])
        return True

    def expired(self, now: float) -> list[Ticket]:
        """Take the requests out of the queue that have waited for too long."""
        late = []
        for group in [*self._groups.values()]:
            if found := [ticket for ticket in group.tickets if ticket.deadline <= now]:
                self._drop(group, found)
                late += found
        return late

    def released(self) -> list[list[Ticket]]:
        """The requests that may go on since the last call, to be sent one group after the other, each in its order."""
        released, self._released = self._released, []
        return released

    def is_due(self, number: int, now: float) -> bool:
        """Whether all that was decided before has reached the engine."""
        self._note_arrivals(now)
        return next(iter(self._unsent), number) >= number

    def sent(self, ticket: Ticket, now: float) -> None:
        """The request has been sent to the engine."""
        self._note_arrivals(now)
        self._under_way.append((now + ARRIVAL_SECONDS, ticket.number))
        for task_id in ticket.adapters:
            self._cache.send(task_id, ticket.tokens, now, with_weights=ticket.with_weights)

    @property
    def under_way(self) -> int:
        """Requests that were sent lately, and may not have reached the engine."""
        return len(self._under_way)

    def dropped(self, ticket: Ticket, now: float) -> None:
        """The request could not be sent."""
        del self._unsent[ticket.number]
        for task_id in ticket.adapters:
            self._cache.end(task_id, now)

    # The requests of our own

    def step(self, now: float) -> Step:
        """What to do next. Then call `loaded`, `full` or `failed`, or `probed`, `missed` or `not_probed`."""
        may_probe = now >= self._probe_at
        if may_probe and now >= self._belief_probed_at + BELIEF_SECONDS and now <= self._asked_at + ASKED_SECONDS:
            return self._probe_belief(now)
        while self._groups:
            group = next(iter(self._groups.values()))
            if self._cache.are_held(group.adapters, now):
                self._release(group)
            elif self._may_carry(group.tickets, now):
                self._release(group, with_weights=True)
            elif now < self._retry_at:
                return Pause(self._retry_at - now)
            else:
                return self._load(group)
        if not may_probe:
            return Pause(self._probe_at - now)
        if (unconfirmed := self._cache.unconfirmed) is not None:
            self._cache.lose(unconfirmed)
            return self._probe(unconfirmed)
        if self._cache.has_open and not self._cache.fits_all:
            return self._probe(None)
        return Pause(BELIEF_SECONDS)

    def responded(self, sent_at: float, now: float) -> None:
        """The engine has responded to a request of our own, which shows that it has gone through an iteration."""
        self._cache.heard(sent_at, now)

    def loaded(self, load: Load, sent_at: float, now: float) -> None:
        """The engine has the adapter; those who waited for it go on."""
        del self._unsent[load.number]
        self._cache.see(load.task_id, sent_at)
        group = next(iter(self._groups.values()), None)
        if group is not None and load.task_id in group.adapters:
            group.loaded.add(load.task_id)
            if group.loaded.issuperset(group.adapters):
                if len(group.adapters) == 1 or not self._cache.capacity or self._cache.are_held(group.adapters, now):
                    self._release(group)
                group.loaded.clear()
        self._cache.end(load.task_id, now)

    def full(self, load: Load, now: float) -> None:
        """All of the engine's adapters are in use."""
        del self._unsent[load.number]
        self._cache.end(load.task_id, now)
        self._retry_at = now + RETRY_SECONDS

    def failed(self, load: Load, now: float | None) -> list[Ticket]:
        """The adapter cannot be loaded; those who wait for it. None: the engine is silent, and may still load it."""
        del self._unsent[load.number]
        if now is not None:
            self._cache.end(load.task_id, now)
        tickets = []
        for group in [group for group in self._groups.values() if load.task_id in group.adapters]:
            tickets += group.tickets
            self._drop(group, group.tickets)
        return tickets

    def let_go(self, load: Load, now: float) -> None:
        """The engine was silent, and has ended the load now."""
        self._cache.end(load.task_id, now)

    def probed(self, probe: Probe, sent_at: float, now: float) -> None:
        """The engine has responded to a probe to its end."""
        if probe.task_id is not None:
            self._cache.see(probe.task_id, sent_at)
            self._cache.end(probe.task_id, now)

    def missed(self, probe: Probe, now: float) -> bool:
        """The engine does not have the adapter of a probe. Whether it was believed to be held."""
        if probe.task_id is None:
            return False
        is_unexpected = self._cache.miss(probe.task_id)
        if is_unexpected:
            self._cautious_until = now + CAUTION_SECONDS
        self._cache.end(probe.task_id, now)
        return is_unexpected

    def not_probed(self, probe: Probe, now: float, pause: float) -> None:
        """The engine had another error, or said nothing. The next probe comes after so many seconds."""
        self._probe_at = now + pause
        if probe.task_id is not None:
            self._cache.lose(probe.task_id)
            self._cache.end(probe.task_id, now)

    # Parts

    def _note_arrivals(self, now: float) -> None:
        while self._under_way and self._under_way[0][0] <= now:
            del self._unsent[self._under_way.popleft()[1]]

    def _must_wait(self, now: float) -> bool:
        first = next(iter(self._groups.values()), None)
        return first is not None and now - first.arrived_at >= OVERTAKING_SECONDS

    def _may_carry(self, tickets: list[Ticket], now: float) -> bool:
        """Whether the weights may go along with the first of these."""
        [*adapters] = tickets[0].adapters.items()
        if len(adapters) > 1 or now < self._cautious_until or not all(ticket.takes_weights for ticket in tickets):
            return False
        return self._cache.has_capacity(*adapters[0])

    def _begin(self, ticket: Ticket, *, with_weights: bool) -> None:
        ticket.number, ticket.with_weights = next(self._numbers), with_weights
        self._unsent[ticket.number] = None
        for task_id, pages in ticket.adapters.items():
            self._cache.begin(task_id, pages, with_weights=with_weights)

    def _release(self, group: _Group, *, with_weights: bool = False) -> None:
        tickets = group.tickets
        for number, ticket in enumerate(tickets):
            self._begin(ticket, with_weights=with_weights and number == 0)
        self._drop(group, tickets)
        self._released.append(tickets)

    def _drop(self, group: _Group, tickets: list[Ticket]) -> None:
        self._waiting -= len(tickets)
        group.tickets = [ticket for ticket in group.tickets if ticket not in tickets]
        if not group.tickets:
            del self._groups[frozenset(group.adapters)]

    def _load(self, group: _Group) -> Load:
        task_id = next(one for one in group.adapters if one not in group.loaded)
        self._cache.begin(task_id, group.adapters[task_id], with_weights=True)
        load = Load(task_id, next(self._numbers))
        self._unsent[load.number] = None
        return load

    def _probe_belief(self, now: float) -> Probe:
        self._belief_probed_at, self._probes_warm = now, not self._probes_warm
        return self._probe(self._cache.least_recent(warm=self._probes_warm))

    def _probe(self, task_id: int | None) -> Probe:
        shortest, longest = PROBE_TOKENS
        if task_id is not None:
            self._cache.begin(task_id, 0, with_weights=False)
            return Probe(task_id, shortest)
        self._probe_tokens = min(2 * self._probe_tokens, longest)
        return Probe(task_id, self._probe_tokens)
