# SPDX-FileCopyrightText: the tritonlora authors
# SPDX-License-Identifier: Apache-2.0
"""What the resolver, which sees no answers of the engine, may take for granted of the engine's cache.

Strategy. `residency.py` learns from answers; here there are none, so that only two things are certain. Where all the
adapters that the engine may have been given fit into its cache together, none is ever evicted, and those that it was
started with stay. And an adapter whose weights were sent a moment ago is there, if everything that was asked for lately
fits: whatever the engine evicts first, it does not evict that (TensorRT-LLM cpp/tensorrt_llm/runtime/loraCache.cpp).
Nothing is believed for long, since the engine may have refused the request that brought the weights.

To err on the side of sending costs a copy: the engine ignores weights that it has.
"""

from __future__ import annotations

import math
import os
from collections.abc import Collection
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path

from .adapter_table import AdapterTable
from .residency import start_ticks

# The engine takes in an adapter beside its other work. Who asks for it meanwhile brings it, too.
SETTLE_SECONDS = 0.5
NEVER = (math.inf, -math.inf)


@dataclass(slots=True)
class _Asked:
    """An adapter that was asked for lately."""

    at: float  # the last time
    certain_from: float = NEVER[0]  # its weights are there from then on,
    certain_until: float = NEVER[1]  # and are sent again from then on


class ResidencyEstimate:
    """Of one instance of the resolver. Times are of any one clock, in seconds."""

    def __init__(
        self,
        table: AdapterTable,
        warmed: Collection[int],
        retired: Collection[int],
        cache_pages: int,
        *,
        sees_all: bool = True,
        resend_seconds: float = 10,
        longest_request_seconds: float = 60,
    ) -> None:
        """`warmed` are the lora_task_ids that the engine was started with, `retired` those that were retired before;
        `cache_pages` is the size of its cache, 0 when it is not known. An instance that does not see all requests knows
        nothing of what was asked for lately.
        """
        self._warmed = frozenset(warmed)
        self._retired = frozenset(retired)  # which this engine has never had
        self._cache_pages = cache_pages
        self._room = cache_pages if sees_all else 0  # for what was asked for lately
        self._resend_seconds = resend_seconds
        self._lately = resend_seconds + longest_request_seconds  # what was asked for earlier is in use no more
        self._pages: dict[int, int] = {}  # of every adapter that the engine may have been given
        self._all_fit = False
        self._asked: dict[int, _Asked] = {}  # lately, the oldest first
        self._demand = 0  # their pages
        self.see(table)

    def see(self, table: AdapterTable) -> None:
        """These are the adapters now. What they have replaced stays in the cache until it is evicted."""
        # When the engine's model is loaded again, it is started with those that are warm now.
        self._warmed &= {entry.lora_task_id for entry in table.entries.values() if entry.warm}
        for entry in table.entries.values():
            if entry.lora_task_id not in self._asked:  # whose pages are counted
                self._pages[entry.lora_task_id] = entry.pages or self._cache_pages + 1
        unseen = {*table.retired_lora_task_ids} - self._retired - self._pages.keys()
        self._all_fit = not unseen and sum(self._pages.values()) <= self._cache_pages

    def must_send(self, task_id: int, now: float) -> bool:
        """Whether a request for this adapter, of a table that was seen, has to bring its weights."""
        if self._all_fit and task_id in self._warmed:
            return False
        self._forget(now)
        asked = self._asked.pop(task_id, None)
        if asked is None:
            asked = _Asked(now)
            self._demand += self._pages[task_id]
        self._asked[task_id] = asked
        asked.at = now
        if self._demand > self._room:
            asked.certain_from, asked.certain_until = NEVER
        return not asked.certain_from <= now < asked.certain_until

    def sent(self, task_id: int, now: float) -> None:
        """The weights went out with this request, of which `must_send` said so."""
        asked = self._asked[task_id]
        asked.certain_from = min(asked.certain_from, now + SETTLE_SECONDS)
        if now >= asked.certain_until:
            asked.certain_until = now + self._resend_seconds

    def _forget(self, now: float) -> None:
        """Those that were not asked for lately."""
        while self._asked:
            task_id, asked = next(iter(self._asked.items()))
            if now - asked.at < self._lately:
                return
            del self._asked[task_id]
            self._demand -= self._pages[task_id]


def warmed_at_start(table: AdapterTable, started_at: float) -> set[int]:
    """The lora_task_ids that an engine was started with at that time, in seconds of the epoch.

    An adapter that was added in the same second may have been too late.
    """
    return {
        entry.lora_task_id
        for entry in table.entries.values()
        if entry.warm and datetime.fromisoformat(entry.added_at).timestamp() + 1 <= started_at
    }


def started_at(pid: int) -> float:
    """When a process was started, in seconds of the epoch (btime of proc_stat(5))."""
    booted = next(line.split()[1] for line in Path("/proc/stat").read_text().splitlines() if line.startswith("btime "))
    return int(booted) + start_ticks(pid) / os.sysconf("SC_CLK_TCK")
