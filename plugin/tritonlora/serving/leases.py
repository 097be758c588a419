# SPDX-FileCopyrightText: the tritonlora authors
# SPDX-License-Identifier: Apache-2.0
"""The router's requests, from the resolver's side: which adapter each one uses, and until when.

A router forwards one request at a time, and the rows of a batch one after the other. It tells the resolver:

| message | meaning | response |
|---|---|---|
| enter | a client's request has come | once the engine has the adapter of its first row |
| row | the next row is to be forwarded; the one before has ended | once the engine has its adapter |
| lost | the engine lacked the row's adapter | once the engine has it again |
| leave | the client has left while its request waited | at once, and the message that waits gets CANCELLED |
| end | the request has ended, with this outcome | at once |

If a router's process ends, its request counts as one whose end is not told, like a request of an ensemble.

This module does not use Triton.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Protocol

from .dispatcher import Request
from .errors import AdapterUnavailable, ClientLeft, InvalidRequest
from .routing import Route
from .tickets import Ticket

MOST_MISSES = 3  # of one row; its request is refused at the next one
SWEEP_SECONDS = 1.0  # between two looks for processes that have ended

Key = tuple[str, int]  # the token of a router's `Holder`, and the number of one of its requests


class Sender(Protocol):
    """What `dispatcher.Dispatcher` does for requests."""

    def ask(self, ticket: Ticket, request: Request) -> None: ...
    def leave(self, ticket: Ticket) -> bool: ...
    def end(self, ticket: Ticket, *, had_it: bool) -> None: ...
    def lost(self, ticket: Ticket) -> None: ...
    def leave_behind(self, ticket: Ticket) -> None: ...


@dataclass(eq=False, slots=True)
class Lease:
    """One request of the router's."""

    routes: Sequence[Route]  # the adapters of its rows; empty for the base model
    new_ticket: Callable[[Route, int], Ticket]  # (adapter, misses) -> a ticket
    row: int = 0
    misses: int = 0  # of this row
    ticket: Ticket | None = None  # of this row, for as long as it waits for the adapter or uses it
    request: Request | None = None  # the message that waits
    lock: threading.Lock = field(default_factory=threading.Lock)

    def give_up(self) -> Ticket | None:
        """The ticket of the row, which only one caller gets."""
        with self.lock:
            ticket, self.ticket = self.ticket, None
            return ticket


class Leases:
    """The requests of all routers."""

    def __init__(self, sender: Sender, is_held: Callable[[str], bool]) -> None:
        """`is_held` tells whether the process of a token lives."""
        self._sender = sender
        self._is_held = is_held
        self._leases: dict[Key, Lease] = {}
        self._sweep_at = 0.0

    def enter(self, key: Key, lease: Lease, request: Request) -> None:
        """Begin a request. `request` is passed on once the engine has the adapter of the first row."""
        self._leases[key] = lease
        if lease.routes:
            self._take(lease, request)
        else:
            request.pass_on(with_weights=False)

    def row(self, key: Key, row: int, request: Request) -> None:
        """Go on with another row."""
        lease = self.find(key)
        self._end_row(lease, had_it=True)
        lease.row, lease.misses = row, 0
        self._take(lease, request)

    def lost(self, key: Key, request: Request) -> None:
        """Have the row's adapter loaded again. AdapterUnavailable after MOST_MISSES."""
        lease = self.find(key)
        if (ticket := lease.give_up()) is not None:
            self._sender.lost(ticket)
        lease.misses += 1
        if lease.misses > MOST_MISSES:
            raise AdapterUnavailable(f"the engine lost the adapter {lease.misses} times in a row; ask again")
        self._take(lease, request)

    def leave(self, key: Key) -> None:
        """Refuse the message that waits."""
        lease = self._leases.get(key)
        if lease is not None and lease.ticket is not None and self._sender.leave(lease.ticket):
            refuse(lease)

    def end(self, key: Key, *, had_it: bool, is_over: bool) -> Lease | None:
        """End a request. `is_over` is False if the engine may still work on it. None: there is no such request."""
        lease = self._leases.pop(key, None)
        if lease is not None and is_over:
            self._end_row(lease, had_it=had_it)
        elif lease is not None and (ticket := lease.give_up()) is not None:
            self._sender.leave_behind(ticket)
        return lease

    def find(self, key: Key) -> Lease:
        """The request with this key. InvalidRequest when there is none."""
        if key not in self._leases:
            raise InvalidRequest("the resolver does not know this request; ask again")
        return self._leases[key]

    def drop(self, key: Key) -> None:
        """Forget a request whose first message was refused."""
        self._leases.pop(key, None)

    def sweep(self) -> list[Lease]:
        """End the requests whose routers have ended, and return them. It looks every SWEEP_SECONDS."""
        now = time.monotonic()
        if now < self._sweep_at:
            return []
        self._sweep_at = now + SWEEP_SECONDS
        keys = [*self._leases]
        gone = {token for token in {token for token, _ in keys} if not self._is_held(token)}
        ended = []
        for key in keys:
            lease = self._leases.pop(key, None) if key[0] in gone else None
            if lease is None:
                continue
            ended.append(lease)
            if lease.ticket is not None and self._sender.leave(lease.ticket):
                refuse(lease)
            elif (ticket := lease.give_up()) is not None:
                self._sender.leave_behind(ticket)
        return ended

    def _take(self, lease: Lease, request: Request) -> None:
        lease.request = request
        lease.ticket = lease.new_ticket(lease.routes[lease.row], lease.misses)
        self._sender.ask(lease.ticket, request)

    def _end_row(self, lease: Lease, *, had_it: bool) -> None:
        if (ticket := lease.give_up()) is not None:
            self._sender.end(ticket, had_it=had_it)


def refuse(lease: Lease) -> None:
    """Refuse the message that waits, because its client or its router is gone."""
    if lease.request is not None:
        lease.request.fail(ClientLeft("the client has left"))
