# SPDX-FileCopyrightText: the tritonlora authors
# SPDX-License-Identifier: Apache-2.0
"""Commands that are killed, or whose file system refuses, at any operation on files.

The command runs in a process of its own. An audit hook of Python's sees each operation just before the kernel does,
whatever function of the standard library asks for it. A command that is killed leaves what is on the disk just then:
`stops` runs a command once, and copies what is there before each operation.
"""

from __future__ import annotations

import functools
import multiprocessing
import os
import shutil
import signal
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from multiprocessing import forkserver
from pathlib import Path
from typing import Any

import pytest

OPERATIONS = frozenset(
    {
        *("open", "os.rename", "os.remove", "os.rmdir", "os.mkdir", "os.chmod", "os.chown", "os.utime"),
        *("os.truncate", "os.link", "os.symlink"),
    }
)
DELETIONS = frozenset({"os.remove", "os.rmdir"})
_WRITES = os.O_WRONLY | os.O_RDWR | os.O_CREAT | os.O_TRUNC
TIMEOUT = 120.0  # seconds
MOST = 1000  # operations of a command
_FAULTED = 64  # added to the exit code of a command that met its fault and lived on

_context = multiprocessing.get_context("forkserver")
# All that a command imports, so that no child does. typer imports its adapters, and with them pydantic, when it parses
# its first command.
_context.set_forkserver_preload(
    [
        *("faults", "torch", "typer._adapters", "rich.status", "tritonlora.cli.commands"),
        *(f"tritonlora.cli.{module}" for module in ("adapters", "convert", "repository", "server")),
        *("tritonlora.check.checks", "tritonlora.conversion.convert"),
    ]
)


@functools.cache
def _start_forkserver() -> None:
    """Let the process that forks find `faults`: before Python 3.13 it preloads without the sys.path of this one."""
    with pytest.MonkeyPatch.context() as patched:
        patched.setenv("PYTHONPATH", str(Path(__file__).parent), prepend=os.pathsep)
        forkserver.ensure_running()


@dataclass(frozen=True)
class Outcome:
    """How a command ended."""

    exit_code: int  # negative: the signal that killed it
    faulted: bool  # or it came to its end before


def run(
    arguments: Sequence[str],
    watched: Path,
    at: int,
    *,
    error: int | None = None,
    operations: frozenset[str] = OPERATIONS,
    umask: int = 0o022,
    log: Path = Path(os.devnull),
) -> Outcome:
    """Run a command of tritonlora; its `at`-th operation on what is in `watched`, from 0, is not done any more.

    The command is killed there, or gets the `error`, an errno. What it prints goes to `log`.
    """
    exit_code = _join(_run_faulted, [*arguments], str(watched), at, error, operations, umask, str(log))
    if exit_code < 0:
        return Outcome(exit_code, faulted=True)
    return Outcome(exit_code % _FAULTED, faulted=exit_code >= _FAULTED)


def complete(arguments: Sequence[str], *, umask: int = 0o022, log: Path = Path(os.devnull)) -> int:
    """Run a command of tritonlora, to which nothing happens; its exit code. TimeoutError where it does not end."""
    return run(arguments, Path("/nowhere"), 0, umask=umask, log=log).exit_code


def stops(arguments: list[str], base: Path, root: Path, *, step: int = 1) -> Iterator[int | None]:
    """What a command leaves of a copy of `base` at `root`, killed before its operation 0, 1, … or at its end (None).

    `step`: before each `step`-th operation only.
    """
    states = root.with_name(f"states of {root.name}")
    states.mkdir()
    _replace(root, base)
    assert 0 == _join(_run_copied, [*arguments], str(root), str(states), step)
    root.rename(states / "end")
    killed = range(0, step * (len([*states.iterdir()]) - 1), step)
    assert 5 < len(killed) * step < MOST, "it was seen to do next to nothing, or too much"
    for at in (*killed, None):
        _replace(root, states / ("end" if at is None else str(at)))
        yield at
    shutil.rmtree(states)


def _replace(root: Path, content: Path) -> None:
    shutil.rmtree(root, ignore_errors=True)
    shutil.copytree(content, root, symlinks=True)


# In the process of the command


def _join(function: Callable[..., None], *parameters: object) -> int:
    """The exit code of a fresh process that calls `function`; negative: the signal that killed it."""
    _start_forkserver()
    process = _context.Process(target=function, args=parameters)
    process.start()
    process.join(TIMEOUT)
    if process.exitcode is None:
        process.kill()
        process.join()
        raise TimeoutError(f"{parameters[0]} did not end")
    return process.exitcode


def _run_faulted(
    arguments: list[str],
    watched: str,
    at: int,
    error: int | None,
    operations: frozenset[str],
    umask: int,
    log: str,
) -> None:
    faulted = False

    def meet(number: int, name: object) -> None:
        nonlocal faulted
        if number == at:
            faulted = True
            if error is None:
                os.kill(os.getpid(), signal.SIGKILL)
            else:
                raise OSError(error, os.strerror(error), str(name))

    os.umask(umask)
    code = _main(arguments, log, watched, operations, meet)
    os._exit(code + _FAULTED * faulted)


def _run_copied(arguments: list[str], watched: str, states: str, step: int) -> None:
    def copy(number: int, name: object) -> None:
        if number < MOST and number % step == 0:
            shutil.copytree(watched, os.path.join(states, str(number)), symlinks=True)  # noqa: PTH118

    os._exit(_main(arguments, os.devnull, watched, OPERATIONS, copy))


def _main(
    arguments: list[str],
    log: str,
    watched: str,
    operations: frozenset[str],
    before: Callable[[int, object], None],
) -> int:
    """Run a command, which prints to `log`; `before(number, name)` is called before each operation in `watched`."""
    output = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600)
    os.dup2(output, 1)
    os.dup2(output, 2)
    seen = 0

    def hook(event: str, parts: tuple[Any, ...]) -> None:
        nonlocal seen
        if event not in operations or (event == "open" and not parts[2] & _WRITES):
            return
        if any(path.startswith(watched) for path in _paths(event, parts)):
            seen += 1
            before(seen - 1, parts[0])

    from tritonlora.cli import commands

    sys.addaudithook(hook)
    code = commands.main(arguments)
    sys.stdout.flush()
    sys.stderr.flush()
    return code


def _paths(event: str, parts: tuple[Any, ...]) -> list[str]:
    """What an operation is on; names may be relative to the descriptor of a directory, or be a descriptor."""
    if event in ("os.rename", "os.link"):
        return [_path(parts[0], parts[2]), _path(parts[1], parts[3])]
    directories = {"os.remove": 1, "os.rmdir": 1, "os.mkdir": 2, "os.chmod": 2, "os.chown": 3, "os.utime": 3}
    return [_path(parts[0], parts[directories[event]] if event in directories else -1)]


def _path(name: Any, directory: int) -> str:
    if isinstance(name, int):
        return str(_opened(name))
    return str((_opened(directory) if directory >= 0 else Path.cwd()) / os.fsdecode(name))


def _opened(descriptor: int) -> Path:
    return Path(f"/proc/self/fd/{descriptor}").readlink()
