# SPDX-FileCopyrightText: the tritonlora authors
# SPDX-License-Identifier: Apache-2.0
"""Decides when a request may go on to the engine, so that the engine's LoRA cache refuses no request.

| the engine | the request |
|---|---|
| certainly holds the adapter | goes on at once, by its lora_task_id alone |
| certainly has capacity for it | goes on at once, and the weights go along |
| neither | waits in a queue, until its adapter was loaded or the engine's state is certain |

The resolver loads the adapter at the head of the queue by a request of its own. It repeats that request while the cache
is full of adapters in use. Between loads it sends probes, which are requests of a few tokens. Probes tell when the
requests that went on have ended, and whether the engine still holds the adapters that it is believed to hold. Loads and
probes run one at a time.

The queue is first in, first out by adapter. Requests for held adapters overtake the queue until its head has waited for
OVERTAKING_SECONDS.

Order matters where weights that reach the engine evict an adapter. Requests that were sent by id before them must have
arrived by then. So a thread that sends weights waits until `is_due`.

The router's requests differ. They never carry weights. The router tells when they end. If the engine lacks the adapter
after all, the router asks again, and its client sees nothing of it. So they go on when the engine is believed to hold
the adapter, even if that is not certain.

Times are seconds of any one clock. This module uses no Triton, no threads and no files.
"""

from __future__ import annotations

import itertools
import math
from collections import Counter, OrderedDict, deque
from collections.abc import Mapping
from dataclasses import dataclass, field

from .engine_cache import ARRIVAL_SECONDS, EngineCache
from .errors import AdapterUnavailable

OVERTAKING_SECONDS = 1.0
BELIEF_SECONDS = 1.0  # between two probes of adapters that the engine is believed to hold
ASKED_SECONDS = 3.0  # after the last request, such probes stop
RETRY_SECONDS = 0.005  # between two tries to load an adapter while the cache is full
PROBE_TOKENS = 2, 16  # of the shortest probe, and of the longest
LATER_AFTER_A_MISS = 4  # times as long as before is a request given to reach the engine, after each miss
MOST_WAITING = 10_000  # requests in the queue
CAUTION_SECONDS = 10.0  # after the engine lacked an adapter that it was believed to hold, no weights go along
PROMPT_TOKENS_A_STEP = 64  # prompt tokens that an engine certainly reads in the time of one output token


@dataclass(eq=False, slots=True)
class Ticket:
    """A request that is to go on to the engine. `Admission` sets the last four."""

    adapters: Mapping[int, int]  # lora_task_id -> pages, for the adapters of its rows; not empty
    tokens: float  # the most that the engine produces for it, plus its prompt in PROMPT_TOKENS_A_STEP
    arrived_at: float
    patience: float  # seconds that it may wait
    takes_weights: bool = True  # the request may carry weights
    is_routers: bool = False  # the router tells its end, and asks again after a miss
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


@dataclass(frozen=True, slots=True)
class Load:
    """Step: send the engine this adapter's weights with a request of one token."""

    task_id: int
    number: int


@dataclass(frozen=True, slots=True)
class Probe:
    """Step: send the engine a request of `tokens` tokens, by id alone."""

    task_id: int | None  # None: for the base model
    tokens: int


@dataclass(frozen=True, slots=True)
class Pause:
    """Step: do nothing for so many seconds, unless a request comes."""

    seconds: float


Step = Load | Probe | Pause


@dataclass(eq=False, slots=True)
class _Group:
    """The requests that wait for the same adapters."""

    adapters: Mapping[int, int]
    arrived_at: float
    tickets: list[Ticket] = field(default_factory=list)
    loaded: set[int] = field(default_factory=set)  # adapters that were loaded since the group came to the head


class Admission:
    """Decides whether each request may go on, and what to send the engine next. Not thread-safe."""

    def __init__(self, cache: EngineCache, now: float, *, cautious_for: float = 0.0) -> None:
        """Start with an empty queue. For `cautious_for` seconds no weights go along with requests.

        A resolver that starts beside a running engine does not know which requests are under way there.
        """
        self.cache = cache
        self._groups: OrderedDict[frozenset[int], _Group] = OrderedDict()  # the queue
        self._waiting = 0  # tickets in the queue
        self._released: list[list[Ticket]] = []
        self._numbers = itertools.count()
        self._unsent: dict[int, None] = {}  # numbers of requests and loads that have not arrived yet, ascending
        self._under_way: deque[tuple[float, int]] = deque()  # (time of arrival, number) of requests that were sent
        self._asked_at = -math.inf  # the engine may be loaded after the resolver, and is probed after the first request
        self._belief_probed_at = now
        self._probe_tokens = PROBE_TOKENS[0]
        self._probes_warm = False  # whether the last probe of a held adapter could be of a warm one
        self._retry_at = self._probe_at = -math.inf
        self._cautious_until = now + cautious_for

    # Requests

    def ask(self, ticket: Ticket, now: float) -> bool:
        """Whether the request may go on at once; otherwise it waits in the queue.

        If True, `ticket.with_weights` tells whether it carries weights; then call `sent` or `dropped`.
        AdapterUnavailable when MOST_WAITING requests wait already.
        """
        self._asked_at = now
        key, must_wait = frozenset(ticket.adapters), self._must_wait(now)
        is_held = self.cache.are_held(ticket.adapters, now) or (
            ticket.is_routers and self.cache.are_believed(ticket.adapters)
        )
        if not must_wait and (is_held or (key not in self._groups and self._may_carry([ticket], now))):
            self._begin(ticket, with_weights=not is_held)
            return True
        if self._waiting >= MOST_WAITING:
            raise AdapterUnavailable(f"{self._waiting} requests wait for LoRA adapters to be loaded; ask again")
        self._groups.setdefault(key, _Group(ticket.adapters, now)).tickets.append(ticket)
        self._waiting += 1
        ticket.has_waited = True
        self._probe_tokens = PROBE_TOKENS[0]
        return False

    def leave(self, ticket: Ticket) -> bool:
        """Take a request out of the queue; False when it has left the queue already."""
        group = self._groups.get(frozenset(ticket.adapters))
        if group is None or ticket not in group.tickets:
            return False
        self._drop(group, [ticket])
        return True

    def expired(self, now: float) -> list[Ticket]:
        """Take the requests whose deadline has passed out of the queue."""
        late = []
        for group in [*self._groups.values()]:
            if found := [ticket for ticket in group.tickets if ticket.deadline <= now]:
                self._drop(group, found)
                late += found
        return late

    def released(self) -> list[list[Ticket]]:
        """The groups of requests that were released since the last call. Send the groups, and each group, in order."""
        released, self._released = self._released, []
        return released

    def is_due(self, number: int, now: float) -> bool:
        """Whether weights with this number may be sent: they evict nothing that a request with a smaller number needs.

        Either all of these requests have reached the engine, or the engine evicts nothing.
        """
        self._note_arrivals(now)
        return self.cache.fits_all or next(iter(self._unsent), number) >= number

    def sent(self, ticket: Ticket, now: float) -> None:
        """Note that the request was sent to the engine."""
        self._note_arrivals(now)
        ticket.sent_at = now
        self._under_way.append((now + ARRIVAL_SECONDS * LATER_AFTER_A_MISS**ticket.misses, ticket.number))
        tokens = None if ticket.is_routers else ticket.tokens
        for task_id in ticket.adapters:
            self.cache.send(task_id, tokens, now, with_weights=ticket.with_weights)

    def ended(self, ticket: Ticket, now: float, *, had_it: bool) -> None:
        """Note that a request of the router's has ended. `had_it` tells whether the engine had its adapters."""
        for task_id in ticket.adapters:
            if had_it:
                self.cache.confirm(task_id, ticket.sent_at)
            self.cache.end(task_id, now)

    def lost(self, ticket: Ticket, now: float) -> None:
        """Note that the engine did not have the adapter of a request of the router's. The request has ended.

        The engine may have lost others, too, so the next step is a probe of one that it is believed to hold.
        """
        for task_id in ticket.adapters:
            self.cache.lose(task_id)
            self.cache.end(task_id, now)
        self._belief_probed_at = -math.inf

    def left_behind(self, ticket: Ticket, now: float) -> None:
        """Note that the router will not tell the end of a request of its own that was sent."""
        for task_id in ticket.adapters:
            self.cache.send(task_id, ticket.tokens, now, with_weights=False)

    @property
    def waiting(self) -> Counter[int]:
        """The adapters that requests in the queue wait for, with the number of those requests."""
        waiting = Counter[int]()
        for group in self._groups.values():
            waiting.update(dict.fromkeys(group.adapters, len(group.tickets)))
        return waiting

    @property
    def under_way(self) -> int:
        """The number of requests that were sent, and may not have reached the engine yet."""
        return len(self._under_way)

    def dropped(self, ticket: Ticket, now: float) -> None:
        """Note that the request could not be sent."""
        del self._unsent[ticket.number]
        for task_id in ticket.adapters:
            self.cache.end(task_id, now)

    # The resolver's own requests: loads and probes

    def step(self, now: float) -> Step:
        """What to do next.

        After a Load, call `loaded`, `full` or `failed`. After a Probe, call `probed`, `missed` or `not_probed`.
        """
        may_probe = now >= self._probe_at
        if may_probe and now >= self._belief_probed_at + BELIEF_SECONDS and now <= self._asked_at + ASKED_SECONDS:
            return self._probe_belief(now)
        while self._groups:
            group = next(iter(self._groups.values()))
            if self.cache.are_held(group.adapters, now):
                self._release(group)
            elif self._may_carry(group.tickets, now):
                self._release(group, with_weights=True)
            elif now < self._retry_at:
                return Pause(self._retry_at - now)
            else:
                return self._load(group)
        if not may_probe:
            return Pause(self._probe_at - now)
        if (unconfirmed := self.cache.unconfirmed) is not None:
            self.cache.lose(unconfirmed)
            return self._probe(unconfirmed)
        if self.cache.has_open and not self.cache.fits_all:
            return self._probe(None)
        return Pause(BELIEF_SECONDS)

    def responded(self, sent_at: float, now: float) -> None:
        """Note a response to a load or probe that was sent at `sent_at`: the engine has gone through an iteration."""
        self.cache.heard(sent_at, now)

    def loaded(self, load: Load, sent_at: float, now: float) -> None:
        """Note that the engine has the adapter, and release the requests that waited for it."""
        del self._unsent[load.number]
        self.cache.see(load.task_id, sent_at)
        group = next(iter(self._groups.values()), None)
        if group is not None and load.task_id in group.adapters:
            group.loaded.add(load.task_id)
            if group.loaded.issuperset(group.adapters):
                if len(group.adapters) == 1 or not self.cache.capacity or self.cache.are_held(group.adapters, now):
                    self._release(group)
                group.loaded.clear()
        self.cache.end(load.task_id, now)

    def full(self, load: Load, now: float) -> None:
        """Note that the engine refused the load, since all of its cached adapters are in use."""
        del self._unsent[load.number]
        self.cache.end(load.task_id, now)
        self._retry_at = now + RETRY_SECONDS

    def failed(self, load: Load, now: float | None) -> list[Ticket]:
        """Note that the adapter cannot be loaded, and take the requests that wait for it out of the queue.

        `now` is None when the engine is silent, and may still load the adapter.
        """
        del self._unsent[load.number]
        if now is not None:
            self.cache.end(load.task_id, now)
        tickets = []
        for group in [group for group in self._groups.values() if load.task_id in group.adapters]:
            tickets += group.tickets
            self._drop(group, group.tickets)
        return tickets

    def let_go(self, load: Load, now: float) -> None:
        """Note that a load has ended now for which `failed` was called while the engine was silent."""
        self.cache.end(load.task_id, now)

    def probed(self, probe: Probe, sent_at: float, now: float) -> None:
        """Note that the engine has responded to a probe, to its end."""
        if probe.task_id is not None:
            self.cache.see(probe.task_id, sent_at)
            self.cache.end(probe.task_id, now)

    def missed(self, probe: Probe, now: float) -> bool:
        """Note that the engine does not have the adapter of a probe. True: it was believed to hold the adapter."""
        if probe.task_id is None:
            return False
        is_unexpected = self.cache.miss(probe.task_id)
        if is_unexpected:
            self._cautious_until = now + CAUTION_SECONDS
        self.cache.end(probe.task_id, now)
        return is_unexpected

    def not_probed(self, probe: Probe, now: float, pause: float) -> None:
        """Note that a probe had another error, or no response. The next probe comes after `pause` seconds."""
        self._probe_at = now + pause
        if probe.task_id is not None:
            self.cache.lose(probe.task_id)
            self.cache.end(probe.task_id, now)

    # Parts

    def _note_arrivals(self, now: float) -> None:
        while self._under_way and self._under_way[0][0] <= now:
            del self._unsent[self._under_way.popleft()[1]]

    def _must_wait(self, now: float) -> bool:
        first = next(iter(self._groups.values()), None)
        return first is not None and now - first.arrived_at >= OVERTAKING_SECONDS

    def _may_carry(self, tickets: list[Ticket], now: float) -> bool:
        """Whether the first of these requests may carry the weights."""
        [*adapters] = tickets[0].adapters.items()
        if len(adapters) > 1 or now < self._cautious_until or not all(ticket.takes_weights for ticket in tickets):
            return False
        return self.cache.has_capacity(*adapters[0])

    def _begin(self, ticket: Ticket, *, with_weights: bool) -> None:
        ticket.number, ticket.with_weights = next(self._numbers), with_weights
        self._unsent[ticket.number] = None
        for task_id, pages in ticket.adapters.items():
            self.cache.begin(task_id, pages, with_weights=with_weights)

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
        self.cache.begin(task_id, group.adapters[task_id], with_weights=True)
        load = Load(task_id, next(self._numbers))
        self._unsent[load.number] = None
        return load

    def _probe_belief(self, now: float) -> Probe:
        self._belief_probed_at, self._probes_warm = now, not self._probes_warm
        return self._probe(self.cache.least_recent(warm=self._probes_warm))

    def _probe(self, task_id: int | None) -> Probe:
        shortest, longest = PROBE_TOKENS
        if task_id is not None:
            self.cache.begin(task_id, 0, with_weights=False)
            return Probe(task_id, shortest)
        self._probe_tokens = min(2 * self._probe_tokens, longest)
        return Probe(task_id, self._probe_tokens)
