# SPDX-FileCopyrightText: the tritonlora authors
# SPDX-License-Identifier: Apache-2.0
"""Clients in closed loops, for the parts of the route benchmark in which requests do not begin together.

A client sends a request, reads the response to its end, checks which adapter it is from, waits a moment, and sends the
next request. All clients run in one process of their own and use HTTP. The synthetic engine repeats
"[lora_task_id]prompt", so each response names its adapter.
"""

from __future__ import annotations

import heapq
import itertools
import json
import select
import time
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from random import Random
from typing import Any

from tritonlora.bench.load import ANSWER, END, PROMPT, TIMEOUT_SECONDS, Stream, in_process, main, request_bytes
from tritonlora.errors import ServerError

MIXES = ("uniform", "cyclic", "zipf", "sticky")
ERRORS_KEPT = 20


@dataclass(frozen=True, slots=True)
class Clients:
    """The clients: how many they are, and what they send."""

    model: str
    adapters: Mapping[str, int]  # lora_name -> lora_task_id
    streams: int
    tokens: int  # of a response on average; a response has between half and one and a half times as many
    mix: str = "uniform"  # one of MIXES
    allowed: int = 0  # max_tokens of a request; 0: the number of tokens that the response has
    think: float = 0.002  # seconds between two requests of a client, on average
    seconds: float = 10.0
    discarded: float = 2.0  # the first seconds, in which nothing counts
    by_name: bool = True  # requests have a lora_name; False: a lora_task_id
    is_text: bool = False  # the model takes text; False: tokens


@dataclass(frozen=True, slots=True)
class Outcome:
    """The results of all clients, without the discarded seconds. Times are in seconds."""

    first: list[float] = field(default_factory=list)  # the time to the first token of each response
    tokens: int = 0
    requests: int = 0  # requests with a whole response
    seconds: float = 0.0
    wrong: int = 0  # responses of another adapter
    errors: list[str] = field(default_factory=list)  # the first ERRORS_KEPT errors, those of discarded seconds too
    failed: int = 0  # the number of errors

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
        self.answer = b""

    def send(self, url: str, clients: Clients, name: str, tokens: int) -> None:
        self.answer = f"[{clients.adapters[name]}]{PROMPT}".encode()
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
        return not piece or self.received.endswith(END)


def _body(clients: Clients, name: str, tokens: int) -> dict[str, object]:
    adapter: dict[str, object] = {"lora_name": name} if clients.by_name else {"lora_task_id": clients.adapters[name]}
    if clients.is_text:
        return {"text_input": PROMPT, "max_tokens": tokens, "stream": True, **adapter}
    prompt, ends = [*PROMPT.encode()], {}
    if clients.allowed:  # let the end id come after `tokens` tokens
        prompt = [*PROMPT.encode(), *b"." * max(0, tokens - len(PROMPT) - len(str(clients.adapters[name])) - 3), 10]
        ends = {"end_id": 10}
    length = clients.allowed or tokens
    sizes = {"input_lengths": len(prompt), "request_output_len": length}
    return {"input_ids": prompt, **sizes, "streaming": True, **ends, **adapter}


def _events(received: bytes) -> tuple[bytes, int, str]:
    """(bytes of the response, number of its events, its error or "")."""
    answer, count = b"", 0
    _, _, body = received.partition(b"\r\n\r\n")
    for line in body.split(b"\n"):
        if line.startswith(ANSWER):
            event = json.loads(line[len(ANSWER) :])
            if "error" in event:
                return answer, count, str(event["error"])
            found = event.get("text_output", event.get("output_ids"))
            answer += found.encode() if isinstance(found, str) else bytes([found] if isinstance(found, int) else found)
            count += 1
    if not received.startswith(b"HTTP/1.1 200"):
        return answer, count, received[-500:].decode(errors="replace")
    return answer, count, ""


def _choose(clients: Clients, chance: Random, client: int, turn: int) -> str:
    names = [*clients.adapters]
    if clients.mix in ("cyclic", "sticky"):
        return names[(turn if clients.mix == "cyclic" else client) % len(names)]
    weights = [1 / rank for rank in range(1, len(names) + 1)] if clients.mix == "zipf" else None
    return chance.choices(names, weights)[0]


def _run(url: str, clients: Clients) -> Outcome:
    host, port = url.rsplit(":", 1)
    chance = Random(1)  # noqa: S311
    poll, turns = select.epoll(), itertools.count()
    open_clients = {(one := _Client(host, int(port), number)).socket.fileno(): one for number in range(clients.streams)}
    start = time.perf_counter()
    stop, counted = start + clients.seconds, start + clients.discarded
    waiting = [(start + chance.random() * 0.5, number) for number in open_clients]
    heapq.heapify(waiting)
    outcome, tokens, requests, wrong, failed, active = Outcome(), 0, 0, 0, 0, 0
    for number in open_clients:
        poll.register(number, select.EPOLLIN)
    while (now := time.perf_counter()) < stop or active:
        while waiting and waiting[0][0] <= now < stop:
            client = open_clients[heapq.heappop(waiting)[1]]
            length = chance.randint(max(1, clients.tokens // 2), clients.tokens * 3 // 2)
            client.send(url, clients, _choose(clients, chance, client.number, next(turns)), length)
            active += 1
        next_start = min(waiting[0][0], stop) if waiting else stop
        ready = poll.poll(max(0.0, next_start - now) if now < stop else TIMEOUT_SECONDS)
        if not ready and now >= stop:
            raise ServerError(f"no answer for {TIMEOUT_SECONDS:.0f} s")
        for number, _ in ready:
            client = open_clients[number]
            if not client.is_done():
                continue
            active -= 1
            now = time.perf_counter()
            heapq.heappush(waiting, (now + clients.think * chance.expovariate(1), number))
            answer, count, error = _events(bytes(client.received))
            if error:
                failed += 1
                outcome.errors.extend([error] if len(outcome.errors) < ERRORS_KEPT else [])
            wrong += not error and answer[: len(client.answer)] != client.answer[: len(answer)]
            if not error and counted <= now <= stop:
                outcome.first.append(client.first or 0.0)
                requests += 1
                tokens += count
    return Outcome(outcome.first, tokens, requests, stop - counted, wrong, outcome.errors, failed)


def _do(job: dict[str, Any]) -> dict[str, Any]:
    return asdict(_run(job["url"], Clients(**job["clients"])))


if __name__ == "__main__":
    raise SystemExit(main(_do))
