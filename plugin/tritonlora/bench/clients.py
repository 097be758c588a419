# SPDX-FileCopyrightText: the tritonlora authors
# SPDX-License-Identifier: Apache-2.0
"""Clients in closed loops, for the parts of the route benchmark in which requests do not begin together.

A client sends a request, reads the response to its end, waits a moment, and sends the next request. Every response is
checked, byte for byte. All clients run in one process of their own and use HTTP. The synthetic engine repeats
"[lora_task_id]prompt", so each response names its adapter.
"""

from __future__ import annotations

import heapq
import json
import math
import select
import time
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from random import Random
from typing import Any

from tritonlora.bench.load import (
    ANSWER,
    PROMPT,
    STREAMING,
    TIMEOUT_SECONDS,
    Stream,
    body,
    in_process,
    is_whole,
    main,
    request_bytes,
)
from tritonlora.errors import ServerError

MIXES = ("uniform", "cyclic", "zipf", "sticky")  # sticky: each client has an adapter of its own
ERRORS_KEPT = 20


@dataclass(frozen=True, slots=True)
class Clients:
    """The clients: how many they are, and what they send."""

    model: str
    adapters: Mapping[str, int]  # lora_name -> lora_task_id
    streams: int
    tokens: (
        int  # of a response on average: between half and one and a half times as many, and enough to tell its adapter
    )
    mix: str = "uniform"  # one of MIXES
    allowed: int = 0  # max_tokens of a request; 0: the number of tokens that the response has
    think: float = 0.002  # seconds between two requests of a client, on average
    requests: int = 0  # of all clients; 0: as many as they send in `seconds`
    seconds: float = 10.0
    discarded: float = 2.0  # the first seconds, in which nothing counts
    by_name: bool = True  # requests have a lora_name; False: a lora_task_id
    is_text: bool = False  # the model takes text; False: tokens


@dataclass(slots=True)
class Outcome:
    """The results of all clients, without the discarded seconds. Times are in seconds."""

    first: list[float] = field(default_factory=list)  # the time to the first token of each response
    tokens: int = 0
    requests: int = 0  # requests with a whole response
    seconds: float = 0.0
    wrong: int = 0  # responses of another adapter
    failed: int = 0  # errors, those of discarded seconds too
    errors: list[str] = field(default_factory=list)  # the first ERRORS_KEPT errors and wrong responses

    @property
    def rate(self) -> float:
        """Requests per second."""
        return self.requests / self.seconds

    @property
    def faults(self) -> int:
        """The number of errors and of wrong responses."""
        return self.failed + self.wrong


def ask(url: str, clients: Clients) -> Outcome:
    """Run the clients against the server at `url` (HOST:PORT). Raises ServerError if their process fails."""
    return Outcome(**in_process("tritonlora.bench.clients", {"url": url, "clients": asdict(clients)}))


# The clients themselves


class _Client(Stream):
    def __init__(self, host: str, port: int, number: int) -> None:
        super().__init__(host, port)
        self.number = number
        self.first: float | None = None
        self.began = 0.0
        self.name = ""
        self.expected = b""

    def send(self, url: str, clients: Clients, name: str, tokens: int) -> None:
        self.name, self.expected = name, _expected(clients, name, tokens)
        self.received.clear()
        self.first = None
        request = request_bytes(url, clients.model, _body(clients, name, tokens))
        self.began = time.perf_counter()
        self.socket.sendall(request)

    def is_done(self) -> bool:
        """Read the bytes that have arrived. Returns whether the response is complete."""
        piece = self.socket.recv(1 << 16)
        if self.first is None and (ANSWER in piece or not piece):
            self.first = time.perf_counter() - self.began
        self.received += piece
        return not piece or is_whole(self.received)


def _tag(clients: Clients, name: str) -> str:
    return f"[{clients.adapters[name]}]"


def _ending_prompt(clients: Clients, name: str, tokens: int) -> str:
    """A prompt with which the end id, a line feed, is the last of `tokens` tokens. The response does not show it."""
    return PROMPT + "." * (tokens - len(_tag(clients, name) + PROMPT) - 1) + "\n"


def _body(clients: Clients, name: str, tokens: int) -> dict[str, object]:
    adapter: dict[str, object] = {"lora_name": name} if clients.by_name else {"lora_task_id": clients.adapters[name]}
    if clients.is_text:
        return {"text_input": PROMPT, "max_tokens": tokens, "stream": True, **adapter}
    if clients.allowed:
        prompt = _ending_prompt(clients, name, tokens)
        return {**body(clients.allowed, prompt), "end_id": ord("\n"), **adapter}
    return {**body(tokens), **adapter}


def _expected(clients: Clients, name: str, tokens: int) -> bytes:
    """The whole response."""
    if clients.allowed:
        return (_tag(clients, name) + _ending_prompt(clients, name, tokens)[:-1]).encode()[: clients.allowed]
    unit = (_tag(clients, name) + PROMPT).encode()
    return (unit * (tokens // len(unit) + 1))[:tokens]


def _events(received: bytes) -> tuple[bytes, int, str]:
    """(bytes of the response, number of its events, its error or "")."""
    answer, count = b"", 0
    _, _, content = received.partition(b"\r\n\r\n")
    for line in content.split(b"\n"):
        if line.startswith(ANSWER):
            event = json.loads(line[len(ANSWER) :])
            if "error" in event:
                return answer, count, str(event["error"])
            found = event.get("text_output", event.get("output_ids"))
            answer += found.encode() if isinstance(found, str) else bytes([found] if isinstance(found, int) else found)
            count += 1
    if not is_whole(received):
        return answer, count, "the server closed the connection"
    return answer, count, "" if received.startswith(STREAMING) else received[-500:].decode(errors="replace")


def _choose(clients: Clients, chance: Random, client: int, turn: int) -> str:
    names = [*clients.adapters]
    if clients.mix in ("cyclic", "sticky"):
        return names[(turn if clients.mix == "cyclic" else client) % len(names)]
    weights = [1 / rank for rank in range(1, len(names) + 1)] if clients.mix == "zipf" else None
    return chance.choices(names, weights)[0]


def _length(clients: Clients, chance: Random, name: str) -> int:
    """A number of tokens for a response. A token of the synthetic engine is a byte."""
    length = chance.randint(max(1, clients.tokens // 2), clients.tokens * 3 // 2)
    return max(len(_tag(clients, name)), min(length, clients.allowed or length))


def _run(url: str, clients: Clients) -> Outcome:
    host, port = url.rsplit(":", 1)
    chance = Random(1)  # noqa: S311
    poll, outcome, sent, active = select.epoll(), Outcome(), 0, 0
    open_clients = {(one := _Client(host, int(port), number)).socket.fileno(): one for number in range(clients.streams)}
    start = time.perf_counter()
    counted = start + clients.discarded
    stop, most = (math.inf, clients.requests) if clients.requests else (start + clients.seconds, math.inf)
    waiting = [(start + chance.random() * 0.5, number) for number in open_clients]
    heapq.heapify(waiting)
    for number in open_clients:
        poll.register(number, select.EPOLLIN)
    while ((now := time.perf_counter()) < stop and sent < most) or active:
        while waiting and waiting[0][0] <= now < stop and sent < most:
            client = open_clients[heapq.heappop(waiting)[1]]
            name = _choose(clients, chance, client.number, sent)
            client.send(url, clients, name, _length(clients, chance, name))
            sent, active = sent + 1, active + 1
        next_start = min(waiting[0][0] if waiting else stop, stop) if now < stop and sent < most else math.inf
        patience = min(max(0.0, next_start - now), TIMEOUT_SECONDS)
        ready = poll.poll(patience)
        if not ready and patience == TIMEOUT_SECONDS:
            raise ServerError(f"no answer for {TIMEOUT_SECONDS:.0f} s")
        for number, _ in ready:
            client = open_clients[number]
            if client.is_done():
                active -= 1
                ended = time.perf_counter()
                heapq.heappush(waiting, (ended + clients.think * chance.expovariate(1), number))
                _note(outcome, client, is_counted=counted <= ended <= stop)
    outcome.seconds = min(now, stop) - counted
    return outcome


def _note(outcome: Outcome, client: _Client, *, is_counted: bool) -> None:
    """Add a client's response to the outcome."""
    answer, count, error = _events(bytes(client.received))
    if error:
        outcome.failed += 1
        problem = error
    elif answer != client.expected:
        outcome.wrong += 1
        problem = f"{client.name}: the response is {answer!r}, expected {client.expected!r}"
    else:
        problem = ""
    if problem and len(outcome.errors) < ERRORS_KEPT:
        outcome.errors.append(problem)
    if not problem and is_counted:
        outcome.first.append(client.first or 0.0)
        outcome.requests += 1
        outcome.tokens += count


def _do(job: dict[str, Any]) -> dict[str, Any]:
    return asdict(_run(job["url"], Clients(**job["clients"])))


if __name__ == "__main__":
    raise SystemExit(main(_do))
