# SPDX-FileCopyrightText: the tritonlora authors
# SPDX-License-Identifier: Apache-2.0
"""Options and arguments that several commands share."""

from __future__ import annotations

import os
import re
from pathlib import Path
from typing import Annotated, Any, TextIO

import typer
from typer.core import TyperGroup

from tritonlora import extras, interrupts
from tritonlora.errors import TritonLoraError

REPO_VARIABLE = "TRITONLORA_REPO"


class Interrupted(BaseException):
    """A signal, its number in `args`, asked the command to end. Each caller cleans up as the exception passes."""


class Group(TyperGroup):
    """A group of commands whose help has the first sentence of each command, also in a narrow terminal."""

    def format_commands(self, ctx: Any, formatter: Any) -> None:
        """Write the commands of the group and what each one does."""
        commands = ((name, self.get_command(ctx, name)) for name in self.list_commands(ctx))
        with formatter.section("Commands"):
            formatter.write_dl([(name, one.get_short_help_str(_WHOLE_SENTENCE)) for name, one in commands if one])


_WHOLE_SENTENCE = 1000  # characters; the formatter breaks it into lines


def command_group(**settings: Any) -> typer.Typer:
    """A group of commands with plain help, in which no name is cut off. Help of rich cuts names at 60 columns."""
    return typer.Typer(cls=settings.pop("cls", Group), rich_markup_mode=None, **settings)


def some_path(text: str) -> Path:
    """The path in `text`. Raises typer.BadParameter for "".

    A shell variable that is not set gives "", and Path("") would be the current directory.
    """
    if not text:
        raise typer.BadParameter("it is empty; give a directory")
    return Path(text)


Repo = Annotated[
    Path | None,
    typer.Argument(
        help=f"The model repository; by default --repo, or {REPO_VARIABLE}.",
        metavar="REPO",
        parser=some_path,
        show_default=False,
    ),
]
RepoOption = Annotated[
    Path | None,
    typer.Option("--repo", metavar="REPO", help="The model repository, in place of the argument.", parser=some_path),
]
DryRun = Annotated[bool, typer.Option("--dry-run", help="Say what would be done; write nothing.")]
Warmup = Annotated[bool, typer.Option("--warmup/--no-warmup", help="Load it at start, or on first use.")]
Dtype = Annotated[str | None, typer.Option("--dtype", help="bfloat16, float16 or float32; by default the engine's.")]
AllowNonfinite = Annotated[bool, typer.Option("--allow-nonfinite", help="Take NaN and infinite weights as they are.")]
Base = Annotated[
    Path | None, typer.Option("--base", help="Directory of the base model's checkpoint.", exists=True, file_okay=False)
]
HttpPort = Annotated[int, typer.Option("--http-port", min=1, max=65535)]
GrpcPort = Annotated[int, typer.Option("--grpc-port", min=1, max=65535)]
MetricsPort = Annotated[int, typer.Option("--metrics-port", min=1, max=65535)]


def _nbytes(text: str) -> int:
    """The number of bytes in a text like "85899345920", "80GB" or "80GiB". Raises typer.BadParameter."""
    match = re.fullmatch(r"(?P<number>\d+(?:\.\d+)?) ?(?P<unit>[kKMGT]?i?)B?", text.strip(), re.ASCII)
    unit = match["unit"].upper() if match else ""
    nbytes = (
        int(float(match["number"]) * (1024 if "I" in unit else 1000) ** " KMGT".index(unit[:1] or " ")) if match else 0
    )
    if not 0 < nbytes < 1 << 50:
        raise typer.BadParameter(f"{text!r} is not a number of bytes; give for example 85899345920 or 80GiB")
    return nbytes


GpuMemory = Annotated[
    int | None,
    typer.Option(
        "--gpu-memory",
        metavar="BYTES",
        help="Free memory of each GPU once the engine's weights are loaded, like 85899345920 or 80GiB.",
        parser=_nbytes,
        show_default=False,
    ),
]
Offline = Annotated[
    bool, typer.Option("--offline", help="Use no network: take what earlier downloads left on this machine.")
]
AllowSource = Annotated[
    list[str] | None,
    typer.Option(
        "--allow-source",
        metavar="PREFIX",
        help="Take only sources that begin so, like hf://my-org/; repeat it for several.",
        show_default=False,
    ),
]
Url = Annotated[str, typer.Option("--url", metavar="HOST:PORT", help="The server's HTTP endpoint.")]


def repository_of(argument: Path | None, option: Path | None) -> Path:
    """REPO, from the argument, from --repo, or from TRITONLORA_REPO.

    Raises typer.BadParameter if REPO is not given, or is given as an argument and with --repo.
    """
    if argument is not None and option is not None:
        raise typer.BadParameter("give REPO once: as the first argument, or with --repo")
    found = argument or option or from_environment()
    if found is None:
        raise typer.BadParameter(f"give REPO, or set {REPO_VARIABLE}")
    return found


def from_environment() -> Path | None:
    """REPO as set in TRITONLORA_REPO; None where the variable is not set or empty."""
    text = os.environ.get(REPO_VARIABLE)
    return Path(text) if text else None


def repository_and(words: list[str], option: Path | None, count: int | None) -> tuple[Path, list[str]]:
    """REPO, and the `count` words after it. With None for `count`, any number of words from one on.

    REPO is the first word, unless --repo gives it. If TRITONLORA_REPO is set, the first word is REPO only if there are
    more than `count` words. Any number of words leaves no such test: the first word is then REPO if it has a slash,
    since no adapter's name has one. Raises typer.BadParameter if REPO or the number of words is wrong.
    """
    known = option or from_environment()
    if known is None and not words:
        raise typer.BadParameter(f"give REPO, or set {REPO_VARIABLE}")
    is_first = bool(words) and option is None and ("/" in words[0] if count is None else len(words) > count)
    root, rest = (some_path(words[0]), words[1:]) if known is None or is_first else (known, words)
    if len(rest) != count and not (count is None and rest):
        expected = "names" if count is None else "1 word" if count == 1 else f"{count} words"
        why = f"; {words[0]!r} was taken for REPO: {REPO_VARIABLE} is not set, and there is no --repo"
        raise typer.BadParameter(
            f"expected {expected} after REPO, got {' '.join(rest)!r}{why if known is None else ''}"
        )
    return root, rest


def import_torch() -> None:
    """Import torch with interrupts held. Some torch modules lose an interrupt; it leaves others half imported."""
    extras.require("convert")
    with interrupts.held():
        import torch  # noqa: F401  it takes seconds


def text_of(file: TextIO) -> str:
    try:
        return file.read()
    except UnicodeDecodeError as error:
        raise TritonLoraError(f"{file.name!r} is not text: {error}") from None
