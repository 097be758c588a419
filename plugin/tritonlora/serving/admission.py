# SPDX-FileCopyrightText: the tritonlora authors
# SPDX-License-Identifier: Apache-2.0
"""Decides when a request may go on to the engine, so that the engine's LoRA cache refuses no request.

| the engine | the request |
|---|---|
| certainly holds the adapter | goes on at once, by its lora_task_id alone |
| certainly has capacity for it | goes on at once, and the weights go along, unless they are large |
| neither | waits in a queue, until its adapter was loaded or the engine's state is certain |

The resolver loads the adapter at the head of the queue by a request of its own. It repeats that request while the cache
is full of adapters in use. Between loads it sends probes, which are requests of a few tokens. Probes tell when the
requests that went on have ended, and whether the engine still holds the adapters that it is believed to hold. Loads and
probes run one at a time, so a probe has only as many tokens as the engine makes in PROBE_SECONDS.

A batch for several adapters goes on once probes have found all of them, since no load tells of more than one.

The queue is first in, first out by adapter. Requests for held adapters overtake the queue until its head has waited for
OVERTAKING_SECONDS.

Order matters where weights that reach the engine evict an adapter. Requests that were sent by id before them must have
arrived by then. So a thread that sends weights waits until `is_due`.

Pinned adapters are to stay in the engine. `Pins` tells when weights may evict one, and what brings one back.

The router's requests differ. They never carry weights. The router tells when they end. If the engine lacks the adapter
after all, the router asks again, and its client sees nothing of it. So they go on when the engine is believed to hold
the adapter, even if that is not certain.

Times are seconds of any one clock. This module uses no Triton, no threads and no files.
"""

from __future__ import annotations

import itertools
import math
from collections import Counter, deque
from collections.abc import Collection, Mapping
from dataclasses import dataclass

from .engine_cache import ARRIVAL_SECONDS, EngineCache
from .errors import AdapterUnavailable, InvalidRequest
from .pins import PIN_SECONDS, Pins
from .tickets import Group, Queue, Ticket

OVERTAKING_SECONDS = 1.0
BELIEF_SECONDS = 0.75  # between two probes of adapters that the engine is believed to hold; CONFIRMED_SECONDS has two
ASKED_SECONDS = 3.0  # after the last request, such probes stop
RETRY_SECONDS = 0.005  # between two tries to load an adapter while the cache is full
PROBE_SECONDS = 0.05
PROBE_TOKENS = 2, 16  # of the shortest probe, and of the longest
LATER_AFTER_A_MISS = 4  # times as long as before is a request given to reach the engine, after each miss
CAUTION_SECONDS = 10.0  # after the engine lacked an adapter that it was believed to hold, no weights go along
PIN_BELIEF_SECONDS = 5.0  # between two probes when nobody asks, and adapters are pinned
PROMPT_TOKENS_A_STEP = 64  # prompt tokens that an engine certainly reads in the time of one output token


@dataclass(frozen=True, slots=True)
class Load:
    """Step: send the engine this adapter's weights with a request of one token."""

    task_id: int
    number: int
    is_of_pin: bool = False  # no request waits for it


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


class Admission:
    """Decides whether each request may go on, and what to send the engine next. Not thread-safe."""

    def __init__(self, cache: EngineCache, now: float, *, cautious_for: float = 0.0) -> None:
        """Start with an empty queue. For `cautious_for` seconds no weights go along with requests.

        A resolver that starts beside a running engine does not know which requests are under way there.
        """
        self.cache = cache
        self._queue = Queue()
        self._pins = Pins(cache)
        self._released: list[Ticket] = []
        self._numbers = itertools.count()
        self._weights = 0  # how many requests and loads with weights there were
        self._unsent: dict[int, None] = {}  # numbers of requests and loads that have not arrived yet, ascending
        self._under_way: deque[tuple[float, int]] = deque()  # (time of arrival, number) of requests that were sent
        self._asked_at = -math.inf  # the engine may be loaded after the resolver, and is probed after the first request
        self._belief_probed_at = now
        self._heard = -math.inf, now  # when the load or probe of the last response was sent, and when that came
        self._token_seconds = PROBE_SECONDS  # the engine's time for a token, by the last probe
        self._probes_warm = False  # whether the last probe of a held adapter could be of a warm one
        self._retry_at = self._probe_at = -math.inf
        self._cautious_until = now + cautious_for

    # Requests

    def pin(self, adapters: Mapping[int, int]) -> None:
        """From now on, keep these adapters in the engine: lora_task_id -> pages. See `adapter_table.pins`."""
        self._pins.keep(adapters)

    def ask(self, ticket: Ticket, now: float) -> bool:
        """Whether the request may go on at once; otherwise it waits in the queue.

        If True, `ticket.with_weights` tells whether it carries weights; then call `sent` or `dropped`.
        AdapterUnavailable when MOST_WAITING requests wait already. InvalidRequest when several adapters do not fit into
        the cache together: such a request would keep all others waiting, and in vain.
        """
        self._asked_at = now
        pages, size = sum(ticket.adapters.values()), self.cache.size
        if len(ticket.adapters) > 1 and 0 < size < pages:
            raise InvalidRequest(
                f"the {len(ticket.adapters)} adapters of the batch take {pages} pages, and the engine's adapter cache "
                f"has {size}; send fewer rows at a time"
            )
        is_held = self.cache.are_held(ticket.adapters, now) or (
            ticket.is_routers and self.cache.are_believed(ticket.adapters)
        )
        may_go = is_held or (not self._queue.has(ticket.adapters) and self._may_carry([ticket], now))
        if may_go and not self._must_wait(now):
            self._begin(ticket, with_weights=not is_held)
            return True
        self._queue.join(ticket, now)
        ticket.has_waited = True
        return False

    def leave(self, ticket: Ticket) -> bool:
        """Take a request out of the queue; False when it has left the queue already."""
        return self._queue.leave(ticket)

    def expired(self, now: float) -> list[Ticket]:
        """Take the requests whose deadline has passed out of the queue."""
        return self._queue.take_expired(now)

    def released(self) -> list[Ticket]:
        """The requests that were released since the last call. Send them in order."""
        released, self._released = self._released, []
        return released

    def is_due(self, number: int, now: float) -> bool:
        """Whether weights with this number may be sent: they evict nothing that a request with a smaller number needs.

        Either all of these requests have reached the engine, or the engine evicts nothing.
        """
        self._note_arrivals(now)
        return self.cache.fits_all or next(iter(self._unsent), number) >= number

    def sent(self, ticket: Ticket, now: float) -> None:
        """Note that the request was sent to the engine, or that the adapter of one that only loads is there."""
        if ticket.only_loads:
            self.dropped(ticket, now)
            return
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
        return self._queue.waiting()

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
        if may_probe and (step := self._probe_belief(now) or self._bring_pin(now)):
            return step
        while (group := self._queue.head) is not None:
            if self.cache.are_held(group.adapters, now):
                self._release(group)
            elif may_probe and (step := self._spare_pins(group, now)):
                return step
            elif self._may_carry(group.tickets, now):
                self._release(group, with_weights=True)
            elif now < self._retry_at:
                return Pause(self._retry_at - now)
            elif group.adapters.keys() - group.loaded or group.weights != self._weights:
                return self._load_next(group)
            elif may_probe:
                return self._find_next(group)
            else:
                break
        if not may_probe:
            return Pause(self._probe_at - now)
        unconfirmed = self.cache.unconfirmed
        if unconfirmed is not None and not self._pins.are_at_risk(self.cache.pages(unconfirmed), now):
            self.cache.lose(unconfirmed)
            return self._probe(unconfirmed)
        if (pin := self._pins.to_touch_early()) is not None:
            return self._touch(pin)
        is_idle = now > self._asked_at + ASKED_SECONDS
        if self.cache.has_open and (is_idle or not self.cache.fits_all):  # if all fit, ends matter to metrics alone
            return self._probe_ends()
        return Pause(BELIEF_SECONDS)

    def responded(self, sent_at: float, now: float) -> None:
        """Note a response to a load or probe that was sent at `sent_at`: the engine has gone through an iteration."""
        before_sent_at, before = self._heard
        if sent_at == before_sent_at:
            self._token_seconds = now - before
        self._heard = sent_at, now
        self.cache.heard(sent_at, now)

    def loaded(self, load: Load, sent_at: float, now: float) -> None:
        """Note that the engine has the adapter, and release the requests that waited for it."""
        del self._unsent[load.number]
        self.cache.see(load.task_id, sent_at)
        group = self._queue.head
        if group is not None and load.task_id in group.adapters:
            group.loaded.add(load.task_id)
            if len(group.adapters) == 1:
                self._release(group)
        self.cache.end(load.task_id, now)

    def full(self, load: Load, now: float) -> None:
        """Note that the engine refused the load, since all of its cached adapters are in use."""
        del self._unsent[load.number]
        self.cache.end(load.task_id, now)
        if load.is_of_pin:
            self._pins.put_off(load.task_id, now + PIN_SECONDS)
        else:
            self._retry_at = now + RETRY_SECONDS

    def never_fits(self, load: Load) -> AdapterUnavailable | None:
        """The error of a load that the engine has refused as full, if the adapter is larger than the cache.

        The pages that are registered may be those of an earlier config. So this is certain only if no other adapter is
        in use. Otherwise None.
        """
        pages, size = self.cache.pages(load.task_id)[load.task_id], self.cache.size
        if not 0 < size < pages or self.cache.in_use != [load.task_id]:
            return None
        return AdapterUnavailable(f"it takes {pages} pages, and the engine's adapter cache has {size}")

    def failed(self, load: Load, now: float | None, *, pin_at: float = -math.inf) -> list[Ticket]:
        """Note that the adapter cannot be loaded, and take the requests that wait for it out of the queue.

        `now` is None when the engine is silent, and may still load the adapter. A pinned adapter for which no request
        waited is tried again at `pin_at`. Requests that came meanwhile have a load of their own.
        """
        del self._unsent[load.number]
        self._pins.put_off(load.task_id, pin_at)
        if now is not None:
            self.cache.end(load.task_id, now)
        return [] if load.is_of_pin else self._queue.take_all_for(load.task_id)

    def let_go(self, load: Load, now: float) -> None:
        """Note that a load has ended now for which `failed` was called while the engine was silent."""
        self.cache.end(load.task_id, now)

    def probed(self, probe: Probe, sent_at: float, now: float) -> None:
        """Note that the engine has responded to a probe, to its end."""
        self._pins.probed()
        if probe.task_id is not None:
            self.cache.see(probe.task_id, sent_at)
            self._found(probe.task_id)
            self.cache.end(probe.task_id, now)

    def missed(self, probe: Probe, now: float) -> bool:
        """Note that the engine does not have the adapter of a probe. True: it was believed to hold the adapter."""
        self._pins.probed()
        if probe.task_id is None:
            return False
        if (group := self._queue.head) is not None:
            group.loaded.discard(probe.task_id)
        is_unexpected = self.cache.miss(probe.task_id)
        if is_unexpected:
            self._cautious_until = now + CAUTION_SECONDS
        self.cache.end(probe.task_id, now)
        return is_unexpected

    def not_probed(self, probe: Probe, now: float, pause: float) -> None:
        """Note that a probe had another error, or no response. The next probe comes after `pause` seconds."""
        self._pins.probed()
        self._probe_at = now + pause
        if probe.task_id is not None:
            self.cache.lose(probe.task_id)
            self.cache.end(probe.task_id, now)

    # Parts

    def _note_arrivals(self, now: float) -> None:
        while self._under_way and self._under_way[0][0] <= now:
            del self._unsent[self._under_way.popleft()[1]]

    def _must_wait(self, now: float) -> bool:
        """Whether the head of the queue has waited so long that no other request overtakes it."""
        head = self._queue.head
        return head is not None and now - head.arrived_at >= OVERTAKING_SECONDS

    def _may_carry(self, tickets: Collection[Ticket], now: float) -> bool:
        """Whether weights may go along with these requests.

        Only with a single one. The engine may refuse it, or its client may have left, so no other may rely on it.
        """
        if len(tickets) > 1 or now < self._cautious_until:
            return False
        [ticket] = tickets
        return ticket.takes_weights and self._pins.has_capacity(ticket.adapters, now)

    def _begin(self, ticket: Ticket, *, with_weights: bool) -> None:
        ticket.number, ticket.with_weights = next(self._numbers), with_weights
        self._unsent[ticket.number] = None
        self._weights += with_weights
        for task_id, pages in ticket.adapters.items():
            self.cache.begin(task_id, pages, with_weights=with_weights)

    def _release(self, group: Group, *, with_weights: bool = False) -> None:
        tickets = self._queue.take(group)
        for ticket in tickets:
            self._begin(ticket, with_weights=with_weights)
        self._released += tickets

    def _load(self, task_id: int, pages: int, *, is_of_pin: bool = False) -> Load:
        self.cache.begin(task_id, pages, with_weights=True)
        load = Load(task_id, next(self._numbers), is_of_pin)
        self._unsent[load.number] = None
        self._weights += 1
        return load

    def _probe(self, task_id: int, tokens: int = PROBE_TOKENS[0]) -> Probe:
        self.cache.begin(task_id, 0, with_weights=False)
        return Probe(task_id, tokens)

    def _probe_ends(self) -> Probe:
        """A probe that tells how many iterations have passed."""
        shortest, longest = PROBE_TOKENS
        token_seconds = max(self._token_seconds, PROBE_SECONDS / longest)
        return Probe(None, max(shortest, int(PROBE_SECONDS / token_seconds)))

    def _load_next(self, group: Group) -> Load:
        task_id = min(group.adapters.keys() - group.loaded or group.adapters)
        load = self._load(task_id, group.adapters[task_id])
        group.found, group.weights = set(), self._weights
        return load

    def _find_next(self, group: Group) -> Probe:
        """A probe of an adapter of a batch. Each of them was loaded, and a later load may have evicted it."""
        task_id = min(group.adapters.keys() - group.found)
        self.cache.lose(task_id)  # so that a miss is not unexpected
        return self._probe(task_id, 1)

    def _found(self, task_id: int) -> None:
        """Release the requests at the head of the queue if probes have found all of their adapters.

        All earlier weights had arrived when the last load was sent, and none may have come after it.
        """
        group = self._queue.head
        if group is None or group.weights != self._weights:
            return
        group.found.add(task_id)
        if group.found.issuperset(group.adapters):
            self._release(group)

    def _touch(self, pin: int) -> Probe:
        """A probe by which the engine uses a pinned adapter after all others."""
        self._pins.touch(pin)
        return self._probe(pin, 1)

    def _probe_belief(self, now: float) -> Probe | None:
        """A probe of an adapter that the engine is believed to hold, if it is time for one."""
        is_asked = now <= self._asked_at + ASKED_SECONDS
        wait = BELIEF_SECONDS if is_asked else PIN_BELIEF_SECONDS
        if now < self._belief_probed_at + wait or not (is_asked or self._pins.pages):
            return None
        # If nobody asks, a warm adapter tells nothing: an engine that is loaded again has it.
        self._belief_probed_at, self._probes_warm = now, is_asked and not self._probes_warm
        task_id = self.cache.next_to_probe(warm=self._probes_warm)
        if task_id is None:
            return self._probe_ends() if is_asked else None
        return self._probe(task_id)

    def _bring_pin(self, now: float) -> Step | None:
        """The step by which a pinned adapter comes back, if one may be gone and it is time."""
        found = self._pins.to_bring(now, is_queue_empty=self._queue.head is None)
        if found is None:
            return None
        pin, is_absent = found
        return self._load(pin, self._pins.pages[pin], is_of_pin=True) if is_absent else self._touch(pin)

    def _spare_pins(self, group: Group, now: float) -> Step | None:
        """The step before a load of the group's adapters by which the engine keeps its pinned ones. None: load."""
        if not self._pins.are_at_risk(group.adapters, now):
            return None
        if group.spares_pins_until is None:
            group.spares_pins_until = now + PIN_SECONDS
        if now >= group.spares_pins_until:
            self._pins.yield_from(now)
            return None
        if (pin := self._pins.to_touch(group.adapters)) is not None:
            return self._touch(pin)
        return self._probe_ends() if self.cache.has_open else Pause(RETRY_SECONDS)
