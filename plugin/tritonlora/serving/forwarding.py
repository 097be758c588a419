# SPDX-FileCopyrightText: the tritonlora authors
# SPDX-License-Identifier: Apache-2.0
"""When an adapter's weights travel along with a request, when a request waits, and what an engine error means.

Strategy. A request for an adapter normally carries its lora_task_id alone. The engine holds a bounded cache of
adapters and answers a miss before it has produced a token, so the same request can be sent again with the weights and
the client sees nothing of it. What the router believes about that cache (`residency.py`) is learnt from answers only:
an adapter counts as held once the engine has answered a request for it.

Rules. Nothing here knows Triton: requests and answers are opaque, sending is a function that is passed in. All the
answers of every request are taken, also those that nobody wants: Triton hangs on a BLS request that is abandoned. While
a request waits for room, or for another one that loads its adapter, its client may leave, and then it is not sent.
After the first answer of a stream nothing is ever sent again: that would repeat text.
"""

from __future__ import annotations

import contextlib
import enum
import re
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from itertools import chain
from typing import Generic, TypeVar

from .errors import AdapterUnavailable, ClientLeft
from .residency import Check, Place, Residency
from .routing import Route, check_id

Answer = TypeVar("Answer")


# What an engine error means


class Meaning(enum.Enum):
    """What an answer of the engine says about its LoRA cache."""

    ANSWER = enum.auto()
    MISS = enum.auto()  # the adapter is not cached: send its weights
    FULL = enum.auto()  # every cached adapter is in use: wait until one is not
    ERROR = enum.auto()  # anything else: the client's to see


# Substrings, because prefixes and suffixes differ between versions and backends. The first one that is found counts.
# Sources: TensorRT-LLM batch_manager/peftCacheManager.cpp, runtime/loraCache.cpp. The first three are trouble with
# the GPU, which ends all running requests; their errors may quote the other texts. The last text is upstream's when
# some adapters could be evicted, but not enough.
_MEANINGS = {
    "forwardAsync": Meaning.ERROR,
    "copyTask": Meaning.ERROR,
    "storing peft weights": Meaning.ERROR,
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
# Sources: Triton core src/model_repository_manager, python_backend src/python_be.cc.
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

# So often another request may have loaded the adapter, and the engine evicted it again, before this one loads it
# whatever the others do.
MISSES_TO_INSIST = 3


class Forwarder(Generic[Answer]):
    """Sends requests to the engine, one after the other, with an adapter's weights when the engine needs them."""

    def __init__(
        self,
        residency: Residency,
        error_of: Callable[[Answer], str | None],
        *,
        cache_full_timeout: float = 30.0,
        load_timeout: float = 60.0,
        retry_interval: float = 0.25,
        on_load: Callable[[Route, str, float], None] = lambda *_: None,
    ) -> None:
        """`error_of` gives the error text of an answer, or None. Times are in seconds.

        `retry_interval` is the longest wait between two tries while the engine's cache is full: other clients of the
        engine, of whom this router knows nothing, may free it.

        `on_load(route, reason, seconds)` is called for every adapter that the engine has taken: the reason is
        "first_use" or "evicted", the seconds are those from sending to the first answer.
        """
        self._on_load = on_load
        self._residency = residency
        self._error_of = error_of
        self._cache_full_timeout = cache_full_timeout
        self._load_timeout = load_timeout
        self._retry_interval = retry_interval

    def forward(
        self,
        route: Route | None,
        send: Callable[[bool], Iterable[Answer]],
        has_left: Callable[[], bool] = lambda: False,
    ) -> Iterator[Answer]:
        """The engine's answers to one request, as they come; to be taken to the end.

        `send(attach)` sends the request, with the adapter's weights if `attach`, and gives the answers. It is called
        again only when the engine refused for the state of its cache, before any answer has been passed on.
        Raises AdapterUnavailable when the cache stayed full, or the adapter could not be loaded, for too long, and
        ClientLeft when the client `has_left` while the request waited.
        """

        def check() -> None:
            if has_left():
                raise ClientLeft("the client has left")

        if route is None:
            yield from send(False)
            return
        try:
            with self._residency.place(route.entry.lora_task_id, self._retry_interval) as place:
                answers = self._accepted(route, send, place, check)
            yield from answers
        finally:
            self._residency.ended()

    def _accepted(
        self, route: Route, send: Callable[[bool], Iterable[Answer]], place: Place, check: Check
    ) -> Iterator[Answer]:
        """All the answers, once the first one says nothing against the state of the engine's cache."""
        task_id, pages = route.entry.lora_task_id, route.entry.pages or 1
        check_id(route, self._residency.may_give)
        deadline = time.monotonic() + self._cache_full_timeout
        belief = self._residency.belief(task_id)
        attach = not belief
        reason = ""
        misses = 0
        if self._residency.has_line_for(task_id):
            place.join()
        while True:
            try:
                place.wait(deadline, check)
            except TimeoutError:
                raise AdapterUnavailable(
                    f"LoRA adapter {route.lora_name!r} does not fit beside the adapters in use; "
                    f"tried for {self._cache_full_timeout:g} s"
                ) from None
            if attach and not reason:  # before this request itself claims it
                reason = "evicted" if self._residency.was_held(task_id) else "first_use"
            insists = misses > MISSES_TO_INSIST
            with self._claim(route, insists, check) if attach else contextlib.nullcontext(False) as loads:
                if attach:
                    belief = self._residency.belief(task_id)
                began = time.monotonic()
                answers = iter(send(loads))
                first = next(answers, None)
                if first is None:
                    return iter(())
                meaning = meaning_of(self._error_of(first))
                if loads and meaning is Meaning.ANSWER:
                    self._residency.accepted(task_id, pages)
                    self._on_load(route, reason, time.monotonic() - began)
            answers = chain((first,), answers)
            if meaning is Meaning.ANSWER:
                return answers if loads else self._noted_behind(answers, task_id, pages)
            if meaning is Meaning.FULL:
                place.join()
            elif meaning is Meaning.MISS and not loads:
                self._residency.missed(task_id, belief)
                misses += 1
                attach = True
            else:
                return answers
            deque(answers, maxlen=0)
            check()  # who has left is sent for no more

    def _noted_behind(self, answers: Iterator[Answer], task_id: int, pages: int) -> Iterator[Answer]:
        """`answers` of an engine that holds the adapter, as was believed: the first one need not wait for the note."""
        yield next(answers)
        self._residency.accepted(task_id, pages)
        yield from answers

    @contextlib.contextmanager
    def _claim(self, route: Route, insist: bool, check: Check) -> Iterator[bool]:
        """Whether this request is to load the adapter; it waits for another one that does."""
        with contextlib.ExitStack() as stack:
            claim = self._residency.claim(route.entry.lora_task_id, self._load_timeout, insist=insist, check=check)
            try:
                mine = stack.enter_context(claim)
            except TimeoutError:
                raise AdapterUnavailable(
                    f"LoRA adapter {route.lora_name!r} is still being loaded for another request; "
                    f"waited {self._load_timeout:g} s"
                ) from None
            yield mine
