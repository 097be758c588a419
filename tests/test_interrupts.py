# SPDX-FileCopyrightText: the tritonlora authors
# SPDX-License-Identifier: Apache-2.0
"""interrupts.py: a signal waits, and is not lost."""

from __future__ import annotations

import signal
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor

import pytest

from tritonlora.interrupts import ENDING, handled, held


@pytest.fixture(params=ENDING)
def number(request: pytest.FixtureRequest) -> Iterator[signal.Signals]:
    """A signal whose handler raises KeyboardInterrupt, as the command line's does."""
    before = signal.signal(request.param, signal.default_int_handler)
    yield request.param
    signal.signal(request.param, before)


def test_a_signal_takes_effect_at_the_end_of_the_block(number: signal.Signals) -> None:
    """Once, however often it came."""
    done = []

    def block() -> None:
        with held():
            signal.raise_signal(number)
            signal.raise_signal(number)
            done.append("the rest of the block")

    with pytest.raises(KeyboardInterrupt):
        block()

    assert ["the rest of the block"] == done


def test_afterwards_signals_take_effect_at_once(number: signal.Signals) -> None:
    """The handlers are those of before."""
    with held():
        pass

    assert signal.getsignal(number) is signal.default_int_handler


def test_what_nobody_handles_is_left_alone(number: signal.Signals) -> None:
    """The default action ends the process, and an ignored signal is ignored."""
    signal.signal(number, signal.SIG_IGN)
    with held():
        signal.raise_signal(number)

    assert signal.getsignal(number) is signal.SIG_IGN


def test_a_handler_is_there_within_the_block(number: signal.Signals) -> None:
    """For every signal that asks for the end."""
    came = []
    with handled(lambda number, _: came.append(number)):
        signal.raise_signal(number)

    assert [number] == came
    assert signal.getsignal(number) is signal.default_int_handler


def test_an_ignored_signal_stays_ignored(number: signal.Signals) -> None:
    """`nohup tritonlora serve` outlives its terminal."""
    signal.signal(number, signal.SIG_IGN)
    with handled(signal.default_int_handler):
        assert signal.getsignal(number) is signal.SIG_IGN
        assert 1 == sum(signal.getsignal(one) is signal.SIG_IGN for one in ENDING)


def test_a_thread_has_nothing_to_hold(number: signal.Signals) -> None:
    """Python runs handlers in the main thread, and lets no other one set them."""

    def block() -> object:
        with held():
            return signal.getsignal(number)

    with ThreadPoolExecutor(1) as pool:
        assert pool.submit(block).result() is signal.default_int_handler
