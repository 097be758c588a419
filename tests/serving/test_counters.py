# SPDX-FileCopyrightText: the tritonlora authors
# SPDX-License-Identifier: Apache-2.0
"""statistics.py: counts of several instances, of those that have ended, too."""

from __future__ import annotations

import fcntl
import os
from pathlib import Path

import pytest

from tritonlora.serving import counters
from tritonlora.serving.counters import BASE, COLUMNS, OTHERS, Statistics, read_statistics


def opened(directory: Path) -> int:
    """A descriptor of it."""
    directory.mkdir(exist_ok=True)
    return os.open(directory, os.O_RDONLY)


def nonzero(counts: counters.Counts) -> dict[str, dict[str, float]]:
    """What was counted."""
    return {name: {column: value for column, value in row.items() if value} for name, row in counts.items()}


def test_what_the_instances_count_is_added_up(tmp_path: Path) -> None:
    """By adapter and column; the base model is an adapter without a name."""
    one, other = Statistics(opened(tmp_path / "statistics")), Statistics(opened(tmp_path / "statistics"))
    one.add("pirate", "OK")
    one.add("pirate", "load_seconds", 0.25)
    one.add(BASE, "NOT_FOUND")
    other.add("haiku", "OK")
    other.add("pirate", "OK", 2)

    assert {
        BASE: {"NOT_FOUND": 1.0},
        "pirate": {"OK": 3.0, "load_seconds": 0.25},
        "haiku": {"OK": 1.0},
    } == nonzero(read_statistics(opened(tmp_path / "statistics")))


def test_an_instance_that_has_ended_still_counts_but_runs_nothing(tmp_path: Path) -> None:
    """Counters never fall; a request that died with its instance is not under way."""
    one, other = Statistics(opened(tmp_path)), Statistics(opened(tmp_path))
    for instance in (one, other):
        instance.add("pirate", "running")
        instance.add("pirate", "OK")

    assert {"pirate": {"OK": 2.0, "running": 2.0}} == nonzero(read_statistics(opened(tmp_path)))

    fcntl.flock(one._descriptor, fcntl.LOCK_UN)  # as the end of its process does

    assert {"pirate": {"OK": 2.0, "running": 1.0}} == nonzero(read_statistics(opened(tmp_path)))


def test_the_next_instance_goes_on_with_the_file_of_one_that_has_ended(tmp_path: Path) -> None:
    """Memory does not grow with every time that the router is loaded; an instance that lives has its file to itself."""
    one, other = Statistics(opened(tmp_path)), Statistics(opened(tmp_path))
    one.add("pirate", "running")
    one.add("pirate", "OK")
    other.add("haiku", "OK")
    fcntl.flock(one._descriptor, fcntl.LOCK_UN)
    again = Statistics(opened(tmp_path))
    again.add("haiku", "OK")
    again.add("pirate", "OK")
    assert 2 == len(list(tmp_path.iterdir()))

    assert {"pirate": {"OK": 2.0}, "haiku": {"OK": 2.0}} == nonzero(read_statistics(opened(tmp_path)))
    again.add("pirate", "running")
    assert {"OK": 2.0, "running": 1.0} == nonzero(read_statistics(opened(tmp_path)))["pirate"]


def test_the_number_of_names_is_bounded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What has no room is counted together."""
    monkeypatch.setattr(counters, "ROWS", 4)
    counted = Statistics(opened(tmp_path))
    for name in ("a", "b", "c", "d", "a"):
        counted.add(name, "OK")

    assert {"a": {"OK": 2.0}, "b": {"OK": 1.0}, OTHERS: {"OK": 2.0}} == nonzero(read_statistics(opened(tmp_path)))


def test_all_adapters_are_read(tmp_path: Path) -> None:
    """However many there are."""
    counted = Statistics(opened(tmp_path))
    names = [f"n{number}" for number in range(3 * counters.CHUNK)]
    for name in names:
        counted.add(name, "OK")

    assert {name: {"OK": 1.0} for name in names} == nonzero(read_statistics(opened(tmp_path)))


def test_counting_needs_no_more_room_than_there_was_at_the_start(tmp_path: Path) -> None:
    """A page that cannot be had when it is written to ends the process."""
    counts = Statistics(opened(tmp_path / "statistics"))
    [path] = (tmp_path / "statistics").iterdir()
    before = path.stat()
    for number in range(counters.ROWS):
        counts.add(f"n{number}", "OK")

    assert before.st_size <= 512 * before.st_blocks == 512 * path.stat().st_blocks


def test_every_adapter_has_every_column(tmp_path: Path) -> None:
    """So that whoever reads them needs no defaults."""
    Statistics(opened(tmp_path)).add("a" * 128, "OK")
    counts = read_statistics(opened(tmp_path))

    assert [("a" * 128, list(COLUMNS))] == [(name, list(row)) for name, row in counts.items()]


def test_nothing_counted_is_nothing(tmp_path: Path) -> None:
    """Also when no instance has begun."""
    assert {} == read_statistics(opened(tmp_path / "statistics"))
