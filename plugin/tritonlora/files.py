# SPDX-FileCopyrightText: the tritonlora authors
# SPDX-License-Identifier: Apache-2.0
"""Writes files atomically, so that no file is ever half-written, and deletes them.

A file is written under a temporary name in its own directory, synced and renamed. The writer holds a lock (`flock`) on
the temporary file. A temporary file without a lock was left by a command that was killed. One process writes to a model
repository at a time.

A file that replaces another one keeps its mode and owner. All users can read a new file, whatever the umask is, because
the server may run as another user. Other users can never write to it.
"""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import logging
import os
import re
import secrets
import shutil
import stat
import time
from collections.abc import Collection, Iterator
from pathlib import Path

import filelock

from tritonlora.errors import RepositoryError
from tritonlora.serving.file_version import has_content, open_file

LOCK = ".lock"
LOCK_TIMEOUT_SECONDS = 600.0
SILENT_WAIT_SECONDS = 1.0
POLL_SECONDS = 0.05
HASH_CHUNK = 1 << 20
TEMPORARY_SUFFIX = ".tritonlora-tmp"
_NEW_FILE, _NEW_DIRECTORY = 0o664, 0o775  # before the umask is applied
_READABLE_FILE, _READABLE_DIRECTORY = 0o444, 0o555

_log = logging.getLogger(__name__)  # Python writes warnings to stderr if the program has not set up logging


# One writer at a time


@contextlib.contextmanager
def locked(directory: Path) -> Iterator[None]:
    """Hold the writer's lock of `directory` within the block. An OSError in the block becomes a RepositoryError.

    RepositoryError when another process holds the lock for LOCK_TIMEOUT_SECONDS.
    """
    lock = filelock.FileLock(directory / LOCK, timeout=LOCK_TIMEOUT_SECONDS, mode=0o644)
    with writing(directory), contextlib.ExitStack() as held:
        try:
            held.enter_context(lock.acquire(timeout=SILENT_WAIT_SECONDS))
        except filelock.Timeout:
            _log.warning("waiting for another tritonlora that is writing to %s", directory)
            try:
                held.enter_context(lock)
            except filelock.Timeout:
                raise _busy(directory) from None
        yield


@contextlib.contextmanager
def reading(directory: Path) -> Iterator[bool]:
    """Keep writers away while several files that belong together are read. Other readers may hold the lock, too.

    Yields False if there is no lock: no command has written yet, or the file system has no locks. It writes nothing, so
    that a read-only directory can be read. RepositoryError when a writer holds the lock for LOCK_TIMEOUT_SECONDS.
    """
    try:
        descriptor = os.open(directory / LOCK, os.O_RDONLY | os.O_NONBLOCK | os.O_NOFOLLOW | os.O_CLOEXEC)
    except OSError:
        yield False
        return
    try:
        yield _hold_shared(descriptor, directory)
    finally:
        os.close(descriptor)


def _hold_shared(descriptor: int, directory: Path) -> bool:
    started, said = time.monotonic(), False
    while True:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_SH | fcntl.LOCK_NB)
        except BlockingIOError:
            waited = time.monotonic() - started
            if waited > LOCK_TIMEOUT_SECONDS:
                raise _busy(directory) from None
            if waited > SILENT_WAIT_SECONDS and not said:
                _log.warning("waiting for another tritonlora that is writing to %s", directory)
                said = True
            time.sleep(POLL_SECONDS)
        except OSError:
            return False
        else:
            return True


def _busy(directory: Path) -> RepositoryError:
    return RepositoryError(f"another tritonlora has been writing to {directory} for a long time")


@contextlib.contextmanager
def writing(directory: Path) -> Iterator[None]:
    """Turn an OSError in the block into a RepositoryError that names the path."""
    try:
        yield
    except OSError as error:
        path, reason = error.filename or directory, error.strerror or error
        raise RepositoryError(f"cannot write to {path}: {reason}; put that right and run the command again") from error


# Temporary files and directories


@contextlib.contextmanager
def temporary_name(path: Path) -> Iterator[Path]:
    """An empty file beside `path`, to write to and to `publish`. It is deleted at the end unless it was renamed."""
    temporary, descriptor = _new_file(path)
    try:
        yield temporary
    finally:
        try:
            delete(temporary)
        finally:
            os.close(descriptor)


def _new_file(path: Path) -> tuple[Path, int]:
    """A new temporary file beside `path`, and a descriptor that holds its lock."""
    while True:
        temporary = _beside(path)
        descriptor = os.open(temporary, os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, _NEW_FILE)
        with contextlib.suppress(OSError):  # a file system without locks
            fcntl.flock(descriptor, fcntl.LOCK_EX)
        if os.fstat(descriptor).st_nlink:
            return temporary, descriptor
        os.close(descriptor)  # another process took it for abandoned before it was locked, and deleted it


@contextlib.contextmanager
def temporary_directory(path: Path) -> Iterator[Path]:
    """A new directory beside `path` that all users can read. It is deleted at the end unless it was moved away."""
    temporary = _beside(path)
    temporary.mkdir(_NEW_DIRECTORY)
    descriptor = os.open(temporary, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        with contextlib.suppress(OSError):
            fcntl.flock(descriptor, fcntl.LOCK_EX)
        _set_mode(descriptor, stat.S_IMODE(os.fstat(descriptor).st_mode) | _READABLE_DIRECTORY)
        yield temporary
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
        os.close(descriptor)


def _beside(path: Path) -> Path:
    return path.with_name(f".{path.name}.{secrets.token_hex(4)}{TEMPORARY_SUFFIX}")


def is_abandoned(path: Path) -> bool:
    """Whether a temporary file or directory was left by a process that has ended.

    False for a link, for a path that cannot be opened, and on a file system without locks.
    """
    try:
        kind = path.lstat().st_mode
        if not stat.S_ISREG(kind) and not stat.S_ISDIR(kind):
            return False
        descriptor = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_NOFOLLOW | os.O_CLOEXEC)
    except OSError:
        return False
    try:
        fcntl.flock(descriptor, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except OSError:
        return False
    finally:
        os.close(descriptor)
    return True


def abandoned_beside(paths: Collection[Path]) -> list[Path]:
    """The temporary files for `paths` that killed processes of this user have left."""
    left = []
    for path in paths:
        name = re.compile(rf"\.{re.escape(path.name)}\.[0-9a-f]{{8}}{re.escape(TEMPORARY_SUFFIX)}")
        found = (one for one in path.parent.glob(f".*{TEMPORARY_SUFFIX}") if name.fullmatch(one.name))
        left += [one for one in found if is_abandoned(one) and not one.is_dir() and one.stat().st_uid == os.geteuid()]
    return left


def place_for_models(root: Path, but: Collection[str] = ()) -> Path:
    """A model's directory in which a new model can be made, and moved from there to its place in `root`.

    Directly in `root`, Triton would take an incomplete model for a model. The directory is on the same file system as
    `root`, and is none of `but`. RepositoryError when there is no such directory.
    """
    models = sorted(path.parent for path in root.glob("*/config.pbtxt") if path.parent.name not in but)
    found = next((model for model in models if model.stat().st_dev == root.stat().st_dev), None)
    if found is None:
        raise RepositoryError(
            f"every model of {str(root)!r} is on another file system than the repository itself; put one of them there"
        )
    return found


# Final files


def publish(temporary: Path, path: Path, *, like: Path | None = None, for_all: bool = True) -> None:
    """Rename a finished file to `path`, so that the file is there whole or not at all, even after a power cut.

    The file gets the mode and the owner of `like`, by default of the file that it replaces. Without such a file, all
    users can read it; with `for_all=False` the umask alone decides.
    """
    descriptor = os.open(temporary, os.O_RDWR | os.O_CLOEXEC)
    try:
        _give_mode_and_owner(descriptor, like or path, for_all=for_all)
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
    temporary.replace(path)
    sync_directory(path.parent)


def _give_mode_and_owner(descriptor: int, like: Path, *, for_all: bool) -> None:
    mode = stat.S_IMODE(os.fstat(descriptor).st_mode)
    try:
        before = like.lstat()
    except FileNotFoundError:
        before = None
    if before is None or not stat.S_ISREG(before.st_mode):
        _set_mode(descriptor, mode | _READABLE_FILE if for_all else mode)
        return
    mode = stat.S_IMODE(before.st_mode)
    try:
        os.fchown(descriptor, before.st_uid, before.st_gid)
    except PermissionError:  # only root can change a file's owner
        try:
            os.fchown(descriptor, -1, before.st_gid)
        except PermissionError:
            mode |= _READABLE_FILE  # otherwise the old owner, which may be the server, could not read it any more
    _set_mode(descriptor, mode)


def _set_mode(descriptor: int, mode: int) -> None:
    if stat.S_IMODE(os.fstat(descriptor).st_mode) != mode:
        with contextlib.suppress(OSError):  # a file system without modes
            os.fchmod(descriptor, mode)


def make_directory(path: Path) -> None:
    """Make the directory `path` and its missing parents, which all users can read. It may be there already."""
    if path.is_dir():
        return
    make_directory(path.parent)
    with temporary_directory(path) as directory:
        try:
            directory.rename(path)
        except OSError:
            if not path.is_dir():
                raise
    sync_directory(path.parent)


def sync_directory(path: Path) -> None:
    """Sync a directory, so that a rename in it lasts even after a power cut."""
    directory = os.open(path, os.O_RDONLY)
    try:
        os.fsync(directory)
    finally:
        os.close(directory)


def delete(path: Path) -> None:
    """Delete a file, a link or a whole directory; it may be gone already. OSError when a part of it stays."""
    try:
        if path.is_dir() and not path.is_symlink():
            shutil.rmtree(path)
        elif os.path.lexists(path):
            path.unlink()
    except FileNotFoundError:
        if path.is_dir() and not path.is_symlink():  # another process is deleting it at the same time
            delete(path)


def write_bytes(path: Path, content: bytes, *, like: Path | None = None) -> None:
    """Write a whole file. A link is followed. A file that has this content already is not touched.

    A new file gets the mode and owner of `like`. OSError when `path` is not a regular file, or cannot be written.
    """
    if has_content(path, content):
        return
    with contextlib.suppress(FileNotFoundError):
        os.close(open_file(path))  # raises OSError if `path` is not a regular file
    path = path.resolve()
    with temporary_name(path) as temporary:
        temporary.write_bytes(content)
        publish(temporary, path, like=None if path.exists() else like)


def write_text(path: Path, text: str) -> None:
    """Write a whole text file, with the line ends that the text has."""
    write_bytes(path, text.encode())


def sha256_of(path: Path) -> str:
    """The SHA-256 of a regular file's content, in hexadecimal."""
    digest = hashlib.sha256()
    with open(open_file(path), "rb", buffering=0) as file:  # noqa: PTH123  a descriptor
        while chunk := file.read(HASH_CHUNK):
            digest.update(chunk)
    return digest.hexdigest()
