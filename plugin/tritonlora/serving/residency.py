# SPDX-FileCopyrightText: the tritonlora authors
# SPDX-License-Identifier: Apache-2.0
"""Which adapters the router's instances believe the engine's LoRA cache to hold, and which requests wait for capacity.

Strategy. Triton runs each instance of the router in a process of its own. What they share are files in a directory in
memory, and locks on files (`flock`), which the kernel takes from a process that dies:

    held/<lora_task_id>      the engine has answered a request for the adapter, and has not missed it since. As many
                             bytes as the adapter takes pages; accessed when this came to be believed, modified when
                             the last request ended; locked by the requests that use it
    loading/<lora_task_id>   locked by the instance that is sending the adapter's weights
    line/<arrival>-<pid>-<lora_task_id>
                             locked by a request that waits for room in the cache; the one that came first is tried next
    given/<lora_task_id>     a symbolic link to what tells the content that the engine was started with or sent under
                             that id: it ignores another one
    cache_pages              as many bytes as the engine's cache has pages, as the router was told: 0 where it was not
    retired                  the lora_task_ids that were retired before the engine was started, one a line
    ended                    touched whenever a request for an adapter has ended: there may be room now

Others may write to /dev/shm. So the directory is used only if nobody else can write to it, and what is in it is opened
relative to its descriptor, without following links.

What is believed is learnt from the engine's answers only. The engine evicts the adapter whose last request ended
longest ago, of those that no request uses (TensorRT-LLM cpp/tensorrt_llm/runtime/loraCache.cpp). Where the cache's size
is known, what it cannot hold any more is forgotten in the same order, so that its next request brings the weights at
once instead of failing first; where it is not, an adapter is forgotten when the engine has missed it.

A wrong belief costs time and nothing else: a miss is recovered from, and the engine ignores weights that it has. So
every operation takes a lost directory for an empty one.
"""

from __future__ import annotations

import contextlib
import fcntl
import os
import re
import shutil
import stat
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from types import MappingProxyType
from typing import IO

from .adapter_table import AdapterTable
from .errors import SharedMemoryError
from .routing import warmed, warmed_contents
from .server_process import start_ticks

PREFIX = "tritonlora-"
_OURS = re.compile(PREFIX + r"\d+-\d+-.+")  # as `shared_directory` names them: others may begin in the same way
_OTHERS_WRITE = stat.S_IWGRP | stat.S_IWOTH
# How long requests for adapters that are held overtake a line, which makes the most of what is loaded, before they join
# it, so that those in it are not kept waiting for ever.
OVERTAKING_SECONDS = 1.0
POLL_SECONDS = 0.002
FIRST_RETRY_SECONDS = 0.005

Check = Callable[[], None]  # called all the while during a wait, which what it raises ends


def _go_on() -> None:
    """A check that never ends a wait."""


def shared_directory(router: str) -> Path:
    """The directory that the instances of the router `router` in this tritonserver share.

    Each instance is a child process of tritonserver. The server's process id and start time tell it from servers that
    have ended. The namespace tells apart containers, which may share /dev/shm and have process ids of their own.
    """
    server = os.getppid()
    namespace = Path("/proc/self/ns/pid").stat().st_ino
    return Path("/dev/shm", f"{PREFIX}{namespace}-{start_ticks(server)}-{server}-{router}")  # noqa: S108


def take_part(router: str, table: AdapterTable, cache_pages: int | None = None) -> Residency:
    """Take part in what the instances of a router share, as `open_residency` does: `table` is the one that the engine
    was started with, if this is the first instance.
    """
    return open_residency(
        shared_directory(router),
        warmed(table),
        cache_pages,
        given=warmed_contents(table),
        retired=table.retired_lora_task_ids,
    )


def open_residency(
    directory: Path,
    warmed: Mapping[int, int],
    cache_pages: int | None = None,
    *,
    given: Mapping[int, str] = MappingProxyType({}),
    retired: Iterable[int] = (),
) -> Residency:
    """Take part in what is shared in `directory`; the first one makes it, with `warmed` as held.

    `warmed` has the pages of the adapters that the engine was started with, by lora_task_id, in the order in which they
    were loaded, and `given` tells their contents; `cache_pages` is the size of the engine's cache, 0 where it is not
    known, and None of those who have not been told. `retired` are the lora_task_ids that are in use no more.

    Directories that servers have left behind, which were killed, are removed. SharedMemoryError when others could write
    to what is there.
    """
    for other in directory.parent.glob(f"{PREFIX}*"):
        if other != directory and _OURS.fullmatch(other.name):
            _remove_unused(other)
    while True:
        if not os.path.lexists(directory):
            _make(directory, warmed, given, retired)
        with contextlib.suppress(FileNotFoundError):
            descriptor = _open_ours(directory)
            fcntl.flock(descriptor, fcntl.LOCK_SH)
            with contextlib.suppress(FileNotFoundError):
                if os.path.samestat(os.fstat(descriptor), directory.lstat()):
                    return Residency(directory, descriptor, cache_pages)
            os.close(descriptor)  # it was removed in between


def _open_ours(path: Path | str, within: int | None = None) -> int:
    """A descriptor of a directory; SharedMemoryError when it is none, or others can write to it."""
    where = path if within is None else Path(os.readlink(f"/proc/self/fd/{within}"), path)  # noqa: PTH115
    try:
        descriptor = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW, dir_fd=within)
    except FileNotFoundError:
        raise
    except OSError as error:
        raise SharedMemoryError(f"{where} is no directory that can be read ({error.strerror}); remove it") from None
    found = os.fstat(descriptor)
    if found.st_uid == os.geteuid() and not found.st_mode & _OTHERS_WRITE:
        return descriptor
    os.close(descriptor)
    raise SharedMemoryError(
        f"{where} belongs to user {found.st_uid}, with mode {stat.S_IMODE(found.st_mode):o}; expected user "
        f"{os.geteuid()}, and nobody else to have write permission; remove it"
    )


def open_inside(descriptor: int, name: str) -> int:
    """A descriptor of a directory in another one; it is made if it is not there. SharedMemoryError as above."""
    with contextlib.suppress(FileExistsError):
        os.mkdir(name, 0o700, dir_fd=descriptor)
    return _open_ours(name, descriptor)


def open_file_inside(descriptor: int, name: str, mode: str) -> IO[bytes]:
    """A file in a directory, in a mode of `open`; OSError where it is a link."""

    def opener(name: str, flags: int) -> int:
        return os.open(name, flags | os.O_NOFOLLOW, 0o600, dir_fd=descriptor)

    return open(name, mode, opener=opener)


def _make(directory: Path, warmed: Mapping[int, int], given: Mapping[int, str], retired: Iterable[int]) -> None:
    """All of it at once, or nothing when another instance was faster."""
    fresh = tempfile.mkdtemp(prefix=f".{PREFIX}", dir=directory.parent)
    with contextlib.ExitStack() as stack:

        def opened(descriptor: int) -> int:
            stack.callback(os.close, descriptor)
            return descriptor

        root = opened(_open_ours(fresh))
        loading, held, links = (opened(open_inside(root, name)) for name in ("loading", "held", "given"))
        with open_file_inside(root, "retired", "wb") as file:
            file.write("\n".join(map(str, retired)).encode())
        open_file_inside(root, "ended", "wb").close()
        os.utime("ended", (0, 0), dir_fd=root)
        for order, (task_id, pages) in enumerate(warmed.items(), 1):
            open_file_inside(loading, str(task_id), "wb").close()
            with open_file_inside(held, str(task_id), "wb") as file:
                file.truncate(pages)  # which takes no page of memory
                os.utime(file.fileno(), ns=(order, order))
        for task_id, content in given.items():
            os.symlink(content, str(task_id), dir_fd=links)
    try:
        os.rename(fresh, directory)  # noqa: PTH104
    except OSError:
        shutil.rmtree(fresh)


def _remove_unused(directory: Path) -> None:
    """Remove it when it is ours, and no process uses it."""
    with contextlib.suppress(OSError, SharedMemoryError):
        descriptor = _open_ours(directory)
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            os.stat("ended", dir_fd=descriptor, follow_symlinks=False)  # else it is not one of these
            if os.path.samestat(os.fstat(descriptor), directory.lstat()):  # else others have removed it, and made anew
                shutil.rmtree(directory)
        finally:
            os.close(descriptor)


def _forget_unused(name: str, held: int) -> bool:
    """Forget a held adapter that no request uses; whether it was this process that did."""
    with contextlib.suppress(OSError), open_file_inside(held, name, "rb") as file:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        os.unlink(name, dir_fd=held)
        return True
    return False


class Residency:
    """One instance's view of the shared directory."""

    def __init__(self, directory: Path, descriptor: int, cache_pages: int | None) -> None:
        """`descriptor` is the directory's, with a shared lock."""
        self._cache_pages = cache_pages
        self._used: int | None = None  # descriptor of the held adapter that a request of this instance uses
        self._used_since = 0  # the `belief` in it
        self._claimed: IO[bytes] | None = None  # the adapter that a request of this instance loads
        self._place: Place | None = None  # of a request of this instance
        self._given: dict[int, str] = {}  # those that were looked at: they do not change
        self._directory = directory
        self.descriptor = descriptor
        names = ("held", "line", "loading", "given")
        self._parts = [open_inside(descriptor, name) for name in names]
        self._held, self.line, self._loading, self._given_links = self._parts
        if cache_pages is not None:
            with open_file_inside(descriptor, "cache_pages", "ab") as file:
                file.truncate(cache_pages)  # which takes no page of memory

    def close(self) -> None:
        """Take part no more; the last one removes the directory."""
        for descriptor in (*self._parts, self.descriptor):
            os.close(descriptor)
        _remove_unused(self._directory)

    def abandon(self) -> None:
        """Take part no more, in the midst of a request that another thread is stuck in: nobody waits for that one."""
        self.ended()
        for held in (self._claimed, self._place):
            if held is not None:
                held.close()
        # They stay open: a number that was closed may be another file's by the time that the stuck thread goes on.
        fcntl.flock(self.descriptor, fcntl.LOCK_UN)

    def holds(self, task_id: int) -> bool:
        """Whether a request for the adapter can go out without weights."""
        return self.belief(task_id) != 0

    def belief(self, task_id: int) -> int:
        """Since when the adapter is believed to be held, which tells this belief from a later one; 0 when it is not."""
        with contextlib.suppress(OSError):
            return os.stat(str(task_id), dir_fd=self._held, follow_symlinks=False).st_atime_ns
        return 0

    def accepted(self, task_id: int, pages: int) -> None:
        """The engine answered a request for the adapter, which takes that many pages, and holds it until `ended`."""
        self._touch(time.monotonic_ns())  # the resolver looks, which then counts on nothing
        with contextlib.suppress(OSError):
            self._used = os.open(str(task_id), os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW, 0o600, dir_fd=self._held)
            fcntl.flock(self._used, fcntl.LOCK_SH | fcntl.LOCK_NB)  # nobody holds another for longer than a moment
            found = os.fstat(self._used)
            self._used_since = found.st_atime_ns
            if not found.st_size:
                os.truncate(self._used, pages)
                self._used_since = time.monotonic_ns()
                os.utime(self._used, ns=(self._used_since, self._used_since))
                self._forget_evicted()

    def _forget_evicted(self) -> None:
        """Forget what the engine cannot hold beside the rest: those that have been idle for longest."""
        if not self._cache_pages:
            return
        held = self._by_last_end()
        surplus = sum(pages for pages, _ in held) - self._cache_pages
        for pages, name in held:
            if surplus <= 0:
                return
            surplus -= pages * _forget_unused(name, self._held)

    def _by_last_end(self) -> list[tuple[int, str]]:
        """Pages and lora_task_id of each held adapter; first the one whose last request ended longest ago."""
        files = [(file.stat(follow_symlinks=False), file.name) for file in os.scandir(self._held)]
        held = sorted((found.st_mtime_ns, found.st_size, name) for found, name in files)
        return [(pages, name) for _, pages, name in held]

    def certainty(self) -> dict[int, bool]:
        """The lora_task_ids of the adapters that the engine may hold, and whether it certainly does.

        It certainly holds the one that was used last, and the ones used before that as far as they fit its cache
        together. Where the size of the cache is known, it holds no others. This counts on the router alone: an adapter
        that somebody else gives the engine takes room, too.
        """
        held = dict[int, bool]()
        with contextlib.suppress(OSError):
            room = 0
            with contextlib.suppress(FileNotFoundError):
                room = os.stat("cache_pages", dir_fd=self.descriptor, follow_symlinks=False).st_size
            is_known = room > 0
            for pages, name in reversed(self._by_last_end()):
                room -= pages
                fits = room >= 0 or not held
                if is_known and not fits:
                    break
                held[int(name)] = fits
        return held

    def missed(self, task_id: int, belief: int) -> None:
        """The engine did not hold the adapter, against that `belief`; since then it may have been given it."""
        if self.belief(task_id) == belief:
            with contextlib.suppress(OSError):
                os.unlink(str(task_id), dir_fd=self._held)

    def ended(self) -> None:
        """This instance's request for an adapter ended, so that the engine may evict that adapter now."""
        now = time.monotonic_ns()
        used, self._used = self._used, None  # first of all: who was left behind may come here at the same time
        if used is not None:
            os.utime(used, ns=(self._used_since, now))
            os.close(used)
        self._touch(now)

    def _touch(self, now: int) -> None:
        with contextlib.suppress(OSError):
            os.utime("ended", ns=(now, now), dir_fd=self.descriptor, follow_symlinks=False)

    def last_end(self) -> int:
        """When the last request for an adapter ended (time.monotonic_ns); 0 when none has."""
        with contextlib.suppress(OSError):
            return os.stat("ended", dir_fd=self.descriptor, follow_symlinks=False).st_mtime_ns
        return 0

    @contextlib.contextmanager
    def claim(self, task_id: int, timeout: float, *, insist: bool = False, check: Check = _go_on) -> Iterator[bool]:
        """True: the caller loads the adapter, and no other instance does before it leaves. False: another one just
        has, unless the caller insists. TimeoutError when another one has been at it for `timeout` seconds.
        """
        with contextlib.ExitStack() as held:
            with contextlib.suppress(FileNotFoundError):
                self._claimed = held.enter_context(open_file_inside(self._loading, str(task_id), "wb"))
                _lock(self._claimed, time.monotonic() + timeout, check)
            mine = insist or not self.holds(task_id)
            if not mine:
                held.close()
            yield mine

    def gives(self, task_id: int, content: str) -> bool:
        """Bind the id to this content for good; False when the id is bound to other content already.

        Call it only once the weights are read, and just before they are sent. Otherwise an id would stay bound to
        content that the engine never got.
        """
        if self._given.get(task_id) != content:
            with contextlib.suppress(OSError):
                os.symlink(content, str(task_id), dir_fd=self._given_links)
        return self.may_give(task_id, content)

    def may_give(self, task_id: int, content: str) -> bool:
        """Whether the engine was neither started with nor sent another content under the id."""
        if self._given.get(task_id) != content:
            with contextlib.suppress(OSError):
                found = os.readlink(str(task_id), dir_fd=self._given_links)
                if found != content:
                    return False
                self._given[task_id] = content
        return True

    def retired_before(self) -> frozenset[int]:
        """The lora_task_ids that were retired before the instances began, none when that is not known."""
        with contextlib.suppress(OSError), open_file_inside(self.descriptor, "retired", "rb") as file:
            return frozenset(map(int, file.read().split()))
        return frozenset()

    def was_held(self, task_id: int) -> bool:
        """Whether any instance has loaded the adapter before."""
        with contextlib.suppress(OSError):
            os.stat(str(task_id), dir_fd=self._loading, follow_symlinks=False)
            return True
        return False

    def place(self, task_id: int, retry_interval: float) -> Place:
        """A request's place in the line for room in the cache; it does not stand there until it joins."""
        self._place = Place(self, task_id, retry_interval)
        return self._place

    def has_line_for(self, task_id: int) -> bool:
        """Whether a request for the adapter must join the line, and not overtake it."""
        first = self.first_in_line()
        if first is None:
            return False
        return not self.holds(task_id) or time.monotonic_ns() - _arrival(first) > OVERTAKING_SECONDS * 1e9

    def was_used_lately(self, seconds: float) -> bool:
        """Whether a request of the router's was accepted, or ended, in so many seconds."""
        last = self.last_end()
        return bool(last) and time.monotonic() - last / 1e9 < seconds

    def first_in_line(self) -> str | None:
        """The file of the request that came first."""
        with contextlib.suppress(OSError):
            return min(os.listdir(self.line), default=None)  # noqa: PTH208  a descriptor
        return None

    def waiting(self) -> list[int]:
        """lora_task_ids of the requests that wait for room, the first one first."""
        with contextlib.suppress(OSError):
            return [int(ticket.split("-")[2]) for ticket in sorted(os.listdir(self.line))]  # noqa: PTH208
        return []

    def drop_if_dead(self, ticket: str) -> None:
        """Remove a request from the line whose process has died."""
        with contextlib.suppress(OSError), open_file_inside(self.line, ticket, "rb") as file:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            os.unlink(ticket, dir_fd=self.line)


class Place:
    """A request's place in the line, which it leaves with the context."""

    def __init__(self, residency: Residency, task_id: int, retry_interval: float) -> None:
        """`retry_interval` in seconds is the longest wait between two tries of the first in line: other clients of the
        engine, of whom the router knows nothing, may make room.
        """
        self._residency = residency
        self._task_id = task_id
        self._retry_interval = retry_interval
        self._arrived_at = time.monotonic_ns()
        self._ticket = ""
        self._has_joined = False
        self._file: IO[bytes] | None = None  # of the ticket; None, too, when the directory was lost
        self._tried_at = 0  # time.monotonic_ns
        self._pause = FIRST_RETRY_SECONDS
        self._retry_at = 0.0

    def __enter__(self) -> Place:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def join(self) -> None:
        """Stand in line, as of the time when the request came."""
        if self._has_joined:
            return
        self._has_joined = True
        self._ticket = f"{self._arrived_at:020d}-{os.getpid()}-{self._task_id}"
        unseen, shared, line = f"ticket-{self._ticket}", self._residency.descriptor, self._residency.line
        with contextlib.suppress(OSError):
            self._file = open_file_inside(shared, unseen, "wb")
            fcntl.flock(self._file, fcntl.LOCK_EX)
            os.rename(unseen, self._ticket, src_dir_fd=shared, dst_dir_fd=line)  # locked before others see it

    def wait(self, deadline: float, check: Check = _go_on) -> None:
        """Return when the request may be tried: at once when it does not stand in line, else when it is the first and
        there may be room. TimeoutError at `deadline` (time.monotonic).
        """
        while self._has_joined:
            check()
            if self._may_try():
                break
            if time.monotonic() >= deadline:
                raise TimeoutError
            time.sleep(POLL_SECONDS)
        self._tried_at = time.monotonic_ns()
        self._retry_at = time.monotonic() + self._pause
        self._pause = min(2 * self._pause, self._retry_interval)

    def _may_try(self) -> bool:
        first = self._residency.first_in_line()
        if first not in (None, self._ticket):
            self._residency.drop_if_dead(str(first))
            return False
        return self._residency.last_end() > self._tried_at or time.monotonic() >= self._retry_at

    def close(self) -> None:
        """Stand in line no more."""
        self._has_joined = False
        if self._file:
            with contextlib.suppress(OSError):
                os.unlink(self._ticket, dir_fd=self._residency.line)
            self._file.close()
            self._file = None


def _arrival(ticket: str) -> int:
    return int(ticket.split("-")[0])


def _lock(file: IO[bytes], deadline: float, check: Check) -> None:
    """Lock the file, or raise TimeoutError at `deadline` (time.monotonic)."""
    while True:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            if time.monotonic() >= deadline:
                raise TimeoutError from None
            check()
            time.sleep(POLL_SECONDS)
        else:
            return
