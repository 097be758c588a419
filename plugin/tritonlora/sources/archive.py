# SPDX-FileCopyrightText: the tritonlora authors
# SPDX-License-Identifier: Apache-2.0
"""Take an adapter out of an archive: a zip, or a tar that may be compressed.

Rules: only the files that the adapter needs are written, under their own names, into a directory of ours, so that no
name in the archive is ever used as a path. An archive with a link, a device, or a name that leads out of it is refused
as a whole. So is one that grows to much more than its own size, before it fills the disk.
"""

from __future__ import annotations

import contextlib
import gzip
import lzma
import shutil
import stat
import tarfile
import zipfile
import zlib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import IO, Protocol

from tritonlora.errors import SourceError
from tritonlora.serving.file_version import open_file
from tritonlora.sources import adapter_files
from tritonlora.sources.adapter_files import CONFIG

MOST_MEMBERS = 10_000
# Weights hardly shrink. Zeros do, by up to a thousand times, and an untrained adapter may be half zeros.
MOST_GROWTH, ALWAYS_ALLOWED_NBYTES = 20, 1 << 30
_CHUNK = 1 << 20


@dataclass(frozen=True, slots=True)
class _Member:
    name: str
    nbytes: int
    problem: str  # why the archive is refused; "": it is a plain file or a directory
    is_file: bool


class _Archive(Protocol):
    def members(self) -> Iterator[_Member]:
        """All members in turn."""

    def open(self, name: str) -> IO[bytes]:
        """The content of a file in the archive."""


def unpack(path: Path, directory: Path) -> None:
    """Write the files of the one adapter in the archive `path` into `directory`.

    SourceError when the archive is broken or refused, or holds no adapter, or several.
    """
    try:
        with contextlib.ExitStack() as stack:
            file = stack.enter_context(open(open_file(path), "rb"))  # noqa: PTH123  a descriptor
            archive = _open(stack, file)
            _unpack(archive, directory, max(ALWAYS_ALLOWED_NBYTES, MOST_GROWTH * path.stat().st_size))
    except SourceError as error:
        raise SourceError(f"cannot use the archive {path.name!r}: {error}") from None
    except (
        zipfile.BadZipFile,
        gzip.BadGzipFile,
        tarfile.TarError,
        zlib.error,
        lzma.LZMAError,
        EOFError,
        NotImplementedError,
    ) as error:
        reason = str(error).partition("\n")[0][:200] or type(error).__name__
        raise SourceError(f"the archive {path.name!r} is broken; fetch or make it again: {reason}") from None
    except RuntimeError:  # zipfile's word for a password
        raise SourceError(f"the archive {path.name!r} is encrypted; give one without a password") from None
    except OSError as error:
        raise SourceError(f"cannot unpack the archive {path.name!r}: {error.strerror or error}") from None


def _open(stack: contextlib.ExitStack, file: IO[bytes]) -> _Archive:
    if zipfile.is_zipfile(file):
        return _Zip(stack.enter_context(zipfile.ZipFile(file)))
    file.seek(0)
    return _Tar(stack.enter_context(tarfile.open(fileobj=file)))


def _unpack(archive: _Archive, directory: Path, most: int) -> None:
    found: dict[str, _Member] = {}  # by normalised name
    problems, total = [], 0
    for number, member in enumerate(archive.members()):
        total += member.nbytes
        if number >= MOST_MEMBERS or total > most:
            raise SourceError(
                f"it unpacks to more than {most} bytes or {MOST_MEMBERS} files, which no adapter needs; give an "
                "archive of the adapter alone"
            )
        path = PurePosixPath(member.name)
        if member.problem:
            problems.append(f"{member.name[:200]!r} {member.problem}")
        elif path.is_absolute() or ".." in path.parts or "\\" in member.name:
            problems.append(f"{member.name[:200]!r} leads out of it")
        elif member.is_file and str(path) in found:
            problems.append(f"{member.name[:200]!r} is in it twice")
        elif member.is_file:
            found[str(path)] = member
    if problems:
        more = f" and {len(problems) - 1} more" if len(problems) > 1 else ""
        raise SourceError(f"{problems[0]}{more}; make it again of the adapter's files alone")
    for name, member in _needed(archive, found).items():
        target = directory / name
        with archive.open(member.name) as source, target.open("xb") as copy:
            shutil.copyfileobj(source, copy, _CHUNK)
        if target.stat().st_size != member.nbytes:
            raise SourceError(f"{member.name!r} has {target.stat().st_size} bytes, expected {member.nbytes}")


def _needed(archive: _Archive, found: Mapping[str, _Member]) -> dict[str, _Member]:
    """File name -> member, for the files that the one adapter needs."""
    homes = [PurePosixPath(name).parent for name in found if PurePosixPath(name).name == CONFIG]
    # A Mac's archives have a second file beside each one, below __MACOSX.
    homes = [home for home in homes if "__MACOSX" not in home.parts]
    if len(homes) != 1:
        several = f"it holds several adapters: {', '.join(map(str, sorted(homes)[:20]))}; make an archive of one"
        raise SourceError(several if homes else f"it holds no {CONFIG}; make it of the directory of a PEFT adapter")
    beside = {path.name: found[str(path)] for path in map(PurePosixPath, found) if path.parent == homes[0]}
    names = [CONFIG, *(name for name in adapter_files.TEMPLATES if name in beside)]
    if weights := adapter_files.weights_file(beside):
        names.append(weights)
        if weights.endswith(adapter_files.INDEX):
            with archive.open(beside[weights].name) as file:
                names += adapter_files.shards(file.read(adapter_files.MOST_INDEX_NBYTES))
    if missing := sorted(set(names) - beside.keys()):
        raise SourceError(f"it lacks {missing[0]!r}; make it again of the whole adapter")
    return {name: beside[name] for name in names}


class _Zip:
    def __init__(self, archive: zipfile.ZipFile) -> None:
        self._archive = archive

    def members(self) -> Iterator[_Member]:
        for info in self._archive.infolist():
            kind = stat.S_IFMT(info.external_attr >> 16)
            problem = "" if kind in (0, stat.S_IFREG, stat.S_IFDIR) else "is a link or a device"
            yield _Member(info.filename, info.file_size, problem, not info.is_dir())

    def open(self, name: str) -> IO[bytes]:
        return self._archive.open(name)


class _Tar:
    def __init__(self, archive: tarfile.TarFile) -> None:
        self._archive = archive

    def members(self) -> Iterator[_Member]:
        for info in self._archive:
            problem = "" if info.isfile() or info.isdir() else "is a link or a device"
            yield _Member(info.name, info.size, problem, info.isfile())
        rest = self._archive.fileobj
        while rest is not None and (chunk := rest.read(_CHUNK)):  # to the checksum of what is compressed
            yield _Member("", len(chunk), "", is_file=False)

    def open(self, name: str) -> IO[bytes]:
        file = self._archive.extractfile(name)
        if file is None:
            raise SourceError(f"{name!r} is not a file")
        return file
