# SPDX-FileCopyrightText: the tritonlora authors
# SPDX-License-Identifier: Apache-2.0
"""Benchmark the router and the resolver: ratios of one run on one machine.

The server is a real tritonserver with the shipped repository and the synthetic engine.

    ttft      time to the first token of one request at a time, compared with requests to the engine's model
    tokens    tokens per second of many streams at a time, compared with requests to the engine's model
    recovery  time to the first token of an evicted adapter, compared with one copy of its bytes in memory
    lookup    time to find an adapter, and to read a changed table, by the size of the table (in this process)
    memory    memory of the router's processes, over many requests
    streams   tokens per second of an engine with a pace: past the router, in text, and through the router
    cache     time to the first token past the router, where the engine's cache holds all adapters, or few of them

Both sides of a comparison take turns, so that other load on the machine affects them alike. The pass-through model does
the least that a Python model between client and engine can do. Two floors of `tokens` do less. One is a model that
reads all responses of the engine and sends only the last one. The other is an ensemble of the engine alone, without
adapters.
"""

from __future__ import annotations

import os
import statistics
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from tritonlora.bench import clients, load, scratch
from tritonlora.bench.clients import Clients, Outcome
from tritonlora.bench.load import Times, Way
from tritonlora.bench.measured import Part, Series, at_least, at_most, series
from tritonlora.bench.processes import processes_of, pss_nbytes
from tritonlora.errors import AdapterTableError
from tritonlora.files import write_text
from tritonlora.launch.server import Server
from tritonlora.repository.init import ENSEMBLE
from tritonlora.repository.paths import ROUTER, Repository, read_table
from tritonlora.serving.adapter_table import AdapterEntry
from tritonlora.serving.adapter_table_json import render
from tritonlora.serving.routing import resolve
from tritonlora.serving.table_file import TableFile

EXIT_TIMEOUT_SECONDS = 2  # no client waits for a response any more
PROMPT = "hello"
MILLI, MICRO = 1e3, 1e6
TURNS = 2  # of each way, in `streams`
MEMORY_SAMPLES = 10  # without the first one, which warms up


@dataclass(frozen=True, slots=True)
class Options:
    """The sizes of the measurements."""

    rounds: int = 7
    instances: int = 16  # of the router and of the pass-through model, in `ttft`; as shipped
    streams: int = 64  # number of streams at a time, in `tokens` and `streams`
    tokens: int = 128  # tokens of each of these streams
    rank: int = scratch.LARGE_RANK  # rank of the adapters in `recovery`, on all linear layers of a Llama 8B
    layers: int = 32  # layers of that Llama
    requests: int = 100_000  # number of requests in `memory`
    token_seconds: float = 0.04  # the engine's time for a token in `streams`
    seconds: float = 20.0  # duration of each measurement in `streams` and `cache`
    sizes: tuple[int, ...] = (10, 100, 1000, 10_000)  # numbers of adapters in the tables of `lookup`


def run(parts: Sequence[str], options: Options, on_part: Callable[[str], None] = lambda _: None) -> Iterator[Part]:
    """Measure the `parts`, keys of PARTS, one after another. `on_part` is called with each name at its beginning."""
    for name in parts:
        on_part(name)
        yield PARTS[name](options)


# To the first token


def _ttft(options: Options) -> Part:
    with (
        _scratch() as directory,
        _serving(scratch.small_adapters(directory / "repo", 1, streams=options.instances)) as server,
    ):
        rounds, unused = 100 * options.rounds, 2 * options.instances  # each instance answers before it counts
        times = load.ask(server.http_url, _ways(tokens=1), rounds=rounds, discarded=unused)
    first = {name: series(name, "ms", one.first, scale=MILLI) for name, one in times.items()}
    added = {
        name: Series(f"added by {name}", "ms", one.p50 - first["direct"].p50, one.p99 - first["direct"].p99)
        for name, one in first.items()
        if name != "direct"
    }
    return Part(
        "ttft",
        "Time to the first token, one request at a time",
        (*first.values(), *added.values()),
        (
            at_most("added by forward / added by pass-through", added["forward"].p50 / added["pass-through"].p50, 1.1),
            at_most("added by resolve / added by forward", added["resolve"].p50 / added["forward"].p50, 0.7),
        ),
    )


# Tokens per second


def _tokens(options: Options) -> Part:
    count = options.streams * options.tokens
    with (
        _scratch() as directory,
        _serving(scratch.small_adapters(directory / "repo", 1, streams=options.streams)) as server,
    ):
        times = load.ask(
            server.http_url,
            _ways(options.tokens) | _floors(options.tokens),
            rounds=options.rounds,
            streams=options.streams,
            discarded=1,
            pause=0.002,
            processes=processes_of(server.pid),
        )
    rates = {name: count / statistics.median(one.rounds) for name, one in times.items()}
    of_direct = {
        name: statistics.median(theirs / ours for theirs, ours in zip(times["direct"].rounds, one.rounds, strict=True))
        for name, one in times.items()
    }
    client = max(sum(one.client) / sum(one.rounds) for one in times.values()) / (os.cpu_count() or 1)
    return Part(
        "tokens",
        f"{options.streams} streams of {options.tokens} tokens at a time",
        tuple(series(f"a stream, {name}", "ms", one.whole, scale=MILLI) for name, one in times.items()),
        (
            at_least("tokens per second of forward / direct", of_direct["forward"], 0.75),
            at_least("tokens per second of resolve / direct", of_direct["resolve"], 0.95),
        ),
        (
            *(
                f"{name}: {rates[name]:,.0f} tokens/s, {of_direct[name]:.2f} of direct; "
                f"processor time of a token in µs: {_spent(one, count * options.rounds)}"
                for name, one in times.items()
            ),
            f"the client took {client:.1%} of the {os.cpu_count()} cores at most",
        ),
    )


def _spent(times: Times, tokens: int) -> str:
    spent = {name: MICRO * seconds / tokens for name, seconds in times.processor.items()}
    return ", ".join(f"{name} {micro:.0f}" for name, micro in spent.items() if micro >= 1)


# Recovery of an evicted adapter


def _recovery(options: Options) -> Part:
    evicted: list[float] = []
    resident: list[float] = []
    copies: list[float] = []
    file_copies: list[float] = []
    with _scratch() as directory:
        repository = scratch.large_adapters(directory / "repo", rank=options.rank, layers=options.layers)
        entry = read_table(repository).entries["n1"]
        file = repository.root / entry.lora_weights_file
        source = np.fromfile(file, np.uint8)
        target = np.zeros_like(source)
        with _serving(repository) as server:
            names = [f"n{1 + number % scratch.LARGE_ADAPTERS}" for number in range(3 * options.rounds)]
            early = [_first_token(server, name) for _ in range(scratch.FEW_STREAMS) for name in sorted(set(names))]
            for name in names:
                evicted.append(_first_token(server, name))
                resident.append(_first_token(server, name))
                copies.append(_seconds(lambda: np.copyto(target, source)))
                file_copies.append(_seconds(lambda: np.copyto(target, np.memmap(file, np.uint8, "r"))))
    found = [
        series(name, "ms", values, scale=MILLI)
        for name, values in (
            ("evicted", evicted),
            ("resident", resident),
            ("one copy in memory", copies),
            ("one copy of the cached file", file_copies),  # where the router has the bytes from
        )
    ]
    longer = found[0].p50 - found[1].p50
    return Part(
        "recovery",
        f"To the first token of an evicted adapter of {entry.lora_weights_nbytes / 1e6:.0f} MB",
        tuple(found),
        (at_most("copies that evicted takes longer than resident", longer / found[2].p50, 2),),
        (
            f"evicted takes {longer / found[3].p50:.2f} copies of the cached file longer than resident",
            f"the first time in an instance its shared memory grows: up to {MILLI * max(early):.0f} ms",
        ),
    )


def _seconds(call: Callable[[], object]) -> float:
    start = time.perf_counter()
    call()
    return time.perf_counter() - start


def _first_token(server: Server, lora_name: str) -> float:
    way = Way(ROUTER, [_body(1) | {"lora_name": lora_name}], 1)
    return load.ask(server.http_url, {"forward": way}, rounds=1)["forward"].first[0]


# Finding an adapter, and reading the table


def _lookup(options: Options) -> Part:
    lookups: dict[int, list[float]] = {size: [] for size in options.sizes}
    reloads: dict[int, list[float]] = {size: [] for size in options.sizes}
    with _scratch() as directory:
        texts = {size: render(scratch.table_of(_ENTRY, size)) for size in options.sizes}
        for size, text in texts.items():
            (directory / f"{size}.json").write_text(text)
        tables = {size: TableFile(directory / f"{size}.json", _refuse) for size in options.sizes}
        for number in range(options.rounds):
            for size, table in tables.items():
                lookups[size] += _lookup_seconds(table, size)
                changed = texts[size].replace('"pages": 200', f'"pages": {number + 1}', 1)  # of one adapter
                write_text(directory / f"{size}.json", changed)
                reloads[size].append(_seconds(table.table))
    found = [series(f"lookup among {size:,}", "µs", values, scale=MICRO) for size, values in lookups.items()]
    read = [series(f"reload of {size:,}", "ms", values, scale=MILLI) for size, values in reloads.items()]
    return Part(
        "lookup",
        "Finding an adapter, and reading the table again",
        (*found, *read),
        (
            at_most(f"µs of a {found[-1].name}", found[-1].p50, 20),
            at_most(f"{found[-1].name} / {found[0].name}", found[-1].p50 / found[0].p50, 1.5),
            at_most(f"ms of a {read[-1].name}", read[-1].p50, 100),
        ),
    )


def _lookup_seconds(table: TableFile, size: int) -> Iterator[float]:
    """Seconds of each of many look-ups, by name and by id, spread over the table."""
    for number in range(1, size + 1, max(1, size // 500)):
        for lora_name, lora_task_id in ((f"n{number}".encode(), None), (None, number)):
            start = time.perf_counter()
            resolve(table.table(), lora_name, lora_task_id)
            yield time.perf_counter() - start


def _refuse(problem: str) -> None:
    raise AdapterTableError(problem)


_ENTRY = AdapterEntry(
    lora_task_id=1,
    lora_weights_file="tensorrt_llm/warmup/adapter_model_1.bin",
    lora_config_file="tensorrt_llm/warmup/adapter_config_1.bin",
    dtype="bfloat16",
    lora_weights_shape=(224, 589824),
    lora_config_shape=(224, 3),
    lora_weights_sha256="0" * 64,
    lora_config_sha256="0" * 64,
    adapter_sizes=(32,),
    modules=("attn_q", "attn_k", "attn_v", "attn_dense", "mlp_h_to_4h", "mlp_4h_to_h", "mlp_gate"),
    base_model_name_or_path="meta-llama/Llama-3.1-8B-Instruct",
    warm=True,
    added_at="2026-01-01T00:00:00+00:00",
    pages=200,
)


# Memory


def _memory(options: Options) -> Part:
    """Measure the router's memory. Many requests find their adapter evicted, so that all code of the router runs."""
    count, room = 12, 8
    sample = max(1, options.requests // (MEMORY_SAMPLES + 1) // scratch.FEW_STREAMS)
    way = Way(ROUTER, [_body(1) | {"lora_name": f"n{number}"} for number in range(1, count + 1)], 1)
    sizes = []
    with _scratch() as directory:
        repository = scratch.small_adapters(directory / "repo", count, room=room, streams=scratch.FEW_STREAMS)
        with _serving(repository) as server:
            for _ in range(MEMORY_SAMPLES + 1):
                load.ask(server.http_url, {"forward": way}, rounds=sample, streams=scratch.FEW_STREAMS)
                sizes.append(pss_nbytes(processes_of(server.pid)[ROUTER]) / (1 << 20))
    requests = sample * scratch.FEW_STREAMS
    return Part(
        "memory",
        f"Memory (PSS) of the router's {scratch.FEW_STREAMS} processes over {len(sizes) * requests:,} requests",
        (series(f"every {requests:,} requests", "MiB", sizes),),
        (at_most("after the last requests / after the first", sizes[-1] / sizes[0], 1.05),),
        ("MiB: " + ", ".join(f"{size:.1f}" for size in sizes),),
    )


# An engine with a pace, past the router


def _streams(options: Options) -> Part:
    """Measure tokens per second of `streams` clients in closed loops, with a cache that holds all adapters.

    The ways take turns, but for the first requests for each adapter, whose weights travel, and for the router, whose
    few instances take minutes for many streams.
    """
    count = min(50, options.streams)
    with (
        _scratch() as directory,
        _serving(scratch.paced(directory / "repo", count, pages=count, token_seconds=options.token_seconds)) as server,
    ):
        past = _clients(options, count, streams=options.streams, tokens=options.tokens)
        asked = {
            "direct": replace(past, model="tensorrt_llm", by_name=False),
            "past": past,
            "text": replace(past, model=ENSEMBLE, is_text=True),
        }
        outcomes: dict[str, list[Outcome]] = {"the first time": [clients.ask(server.http_url, past)]}
        for _ in range(TURNS):
            for name, one in asked.items():
                outcomes.setdefault(name, []).append(clients.ask(server.http_url, one))
        outcomes["forward"] = [clients.ask(server.http_url, replace(past, model=ROUTER))]
    rates = {
        name: sum(one.tokens for one in turns) / sum(one.seconds for one in turns) for name, turns in outcomes.items()
    }
    first = {
        name: series(f"first token, {name}", "ms", [time for one in turns for time in one.first], scale=MILLI)
        for name, turns in outcomes.items()
    }
    token = MILLI * options.token_seconds
    return Part(
        "streams",
        f"{options.streams} streams of {options.tokens} tokens, {token:g} ms a token",
        tuple(first.values()),
        (
            at_least("tokens per second of past / direct", rates["past"] / rates["direct"], 0.95),
            at_least("tokens per second of text / past", rates["text"] / rates["past"], 0.95),
            at_most("ms of the first token, past - direct, p50", first["past"].p50 - first["direct"].p50, token),
            at_most("ms of the first token, past - direct, p99", first["past"].p99 - first["direct"].p99, 3 * token),
            at_most("errors and wrong answers", _wrong(one for turns in outcomes.values() for one in turns), 0),
        ),
        tuple(f"{name}: {rate:,.0f} tokens/s" for name, rate in rates.items()),
    )


@dataclass(frozen=True, slots=True)
class _Case:
    """One measurement of `cache`: adapters, the cache, and what clients ask for."""

    adapters: int
    pages: int
    mix: str = "uniform"
    allowed: int = 0  # max_tokens of requests whose responses have 32 tokens; 0: 32

    def __str__(self) -> str:
        most = f", max_tokens {self.allowed}" if self.allowed else ""
        return f"{self.adapters} adapters, {self.pages} pages, {self.mix}{most}"


_ALL_FIT, _IN_USE_FIT, _STICKY = _Case(50, 50), _Case(100, 50), _Case(32, 4, "sticky")
_CASES = (
    _ALL_FIT,
    _IN_USE_FIT,
    _Case(100, 50, allowed=1024),
    *(_Case(adapters, 16) for adapters in (8, 16, 24, 32, 64, 128)),  # from half the cache to eight times it
    _Case(200, 8),
    _Case(200, 8, "cyclic"),
    _STICKY,
)


def _cache(options: Options) -> Part:
    """Measure 32 clients in closed loops. In the mix `sticky` each client always asks for the same adapter."""
    outcomes = {}
    for case in _CASES:
        with (
            _scratch() as directory,
            _serving(scratch.paced(directory / "repo", case.adapters, pages=case.pages, token_seconds=0.02)) as server,
        ):
            asked = _clients(options, case.adapters, streams=32, tokens=32, mix=case.mix, allowed=case.allowed)
            outcomes[case] = clients.ask(server.http_url, asked)
    first = {case: series(f"first token, {case}", "ms", one.first, scale=MILLI) for case, one in outcomes.items()}
    rates = {case: one.requests / one.seconds for case, one in outcomes.items()}
    allowed = _STICKY.pages / (32 * 0.02)  # an adapter's page is taken for as long as its request
    return Part(
        "cache",
        "32 streams of 32 tokens past the router, 20 ms a token",
        tuple(first.values()),
        (
            at_most("errors and wrong answers", _wrong(outcomes.values()), 0),
            at_most(f"ms of the first token that {_IN_USE_FIT} adds", first[_IN_USE_FIT].p50 - first[_ALL_FIT].p50, 20),
            at_least(f"requests/s of {_STICKY} / what the pages allow", rates[_STICKY] / allowed, 0.8),
        ),
        tuple(f"{case}: {rate:.1f} requests/s" for case, rate in rates.items()),
    )


def _clients(options: Options, count: int, **what: Any) -> Clients:
    adapters = {f"n{number}": number for number in range(1, count + 1)}
    seconds = options.seconds
    return Clients(scratch.PAST_ROUTER, adapters, seconds=seconds, discarded=seconds / 5, **what)


def _wrong(outcomes: Iterable[Outcome]) -> int:
    return sum(one.failed + one.wrong for one in outcomes)


# What they share


@contextmanager
def _scratch() -> Iterator[Path]:
    with tempfile.TemporaryDirectory(prefix="tritonlora-bench-") as directory:
        yield Path(directory)


@contextmanager
def _serving(repository: Repository) -> Iterator[Server]:
    with Server(repository.root, exit_timeout=EXIT_TIMEOUT_SECONDS) as server:
        server.wait_until_ready()
        yield server


def _ways(tokens: int) -> dict[str, Way]:
    """Way -> its request: each one gets `tokens` tokens of the same adapter."""
    by_id, by_name = {"lora_task_id": 1}, {"lora_name": "n1"}
    return {
        "direct": Way("tensorrt_llm", [_body(tokens) | by_id], tokens),
        "pass-through": Way(scratch.PASS_THROUGH, [_body(tokens) | by_id], tokens),
        "forward": Way(ROUTER, [_body(tokens) | by_name], tokens),
        "resolve": Way(scratch.PAST_ROUTER, [_body(tokens) | by_name], tokens),
    }


def _floors(tokens: int) -> dict[str, Way]:
    """Way -> its request, for the ways with the least work before the engine's model.

    One is a model that reads every response. The other is an ensemble of the engine alone.
    """
    body = _body(tokens)
    return {
        "floor of forward": Way(scratch.TAKER, [body | {"lora_task_id": 1}], 1),
        "floor of resolve": Way(scratch.BARE_ENSEMBLE, [body], tokens),
    }


def _body(tokens: int) -> dict[str, Any]:
    """The engine's inputs as generate_stream takes them."""
    prompt = list(PROMPT.encode())
    return {"input_ids": prompt, "input_lengths": len(prompt), "request_output_len": tokens, "streaming": True}


PARTS: dict[str, Callable[[Options], Part]] = {
    "ttft": _ttft,
    "tokens": _tokens,
    "recovery": _recovery,
    "lookup": _lookup,
    "memory": _memory,
    "streams": _streams,
    "cache": _cache,
}
