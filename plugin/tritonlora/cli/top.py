# SPDX-FileCopyrightText: the tritonlora authors
# SPDX-License-Identifier: Apache-2.0
"""`tritonlora top`: the live view of a running server."""

from __future__ import annotations

import functools
import itertools
import json
import sys
import time
from datetime import datetime, timezone
from typing import Annotated

import typer
from rich.text import Text

from tritonlora.cli.options import MetricsPort, Url, command_group
from tritonlora.cli.output import AsJson, stdout
from tritonlora.errors import ServerError
from tritonlora.launch import client
from tritonlora.top.live import views, watch
from tritonlora.top.look import look
from tritonlora.top.screen import SORTS, Head, draw
from tritonlora.top.view import View, document

app = command_group()


def _known(sort: str) -> str:
    if sort not in SORTS:
        raise typer.BadParameter(f"no column {sort!r}; there are {', '.join(SORTS)}")
    return sort


@app.command()
def top(
    url: Url = client.DEFAULT_URL,
    metrics_port: MetricsPort = 8002,
    interval: Annotated[
        float, typer.Option("--interval", min=0.5, max=3600.0, help="Seconds between two looks.")
    ] = 2.0,
    sort: Annotated[
        str, typer.Option("--sort", metavar="COLUMN", help=f"One of {', '.join(SORTS)}.", callback=_known)
    ] = "requests",
    once: Annotated[bool, typer.Option("--once", help="Show one view, after two looks, and end.")] = False,
    as_json: AsJson = False,
) -> None:
    """Show the adapters of a running server: what each one is asked for, waits for and loads.

    Rates and percentiles are those since the last look. All else is since the server's start. The exit code is 1 if no
    server answers at the start. If the server goes away later, the view says so and goes on.
    """
    look_once = functools.partial(look, url, client.metrics_url(url, metrics_port))
    look_once()  # ServerError where nobody answers; a server that goes away later is waited for
    on_terminal = sys.stdout.isatty() and not stdout.is_dumb_terminal
    if on_terminal and not once and not as_json:
        watch(look_once, stdout, url=url, interval=interval, sort=sort)
        return
    started = heard = time.monotonic()
    for number, view in enumerate(itertools.islice(views(look_once, interval), 2 if once else None)):
        if once and view.problem is not None:
            raise ServerError(view.problem)
        now = time.monotonic()
        heard = now if view.problem is None else heard
        if number or view.problem is not None:  # the first view has no rates
            _write(view, Head(url, now - started, now - heard), sort, as_json=as_json)


def _write(view: View, head: Head, sort: str, *, as_json: bool) -> None:
    """Write a view to stdout: one line of JSON, or as on a terminal; in a pipe with all rows and whole names."""
    if as_json:
        now = datetime.now(timezone.utc).isoformat(timespec="milliseconds")
        sys.stdout.write(json.dumps({"time": now, "url": head.url, **document(view)}) + "\n")
        sys.stdout.flush()
        return
    width, height = (stdout.width, stdout.height - 1) if sys.stdout.isatty() else (None, None)
    lines = draw(view, head, sort, width=width, height=height)
    stdout.print(Text("\n").join(lines), soft_wrap=True)
