# SPDX-FileCopyrightText: the tritonlora authors
# SPDX-License-Identifier: Apache-2.0
"""The part `memory`: memory of the router's processes, over many requests."""

from __future__ import annotations

from tritonlora.bench import load, scratch
from tritonlora.bench.load import Way
from tritonlora.bench.measured import Part, at_most, series
from tritonlora.bench.processes import processes_of, pss_nbytes
from tritonlora.bench.route.options import Options
from tritonlora.repository.paths import ROUTER

SAMPLES = 10  # without the first one, which warms up


def memory(options: Options) -> Part:
    """Measure the router's memory. Many requests find their adapter evicted, so that all code of the router runs."""
    count, room = 12, 8
    sample = max(1, options.requests // (SAMPLES + 1) // scratch.FEW_STREAMS)
    way = Way(ROUTER, [load.body(1) | {"lora_name": f"n{number}"} for number in range(1, count + 1)], 1)
    sizes = []
    with scratch.directory() as directory:
        repository = scratch.small_adapters(directory / "repo", count, room=room, streams=scratch.FEW_STREAMS)
        with scratch.serving(repository) as server:
            for _ in range(SAMPLES + 1):
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
