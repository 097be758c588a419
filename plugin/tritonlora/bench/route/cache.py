# SPDX-FileCopyrightText: the tritonlora authors
# SPDX-License-Identifier: Apache-2.0
"""The part `cache`: the first token past the router, by the adapters in use and the engine's cache."""

from __future__ import annotations

from collections.abc import Iterator, Mapping

from tritonlora.bench import clients, scratch
from tritonlora.bench.clients import Clients, Outcome
from tritonlora.bench.measured import MILLI, Part, Ratio, Series, at_least, at_most, series
from tritonlora.bench.route.options import Case, Options

ALL_FIT, IN_USE_FIT = Case(50, 50), Case(100, 50)
CASES = (
    ALL_FIT,
    IN_USE_FIT,
    Case(100, 50, max_tokens=1024),
    *(Case(adapters, 16) for adapters in (8, 16, 24, 32, 64, 128)),  # from half the cache to eight times it
    Case(200, 8),
    Case(200, 8, "cyclic"),
    Case(32, 4, "sticky"),
)


def cache(options: Options) -> Part:
    """Measure the case of the options, or all CASES, with clients in closed loops."""
    cases = (options.case,) if options.case else CASES
    outcomes = {case: _outcome(case, options) for case in cases}
    first = {
        case: series(f"first token, {case.name}", "ms", one.first, scale=MILLI)
        for case, one in outcomes.items()
        if one.first
    }
    any_case = cases[0]
    return Part(
        "cache",
        f"{any_case.streams} streams of {any_case.tokens} tokens past the router, "
        f"{MILLI * any_case.token_seconds:g} ms a token",
        tuple(first.values()),
        (
            at_most("errors", sum(one.failed for one in outcomes.values()), 0),
            at_most("wrong responses", sum(one.wrong for one in outcomes.values()), 0),
            *_added(first),
            *_shares(outcomes),
        ),
        (
            *(
                f"{case.name}: {one.requests:,} requests, {one.rate:.1f} a second; "
                f"{one.failed} errors, {one.wrong} wrong responses"
                for case, one in outcomes.items()
            ),
            *(f"{case.name}: {error}" for case, one in outcomes.items() for error in one.errors),
        ),
    )


def _outcome(case: Case, options: Options) -> Outcome:
    asked = Clients(
        scratch.PAST_ROUTER,
        scratch.task_ids(case.adapters),
        streams=case.streams,
        tokens=case.tokens,
        mix=case.mix,
        allowed=case.max_tokens,
        requests=case.requests,
        seconds=options.seconds,
        discarded=0.0 if case.requests else options.seconds / 5,
    )
    with scratch.directory() as directory:
        repository = scratch.paced(
            directory / "repo",
            case.adapters,
            pages=case.pages,
            token_seconds=case.token_seconds,
            rank=case.rank,
            layers=options.layers,
        )
        with scratch.serving(repository) as server:
            return clients.ask(server.http_url, asked)


def _added(first: Mapping[Case, Series]) -> Iterator[Ratio]:
    """What it costs that not all adapters fit, where all in use do."""
    if ALL_FIT in first and IN_USE_FIT in first:
        added = first[IN_USE_FIT].p50 - first[ALL_FIT].p50
        yield at_most(f"ms of the first token that {IN_USE_FIT.name} adds", added, 20)


def _shares(outcomes: Mapping[Case, Outcome]) -> Iterator[Ratio]:
    for case, one in outcomes.items():
        if case.allowed:
            yield at_least(f"requests/s of {case.name} / one request a page at a time", one.rate / case.allowed, 0.8)
