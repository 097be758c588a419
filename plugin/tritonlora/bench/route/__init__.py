# SPDX-FileCopyrightText: the tritonlora authors
# SPDX-License-Identifier: Apache-2.0
"""Benchmark the router and the resolver: ratios of one run on one machine.

The server is a real tritonserver with the shipped repository and the synthetic engine.

    ttft       time to the first token of one request at a time, compared with requests to the engine's model
    tokens     tokens per second of many streams at a time, compared with requests to the engine's model
    recovery   time to the first token of an evicted adapter, compared with one copy of its bytes in memory
    lookup     time to find an adapter, and to read a changed table, by the size of the table (in this process)
    memory     memory of the router's processes and the resolver's, over many requests
    processes  memory of our models' processes, and the time to stop the server, with them and without them
    streams    tokens per second of an engine with a pace: past the router, in text, and through the router
    cache      time to the first token past the router, where the engine's cache holds all adapters, or few of them

Both sides of a comparison take turns, so that other load on the machine affects them alike. The pass-through model does
the least that a Python model between client and engine can do. Two floors of `tokens` do less. One is a model that
reads all responses of the engine and sends only the last one. The other is an ensemble of the engine alone, without
adapters.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence

from tritonlora.bench.measured import Part
from tritonlora.bench.route.cache import cache
from tritonlora.bench.route.lookup import lookup
from tritonlora.bench.route.memory import memory
from tritonlora.bench.route.options import Case, Options
from tritonlora.bench.route.processes import processes
from tritonlora.bench.route.recovery import recovery
from tritonlora.bench.route.streams import streams
from tritonlora.bench.route.ways import tokens, ttft

__all__ = ["PARTS", "Case", "Options", "run"]

PARTS: Mapping[str, Callable[[Options], Part]] = {
    "ttft": ttft,
    "tokens": tokens,
    "recovery": recovery,
    "lookup": lookup,
    "memory": memory,
    "processes": processes,
    "streams": streams,
    "cache": cache,
}


def run(parts: Sequence[str], options: Options, on_part: Callable[[str], None] = lambda _: None) -> Iterator[Part]:
    """Measure the `parts`, keys of PARTS, one after another. `on_part` is called with each name at its beginning."""
    for name in parts:
        on_part(name)
        yield PARTS[name](options)
