# SPDX-FileCopyrightText: the tritonlora authors
# SPDX-License-Identifier: Apache-2.0
"""The part `processes`: what the processes of tritonlora's models take, and how long the server takes to stop."""

from __future__ import annotations

import signal
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

from tritonlora.bench import clients, load, scratch
from tritonlora.bench.clients import Clients
from tritonlora.bench.load import Way
from tritonlora.bench.measured import MEGA, Part, at_most, seconds_of, series
from tritonlora.bench.processes import SERVER, processes_of, pss_nbytes, shared_memory_nbytes
from tritonlora.bench.route.options import Options
from tritonlora.launch import client
from tritonlora.launch.server import Server
from tritonlora.launch.tritonserver import EXIT_TIMEOUT_SECONDS
from tritonlora.repository.init import ENSEMBLE
from tritonlora.repository.paths import RESOLVER, ROUTER, TOKENS, read_table

FEW_STREAMS = 4
# Adapters, of three, that the engine's cache holds in each turn. The weights of some travel along with a request.
CACHED = (3, 2, 1)
TOKENS_OF_A_RESPONSE, TOKEN_SECONDS = 16, 0.005
ENGINE = "tensorrt_llm"
ENGINE_ALONE = ("--model-control-mode=explicit", f"--load-model={ENGINE}")
GROWTH_MB = 5  # less is noise
COPIES = 2  # of the largest adapter in shared memory


@dataclass(frozen=True, slots=True)
class Taken:
    """What the processes of a server's models have taken, by model, without the engine's. Memory is in bytes."""

    few: Mapping[str, int]  # PSS after FEW_STREAMS streams
    many: Mapping[str, int]  # PSS after `streams` streams
    resolvers: int  # processes
    shared: int  # files in /dev/shm
    engine_shared: int  # the same of the CPU engine
    faults: int  # errors and wrong responses


def processes(options: Options) -> Part:
    """Measure a server of the shipped repository after load through all of its models, and stop it.

    A server with the engine's model alone takes turns with it. There are three adapters of `rank`.
    """
    found: list[Taken] = []
    whole: list[float] = []
    alone: list[float] = []
    with scratch.directory() as directory:
        opened = scratch.paced(
            directory / "repo",
            scratch.LARGE_ADAPTERS,
            pages=scratch.LARGE_ADAPTERS,
            token_seconds=TOKEN_SECONDS,
            rank=options.rank,
            layers=options.layers,
        )
        largest = max(entry.lora_weights_nbytes for entry in read_table(opened).entries.values())
        way = Way(ENGINE, [load.body(TOKENS_OF_A_RESPONSE)], TOKENS_OF_A_RESPONSE)
        for adapters in CACHED[: options.rounds]:
            scratch.set_cached(opened, adapters)
            with scratch.serving(opened, exit_timeout=EXIT_TIMEOUT_SECONDS) as server:
                found.append(taken(server, scratch.LARGE_ADAPTERS, options.streams))
                whole.append(seconds_of(lambda: _end(server)))
            with scratch.serving(opened, exit_timeout=EXIT_TIMEOUT_SECONDS, extra=ENGINE_ALONE) as server:
                load.ask(server.http_url, {"direct": way}, rounds=3, streams=options.streams)
                alone.append(seconds_of(lambda: _end(server)))
    return part_of(options, found, whole, alone, largest)


def taken(server: Server, adapters: int, streams: int) -> Taken:
    """Put load on all models: by a few streams, and then by `streams`, for adapters in turn."""
    groups = processes_of(server.pid)
    engine = groups.pop(ENGINE)
    del groups[SERVER]
    faults = _ask(server, adapters, FEW_STREAMS)
    few = {name: pss_nbytes(pids) for name, pids in groups.items()}
    faults += _ask(server, adapters, streams)
    return Taken(
        few,
        {name: pss_nbytes(pids) for name, pids in groups.items()},
        len(groups[RESOLVER]),
        shared_memory_nbytes([pid for pids in groups.values() for pid in pids]),
        shared_memory_nbytes(engine),
        faults,
    )


def _ask(server: Server, adapters: int, streams: int) -> int:
    """Ask each model with `streams` clients, and return the number of errors and wrong responses."""
    asked = Clients(
        TOKENS,
        scratch.task_ids(adapters),
        streams=streams,
        tokens=TOKENS_OF_A_RESPONSE,
        mix="cyclic",
        requests=4 * streams,
        discarded=0.0,
    )
    client.adapters(server.http_url)
    ways = (asked, replace(asked, model=ENSEMBLE, is_text=True), replace(asked, model=ROUTER))
    return sum(clients.ask(server.http_url, way).faults for way in ways)


def _end(server: Server) -> None:
    server.send_signal(signal.SIGTERM)
    server.wait(2 * EXIT_TIMEOUT_SECONDS)


def part_of(
    options: Options, found: Sequence[Taken], whole: Sequence[float], alone: Sequence[float], largest: int
) -> Part:
    """The results of all turns, of which the worst counts.

    `whole` and `alone` are the seconds that the two servers took to stop; `largest` is the largest adapter in bytes.
    """
    many = {name: [one.many[name] for one in found] for name in found[0].many}
    gained = {name: max(one.many[name] - one.few[name] for one in found) for name in many}
    shared = [one.shared for one in found]
    return Part(
        "processes",
        f"Processes after {options.streams} streams for {scratch.LARGE_ADAPTERS} adapters of {largest / MEGA:.0f} MB",
        (
            *(series(f"{name} (PSS)", "MB", nbytes, scale=1 / MEGA) for name, nbytes in many.items()),
            series("shared memory, tritonlora's models", "MB", shared, scale=1 / MEGA),
            series("shared memory, the CPU engine", "MB", [one.engine_shared for one in found], scale=1 / MEGA),
            series("stop, all models", "s", whole),
            series("stop, the engine's model alone", "s", alone),
        ),
        (
            at_most("errors and wrong responses", sum(one.faults for one in found), 0),
            at_most(f"processes of {RESOLVER}", max(one.resolvers for one in found), 1),
            at_most(f"MB of {RESOLVER} (PSS)", max(many[RESOLVER]) / MEGA, 200),
            *(
                at_most(
                    f"MB that {name} gained from {FEW_STREAMS} to {options.streams} streams", nbytes / MEGA, GROWTH_MB
                )
                for name, nbytes in gained.items()
            ),
            at_most("copies of the largest adapter in shared memory", max(shared) / largest, COPIES),
            at_most("s that all models take longer to stop", statistics.median(whole) - statistics.median(alone), 3),
        ),
    )
