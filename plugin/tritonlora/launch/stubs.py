# SPDX-FileCopyrightText: the tritonlora authors
# SPDX-License-Identifier: Apache-2.0
"""Watch the stub processes of a server's Python-backend models, and find the stubs that have died.

The Python backend runs each instance of a model in a process of its own, a stub, which is a child of tritonserver. When
a stub is killed, Triton 2.51 still reports its model as ready, and starts no new stub.

A death differs from an end that Triton asked for:

- Triton collects the exit status of a stub that it has ended itself, at once. A stub that was killed stays a zombie.
- Newer Python backends also collect the status of a killed stub, when a client asks whether its model is ready
  (StubLauncher::StubActive, main branch of July 2026). Then the model is READY in the repository index, and no stub of
  the model is left.
- Triton starts the new stubs of a model that is loaded again before it ends the old ones.
"""

from __future__ import annotations

import os
import signal
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

from tritonlora.serving.server_process import stat_of

_PROC = Path("/proc")
_EXECUTABLE = "triton_python_backend_stub"
# python_backend, src/stub_launcher.cc: the words of a stub's command line
_MODEL_PY, _INSTANCE = 1, 8
READY = "READY"


@dataclass(frozen=True, slots=True)
class Stub:
    """The process of one instance of a Python-backend model."""

    pid: int
    version_directory: Path  # REPO/lora_router/1
    instance: str  # lora_router_0_2

    @property
    def model(self) -> str:
        """The name of the model."""
        return self.version_directory.parent.name

    def is_same_instance(self, other: Stub) -> bool:
        """Whether both stubs run, or ran, the same instance of the same version of a model."""
        return (self.version_directory, self.instance) == (other.version_directory, other.instance)


@dataclass(frozen=True, slots=True)
class Death:
    """A stub that ended without Triton ending it."""

    stub: Stub
    how: str  # "was killed by SIGKILL"

    def __str__(self) -> str:
        """The stub and how it ended, as a clause for a message."""
        return f"the process of model {self.stub.model!r} ({self.stub.instance}, pid {self.stub.pid}) {self.how}"


@dataclass(frozen=True, slots=True)
class _Process:
    """The fields of /proc/PID/stat that are needed of a process."""

    parent: int
    is_zombie: bool
    wait_status: int  # exit status of a zombie, as os.wait gives it


class Stubs:
    """The stubs of one server, remembered from one call to the next."""

    def __init__(self, server_pid: int, states: Callable[[], Mapping[str, str] | None]) -> None:
        """`states` asks the server for the state of each model, and returns None if the server gives no states."""
        self._server_pid = server_pid
        self._states = states
        self._seen: dict[int, Stub] = {}
        self._suspects: set[int] = set()

    def note(self) -> None:
        """Remember the stubs that run now, since a zombie has no command line left that names its model."""
        self._note(_descendants(self._server_pid))

    def runs(self, stub: Stub) -> bool:
        """Whether a process runs the instance of `stub`."""
        return any(one.is_same_instance(stub) for one in self._note(_descendants(self._server_pid)).values())

    def deaths(self) -> list[Death]:
        """The stubs that died since the last call. Each death is returned once.

        A stub counts as dead if two calls in a row find it so: Triton needs a moment to collect a stub that it ended.
        """
        processes = _descendants(self._server_pid)
        running = self._note(processes)
        lost = [stub for pid, stub in self._seen.items() if pid not in running]
        states = self._states() if lost else None
        found = []
        for stub in lost:
            process = processes.get(stub.pid)
            if _is_well(stub, running, states, is_zombie=process is not None):
                self._forget(stub)
            elif stub.pid not in self._suspects:
                self._suspects.add(stub.pid)
            elif process is not None or (states or {}).get(stub.model) == READY:
                self._forget(stub)
                found.append(Death(stub, _how(process)))
        return found

    def _note(self, processes: Mapping[int, _Process]) -> dict[int, Stub]:
        found = (_stub(pid) for pid, one in processes.items() if not one.is_zombie)
        running = {stub.pid: stub for stub in found if stub is not None}
        self._seen |= running
        return running

    def _forget(self, stub: Stub) -> None:
        del self._seen[stub.pid]
        self._suspects.discard(stub.pid)


def _is_well(stub: Stub, running: Mapping[int, Stub], states: Mapping[str, str] | None, *, is_zombie: bool) -> bool:
    """Whether the lost `stub` is no death: another stub runs its instance, or its model was changed on purpose."""
    if any(other.is_same_instance(stub) for other in running.values()):
        return True
    if states is not None and states.get(stub.model, "UNAVAILABLE") == "UNAVAILABLE":
        return True
    return not is_zombie and any(other.model == stub.model for other in running.values())  # fewer instances now


def _how(process: _Process | None) -> str:
    if process is None:
        return "ended"
    if os.WIFSIGNALED(process.wait_status):
        number = os.WTERMSIG(process.wait_status)
        name = signal.Signals(number).name if number in {*signal.Signals} else f"signal {number}"
        return f"was killed by {name}" + (", perhaps for want of memory" if number == signal.SIGKILL else "")
    return f"exited with status {os.WEXITSTATUS(process.wait_status)}"


def _descendants(pid: int) -> dict[int, _Process]:
    """Pid -> process for all processes below `pid`, which is tritonserver or an mpirun that started several."""
    everybody = {pid: _process(pid) for pid in map(int, (path.name for path in _PROC.glob("[0-9]*")))}
    children: dict[int, list[int]] = {}
    for one, process in everybody.items():
        if process is not None:
            children.setdefault(process.parent, []).append(one)
    found: dict[int, _Process] = {}
    queue = [pid]
    while queue:
        for child in children.get(queue.pop(), ()):
            if (process := everybody[child]) is not None:
                found[child] = process
                queue.append(child)
    return found


def _process(pid: int) -> _Process | None:
    """The process `pid`, from /proc; None if the process has ended meanwhile."""
    try:
        fields = stat_of(pid)
    except OSError:
        return None
    return _Process(parent=int(fields[1]), is_zombie=fields[0] in "ZX", wait_status=int(fields[-1]))


def _stub(pid: int) -> Stub | None:
    try:
        words = (_PROC / str(pid) / "cmdline").read_bytes().split(b"\0")
    except OSError:
        return None
    if len(words) <= _INSTANCE or Path(os.fsdecode(words[0])).name != _EXECUTABLE:
        return None
    return Stub(pid, Path(os.fsdecode(words[_MODEL_PY])).parent, os.fsdecode(words[_INSTANCE]))
