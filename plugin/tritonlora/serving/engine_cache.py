# SPDX-FileCopyrightText: the tritonlora authors
# SPDX-License-Identifier: Apache-2.0
"""What the engine's LoRA cache certainly holds, and which of its adapters may be in use.

Of the adapters that no request uses, the engine evicts the one whose last request ended first (TensorRT-LLM
cpp/tensorrt_llm/runtime/loraCache.cpp). Two rules follow:

    held        an adapter is still cached, if all adapters that may have been used after it fit beside it
    capacity    the engine has capacity for an adapter, if all adapters that may be in use fit beside it

A request that was sent may not have used its adapter: the engine refuses some requests before it looks at the adapter.
An own request of the resolver that had a response has used it, and so has a request of the router that ended well.

The router tells when its requests end. A step of an ensemble does not see when a request ends. So the resolver bounds
the request's end by its own requests to the engine, which are loads and probes:

- The engine starts requests in the order in which they come. A request has started when an own request that was sent at
  least ARRIVAL_SECONDS later has had its first token.
- Each iteration of the engine gives every active request at least one token. A request has ended when the engine has
  gone through as many iterations since its start as the request has tokens. Each response to an own request shows that
  one more iteration has passed.

So the resolver assumes no speed of the engine. If the engine is slow, a bound is only late, and never wrong.

An engine may pause requests, if its batch_scheduler_policy is max_utilization. Then an iteration may give a request no
token, and no bound is certain. Such a cache is certain only while all adapters fit.

Times are seconds of any one clock. This module uses no Triton, no threads and no files.
"""

from __future__ import annotations

import heapq
import math
from collections import OrderedDict
from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass
from types import MappingProxyType

ARRIVAL_SECONDS = 0.003  # from sending a request to Triton until it has reached the engine
EXTRA_ITERATIONS = 4  # a request may be active for so many without a token: while it starts, and while it ends
CONFIRMED_SECONDS = 2.0  # without a sign of the engine for longer, it may have been loaded again
MOST_UNCONFIRMED = 16  # older unconfirmed adapters were probably evicted, and are not probed


@dataclass(eq=False, slots=True)
class _Adapter:
    task_id: int
    pages: int
    is_warm: bool = False  # the engine's warmup loads it
    was_sent: bool = False  # its weights were sent to the engine at some time
    is_absent: bool = True  # the engine certainly does not have it
    seen_at: float | None = None  # the last time at which the engine certainly had it; None: it may not have it
    used_at: float = -math.inf  # when the last request that the engine has certainly served was sent
    sent_at: float = -math.inf  # when a request of an ensemble for it was last sent
    is_in_use: bool = False  # whether a request may use it now
    begun: int = 0  # requests after `begin`, and before `send` or `end`
    unstarted: float = -math.inf  # the most iterations that a sent request needs which may not have started
    ends: float = -math.inf  # the iteration by which all started requests have ended
    ended_at: float = -math.inf  # the time at which it became certain that all requests have ended


class EngineCache:
    """What is certain of one engine's cache of `capacity` pages. 0: its size is not known, and nothing is certain."""

    def __init__(
        self,
        capacity: int,
        warm: Mapping[int, int],
        now: float,
        *,
        late: Collection[int] = (),
        is_fresh: bool = True,
        may_pause: bool = False,
    ) -> None:
        """`warm` has the adapters that the engine's warmup loads, lora_task_id -> pages, in the order of the warmup.

        Those that are `late` may have come too late for it. If the engine `is_fresh`, it holds no other adapters.
        Otherwise it may have got others before. `may_pause`: the engine may pause requests.
        """
        self.size = capacity  # pages; 0: not known
        self._may_pause = may_pause
        self._adapters: dict[int, _Adapter] = {}
        self._ended: OrderedDict[int, None] = OrderedDict()  # adapters not in use, in the order in which they ended
        self._in_use = 0  # pages of the adapters that may be in use
        self._ever_sent = 0 if is_fresh else math.inf  # pages of all adapters whose weights were ever sent
        self._unconfirmed: dict[int, None] = {}  # adapters whose weights a request carried, which may have failed
        self._unstarted: OrderedDict[int, None] = OrderedDict()  # adapters with unstarted requests, by `sent_at`
        self._iterations = 0  # how many the engine has certainly gone through
        self._ends: list[tuple[float, int]] = []  # heap of (iteration, task id), one for each with started requests
        self._confirmed_at = now  # the engine was not loaded again before this time
        for order, (task_id, pages) in enumerate(warm.items()):
            adapter = self._adapter(task_id, pages)
            adapter.is_warm = task_id not in late
            adapter.is_absent = False
            self._count(adapter)
            adapter.used_at = adapter.ended_at = now - 1 + order / len(warm)
            adapter.seen_at = adapter.used_at if adapter.is_warm else None
            self._ended[task_id] = None

    @property
    def capacity(self) -> int:
        """The pages of the cache; 0 if nothing is certain of it."""
        return 0 if self._may_pause and self._ever_sent > self.size else self.size

    # Decisions

    def are_held(self, task_ids: Collection[int], now: float) -> bool:
        """Whether the engine certainly has all of these adapters now."""
        seen = self._seen(task_ids)
        return len(seen) == len(task_ids) and all(self._is_recent(one, now) for one in seen) and self._fit(seen)

    def are_believed(self, task_ids: Collection[int]) -> bool:
        """Whether the engine has all of these adapters, unless it was loaded again, or somebody else loads adapters.

        If the size of the cache is not known, they may have been evicted, too.
        """
        seen = self._seen(task_ids)
        return len(seen) == len(task_ids) and (not self.capacity or self._fit(seen))

    def has_capacity(self, adapters: Mapping[int, int], beside: Mapping[int, int] = MappingProxyType({})) -> bool:
        """Whether the engine can certainly take these adapters now, evicting others if need be, but none of `beside`.

        Both are lora_task_id -> pages. The engine evicts none of `beside` if it has used them after all others.
        """
        beside = {task_id: pages for task_id, pages in beside.items() if task_id not in adapters}
        return bool(self.capacity) and self.new_pages(adapters) <= self.spare_pages(beside)

    def spare_pages(self, beside: Mapping[int, int]) -> float:
        """The pages that are certainly left beside all adapters in use, and beside these. Negative: there are none."""
        in_use = self._ever_sent if self._may_pause else self._in_use
        return self.capacity - in_use - self.new_pages(beside)

    def pages(self, task_id: int) -> dict[int, int]:
        """The adapter's id and pages, for `has_capacity`."""
        return {task_id: self._adapters[task_id].pages}

    def new_pages(self, adapters: Mapping[int, int]) -> int:
        """The pages of those adapters that no request uses."""
        return sum(pages for task_id, pages in adapters.items() if not self.is_in_use(task_id))

    def endangered(self, pages: float, kept: Collection[int]) -> int | None:
        """Of the adapters `kept`, the first one that the engine may evict if it takes so many pages, or has evicted.

        None if it certainly keeps all of them. Requests for `kept` must be under way no longer than a probe is.
        """
        if self._ever_sent + pages <= self.capacity:
            return None
        first = min(self._seen(kept), key=lambda one: one.used_at, default=None)  # the engine evicts the others later
        return first.task_id if first is not None and self._free_pages([first]) < pages else None

    @property
    def fits_all(self) -> bool:
        """Whether all adapters that the engine may ever have got fit together, so that it evicted none."""
        return self._ever_sent <= self.capacity

    @property
    def has_open(self) -> bool:
        """Whether some requests were sent and have not certainly ended."""
        return bool(self._unstarted or self._ends)

    @property
    def unconfirmed(self) -> int | None:
        """The last adapter whose weights a request carried, if the engine may have refused that request."""
        return next(reversed(self._unconfirmed), None)

    def may_have(self, task_id: int) -> bool:
        """Whether the engine does not certainly lack the adapter."""
        return task_id in self._adapters and not self._adapters[task_id].is_absent

    def is_in_use(self, task_id: int) -> bool:
        """Whether requests may use the adapter now."""
        return task_id in self._adapters and self._adapters[task_id].is_in_use

    @property
    def in_use(self) -> list[int]:
        """The adapters that requests may use now."""
        return [one.task_id for one in self._adapters.values() if one.is_in_use]

    def states(self) -> dict[int, bool]:
        """The adapters that the engine may have, and whether it certainly has them, unless it was loaded again.

        The adapter that was used last was not evicted, even if the size of the cache is not known.
        """
        found = {one.task_id: fits or not later for later, (one, fits) in enumerate(self._each_seen())}
        if self.capacity and not self.has_open:  # all ends are known, so an adapter that does not fit was evicted
            found = {task_id: is_certain for task_id, is_certain in found.items() if is_certain}
        return dict.fromkeys(self._unconfirmed, False) | found

    def held(self) -> dict[int, int]:
        """The adapters that the engine certainly has, unless it was loaded again: lora_task_id -> pages."""
        return {task_id: self._adapters[task_id].pages for task_id, is_certain in self.states().items() if is_certain}

    def next_to_probe(self, *, warm: bool) -> int | None:
        """A held adapter, which a probe is to find in the engine.

        With `warm`, the one that was seen longest ago, so that each has its turn. Otherwise the one whose last request
        was sent first, of those that the warmup does not load: another client's adapters evict it before the others.
        """
        held = [one for one, fits in self._each_seen() if fits and (warm or not one.is_warm)]
        found = min(held, key=lambda one: (one.seen_at or 0.0) if warm else one.used_at, default=None)
        return found.task_id if found else None

    # Events

    def expect(self, warm: Mapping[int, int], now: float) -> None:
        """Note adapters that an engine may load at its start, lora_task_id -> pages, beside those known so far.

        The engine may be starting now, and evict others for them.
        """
        for task_id, pages in warm.items():
            adapter = self._adapter(task_id, pages)
            adapter.is_absent = False
            if not adapter.was_sent:
                self._count(adapter)
                adapter.ended_at = now
                self._ended[task_id] = None

    def begin(self, task_id: int, pages: int, *, with_weights: bool) -> None:
        """Note that a request for the adapter, or a load, is about to be sent. It may be active until `send` or `end`.

        `pages` are those of the adapter, and `with_weights` tells whether its weights go along.
        """
        adapter = self._adapter(task_id, pages)
        adapter.begun += 1
        if not adapter.is_in_use:
            adapter.is_in_use = True
            self._in_use += adapter.pages
            self._ended.pop(task_id, None)
        if with_weights:
            self._count(adapter)
            adapter.seen_at = None  # until `see` tells that the engine has taken the weights

    def send(self, task_id: int, tokens: float | None, now: float, *, with_weights: bool) -> None:
        """Note that a request after `begin` was sent. It ends at most `tokens` iterations after its start.

        None: `end` will tell when it has ended.
        """
        if tokens is None:
            return
        adapter = self._adapters[task_id]
        adapter.sent_at = now
        adapter.begun -= 1
        adapter.unstarted = max(adapter.unstarted, tokens + EXTRA_ITERATIONS)
        self._unstarted.pop(task_id, None)
        self._unstarted[task_id] = None
        if with_weights:
            adapter.is_absent = False
            self._unconfirmed.pop(task_id, None)
            self._unconfirmed[task_id] = None
            if len(self._unconfirmed) > MOST_UNCONFIRMED:
                del self._unconfirmed[next(iter(self._unconfirmed))]

    def end(self, task_id: int, now: float) -> None:
        """Note that a request after `begin` has ended, or was not sent."""
        adapter = self._adapters[task_id]
        adapter.begun -= 1
        self._end(adapter, now)

    def see(self, task_id: int, sent_at: float) -> None:
        """Note that the engine has responded to a request for the adapter that was sent at `sent_at`.

        Call it before `end`.
        """
        self._unconfirmed.pop(task_id, None)
        adapter = self._adapters[task_id]
        if adapter.seen_at is not None and not adapter.is_warm:  # the request was sent by id, so the engine had it
            self._confirmed_at = max(self._confirmed_at, sent_at)
        adapter.is_absent = False
        adapter.seen_at = max(adapter.seen_at or sent_at, sent_at)
        adapter.used_at = max(adapter.used_at, sent_at)

    def confirm(self, task_id: int, sent_at: float) -> None:
        """Note that the engine had the adapter, as believed, for a request by id that was sent at `sent_at`."""
        if self._adapters[task_id].seen_at is not None:
            self.see(task_id, sent_at)

    def lose(self, task_id: int) -> None:
        """Note that the engine may have lost the adapter."""
        self._unconfirmed.pop(task_id, None)
        self._adapters[task_id].seen_at = None

    def miss(self, task_id: int) -> bool:
        """Note that the engine did not have the adapter. True: the engine is still believed to hold it.

        Then the engine may have lost other adapters, too.
        """
        is_expected = not self.are_believed([task_id])  # weights that were sent meanwhile may have evicted it
        self.lose(task_id)
        self._adapters[task_id].is_absent = True
        if is_expected:
            return False
        for one in self._adapters.values():  # those of the warmup, too: another client may have evicted them
            one.seen_at = None
        return True

    def heard(self, sent_at: float, now: float) -> None:
        """Note one more response to a load or probe that was sent at `sent_at`: one more iteration has passed."""
        while self._unstarted:
            adapter = self._adapters[next(iter(self._unstarted))]
            if adapter.sent_at > sent_at - ARRIVAL_SECONDS:
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

    def _seen(self, task_ids: Collection[int]) -> list[_Adapter]:
        adapters = (self._adapters.get(task_id) for task_id in task_ids)
        return [one for one in adapters if one is not None and one.seen_at is not None]

    def _adapter(self, task_id: int, pages: int) -> _Adapter:
        found = self._adapters.get(task_id)
        if found is None:
            # An adapter takes a page at least, also if its pages are not known.
            found = self._adapters[task_id] = _Adapter(task_id, max(pages, 1))
        return found

    def _count(self, adapter: _Adapter) -> None:
        if not adapter.was_sent:
            adapter.was_sent = True
            self._ever_sent += adapter.pages

    def _end(self, adapter: _Adapter, now: float) -> None:
        """Note that the adapter is not in use, if all of its requests have ended."""
        if not adapter.begun and adapter.unstarted == adapter.ends == -math.inf:
            adapter.is_in_use = False
            adapter.ended_at = now
            self._in_use -= adapter.pages
            self._ended[adapter.task_id] = None

    def _is_recent(self, adapter: _Adapter, now: float) -> bool:
        """Whether the engine cannot have lost the adapter by being loaded again. A warm adapter is loaded with it."""
        seen_at = max(self._confirmed_at, adapter.seen_at or 0.0)
        return adapter.is_warm or now <= seen_at + CONFIRMED_SECONDS

    def _fit(self, adapters: Collection[_Adapter]) -> bool:
        """Whether all adapters that may have been used after these fit beside them."""
        return self.fits_all or self._free_pages(adapters) >= 0

    def _free_pages(self, adapters: Collection[_Adapter]) -> int:
        """The pages that are left beside these adapters and all that may have been used after them. Negative: none."""
        free_pages = self.capacity - self._in_use - sum(adapter.pages for adapter in adapters if not adapter.is_in_use)
        since = min(adapter.used_at for adapter in adapters)
        for task_id in reversed(self._ended):
            other = self._adapters[task_id]
            if free_pages < 0 or other.ended_at <= since:
                break
            if other not in adapters:
                free_pages -= other.pages
        return free_pages

    def _each_seen(self) -> Iterator[tuple[_Adapter, bool]]:
        """The adapters with `seen_at`, from the one that was used last to the first, and `_fit` of each by itself."""
        seen = [one for one in self._adapters.values() if one.seen_at is not None]
        ended = [self._adapters[task_id] for task_id in self._ended]
        later = 0  # pages of the adapters that may have been used after `one`, and are not in use
        for one in sorted(seen, key=lambda one: one.used_at)[::-1]:
            while ended and ended[-1].ended_at > one.used_at:
                later += ended.pop().pages
            own = 0 if one.is_in_use or one.ended_at > one.used_at else one.pages
            yield one, self.fits_all or self._in_use + later + own <= self.capacity
