# SPDX-FileCopyrightText: the tritonlora authors
# SPDX-License-Identifier: Apache-2.0
"""Bring the files of an adapter from a store into our cache, whole or to be resumed.

The cache has a directory for each location, and in it one for each revision:

    KEY/REVISION/            files of a revision, complete; it is renamed from KEY/REVISION.part
    KEY/REVISION.part/       files that are complete, and NAME.part of one that is not
    KEY/current.json         the revision that was seen last, for --offline

A part is only resumed by the same revision, so no file is ever made of two. The store's own digest and size are checked
for each file. After the last one the store is asked again: if a file has another tag, the content changed meanwhile.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import shutil
import time
from collections.abc import Generator
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Protocol

import platformdirs

from tritonlora.errors import SourceError
from tritonlora.files import HASH_CHUNK, locked, make_directory, sync_directory, write_text, writing
from tritonlora.serving.file_version import read_file
from tritonlora.sources import adapter_files
from tritonlora.sources.adapter_files import CONFIG, OnProgress
from tritonlora.sources.location import ARCHIVES, Location

ATTEMPTS, PAUSE_SECONDS = 4, 1.0  # attempts that brought no byte
CACHE_VARIABLE = "TRITONLORA_CACHE"
_KEPT_FREE = 64 << 20  # bytes of the disk


@dataclass(frozen=True, slots=True)
class Remote:
    """A file of a store, as the store describes it."""

    name: str
    nbytes: int | None  # None: not told
    tag: str  # the store's name for this content: another content has another tag; "": it gives none
    digest: tuple[str, bytes] | None = None  # (hashlib's name of the algorithm, digest)


class TransferEnded(Exception):
    """A transfer ended early; trying again from where it ended may help."""


class Store(Protocol):
    """Files under one location."""

    def look(self, name: str) -> Remote | None:
        """The file `name`, or None if there is none. "" is the location itself. SourceError when it cannot be told."""

    def read(self, remote: Remote, start: int) -> Generator[bytes, None, None]:
        """The bytes of a file from `start` on. TransferEnded when they end early; SourceError when they never come."""


def cache_directory() -> Path:
    """The directory of our cache, for this user: TRITONLORA_CACHE, or the platform's."""
    return Path(os.environ.get(CACHE_VARIABLE) or platformdirs.user_cache_path("tritonlora")) / "sources"


def resolve(location: Location, store: Store) -> tuple[list[Remote], str | None]:
    """The files of the adapter in a store, and their revision: the archive, or the config, the checkpoint, its shards.

    The revision is the tag of the one file, or the start of the SHA-256 over the tags of several. It is None if the
    store gives no tags. SourceError when there is no adapter.
    """
    if location.is_archive:
        found = [_required(store, "")]
    else:
        found = [_required(store, CONFIG)]
        candidates = [f"{name}{end}" for name in adapter_files.CHECKPOINTS for end in ("", adapter_files.INDEX)]
        weights = next((remote for name in candidates if (remote := store.look(name))), None)
        if weights is None:
            raise SourceError(f"it has {CONFIG}, but neither {' nor '.join(adapter_files.CHECKPOINTS)}")
        found.append(weights)
        if weights.name.endswith(adapter_files.INDEX):
            found += [_required(store, name) for name in adapter_files.shards(_index_of(store, weights))]
    adapter_files.check_size(sum(remote.nbytes or 0 for remote in found))
    if not all(remote.tag for remote in found):
        return found, None
    if len(found) == 1:
        return found, found[0].tag
    lines = "".join(sorted(f"{remote.name} {remote.tag}\n" for remote in found))
    return found, hashlib.sha256(lines.encode()).hexdigest()[:16]


def download(location: Location, store: Store, on_progress: OnProgress) -> tuple[Path, str | None]:
    """The directory of the adapter's files in the cache, and the revision.

    SourceError when a file does not come, or is not what the store promised. What has come by then stays for the next
    attempt, unless it is wrong.
    """
    home = _home(location)
    with writing(home):
        make_directory(home)
    with locked(home):
        remotes, revision = resolve(location, store)
        whole = home / hashlib.sha256((revision or "").encode()).hexdigest()[:16]
        part = whole.with_name(f"{whole.name}{_PART}")
        for stale in home.glob(f"*{_PART}"):
            if stale != part or revision is None:
                shutil.rmtree(stale)
        if revision is None:
            shutil.rmtree(whole, ignore_errors=True)
        if not whole.is_dir():
            _check_space(home, sum(remote.nbytes or 0 for remote in remotes))
            make_directory(part)
            for remote in remotes:
                _bring(store, remote, part / (remote.name or _archive_name(location)), on_progress)
            if [_tagged(store.look(remote.name)) for remote in remotes] != [_tagged(remote) for remote in remotes]:
                shutil.rmtree(part)
                raise SourceError("it was changed while it was read; try again")
            part.rename(whole)
            sync_directory(home)
        current = {"location": location.text, "revision": revision, "directory": whole.name}
        write_text(home / _CURRENT, json.dumps(current, indent=2) + "\n")
    return whole, revision


def downloaded(location: Location) -> tuple[Path, str | None]:
    """What `download` left in the cache last. SourceError when there is nothing."""
    home = _home(location)
    try:
        current = json.loads(read_file(home / _CURRENT, 1 << 16))
        whole, revision = home / current["directory"], current["revision"]
    except (OSError, ValueError, KeyError, TypeError):
        whole, revision = home / "nothing", None
    if not whole.is_dir():
        raise SourceError("it was not downloaded on this machine before; run the command once without --offline")
    return whole, revision


def archive_in(directory: Path, location: Location) -> Path:
    """The archive in a directory that `download` returned."""
    return directory / _archive_name(location)


_PART, _CURRENT = ".part", "current.json"


def _home(location: Location) -> Path:
    return cache_directory() / hashlib.sha256(location.text.encode()).hexdigest()[:32]


def _archive_name(location: Location) -> str:
    return next(f"archive{end}" for end in ARCHIVES if location.text.lower().endswith(end))


def _required(store: Store, name: str) -> Remote:
    remote = store.look(name)
    if remote is None:
        raise SourceError(f"there is no {name} in it; give the directory of a PEFT adapter" if name else _ABSENT)
    return remote


_ABSENT = "it does not exist; look for a misspelling"


def _tagged(remote: Remote | None) -> tuple[str, int | None] | None:
    return None if remote is None else (remote.tag, remote.nbytes)


def _index_of(store: Store, remote: Remote) -> bytes:
    """The content of an index."""
    content = bytearray()
    try:
        for chunk in store.read(remote, 0):
            content += chunk
            if len(content) > adapter_files.MOST_INDEX_NBYTES:
                raise SourceError(f"{remote.name} has more than {adapter_files.MOST_INDEX_NBYTES} bytes; save it again")
    except TransferEnded as error:
        raise SourceError(f"{remote.name} did not come: {error}; try again") from None
    return bytes(content)


def _check_space(home: Path, nbytes: int) -> None:
    free = shutil.disk_usage(home).free
    if nbytes + _KEPT_FREE > free:
        raise SourceError(
            f"it has {nbytes} bytes, and {home} has {free} free; make room, or set {CACHE_VARIABLE} to another disk"
        )


def _bring(store: Store, remote: Remote, path: Path, on_progress: OnProgress) -> None:
    """Bring one file to `path`, on from what is there of it already, and check its digest."""
    if path.exists():
        return
    part = path.with_name(f"{path.name}{_PART}")
    _bring_whole(store, remote, part, on_progress)
    if remote.digest is not None:
        algorithm, expected = remote.digest
        found = _digest_of(part, algorithm)
        if found != expected:
            part.unlink()
            raise SourceError(
                f"{path.name} came with the {algorithm} {found.hex()}, expected {expected.hex()}, as its source says; "
                "try again"
            )
    part.rename(path)


def _bring_whole(store: Store, remote: Remote, part: Path, on_progress: OnProgress) -> None:
    """Bring the bytes of one file to `part`, in as many attempts as bring some."""
    failed = 0
    while True:
        start = part.stat().st_size if part.exists() else 0
        try:
            with part.open("ab") as file:
                _append(store, remote, file, start, on_progress)
            return
        except TransferEnded as error:
            now = part.stat().st_size
            failed = failed + 1 if now == start else 1
            if failed == ATTEMPTS:
                raise SourceError(
                    f"{part.stem} did not come whole: {error}; {now} of {remote.nbytes or 'unknown'} bytes are here, "
                    "and the same command goes on from there"
                ) from None
            time.sleep(PAUSE_SECONDS)
        except SourceError:
            part.unlink()
            raise


def _digest_of(path: Path, algorithm: str) -> bytes:
    digest = hashlib.new(algorithm, usedforsecurity=False)
    with path.open("rb", buffering=0) as file:
        while chunk := file.read(HASH_CHUNK):
            digest.update(chunk)
    return digest.digest()


def _append(store: Store, remote: Remote, file: IO[bytes], start: int, on_progress: OnProgress) -> None:
    done = start
    on_progress(remote.name, done, remote.nbytes)
    if done == remote.nbytes:
        return
    with contextlib.closing(store.read(remote, start)) as chunks:
        for chunk in chunks:
            file.write(chunk)
            done += len(chunk)
            on_progress(remote.name, done, remote.nbytes)
            if remote.nbytes is not None and done > remote.nbytes:
                raise SourceError(
                    f"{remote.name} has more bytes than the {remote.nbytes} that were promised; try again"
                )
            adapter_files.check_size(done)
    if remote.nbytes is not None and done < remote.nbytes:
        raise TransferEnded("the connection ended")
