# SPDX-FileCopyrightText: the tritonlora authors
# SPDX-License-Identifier: Apache-2.0
"""An adapter's files in the model repository, as the tensors of a request.

A file is sent only if its SHA-256 is the registered one. Computing a SHA-256 takes ten times as long as copying the
file. So the digest of the last version of each file is remembered.

Files are read into the memory that they are sent from, and are not mapped. Reading costs no page faults. A file that
becomes shorter meanwhile is an error here. With a mapping it would be a signal, which ends the process, and Triton 2.51
starts no other.
"""

from __future__ import annotations

import contextlib
import errno
import functools
import hashlib
import os
from collections.abc import Callable, Collection, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import TypeAlias

import numpy as np
import numpy.typing as npt

from .errors import AdapterUnavailable
from .file_version import Version, is_settled, open_file, version_of
from .routing import Route

PARALLEL_NBYTES = 4 << 20  # one thread reads fewer bytes than these before a second thread has begun

Memory: TypeAlias = "npt.NDArray[np.uint8]"  # flat
Ranges: TypeAlias = "npt.NDArray[np.int64]"  # (k, 2): the first byte of each range, and the byte after its last one


def whole(nbytes: int) -> Ranges:
    """The one range of all of `nbytes` bytes."""
    return np.array([[0, nbytes]])


def check_files(repository: Path, route: Route) -> None:
    """Raise AdapterUnavailable when a file of the adapter is missing, or has another size than its tensor.

    The size of a file that the target reads by itself is not checked: such a file is not a raw tensor.
    """
    entry = route.entry
    for file, nbytes in (
        (entry.lora_weights_file, entry.lora_weights_nbytes),
        (entry.lora_config_file, entry.lora_config_nbytes),
    ):
        path = repository / file
        with _reasons(route, path):
            found = path.stat()
            if entry.lora_path is None:
                _check_size(path, found, nbytes)


@dataclass(frozen=True, slots=True)
class Weights:
    """lora_weights of an adapter. `read` reads its bytes, when they are to be sent."""

    dtype: str
    shape: tuple[int, ...]  # (1, n, W)
    nbytes: int
    sha256: str
    # read(memory, ranges) reads `ranges` of the file into `memory`, which has all other bytes already.
    # AdapterUnavailable when the size or the SHA-256 is not the registered one.
    read: Callable[[Memory, Ranges], None]


class AdapterFiles:
    """The files of a repository's adapters."""

    def __init__(self, repository: Path) -> None:
        self.repository = repository
        self._digests: dict[str, tuple[Version, str]] = {}  # file -> its last version, and the SHA-256 of that

    def weights(self, route: Route) -> Weights:
        """lora_weights (1, n, W) of an adapter, in its dtype. No file is read yet."""
        entry = route.entry
        nbytes, sha256 = entry.lora_weights_nbytes, entry.lora_weights_sha256
        read = functools.partial(self._read, route, entry.lora_weights_file, sha256)
        return Weights(entry.dtype, (1, *entry.lora_weights_shape), nbytes, sha256, read)

    def config(self, route: Route) -> npt.NDArray[np.int32]:
        """lora_config (1, n, 3 or 4) int32 of an adapter.

        AdapterUnavailable when the file cannot be read, or its size or SHA-256 is not the registered one.
        """
        entry = route.entry
        memory = np.empty(entry.lora_config_nbytes, np.uint8)
        self._read(route, entry.lora_config_file, entry.lora_config_sha256, memory, whole(len(memory)))
        return memory.view("<i4").reshape(1, *entry.lora_config_shape)

    def check(self, route: Route) -> None:
        """Raise AdapterUnavailable when a file of the adapter is not there, for a target that reads them by itself."""
        for file in (route.entry.lora_weights_file, route.entry.lora_config_file):
            path = self.repository / file
            with _reasons(route, path):
                path.stat()

    def _read(self, route: Route, file: str, sha256: str, memory: Memory, ranges: Ranges) -> None:
        path = self.repository / file
        with _reasons(route, path), open(open_file(path), "rb") as opened:  # noqa: PTH123  a descriptor
            found = os.fstat(opened.fileno())
            _check_size(path, found, len(memory))
            version, may_remember = version_of(found), is_settled(found)
            known, digest = self._digests.get(file, (None, ""))
            digest, is_same = digest if known == version else "", True
            if digest in ("", sha256):
                _read_ranges(opened.fileno(), memory, ranges)
                with contextlib.suppress(OSError):
                    os.close(open_file(path))  # makes an NFS client ask its server whether the file was changed
                is_same = version_of(os.fstat(opened.fileno())) == version
            if not digest or not is_same:  # maybe only the times changed: `add` touches the files that it replaces
                digest = hashlib.sha256(memory.data).hexdigest()
                if may_remember and is_same:
                    self._digests[file] = version, digest
            if digest != sha256:
                if not is_same:
                    raise _being_written()
                raise AdapterUnavailable(
                    f"{path.name} was altered on the server: its SHA-256 is not the registered one"
                )

    def forget_all_but(self, files: Collection[str]) -> None:
        """Forget the digests of all other files."""
        self._digests = {file: known for file, known in self._digests.items() if file in files}


def _check_size(path: Path, found: os.stat_result, nbytes: int) -> None:
    if found.st_size != nbytes:
        raise AdapterUnavailable(f"{path.name} has {found.st_size} bytes on the server, expected {nbytes}")


def _being_written() -> OSError:
    return OSError(errno.EAGAIN, "it is being written; ask again")


@contextlib.contextmanager
def _reasons(route: Route, path: Path) -> Iterator[None]:
    """Turn a problem of the file into AdapterUnavailable, with the adapter's name and without the server's path."""
    try:
        yield
    except FileNotFoundError:
        reason = f"{path.name} is missing on the server"
    except OSError as error:
        reason = f"{path.name} cannot be read on the server: {error.strerror}"
    except AdapterUnavailable as error:
        reason = str(error)
    else:
        return
    raise AdapterUnavailable(f"LoRA adapter {route.lora_name!r}: {reason}") from None


def _read_ranges(descriptor: int, memory: Memory, ranges: Ranges) -> None:
    """Read the ranges of a file into the same places of `memory`.

    Many bytes are read by two threads, since on many machines one thread cannot use the memory's whole bandwidth.
    """

    def read(ranges: Ranges) -> None:
        for start, stop in ranges.tolist():
            while start < stop:
                count = os.preadv(descriptor, (memory.data[start:stop],), start)
                if not count:
                    raise _being_written()
                start += count

    starts, stops = ranges.T
    if (stops - starts).sum() < PARALLEL_NBYTES:
        read(ranges)
        return
    middles = (starts + stops) // 2
    with ThreadPoolExecutor(1) as pool:
        other = pool.submit(read, np.column_stack((middles, stops)))
        read(np.column_stack((starts, middles)))
    other.result()  # raises the other thread's error
