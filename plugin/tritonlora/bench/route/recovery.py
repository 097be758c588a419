# SPDX-FileCopyrightText: the tritonlora authors
# SPDX-License-Identifier: Apache-2.0
"""The part `recovery`: the first token of an evicted adapter through the router."""

from __future__ import annotations

import numpy as np

from tritonlora.bench import load, scratch
from tritonlora.bench.load import Way
from tritonlora.bench.measured import MILLI, Part, at_most, seconds_of, series
from tritonlora.bench.route.options import Options
from tritonlora.launch.server import Server
from tritonlora.repository.paths import ROUTER, read_table


def recovery(options: Options) -> Part:
    """Measure adapters in turn, of which the cache holds one. Each is evicted at its first request, then resident."""
    evicted: list[float] = []
    resident: list[float] = []
    copies: list[float] = []
    file_copies: list[float] = []
    with scratch.directory() as directory:
        repository = scratch.large_adapters(directory / "repo", rank=options.rank, layers=options.layers)
        entry = read_table(repository).entries["n1"]
        file = repository.root / entry.lora_weights_file
        source = np.fromfile(file, np.uint8)
        target = np.zeros_like(source)
        with scratch.serving(repository) as server:
            names = [f"n{1 + number % scratch.LARGE_ADAPTERS}" for number in range(3 * options.rounds)]
            early = [_first_token(server, name) for _ in range(scratch.FEW_STREAMS) for name in sorted(set(names))]
            for name in names:
                evicted.append(_first_token(server, name))
                resident.append(_first_token(server, name))
                copies.append(seconds_of(lambda: np.copyto(target, source)))
                file_copies.append(seconds_of(lambda: np.copyto(target, np.memmap(file, np.uint8, "r"))))
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


def _first_token(server: Server, lora_name: str) -> float:
    way = Way(ROUTER, [load.body(1) | {"lora_name": lora_name}], 1)
    return load.ask(server.http_url, {"forward": way}, rounds=1)["forward"].first[0]
