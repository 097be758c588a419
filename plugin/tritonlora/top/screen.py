# SPDX-FileCopyrightText: the tritonlora authors
# SPDX-License-Identifier: Apache-2.0
"""Draw a view as lines of text, no wider than a terminal.

Lines are ASCII: what a server sends, such as a name or a message, is escaped, so that no control character and no
character of another width reaches the terminal.
"""

from __future__ import annotations

import textwrap
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

from rich.text import Text

from tritonlora.serving.counters import BASE, OTHERS, UNKNOWN
from tritonlora.top.view import LOADED, REMOVED, Row, View, summed

LEAST_NAME, MOST_NAME = 12, 128  # columns of the terminal
MOST_LINE, MOST_LINES = 120, 4  # of a message
KEYS = "q quit   < > choose the column to sort by"
_NONE = "-"
_LABELS = {BASE: "(base model)", OTHERS: "(others)", UNKNOWN: UNKNOWN}
_STATES = {"warm": "green", LOADED: "green", "unavailable": "red", REMOVED: "dim"}


@dataclass(frozen=True, slots=True)
class Head:
    """What the view does not say of itself."""

    url: str
    watched_seconds: float  # since the first look
    silent_seconds: float = 0.0  # since the last look that succeeded, if a later one did not


@dataclass(frozen=True, slots=True)
class Column:
    """A column of the table."""

    name: str  # for --sort
    heading: str
    width: int
    text: Callable[[Row], str]
    order: Callable[[Row], float | str | None]  # numbers are sorted from the largest down, None last
    importance: int  # a terminal that is too narrow lacks the columns with the largest numbers
    style: Callable[[Row], str] = lambda _: ""
    is_text: bool = False  # and no number


def draw(view: View, head: Head, sort: str, *, width: int | None, height: int | None, keys: bool = False) -> list[Text]:
    """The lines of a view, of at most `width` characters each and at most `height`. None: as many as it takes.

    Rows that do not fit are one row together. With `keys` the last line says which keys there are.
    """
    top = _top(view, head, width)[: None if height is None else max(1, height // 2)]
    bottom = _flow([(KEYS, "dim")], width) if keys else []
    room = None if height is None else max(0, height - len(top) - len(bottom) - 1)
    order = next(column.order for column in COLUMNS if column.name == sort)
    rows = sorted(view.rows, key=lambda row: _place(order(row)))
    if room is not None and len(rows) > room:
        kept = max(0, room - 1)
        rows = [*rows[:kept], summed(f"{len(rows) - kept} more", rows[kept:])]
    columns = _fitting(rows, width)
    heading = _line([(column, column.heading, "reverse" if column.name == sort else "") for column in columns], "bold")
    table = [_line([(column, column.text(row), column.style(row)) for column in columns]) for row in rows]
    lines = [*top, heading, *table]
    return [*lines[: None if height is None else max(0, height - len(bottom))], *bottom]


def shown(text: str) -> str:
    """`text` in ASCII, with escapes for all else."""
    return ascii(text)[1:-1]


def count(value: float | None, width: int = 5) -> str:
    """A number in at most `width` characters, with a unit if it is large."""
    if value is None:
        return _NONE
    for unit in ("", "k", "M", "G"):
        text = f"{value:.0f}{unit}"
        if len(text) <= width:
            return text
        value /= 1000
    return text


def rate(value: float | None) -> str:
    """A number with one digit behind the point, if it is small."""
    return f"{value:.1f}" if value is not None and value < 999.95 else count(value)


def duration(seconds: float | None) -> str:
    """Seconds with a unit, in at most 6 characters below 10^5."""
    if seconds is None:
        return _NONE
    if seconds < 0.9995:
        return f"{1000 * seconds:.{1 if seconds < 0.09995 else 0}f}ms"
    return f"{seconds:.{2 if seconds < 99.995 else 0}f}s"


def clock(seconds: float) -> str:
    """Seconds as hours, minutes and seconds."""
    minutes, rest = divmod(int(seconds), 60)
    return f"{minutes // 60}:{minutes % 60:02}:{rest:02}"


def _name(row: Row) -> str:
    return _LABELS.get(row.lora_name) or shown(row.lora_name)


def _state(row: Row) -> str:
    return " ".join(filter(None, (shown(row.state or ""), "pinned" if row.pinned else ""))) or _NONE


def _shares(row: Row) -> str:
    return "/".join(f"{100 * share:.0f}" for share in row.shares) if row.shares else _NONE


def _hit_share(row: Row) -> float | None:
    return row.shares[0] if row.shares else None


COLUMNS = (
    Column("name", "ADAPTER", LEAST_NAME, _name, lambda row: row.lora_name, 0, is_text=True),
    Column("state", "STATE", 11, _state, _state, 2, lambda row: _STATES.get(row.state or "", ""), is_text=True),
    Column("requests", "REQ/S", 6, lambda row: rate(row.requests_per_second), lambda row: row.requests_per_second, 1),
    Column("running", "RUN", 4, lambda row: count(row.running, 4), lambda row: row.running, 3),
    Column(
        *("waiting", "WAIT", 4, lambda row: count(row.waiting, 4), lambda row: row.waiting, 4),
        lambda row: "yellow" if row.waiting else "",
    ),
    Column("loads", "LOADS", 5, lambda row: count(row.loads), lambda row: row.loads, 6),
    Column("load-rate", "LOAD/S", 6, lambda row: rate(row.loads_per_second), lambda row: row.loads_per_second, 8),
    Column("load-time", "TIME", 6, lambda row: duration(row.load_seconds or None), lambda row: row.load_seconds, 7),
    Column("hits", "H/M/W %", 8, _shares, _hit_share, 9),
    Column(
        *("errors", "ERR", 5, lambda row: count(row.errors), lambda row: row.errors, 5),
        lambda row: "red" if row.errors else "",
    ),
)
SORTS = tuple(column.name for column in COLUMNS)


def _top(view: View, head: Head, width: int | None) -> list[Text]:
    """The lines above the table."""
    total = view.total
    states = Counter(row.state for row in view.rows if row.lora_name not in _LABELS and row.state != REMOVED)
    parts = [f"{states[state]} {shown(state)}" for state in sorted(filter(None, states))]
    groups: list[list[tuple[str, str]]] = [
        [
            ("tritonlora top", "bold"),
            (shown(head.url), ""),
            _health(view, head),
            (f"watched {clock(head.watched_seconds)}", "dim"),
        ],
        [(f"{sum(states.values())} adapters{': ' if parts else ''}{', '.join(parts)}", "")],
        [
            (f"cache pages {count(view.cache_pages_used)}/{count(view.cache_pages)}", ""),
            (f"requests/s {rate(total.requests_per_second)}", ""),
            (f"running {count(total.running)}", ""),
            (f"waiting {count(total.waiting)}", ""),
            (f"loads/s {rate(total.loads_per_second)}", ""),
        ],
        [
            (f"wait p50/p99 {duration(view.wait_p50)}/{duration(view.wait_p99)}", ""),
            (f"load p50/p99 {duration(view.load_p50)}/{duration(view.load_p99)}", ""),
            (f"first token p50/p99 {duration(view.first_token_p50)}/{duration(view.first_token_p99)}", ""),
        ],
    ]
    lines = [line for group in groups for line in _flow(group, width)]
    trouble = view.problem if view.is_ready is None or view.has_metrics else _NO_METRICS
    if trouble is not None:
        lines[1:1] = [Text(line, "red") for line in textwrap.wrap(shown(trouble), width or MOST_LINE)[:MOST_LINES]]
    return lines


_NO_METRICS = (
    "no metrics of tritonlora there: is --metrics-port this server's, and did tritonlora init run on its repository?"
)


_READINESS = {True: ("ready", "green"), False: ("NOT READY", "bold red"), None: ("looking", "")}


def _health(view: View, head: Head) -> tuple[str, str]:
    if view.problem is not None:
        return f"NO ANSWER for {head.silent_seconds:.0f} s", "bold red"
    return _READINESS[view.is_ready]


def _flow(items: Sequence[tuple[str, str]], width: int | None) -> list[Text]:
    """Items with their styles, as many in a line as fit. An item is in one line, cropped if it has to be."""
    lines: list[Text] = []
    for text, style in items:
        cropped = text if width is None else text[:width]
        if lines and (width is None or len(lines[-1]) + len(_GAP) + len(cropped) <= width):
            lines[-1].append(_GAP).append(cropped, style)
        else:
            lines.append(Text().append(cropped, style))
    return lines


_GAP = "   "


def _fitting(rows: Sequence[Row], width: int | None) -> list[Column]:
    """The columns for which there is room. The first one takes what is left, up to the longest name."""
    longest = max([len(_name(row)) for row in rows] or [0])
    if width is None:
        return [replace(COLUMNS[0], width=max(LEAST_NAME, min(longest, MOST_NAME))), *COLUMNS[1:]]
    columns = list(COLUMNS)
    while len(columns) > 1 and sum(column.width + 1 for column in columns) - 1 > width:
        columns.remove(max(columns, key=lambda column: column.importance))
    left = width - sum(column.width + 1 for column in columns[1:])
    return [replace(COLUMNS[0], width=min(left, max(LEAST_NAME, longest))), *columns[1:]]


def _line(cells: Sequence[tuple[Column, str, str]], style: str = "") -> Text:
    line = Text(style=style)
    for column, text, own_style in cells:
        cropped = _cropped(text, column.width)
        line.append(" " if len(line) else "")
        line.append(cropped.ljust(column.width) if column.is_text else cropped.rjust(column.width), own_style)
    line.rstrip()
    return line


def _cropped(text: str, width: int) -> str:
    """`text`, with ~ for its middle if it is too long: names often begin alike."""
    if len(text) <= width:
        return text
    end = (width - 1) // 2
    return f"{text[: width - 1 - end]}~{text[len(text) - end :]}" if width > 0 else ""


def _place(order: float | str | None) -> tuple[bool, float | str]:
    return (order is None, order if isinstance(order, str) else -(order or 0.0))
