# SPDX-FileCopyrightText: the tritonlora authors
# SPDX-License-Identifier: Apache-2.0
"""The part `memory`: memory of the router's processes and of the resolver's, over many requests."""

from __future__ import annotations

from tritonlora.bench import load, scratch
from tritonlora.bench.load import Way
from tritonlora.bench.measured import Part, at_most, series
from tritonlora.bench.processes import processes_of, pss_nbytes
from tritonlora.bench.route.options import Options
from tritonlora.repository.paths import RESOLVER, ROUTER

SAMPLES = 10  # without the first one, which warms up
PSS_FIELDS = ("Pss_Anon", "Pss_Shmem")  # other servers on the machine share pages of files


def memory(options: Options) -> Part:
    """Measure requests through the router. Many find their adapter evicted, so that all code of both models runs."""
    count, room = 12, 8
    sample = max(1, options.requests // (SAMPLES + 1) // scratch.FEW_STREAMS)
    way = Way(ROUTER, [load.body(1) | {"lora_name": f"n{number}"} for number in range(1, count + 1)], 1)
    sizes: dict[str, list[float]] = {ROUTER: [], RESOLVER: []}
    with scratch.directory() as directory:
        repository = scratch.small_adapters(directory / "repo", count, room=room, streams=scratch.FEW_STREAMS)
        with scratch.serving(repository) as server:
            for _ in range(SAMPLES + 1):
                load.ask(server.http_url, {"forward": way}, rounds=sample, streams=scratch.FEW_STREAMS)
                groups = processes_of(server.pid)
                for name, nbytes in sizes.items():
                    nbytes.append(pss_nbytes(groups[name], *PSS_FIELDS) / (1 << 20))
    requests = sample * scratch.FEW_STREAMS
    return Part(
        "memory",
        f"Memory over {(SAMPLES + 1) * requests:,} requests, of {scratch.FEW_STREAMS} processes of the router",
        tuple(series(f"{name}, every {requests:,} requests", "MiB", found) for name, found in sizes.items()),
        tuple(at_most(f"{name}, after the last / the first", one[-1] / one[0], 1.05) for name, one in sizes.items()),
        tuple(f"{name}, MiB: " + ", ".join(f"{size:.1f}" for size in found) for name, found in sizes.items()),
    )
