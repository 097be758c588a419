# SPDX-FileCopyrightText: the tritonlora authors
# SPDX-License-Identifier: Apache-2.0
"""The clients of the mix benchmark, in one process of their own.

Each client asks in one way: over HTTP, gRPC or the OpenAI API. It sends a request, reads the stream to its end or
leaves in the middle, waits a moment, and sends the next one. Each request becomes a record, which `mix` judges later.
The synthetic engine repeats "[lora_task_id]prompt", so each response tells its adapter.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import re
import time
from collections.abc import AsyncIterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from random import Random
from typing import Any, NamedTuple

import numpy as np

from tritonlora.bench.load import ANSWER, END, PROMPT, TIMEOUT_SECONDS, body, in_process, main, request_bytes
from tritonlora.openai.triton_client import (
    ServerGone,
    ServerRefused,
    ServerSilent,
    TritonClient,
    infer_request,
    int32s,
    outputs_of,
)

_TAG = re.compile(r"\[(\d+)\]")
_BYTES_AT_A_TIME = 1 << 16
LEAST_TOKENS = 8  # of a response, which has to tell its adapter
LEFT, GARBLED = "left", "garbled"


@dataclass(frozen=True, slots=True)
class Mix:
    """The clients: how many they are, where they ask, and for what."""

    http: str  # HOST:PORT
    grpc: str
    door: str | None  # of the OpenAI API
    model: str  # for HTTP and gRPC: a model that takes tokens
    names: Sequence[str]  # asked for by Zipf's law, the first one most often
    moving: Sequence[str]  # the names that are changed meanwhile
    clients: int
    seconds: float
    tokens: int  # of a response on average; a response has between a quarter and seven quarters as many
    think: float  # seconds between two requests of a client, on average
    leavers: float  # the share of requests whose client leaves in the middle of the response
    moving_share: float = 0.1  # of the requests


class Record(NamedTuple):
    """What became of one request. Times are time.monotonic(), which all processes of a machine share."""

    way: str  # http, grpc or openai
    name: str
    began: float
    first: float | None  # when the first token came
    ended: float
    task_id: int | None  # that the response has; None for an error, and for a client that left before it could tell
    failure: str | None  # the error's text, LEFT or GARBLED


def ask(mix: Mix) -> list[Record]:
    """Run the clients. Raises ServerError if their process fails."""
    return [Record(*one) for one in in_process("tritonlora.bench.mix_clients", asdict(mix))]


# The clients themselves


class _Failed(Exception):
    """The server responded with an error."""


async def _over_http(url: str, request: bytes) -> AsyncIterator[dict[str, Any]]:
    """The JSON objects of a stream of server-sent events. Closing the iterator closes the connection."""
    host, port = url.rsplit(":", 1)
    reader, writer = await asyncio.open_connection(host, int(port))
    try:
        writer.write(request)
        head = (await reader.readuntil(b"\r\n\r\n")).lower()
        length = re.search(rb"\r\ncontent-length: (\d+)", head)
        if length or not head.startswith(b"http/1.1 200"):
            body = await reader.readexactly(int(length[1])) if length else await reader.readuntil(END)
            raise _Failed(body.decode(errors="replace"))
        received, taken = b"", 0
        while not received.endswith(END):
            piece = await reader.read(_BYTES_AT_A_TIME)
            if not piece:
                raise _Failed("the connection was closed in the middle of a response")
            received += piece
            whole = received.rfind(b"\n") + 1
            for line in received[taken:whole].splitlines():
                if line.startswith(ANSWER) and not line.endswith(b"[DONE]"):
                    yield json.loads(line[len(ANSWER) :])
            taken = whole
    finally:
        writer.transport.abort()


async def _http(mix: Mix, name: str, tokens: int) -> AsyncIterator[bytes]:
    request = request_bytes(mix.http, mix.model, {**body(tokens), "lora_name": name})
    async for event in _over_http(mix.http, request):
        if "error" in event:
            raise _Failed(str(event["error"]))
        found = event["output_ids"]
        yield bytes([found] if isinstance(found, int) else found)


async def _openai(mix: Mix, name: str, tokens: int) -> AsyncIterator[bytes]:
    assert mix.door is not None  # noqa: S101  `_ways` sees to it
    asked = {"model": name, "prompt": PROMPT, "max_tokens": tokens, "stream": True}
    async for event in _over_http(mix.door, request_bytes(mix.door, name, asked, "/v1/completions")):
        if "error" in event:
            raise _Failed(json.dumps(event["error"]))
        yield "".join(choice["text"] for choice in event["choices"]).encode()


async def _grpc(triton: TritonClient, mix: Mix, name: str, tokens: int) -> AsyncIterator[bytes]:
    arrays = {key: np.array([value if isinstance(value, list) else [value]]) for key, value in body(tokens).items()}
    arrays = {key: array.astype(np.bool_ if key == "streaming" else np.int32) for key, array in arrays.items()}
    request = infer_request(mix.model, "", {**arrays, "lora_name": np.array([[name.encode()]], np.object_)}, [])
    async with contextlib.aclosing(triton.stream(request, TIMEOUT_SECONDS)) as responses:
        async for response in responses:
            outputs = outputs_of(response)
            if "output_ids" in outputs:
                yield bytes(int32s(outputs["output_ids"]))


async def _record(way: str, name: str, pieces: AsyncIterator[bytes], tokens: int, leaves_after: int | None) -> Record:
    """Read a response, up to `leaves_after` tokens if the client leaves."""
    began = time.monotonic()
    first, answer, failure = None, b"", None

    async def read() -> None:
        nonlocal first, answer
        async with contextlib.aclosing(pieces) as stream:  # type: ignore[type-var]
            async for piece in stream:
                first = first or time.monotonic()
                answer += piece
                if leaves_after is not None and len(answer) >= leaves_after:
                    return

    try:
        await asyncio.wait_for(read(), TIMEOUT_SECONDS)
    except (_Failed, ServerRefused, ServerGone, ServerSilent, OSError, EOFError, asyncio.TimeoutError) as error:
        failure = f"{type(error).__name__}: {error}" if not isinstance(error, _Failed | ServerRefused) else str(error)
    else:
        is_whole = leaves_after is None
        failure = None if is_whole else LEFT
        task_id = task_id_of(answer, tokens if is_whole else None)
        if task_id is not None or not is_whole:
            return Record(way, name, began, first, time.monotonic(), task_id, failure)
        failure = f"{GARBLED}: {answer!r:.200}"
    return Record(way, name, began, first, time.monotonic(), None, failure)


def task_id_of(answer: bytes, tokens: int | None) -> int | None:
    """The lora_task_id that an answer of the synthetic engine tells; None if it is not such an answer.

    `tokens` is the number of tokens that it has to have. None: any number, of a client that left.
    """
    text = answer.decode(errors="replace")
    match = _TAG.match(text)
    if match is None:
        return None
    unit = f"[{match[1]}]{PROMPT}"
    expected = (unit * len(text))[: len(text) if tokens is None else tokens]
    return int(match[1]) if text == expected else None


async def _client(number: int, mix: Mix, triton: TritonClient, stop: float, records: list[Record]) -> None:
    chance = Random(number)  # noqa: S311
    ways = ("http", "grpc", "http", "grpc", *(("openai",) if mix.door else ()))
    way = ways[number % len(ways)]
    weights = [1 / rank for rank in range(1, len(mix.names) + 1)]
    await asyncio.sleep(chance.random() * mix.think)
    while time.monotonic() < stop:
        is_moving = bool(mix.moving) and chance.random() < mix.moving_share
        name = chance.choice(mix.moving) if is_moving else chance.choices(mix.names, weights)[0]
        tokens = max(LEAST_TOKENS, chance.randint(mix.tokens // 4, mix.tokens * 7 // 4))
        leaves_after = chance.randint(1, tokens) if chance.random() < mix.leavers else None
        pieces = {
            "http": lambda: _http(mix, name, tokens),  # noqa: B023  called at once
            "openai": lambda: _openai(mix, name, tokens),  # noqa: B023
            "grpc": lambda: _grpc(triton, mix, name, tokens),  # noqa: B023
        }[way]()
        records.append(await _record(way, name, pieces, tokens, leaves_after))
        await asyncio.sleep(mix.think * chance.expovariate(1))


async def _run(mix: Mix) -> list[Record]:
    records: list[Record] = []
    stop = time.monotonic() + mix.seconds
    async with TritonClient(mix.grpc) as triton:
        await asyncio.gather(*(_client(number, mix, triton, stop, records) for number in range(mix.clients)))
    return records


def _do(job: Mapping[str, Any]) -> list[Record]:
    return asyncio.run(_run(Mix(**job)))


if __name__ == "__main__":
    raise SystemExit(main(_do))
