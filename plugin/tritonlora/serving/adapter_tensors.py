# SPDX-FileCopyrightText: the tritonlora authors
# SPDX-License-Identifier: Apache-2.0
"""An adapter's files in the model repository, as the tensors of a request.

A file is sent only if its SHA-256 is the registered one. Computing that takes ten times as long as copying the file, so
the processes of a router share what they have computed, in a directory in memory: a symbolic link for each version of
a file, to its digest. A link is there whole or not at all, and takes no page.

Bytes are read to where they are sent from, not mapped: that costs no page faults, and a file that becomes shorter
meanwhile is an error. In a mapping it would be a signal, which ends the process, and Triton 2.51 starts no other.
"""

from __future__ import annotations

import contextlib
import errno
import functools
import hashlib
import os
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import TypeAlias

import numpy as np
import numpy.typing as npt

from .errors import AdapterUnavailable
from .file_version import is_settled, open_file, version_of
from .routing import Route

DIGESTS = "digests"  # the directory in the one that the instances share
PARALLEL_NBYTES = 4 << 20  # less is read before another thread has begun

Memory: TypeAlias = "npt.NDArray[np.uint8]"  # flat
Ranges: TypeAlias = "npt.NDArray[np.int64]"  # (k, 2) of bytes, each from the first to before the second


def whole(nbytes: int) -> Ranges:
    """All of so many bytes."""
    return np.array([[0, nbytes]])


def check_files(repository: Path, route: Route) -> None:
    """AdapterUnavailable when a file of the adapter is missing, or has not the registered size.

    The size of a file that the engine reads by itself is not that of its tensors.
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
    """lora_weights, of which nothing is read before they are sent."""

    dtype: str
    shape: tuple[int, ...]  # (1, n, W)
    nbytes: int
    sha256: str
    # read(memory, ranges) reads the ranges into `memory`, which has all the rest already. Then that is what was
    # registered; AdapterUnavailable when the file is another one, by its size or its SHA-256.
    read: Callable[[Memory, Ranges], None]


class AdapterFiles:
    """The files of a repository's adapters."""

    def __init__(self, repository: Path, digests: int) -> None:
        """`digests`: a descriptor of the directory in which the router's processes share them."""
        self.repository = repository
        self._digests = digests

    def weights(self, route: Route) -> Weights:
        """lora_weights of an adapter."""
        entry = route.entry
        nbytes, sha256 = entry.lora_weights_nbytes, entry.lora_weights_sha256
        read = functools.partial(self._read, route, entry.lora_weights_file, sha256)
        return Weights(entry.dtype, (1, *entry.lora_weights_shape), nbytes, sha256, read)

    def config(self, route: Route) -> npt.NDArray[np.int32]:
        """lora_config (1, n, 3 or 4) int32 of an adapter. Errors are those of reading `weights`."""
        entry = route.entry
        memory = np.empty(entry.lora_config_nbytes, np.uint8)
        self._read(route, entry.lora_config_file, entry.lora_config_sha256, memory, whole(len(memory)))
        return memory.view("<i4").reshape(1, *entry.lora_config_shape)

    def _read(self, route: Route, file: str, sha256: str, memory: Memory, ranges: Ranges) -> None:
        path = self.repository / file
        with _reasons(route, path), open(open_file(path), "rb") as opened:  # noqa: PTH123  a descriptor
            found = os.fstat(opened.fileno())
            _check_size(path, found, len(memory))
            version, may_share = version_of(found), is_settled(found)
            link = "-".join(map(str, version))
            digest, is_same = self._known_digest(link), True
            if digest in ("", sha256):
                _read_ranges(opened.fileno(), memory, ranges)
                with contextlib.suppress(OSError):
                    os.close(open_file(path))  # upon which NFS asks its server whether the file was changed
                is_same = version_of(os.fstat(opened.fileno())) == version
            if not digest or not is_same:  # the times alone may have changed: `add` does that to what it replaces
                digest = hashlib.sha256(memory.data).hexdigest()
                if may_share and is_same:
                    with contextlib.suppress(OSError):
                        os.symlink(digest, link, dir_fd=self._digests)
            if digest != sha256:
                if not is_same:
                    raise _being_written()
                raise AdapterUnavailable(
                    f"{path.name} was altered on the server: its SHA-256 is not the registered one"
                )

    def _known_digest(self, link: str) -> str:
        """What the link of a file's version says; "" when it is not there."""
        with contextlib.suppress(OSError):
            return os.readlink(link, dir_fd=self._digests)
        return ""


def _check_size(path: Path, found: os.stat_result, nbytes: int) -> None:
    if found.st_size != nbytes:
        raise AdapterUnavailable(f"{path.name} has {found.st_size} bytes on the server, expected {nbytes}")


def _being_written() -> OSError:
    return OSError(errno.EAGAIN, "it is being written; ask again")


@contextlib.contextmanager
def _reasons(route: Route, path: Path) -> Iterator[None]:
    """AdapterUnavailable with the adapter's name, for a problem of its file; without the server's path."""
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
    """In two threads where it is worth it: on many machines one does not take all of the memory's speed."""

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
    other.result()  # or what went wrong with it
