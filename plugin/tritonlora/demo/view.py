# SPDX-FileCopyrightText: the tritonlora authors
# SPDX-License-Identifier: Apache-2.0
"""The demo's output: steps with their time, and responses that grow while they are streamed."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager

from rich.console import Console
from rich.live import Live
from rich.progress import BarColumn, SpinnerColumn, TextColumn
from rich.progress import Progress as ProgressBar
from rich.table import Table
from rich.text import Text

from tritonlora.demo.progress import Progress
from tritonlora.demo.questions import QUESTIONS

Show = Callable[[str, str | None, str], None]  # (question, lora_name, text so far)
BASE = "base"  # the base model's name in the output, beside those of adapters


@contextmanager
def step(err: Console, what: str) -> Iterator[Progress]:
    """Show a step while it runs, its progress if it reports any, and at the end the time that it took."""
    started = time.monotonic()
    columns = (SpinnerColumn(), TextColumn("{task.description}"), BarColumn(), TextColumn("{task.percentage:>3.0f} %"))
    with ProgressBar(*columns, console=err, transient=True, disable=not err.is_terminal) as bar:
        task = bar.add_task(what, total=None)
        yield lambda part, done, total: bar.update(task, description=part, completed=done, total=total)
    err.print(f"{time.monotonic() - started:6.1f} s  {what}", highlight=False, soft_wrap=True)


@contextmanager
def answers(out: Console, names: Sequence[str]) -> Iterator[Show]:
    """Show responses as they grow: on a terminal side by side in a table, otherwise as lines."""
    with _table(out, names) if out.is_terminal else _lines(out) as show:
        yield show


@contextmanager
def silent() -> Iterator[Show]:
    """Show nothing."""

    def show(_question: str, _name: str | None, _text: str) -> None:
        pass

    yield show


@contextmanager
def _table(out: Console, names: Sequence[str]) -> Iterator[Show]:
    texts: dict[tuple[str, str | None], str] = {}
    with Live(_filled(names, texts), console=out) as live:

        def show(question: str, name: str | None, text: str) -> None:
            texts[question, name] = text
            live.update(_filled(names, texts))

        yield show


def _filled(names: Sequence[str], texts: Mapping[tuple[str, str | None], str]) -> Table:
    """The table: a row for the base model and each adapter, and a column for each question."""
    table = Table("", *QUESTIONS, show_lines=True)
    for name in (None, *names):
        table.add_row(name or BASE, *(Text(texts.get((question, name), "").strip()) for question in QUESTIONS))
    return table


@contextmanager
def _lines(out: Console) -> Iterator[Show]:
    written: dict[tuple[str, str | None], int] = {}  # characters

    def show(question: str, name: str | None, text: str) -> None:
        if (question, name) not in written:
            if question not in {known for known, _ in written}:
                out.file.write(f"\n{question}")
            out.file.write(f"\n  {name or BASE:<8}")
        out.file.write(text[written.get((question, name), 0) :])
        out.file.flush()
        written[question, name] = len(text)

    yield show
    out.file.write("\n\n")
