# SPDX-FileCopyrightText: the tritonlora authors
# SPDX-License-Identifier: Apache-2.0
"""The command warm: have a running engine load adapters, and pin them."""

from __future__ import annotations

import sys
import time
from collections.abc import Collection, Iterator
from dataclasses import dataclass, replace
from typing import Annotated, Any

import typer
from rich.progress import Progress

from tritonlora.cli.options import RepoOption, command_group, repository_and
from tritonlora.cli.output import NO_RESTART, AsJson, print_json, print_note, stderr
from tritonlora.errors import ServerError
from tritonlora.launch import client
from tritonlora.repository import registry
from tritonlora.repository.paths import open_repository
from tritonlora.repository.registry import Pinned
from tritonlora.serving.listing import HELD

app = command_group()


@dataclass(frozen=True, slots=True)
class Warmed:
    """What became of one adapter that a server was asked to load."""

    name: str  # the adapter's, or as it was given if the server does not know it
    result: str  # "loaded", "held" (it was there already), "evicted" (it was loaded, and evicted again) or "refused"
    reason: str | None = None  # of "refused"
    seconds: float = 0.0
    state: str | None = None  # in the end, see `serving.listing`; None: of a name that the server does not know


@app.command()
def warm(
    words: Annotated[
        list[str],
        typer.Argument(
            metavar="NAME...",
            help="Adapters, or aliases for all adapters that they lead to. With --pin: [REPO] NAME...",
        ),
    ],
    url: Annotated[
        str | None,
        typer.Option(
            "--url", metavar="HOST:PORT", help=f"The server's HTTP endpoint; by default {client.DEFAULT_URL}."
        ),
    ] = None,
    pin: Annotated[
        bool, typer.Option("--pin", help="Keep them in the engine from now on. Only with --url, wait for a server.")
    ] = False,
    unpin: Annotated[bool, typer.Option("--unpin", help="Let them go again.")] = False,
    repo: RepoOption = None,
    timeout: Annotated[
        float, typer.Option("--timeout", min=0, help="Seconds until it gives up, for all of them.")
    ] = 600,
    as_json: AsJson = False,
) -> None:
    """Have a running engine load adapters before their first request. --pin keeps them there; --unpin lets them go.

    The exit code is 1 if the engine does not have one of them in the end.
    """
    if pin and unpin:
        raise typer.BadParameter("give --pin or --unpin, not both")
    if unpin and url is not None:
        raise typer.BadParameter("--unpin goes without --url: the server lets them go by itself")
    if not (pin or unpin) and (repo is not None or "/" in words[0]):  # no adapter's name has a slash
        raise typer.BadParameter(
            f"REPO ({str(repo or words[0])!r}) goes with --pin and --unpin; without them, warm asks the server at --url"
        )
    pinned: list[Pinned] = []
    names = words
    if pin or unpin:
        root, names = repository_and(words, repo, None)
        pinned = registry.pin(open_repository(root), names, pinned=pin)
        if not as_json:
            sys.stdout.write("".join(map(_pin_line, pinned)))
            if any(one.before != one.pinned for one in pinned):
                print_note(NO_RESTART if unpin else PINS_COUNT)
    warmed = [] if (pin or unpin) and url is None else _warmed(names, url or client.DEFAULT_URL, timeout)
    if as_json:
        print_json({"pins": pinned, "warmed": warmed})
    else:
        sys.stdout.write("".join(map(_line, warmed)))
    if any(one.result not in _THERE for one in warmed):
        raise typer.Exit(1)


PINS_COUNT = "a running server loads them within seconds; nothing has to be restarted"
_THERE = {"loaded": "loaded", "held": "was there already"}


def _pin_line(one: Pinned) -> str:
    if one.before == one.pinned:
        return f"{one.name} {'was pinned already' if one.pinned else 'was not pinned'}\n"
    if not one.pinned:
        return f"{one.name} no longer pinned\n"
    return f"{one.name} pinned: {one.pages} page{'s' if one.pages != 1 else ''} of the engine's cache\n"


def _line(one: Warmed) -> str:
    if one.result in _THERE:
        doubt = "; the engine may have evicted it since" if one.state == "unknown" else ""
        return f"{one.name} {_THERE[one.result]} ({one.seconds:.2f} s){doubt}\n"
    if one.result == "evicted":
        return f"{one.name} loaded, and evicted again: the engine's cache does not hold all of them\n"
    return f"{one.name} not loaded: {one.reason}\n"


def _warmed(names: list[str], url: str, timeout: float) -> list[Warmed]:
    """Ask the server for one name after the other, with a progress bar. A refused one does not stop the others."""
    give_up_at = time.monotonic() + timeout
    client.adapters(url)  # ends the command where no server answers
    found: dict[str, Warmed] = {}
    with Progress(console=stderr, transient=True, disable=not stderr.is_terminal) as progress:
        task = progress.add_task("loading", total=len(names))
        for name in dict.fromkeys(names):
            progress.update(task, description=f"loading {name}")
            found |= {one.name: one for one in _asked(name, url, give_up_at, timeout)}
            progress.advance(task)
    states = _states(url, found) if found else {}
    return [_with_state(one, states.get(one.name)) for one in found.values()]


def _states(url: str, names: Collection[str]) -> dict[str, str]:
    """The states of adapters, once the server knows them all, or after SETTLING_SECONDS.

    While requests are under way, the server may not know whether a later load has evicted an adapter.
    """
    deadline = time.monotonic() + SETTLING_SECONDS
    while True:
        states = {name: about["state"] for name, about in client.adapters(url).items() if name in names}
        if "unknown" not in states.values() or time.monotonic() >= deadline:
            return states
        time.sleep(SETTLING_SECONDS / 10)


SETTLING_SECONDS = 1.0


def _with_state(one: Warmed, state: str | None) -> Warmed:
    is_lost = one.result in _THERE and state not in (*HELD, "unknown")
    return replace(one, result="evicted" if is_lost else one.result, state=state)


def _asked(name: str, url: str, give_up_at: float, timeout: float) -> Iterator[Warmed]:
    began = time.monotonic()
    late = f"the server has not loaded it within {timeout:g} s; it may still do so"
    if began >= give_up_at:
        yield Warmed(name, "refused", f"not asked: {timeout:g} s are over; raise --timeout")
        return
    try:
        listing: dict[str, dict[str, Any]] = client.load(name, url, timeout=give_up_at - began)
    except ServerError as error:
        yield Warmed(name, "refused", late if time.monotonic() >= give_up_at else str(error))
        return
    seconds = time.monotonic() - began
    for adapter, about in listing.items():
        yield Warmed(adapter, about["load"]["result"], about["load"].get("reason"), seconds)
