# SPDX-FileCopyrightText: the tritonlora authors
# SPDX-License-Identifier: Apache-2.0
"""worker.py: a thread that can be left behind."""

from __future__ import annotations

import threading
from collections.abc import Iterator

import pytest

from tritonlora.serving.abandonable import Silence, Worker


@pytest.fixture
def worker() -> Iterator[Worker]:
    """A worker that has nothing to do."""
    worker = Worker()
    yield worker
    worker.end()


def test_tasks_are_done_in_turn_by_one_thread(worker: Worker) -> None:
    """Another one than the caller's."""
    threads: list[int] = []

    assert [True, True] == [worker.do(lambda: threads.append(threading.get_ident()), lambda: False) for _ in range(2)]
    assert 1 == len({*threads})
    assert threading.get_ident() not in threads


def test_a_task_that_takes_long_is_waited_for_unless_it_is_stuck(worker: Worker) -> None:
    """However often one looks."""
    may_go_on = threading.Event()
    looks = 0

    def look() -> bool:
        nonlocal looks
        looks += 1
        if looks == 2:
            may_go_on.set()
        return False

    assert worker.do(lambda: assert_set(may_go_on), look)
    assert looks >= 2


def test_a_task_that_fails_is_done(worker: Worker) -> None:
    """And so is the next one."""
    done: list[int] = []

    assert worker.do(lambda: done.append(1 // 0), lambda: False)
    assert worker.do(lambda: done.append(1), lambda: False)
    assert [1] == done


def test_a_thread_that_was_left_behind_is_heard_by_nobody(worker: Worker) -> None:
    """The next task is done by another one, and not taken for done when the old one goes on after all."""
    may_go_on = threading.Event()
    has_gone_on = threading.Event()

    def stuck() -> None:
        assert_set(may_go_on)
        has_gone_on.set()

    assert not worker.do(stuck, lambda: True)
    assert worker.do(lambda: None, lambda: False)
    may_go_on.set()
    assert_set(has_gone_on)
    done: list[int] = []
    assert worker.do(lambda: done.append(1), lambda: False)
    assert [1] == done


def assert_set(event: threading.Event) -> None:
    """Wait for it."""
    assert event.wait(timeout=30)


def test_a_silence_is_too_long_sooner_before_the_first_answer_than_between_two(monkeypatch: pytest.MonkeyPatch) -> None:
    """Or the other way round; and there is none where nobody is waited for."""
    now = 0.0
    monkeypatch.setattr("tritonlora.serving.abandonable.time.monotonic", lambda: now)
    silence = Silence(before=2, between=5)
    seen = []
    for note in (None, silence.asked, silence.heard, silence.heard, silence.ended, silence.asked):
        if note:
            note()
        for pause in (1.5, 3.0, 3.0):
            now += pause
            seen.append(silence.is_too_long())

    assert [
        *(False, False, False),
        *(False, True, True),
        *(False, False, True),
        *(False, False, True),
        *(False, False, False),
        *(False, True, True),
    ] == seen
