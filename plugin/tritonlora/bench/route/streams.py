# SPDX-FileCopyrightText: the tritonlora authors
# SPDX-License-Identifier: Apache-2.0
"""The part `streams`: tokens per second of an engine with a pace, past the router and through it."""

from __future__ import annotations

from dataclasses import replace

from tritonlora.bench import clients, scratch
from tritonlora.bench.clients import Clients, Outcome
from tritonlora.bench.measured import MILLI, Part, at_least, at_most, series
from tritonlora.bench.route.options import Options
from tritonlora.repository.init import ENSEMBLE
from tritonlora.repository.paths import ROUTER

TURNS = 2  # of each way


def streams(options: Options) -> Part:
    """Measure tokens per second of `streams` clients in closed loops, with a cache that holds all adapters."""
    count = min(50, options.streams)
    past = Clients(
        scratch.PAST_ROUTER,
        scratch.task_ids(count),
        streams=options.streams,
        tokens=options.tokens,
        seconds=options.seconds,
        discarded=options.seconds / 5,
    )
    with scratch.directory() as directory:
        repository = scratch.paced(directory / "repo", count, pages=count, token_seconds=options.token_seconds)
        with scratch.serving(repository) as server:
            outcomes = _outcomes(server.http_url, past)
    rates = {
        name: sum(one.tokens for one in turns) / sum(one.seconds for one in turns) for name, turns in outcomes.items()
    }
    first = {
        name: series(f"first token, {name}", "ms", [time for one in turns for time in one.first], scale=MILLI)
        for name, turns in outcomes.items()
    }
    faults = sum(one.faults for turns in outcomes.values() for one in turns)
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
            at_most("errors and wrong answers", faults, 0),
        ),
        tuple(f"{name}: {rate:,.0f} tokens/s" for name, rate in rates.items()),
    )


def _outcomes(url: str, past: Clients) -> dict[str, list[Outcome]]:
    """Way -> its outcomes, one for each turn.

    The ways take turns, but for the first requests for each adapter, whose weights travel, and for the router, whose
    few instances take minutes for many streams.
    """
    asked = {
        "direct": replace(past, model="tensorrt_llm", by_name=False),
        "past": past,
        "text": replace(past, model=ENSEMBLE, is_text=True),
    }
    outcomes = {"the first time": [clients.ask(url, past)]}
    for _ in range(TURNS):
        for name, one in asked.items():
            outcomes.setdefault(name, []).append(clients.ask(url, one))
    outcomes["forward"] = [clients.ask(url, replace(past, model=ROUTER))]
    return outcomes
