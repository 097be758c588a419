# SPDX-FileCopyrightText: the tritonlora authors
# SPDX-License-Identifier: Apache-2.0
"""`tritonlora openai`: the OpenAI-compatible door."""

from __future__ import annotations

import os
import signal
import sys
import threading
from pathlib import Path
from typing import Annotated

import typer

from tritonlora import extras, machine
from tritonlora.cli.options import Interrupted, Repo, RepoOption, command_group, from_environment
from tritonlora.machine import LOCAL, host_and_port
from tritonlora.openai.settings import API_KEY_VARIABLE, DEFAULT_PORT, DEFAULT_URL, STALL_SECONDS, Settings
from tritonlora.repository.paths import open_repository

app = command_group()


@app.command("openai")
def serve_openai(
    argument: Repo = None,
    repo: RepoOption = None,
    url: Annotated[
        str, typer.Option("--url", metavar="HOST:PORT", help="The gRPC endpoint of the running server.")
    ] = DEFAULT_URL,
    port: Annotated[int, typer.Option("--port", min=1, max=65535)] = DEFAULT_PORT,
    address: Annotated[
        str, typer.Option("--address", help="The address to listen at. Others than this machine's own need an API key.")
    ] = LOCAL,
    api_key: Annotated[
        str | None,
        typer.Option("--api-key", envvar=API_KEY_VARIABLE, show_envvar=True, help="The key that clients have to send."),
    ] = None,
    tokenizer: Annotated[
        Path | None,
        typer.Option(
            "--tokenizer", help="The tokenizer's directory; by default the one of the server's preprocessing."
        ),
    ] = None,
    base_name: Annotated[
        str | None, typer.Option("--base-name", help="The base model's name for clients; by default that on the hub.")
    ] = None,
    context_length: Annotated[
        int | None,
        typer.Option(
            "--context-length",
            min=2,
            help="Tokens of prompt and response; by default as the engine's config.json says.",
        ),
    ] = None,
    workers: Annotated[int, typer.Option("--workers", min=1, help="The number of processes.")] = 1,
    drain_seconds: Annotated[
        float, typer.Option("--drain-seconds", min=0.0, help="How long requests under way may take after SIGTERM.")
    ] = 30.0,
    stall_seconds: Annotated[
        float,
        typer.Option("--stall-seconds", min=0.1, help="Give a request up after so long without a token of the engine."),
    ] = STALL_SECONDS,
    while_stdin: Annotated[bool, typer.Option("--while-stdin", hidden=True)] = False,
) -> None:
    """Serve the OpenAI API in front of a running server: model names an adapter, or the base model."""
    extras.require("openai")
    from tritonlora.openai import server  # with FastAPI and gRPC

    if url.startswith(("http://", "https://")):
        raise typer.BadParameter(f"--url {url!r} is not HOST:PORT; give the gRPC endpoint, such as {DEFAULT_URL}")
    if argument is not None and repo is not None:
        raise typer.BadParameter("give REPO once: as the first argument, or with --repo")
    if (repository := argument or repo or from_environment()) is not None:
        open_repository(repository)  # a repository that is not there would never come to be ready
    settings = Settings(
        url=url,
        address=machine.numeric_address(address),
        port=port,
        repository=repository,
        tokenizer=tokenizer,
        base_name=base_name,
        context_length=context_length,
        api_key=api_key,
        workers=workers,
        drain_seconds=drain_seconds,
        stall_seconds=stall_seconds,
    )
    if while_stdin:
        threading.Thread(target=_end_with_stdin, daemon=True).start()

    def listening() -> None:
        sys.stdout.write(f"listening on http://{host_and_port(settings.address, port)}/v1, before {url}\n")
        sys.stdout.flush()

    try:
        server.run(settings, listening)
    except Interrupted as end:
        if end.args != (signal.SIGTERM,):
            raise


def _end_with_stdin() -> None:
    """End this process when the process that started it has ended, however that was: stdin is closed then."""
    sys.stdin.read()
    os.kill(os.getpid(), signal.SIGTERM)
