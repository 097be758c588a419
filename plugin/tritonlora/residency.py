# SPDX-FileCopyrightText: the tritonlora authors
# SPDX-License-Identifier: Apache-2.0
"""What the router believes the engine's LoRA cache to hold, and who waits for room in it.

Strategy. The engine evicts the adapter whose last request ended longest ago, of those that no request uses
(TensorRT-LLM cpp/tensorrt_llm/runtime/loraCache.cpp). The same order is kept here, from what the engine has answered.
Where the cache's size is known, what cannot be held any more is forgotten, so that its next request brings the weights
at once instead of failing first. Where it is not known, an adapter is forgotten when the engine has missed it.
A wrong belief costs time and nothing else: a miss is recovered from, and the engine ignores weights that it has.

When nothing can be evicted requests stand in line, and the first one is tried whenever an adapter falls idle.

This file runs inside a plain Triton container: standard library only.
"""

from __future__ import annotations

import threading
import time
from collections import Counter, deque
from collections.abc import Iterable
from dataclasses import dataclass

from tritonlora.adapters import AdapterEntry

# How long requests for adapters that are in use overtake a line, which makes the most of what is loaded, before they
# join it, so that those in it are not kept waiting for ever.
OVERTAKING_SECONDS = 1.0


@dataclass(slots=True, eq=False)
class Place:
    """A place in the line."""

    entry: AdapterEntry
    turn: threading.Condition
    joined: float
    freed: int  # how often an adapter had fallen idle when the request was last tried
    retry_at: float  # tried again then, as soon as it is the first, even if nothing is known to have changed


class Loads:
    """Which adapters the engine has been seen to hold, which are in use, and which are being loaded. Thread-safe."""

    def __init__(self, warmed: Iterable[AdapterEntry], cache_pages: int | None, retry_interval: float) -> None:
        """The engine holds `warmed`, loaded in this order."""
        self._lock = threading.Lock()
        self._cache_pages = cache_pages
        self._retry_interval = retry_interval
        self._held: dict[int, int] = {}  # pages by task id; the one that would be evicted first comes first
        self._in_use: dict[int, int] = {}  # pages by task id
        self._requests: Counter[int] = Counter()  # by task id, of those in use
        self._loading: dict[int, threading.Condition] = {}
        self._were_held: set[int] = set()
        self._line: deque[Place] = deque()
        self._freed = 0
        for entry in warmed:
            self._hold(entry)

    def holds(self, entry: AdapterEntry) -> bool:
        """Whether a request for it can go out without weights."""
        with self._lock:
            return entry.lora_task_id in self._held

    def answered(self, entry: AdapterEntry) -> str:
        """The engine answered a request for it, and holds it. "evicted" when it has held it before, or "first_use"."""
        with self._lock:
            reason = "evicted" if entry.lora_task_id in self._were_held else "first_use"
            self._hold(entry)
            return reason

    def missed(self, entry: AdapterEntry) -> None:
        """The engine does not hold it, and the request that it refused for that has ended."""
        with self._lock:
            self._held.pop(entry.lora_task_id, None)
            self._unuse(entry)

    def _hold(self, entry: AdapterEntry) -> None:
        self._held.pop(entry.lora_task_id, None)
        self._held[entry.lora_task_id] = _pages(entry)
        self._were_held.add(entry.lora_task_id)
        if self._cache_pages is None:
            return
        surplus = sum(self._held.values()) - self._cache_pages
        for task_id in list(self._held):
            if surplus <= 0:
                break
            if task_id not in self._in_use:
                surplus -= self._held.pop(task_id)

    # One load at a time

    def claim(self, entry: AdapterEntry, timeout: float, *, insist: bool = False) -> bool | None:
        """True: the caller loads the adapter, and nobody else does before `release_claim`. False: it has been loaded
        in the meantime, unless the caller insists. None: somebody else was at it for `timeout` seconds.
        """
        task_id = entry.lora_task_id
        end = time.monotonic() + timeout
        with self._lock:
            while (loading := self._loading.get(task_id)) is not None:
                if not loading.wait(end - time.monotonic()):
                    return None
            if task_id in self._held and not insist:
                return False
            self._loading[task_id] = threading.Condition(self._lock)
            return True

    def release_claim(self, entry: AdapterEntry) -> None:
        """The adapter is loaded, or has failed to."""
        with self._lock:
            self._loading.pop(entry.lora_task_id).notify_all()

    # In use, and in line

    def begin(self, entry: AdapterEntry) -> Place | None:
        """A request for it comes: None when it may go out, and counts as in use; else its place in the line."""
        with self._lock:
            now = time.monotonic()
            in_use = entry.lora_task_id in self._in_use
            if self._line:
                stands_back = not in_use or now - self._line[0].joined > OVERTAKING_SECONDS
            else:
                stands_back = not self._fits(entry)
            if not stands_back:
                self._use(entry)
                return None
            place = self._place(entry, self._freed, now + self._retry_interval)
            self._line.append(place)
            return place

    def refused(self, entry: AdapterEntry, freed: int, pause: float) -> Place:
        """The engine has no room for it: back to the head of the line, to be tried again in `pause` seconds, or as
        soon as adapters have fallen idle more than `freed` times.
        """
        with self._lock:
            self._unuse(entry)
            place = self._place(entry, freed, time.monotonic() + pause)
            self._line.appendleft(place)
            return place

    def wait_for_turn(self, place: Place, timeout: float) -> bool:
        """Whether, within `timeout` seconds, the place is the first and can be tried; it counts as in use then."""
        end = time.monotonic() + timeout
        with self._lock:
            while True:
                now = time.monotonic()
                first = self._line[0] is place
                if first and (now >= place.retry_at or self._may_have_room(place)):
                    self._use(place.entry)
                    return True
                if now >= end:
                    return False
                place.turn.wait((min(end, place.retry_at) if first else end) - now)

    def leave(self, place: Place) -> None:
        """Out of the line, whether its turn has come or not."""
        with self._lock:
            self._line.remove(place)
            self._wake_first()

    def waiting(self) -> list[int]:
        """Task ids of those in line, the first one first."""
        with self._lock:
            return [place.entry.lora_task_id for place in self._line]

    def freed(self) -> int:
        """How often an adapter has fallen idle."""
        with self._lock:
            return self._freed

    def ended(self, entry: AdapterEntry) -> None:
        """A request that was in use has ended; after its adapter's last one the engine may evict the adapter."""
        with self._lock:
            self._unuse(entry)
            pages = self._held.pop(entry.lora_task_id, None)
            if pages is not None:
                self._held[entry.lora_task_id] = pages
            if entry.lora_task_id not in self._in_use:
                self._freed += 1
                self._wake_first()

    def _place(self, entry: AdapterEntry, freed: int, retry_at: float) -> Place:
        return Place(entry, threading.Condition(self._lock), time.monotonic(), freed, retry_at)

    def _wake_first(self) -> None:
        if self._line:
            self._line[0].turn.notify()

    def _may_have_room(self, place: Place) -> bool:
        return self._fits(place.entry) if self._cache_pages else self._freed > place.freed

    def _fits(self, entry: AdapterEntry) -> bool:
        """Whether it fits beside what is in use, as far as is known."""
        if self._cache_pages is None or entry.lora_task_id in self._in_use:
            return True
        return sum(self._in_use.values()) + _pages(entry) <= self._cache_pages

    def _use(self, entry: AdapterEntry) -> None:
        self._requests[entry.lora_task_id] += 1
        self._in_use[entry.lora_task_id] = _pages(entry)

    def _unuse(self, entry: AdapterEntry) -> None:
        self._requests[entry.lora_task_id] -= 1
        if not self._requests[entry.lora_task_id]:
            del self._requests[entry.lora_task_id], self._in_use[entry.lora_task_id]


def _pages(entry: AdapterEntry) -> int:
    return entry.pages or 1  # at least
