# SPDX-FileCopyrightText: the tritonlora authors
# SPDX-License-Identifier: Apache-2.0
"""Decides what keeps pinned adapters in the engine, which knows no pins: it evicts the adapter used least recently.

| a pinned adapter | the resolver |
|---|---|
| may be evicted when the engine takes others | touches it first: a probe uses it, and then others are evicted first |
| may be gone | touches it, and the probe's response tells |
| is gone | loads it |

Requests go before pins. If requests under way may need all other pages, the head of the queue waits for one of them to
end. After PIN_SECONDS it waits no longer, and pinned adapters yield: for YIELD_SECONDS others may evict them.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping

from .engine_cache import EngineCache

PIN_SECONDS = 1.0  # that the queue waits, rather than evict a pinned adapter; and between two tries to bring one back
YIELD_SECONDS = 10.0  # after such a wait was in vain, pinned adapters may be evicted


class Pins:
    """The pinned adapters of one engine. Not thread-safe."""

    def __init__(self, cache: EngineCache) -> None:
        self._cache = cache
        self.pages: Mapping[int, int] = {}  # lora_task_id -> pages
        self._touched: int | None = None  # the one that a probe under way uses, so that it stays
        self._try_at: dict[int, float] = {}  # lora_task_id -> when the next try to bring it back may come
        self._bring_at = self._yield_until = -math.inf

    def keep(self, adapters: Mapping[int, int]) -> None:
        """Pin these adapters and no others: lora_task_id -> pages."""
        self.pages = adapters
        self._try_at.clear()

    # Decisions

    def has_capacity(self, adapters: Mapping[int, int], now: float) -> bool:
        """Whether the engine can certainly take these adapters now, and keeps all pinned ones unless they yield."""
        if self._are_yielding(now):
            return self._cache.has_capacity(adapters)
        return self._cache.has_capacity(adapters, self.pages) and self._endangered(adapters) is None

    def are_at_risk(self, adapters: Mapping[int, int], now: float) -> bool:
        """Whether pinned adapters do not yield, and the engine may evict one of them when it takes these."""
        return not self._are_yielding(now) and not self.has_capacity(adapters, now)

    def to_touch(self, adapters: Mapping[int, int]) -> int | None:
        """The pinned adapter to touch before the engine takes these. None: no touch is needed, or none would do."""
        return self._endangered(adapters) if self._cache.has_capacity(adapters, self.pages) else None

    def to_touch_early(self) -> int | None:
        """The pinned adapter that half of the pages for others would endanger. A touch now saves later requests one."""
        pages = self._cache.spare_pages(self.pages) // 2
        return self._cache.endangered(pages, self._idle()) if pages > 0 else None

    def to_bring(self, now: float, *, is_queue_empty: bool) -> tuple[int, bool] | None:
        """The adapter to load (True) or to touch (False), by which a pinned one comes back. None: there is none.

        While requests wait, there is one in PIN_SECONDS.
        """
        if not is_queue_empty and now < self._bring_at:
            return None
        for pin, pages in self.pages.items():
            is_there = self._cache.are_believed([pin]) or self._cache.is_in_use(pin)
            if is_there or now < self._try_at.get(pin, -math.inf):
                continue
            if self._cache.may_have(pin):
                self._bring_at = self._try_at[pin] = now + PIN_SECONDS
                return pin, False
            if self._cache.has_capacity({pin: pages}, self.pages):
                self._bring_at = now + PIN_SECONDS
                other = self._endangered({pin: pages})
                return (pin, True) if other is None else (other, False)
        return None

    # Events

    def touch(self, pin: int) -> None:
        """Note that a probe is about to use a pinned adapter. Call `probed` when the probe has ended."""
        if not self._cache.are_believed([pin]):
            self._cache.lose(pin)  # so that a miss is not unexpected
        self._touched = pin

    def probed(self) -> None:
        """Note that the probe under way has ended."""
        self._touched = None

    def put_off(self, task_id: int, until: float) -> None:
        """Note that an adapter could not be loaded. If it is pinned, the next try comes no earlier than at `until`."""
        self._try_at[task_id] = until

    def yield_from(self, now: float) -> None:
        """Let others evict pinned adapters for YIELD_SECONDS."""
        self._yield_until = now + YIELD_SECONDS

    # Parts

    def _are_yielding(self, now: float) -> bool:
        """Whether the engine need keep no pinned adapter now."""
        return not self.pages or now < self._yield_until

    def _endangered(self, adapters: Mapping[int, int]) -> int | None:
        """The pinned adapter that the engine may evict first when it takes these adapters. None: it keeps all."""
        return self._cache.endangered(self._cache.new_pages(adapters), self._idle(adapters))

    def _idle(self, without: Collection[int] = ()) -> list[int]:
        """The pinned adapters that no request uses, except for a probe that may not have reached the engine."""
        return [
            pin for pin in self.pages if pin not in without and (pin == self._touched or not self._cache.is_in_use(pin))
        ]
