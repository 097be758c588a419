# SPDX-FileCopyrightText: the tritonlora authors
# SPDX-License-Identifier: Apache-2.0
"""The sizes of the route benchmark's measurements."""

from __future__ import annotations

from dataclasses import dataclass

from tritonlora.bench import scratch


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
