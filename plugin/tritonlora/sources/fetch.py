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
from tritonlora.peft.directory import adapter_directory
from tritonlora.serving.adapter_table import Source
from tritonlora.serving.file_version import Version, version_of
from tritonlora.sources import adapter_files
from tritonlora.sources.adapter_files import OnProgress
from tritonlora.sources.location import HUB_NAME, Location, parse_location
from tritonlora.sources.policy import Policy


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
    with _named(location):
        if not location.scheme and not (location.is_archive and Path(location.address).is_file()):
            _check_there(location)
            yield pinned(Path(location.address), location.text)
            return
        from tritonlora.sources import transports  # with http.client and archives, which `list` does not need

        with transports.brought(location, offline=policy.offline, on_progress=on_progress) as (directory, revision):
            yield pinned(directory, location.text, revision)


def resolved(text: str, policy: Policy = ALL_ALLOWED) -> tuple[str, str | None]:
    """The location of a source, and its revision now, without a download. The revision is None if the source has none.

    Errors are those of `fetched`.
    """
    location = parse_location(text)
    policy.check(location)
    if not location.scheme:
        return location.text, None
    with _named(location):
        from tritonlora.sources import transports

        return location.text, transports.revision_of(location, offline=policy.offline)


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


def _check_there(location: Location) -> None:
    """Raise SourceError for a path that does not exist and looks like the name of a repository on the hub."""
    if HUB_NAME.fullmatch(location.address) and not Path(location.address).exists():
        raise SourceError(f"there is no such directory; for the repository of the hub, give hf://{location.address}")


@contextlib.contextmanager
def _named(location: Location) -> Iterator[None]:
    """Name the source in its errors, and in errors of a fetched adapter: its path in the cache tells a user nothing."""
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
