# SPDX-FileCopyrightText: the tritonlora authors
# SPDX-License-Identifier: Apache-2.0
"""Benchmark the OpenAI door: client, door and server on one machine, before the synthetic engine with a pace.

    streams   tokens per second of many streams at a time, against asking the engine's model directly
    first     time to the first token of one request at a time, against asking the engine's model directly
    burst     the same of many requests at one instant, and the processor time that each process takes for a request
    client    processor time of a streamed token in the official client, beside that in the door

Both sides of a comparison take turns, so that other load on the machine affects them alike.
"""

from __future__ import annotations

import asyncio
import contextlib
import http.client
import pstats
import statistics
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tritonlora.bench import load, scratch
from tritonlora.bench.load import PROMPT, Way
from tritonlora.bench.measured import MICRO, MILLI, Part, Series, at_least, at_most, series
from tritonlora.bench.processes import processes_of, processor_seconds
from tritonlora.errors import ServerError
from tritonlora.launch.server import Server
from tritonlora.machine import LOCAL, free_ports, host_and_port
from tritonlora.repository.paths import TOKENS

READY_SECONDS = 60.0
PROFILED = 12  # functions
BURSTS = 4  # in a round


@dataclass(frozen=True, slots=True)
class Options:
    """How much is measured."""

    streams: int = 128  # at a time
    tokens: int = 256  # of each of them
    rounds: int = 3
    requests: int = 500  # one at a time, in `first`
    token_seconds: float = 0.04  # of the engine


def run(options: Options) -> list[Part]:
    """Measure all parts."""
    with scratch.directory() as directory:
        opened = scratch.paced(directory / "repo", 1, pages=1, token_seconds=options.token_seconds)
        with scratch.serving(opened) as server:
            with opened_door(server.grpc_url) as (door, url):
                streams = _streams(options, server, door, url)
                first = _first(options, server, url)
                burst = _burst(options, server, door, url)
                client = _client(options, door, url)
            profile = directory / "profile"
            with opened_door(server.grpc_url, "-m", "cProfile", "-o", str(profile)) as (_, url):
                load.ask(url, {"door": _ways(server, url, options.tokens)["door"]}, rounds=1, streams=options.streams)
            return [streams, first, burst, client, _profile(profile, options.streams * options.tokens)]


def _streams(options: Options, server: Server, door: int, url: str) -> Part:
    ways = _ways(server, url, options.tokens)
    processes = {**processes_of(server.pid), "door": [door]}
    times = load.ask(
        url, ways, rounds=options.rounds, streams=options.streams, discarded=1, pause=0.002, processes=processes
    )
    count = options.streams * options.tokens
    rates = {name: count / statistics.median(one.rounds) for name, one in times.items()}
    spent = {name: one.spent(count * options.rounds) for name, one in times.items()}
    return Part(
        "streams",
        f"{options.streams} streams of {options.tokens} tokens, {MILLI * options.token_seconds:g} ms a token",
        tuple(series(f"first token, {name}", "ms", one.first, scale=MILLI) for name, one in times.items()),
        (at_least("tokens per second of door / direct", rates["door"] / rates["direct"], 0.9),),
        tuple(f"{name}: {rates[name]:,.0f} tokens/s; processor time of a token in µs: {spent[name]}" for name in times),
    )


def _first(options: Options, server: Server, url: str) -> Part:
    times = load.ask(url, _ways(server, url, 1), rounds=options.requests, discarded=20)
    first = {name: series(name, "ms", one.first, scale=MILLI) for name, one in times.items()}
    added = Series("added", "ms", first["door"].p50 - first["direct"].p50, first["door"].p99 - first["direct"].p99)
    return Part(
        "first",
        "Time to the first token, one request at a time",
        (*first.values(), added),
        (at_most("ms that the door adds", added.p50, 5),),
    )


def _burst(options: Options, server: Server, door: int, url: str) -> Part:
    """`ensemble` is the model that the door asks, asked over HTTP: the server's part of the time."""
    ways = _ways(server, url, 1)
    body = {**ways["direct"].bodies[0], "lora_name": "n1"}
    ways["ensemble"] = Way(TOKENS, [body], 1, url=server.http_url)
    rounds = BURSTS * options.rounds
    times = load.ask(
        url,
        ways,
        rounds=rounds,
        streams=options.streams,
        discarded=1,
        processes={**processes_of(server.pid), "door": [door]},
    )
    count = options.streams * rounds
    return Part(
        "burst",
        f"{options.streams} requests at one instant, of one token",
        tuple(series(f"first token, {name}", "ms", one.first, scale=MILLI) for name, one in times.items()),
        (),
        tuple(f"{name}: processor time of a request in µs: {one.spent(count)}" for name, one in times.items()),
    )


def _client(options: Options, door: int, url: str) -> Part:
    before = processor_seconds({"door": [door]})["door"]
    job = {"url": url, "streams": options.streams, "tokens": options.tokens}
    found: dict[str, float] = load.in_process("tritonlora.bench.openai", job)
    count = options.streams * options.tokens
    spent = {"client": found["processor"], "door": processor_seconds({"door": [door]})["door"] - before}
    return Part(
        "client",
        f"{options.streams} streams of the official client",
        tuple(Series(f"a token, {name}", "µs", micro, micro) for name, micro in _per_token(spent, count).items()),
        (),
        (f"{count / found['seconds']:,.0f} tokens/s",),
    )


def _per_token(seconds: Mapping[str, float], count: int) -> dict[str, float]:
    return {name: MICRO * one / count for name, one in seconds.items()}


def _profile(path: Path, count: int) -> Part:
    """The functions of the door in which most time is spent while it streams."""
    found: Any = pstats.Stats(str(path))
    own = sorted(found.stats.items(), key=lambda item: -item[1][2])
    lines = [
        f"{MICRO * spent / count:6.1f} µs  {'/'.join(Path(file).parts[-2:])}:{line} {name}"
        for (file, line, name), (_, _, spent, _, _) in own
        if calls_each_token(found.stats[file, line, name][1], count)
    ]
    return Part("profile", "Where the door's time of a token goes, under cProfile", (), (), tuple(lines[:PROFILED]))


def calls_each_token(calls: int, count: int) -> bool:
    """Whether a function that was called so often has to do with tokens, and not with the start."""
    return calls >= count // 2


def _ways(server: Server, url: str, tokens: int) -> dict[str, Way]:
    door = {"model": "n1", "prompt": PROMPT, "max_tokens": tokens, "stream": True}
    return {
        "direct": Way("tensorrt_llm", [load.body(tokens)], tokens, url=server.http_url),
        "door": Way("n1", [door], tokens, url=url, path="/v1/completions"),
    }


@contextlib.contextmanager
def opened_door(grpc_url: str, *python: str) -> Iterator[tuple[int, str]]:
    """(process id, HOST:PORT) of a door that is ready."""
    port = free_ports().http
    command = [sys.executable, *python, "-m", "tritonlora", "openai", "--url", grpc_url, "--port", str(port)]
    with subprocess.Popen(command, stdout=subprocess.DEVNULL) as process:
        try:
            _wait_until_healthy(process, port)
            yield process.pid, host_and_port(LOCAL, port)
        finally:
            process.terminate()
            process.wait(READY_SECONDS)


def _wait_until_healthy(process: subprocess.Popen[bytes], port: int) -> None:
    deadline = time.monotonic() + READY_SECONDS
    while process.poll() is None and time.monotonic() < deadline:
        connection = http.client.HTTPConnection(LOCAL, port, timeout=READY_SECONDS)
        with contextlib.suppress(OSError), contextlib.closing(connection):
            connection.request("GET", "/health")
            if connection.getresponse().status == http.client.OK:
                return
        time.sleep(0.05)
    raise ServerError("tritonlora openai did not become ready")


# The official client, in a process of its own


async def _consume(url: str, streams: int, tokens: int) -> None:
    import openai

    async with openai.AsyncOpenAI(base_url=f"http://{url}/v1", api_key="unused", max_retries=0) as client:

        async def one() -> int:
            stream = await client.completions.create(model="n1", prompt=PROMPT, max_tokens=tokens, stream=True)
            return sum([bool(event.choices[0].text) async for event in stream])

        counts = await asyncio.gather(*(one() for _ in range(streams)))
    if set(counts) != {tokens}:
        raise ServerError(f"the client got {sorted({*counts})} tokens, expected {tokens}")


def _do(job: dict[str, Any]) -> dict[str, float]:
    asyncio.run(_consume(job["url"], 1, 1))  # imports, and everything that is made once
    start, processor = time.perf_counter(), time.process_time()
    asyncio.run(_consume(**job))
    return {"seconds": time.perf_counter() - start, "processor": time.process_time() - processor}


if __name__ == "__main__":
    raise SystemExit(load.main(_do))
