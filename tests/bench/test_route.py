# SPDX-FileCopyrightText: the tritonlora authors
# SPDX-License-Identifier: Apache-2.0
"""The route benchmark's own arithmetic, and the parts that need no server."""

from __future__ import annotations

import mmap
import os
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest

from tritonlora.bench import route
from tritonlora.bench.load import is_whole
from tritonlora.bench.measured import Part, at_least, at_most, draw, ratio_rows, series
from tritonlora.bench.processes import SERVER, processes_of, processor_seconds, pss_nbytes, shared_memory_nbytes
from tritonlora.bench.route import Case, Options, run
from tritonlora.bench.route.processes import Taken, part_of
from tritonlora.cli.commands import main
from tritonlora.machine import SHARED_MEMORY


def test_percentiles_are_in_the_unit_of_the_series() -> None:
    """Half of the values are at most p50, and one in a hundred is at least p99."""
    found = series("x", "ms", [number / 1000 for number in range(1, 201)], scale=1000)

    assert (100.5, 199) == pytest.approx((found.p50, found.p99))


def test_a_ratio_is_reached_on_its_side_of_the_target() -> None:
    """Some should be small and some large."""
    ratios = (at_most("a", 1.2, 1.1), at_most("b", 1.1, 1.1), at_least("c", 0.7, 0.75), at_least("d", 0.8, 0.75))

    assert ["NO", "yes", "NO", "yes"] == [row[-1] for row in ratio_rows([Part("part", "", (), ratios)])]


def test_lookup_is_measured_for_every_size_and_drawn(tmp_path: Path) -> None:
    """Reading ten entries again takes longer than finding one."""
    (part,) = run(["lookup"], Options(rounds=2, sizes=(10, 20)))
    draw([part], tmp_path / "plot.png")
    found = {one.name: one for one in part.series}

    assert ["lookup among 10", "lookup among 20", "reload of 10", "reload of 20"] == list(found)
    assert 1000 * found["reload of 10"].p50 > found["lookup among 10"].p50 > 0
    assert (tmp_path / "plot.png").read_bytes().startswith(b"\x89PNG")


def test_an_unknown_part_is_refused(capsys: pytest.CaptureFixture[str]) -> None:
    """Before anything is measured; the parts are listed."""
    code = main(["bench", "route", "--part", "lookups"])

    assert 2 == code
    assert "no part 'lookups'; there are ttft, tokens, recovery, lookup, memory" in " ".join(
        capsys.readouterr().err.replace("│", " ").split()
    )


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ("--part streams --adapters 4", "--adapters, --pages, --mix and --max-tokens are for the part cache"),
        ("--part cache --mix random", "no mix 'random'; there are uniform, cyclic, zipf, sticky"),
    ],
)
def test_a_case_of_cache_that_would_not_be_measured_is_refused(
    words: str, message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    """Before a server is started."""
    code = main(["bench", "route", *words.split()])

    assert 2 == code
    assert message in " ".join(capsys.readouterr().err.replace("│", " ").split())


@pytest.mark.parametrize(
    ("words", "case"),
    [
        ("--streams 8 --tokens 9", None),
        ("--pages 8", Case(pages=8)),
        ("--adapters 5 --pages 3 --mix zipf", Case(adapters=5, pages=3, mix="zipf")),
        (
            "--max-tokens 64 --streams 4 --tokens 8 --pace 0 --requests 50 --rank 16",
            Case(max_tokens=64, streams=4, tokens=8, token_seconds=0.0, requests=50, rank=16),
        ),
    ],
)
def test_a_case_of_cache_has_the_options_and_the_table_s_defaults(
    words: str, case: Case | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Options that other parts have, too, do not make a case."""
    asked: list[Options] = []

    def run(_: object, options: Options, __: object) -> list[Part]:
        asked.append(options)
        return []

    monkeypatch.setattr(route, "run", run)

    assert 0 == main(["bench", "route", "--part", "cache", *words.split()])
    assert [case] == [options.case for options in asked]


@pytest.mark.parametrize(
    ("case", "allowed"),
    [
        (Case(200, 8), 12.5),
        (Case(32, 4, "sticky"), 6.25),
        (Case(16, 16), None),
        (Case(100, 50), None),
        (Case(200, 8, token_seconds=0.0), None),
    ],
)
def test_pages_allow_so_many_requests_as_end_in_a_second(case: Case, allowed: float | None) -> None:
    """No number where all adapters in use fit, or where a token takes no time."""
    assert allowed == case.allowed


def test_the_worst_turn_counts_for_what_processes_take() -> None:
    """But for the time to stop, where other load on the machine lengthens a turn."""
    one = Taken({"lora_resolver": 150}, {"lora_resolver": 160}, 1, 300, 0, 0)
    other = Taken({"lora_resolver": 150}, {"lora_resolver": 180}, 2, 250, 0, 1)
    part = part_of(Options(streams=8), [one, other, one], [5.0, 9.0, 4.0], [2.0, 2.5, 2.4], 100)
    found = {ratio.name: ratio.value for ratio in part.ratios}

    assert {
        "errors and wrong responses": 1,
        "processes of lora_resolver": 2,
        "MB of lora_resolver (PSS)": 180e-6,
        "MB that lora_resolver gained from 4 to 8 streams": 30e-6,
        "copies of the largest adapter in shared memory": 3,
        "s that all models take longer to stop": pytest.approx(2.6),
    } == found


def test_a_file_in_shared_memory_counts_once() -> None:
    """Whether one or two processes have mapped it; memory of a process alone does not count."""
    with tempfile.NamedTemporaryFile(dir=SHARED_MEMORY) as file:
        before = shared_memory_nbytes([os.getpid()])
        file.truncate(1 << 20)
        with mmap.mmap(file.fileno(), 1 << 20) as mapped, mmap.mmap(-1, 1 << 20) as own:
            mapped[: 1 << 19] = own[: 1 << 19] = b"x" * (1 << 19)
            after = shared_memory_nbytes([os.getpid(), os.getpid()])

    assert 1 << 19 == after - before


@pytest.mark.parametrize(
    ("received", "expected"),
    [
        (b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n5\r\ndata:\r\n0\r\n\r\n", True),
        (b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n5\r\ndata:\r\n", False),
        (b"HTTP/1.1 400 Bad Request\r\nContent-Length: 2\r\n\r\n{}", True),
        (b"HTTP/1.1 503 Service Unavailable\r\ncontent-length: 2\r\n\r\n{", False),
        (b"HTTP/1.1 400 Bad Request\r\nContent-Le", False),
        (b"", False),
    ],
)
def test_an_error_that_is_not_streamed_ends_with_its_length(received: bytes, expected: bool) -> None:
    """A client that waited for a last chunk would wait until its time is out."""
    assert expected is is_whole(received)


def test_processes_are_found_by_their_model(tmp_path: Path) -> None:
    """The instances are children of the server, with the path of the model among their words."""
    model = tmp_path / "lora_router" / "1" / "model.py"
    child = subprocess.Popen(
        [sys.executable, "-c", "input()", str(model)], stdin=subprocess.PIPE, stdout=subprocess.DEVNULL
    )
    try:
        found = processes_of(os.getpid())
        seconds = processor_seconds(found)
        nbytes = pss_nbytes(found["lora_router"])
    finally:
        child.communicate(b"\n")

    assert {SERVER: [os.getpid()], "lora_router": [child.pid]} == found
    assert seconds[SERVER] == pytest.approx(sum(os.times()[:2]), abs=0.5)
    assert nbytes > 0
