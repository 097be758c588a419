# SPDX-FileCopyrightText: the tritonlora authors
# SPDX-License-Identifier: Apache-2.0
"""residency.py: what is shared by instances that come, go and are killed."""

from __future__ import annotations

import fcntl
import multiprocessing
import os
import shutil
import signal
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, closing
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import psutil
import pytest

from tritonlora.errors import SharedMemoryError
from tritonlora.serving import residency
from tritonlora.serving.counters import Statistics, read_statistics
from tritonlora.serving.residency import Residency, open_file_inside, open_inside, open_residency, shared_directory

SPAWN = multiprocessing.get_context("spawn")


def test_the_first_instance_says_what_was_warmed(tmp_path: Path) -> None:
    """And the others see what each of them has learnt since."""
    with closing(open_residency(tmp_path / "shared", {1: 1, 2: 1})) as one:
        one.missed(2, one.belief(2))
        one.accepted(3, 1)
        with closing(open_residency(tmp_path / "shared", {1: 1, 2: 1})) as other:
            assert [True, False, True, False] == [other.holds(task_id) for task_id in (1, 2, 3, 4)]


def test_a_miss_that_is_heard_late_takes_no_later_belief_away(tmp_path: Path) -> None:
    """Else the adapter, which another instance has loaded in between, would be loaded twice."""
    with closing(open_residency(tmp_path / "shared", {1: 1})) as mine:
        old = mine.belief(1)
        mine.missed(1, old)
        mine.accepted(1, 1)
        mine.missed(1, old)

        assert mine.holds(1)


def test_the_last_instance_leaves_nothing(tmp_path: Path) -> None:
    """Nor does one that comes and goes while another stays take anything away."""
    one = open_residency(tmp_path / "shared", {1: 1})
    open_residency(tmp_path / "shared", {1: 1}).close()

    assert one.holds(1)

    one.close()

    assert [] == list(tmp_path.iterdir())


def test_many_instances_start_and_end_at_once(tmp_path: Path) -> None:
    """Whoever is the first makes the directory, whoever is the last removes it, and nobody is without one."""

    def come_and_go(number: int) -> bool:
        with closing(open_residency(tmp_path / "shared", {7: 1})) as mine:
            mine.accepted(number, 1)
            return mine.holds(number) and mine.holds(7)

    with ThreadPoolExecutor(8) as pool:
        results = list(pool.map(come_and_go, range(200)))

    assert [True] * 200 == results
    assert [] == list(tmp_path.iterdir())


def test_who_comes_too_late_to_remove_it_removes_nobody_else_s(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Another one has removed the directory between two of its steps, and a third one made it anew."""
    shared = tmp_path / "shared"
    last, flock = open_residency(shared, {}), fcntl.flock
    newer: list[Residency] = []

    def meanwhile(descriptor: int, operation: int) -> None:
        if operation == fcntl.LOCK_EX | fcntl.LOCK_NB and not newer:
            shutil.rmtree(shared)
            newer.append(open_residency(shared, {1: 1}))
        flock(descriptor, operation)

    monkeypatch.setattr(fcntl, "flock", meanwhile)
    last.close()

    assert newer[0].holds(1)
    newer[0].close()
    assert [] == list(tmp_path.iterdir())


def _stay(directory: Path, connection: Connection) -> None:
    mine = open_residency(directory, {1: 1})
    with ExitStack() as stack:
        stack.enter_context(mine.claim(5, 1))
        stack.enter_context(mine.place(9, 1)).join()
        connection.send("ready")
        connection.recv()


def test_an_instance_that_is_killed_holds_up_nobody(tmp_path: Path) -> None:
    """Its claim and its place in the line end with it, and a later server removes what it left."""
    ours, theirs = SPAWN.Pipe()
    shared = tmp_path / f"{residency.PREFIX}1-2-lora_router"
    process = SPAWN.Process(target=_stay, args=(shared, theirs))
    process.start()
    assert ours.recv() == "ready"
    mine = open_residency(shared, {})
    with pytest.raises(TimeoutError), mine.claim(5, 0.01):
        pass
    assert mine.has_line_for(9)
    assert process.pid is not None
    os.kill(process.pid, signal.SIGKILL)
    process.join()

    with mine.claim(5, 10) as loads, mine.place(9, 1) as place:
        place.join()
        place.wait(time.monotonic() + 10)

    assert loads
    assert not mine.has_line_for(9)

    os.close(mine.descriptor)  # as if killed, too

    with closing(open_residency(tmp_path / f"{residency.PREFIX}1-3-lora_router", {})):
        assert [f"{residency.PREFIX}1-3-lora_router"] == [path.name for path in tmp_path.iterdir()]


def test_a_request_joins_a_line_unless_its_adapter_is_held(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """And then too, once somebody has waited for long."""
    with closing(open_residency(tmp_path / "shared", {1: 1})) as mine, mine.place(9, 1) as first:
        assert [False, False] == [mine.has_line_for(1), mine.has_line_for(2)]

        first.join()

        assert [False, True] == [mine.has_line_for(1), mine.has_line_for(2)]

        monkeypatch.setattr(residency, "OVERTAKING_SECONDS", 0.0)

        assert [True, True] == [mine.has_line_for(1), mine.has_line_for(2)]


def test_the_line_is_served_in_the_order_of_arrival(tmp_path: Path) -> None:
    """Also when the one that came first joins last."""
    with (
        closing(open_residency(tmp_path / "shared", {})) as mine,
        mine.place(9, 1) as first,
        mine.place(9, 1) as second,
    ):
        second.join()
        first.join()
        with pytest.raises(TimeoutError):
            second.wait(time.monotonic() + 0.01)
        first.wait(time.monotonic() + 10)
        first.close()
        second.wait(time.monotonic() + 10)


def test_a_try_that_failed_is_repeated_when_a_request_ends(tmp_path: Path) -> None:
    """Not before, as long as the longest wait has not passed."""
    with closing(open_residency(tmp_path / "shared", {})) as mine, mine.place(9, 60) as place:
        place.join()
        place.wait(time.monotonic() + 10)
        place._retry_at += 60
        with pytest.raises(TimeoutError):
            place.wait(time.monotonic() + 0.01)
        mine.ended()
        place.wait(time.monotonic() + 10)


def test_a_directory_that_somebody_removed_costs_beliefs_and_nothing_else(tmp_path: Path) -> None:
    """Nothing counts as held, and every request may go on."""
    with closing(open_residency(tmp_path / "shared", {1: 1})) as mine:
        shutil.rmtree(tmp_path / "shared")
        mine.accepted(1, 1)
        mine.missed(1, mine.belief(1))
        mine.ended()
        with mine.claim(1, 1) as loads, mine.place(9, 1) as place:
            place.join()
            place.wait(time.monotonic() + 10)

        assert loads
        assert not mine.holds(1)


def test_a_request_without_a_directory_to_line_up_in_waits_for_its_next_try(tmp_path: Path) -> None:
    """And has an end to its patience."""
    with closing(open_residency(tmp_path / "shared", {})) as mine, mine.place(9, 60) as place:
        shutil.rmtree(tmp_path / "shared")
        place.join()
        place.wait(time.monotonic() + 10)
        place._retry_at += 60
        with pytest.raises(TimeoutError):
            place.wait(time.monotonic() + 0.01)


def test_what_a_request_held_that_was_left_behind_is_free(tmp_path: Path) -> None:
    """Its place, the adapter that it was loading, and the one that it used."""
    stuck = open_residency(tmp_path / "shared", {1: 1}, 1)
    place = stuck.place(9, 1)
    place.join()
    claim = stuck.claim(2, 1)
    claim.__enter__()
    stuck.accepted(1, 1)
    with closing(open_residency(tmp_path / "shared", {1: 1}, 1)) as other:
        stuck.abandon()
        with other.claim(2, 0.01) as loads:
            other.accepted(2, 1)

        assert loads
        assert [] == other.waiting()
        assert [False, True] == [other.holds(task_id) for task_id in (1, 2)]  # there was room for one

        other.ended()
        claim.__exit__(None, None, None)  # should it go on
        place.close()
        stuck.ended()

    assert [] == list(tmp_path.iterdir())


def test_an_id_stands_for_one_content_for_all_instances(tmp_path: Path) -> None:
    """Also for one that has not asked for the first one; without a directory, for whatever it is said to."""
    with ExitStack() as stack:
        one, other = (stack.enter_context(closing(open_residency(tmp_path / "shared", {}))) for _ in range(2))

        assert [True, True, False, True, False] == [
            one.gives(5, "a"),
            other.gives(5, "a"),
            other.gives(5, "b"),
            other.gives(6, "b"),
            one.gives(6, "a"),
        ]
        assert [True, False, True] == [one.may_give(5, "a"), one.may_give(5, "b"), one.may_give(7, "b")]
        assert other.gives(7, "a")  # to ask was not to give

        shutil.rmtree(tmp_path / "shared")

        assert one.gives(8, "a")


def test_an_id_stands_for_what_the_engine_was_started_with(tmp_path: Path) -> None:
    """For all instances, also before anybody has asked for it, and whatever a table says to one that begins later."""
    with (
        closing(open_residency(tmp_path / "shared", {1: 1}, given={1: "a"})) as one,
        closing(open_residency(tmp_path / "shared", {1: 1}, given={1: "b"})) as other,
    ):
        assert [(False, True)] * 2 == [(mine.gives(1, "b"), mine.gives(1, "a")) for mine in (other, one)]


def test_instances_that_forget_the_same_adapter_leave_no_descriptor_open(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Nor one with a lock, which would hold up the next request for the adapter."""
    with closing(open_residency(tmp_path / "shared", {1: 1}, 1)) as mine:
        unlink = os.unlink

        def unlink_twice(path: str, **within: int) -> None:
            unlink(path, **within)
            unlink(path, **within)

        before = len(os.listdir("/proc/self/fd"))  # noqa: PTH208
        with monkeypatch.context() as another:
            another.setattr(os, "unlink", unlink_twice)
            mine.accepted(2, 1)
        mine.ended()

        assert before == len(os.listdir("/proc/self/fd"))  # noqa: PTH208
        assert not mine.holds(1)


def test_adapters_of_many_pages_take_no_memory(tmp_path: Path) -> None:
    """Where a file has as many bytes as its adapter has pages."""
    with closing(open_residency(tmp_path / "shared", {1: 1 << 31})):
        assert 0 == (tmp_path / "shared" / "held" / "1").stat().st_blocks


def test_what_has_been_idle_for_longest_is_forgotten_first(tmp_path: Path) -> None:
    """As the engine evicts; in pages, of which an adapter may take several, and never what a request uses."""
    with ExitStack() as stack:
        one, other = (
            stack.enter_context(closing(open_residency(tmp_path / "shared", {1: 1, 2: 2, 3: 1}, 4))) for _ in range(2)
        )
        one.accepted(1, 1)  # in use from here on
        other.accepted(4, 1)
        other.ended()

        assert [True, False, True, True] == [one.holds(task_id) for task_id in (1, 2, 3, 4)]

        one.ended()
        other.accepted(3, 1)
        other.ended()
        other.accepted(5, 2)
        other.ended()

        assert [True, False, True, False, True] == [one.holds(task_id) for task_id in (1, 2, 3, 4, 5)]


@pytest.mark.parametrize(
    ("pages", "held"),
    [
        (0, {1: False, 2: False, 3: False, 4: True}),
        (None, {1: False, 2: False, 3: False, 4: True}),
        (1, {4: True}),
        (2, {4: True}),  # it has two pages
        (3, {3: True, 4: True}),
        (4, {3: True, 4: True}),  # two more are needed: the engine has evicted it, and all that ended before
        (5, {2: True, 3: True, 4: True}),
        (6, {1: True, 2: True, 3: True, 4: True}),
        (100, {1: True, 2: True, 3: True, 4: True}),
    ],
)
def test_what_the_engine_certainly_holds_is_what_fits_of_what_was_used_last(
    tmp_path: Path, pages: int | None, held: dict[int, bool]
) -> None:
    """Its warmup has loaded them in this order. Who was told how large the cache is tells the others."""
    with (
        closing(open_residency(tmp_path / "shared", {1: 1, 2: 2, 3: 1, 4: 2}, pages)) as one,
        closing(open_residency(tmp_path / "shared", {})) as other,
    ):
        assert held == one.certainty() == other.certainty()


def test_what_was_used_last_is_certain_until_something_else_was(tmp_path: Path) -> None:
    """In a cache of unknown size. A miss takes it away; and in a cache that is known later, the rest is known, too."""
    with closing(open_residency(tmp_path / "shared", {1: 1, 2: 1, 3: 1}, 0)) as mine:
        mine.accepted(1, 1)
        mine.ended()
        assert {1: True, 2: False, 3: False} == mine.certainty()

        mine.accepted(4, 1)
        assert {1: False, 2: False, 3: False, 4: True} == mine.certainty()

        mine.ended()
        mine.missed(4, mine.belief(4))
        mine.missed(2, mine.belief(2))
        assert {1: True, 3: False} == mine.certainty()

        with closing(open_residency(tmp_path / "shared", {}, 2)):
            assert {1: True, 3: True} == mine.certainty()

        shutil.rmtree(tmp_path / "shared")
        assert {} == mine.certainty()


def test_those_in_line_are_told_apart(tmp_path: Path) -> None:
    """For whoever wants to know what is waited for."""
    with (
        closing(open_residency(tmp_path / "shared", {})) as mine,
        mine.place(7, 1) as first,
        mine.place(5, 1) as second,
    ):
        second.join()
        first.join()

        assert [7, 5] == mine.waiting()


def test_what_was_retired_before_is_known_to_who_comes_later(tmp_path: Path) -> None:
    """Also to instances that are loaded again; not where the directory was lost."""
    with (
        closing(open_residency(tmp_path / "shared", {}, retired=[2, 5])) as one,
        closing(open_residency(tmp_path / "shared", {}, retired=[2, 5, 7])) as other,
    ):
        assert [{2, 5}] * 2 == [one.retired_before(), other.retired_before()]

        shutil.rmtree(tmp_path / "shared")

        assert set() == one.retired_before()


@pytest.mark.parametrize("name", ["tritonlora-demo-x7_1kq", "tritonlora-models", "tritonlora-1-2-mine"])
def test_directories_of_others_stay(tmp_path: Path, name: str) -> None:
    """Whose names begin like ours, or whose content is not ours."""
    (tmp_path / name).mkdir()
    (tmp_path / name / "adapter_model.safetensors").touch()
    open_residency(tmp_path / "tritonlora-1-1-lora_router", {}).close()

    assert [f"{name}/adapter_model.safetensors"] == [
        path.relative_to(tmp_path).as_posix() for path in tmp_path.rglob("*") if path.is_file()
    ]


def test_a_request_that_ends_twice_at_once_closes_one_descriptor_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The second time, the number may be another file's."""
    with closing(open_residency(tmp_path / "shared", {})) as mine:
        mine.accepted(1, 1)
        utime, close = os.utime, os.close
        closed: list[int] = []

        def note(descriptor: int) -> None:
            closed.append(descriptor)
            close(descriptor)

        def and_again(*arguments: Any, **times: Any) -> None:
            monkeypatch.setattr(os, "utime", utime)
            mine.ended()
            utime(*arguments, **times)

        monkeypatch.setattr(os, "utime", and_again)
        monkeypatch.setattr(os, "close", note)
        mine.ended()
        monkeypatch.setattr(os, "close", close)

    assert 1 == len(closed)


def test_servers_do_not_share_by_accident(monkeypatch: pytest.MonkeyPatch) -> None:
    """The name says which server, of which process id namespace, and which model; and when that one was started."""
    directory = shared_directory("lora_router")
    namespace = Path("/proc/self/ns/pid").stat().st_ino
    started = psutil.Process(os.getppid()).create_time() - psutil.boot_time()

    assert directory.name.startswith(f"{residency.PREFIX}{namespace}-")
    assert directory.name.endswith(f"-{os.getppid()}-lora_router")
    ticks = int(directory.name.split("-")[2])
    assert abs(ticks / os.sysconf("SC_CLK_TCK") - started) < 1

    monkeypatch.setattr(residency, "start_ticks", lambda _: ticks + 1)

    assert directory != shared_directory("lora_router"), "of a server that has the process id of one that is gone"


# What somebody else could put there


def _directory(path: Path, mode: int) -> Path:
    path.mkdir()
    path.chmod(mode)
    return path


PLANTED: dict[str, Callable[[Path], object]] = {
    "anybody may write": lambda shared: _directory(shared, 0o777),
    "a group may write": lambda shared: _directory(shared, 0o770),
    "a link to a directory": lambda shared: shared.symlink_to("elsewhere"),
    "a link to nothing": lambda shared: shared.symlink_to("nowhere"),
    "a file": lambda shared: shared.touch(),
    "a part is a link": lambda shared: (_directory(shared, 0o700) / "held").symlink_to("../elsewhere"),
    "a part is open to all": lambda shared: _directory(_directory(shared, 0o700) / "line", 0o777),
}


@pytest.mark.parametrize("plant", PLANTED)
def test_a_directory_that_others_could_write_to_is_refused(tmp_path: Path, plant: str) -> None:
    """With its path, and what to do; what a link leads to is not touched."""
    elsewhere = tmp_path / "elsewhere"
    open_residency(elsewhere, {7: 1}).abandon()  # it stays
    before = sorted(path.relative_to(tmp_path) for path in elsewhere.rglob("*"))
    shared = tmp_path / "shared"
    PLANTED[plant](shared)
    with pytest.raises(SharedMemoryError, match=rf"^{shared}.*; remove it$"):
        open_residency(shared, {5: 1})

    assert before == sorted(path.relative_to(tmp_path) for path in elsewhere.rglob("*"))


def test_a_directory_of_another_user_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Although nobody else can write to it. Nor is it removed, when its server is gone."""
    left = tmp_path / f"{residency.PREFIX}1-2-3-lora_router"
    open_residency(left, {}).abandon()
    monkeypatch.setattr(os, "geteuid", lambda: os.getuid() + 1)
    with pytest.raises(
        SharedMemoryError, match=rf"^{left} belongs to user {os.getuid()}, with mode 700; expected user"
    ):
        open_residency(left, {})
    with pytest.raises(SharedMemoryError):  # the new one is not of that user either
        open_residency(tmp_path / f"{residency.PREFIX}1-2-4-lora_router", {})

    assert left.exists()


def test_no_link_in_it_is_followed(tmp_path: Path) -> None:
    """Not to truncate, to write, to date, nor to lock what it leads to."""
    victim = tmp_path / "victim"
    victim.write_text("mine")
    os.utime(victim, (1, 1))
    with closing(open_residency(tmp_path / "shared", {}, 1)) as mine:
        for name in ("held/5", "loading/5", "statistics/0", "ended", "publisher"):
            path = tmp_path / "shared" / name
            path.parent.mkdir(exist_ok=True)
            path.unlink(missing_ok=True)
            path.symlink_to(victim)
        statistics = open_inside(mine.descriptor, "statistics")
        Statistics(statistics).add("pirate", "OK")
        for task_id in (5, 6):
            mine.accepted(task_id, 1)
            mine.ended()
        with pytest.raises(OSError, match="Too many levels of symbolic links"), mine.claim(5, 1):
            pass
        with pytest.raises(OSError, match="Too many levels of symbolic links"):
            open_file_inside(mine.descriptor, "publisher", "wb")

        assert {"pirate": 1.0} == {name: row["OK"] for name, row in read_statistics(statistics).items()}

    found = victim.stat()
    assert (1.0, 1.0, "mine") == (found.st_atime, found.st_mtime, victim.read_text())
