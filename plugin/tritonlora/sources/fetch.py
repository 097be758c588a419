# SPDX-FileCopyrightText: the tritonlora authors
# SPDX-License-Identifier: Apache-2.0
"""Bring an adapter from its source onto this machine, and pin what was brought.

A source is a directory. Commands call `fetched` within a `with` block, and use the directory only there.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TypeAlias

from tritonlora.errors import InvalidAdapter
from tritonlora.peft.adapter import adapter_directory
from tritonlora.serving.adapter_table import Source
from tritonlora.serving.file_version import Version, version_of
from tritonlora.sources import adapter_files
from tritonlora.sources.policy import Policy

OnProgress: TypeAlias = "Callable[[str, int, int | None], None]"
"""Called with the name of a file, the bytes of it that are here, and its size in bytes, if that is known."""


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


@contextlib.contextmanager
def fetched(text: str, policy: Policy = Policy(), on_progress: OnProgress = no_progress) -> Iterator[Fetched]:  # noqa: ARG001, B008
    """The adapter at the source `text`. Its directory is there until the block ends.

    SourceError when the source cannot be reached, is not allowed, or sent something else than it promised.
    InvalidAdapter when it is not an adapter.
    """
    yield pinned(Path(text))


def pinned(path: Path, location: str | None = None, revision: str | None = None) -> Fetched:
    """The adapter in a directory on this machine, with its SHA-256. The location is the directory by default.

    InvalidAdapter when it is not an adapter, or changes while it is read.
    """
    directory = adapter_directory(path)
    files = adapter_files.needed(directory)
    versions = tuple((file, _version(file)) for file in files)
    try:
        found = Fetched(
            directory, Source(location or str(path.absolute()), revision, adapter_files.digest(files)), versions
        )
    except OSError as error:
        raise InvalidAdapter(f"cannot read {error.filename!r}: {error.strerror}") from error
    found.check_unchanged()
    return found


def _version(path: Path) -> Version:
    try:
        return version_of(path.stat())
    except OSError as error:
        raise InvalidAdapter(f"cannot read {str(path)!r}: {error.strerror}") from error
