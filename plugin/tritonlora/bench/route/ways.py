# SPDX-FileCopyrightText: the tritonlora authors
# SPDX-License-Identifier: Apache-2.0
"""The parts `ttft` and `tokens`: ways to the engine's model, in rounds, at the engine's full speed."""

from __future__ import annotations

import os
import statistics

from tritonlora.bench import load, scratch
from tritonlora.bench.load import Way
from tritonlora.bench.measured import MILLI, Part, Series, at_least, at_most, series
from tritonlora.bench.processes import processes_of
from tritonlora.bench.route.options import Options
from tritonlora.repository.paths import ROUTER


def ttft(options: Options) -> Part:
    """Measure each way with one request at a time, of one token."""
    with (
        scratch.directory() as directory,
        scratch.serving(scratch.small_adapters(directory / "repo", 1, streams=options.instances)) as server,
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


def tokens(options: Options) -> Part:
    """Measure each way, and the floors, with many streams at a time."""
    count = options.streams * options.tokens
    with (
        scratch.directory() as directory,
        scratch.serving(scratch.small_adapters(directory / "repo", 1, streams=options.streams)) as server,
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
                f"processor time of a token in µs: {one.spent(count * options.rounds)}"
                for name, one in times.items()
            ),
            f"the client took {client:.1%} of the {os.cpu_count()} cores at most",
        ),
    )


def _ways(tokens: int) -> dict[str, Way]:
    """Way -> its request: each one gets `tokens` tokens of the same adapter."""
    by_id, by_name = {"lora_task_id": 1}, {"lora_name": "n1"}
    return {
        "direct": Way("tensorrt_llm", [load.body(tokens) | by_id], tokens),
        "pass-through": Way(scratch.PASS_THROUGH, [load.body(tokens) | by_id], tokens),
        "forward": Way(ROUTER, [load.body(tokens) | by_name], tokens),
        "resolve": Way(scratch.PAST_ROUTER, [load.body(tokens) | by_name], tokens),
    }


def _floors(tokens: int) -> dict[str, Way]:
    """Way -> its request, for the ways with the least work before the engine's model.

    One is a model that reads every response. The other is an ensemble of the engine alone.
    """
    body = load.body(tokens)
    return {
        "floor of forward": Way(scratch.TAKER, [body | {"lora_task_id": 1}], 1),
        "floor of resolve": Way(scratch.BARE_ENSEMBLE, [body], tokens),
    }
