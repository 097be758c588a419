# SPDX-FileCopyrightText: the tritonlora authors
# SPDX-License-Identifier: Apache-2.0
"""The part `cache`: the first token past the router, by the adapters in use and the engine's cache."""

from __future__ import annotations

from dataclasses import dataclass

from tritonlora.bench import clients, scratch
from tritonlora.bench.clients import Clients
from tritonlora.bench.measured import MILLI, Part, at_least, at_most, series
from tritonlora.bench.route.options import Options


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


def cache(options: Options) -> Part:
    """Measure 32 clients in closed loops. In the mix `sticky` each client always asks for the same adapter."""
    outcomes = {}
    for case in _CASES:
        asked = Clients(
            scratch.PAST_ROUTER,
            scratch.task_ids(case.adapters),
            streams=32,
            tokens=32,
            mix=case.mix,
            allowed=case.allowed,
            seconds=options.seconds,
            discarded=options.seconds / 5,
        )
        with scratch.directory() as directory:
            repository = scratch.paced(directory / "repo", case.adapters, pages=case.pages, token_seconds=0.02)
            with scratch.serving(repository) as server:
                outcomes[case] = clients.ask(server.http_url, asked)
    first = {case: series(f"first token, {case}", "ms", one.first, scale=MILLI) for case, one in outcomes.items()}
    rates = {case: one.requests / one.seconds for case, one in outcomes.items()}
    allowed = _STICKY.pages / (32 * 0.02)  # an adapter's page is taken for as long as its request
    return Part(
        "cache",
        "32 streams of 32 tokens past the router, 20 ms a token",
        tuple(first.values()),
        (
            at_most("errors and wrong answers", sum(one.faults for one in outcomes.values()), 0),
            at_most(f"ms of the first token that {_IN_USE_FIT} adds", first[_IN_USE_FIT].p50 - first[_ALL_FIT].p50, 20),
            at_least(f"requests/s of {_STICKY} / what the pages allow", rates[_STICKY] / allowed, 0.8),
        ),
        tuple(f"{case}: {rate:.1f} requests/s" for case, rate in rates.items()),
    )
