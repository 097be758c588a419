# SPDX-FileCopyrightText: the tritonlora authors
# SPDX-License-Identifier: Apache-2.0
"""An engine and its clients in virtual time: seconds are numbers, and what this machine's processors do plays no part.

The engine's cache is the one whose every step is compared with TensorRT-LLM's own (tests/engine/test_golden.py).
"""

from __future__ import annotations

import heapq
import itertools
import math
import random
from collections import Counter, deque
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

from tritonlora.cpu_engine.peft_cache import LoraCache, LoraCacheError, PeftCache, TaskNotCachedError
from tritonlora.serving.admission import Admission, Load, Pause, Probe
from tritonlora.serving.engine_cache import EngineCache
from tritonlora.serving.errors import AdapterUnavailable
from tritonlora.serving.tickets import Ticket

HOPS_SECONDS = 0.0003, 0.002  # from the resolver to the engine, at least and at most
HOP_SECONDS = 0.0005  # back
PAUSED_ITERATIONS = 60

Respond = Callable[[str, bool], None]  # ("ok", "miss" or "full", whether it is the last response)


class World:
    """What happens when."""

    def __init__(self) -> None:
        self.now = 0.0
        self._events: list[tuple[float, int, Callable[..., None], tuple[object, ...]]] = []
        self._numbers = itertools.count()

    def after(self, seconds: float, happens: Callable[..., None], *arguments: object) -> None:
        """Call it in so many seconds."""
        heapq.heappush(self._events, (self.now + seconds, next(self._numbers), happens, arguments))

    def run(self, until: float) -> None:
        """Until that time."""
        while self._events and self._events[0][0] <= until:
            self.now, _, happens, arguments = heapq.heappop(self._events)
            happens(*arguments)


@dataclass(eq=False)
class _Active:
    task_id: int | None
    number: int
    tokens: float
    respond: Respond
    paused: int = 0  # iterations that give it no token


class Engine:
    """A token for each active request in each iteration, and TensorRT-LLM's LoRA cache. Each adapter takes one page."""

    def __init__(
        self, world: World, pages: int, pace: Callable[[float], float], slots: int = 512, pausing: float = 0.0
    ) -> None:
        """`pace(time)`: the seconds that an iteration takes. `slots`: requests that are active at one time.

        `pausing`: the share of tokens before which a request is paused for a while.
        """
        self._world = world
        self._pages = pages
        self._pace = pace
        self._slots = slots
        self._pausing = pausing
        self._queue: deque[tuple[int | None, float, bool, Respond]] = deque()
        self._active: list[_Active] = []
        self._weights_at: dict[int | None, float] = {}  # adapter -> when weights of it arrive that were sent last
        self._numbers = itertools.count()
        self._chance = random.Random(1)  # noqa: S311
        self._iterates = False
        self.reload()

    def reload(self, warm: Mapping[int, int] = {}) -> None:
        """What it had in its cache is gone."""
        self._cache: PeftCache[int] = PeftCache(LoraCache(self._pages))
        for request in self._active:
            self._world.after(HOP_SECONDS, request.respond, "gone", True)
        self._active.clear()
        for task_id in warm:
            self._add(task_id, True)

    def holds(self, task_id: int) -> bool:
        """Whether its cache has the adapter now."""
        return task_id in self._cache.cache

    def submit(self, task_id: int | None, tokens: float, with_weights: bool, respond: Respond) -> None:
        """A request, of the base model or for an adapter. One of no tokens is refused, before its adapter is looked at.

        It may overtake others, but not the weights of its adapter: the resolver sends both from one thread, and Triton
        has given a response to the next step of the ensemble when `send` returns.
        """
        hop = self._chance.uniform(*HOPS_SECONDS)
        arrives_at = max(self._world.now + hop, self._weights_at.get(task_id, 0.0))
        if with_weights:
            self._weights_at[task_id] = arrives_at
        self._world.after(arrives_at - self._world.now, self._arrive, task_id, tokens, with_weights, respond)

    def _arrive(self, *request: object) -> None:
        self._queue.append(request)  # type: ignore[arg-type]
        if not self._iterates:
            self._iterates = True
            self._world.after(0, self._iterate)

    def _add(self, task_id: int, with_weights: bool) -> None:
        number = next(self._numbers)
        self._cache.add(task_id, number, (1, lambda: 1) if with_weights else None)
        self._cache.finish(task_id, number)

    def _iterate(self) -> None:
        while self._queue and len(self._active) < self._slots:
            task_id, tokens, with_weights, respond = self._queue.popleft()
            number = next(self._numbers)
            if not tokens:
                self._world.after(HOP_SECONDS, respond, "refused by the engine", True)
                continue
            try:
                if task_id is not None:
                    self._cache.add(task_id, number, (1, lambda: 1) if with_weights else None)
            except TaskNotCachedError:
                self._world.after(HOP_SECONDS, respond, "miss", True)
            except LoraCacheError:
                self._world.after(HOP_SECONDS, respond, "full", True)
            else:
                self._active.append(_Active(task_id, number, tokens, respond))
        self._world.after(self._pace(self._world.now), self._produce, self._cache)

    def _produce(self, cache: PeftCache[int]) -> None:
        for request in [*self._active] if cache is self._cache else ():
            if not request.paused and self._pausing and self._chance.random() < self._pausing:
                request.paused = PAUSED_ITERATIONS
            if request.paused:
                request.paused -= 1
                continue
            request.tokens -= 1
            is_last = request.tokens <= 0
            if is_last:
                self._active.remove(request)
                if request.task_id is not None:
                    self._cache.finish(request.task_id, request.number)
            self._world.after(HOP_SECONDS, request.respond, "ok", is_last)
        self._iterates = bool(self._active or self._queue)
        if self._iterates:
            self._world.after(0, self._iterate)


class Resolver:
    """Requests go to the engine as `Admission` says; its own requests run one at a time."""

    def __init__(
        self,
        world: World,
        engine: Engine,
        pages: int,
        warm: Mapping[int, int],
        *,
        sending: float = 0.0,
        patience: float = 30,
        routed: float = 0.0,
        pins: Mapping[int, int] = {},
        are_large: bool = False,
        may_pause: bool = False,
    ) -> None:
        """`sending`: the seconds that weights take on their way. `patience`: the seconds that a request may wait.

        `routed`: the share of requests that come from the router, which tells their ends and asks again after a miss.
        `are_large`: no request carries weights. `may_pause`: the resolver knows that the engine may pause requests.
        """
        self._world = world
        self._engine = engine
        self._sending = sending
        self._patience = patience
        self._routed = routed
        self._are_large = are_large
        self._chance = random.Random(2)  # noqa: S311
        self.admission = Admission(EngineCache(pages, warm, world.now, may_pause=may_pause), world.now)
        self.admission.pin(pins)
        self._requests: dict[Ticket, tuple[float, Respond]] = {}
        self._outgoing: deque[Ticket] = deque()  # behind weights that are under way
        self._is_busy = self._is_sending = False
        self.counts = Counter[str]()
        self._next()

    def ask(self, task_id: int, tokens: float, most: float, respond: Respond) -> None:
        """A request of `tokens` tokens whose client allows for `most`."""
        if self._chance.random() < self._routed:
            self._ask_for_router(task_id, tokens, respond, self._world.now)
        else:
            ticket = Ticket({task_id: 1}, most, self._world.now, self._patience, takes_weights=not self._are_large)
            self._ask(ticket, tokens, respond)

    def _ask_for_router(
        self, task_id: int, tokens: float, respond: Respond, arrived_at: float, misses: int = 0
    ) -> None:
        ticket = Ticket(
            {task_id: 1}, math.inf, arrived_at, self._patience, takes_weights=False, is_routers=True, misses=misses
        )

        def forward(what: str, is_last: bool) -> None:
            if what in ("miss", "full") and misses < 3:
                self.counts["lost"] += 1
                self.admission.lost(ticket, self._world.now)
                self._ask_for_router(task_id, tokens, respond, arrived_at, misses + 1)
                return
            if is_last and what != "refused":
                self.admission.ended(ticket, self._world.now, had_it=what == "ok")
            respond(what, is_last)

        self._ask(ticket, tokens, forward)

    def _ask(self, ticket: Ticket, tokens: float, respond: Respond) -> None:
        self._requests[ticket] = (tokens, respond)
        try:
            goes = self.admission.ask(ticket, self._world.now)
        except AdapterUnavailable:
            self._refuse([ticket])
            return
        if goes:
            self._go(ticket)
        else:
            self.counts["waited"] += 1
            self._next()

    def _refuse(self, tickets: list[Ticket]) -> None:
        for ticket in tickets:
            _, respond = self._requests.pop(ticket)
            respond("refused", True)

    def _go(self, ticket: Ticket) -> None:
        if not ticket.with_weights:
            self._send(ticket)
            return
        self._outgoing.append(ticket)
        if not self._is_sending:
            self._is_sending = True
            self._world.after(self._sending, self._send_weights)

    def _send_weights(self) -> None:
        if self.admission.is_due(self._outgoing[0].number, self._world.now):
            self._send(self._outgoing.popleft())
        self._is_sending = bool(self._outgoing)
        if self._is_sending:
            self._world.after(self._sending or HOP_SECONDS, self._send_weights)

    def _send(self, ticket: Ticket) -> None:
        tokens, respond = self._requests.pop(ticket)
        [task_id] = ticket.adapters
        self.counts["weights" if ticket.with_weights else "id"] += 1
        self._engine.submit(task_id, tokens, ticket.with_weights, respond)
        self.admission.sent(ticket, self._world.now)

    def _next(self) -> None:
        if self._is_busy:
            return
        self._refuse(self.admission.expired(self._world.now))
        step = self.admission.step(self._world.now)
        for ticket in self.admission.released():
            self._go(ticket)
        if isinstance(step, Pause):
            self._world.after(min(max(step.seconds, 0.001), 0.05), self._wake)
            return
        self._is_busy = True
        if isinstance(step, Probe):
            self._probe(step)
        else:
            self._load(step)

    def _wake(self) -> None:
        self._next()

    def _load(self, load: Load) -> None:
        if not self.admission.is_due(load.number, self._world.now):
            self._world.after(HOP_SECONDS, self._load, load)
            return
        sent_at = self._world.now

        def respond(what: str, is_last: bool) -> None:
            now = self._world.now
            self.counts[f"load {what}"] += 1
            if what == "ok":
                self.admission.responded(sent_at, now)
                self.admission.loaded(load, sent_at, now)
            elif what == "full":
                self.admission.full(load, now)
            else:
                self._refuse(self.admission.failed(load, now))
            self._is_busy = False
            self._next()

        self._engine.submit(load.task_id, 1, True, respond)

    def _probe(self, probe: Probe) -> None:
        sent_at = self._world.now

        def respond(what: str, is_last: bool) -> None:
            self.counts[f"probe {what}"] += is_last
            if what == "ok":
                self.admission.responded(sent_at, self._world.now)
            if not is_last:
                return
            if what == "ok":
                self.admission.probed(probe, sent_at, self._world.now)
            elif what == "miss":
                self.counts["unexpected miss"] += self.admission.missed(probe, self._world.now)
            else:
                self.admission.not_probed(probe, self._world.now, 0.25)
            self._is_busy = False
            self._next()

        self._engine.submit(probe.task_id, probe.tokens, False, respond)


@dataclass
class Outcome:
    """What the clients have seen."""

    responses: Counter[str] = field(default_factory=Counter)  # of whole requests, by their end
    first_tokens: list[float] = field(default_factory=list)  # seconds to the first token
    errors_at: list[float] = field(default_factory=list)

    def quantile(self, share: float) -> float:
        """Of the seconds to the first token."""
        return sorted(self.first_tokens)[min(len(self.first_tokens) - 1, int(share * len(self.first_tokens)))]


@dataclass(frozen=True)
class Clients:
    """Closed loops of clients."""

    adapters: int
    streams: int
    tokens: int  # each request takes half of it to one and a half
    looseness: float = 1.0  # how many times that the client allows for
    think: float = 0.002  # seconds between two requests of a client, at an average
    sticky: bool = False  # each client keeps to one adapter
    cyclic: bool = False  # one adapter after the other is asked for
    weight: Callable[[int], float] = lambda rank: 1.0  # of the adapter at this rank, from 1
    refused: float = 0.0  # the share of requests that the engine refuses
    until: float = math.inf  # seconds after which they ask no more


def run(
    world: World,
    ask: Callable[[int, float, float, Respond], None],
    clients: Clients,
    seconds: float,
    seed: int = 1,
    counted_from: float = 0,
) -> Outcome:
    """Let the clients ask for so many seconds."""
    chance = random.Random(seed)  # noqa: S311
    outcome = Outcome()
    stop_at, numbers = world.now + clients.until, itertools.count()
    weights = [clients.weight(rank) for rank in range(1, clients.adapters + 1)]

    def start(client: int) -> None:
        if world.now >= stop_at:
            return
        began, seen = world.now, list[str]()
        if clients.sticky or clients.cyclic:
            task_id = 1 + (client if clients.sticky else next(numbers)) % clients.adapters
        else:
            [task_id] = chance.choices(range(1, clients.adapters + 1), weights)
        tokens = chance.randint(max(1, clients.tokens // 2), clients.tokens * 3 // 2)
        if clients.refused and chance.random() < clients.refused:
            tokens = 0

        def respond(what: str, is_last: bool) -> None:
            if what != "ok":
                outcome.errors_at.append(world.now)
            if not seen and what == "ok" and began >= counted_from:
                outcome.first_tokens.append(world.now - began)
            seen.append(what)
            if is_last:
                outcome.responses[what] += began >= counted_from
                world.after(clients.think * chance.expovariate(1) + (0.05 if what != "ok" else 0), start, client)

        ask(task_id, tokens, tokens * clients.looseness, respond)

    for client in range(clients.streams):
        world.after(chance.random() * max(clients.think, 0.5), start, client)
    world.run(world.now + seconds)
    return outcome
