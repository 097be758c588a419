# SPDX-FileCopyrightText: the tritonlora authors
# SPDX-License-Identifier: Apache-2.0
"""Print results on a terminal, into a pipe, and as JSON. Data goes to stdout, everything else to stderr."""

from __future__ import annotations

import dataclasses
import difflib
import json
import sys
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.console import Console
from rich.table import Table
from rich.text import Text

if TYPE_CHECKING:
    from tritonlora.engine.cache_plan import AdapterPlan, CachePlan, WarmChoice
    from tritonlora.repository.undo import FileChange
    from tritonlora.serving.adapter_table import AdapterTable, Source
    from tritonlora.targets import KeptAdapters

stdout = Console(emoji=False)
stderr = Console(emoji=False, stderr=True)

NAMES_SHOWN = 20
GPU_NOT_CHECKED = "not checked: the engine's LoRA cache in GPU memory; give --gpu-memory BYTES to check it"
# The ends of what commands say that change something.
NO_RESTART = "a running server takes this up with its next request; nothing has to be restarted"
RESTART = "a running server has to be started again for this"
AsJson = Annotated[bool, typer.Option("--json", help="Print JSON.")]


def print_json(value: object) -> None:
    """Print a value as JSON on stdout. Dataclasses become objects; other unknown values become strings."""
    sys.stdout.write(json.dumps(value, indent=2, default=_jsonable) + "\n")


def _jsonable(value: Any) -> Any:
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return dataclasses.asdict(value)
    return str(value)


def print_note(note: str) -> None:
    """Print "note: …" on stderr."""
    stderr.print(f"note: {note}", markup=False, highlight=False, soft_wrap=True)


def print_table(columns: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
    """Print a table: tab-separated lines in a pipe.

    On a terminal, a column without any value is left out, and lists wrap between their elements. If the terminal is too
    narrow for that, each row is a block of lines. No value is cut off, so that all can be copied.
    """
    if not stdout.is_terminal:
        sys.stdout.write("".join("\t".join(row) + "\n" for row in [columns, *rows]))
        return
    shown = [number for number in range(len(columns)) if number == 0 or any(row[number] for row in rows)]
    headings = [_SHORT.get(columns[number], columns[number]) for number in shown]
    cells = [[row[number].replace(",", ", ") for number in shown] for row in rows]
    table = Table(box=None, pad_edge=False, padding=(0, _GAP, 0, 0))
    needed = 0
    for column, heading in enumerate(headings):
        values = [one[column] for one in cells]
        wraps = any(len(value.split()) > _WORDS_KEPT for value in values)
        least = max(len(part) for value in (heading, *values) for part in (value.split() if wraps else [value]) or [""])
        needed += least + _GAP
        table.add_column(heading, no_wrap=not wraps, min_width=least)
    if needed <= stdout.width:
        for one in cells:
            table.add_row(*map(Text, one))
        stdout.print(table)
        return
    for row in rows:
        named = zip(headings[1:], (row[number] for number in shown[1:]), strict=True)
        lines = [row[0], *(f"  {heading}: {value}" for heading, value in named if value)]
        stdout.print("\n".join(lines), markup=False, highlight=False, soft_wrap=True)


_GAP = 2  # spaces between columns
_WORDS_KEPT = 2  # "8.0 KiB" does not wrap
_SHORT = {"lora_task_id": "id"}  # headings that are wider than the values below them


def print_diff(change: FileChange) -> None:
    """Print a file's change as a unified diff. A new or removed .py file, which is our own code, is one line."""
    styles = {"+": "green", "-": "red", "@": "cyan"}
    if change.path.suffix == ".py" and None in (change.before, change.after):
        mark, what = ("+", "new") if change.before is None else ("-", "removed")
        lines = len((change.before or change.after or "").splitlines())
        line = f"{mark * 3} {change.path}: {what}, {lines} lines"
        stdout.print(line, style=styles[mark], markup=False, highlight=False, soft_wrap=True)
        return
    old, new = (
        ("/dev/null", []) if text is None else (str(change.path), text.splitlines())
        for text in (change.before, change.after)
    )
    for line in difflib.unified_diff(old[1], new[1], old[0], new[0], lineterm=""):
        stdout.print(line, style=styles.get(line[:1]), markup=False, highlight=False, soft_wrap=True)


def size(nbytes: float) -> str:
    """A number of bytes as text, in B, KiB, MiB or GiB."""
    for unit in ("B", "KiB", "MiB"):
        if nbytes < 1024:
            return f"{nbytes:.0f} {unit}" if unit == "B" else f"{nbytes:.1f} {unit}"
        nbytes /= 1024
    return f"{nbytes:.1f} GiB"


def source_text(source: Source | None) -> str:
    """A source and the beginning of its revision: "hf://org/name (0a1b2c3d4e5f)"."""
    if source is None:
        return ""
    return f"{source.location} ({source.revision[:12]})" if source.revision else source.location


def print_listing(listing: Mapping[str, Mapping[str, Any]]) -> None:
    """Print the adapters of a server, as `client.adapters` returns them. A malformed entry has only a state."""
    columns = ("lora_name", "lora_task_id", "rank", "modules", "lora_weights", "aliases", "state", "pinned")
    print_table(columns, [_listing_row(name, about) for name, about in sorted(listing.items())])


def _listing_row(name: str, about: Mapping[str, Any]) -> tuple[str, ...]:
    state = ": ".join(about[key] for key in ("state", "reason") if key in about)
    if "lora_task_id" not in about:
        return (name, "?", "?", "?", "?", "", state, "")
    return (
        name,
        str(about["lora_task_id"]),
        ",".join(map(str, about["adapter_sizes"])),
        ",".join(about["modules"]),
        f"{about['dtype']} {about['lora_weights_shape']}",
        aliases_text(about),
        state,
        yes(about.get("pinned")),
    )


def yes(value: object) -> str:
    """ "yes" for a true value, and nothing for another one. Older servers give no value for a pin."""
    return "yes" if value else ""


def aliases_text(about: Mapping[str, Any]) -> str:
    """An adapter's aliases, with its share of each divided alias: "canary 10 %,prod". Older servers give no shares."""
    shares = about.get("shares", {})
    return ",".join(f"{alias} {shares[alias]} %" if alias in shares else alias for alias in about["aliases"])


def print_plan(
    plan: CachePlan,
    registered: Iterable[str],
    choice: WarmChoice | None,
    applied: Mapping[str, str] | None,
    *,
    has_gpu: bool,
) -> None:
    """Print a plan, with a row for each of the `registered` adapters. `applied`: the parameters that were set."""
    names = set(registered)
    columns = ("lora_name", "rank", "modules", "size", "pages", "start")
    print_table(columns, [_plan_row(one) for one in plan.adapters if one.name in names])
    sys.stdout.write("".join(f"{line}\n" for line in _plan_lines(plan, choice, applied, has_gpu)))


def print_room(room: KeptAdapters, table: AdapterTable) -> None:
    """Print the adapters of an engine that reads them from disk itself, and its capacity for them."""
    rows = [
        (name, ",".join(map(str, entry.adapter_sizes)), ",".join(entry.modules), size(entry.lora_weights_nbytes))
        for name, entry in sorted(table.entries.items())
    ]
    print_table(("lora_name", "rank", "modules", "size"), rows)
    kept = f"{len(rows)} adapters; the engine keeps {room.host} in host memory (max_cpu_loras), {room.gpu} at one time "
    again = "; the others are read from disk again when they are asked for" if len(rows) > room.host else ""
    sys.stdout.write(f"{kept}on the GPU (max_loras){again}\n")
    if len(rows) > room.host:
        sys.stdout.write(f"recommended: max_cpu_loras: {len(rows)} in model.yaml\n")


def _plan_row(adapter: AdapterPlan) -> tuple[str, ...]:
    return (
        adapter.name,
        ",".join(map(str, adapter.ranks)),
        ",".join(adapter.modules),
        size(adapter.nbytes),
        str(adapter.pages),
        "warm" if adapter.warm else "on first use",
    )


def _plan_lines(
    plan: CachePlan, choice: WarmChoice | None, applied: Mapping[str, str] | None, has_gpu: bool
) -> Iterator[str]:
    tightest = plan.tightest
    page = tightest.page_bytes
    yield (
        f"{'all adapters fit' if plan.fits else 'NOT all adapters fit'}: "
        f"{tightest.pages} of {tightest.host_pages} pages of {size(page)}; {len(plan.adapters)} adapters take "
        f"{size(tightest.pages * page)} of the {size(tightest.host_pages * page)} of the engine's cache"
    )
    yield (
        f"size is of files and requests, {size(sum(one.nbytes for one in plan.adapters))} in all: rows are padded to "
        "the longest; the cache gives each adapter whole pages instead"
    )
    if tightest.refusal:
        yield f"the engine will not load: {tightest.refusal}"
    yield from (f"{one.name} cannot be loaded: {one.unloadable}" for one in plan.unloadable)
    if plan.diverging:
        yield (
            f"{_listed(plan.diverging)}: different numbers of pages on different pipeline-parallel ranks, and not all "
            "adapters fit: one rank may evict an adapter that another rank still has"
        )
    yield from _device_lines(plan) if has_gpu else ()
    yield (
        f"loading takes {size(plan.load_bytes)} of host memory, "
        f"sending an adapter again {size(plan.resend_shm_bytes)} of /dev/shm"
    )
    yield from (f"room for {count} more of rank {rank}" for rank, count in plan.room.items())
    for one in plan.recommendations:
        if one.value == one.in_effect:
            yield f"{one.parameter} = {one.value} stays; {one.cost}: {size(one.cost_bytes)}"
        else:
            verb = "recommended:" if applied is None else "set"
            yield f"{verb} {one.parameter}: {one.in_effect} -> {one.value}; {one.cost}: {size(one.cost_bytes)}"
    if choice is not None:
        yield f"keep warm: {_listed(choice.warm)}"
        yield f"load on first use: {_listed(choice.cold)}"
        yield (
            f"{choice.resend_share:.1%} of requests may carry weights again, "
            f"{size(choice.resend_bytes)} a request on average"
        )


def _device_lines(plan: CachePlan) -> Iterator[str]:
    fraction, device = plan.parameters.gpu_memory_fraction, plan.device
    least = f"with lora_cache_gpu_memory_fraction {fraction:g} it needs {size(plan.min_gpu_bytes)} free of each GPU"
    if device is None:
        yield f"{GPU_NOT_CHECKED}; {least}"
        return
    if device.refusal:
        yield f"the engine will not load: {device.refusal}; {least}"
    yield (
        f"GPU memory: {device.pages} pages; one batch takes any {device.any_in_one_batch} different adapters, "
        f"and at most {device.most_in_one_batch}"
    )
    if device.never_scheduled:
        names = _listed(device.never_scheduled)
        yield f"larger than the cache in GPU memory, so that their requests would wait for ever: {names}"


def _listed(names: Sequence[str]) -> str:
    more = f" and {len(names) - NAMES_SHOWN} more" if len(names) > NAMES_SHOWN else ""
    return (", ".join(names[:NAMES_SHOWN]) + more) or "none"
