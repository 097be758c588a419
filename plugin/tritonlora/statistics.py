# SPDX-FileCopyrightText: the tritonlora authors
# SPDX-License-Identifier: Apache-2.0
"""What the router's instances have counted, per adapter, in shared memory.

Each instance counts in a file of its own, which is mapped: counting is adding to a number in memory, and costs no
request anything. `lora_adapters` adds the files up. Those of instances that have ended stay, so that no counter ever
falls, and the next instances go on with them; what an ended instance had running does not count.

This file runs inside a plain Triton container: standard library and numpy only.
"""

from __future__ import annotations

import contextlib
import fcntl
import os
import tempfile
from collections import defaultdict
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import numpy.typing as npt

# Outcomes of requests ("OK", or the name of a Triton error code), loads by reason, and what else is counted.
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
LOADS = ("first_use", "evicted")
COLUMNS = (*OUTCOMES, *LOADS, "load_seconds", "running", "table_reloads", "table_failures")

BASE = ""  # the base model, and requests that name no adapter that is known
OTHERS = "*"  # no legal name: those for whom there is no room, so that the file has an end
ROWS = 1024
CHUNK = 32
NAME_BYTES = 128
_ROW = np.dtype([("name", f"S{NAME_BYTES}"), *((column, "<f8") for column in COLUMNS)])
_ROW_NUMBERS = _ROW.itemsize // 8
_NUMBERS = {column: number for number, column in enumerate(COLUMNS, NAME_BYTES // 8)}

DIRECTORY = "statistics"  # in the one that the instances share

Counts = dict[str, dict[str, float]]


class Statistics:
    """The counts of one instance."""

    def __init__(self, directory: Path) -> None:
        """Count in a file in `directory`: that of an instance that has ended, or a new one."""
        directory.mkdir(exist_ok=True)
        self._descriptor, path = _own_file(directory)
        self._rows: npt.NDArray[Any] = np.memmap(path, _ROW, "r+", shape=ROWS)
        self._rows["running"] = 0
        self._rows[1]["name"] = OTHERS.encode()
        # The same memory as plain numbers: to go by row and name of a column takes fifty times as long.
        self._numbers = self._rows.view(np.uint8).data.cast("d")
        self._index = {name.decode(): row for row, name in enumerate(self._rows["name"]) if name or not row}

    def add(self, lora_name: str, column: str, amount: float = 1.0) -> None:
        """Count for an adapter."""
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


def _own_file(directory: Path) -> tuple[int, Path]:
    """A file of which nobody else has the lock, and its descriptor, which has it for as long as this process lives."""
    for path in sorted(directory.glob("[!.]*")):
        descriptor = os.open(path, os.O_RDWR)
        if _is_free(descriptor, fcntl.LOCK_EX):
            return descriptor, path
        os.close(descriptor)
    descriptor, fresh = tempfile.mkstemp(prefix=".", dir=directory)
    fcntl.flock(descriptor, fcntl.LOCK_EX)
    # With all of its pages: written to later, when there is no room, a page that is not there ends the process.
    os.posix_fallocate(descriptor, 0, ROWS * _ROW.itemsize)
    path = directory / Path(fresh).name.removeprefix(".")
    return descriptor, Path(fresh).rename(path)  # complete before others see it


def read_statistics(directory: Path) -> Counts:
    """The sum over all instances, by lora_name and column; only of adapters for which something was counted."""
    counts: Counts = defaultdict(lambda: dict.fromkeys(COLUMNS, 0.0))
    for path in sorted(directory.glob("[!.]*")):
        with contextlib.suppress(FileNotFoundError), path.open("rb") as file:
            rows = _used_rows(file)
            alive = not _is_free(file.fileno(), fcntl.LOCK_SH)
            for row in rows[[0, *np.flatnonzero(rows["name"])]]:
                of_adapter = counts[row["name"].decode()]
                for column in COLUMNS:
                    of_adapter[column] += float(row[column]) if alive or column != "running" else 0.0
    return {name: of_adapter for name, of_adapter in counts.items() if any(of_adapter.values())}


def _used_rows(file: BinaryIO) -> npt.NDArray[Any]:
    """The rows up to the first ones that have no name yet: most of a file was never written."""
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
