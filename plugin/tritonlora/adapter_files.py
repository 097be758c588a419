# SPDX-FileCopyrightText: the tritonlora authors
# SPDX-License-Identifier: Apache-2.0
"""An adapter's files in the model repository, as the tensors of a request.

A file is sent only if its SHA-256 is the registered one. Computing that takes ten times as long as copying the file, so
the processes of a router share what they have computed, in a directory in memory: a symbolic link for each version of
a file, to its digest. A link is there whole or not at all, and takes no page.

This file runs inside a plain Triton container: standard library and numpy only.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import functools
import hashlib
import os
import signal
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple, TypeAlias

import numpy as np
import numpy.typing as npt

from tritonlora import dlpack
from tritonlora.errors import AdapterUnavailable
from tritonlora.routing import Route
from tritonlora.versions import Version, is_settled, open_file, version_of

MOST_MAPPED = 32  # files, every other one of weights: in each process their page tables take 1/512 of their size
MOST_SEARCHED = 512  # files, of which it is known where they are zero: 2 KB each
BLOCK_NBYTES = 1 << 14  # of zeros, or not

Ranges: TypeAlias = "npt.NDArray[np.int64]"  # (k, 2) of bytes, each from the first to before the second


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


class Weights(NamedTuple):
    """lora_weights where they are stored: nothing is copied before they are sent. Nobody can write to the file while
    this lives.
    """

    content: npt.NDArray[np.uint8]  # the mapped file
    dtype: str
    shape: tuple[int, ...]  # (1, n, W)
    sha256: str  # of the content
    filled: Ranges  # where the content is not zero
    lease: Lease

    def capsule(self) -> object:
        """The tensor as a DLPack capsule, which keeps this."""
        return dlpack.capsule_of(self.content, self.dtype, self.shape, self)


class AdapterFiles:
    """The files of a repository's adapters, which stay mapped from one request to the next."""

    def __init__(self, repository: Path, shared: Path) -> None:
        """`shared`: the directory of what a router's processes share."""
        self.repository = repository
        self._digests = shared / "digests"
        self._digests.mkdir(exist_ok=True)
        self._content_of = functools.lru_cache(maxsize=MOST_MAPPED)(_content_of)
        self._filled_of = functools.lru_cache(maxsize=MOST_SEARCHED)(  # not of a method: in a cycle, files stay mapped
            lambda path, version, content_of=self._content_of: filled_ranges(content_of(path, version))
        )

    def unmap(self) -> None:
        """The space of a file that was removed is free when nobody maps it any more."""
        self._content_of.cache_clear()

    def map_tensors(self, route: Route) -> tuple[Weights, npt.NDArray[np.int32]]:
        """lora_weights and lora_config (1, n, 3 or 4) int32 of an adapter.

        AdapterUnavailable when a file is not the registered one, by its size or by its SHA-256: it would be served as
        other weights, or as a bus error.
        """
        entry = route.entry
        lease, content, filled = self._registered(
            route, entry.lora_weights_file, entry.lora_weights_nbytes, entry.lora_weights_sha256
        )
        _, config, _ = self._registered(
            route, entry.lora_config_file, entry.lora_config_nbytes, entry.lora_config_sha256
        )
        shape = (1, *entry.lora_weights_shape)
        weights = Weights(content, entry.dtype, shape, entry.lora_weights_sha256, filled, lease)
        return weights, np.array(config.view("<i4")).reshape(1, *entry.lora_config_shape)

    def _registered(
        self, route: Route, file: str, nbytes: int, sha256: str
    ) -> tuple[Lease, npt.NDArray[np.uint8], Ranges]:
        """The content of a file of the adapter, which stays as it is while the lease lives, and where it is filled."""
        path = self.repository / file
        with _reasons(route, path):
            lease = Lease(path)
            found = os.fstat(lease.descriptor)
            _check_size(path, found, nbytes)
            if self._sha256_of(path, found) != sha256:
                raise AdapterUnavailable(
                    f"{path.name} was altered on the server: its SHA-256 is not the registered one"
                )
            version = version_of(found)
            return lease, self._content_of(path, version), self._filled_of(path, version)

    def _sha256_of(self, path: Path, found: os.stat_result) -> str:
        version = version_of(found)
        link = self._digests / "-".join(map(str, version))
        with contextlib.suppress(OSError):
            return str(link.readlink())
        may_share = is_settled(found)
        digest = hashlib.sha256(self._content_of(path, version).data).hexdigest()
        if may_share:
            with contextlib.suppress(OSError):
                link.symlink_to(digest)
        return digest


def _check_size(path: Path, found: os.stat_result, nbytes: int) -> None:
    if found.st_size != nbytes:
        raise AdapterUnavailable(f"{path.name} has {found.st_size} bytes on the server, expected {nbytes}")


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


class Lease:
    """Makes who opens a file for writing, or truncates it, wait while this lives, for at most 45 s
    (/proc/sys/fs/lease-break-time).

    Reading a mapped page that was cut off ends the process, and Triton 2.51 starts no other. Where the file system has
    no leases (NFS), or the file is somebody else's, there is no keeping them.
    """

    def __init__(self, path: Path) -> None:
        """BlockingIOError when somebody has it open for writing now."""
        self.descriptor = open_file(path)
        try:
            # Who waits is announced by a signal, by default one that ends the process; this one is ignored by default.
            fcntl.fcntl(self.descriptor, fcntl.F_SETSIG, signal.SIGURG)
            fcntl.fcntl(self.descriptor, fcntl.F_SETLEASE, fcntl.F_RDLCK)
        except BlockingIOError:
            raise BlockingIOError(errno.EAGAIN, "it is being written; ask again") from None
        except OSError:
            pass

    def __del__(self) -> None:
        """Let them write."""
        if hasattr(self, "descriptor"):
            os.close(self.descriptor)


def _content_of(path: Path, version: Version) -> npt.NDArray[np.uint8]:
    """A file's content, which stays mapped: to map a file anew takes as long as to copy it in memory."""
    content = dlpack.mapped(path)
    if version_of(path.stat()) != version:
        raise OSError(errno.ESTALE, "it was replaced just now; ask again")
    return content


def filled_ranges(content: npt.NDArray[np.uint8]) -> Ranges:
    """Where the content is not zero, in whole blocks. What pads the rows is a third of an adapter of all layers."""
    starts = np.arange(0, len(content), BLOCK_NBYTES)
    is_filled = np.maximum.reduceat(content, starts) > 0
    edges = np.flatnonzero(np.diff(is_filled, prepend=False, append=False)) * BLOCK_NBYTES
    return np.minimum(edges, len(content)).reshape(-1, 2)
