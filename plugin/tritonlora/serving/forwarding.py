# SPDX-FileCopyrightText: the tritonlora authors
# SPDX-License-Identifier: Apache-2.0
"""Decides when a request carries an adapter's weights, when a request waits, and what follows from an engine's error.

Strategy. A request for an adapter normally carries its lora_task_id alone. The engine holds a bounded cache of
adapters and answers a miss before it has produced a token, so the same request can be sent again with the weights and
the client sees nothing of it. The router learns only from the engine's responses what that cache holds
(`residency.py`): an adapter counts as held once the engine has responded to a request for it.

Rules. This module does not use Triton: requests and responses are opaque, and a function that is passed in sends them.
All responses to every request are read, even after an error: Triton hangs on a BLS request that is abandoned. A request
whose client leaves while it waits is not sent. After the first response of a stream nothing is sent again, since that
would repeat text.
"""

from __future__ import annotations

import contextlib
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from itertools import chain
from typing import Generic, TypeVar

from .engine_errors import Meaning, meaning_of
from .errors import AdapterUnavailable, ClientLeft
from .residency import Check, Place, Residency
from .routing import Route, check_id

Answer = TypeVar("Answer")


# When weights travel along

# After so many misses in a row a request sends the weights itself, even if another request has just loaded the adapter.
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
