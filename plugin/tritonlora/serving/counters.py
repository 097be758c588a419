# SPDX-FileCopyrightText: the tritonlora authors
# SPDX-License-Identifier: Apache-2.0
"""The counts of the router's and the resolver's instances, for each adapter, in shared memory.

Each instance counts in its own file, which it maps: counting adds to a number in memory, and costs a request no time.
`lora_adapters` adds the files up. The file of an instance that has ended stays, so that no counter ever falls, and the
next instance goes on with that file. The requests that were running in an ended instance do not count as running.
"""

from __future__ import annotations

import contextlib
import fcntl
import os
import secrets
from collections import defaultdict
from typing import IO, Any

import numpy as np
import numpy.typing as npt

from .residency import open_file_inside

# The outcomes of requests: "OK", or the name of a Triton error code.
OUTCOMES = (
    "OK",
    "UNKNOWN",
    "INTERNAL",
    "NOT_FOUND",
    "INVALID_ARG",
    "UNAVAILABLE",
    "UNSUPPORTED",
    "ALREADY_EXISTS",
    "CANCELLED",
)
LOADS = ("first_use", "evicted")  # the reasons of loads
COLUMNS = (*OUTCOMES, *LOADS, "load_seconds", "running", "unexpected_misses", "table_reloads", "table_failures")

BASE = ""  # the row of the base model, and of requests that name no known adapter
OTHERS = "*"  # the row of all adapters beyond ROWS; it is not a legal name
ROWS = 1024
CHUNK = 32
NAME_BYTES = 128
_ROW = np.dtype([("name", f"S{NAME_BYTES}"), *((column, "<f8") for column in COLUMNS)])
_ROW_NUMBERS = _ROW.itemsize // 8
_NUMBERS = {column: number for number, column in enumerate(COLUMNS, NAME_BYTES // 8)}

STATISTICS = "statistics"  # the files' directory, inside the directory that the instances share

Counts = dict[str, dict[str, float]]


class Statistics:
    """The counts of one instance."""

    def __init__(self, directory: int) -> None:
        """Take over the file of an instance that has ended, or make a new one. `directory` is a descriptor."""
        self._descriptor = _own_file(directory)
        with open(self._descriptor, "r+b", closefd=False) as file:
            self._rows: npt.NDArray[Any] = np.memmap(file, _ROW, "r+", shape=ROWS)
        self._rows["running"] = 0
        self._rows[1]["name"] = OTHERS.encode()
        # The same memory as plain numbers: access by row and column name takes fifty times as long.
        self._numbers = self._rows.view(np.uint8).data.cast("d")
        self._index = {name.decode(): row for row, name in enumerate(self._rows["name"]) if name or not row}

    def add(self, lora_name: str, column: str, amount: float = 1.0) -> None:
        """Add `amount` to a column, one of COLUMNS, of an adapter."""
        row = self._index.get(lora_name)
        if row is None:
            row = self._new_row(lora_name)
        self._numbers[row * _ROW_NUMBERS + _NUMBERS[column]] += amount

    def _new_row(self, lora_name: str) -> int:
        row = len(self._index)
        if row == ROWS:
            return self._index[OTHERS]
        self._rows[row]["name"] = lora_name.encode()
        self._index[lora_name] = row
        return row


def _own_file(directory: int) -> int:
    """The descriptor of a file that no other process has locked. The lock lasts for as long as this process lives."""
    for name in _names(directory):
        with contextlib.suppress(OSError):
            descriptor = os.open(name, os.O_RDWR | os.O_NOFOLLOW, dir_fd=directory)
            if _is_free(descriptor, fcntl.LOCK_EX):
                return descriptor
            os.close(descriptor)
    name = secrets.token_hex(8)
    flags = os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW
    descriptor = os.open(f".{name}", flags, 0o600, dir_fd=directory)
    fcntl.flock(descriptor, fcntl.LOCK_EX)
    # Allocate all pages now: when /dev/shm is full, writing to a page that was not allocated would end the process.
    os.posix_fallocate(descriptor, 0, ROWS * _ROW.itemsize)
    os.rename(f".{name}", name, src_dir_fd=directory, dst_dir_fd=directory)  # complete before others see it
    return descriptor


def _names(directory: int) -> list[str]:
    return sorted(name for name in os.listdir(directory) if not name.startswith("."))


def read_statistics(directory: int) -> Counts:
    """The sum over all instances, by lora_name and column; only of adapters for which something was counted.

    `directory` is a descriptor.
    """
    counts: Counts = defaultdict(lambda: dict.fromkeys(COLUMNS, 0.0))
    for name in _names(directory):
        with contextlib.suppress(OSError), open_file_inside(directory, name, "rb") as file:
            rows = _used_rows(file)
            alive = not _is_free(file.fileno(), fcntl.LOCK_SH)
            for row in rows[[0, *np.flatnonzero(rows["name"])]]:
                of_adapter = counts[row["name"].decode()]
                for column in COLUMNS:
                    of_adapter[column] += float(row[column]) if alive or column != "running" else 0.0
    return {name: of_adapter for name, of_adapter in counts.items() if any(of_adapter.values())}


def _used_rows(file: IO[bytes]) -> npt.NDArray[Any]:
    """The rows of the chunks that have names. Most of a file was never written, and is not read."""
    chunks: list[npt.NDArray[Any]] = []
    while len(chunk := np.fromfile(file, _ROW, count=CHUNK)):
        chunks.append(chunk)
        if not chunk["name"][-1]:
            break
    return np.concatenate(chunks)


def _is_free(descriptor: int, lock: int) -> bool:
    try:
        fcntl.flock(descriptor, lock | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True
