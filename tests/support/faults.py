# SPDX-FileCopyrightText: the tritonlora authors
# SPDX-License-Identifier: Apache-2.0
"""Commands that are killed, or whose file system refuses, at any operation on files.

The command runs in a process of its own. An audit hook of Python's sees each operation just before the kernel does,
whatever function of the standard library asks for it.
"""

from __future__ import annotations

import functools
import multiprocessing
import os
import shutil
import signal
import sys
from collections.abc import Iterator, Sequence
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
    _start_forkserver()
    process = _context.Process(target=_run, args=([*arguments], str(watched), at, error, operations, umask, str(log)))
    process.start()
    process.join(TIMEOUT)
    exit_code = process.exitcode
    if exit_code is None:
        process.kill()
        process.join()
        raise TimeoutError(f"{arguments} did not end")
    if exit_code < 0:
        return Outcome(exit_code, faulted=True)
    return Outcome(exit_code % _FAULTED, faulted=exit_code >= _FAULTED)


def complete(arguments: Sequence[str], *, umask: int = 0o022, log: Path = Path(os.devnull)) -> int:
    """Run a command of tritonlora, to which nothing happens; its exit code. TimeoutError where it does not end."""
    return run(arguments, Path("/nowhere"), 0, umask=umask, log=log).exit_code


def _run(
    arguments: list[str],
    watched: str,
    at: int,
    error: int | None,
    operations: frozenset[str],
    umask: int,
    log: str,
) -> None:
    os.umask(umask)
    output = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600)
    os.dup2(output, 1)
    os.dup2(output, 2)
    seen, faulted = 0, False

    def hook(event: str, parts: tuple[Any, ...]) -> None:
        nonlocal seen, faulted
        if event not in operations or (event == "open" and not parts[2] & _WRITES):
            return
        if not any(path.startswith(watched) for path in _paths(event, parts)):
            return
        seen += 1
        if seen == at + 1:
            faulted = True
            if error is None:
                os.kill(os.getpid(), signal.SIGKILL)
            else:
                raise OSError(error, os.strerror(error), str(parts[0]))

    from tritonlora.cli import commands

    sys.addaudithook(hook)
    code = commands.main(arguments)
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code + _FAULTED * faulted)


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


def stops(arguments: list[str], base: Path, root: Path, *, step: int = 1) -> Iterator[int]:
    """Kill a command before its first, second, … operation, each time on a fresh copy of `base` at `root`.

    The last time it comes to its end. `step`: before each `step`-th operation only.
    """
    for at in range(0, 1000, step):
        shutil.rmtree(root, ignore_errors=True)
        shutil.copytree(base, root, symlinks=True)
        outcome = run(arguments, root, at)
        assert outcome.exit_code == (-signal.SIGKILL if outcome.faulted else 0)
        yield at
        if not outcome.faulted:
            assert at > 5, "it was seen to do next to nothing"
            return
    pytest.fail("it never came to its end")
