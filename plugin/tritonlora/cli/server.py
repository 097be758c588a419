# SPDX-FileCopyrightText: the tritonlora authors
# SPDX-License-Identifier: Apache-2.0
"""The commands serve and generate, for a server."""

from __future__ import annotations

import contextlib
import os
import signal
import sys
from typing import Annotated

import typer

from tritonlora import extras, machine
from tritonlora.cli.options import (
    GrpcPort,
    HttpPort,
    Interrupted,
    MetricsPort,
    RepoOption,
    Url,
    command_group,
    repository_of,
    some_path,
    text_of,
)
from tritonlora.cli.output import AsJson, print_json, print_note, stderr
from tritonlora.errors import ServerError, one_message
from tritonlora.launch import client, diagnosis, door, tritonserver
from tritonlora.launch import serve as serving
from tritonlora.machine import Ports
from tritonlora.openai.settings import API_KEY_VARIABLE, check_access
from tritonlora.repository.paths import open_repository
from tritonlora.repository.state import read_state
from tritonlora.serving.routing import SPLIT_KEY

app = command_group()


@app.command()
def serve(
    words: Annotated[
        list[str] | None,
        typer.Argument(metavar="[REPO] [-- OPTION...]", help="The model repository, and options of tritonserver."),
    ] = None,
    repo: RepoOption = None,
    http_port: HttpPort = 8000,
    grpc_port: GrpcPort = 8001,
    metrics_port: MetricsPort = 8002,
    address: Annotated[
        str, typer.Option("--address", help="The address that all endpoints listen on; 0.0.0.0: every interface.")
    ] = "127.0.0.1",
    timeout: Annotated[
        float, typer.Option("--ready-timeout", help="Seconds to wait until the server is ready.")
    ] = 3600.0,
    world_size: Annotated[
        int | None,
        typer.Option("--world-size", min=1, help="Processes of the engine; by default as its config.json says."),
    ] = None,
    verify: Annotated[
        bool,
        typer.Option(
            "--verify", help="When ready, send a request to every warm adapter, and one for an unregistered id."
        ),
    ] = False,
    keep_going: Annotated[
        bool,
        typer.Option(
            "--keep-going",
            help="When a model's process dies, print it and keep the server running; else stop the server.",
        ),
    ] = False,
    openai_port: Annotated[
        int | None,
        typer.Option(
            "--openai-port", min=1, max=65535, help="Serve the OpenAI API there, too, as `tritonlora openai` does."
        ),
    ] = None,
    print_command: Annotated[
        bool, typer.Option("--print-command", help="Print the command that would be run; run nothing.")
    ] = False,
) -> None:
    """Start tritonserver on the repository and print which adapters are ready. Options after -- go to tritonserver."""
    first = [word for word in (words or [])[:1] if not word.startswith("-")]
    root, extra = repository_of(some_path(first[0]) if first else None, repo), (words or [])[len(first) :]
    if extra and not extra[0].startswith("-"):
        raise typer.BadParameter(f"{extra[0]!r} is one word too many; options of tritonserver go after --")
    tritonserver.check_extra(extra)
    address = machine.numeric_address(address)
    opened, ports = open_repository(root), Ports(http_port, grpc_port, metrics_port, openai_port)
    if print_command:
        line = serving.command_line(opened, ports, address=address, extra=extra, world_size=world_size)
        sys.stdout.write(f"{line}\n")
        return
    if openai_port is not None:
        extras.require("openai")
        check_access(address, os.environ.get(API_KEY_VARIABLE))
    server = serving.serve(
        opened,
        ports=ports,
        address=address,
        extra=extra,
        world_size=world_size,
        on_log=lambda line: stderr.print(line, markup=False, highlight=False, soft_wrap=True),
        keep_going=keep_going,
        on_note=print_note,
    )
    machine.check_ports(ports, address)
    state = read_state(opened)
    warm = sorted(name for name, entry in state.table.entries.items() if entry.warm)
    with server as running:
        with stderr.status("starting tritonserver") as status:
            running.wait_until_ready(timeout, on_progress=lambda what, *_: status.update(what))
        config = state.models.served_config(opened.target)
        for note in diagnosis.version_notes(opened, config, running.version()):
            print_note(note)
        is_loaded = running.is_loaded(opened.target)
        if verify and not is_loaded:
            raise ServerError(
                f"model {opened.target!r} is not loaded, so no adapter answers; load it with: tritonlora serve -- "
                f"--model-control-mode=explicit --load-model={opened.target}"
            )
        if verify and (problems := diagnosis.verify(running.http_url, opened, config, state.table)):
            raise ServerError(one_message("the server is ready, and adapters do not answer as they should", problems))
        listening = f"listening at {address}: http {ports.http}, grpc {ports.grpc}, metrics {ports.metrics}"
        loaded = f"adapters loaded at start: {', '.join(warm) or 'none yet'}"
        if not is_loaded:
            loaded = f"no adapter is loaded, as model {opened.target!r} is not"
        sys.stdout.write(f"ready on http://{running.http_url} ({listening}); {loaded}\n")
        if verify:
            sys.stdout.write("verified: each of them answers, and an unregistered lora_task_id is refused\n")
        sys.stdout.flush()
        try:
            with contextlib.ExitStack() as beside:
                api = None
                if openai_port is not None:
                    started = door.opened(root, running.grpc_url, address=address, port=openai_port)
                    api = beside.enter_context(started)
                    sys.stdout.write(f"OpenAI API on http://{machine.host_and_port(address, openai_port)}/v1\n")
                    sys.stdout.flush()
                exit_status = running.wait() if api is None else door.wait(api, running)
        except Interrupted as end:
            if end.args != (signal.SIGTERM,):
                raise
            exit_status = 0  # this is how systemd, Docker and Kubernetes end a service
    if exit_status:
        raise ServerError(f"tritonserver ended by itself, with status {exit_status}")


@app.command()
def generate(
    prompt: Annotated[str, typer.Argument(help="The text to send; '-' reads standard input.")],
    lora_name: Annotated[
        str | None, typer.Option("--lora-name", help="The adapter's name; without it: the base model.")
    ] = None,
    url: Url = "localhost:8000",
    max_tokens: Annotated[int, typer.Option("--max-tokens", min=1)] = 64,
    model: Annotated[str, typer.Option("--model", help="The model to ask.")] = "ensemble",
    split_key: Annotated[
        str | None,
        typer.Option(
            "--split-key", help="For an alias of several adapters: equal keys get the same one; such as a user's id."
        ),
    ] = None,
    as_json: AsJson = False,
) -> None:
    """Send a prompt to a running server and print the response as it arrives."""
    text = text_of(sys.stdin) if prompt == "-" else prompt
    inputs = {} if split_key is None else {SPLIT_KEY: split_key}
    pieces = client.generate(text, lora_name=lora_name, max_tokens=max_tokens, url=url, model=model, inputs=inputs)
    if as_json:
        print_json({"lora_name": lora_name, "text_output": "".join(pieces)})
        return
    for piece in pieces:
        sys.stdout.write(piece)
        sys.stdout.flush()
    sys.stdout.write("\n")
