# SPDX-FileCopyrightText: the tritonlora authors
# SPDX-License-Identifier: Apache-2.0
"""When an adapter's weights travel along with a request, when a request waits, and what an engine error means.

Strategy. A request for an adapter normally carries its lora_task_id alone. The engine holds a bounded cache of
adapters and answers a miss before it has produced a token, so the same request can be sent again with the weights and
the client sees nothing of it. What the router believes about that cache (`residency.py`) is learnt from answers only:
an adapter counts as held once the engine has answered a request for it.

Rules. Nothing here knows Triton: requests and answers are opaque, sending is a function that is passed in.
After the first answer of a stream nothing is ever sent again: that would repeat text.

This file runs inside a plain Triton container: standard library only.
"""

from __future__ import annotations

import contextlib
import enum
import re
import time
from collections.abc import Callable, Iterable, Iterator
from itertools import chain
from typing import Generic, TypeVar

from tritonlora.adapters import AdapterEntry
from tritonlora.errors import AdapterUnavailable
from tritonlora.residency import Loads, Place
from tritonlora.routing import Route

Answer = TypeVar("Answer")

# Of a request that waits: how often it looks whether its client is still there.
CANCELLATION_CHECK_SECONDS = 0.25
# The engine lets go of an adapter a moment after the last answer that it sent with it.
FIRST_PAUSE_SECONDS = 0.005


# What an engine error means


class Meaning(enum.Enum):
    """What an answer of the engine says about its LoRA cache."""

    ANSWER = enum.auto()
    MISS = enum.auto()  # the adapter is not cached: send its weights
    FULL = enum.auto()  # every cached adapter is in use: wait until one is not
    ERROR = enum.auto()  # anything else: the client's to see


# Substrings, because prefixes and suffixes differ between versions and backends.
# Sources: TensorRT-LLM batch_manager/peftCacheManager.cpp, runtime/loraCache.cpp. The last one is what is left of
# "cache full" when some adapters could be evicted, but not enough.
_MEANINGS = {
    "not found in cache. Please send LoRA weights with request": Meaning.MISS,
    "There are no done tasks to evict": Meaning.FULL,
    "pageIds.has_value()": Meaning.FULL,
}


def meaning_of(error: str | None) -> Meaning:
    """What an answer with this error text (None: no error) means."""
    if error is None:
        return Meaning.ANSWER
    return next((meaning for text, meaning in _MEANINGS.items() if text in error), Meaning.ERROR)


# What Triton says of a model that it cannot ask now; the code of these is INTERNAL.
# Sources: core src/model_repository_manager, python_backend src/python_be.cc.
_NOT_NOW = (
    "is not ready",
    "is not found",
    "has no available versions",
    "is not healthy",
    "is unhealthy",
    "shutting down",
)


def is_unavailable(error: str) -> bool:
    """Whether the engine's model is not there now, but may be again."""
    return any(text in error for text in _NOT_NOW)


_BACKTRACE = re.compile(r"\s*\n\s*\d+\s+0x[0-9a-f]+.*", re.DOTALL)
_SOURCE_LOCATION = re.compile(r"\s*\((?:/[^\s():]+)+:\d+\)")
_PATH = re.compile(r"(?<![\w:/])(?:/[\w.+@-]+){2,}")


def public(message: str) -> str:
    """An engine's error text without what is the server's own business: backtraces and paths."""
    for pattern, replacement in ((_BACKTRACE, ""), (_SOURCE_LOCATION, ""), (_PATH, "<path>")):
        message = pattern.sub(replacement, message)
    return message


# When weights travel along


class ClientLeft(Exception):
    """Nobody waits for this request any more."""


class Forwarder(Generic[Answer]):
    """Sends requests to the engine, with an adapter's weights when the engine needs them. Thread-safe."""

    def __init__(
        self,
        error_of: Callable[[Answer], str | None],
        *,
        warmed: Iterable[AdapterEntry] = (),
        cache_pages: int | None = None,
        cache_full_timeout: float = 30.0,
        load_timeout: float = 60.0,
        retry_interval: float = 0.25,
        on_load: Callable[[Route, str, float], None] = lambda *_: None,
    ) -> None:
        """`error_of` gives the error text of an answer, or None; `warmed` are the adapters that the engine was started
        with, in that order; `cache_pages` is the size of the engine's LoRA cache, None when it is not known. Times are
        in seconds.

        `retry_interval` is the longest wait between two tries while the engine's cache is full: other clients of the
        engine, of whom this router knows nothing, may free it.

        `on_load(route, reason, seconds)` is called for every adapter that the engine has taken: the reason is
        "first_use" or "evicted", the seconds are those from sending to the first answer.
        """
        self._error_of = error_of
        self._cache_full_timeout = cache_full_timeout
        self._load_timeout = load_timeout
        self._retry_interval = retry_interval
        self._on_load = on_load
        self._loads = Loads(warmed, cache_pages, retry_interval)

    def forward(
        self,
        route: Route | None,
        send: Callable[[bool], Iterable[Answer]],
        is_cancelled: Callable[[], bool] = lambda: False,
    ) -> Iterator[Answer]:
        """The engine's answers to one request, as they come; none when the client leaves before the first one.

        `send(attach)` sends the request, with the adapter's weights if `attach`, and gives the answers. It is called
        again only when the engine refused for the state of its cache, before any answer has been passed on.
        Raises AdapterUnavailable when the cache stayed full, or the adapter could not be loaded, for too long.
        """
        if route is None:
            yield from send(False)
            return
        with contextlib.suppress(ClientLeft):
            yield from self._adapter_answers(route, send, is_cancelled)

    def waiting(self) -> list[int]:
        """Task ids of the requests that wait for room in the engine's cache, the first in line first."""
        return self._loads.waiting()

    def _adapter_answers(
        self, route: Route, send: Callable[[bool], Iterable[Answer]], is_cancelled: Callable[[], bool]
    ) -> Iterator[Answer]:
        misses = 0
        attach = not self._loads.holds(route.entry)
        while True:
            loads = attach and self._claim(route, is_cancelled, insist=misses > 1)
            try:
                meaning, answers = self._first_answer(route, send, loads, is_cancelled)
            finally:
                if loads:
                    self._loads.release_claim(route.entry)
            if meaning is Meaning.MISS and not loads:
                self._loads.missed(route.entry)
                misses += 1
                attach = True
                continue
            try:
                yield from answers
            finally:
                self._loads.ended(route.entry)
            return

    def _claim(self, route: Route, is_cancelled: Callable[[], bool], *, insist: bool) -> bool:
        """True: this request loads the adapter, and no other does. False: another one just has."""
        deadline = time.monotonic() + self._load_timeout
        while (mine := self._loads.claim(route.entry, _slice_of(deadline), insist=insist)) is None:
            if time.monotonic() >= deadline:
                raise AdapterUnavailable(
                    f"LoRA adapter {route.lora_name!r} is still being loaded for another request; "
                    f"waited {self._load_timeout:g} s"
                )
            if is_cancelled():
                raise ClientLeft
        return mine

    def _first_answer(
        self, route: Route, send: Callable[[bool], Iterable[Answer]], loads: bool, is_cancelled: Callable[[], bool]
    ) -> tuple[Meaning, Iterator[Answer]]:
        """What the first answer means, and all the answers. The request is in use then, until it is ended."""
        deadline = time.monotonic() + self._cache_full_timeout
        pause = min(FIRST_PAUSE_SECONDS, self._retry_interval)
        place = self._loads.begin(route.entry)
        while True:
            if place:
                self._wait_in_line(route, place, deadline, is_cancelled)
            began = time.monotonic()
            freed = self._loads.freed()
            try:
                answers = iter(send(loads))
                first = next(answers, None)
            except BaseException:
                self._loads.ended(route.entry)
                raise
            if first is None:
                return Meaning.ERROR, iter(())
            meaning = meaning_of(self._error_of(first))
            if meaning is Meaning.ANSWER:
                reason = self._loads.answered(route.entry)
                if loads:
                    self._on_load(route, reason, time.monotonic() - began)
            if meaning is not Meaning.FULL:
                return meaning, chain((first,), answers)
            place = self._loads.refused(route.entry, freed, pause)
            pause = min(2 * pause, self._retry_interval)

    def _wait_in_line(self, route: Route, place: Place, deadline: float, is_cancelled: Callable[[], bool]) -> None:
        """Return when this request is the next to be tried; it counts as in use from then on."""
        try:
            while True:
                if is_cancelled():
                    raise ClientLeft
                if self._loads.wait_for_turn(place, _slice_of(deadline)):
                    return
                if time.monotonic() >= deadline:
                    raise AdapterUnavailable(
                        f"LoRA adapter {route.lora_name!r} does not fit beside the adapters in use; "
                        f"tried for {self._cache_full_timeout:g} s"
                    )
        finally:
            self._loads.leave(place)


def _slice_of(deadline: float) -> float:
    return max(0.0, min(CANCELLATION_CHECK_SECONDS, deadline - time.monotonic()))
