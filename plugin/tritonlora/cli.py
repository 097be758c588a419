# SPDX-FileCopyrightText: the tritonlora authors
# SPDX-License-Identifier: Apache-2.0
"""The command line. It adds no logic: each command parses its words, calls one module and prints what that returns.

Data goes to stdout, everything else to stderr. Exit codes: 0 done, 1 refused with one message, 2 usage, 130 Ctrl-C.
Modules that import torch are imported inside the commands that need them.
"""

from __future__ import annotations

import dataclasses
import json
import signal
import sys
from pathlib import Path
from types import FrameType
from typing import Annotated, Any

import click
import typer
from rich.console import Console
from rich.table import Table

from tritonlora import __version__
from tritonlora.errors import TritonLoraError

app = typer.Typer(
    name="tritonlora",
    help="Serve LoRA adapters by name with NVIDIA Triton and TensorRT-LLM.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)
stdout = Console()
stderr = Console(stderr=True)

Repo = Annotated[
    Path, typer.Option("--repo", envvar="TRITONLORA_REPO", metavar="REPO", help="The model repository.")
]
AsJson = Annotated[bool, typer.Option("--json", help="Print JSON.")]
DryRun = Annotated[bool, typer.Option("--dry-run", help="Say what would be done; write nothing.")]
Dtype = Annotated[
    str | None, typer.Option("--dtype", help="bfloat16, float16 or float32; by default the engine's.")
]
Base = Annotated[
    Path | None, typer.Option("--base", help="Directory of the base model's checkpoint.", exists=True, file_okay=False)
]
Url = Annotated[str, typer.Option("--url", metavar="HOST:PORT", help="The server's HTTP endpoint.")]


def main(arguments: list[str] | None = None) -> int:
    """Run one command; its exit code."""
    for number in (signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, _interrupt)
    try:
        return int(app(arguments, standalone_mode=False) or 0)
    except TritonLoraError as error:
        stderr.print(f"[bold red]error:[/] ", end="")
        stderr.print(str(error), markup=False, highlight=False, soft_wrap=True)
        return 1
    except click.ClickException as error:
        error.show()
        return error.exit_code
    except (KeyboardInterrupt, click.exceptions.Abort):
        stderr.print("interrupted")
        return 130
    except BrokenPipeError:
        sys.stderr.close()
        return 1


def _interrupt(_number: int, _frame: FrameType | None) -> None:
    """Let a termination clean up the way Ctrl-C does."""
    raise KeyboardInterrupt


def _print_json(value: object) -> None:
    sys.stdout.write(json.dumps(value, indent=2, default=_jsonable) + "\n")


def _jsonable(value: Any) -> Any:  # noqa: ANN401
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return dataclasses.asdict(value)
    return str(value)


def _version(value: bool) -> None:
    if value:
        sys.stdout.write(f"tritonlora {__version__}\n")
        raise typer.Exit


@app.callback()
def _options(
    _version_flag: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Print the version.")
    ] = False,
) -> None:
    pass


@app.command()
def add(
    name: Annotated[str, typer.Argument(help="The name that clients will send.")],
    adapter_dir: Annotated[Path, typer.Argument(help="The PEFT adapter's directory.")],
    repo: Repo,
    warmup: Annotated[bool, typer.Option("--warmup/--no-warmup", help="Load it at start, or on first use.")] = True,
    task_id: Annotated[int | None, typer.Option("--task-id", min=1, help="Its lora_task_id; never used before.")] = None,
    dtype: Dtype = None,
    base: Base = None,
    dry_run: DryRun = False,
    as_json: AsJson = False,
) -> None:
    """Convert an adapter, write its warmup files and register its name."""
    from tritonlora import repository

    opened = repository.open_repository(repo)
    with stderr.status(f"converting {name}"):
        added = repository.add(
            opened, name, adapter_dir, warm=warmup, task_id=task_id, dtype=dtype, base=base, dry_run=dry_run
        )
    for remark in added.remarks:
        stderr.print(f"note: {remark}", markup=False, highlight=False, soft_wrap=True)
    if as_json:
        _print_json(added)
        return
    did = "is unchanged" if added.unchanged else "would be added" if dry_run else "added"
    sys.stdout.write(f"{name} {did}: lora_task_id {added.entry.lora_task_id}, {_size(added.entry.lora_weights_nbytes)}\n")


@app.command()
def remove(
    name: Annotated[str, typer.Argument(help="The adapter's name.")], repo: Repo, as_json: AsJson = False
) -> None:
    """Take an adapter out of the repository. Its lora_task_id is never used again."""
    from tritonlora import repository

    entry = repository.remove(repository.open_repository(repo), name)
    if as_json:
        _print_json({"name": name, "entry": entry})
    else:
        sys.stdout.write(f"{name} removed: lora_task_id {entry.lora_task_id} is retired\n")


@app.command("list")
def list_adapters(repo: Repo, as_json: AsJson = False) -> None:
    """List the registered adapters."""
    from tritonlora import repository

    table = repository.read_table(repository.open_repository(repo))
    if as_json:
        _print_json({name: entry for name, entry in sorted(table.entries.items())})
        return
    columns = ("lora_name", "lora_task_id", "rank", "modules", "size", "pages", "start")
    rows = [
        (
            name,
            str(entry.lora_task_id),
            ",".join(map(str, entry.adapter_sizes)),
            ",".join(entry.modules),
            _size(entry.lora_weights_nbytes),
            str(entry.pages or "?"),
            "warm" if entry.warm else "on first use",
        )
        for name, entry in sorted(table.entries.items())
    ]
    _print_table(columns, rows)


def _print_table(columns: tuple[str, ...], rows: list[tuple[str, ...]]) -> None:
    """A table: drawn on a terminal, tab-separated lines in a pipe."""
    if not stdout.is_terminal:
        sys.stdout.write("".join("\t".join(row) + "\n" for row in [columns, *rows]))
        return
    table = Table(*columns)
    for row in rows:
        table.add_row(*row)
    stdout.print(table)


def _size(nbytes: float) -> str:
    for unit in ("B", "KiB", "MiB"):
        if nbytes < 1024:
            return f"{nbytes:.0f} {unit}" if unit == "B" else f"{nbytes:.1f} {unit}"
        nbytes /= 1024
    return f"{nbytes:.1f} GiB"


@app.command()
def generate(
    prompt: Annotated[str, typer.Argument(help="The text to send; '-' reads standard input.")],
    lora_name: Annotated[str | None, typer.Option("--lora-name", help="The adapter; none: the base model.")] = None,
    url: Url = "localhost:8000",
    max_tokens: Annotated[int, typer.Option("--max-tokens", min=1)] = 64,
    model: Annotated[str, typer.Option("--model", help="The model to ask.")] = "ensemble",
    as_json: AsJson = False,
) -> None:
    """Ask a running server, streaming the answer to the terminal."""
    from tritonlora import client

    text = sys.stdin.read() if prompt == "-" else prompt
    pieces = client.generate(text, lora_name=lora_name, max_tokens=max_tokens, url=url, model=model)
    if as_json:
        _print_json({"lora_name": lora_name, "text_output": "".join(pieces)})
        return
    for piece in pieces:
        sys.stdout.write(piece)
        sys.stdout.flush()
    sys.stdout.write("\n")
