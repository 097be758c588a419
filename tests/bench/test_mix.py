# SPDX-FileCopyrightText: the tritonlora authors
# SPDX-License-Identifier: Apache-2.0
"""The mix benchmark's judgement, without a server."""

from __future__ import annotations

import pytest

from tritonlora.bench import mix
from tritonlora.bench.measured import Part
from tritonlora.bench.mix import History, Sizes, Verdict, judge, spread, under_load
from tritonlora.bench.mix_clients import GARBLED, LEFT, Record, task_id_of
from tritonlora.cli.commands import main

UNKNOWN = "unknown LoRA adapter 'passing'; available: n1"


def history() -> History:
    """n1 is 1 for good; replaced is 7, and 8 after a change from 10 to 12; passing is 9 after one from 20 to 21."""
    found = History({"n1": 1, "replaced": 7, "passing": None})
    found.change("replaced", 8, 10.0, 12.0)
    found.change("passing", 9, 20.0, 21.0)
    return found


def record(name: str, began: float, ended: float, task_id: int | None, failure: str | None = None) -> Record:
    """A request over HTTP."""
    return Record("http", name, began, None, ended, task_id, failure)


@pytest.mark.parametrize(
    "one",
    [
        record("n1", 0, 100, 1),
        record("replaced", 0, 9, 7),
        record("replaced", 0, 9, None, LEFT),
        record("replaced", 0, 11, 8),
        record("replaced", 11.9, 30, 7),
        record("replaced", 12.1, 30, 8, LEFT),
        record("passing", 20.5, 30, 9),
    ],
)
def test_a_response_may_be_of_any_adapter_that_the_name_had_meanwhile(one: Record) -> None:
    """While a change is under way, the server may know of it or not."""
    assert Verdict() == judge([one], history())


@pytest.mark.parametrize(
    "one",
    [
        record("n1", 0, 100, 2),
        record("replaced", 0, 9, 8),
        record("replaced", 12.1, 30, 7),
        record("replaced", 12.1, 30, 7, LEFT),
        record("passing", 0, 19, 9),
        record("n1", 0, 1, None, f"{GARBLED}: b'[1]hel[1]'"),
    ],
)
def test_a_response_of_another_adapter_is_wrong(one: Record) -> None:
    """Also of a client that left, and of the adapter before once a change was done."""
    verdict = judge([one], history())

    assert ([], 1) == (verdict.unexplained, len(verdict.wrong))


@pytest.mark.parametrize(
    ("one", "reason"),
    [
        (record("passing", 0, 19, None, UNKNOWN), "not registered at that time"),
        (record("passing", 0, 20.5, None, '{"message": "The model \'passing\' does not exist"}'), "not registered"),
        (record("replaced", 9, 11, None, "LoRA adapter 'replaced': file is missing"), "changed while it was under way"),
        (record("n1", 0, 1, None, "it does not fit beside the adapters in use; waited 30 s; ask again"), "capacity"),
    ],
)
def test_an_error_with_a_reason_is_counted_by_it(one: Record, reason: str) -> None:
    """The table at that time, or a full cache."""
    verdict = judge([one, one], history())

    assert ([], [], [2]) == (verdict.wrong, verdict.unexplained, [*verdict.explained.values()])
    assert reason in next(iter(verdict.explained))


@pytest.mark.parametrize(
    "one",
    [
        record("n1", 0, 1, None, "unknown LoRA adapter 'n1'"),
        record("passing", 21.5, 30, None, UNKNOWN),
        record("replaced", 13, 14, None, "LoRA adapter 'replaced': file is missing"),
        record("n1", 0, 1, None, "ConnectionResetError: "),
        record("n1", 0, 1, None, ""),
    ],
)
def test_an_error_of_an_adapter_that_was_there_has_no_reason(one: Record) -> None:
    """It is shown, and the exit code is 1."""
    verdict = judge([one], history())

    assert ([], 1, 0) == (verdict.wrong, len(verdict.unexplained), len(verdict.explained))


@pytest.mark.parametrize(
    ("answer", "tokens", "task_id"),
    [
        (b"[12]hello[12]he", 15, 12),
        (b"[12]hel", None, 12),
        (b"[12]hello[12]he", 16, None),
        (b"[12]hello[13]he", 15, None),
        (b"[base]hello", 11, None),
        (b"[1", None, None),
        (b"\xff\xfe", 2, None),
    ],
)
def test_a_response_tells_its_adapter_with_every_token(answer: bytes, tokens: int | None, task_id: int | None) -> None:
    """One that lacks a token, or has tokens of two adapters, is of none."""
    assert task_id == task_id_of(answer, tokens)


def test_sizes_are_medians_of_a_tenth() -> None:
    """The first tenth warms up."""
    samples = [Sizes(float(number), 3.0) for number in range(100)]

    assert (14.5, 54.5, 94.5) == tuple(one.nbytes for one in spread(samples))
    assert (Sizes(5.0, 6.0),) * 3 == spread([Sizes(5.0, 6.0)])


def test_sizes_are_those_while_clients_began_requests() -> None:
    """Before and after, there are fewer connections."""
    samples = [(float(second), {"openai": Sizes(1.0, float(second))}) for second in range(10)]
    found = under_load(samples, [record("n1", 2.5, 9, 1), record("n1", 6.5, 9, 1)])

    assert {"openai": [Sizes(1.0, files) for files in (3.0, 4.0, 5.0, 6.0)]} == found
    assert 10 == len(under_load(samples, [record("n1", 2.5, 9, 1)])["openai"]), "a short run has what it has"


@pytest.mark.parametrize(("is_sound", "code"), [(True, 0), (False, 1)])
def test_the_exit_code_tells_whether_all_was_sound(
    is_sound: bool, code: int, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """The results are printed in both cases."""
    monkeypatch.setattr(mix, "run", lambda *_: (Part("mix", "", (), (), ("some requests",)), is_sound))

    assert code == main(["bench", "mix"])
    assert "mix: some requests" in capsys.readouterr().out
