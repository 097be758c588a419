# SPDX-FileCopyrightText: the tritonlora authors
# SPDX-License-Identifier: Apache-2.0
"""Run a command: parse its arguments, call another package and print the result. No other logic is here.

Data goes to stdout, everything else to stderr. Exit codes: 0 done, 1 refused with one message, 2 usage, 130 Ctrl-C.
Each group of commands is a module, which is imported when one of its commands is looked up.
"""

from __future__ import annotations

import importlib
import io
import os
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path
from types import FrameType
from typing import Annotated, Any

import typer

from tritonlora import __version__, interrupts
from tritonlora.cli.options import Group, Interrupted, command_group
from tritonlora.cli.output import stderr
from tritonlora.errors import TritonLoraError

MODULES = {
    "demo": "demo",
    "init": "repository",
    "add": "adapters",
    "compose": "adapters",
    "remove": "adapters",
    "alias": "adapters",
    "list": "adapters",
    "warm": "warm",
    "sync": "desired_state",
    "export": "desired_state",
    "plan": "repository",
    "check": "repository",
    "convert": "convert",
    "serve": "server",
    "generate": "server",
    "top": "top",
    "openai": "openai",
    "bench": "bench",
}


class _Commands(Mapping[str, Any]):
    """Commands by name, in the order of the help. A command's module is imported when the command is looked up."""

    def __getitem__(self, name: str) -> Any:
        """The command; KeyError when there is none of that name."""
        with interrupts.held():  # an interrupt during the import would leave modules half imported
            module = importlib.import_module(f"tritonlora.cli.{MODULES[name]}")
        return typer.main.get_group(module.app).commands[name]

    def __iter__(self) -> Iterator[str]:
        """The names of the commands."""
        return iter(MODULES)

    def __len__(self) -> int:
        """The number of commands."""
        return len(MODULES)


class _Group(Group):
    def __init__(self, **settings: Any) -> None:
        super().__init__(**settings)
        self.commands: Any = _Commands()


app = command_group(
    name="tritonlora",
    cls=_Group,
    help="Serve LoRA adapters by name with NVIDIA Triton and TensorRT-LLM.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)


def main(arguments: list[str] | None = None) -> int:
    """Run one command and return its exit code. Without `arguments`, sys.argv is parsed."""
    _prepare_streams()
    try:
        with interrupts.handled(_interrupt):
            app(arguments)
    except SystemExit as end:
        return end.code if isinstance(end.code, int) else 0
    except TritonLoraError as error:
        _print_error(str(error))
        return 1
    except Interrupted:
        stderr.print("interrupted")
        return 130
    except BrokenPipeError:  # the reader of our output has closed the pipe
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1
    except OSError as error:  # a name that is too long, a directory that may not be read
        _print_error(f"{error.strerror}: {error.filename!r}" if error.filename else str(error))
        return 1
    return 0


def _prepare_streams() -> None:
    """Replace a closed stream with /dev/null, and write a name that is not valid text with escapes."""
    for name, mode in (("stdin", "r"), ("stdout", "w"), ("stderr", "w")):
        if getattr(sys, name) is None:
            setattr(sys, name, Path(os.devnull).open(mode))  # noqa: SIM115  until the end
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper) and stream.errors == "strict":
            stream.reconfigure(errors="backslashreplace")


def _print_error(message: str) -> None:
    stderr.print("[bold red]error:[/] ", end="")
    stderr.print(message, markup=False, highlight=False, soft_wrap=True)


def _interrupt(number: int, _frame: FrameType | None) -> None:
    # Not KeyboardInterrupt: typer would catch it and exit with code 1.
    raise Interrupted(number)


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
