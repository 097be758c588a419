# SPDX-FileCopyrightText: the tritonlora authors
# SPDX-License-Identifier: Apache-2.0
"""screen.py: a view and a size in, lines out."""

from __future__ import annotations

from dataclasses import replace

import pytest

from tritonlora import exposition
from tritonlora.top.look import Look
from tritonlora.top.screen import SORTS, Head, count, draw, duration, rate
from tritonlora.top.view import NOTHING, View, view_of

HEAD = Head("localhost:8000", 3725.9)
HOSTILE = (
    "\x1b[2J\x1b[31mred",
    "a\r\nb",
    "right\u202eleft",
    "wide\N{FULLWIDTH LATIN CAPITAL LETTER A}" * 40,
    "x" * 500,
)


def view(adapters: int = 3, names: tuple[str, ...] = ()) -> View:
    """n1 has one request a second, n2 two, and so on; the others one each."""
    samples: exposition.Samples = {}
    for number, name in enumerate([*(f"n{number}" for number in range(1, adapters + 1)), *names], 1):
        labels = (("lora_name", name), ("outcome", "OK"))
        samples["lora_requests_total", labels] = float(number if number <= adapters else 1)
        samples["lora_loads_total", (("lora_name", name), ("reason", "evicted"))] = 10.0
        samples["lora_load_seconds_total", (("lora_name", name),)] = 0.25
    samples |= exposition.parse("lora_cache_pages 16\nlora_cache_pages_used 12\n")
    states = dict.fromkeys((f"n{number}" for number in range(1, adapters + 1)), "loaded")
    return view_of(Look(0.0, True, {}, {}), Look(1.0, True, samples, {**states, **dict.fromkeys(names, "cold")}))


def lines(
    shown: View, width: int | None = 80, height: int | None = 24, sort: str = "requests", **more: bool
) -> list[str]:
    """What is drawn, as text."""
    return [line.plain for line in draw(shown, HEAD, sort, width=width, height=height, **more)]


def test_a_view_in_80_columns() -> None:
    """The busiest first; what the server does not have is -."""
    assert [
        "tritonlora top   localhost:8000   ready   watched 1:02:05",
        "3 adapters: 3 loaded",
        "cache pages 12/16   requests/s 6.0   running -   waiting -   loads/s 30.0",
        "wait p50/p99 -/-   load p50/p99 -/-   first token p50/p99 -/-",
        "ADAPTER      STATE        REQ/S  RUN WAIT LOADS LOAD/S   TIME  H/M/W %   ERR",
        "n3           loaded         3.0    -    -    10   10.0  250ms        -     0",
        "n2           loaded         2.0    -    -    10   10.0  250ms        -     0",
        "n1           loaded         1.0    -    -    10   10.0  250ms        -     0",
    ] == lines(view())


def test_a_thousand_adapters_are_as_many_rows_as_there_is_room_for_and_one_more() -> None:
    """Which has the sums of the others."""
    found = lines(view(1000), keys=True)

    assert 24 == len(found)
    assert ["n1000", "n999"] == [line.split()[0] for line in found[5:7]]
    assert "983 more     -             484k    -    -  9830   9830   246s        -     0" == found[-2]
    assert 1004 + 1 == len(lines(view(1000), None, None))


@pytest.mark.parametrize("height", [0, 1, 2, 5, 9, 24])
@pytest.mark.parametrize("width", [1, 2, 9, 20, 33, 50, 79, 80, 200])
def test_no_line_is_wider_than_the_terminal_and_no_view_higher(width: int, height: int) -> None:
    """A line that is one too wide breaks the whole screen."""
    for shown in (view(30, HOSTILE), replace(NOTHING, problem="no answer " * 50), NOTHING):
        found = lines(shown, width, height, keys=True)

        assert len(found) <= max(height, 1)
        assert all(len(line) <= width for line in found)


@pytest.mark.parametrize("width", [80, None])
def test_what_a_server_sends_reaches_the_terminal_as_printable_ascii(width: int | None) -> None:
    """Control characters in a name would move the cursor, or worse; others have another width than they seem to."""
    problem = replace(NOTHING, problem="".join(HOSTILE))
    text = "".join([*lines(view(1, HOSTILE), width, None), *lines(problem, width, None)])

    assert text.isascii()
    assert text.isprintable()
    assert r"\x1b[2J\x1b[31mred" in "".join(lines(view(1, HOSTILE), None, None))


def test_long_names_keep_their_beginning_and_end() -> None:
    """Names often begin alike, and differ in a version."""
    name = "customer-support-assistant-for-the-north-v12"
    narrow, wide = (lines(view(0, (name,)), width)[-1] for width in (80, 110))

    assert narrow.startswith("customer~rth-v12 cold")
    assert wide.startswith(f"{name} cold")


def test_narrow_terminals_lack_the_least_important_columns() -> None:
    """The name and the requests stay to the last."""
    headings = [
        next(line for line in lines(view(), width) if line.startswith("ADAPT")).split() for width in (60, 40, 20)
    ]

    assert [
        ["ADAPTER", "STATE", "REQ/S", "RUN", "WAIT", "LOADS", "TIME", "ERR"],
        ["ADAPTER", "STATE", "REQ/S", "RUN"],
        ["ADAPTER", "REQ/S"],
    ] == headings


@pytest.mark.parametrize("sort", SORTS)
def test_every_column_can_be_sorted_by(sort: str) -> None:
    """Names and states from a to z, numbers from the largest down."""
    first = lines(view(9), sort=sort)[5].split()[0]

    assert {"requests": "n9"}.get(sort, "n1") == first


def test_a_server_that_does_not_answer_is_told_with_the_reason() -> None:
    """And for how long."""
    gone = replace(view(), problem="no answer from localhost:8000", is_ready=None)
    found = [line.plain for line in draw(gone, Head("localhost:8000", 60.0, 12.0), "name", width=80, height=24)]

    assert [
        "tritonlora top   localhost:8000   NO ANSWER for 12 s   watched 0:01:00",
        "no answer from localhost:8000",
    ] == found[:2]


def test_a_server_without_metrics_of_tritonlora_is_told() -> None:
    """Most often the port is that of another server."""
    found = " ".join(lines(view_of(None, Look(0.0, False, {("nv_gpu", ()): 1.0}, None))))

    assert "NOT READY" in found
    assert "no metrics of tritonlora there: is --metrics-port this server's" in found


@pytest.mark.parametrize(
    ("seconds", "text"),
    [(None, "-"), (0.00123, "1.2ms"), (0.0995, "99.5ms"), (0.25, "250ms"), (0.9996, "1.00s"), (99.99, "99.99s"),
     (4321.4, "4321s")],
)  # fmt: skip
def test_durations_have_a_unit(seconds: float | None, text: str) -> None:
    """And three or four digits."""
    assert text == duration(seconds)


@pytest.mark.parametrize(
    ("value", "width", "text"),
    [(None, 5, "-"), (0, 4, "0"), (9999, 4, "9999"), (10_000, 4, "10k"), (99_999, 5, "99999"), (123_456, 5, "123k"),
     (2e9, 5, "2000M")],
)  # fmt: skip
def test_counts_fit_their_columns(value: float | None, width: int, text: str) -> None:
    """With a unit, where they are large."""
    assert text == count(value, width)


def test_small_rates_have_a_digit_behind_the_point() -> None:
    """Large ones need none."""
    assert ["-", "0.0", "999.9", "1000"] == [rate(value) for value in (None, 0.04, 999.9, 999.96)]
