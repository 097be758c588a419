# SPDX-FileCopyrightText: the tritonlora authors
# SPDX-License-Identifier: Apache-2.0
"""Which transport fetches from which location."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from pathlib import Path

from tritonlora.files import delete, is_abandoned, make_directory, temporary_directory, writing
from tritonlora.sources import archive, download, hub
from tritonlora.sources.adapter_files import OnProgress
from tritonlora.sources.bucket import BucketStore
from tritonlora.sources.download import Store
from tritonlora.sources.location import HUB, WEB, Location
from tritonlora.sources.web import WebStore


@contextlib.contextmanager
def brought(location: Location, *, offline: bool, on_progress: OnProgress) -> Iterator[tuple[Path, str | None]]:
    """The adapter's directory, and the revision. A location on this machine is an archive."""
    path, revision = _here(location, offline=offline, on_progress=on_progress)
    with contextlib.nullcontext(path) if path.is_dir() else _unpacked(path) as directory:
        yield directory, revision


def _here(location: Location, *, offline: bool, on_progress: OnProgress) -> tuple[Path, str | None]:
    """The directory or the archive of the adapter, once it is on this machine, and the revision."""
    if not location.scheme:
        return Path(location.address), None
    if location.scheme == HUB:
        return hub.cached(location) if offline else hub.fetch(location, on_progress)
    if offline:
        directory, revision = download.downloaded(location)
    else:
        directory, revision = download.download(location, _store(location), on_progress)
    return download.archive_in(directory, location) if location.is_archive else directory, revision


def revision_of(location: Location, *, offline: bool) -> str | None:
    """The revision that the location has now, or offline the one that was fetched last."""
    if location.scheme == HUB:
        return hub.cached(location)[1] if offline else hub.resolve(location)[0]
    return download.downloaded(location)[1] if offline else download.resolve(location, _store(location))[1]


def _store(location: Location) -> Store:
    return WebStore(location) if location.scheme in WEB else BucketStore(location)


@contextlib.contextmanager
def _unpacked(path: Path) -> Iterator[Path]:
    """A directory with the files of the adapter in an archive."""
    home = download.cache_directory() / "unpacked"
    with writing(home):
        make_directory(home)
        for left in home.iterdir():
            if is_abandoned(left):  # by a command that was killed
                delete(left)
    with temporary_directory(home / "adapter") as directory:
        archive.unpack(path, directory)
        yield directory
