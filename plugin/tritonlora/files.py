# SPDX-FileCopyrightText: the tritonlora authors
# SPDX-License-Identifier: Apache-2.0
"""Writing files so that nothing is ever half there.

A file is written under a temporary name in its own directory, synced and renamed. One process writes to a model
repository at a time.
"""

from __future__ import annotations

import contextlib
import hashlib
import logging
import os
import secrets
import shutil
from collections.abc import Collection, Iterator
from pathlib import Path

import filelock

from tritonlora.errors import RepositoryError

LOCK_TIMEOUT_SECONDS = 600.0
SILENT_WAIT_SECONDS = 1.0
HASH_CHUNK = 1 << 20
TEMPORARY_SUFFIX = ".tritonlora-tmp"

_log = logging.getLogger(__name__)  # warnings go to stderr where nobody has set up logging


@contextlib.contextmanager
def locked(directory: Path) -> Iterator[None]:
    """Be the only writer, and turn the file system's refusals into RepositoryError."""
    lock = filelock.FileLock(directory / ".lock", timeout=LOCK_TIMEOUT_SECONDS)
    with writing(directory), contextlib.ExitStack() as held:
        try:
            held.enter_context(lock.acquire(timeout=SILENT_WAIT_SECONDS))
        except filelock.Timeout:
            _log.warning("waiting for another tritonlora that is writing to %s", directory)
            try:
                held.enter_context(lock)
            except filelock.Timeout:
                problem = f"another tritonlora has been writing to {directory} for a long time"
                raise RepositoryError(problem) from None
        yield


@contextlib.contextmanager
def writing(directory: Path) -> Iterator[None]:
    """Turn the file system's refusals into RepositoryError."""
    try:
        yield
    except OSError as error:
        path, reason = error.filename or directory, error.strerror or error
        raise RepositoryError(f"cannot write to {path}: {reason}; put that right and run the command again") from error


@contextlib.contextmanager
def temporary_name(path: Path) -> Iterator[Path]:
    """A name beside `path` for a file in the making; whatever is there at the end is deleted."""
    temporary = path.with_name(f".{path.name}.{secrets.token_hex(4)}{TEMPORARY_SUFFIX}")
    try:
        yield temporary
    finally:
        temporary.unlink(missing_ok=True)


@contextlib.contextmanager
def temporary_directory(path: Path) -> Iterator[Path]:
    """A directory in the making beside `path`; it is deleted at the end unless it was moved away."""
    temporary = path.with_name(f".{path.name}.{secrets.token_hex(4)}{TEMPORARY_SUFFIX}")
    temporary.mkdir()
    try:
        yield temporary
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def place_for_models(root: Path, but: Collection[str] = ()) -> Path:
    """A model's directory, none of `but`, in which other models can be made and from which they can be moved.

    Beside the models, one in the making would be taken for a model itself. One may lie on another file system.
    """
    models = sorted(path.parent for path in root.glob("*/config.pbtxt") if path.parent.name not in but)
    found = next((model for model in models if model.stat().st_dev == root.stat().st_dev), None)
    if found is None:
        raise RepositoryError(
            f"every model of {str(root)!r} is on another file system than the repository itself; put one of them there"
        )
    return found


def publish(temporary: Path, path: Path) -> None:
    """Give a finished file its name, so that it is there whole or not at all, also after a power cut."""
    with temporary.open("rb+") as file:
        os.fsync(file.fileno())
    temporary.replace(path)
    sync_directory(path.parent)


def sync_directory(path: Path) -> None:
    """What was renamed in it stays so, also after a power cut."""
    directory = os.open(path, os.O_RDONLY)
    try:
        os.fsync(directory)
    finally:
        os.close(directory)


def delete(path: Path) -> None:
    """Delete a file, a link or a whole directory; it may be gone already."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path, ignore_errors=True)
    else:
        path.unlink(missing_ok=True)


def write_bytes(path: Path, content: bytes) -> None:
    """Write a whole file, that which `path` leads to; one that has this content already is not touched."""
    path = path.resolve()
    with contextlib.suppress(FileNotFoundError):
        if path.read_bytes() == content:
            return
    with temporary_name(path) as temporary:
        temporary.write_bytes(content)
        if path.exists():
            before = path.stat()
            temporary.chmod(before.st_mode & 0o7777)
            with contextlib.suppress(PermissionError):  # of a file that is somebody else's
                os.chown(temporary, before.st_uid, before.st_gid)
        publish(temporary, path)


def write_text(path: Path, text: str) -> None:
    """Write a whole text file, with the line ends that the text has."""
    write_bytes(path, text.encode())


def sha256_of(path: Path) -> str:
    """The SHA-256 of a file's content, in hexadecimal."""
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while chunk := file.read(HASH_CHUNK):
            digest.update(chunk)
    return digest.hexdigest()
