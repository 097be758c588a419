# SPDX-FileCopyrightText: the tritonlora authors
# SPDX-License-Identifier: Apache-2.0
"""stubs.py on real processes, of which this one is the server; tests/server/test_dead_stubs.py has a tritonserver."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path

import pytest

from tritonlora.launch.stubs import Stubs

Start = Callable[..., "subprocess.Popen[bytes]"]
READY, UNAVAILABLE, LOADING = ({"model": state} for state in ("READY", "UNAVAILABLE", "LOADING"))


@pytest.fixture
def start(tmp_path: Path) -> Iterator[Start]:
    """`start(instance)`: a process with the command line of a stub. It exits with the status that its stdin says."""
    model_py = tmp_path / "model" / "1" / "model.py"
    model_py.parent.mkdir(parents=True)
    model_py.write_text("raise SystemExit(int(input()))")
    started: list[subprocess.Popen[bytes]] = []

    def begin(instance: str) -> subprocess.Popen[bytes]:
        words = [
            str(model_py),
            "region",
            "1048576",
            "1048576",
            str(os.getpid()),
            "/backends",
            "336",
            instance,
            "DEFAULT",
        ]
        command = ["/backends/triton_python_backend_stub", *words]
        started.append(subprocess.Popen(command, executable=sys.executable, stdin=subprocess.PIPE))
        return started[-1]

    yield begin
    for one in started:
        one.kill()
        one.communicate()


def _end(process: subprocess.Popen[bytes], how: int | signal.Signals) -> None:
    """Let it exit with a status or die of a signal, and stay a zombie."""
    if isinstance(how, signal.Signals):
        process.send_signal(how)
    elif process.stdin is not None:
        process.stdin.write(b"%d\n" % how)
        process.stdin.flush()
    os.waitid(os.P_PID, process.pid, os.WEXITED | os.WNOWAIT)


@pytest.mark.parametrize(
    ("how", "words"),
    [
        (signal.SIGKILL, "was killed by SIGKILL, perhaps for want of memory"),
        (signal.SIGSEGV, "was killed by SIGSEGV"),
        (3, "exited with status 3"),
        (0, "exited with status 0"),
    ],
)
@pytest.mark.parametrize("states", [READY, None], ids=["ready", "a server that does not say"])
def test_a_stub_whose_status_nobody_collects_has_died(
    start: Start, how: int | signal.Signals, words: str, states: Mapping[str, str] | None
) -> None:
    """Told at the second look, once; the other instances of its model run."""
    stubs = Stubs(os.getpid(), lambda: states)
    dead, _ = start("model_0_0"), start("model_0_1")
    stubs.note()
    _end(dead, how)
    found = [[str(one) for one in stubs.deaths()] for _ in range(3)]

    assert [[], [f"the process of model 'model' (model_0_0, pid {dead.pid}) {words}"], []] == found


@pytest.mark.parametrize(
    ("states", "others", "deaths"),
    [(READY, 0, 1), (READY, 1, 0), (UNAVAILABLE, 0, 0), (LOADING, 0, 0), (None, 0, 0)],
    ids=["no stub is left", "fewer instances", "unloaded", "loading", "a server that does not say"],
)
def test_a_stub_whose_status_was_collected_has_died_if_its_model_is_ready_without_any(
    start: Start, states: Mapping[str, str] | None, others: int, deaths: int
) -> None:
    """As newer Python backends collect it. Else Triton has ended it, or may have."""
    stubs = Stubs(os.getpid(), lambda: states)
    dead = start("model_0_0")
    for number in range(others):
        start(f"model_0_{number + 1}")
    stubs.note()
    _end(dead, signal.SIGKILL)
    dead.wait()
    found = [str(one) for _ in range(3) for one in stubs.deaths()]

    assert [f"the process of model 'model' (model_0_0, pid {dead.pid}) ended"] * deaths == found


def test_a_stub_that_another_one_follows_is_not_missed(start: Start) -> None:
    """Its model was loaded again; the new one is watched in its place."""
    stubs = Stubs(os.getpid(), lambda: READY)
    dead = start("model_0_0")
    stubs.note()
    _end(dead, signal.SIGKILL)
    assert [] == stubs.deaths()
    after = start("model_0_0")
    assert [] == [*stubs.deaths(), *stubs.deaths()]
    _end(after, signal.SIGKILL)

    assert [[], [after.pid]] == [[one.stub.pid for one in stubs.deaths()] for _ in range(2)]


def test_a_dead_stub_of_a_model_that_a_client_has_unloaded_is_none(start: Start) -> None:
    """2.51 never collects it."""
    stubs = Stubs(os.getpid(), lambda: UNAVAILABLE)
    dead = start("model_0_0")
    stubs.note()
    _end(dead, signal.SIGKILL)

    assert [] == [*stubs.deaths(), *stubs.deaths()]
