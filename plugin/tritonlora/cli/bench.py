# SPDX-FileCopyrightText: the tritonlora authors
# SPDX-License-Identifier: Apache-2.0
"""`tritonlora bench`: the benchmarks."""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any

import typer

from tritonlora import extras
from tritonlora.bench.clients import MIXES
from tritonlora.bench.measured import Part, ratio_rows, series_rows
from tritonlora.cli.options import command_group
from tritonlora.cli.output import AsJson, print_json, print_table, stderr


def _drawable(plot: Path | None) -> Path | None:
    """Check that `plot` can be written, before a measurement that takes minutes. Raises typer.BadParameter."""
    if plot is None:
        return None
    if plot.suffix.lower() != ".png":
        raise typer.BadParameter(f"{str(plot)!r} is not the name of a PNG file; give FILE.png")
    if plot.is_dir() or not os.access(plot if plot.exists() else plot.parent, os.W_OK):
        raise typer.BadParameter(f"{str(plot)!r} cannot be written; give a file in a directory that is there")
    return plot


Plot = Annotated[Path | None, typer.Option("--plot", help="Draw the result into this PNG file.", callback=_drawable)]

app = command_group()
bench = command_group(help="Benchmarks: ratios taken in one run on one machine.", no_args_is_help=True)
app.add_typer(bench, name="bench")


@bench.command("convert")
def bench_convert(
    ranks: Annotated[str, typer.Option("--ranks", help="Ranks to measure, separated by commas.")] = "8,16,64",
    rounds: Annotated[
        int, typer.Option("--rounds", min=1, help="How often each way is timed; the shortest time counts.")
    ] = 15,
    plot: Plot = None,
    as_json: AsJson = False,
) -> None:
    """Time conversion (reading, checks, writing) of a Llama 8B adapter.

    The time is compared with a copy of the output file, and with the straightforward way in torch (load, cast, scale,
    pad, stack, write). The adapter is bfloat16, on all linear layers, in an in-memory file system.
    """
    extras.require("bench")
    from tritonlora.bench import convert as benchmark  # with torch

    try:
        numbers = [int(rank) for rank in ranks.split(",")]
    except ValueError:
        raise typer.BadParameter(f"{ranks!r} is not a list of ranks") from None
    with stderr.status(f"measuring ranks {ranks}"):
        results = benchmark.run(numbers, rounds=rounds)
    if plot:
        benchmark.draw(results, plot)
    if as_json:
        print_json(results)
    else:
        sys.stdout.write(benchmark.table(results) + "\n")


@bench.command("route")
def bench_route(
    part: Annotated[
        list[str] | None,
        typer.Option("--part", help="ttft, tokens, recovery, lookup, memory, processes, streams or cache; repeat it."),
    ] = None,
    rounds: Annotated[int | None, typer.Option("--rounds", min=1, help="How often each part is timed: 7.")] = None,
    streams: Annotated[
        int | None, typer.Option("--streams", min=1, help="Streams at a time: 64; 32 in a case of cache.")
    ] = None,
    tokens: Annotated[
        int | None, typer.Option("--tokens", min=1, help="Tokens of each stream: 128; 32 in a case of cache.")
    ] = None,
    rank: Annotated[
        int | None,
        typer.Option(
            "--rank",
            min=1,
            help="Rank of adapters of a Llama 8B: 32, 264 MB each. Without it, a case of cache has small adapters.",
        ),
    ] = None,
    requests: Annotated[
        int | None,
        typer.Option(
            "--requests", min=1, help="Requests: 100,000 in memory; a case of cache has --seconds without it."
        ),
    ] = None,
    pace: Annotated[
        float | None,
        typer.Option("--pace", min=0.0, help="The engine's seconds a token: 0.04; 0.02 in a case of cache."),
    ] = None,
    seconds: Annotated[
        float | None, typer.Option("--seconds", min=1.0, help="Seconds of each measurement in streams and cache: 20.")
    ] = None,
    adapters: Annotated[
        int | None, typer.Option("--adapters", min=1, help="A case of cache: the adapters that clients ask for: 32.")
    ] = None,
    pages: Annotated[
        int | None, typer.Option("--pages", min=1, help="A case of cache: adapters that the engine's cache holds: 16.")
    ] = None,
    mix: Annotated[
        str | None,
        typer.Option(
            "--mix",
            help="A case of cache: how clients choose adapters: uniform (at random), zipf, cyclic or sticky.",
        ),
    ] = None,
    max_tokens: Annotated[
        int | None,
        typer.Option(
            "--max-tokens", min=16, help="A case of cache: max_tokens of a request: as many as the response has."
        ),
    ] = None,
    plot: Plot = None,
    as_json: AsJson = False,
) -> None:
    """Compare requests through the router with requests to the engine's model, on a real server.

    The engine's model is the synthetic engine. The part cache measures a table of cases. With --adapters, --pages,
    --mix or --max-tokens it measures that one case.
    """
    extras.require("bench")
    from tritonlora.bench import measured, route  # with torch

    parts = part or list(route.PARTS)
    if unknown := [name for name in parts if name not in route.PARTS]:
        raise typer.BadParameter(f"no part {unknown[0]!r}; there are {', '.join(route.PARTS)}")
    shared = _given(streams=streams, tokens=tokens, rank=rank, requests=requests, token_seconds=pace)
    case = _given(adapters=adapters, pages=pages, mix=mix, max_tokens=max_tokens)
    if mix and mix not in MIXES:
        raise typer.BadParameter(f"no mix {mix!r}; there are {', '.join(MIXES)}")
    if case and "cache" not in parts:
        raise typer.BadParameter(
            "--adapters, --pages, --mix and --max-tokens are for the part cache; give --part cache"
        )
    options = route.Options(
        **shared, **_given(rounds=rounds, seconds=seconds), case=route.Case(**case, **shared) if case else None
    )
    with stderr.status("measuring") as status:
        results = list(route.run(parts, options, lambda name: status.update(f"measuring {name}")))
    if plot:
        measured.draw(results, plot)
    _print(results, as_json)


def _given(**options: Any) -> dict[str, Any]:
    """The options that were given: the others have the benchmark's defaults."""
    return {name: value for name, value in options.items() if value is not None}


def _print(results: Sequence[Part], as_json: bool) -> None:
    if as_json:
        print_json(results)
        return
    print_table(("part", "what", "p50", "p99", "unit"), series_rows(results))
    print_table(("part", "ratio", "value", "target", "reached"), ratio_rows(results))
    sys.stdout.write("".join(f"{one.name}: {note}\n" for one in results for note in one.notes))


@bench.command("openai")
def bench_openai(
    streams: Annotated[int, typer.Option("--streams", min=1, help="Streams at a time.")] = 128,
    tokens: Annotated[int, typer.Option("--tokens", min=1, help="Tokens of each stream.")] = 256,
    rounds: Annotated[int, typer.Option("--rounds", min=1, help="How often the streams are timed.")] = 3,
    pace: Annotated[float, typer.Option("--pace", min=0.0, help="The engine's seconds a token.")] = 0.04,
    as_json: AsJson = False,
) -> None:
    """Compare streams through the OpenAI API with streams of the engine's model, and profile the door.

    The engine's model is the synthetic engine.
    """
    extras.require("bench")
    from tritonlora.bench import openai as benchmark

    options = benchmark.Options(streams=streams, tokens=tokens, rounds=rounds, token_seconds=pace)
    with stderr.status("measuring"):
        results = benchmark.run(options)
    _print(results, as_json)


@bench.command("mix")
def bench_mix(
    adapters: Annotated[int, typer.Option("--adapters", min=2)] = 100,
    pages: Annotated[int, typer.Option("--pages", min=1, help="Adapters that the engine's cache holds.")] = 16,
    clients: Annotated[int, typer.Option("--clients", min=1)] = 200,
    seconds: Annotated[float, typer.Option("--seconds", min=1.0)] = 300.0,
    tokens: Annotated[int, typer.Option("--tokens", min=1, help="Tokens of a response, on average.")] = 32,
    think: Annotated[float, typer.Option("--think", min=0.0, help="Seconds between two requests of a client.")] = 0.5,
    pace: Annotated[float, typer.Option("--pace", min=0.0, help="The engine's seconds a token.")] = 0.04,
    leavers: Annotated[
        float, typer.Option("--leavers", min=0.0, max=1.0, help="The share of requests whose client leaves.")
    ] = 0.05,
    change: Annotated[float, typer.Option("--change", min=0.1, help="Seconds between two changes of adapters.")] = 2.0,
    door: Annotated[bool, typer.Option("--door/--no-door", help="Let clients ask the OpenAI API, too.")] = True,
    as_json: AsJson = False,
) -> None:
    """Put a mix of load on a server: many adapters, a small cache, adapters that change, clients that leave.

    Clients ask over HTTP, gRPC and the OpenAI API. The engine's model is the synthetic engine, so each response is
    checked. The exit code is 1 if a response is of another adapter, or an error has no reason.
    """
    extras.require("bench")
    from tritonlora.bench import mix

    options = mix.Options(
        adapters=adapters,
        pages=pages,
        clients=clients,
        seconds=seconds,
        tokens=tokens,
        think=think,
        token_seconds=pace,
        leavers=leavers,
        change_seconds=change,
        door=door,
    )
    with stderr.status("measuring") as status:
        result, is_sound = mix.run(options, status.update)
    _print([result], as_json)
    if not is_sound:
        raise typer.Exit(1)
