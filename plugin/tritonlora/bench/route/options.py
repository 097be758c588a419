# SPDX-FileCopyrightText: the tritonlora authors
# SPDX-License-Identifier: Apache-2.0
"""The sizes of the route benchmark's measurements."""

from __future__ import annotations

from dataclasses import dataclass

from tritonlora.bench import scratch


@dataclass(frozen=True, slots=True)
class Case:
    """One measurement of `cache`: adapters, the engine and its cache, and what clients ask for."""

    adapters: int = 32
    pages: int = 16  # adapters that the engine's cache holds; a small adapter takes one page
    mix: str = "uniform"  # one of clients.MIXES
    max_tokens: int = 0  # of a request; 0: the number of tokens that the response has
    streams: int = 32
    tokens: int = 32  # of a response on average
    token_seconds: float = 0.02  # the engine's time for a token
    rank: int | None = None  # of adapters of a Llama 8B; None: small adapters
    requests: int = 0  # 0: as many as the clients send in `Options.seconds`

    @property
    def name(self) -> str:
        """What tells the cases of one run apart."""
        adapters, cache = f"{self.adapters} adapters", f"{self.pages} pages"
        if self.rank:
            adapters, cache = f"{adapters} of rank {self.rank}", f"a cache of {self.pages}"
        most = f", max_tokens {self.max_tokens}" if self.max_tokens else ""
        return f"{adapters}, {cache}, {self.mix}{most}"

    @property
    def allowed(self) -> float | None:
        """The requests per second of pages that each take one request at a time; None if all in use fit.

        Requests for one adapter share its page, so there may be more.
        """
        if min(self.adapters, self.streams) <= self.pages or not self.token_seconds:
            return None
        return self.pages / (self.tokens * self.token_seconds)


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
    case: Case | None = None  # the only one of `cache`; None: its table of cases
