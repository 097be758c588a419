# SPDX-FileCopyrightText: the tritonlora authors
# SPDX-License-Identifier: Apache-2.0
"""What the router's instances believe the engine's LoRA cache to hold, and who waits for room in it.

Strategy. Triton runs each instance of the router in a process of its own. What they share are files in a directory in
memory, and locks on files (`flock`), which the kernel takes from a process that dies:

    held/<lora_task_id>      the engine has answered a request for the adapter, and has not missed it since
    loading/<lora_task_id>   locked by the instance that is sending the adapter's weights
    line/<arrival>-<pid>     locked by a request that waits for room in the cache; the one that came first is tried next
    ended                    touched whenever a request for an adapter has ended: there may be room now

What is believed is learnt from the engine's answers only. A wrong belief costs time and nothing else: a miss is
recovered from, and the engine ignores weights that it has. So every operation takes a lost directory for an empty one.

This file runs inside a plain Triton container: standard library only.
"""

from __future__ import annotations

import contextlib
import fcntl
import os
import shutil
import tempfile
import time
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import IO

PREFIX = "tritonlora-"
# How long requests for adapters that are held overtake a line, which makes the most of what is loaded, before they join
# it, so that those in it are not kept waiting for ever.
OVERTAKING_SECONDS = 1.0
POLL_SECONDS = 0.002
FIRST_RETRY_SECONDS = 0.005


def shared_directory(router: str) -> Path:
    """Where the instances of the router of that name in this tritonserver keep what they share.

    Each instance is a child process of tritonserver. Containers may share /dev/shm and have process ids of their own.
    """
    memory = Path("/dev/shm")  # noqa: S108  names in it are unique, and symbolic links are not followed
    parent = memory if memory.is_dir() else Path(tempfile.gettempdir())
    return parent / f"{PREFIX}{Path('/proc/self/ns/pid').stat().st_ino}-{os.getppid()}-{router}"


def open_residency(directory: Path, warmed: Iterable[int]) -> Residency:
    """Take part in what is shared in `directory`; the first one makes it, with `warmed` as held.

    Directories that servers have left behind, which were killed, are removed.
    """
    for other in directory.parent.glob(f"{PREFIX}*"):
        if other != directory:
            _remove_unused(other)
    while True:
        if not directory.exists():
            _make(directory, warmed)
        with contextlib.suppress(FileNotFoundError):
            descriptor = os.open(directory, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW)
            fcntl.flock(descriptor, fcntl.LOCK_SH)
            with contextlib.suppress(FileNotFoundError):
                if os.path.samestat(os.fstat(descriptor), directory.stat()):
                    return Residency(directory, descriptor)
            os.close(descriptor)  # it was removed in between


def _make(directory: Path, warmed: Iterable[int]) -> None:
    """All of it at once, or nothing when another instance was faster."""
    fresh = Path(tempfile.mkdtemp(prefix=f".{PREFIX}", dir=directory.parent))
    for name in ("held", "loading", "line"):
        (fresh / name).mkdir()
    for file in ("ended", *(f"held/{task_id}" for task_id in warmed)):
        (fresh / file).touch()
    try:
        fresh.rename(directory)
    except OSError:
        shutil.rmtree(fresh)


def _remove_unused(directory: Path) -> None:
    """Remove it when no process uses it and it is ours."""
    with contextlib.suppress(OSError):
        descriptor = os.open(directory, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW)
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            shutil.rmtree(directory)
        finally:
            os.close(descriptor)


class Residency:
    """One instance's view of the shared directory."""

    def __init__(self, directory: Path, descriptor: int) -> None:
        """`descriptor` is the directory's, with a shared lock."""
        self.directory = directory
        self._held = str(directory / "held")
        self._line = str(directory / "line")
        self._descriptor = descriptor

    def close(self) -> None:
        """Take part no more; the last one removes the directory."""
        os.close(self._descriptor)
        _remove_unused(self.directory)

    def holds(self, task_id: int) -> bool:
        """Whether a request for the adapter can go out without weights."""
        return os.path.exists(f"{self._held}/{task_id}")  # noqa: PTH110  for every request: Path is slow

    def accepted(self, task_id: int) -> None:
        """The engine answered a request for the adapter."""
        if not self.holds(task_id):
            with contextlib.suppress(OSError):
                (self.directory / "held" / str(task_id)).touch()

    def missed(self, task_id: int) -> None:
        """The engine does not hold the adapter."""
        with contextlib.suppress(OSError):
            (self.directory / "held" / str(task_id)).unlink()

    def ended(self) -> None:
        """A request for an adapter ended, so that the engine may evict that adapter now."""
        now = time.monotonic_ns()
        with contextlib.suppress(OSError):
            os.utime(self.directory / "ended", ns=(now, now))

    def ends(self) -> int:
        """A number that changes whenever a request for an adapter ends."""
        with contextlib.suppress(OSError):
            return (self.directory / "ended").stat().st_mtime_ns
        return 0

    @contextlib.contextmanager
    def claim(self, task_id: int, timeout: float, *, insist: bool = False) -> Iterator[bool]:
        """True: the caller loads the adapter, and no other instance does before it leaves. False: another one just
        has, unless the caller insists. TimeoutError when another one has been at it for `timeout` seconds.
        """
        with contextlib.ExitStack() as held:
            with contextlib.suppress(FileNotFoundError):
                file = held.enter_context((self.directory / "loading" / str(task_id)).open("w"))
                _lock(file, time.monotonic() + timeout)
            mine = insist or not self.holds(task_id)
            if not mine:
                held.close()
            yield mine

    @contextlib.contextmanager
    def place(self, retry_interval: float) -> Iterator[Place]:
        """A request's place in the line for room in the cache; it does not stand there until it joins."""
        place = Place(self, retry_interval)
        try:
            yield place
        finally:
            place.leave()

    def has_line_for(self, task_id: int) -> bool:
        """Whether a request for the adapter must join the line, and not overtake it."""
        first = self.first_in_line()
        if first is None:
            return False
        return not self.holds(task_id) or time.monotonic_ns() - _arrival(first) > OVERTAKING_SECONDS * 1e9

    def first_in_line(self) -> str | None:
        """The file of the request that came first."""
        with contextlib.suppress(OSError):
            return min(os.listdir(self._line), default=None)  # noqa: PTH208  for every request: Path is slow
        return None

    def drop_if_dead(self, ticket: str) -> None:
        """Remove a request from the line whose process has died."""
        path = self.directory / "line" / ticket
        with contextlib.suppress(OSError), path.open() as file:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            path.unlink()


class Place:
    """A request's place in the line."""

    def __init__(self, residency: Residency, retry_interval: float) -> None:
        """`retry_interval` in seconds is the longest wait between two tries of the first in line: other clients of the
        engine, of whom the router knows nothing, may make room.
        """
        self._residency = residency
        self._retry_interval = retry_interval
        self._ticket = f"{time.monotonic_ns():020d}-{os.getpid()}"
        self._file: IO[str] | None = None
        self._ends: int | None = None  # as it was before the last try
        self._pause = FIRST_RETRY_SECONDS
        self._retry_at = 0.0

    def join(self) -> None:
        """Stand in line, as of the time when the request came."""
        if self._file:
            return
        directory = self._residency.directory
        with contextlib.suppress(OSError):
            path = directory / f"ticket-{self._ticket}"
            self._file = path.open("w")
            fcntl.flock(self._file, fcntl.LOCK_EX)
            path.rename(directory / "line" / self._ticket)  # locked before others see it

    def wait(self, deadline: float) -> None:
        """Return when the request may be tried: at once when it does not stand in line, else when it is the first and
        there may be room. TimeoutError at `deadline` (time.monotonic).
        """
        while self._file and not self._may_try():
            if time.monotonic() >= deadline:
                raise TimeoutError
            time.sleep(POLL_SECONDS)
        self._ends = self._residency.ends()
        self._retry_at = time.monotonic() + self._pause
        self._pause = min(2 * self._pause, self._retry_interval)

    def _may_try(self) -> bool:
        first = self._residency.first_in_line()
        if first not in (None, self._ticket):
            self._residency.drop_if_dead(str(first))
            return False
        return self._ends != self._residency.ends() or time.monotonic() >= self._retry_at

    def leave(self) -> None:
        """Stand in line no more."""
        if self._file:
            with contextlib.suppress(OSError):
                (self._residency.directory / "line" / self._ticket).unlink()
            self._file.close()
            self._file = None


def _arrival(ticket: str) -> int:
    return int(ticket.split("-")[0])


def _lock(file: IO[str], deadline: float) -> None:
    """Lock the file, or raise TimeoutError at `deadline` (time.monotonic)."""
    while True:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            if time.monotonic() >= deadline:
                raise TimeoutError from None
            time.sleep(POLL_SECONDS)
        else:
            return
