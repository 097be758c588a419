# SPDX-FileCopyrightText: the tritonlora authors
# SPDX-License-Identifier: Apache-2.0
"""Bring an adapter from its source onto this machine, and pin what was brought.

Commands call `fetched` within a `with` block, and use the directory only there. A server never calls it.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from tritonlora.errors import AdapterError, InvalidAdapter, SourceError
from tritonlora.files import delete, is_abandoned, make_directory, temporary_directory, writing
from tritonlora.peft.adapter import adapter_directory
from tritonlora.serving.adapter_table import Source
from tritonlora.serving.file_version import Version, version_of
from tritonlora.sources import adapter_files, archive, download, hub
from tritonlora.sources.bucket import BucketStore
from tritonlora.sources.download import OnProgress, Store
from tritonlora.sources.location import HUB, HUB_NAME, WEB, Location, parse_location
from tritonlora.sources.policy import Policy
from tritonlora.sources.web import WebStore


@dataclass(frozen=True, slots=True)
class Fetched:
    """An adapter on this machine, and where it came from."""

    directory: Path
    source: Source
    versions: tuple[tuple[Path, Version], ...]  # of the files that the source's SHA-256 is over

    def check_unchanged(self) -> None:
        """Raise InvalidAdapter if a file was changed after its SHA-256 was taken."""
        for path, version in self.versions:
            if _version(path) != version:
                raise InvalidAdapter(f"{str(path)!r} was changed while the adapter was read; try again")


def no_progress(_file: str, _done: int, _total: int | None) -> None:
    """Show no progress."""


ALL_ALLOWED = Policy()


@contextlib.contextmanager
def fetched(text: str, policy: Policy = ALL_ALLOWED, on_progress: OnProgress = no_progress) -> Iterator[Fetched]:
    """The adapter at the source `text`. Its directory is there until the block ends.

    SourceError, which names the source, when it cannot be reached, is not allowed, or sent something else than it
    promised. InvalidAdapter when it is not an adapter. MissingExtra when a package for it is not installed.
    """
    location = parse_location(text)
    policy.check(location)
    with _named(location), contextlib.ExitStack() as stack:
        if not location.scheme:
            _check_there(location)
            directory, revision = Path(location.address), None
        elif location.scheme == HUB:
            directory, revision = hub.cached(location) if policy.offline else hub.fetch(location, on_progress)
        elif policy.offline:
            directory, revision = download.downloaded(location)
        else:
            directory, revision = download.download(location, _store(location), on_progress)
        if location.is_archive and (location.scheme or directory.is_file()):
            path = download.archive_in(directory, location) if location.scheme else directory
            directory = stack.enter_context(_unpacked(path))
        yield pinned(directory, location.text, revision)


def resolved(text: str, policy: Policy = ALL_ALLOWED) -> tuple[str, str | None]:
    """The location of a source, and its revision now, without a download. The revision is None if the source has none.

    Errors are those of `fetched`.
    """
    location = parse_location(text)
    policy.check(location)
    with _named(location):
        if not location.scheme:
            return location.text, None
        if policy.offline:
            return location.text, (hub.cached if location.scheme == HUB else download.downloaded)(location)[1]
        if location.scheme == HUB:
            return location.text, hub.resolve(location)[0]
        return location.text, download.resolve(location, _store(location))[1]


def pinned(path: Path, location: str | None = None, revision: str | None = None) -> Fetched:
    """The adapter in a directory on this machine, with its SHA-256. The location is the directory by default.

    InvalidAdapter when it is not an adapter, or changes while it is read.
    """
    directory = adapter_directory(path)
    try:
        files = adapter_files.needed(directory)
        versions = tuple((file, _version(file)) for file in files)
        digest = adapter_files.digest(files)
    except OSError as error:
        raise InvalidAdapter(f"cannot read {error.filename!r}: {error.strerror}") from error
    found = Fetched(directory, Source(location or str(path.absolute()), revision, digest), versions)
    found.check_unchanged()
    return found


def _store(location: Location) -> Store:
    return WebStore(location) if location.scheme in WEB else BucketStore(location)


def _check_there(location: Location) -> None:
    """Raise SourceError for a path that does not exist and looks like the name of a repository on the hub."""
    if HUB_NAME.fullmatch(location.address) and not Path(location.address).exists():
        raise SourceError(f"there is no such directory; for the repository of the hub, give hf://{location.address}")


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


@contextlib.contextmanager
def _named(location: Location) -> Iterator[None]:
    """Name the source in an error of its own, and of an adapter that came from afar: its path says nothing then."""
    try:
        yield
    except SourceError as error:
        raise SourceError(f"{location.text}: {error}") from None
    except AdapterError as error:
        if not location.scheme or location.text in str(error):
            raise
        raise type(error)(f"{location.text}: {error}") from None


def _version(path: Path) -> Version:
    try:
        return version_of(path.stat())
    except OSError as error:
        raise InvalidAdapter(f"cannot read {str(path)!r}: {error.strerror}") from error
