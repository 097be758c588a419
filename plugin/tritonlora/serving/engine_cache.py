# SPDX-FileCopyrightText: the tritonlora authors
# SPDX-License-Identifier: Apache-2.0
"""What the engine's LoRA cache holds, and which of its adapters may be in use, as far as that is certain.

The engine evicts the adapter that was done first, of those that no request uses (TensorRT-LLM
cpp/tensorrt_llm/runtime/loraCache.cpp). Two facts follow:

    held        an adapter is still cached, if all adapters that may have been used after it fit beside it
    capacity    the engine has room, if all adapters that may be in use fit beside one more

In an ensemble nobody here sees when a request ends. So its end is bounded by requests of our own:

- It has started when one that was sent later, and not just then, has had its first token: the engine starts requests
  in the order in which they come.
- It has ended when the engine has gone through as many iterations since then as the request has tokens: each iteration
  gives every active request a token at least. Each response to a request of our own shows that an iteration has passed.

So no pace is assumed. Whatever the engine does, and however long it takes, a bound can only be late.

Times are seconds of any one clock. Nothing here knows Triton, threads or files.
"""

from __future__ import annotations

import heapq
import math
from collections import OrderedDict
from collections.abc import Collection, Mapping
from dataclasses import dataclass

ARRIVAL_SECONDS = 0.003  # in which a request that Triton was given has reached the engine
EXTRA_ITERATIONS = 4  # in which a request may be active without a token: it starts, its end is noticed
CONFIRMED_SECONDS = 2.0  # without a sign for longer, the engine may have been loaded again
MOST_UNCONFIRMED = 16  # the ones before were evicted by the time that somebody asks


@dataclass(eq=False, slots=True)
class _Adapter:
    task_id: int
    pages: int
    is_warm: bool = False  # the engine's warmup loads it
    was_sent: bool = False  # its weights were sent to the engine at some time
    seen_at: float | None = None  # when the engine certainly had it; None: it may have lost it since, or never had it
    used_at: float = -math.inf  # when a request for it was last sent
    is_in_use: bool = False  # maybe
    begun: int = 0  # requests that have begun, and of which nothing more is known
    unstarted: float = -math.inf  # iterations that those need at most that were sent, and may not have started
    ends: float = -math.inf  # the iteration by which those have ended that have started
    ended_at: float = -math.inf  # when the end of all of them became certain


class EngineCache:
    """Beliefs about one engine's cache of `capacity` pages; 0: its size is not known, and nothing is certain."""

    def __init__(self, capacity: int, warm: Mapping[int, int], now: float, *, is_fresh: bool = True) -> None:
        """`warm`: lora_task_id -> pages of what the engine was started with, in the order in which it loads them.

        An engine that is not fresh may have been given adapters that nobody here knows of.
        """
        self.capacity = capacity
        self._adapters: dict[int, _Adapter] = {}
        self._ended: OrderedDict[int, None] = OrderedDict()  # those not in use, the first to end first
        self._in_use = 0  # pages of the others
        self._ever_sent = 0 if is_fresh else math.inf  # pages of all adapters whose weights were ever sent
        self._unconfirmed: dict[int, None] = {}  # adapters whose weights went along with a request, maybe in vain
        self._unstarted: OrderedDict[int, None] = OrderedDict()  # adapters with such requests, by the last one's time
        self._iterations = 0  # that the engine has certainly gone through
        self._ends: list[tuple[float, int]] = []  # heap of (iteration, task id), one for each with started requests
        self._confirmed_at = now  # until then the engine was not loaded again
        for order, (task_id, pages) in enumerate(warm.items()):
            adapter = self._adapter(task_id, pages)
            adapter.is_warm = True
            self._count(adapter)
            adapter.seen_at = adapter.used_at = adapter.ended_at = now - 1 + order / len(warm)
            self._ended[task_id] = None

    # Decisions

    def are_held(self, task_ids: Collection[int], now: float) -> bool:
        """Whether the engine certainly has all of these adapters now."""
        adapters = [self._adapters.get(task_id) for task_id in task_ids]
        seen = [one for one in adapters if one is not None and one.seen_at is not None and self._is_recent(one, now)]
        return len(seen) == len(adapters) and self._fit(seen)

    def has_capacity(self, task_id: int, pages: int) -> bool:
        """Whether the engine can certainly take the adapter now, evicting others if need be."""
        adapter = self._adapters.get(task_id)
        beside = self._in_use - (adapter.pages if adapter and adapter.is_in_use else 0)
        return bool(self.capacity) and beside + pages <= self.capacity

    @property
    def fits_all(self) -> bool:
        """Whether all adapters that the engine may ever have been given fit together, so that none was evicted."""
        return self._ever_sent <= self.capacity

    @property
    def has_open(self) -> bool:
        """Whether requests were sent whose end is not certain."""
        return bool(self._unstarted or self._ends)

    @property
    def unconfirmed(self) -> int | None:
        """The last adapter whose weights went along with a request that the engine may have refused."""
        return next(reversed(self._unconfirmed), None)

    def least_recent(self, *, warm: bool) -> int | None:
        """The held adapter that is the next to be evicted, `warm` ones included or not.

        Where all of them may be in use, the one that was asked for first.
        """
        held = (one for one in self._adapters.values() if one.seen_at is not None and (warm or not one.is_warm))
        by_eviction = sorted(held, key=lambda one: (one.is_in_use, one.used_at))
        return next((one.task_id for one in by_eviction if self._fit([one])), None)

    # Events

    def begin(self, task_id: int, pages: int, *, with_weights: bool) -> None:
        """A request for the adapter, or a load, is about to be sent. Until `send` or `end` it may be active."""
        adapter = self._adapter(task_id, pages)
        adapter.begun += 1
        if not adapter.is_in_use:
            adapter.is_in_use = True
            self._in_use += adapter.pages
            self._ended.pop(task_id, None)
        if with_weights:
            self._count(adapter)
            adapter.seen_at = None  # until `see` tells that the engine has taken them

    def send(self, task_id: int, tokens: float, now: float, *, with_weights: bool) -> None:
        """A request that has begun was sent. It ends by itself, at most so many tokens after its start."""
        adapter = self._adapters[task_id]
        adapter.begun -= 1
        adapter.used_at = now
        adapter.unstarted = max(adapter.unstarted, tokens + EXTRA_ITERATIONS)
        self._unstarted.pop(task_id, None)
        self._unstarted[task_id] = None
        if with_weights:
            self._unconfirmed.pop(task_id, None)
            self._unconfirmed[task_id] = None
            if len(self._unconfirmed) > MOST_UNCONFIRMED:
                del self._unconfirmed[next(iter(self._unconfirmed))]

    def end(self, task_id: int, now: float) -> None:
        """A request that has begun has ended."""
        adapter = self._adapters[task_id]
        adapter.begun -= 1
        self._end(adapter, now)

    def see(self, task_id: int, sent_at: float) -> None:
        """The engine has responded to a request for the adapter that was sent at that time, and has not ended here."""
        self._unconfirmed.pop(task_id, None)
        adapter = self._adapters[task_id]
        if adapter.seen_at is not None and not adapter.is_warm:  # so that its weights did not come along
            self._confirmed_at = max(self._confirmed_at, sent_at)
        adapter.seen_at = sent_at
        adapter.used_at = max(adapter.used_at, sent_at)

    def lose(self, task_id: int) -> None:
        """The engine may not have the adapter any more."""
        self._unconfirmed.pop(task_id, None)
        self._adapters[task_id].seen_at = None

    def miss(self, task_id: int) -> bool:
        """The engine did not have the adapter. Whether that is against what was believed; then it is true of others."""
        self._unconfirmed.pop(task_id, None)
        adapter = self._adapters[task_id]
        if adapter.seen_at is None:
            return False
        # Where nothing is evicted, the engine was loaded again, and its warmup with it; else nothing is certain.
        keeps_warm = self.fits_all and not adapter.is_warm
        for one in self._adapters.values():
            one.seen_at = one.seen_at if keeps_warm and one.is_warm else None
        return True

    def heard(self, sent_at: float, now: float) -> None:
        """A request of our own, sent at that time, has had one response more, of another iteration."""
        while self._unstarted:
            adapter = self._adapters[next(iter(self._unstarted))]
            if adapter.used_at > sent_at - ARRIVAL_SECONDS:
                break
            del self._unstarted[adapter.task_id]
            if adapter.ends == -math.inf:
                heapq.heappush(self._ends, (self._iterations + adapter.unstarted, adapter.task_id))
            adapter.ends = max(adapter.ends, self._iterations + adapter.unstarted)
            adapter.unstarted = -math.inf
        self._iterations += 1
        while self._ends and self._ends[0][0] <= self._iterations:
            adapter = self._adapters[heapq.heappop(self._ends)[1]]
            if adapter.ends > self._iterations:
                heapq.heappush(self._ends, (adapter.ends, adapter.task_id))
            else:
                adapter.ends = -math.inf
                self._end(adapter, now)

    # Facts

    def _adapter(self, task_id: int, pages: int) -> _Adapter:
        found = self._adapters.get(task_id)
        if found is None:
            found = self._adapters[task_id] = _Adapter(task_id, pages)
        return found

    def _count(self, adapter: _Adapter) -> None:
        if not adapter.was_sent:
            adapter.was_sent = True
            self._ever_sent += adapter.pages

    def _end(self, adapter: _Adapter, now: float) -> None:
        """Note that it is not in use any more, if that is so."""
        if not adapter.begun and adapter.unstarted == adapter.ends == -math.inf:
            adapter.is_in_use = False
            adapter.ended_at = now
            self._in_use -= adapter.pages
            self._ended[adapter.task_id] = None

    def _is_recent(self, adapter: _Adapter, now: float) -> bool:
        """Whether the engine has not been loaded again since it had the adapter, or has warmed it then."""
        seen_at = max(self._confirmed_at, adapter.seen_at or 0.0)
        return adapter.is_warm or now <= seen_at + CONFIRMED_SECONDS

    def _fit(self, adapters: Collection[_Adapter]) -> bool:
        """Whether all adapters that may have been used after these fit beside them."""
        if self.fits_all:
            return True
        room = self.capacity - self._in_use - sum(adapter.pages for adapter in adapters if not adapter.is_in_use)
        since = min(adapter.used_at for adapter in adapters)
        for task_id in reversed(self._ended):
            other = self._adapters[task_id]
            if room < 0 or other.ended_at <= since:
                break
            if other not in adapters:
                room -= other.pages
        return room >= 0
