# SPDX-FileCopyrightText: the tritonlora authors
# SPDX-License-Identifier: Apache-2.0
"""Reads adapters.json again when it changes, so that each request sees the table that is on disk."""

from __future__ import annotations

import contextlib
import hashlib
import os
import threading
from collections.abc import Callable
from pathlib import Path

from .adapter_table import AdapterTable
from .adapter_table_json import TableReader, unavailable
from .errors import AdapterTableError, one_message
from .file_version import is_settled, open_file, version_of

MOST_REPORTED = 20  # malformed entries in one log entry


class TableFile:
    """The table in adapters.json as it is on disk now. Adapters whose own entry is malformed are unavailable.

    Thread-safe: a changed file is read once, and all threads get the same table.

    The table depends on the file's content alone, so every process that reads the file has the same table. Only if the
    file is malformed as a whole, or has vanished, the last good table stays in place.
    """

    def __init__(self, path: Path, on_failure: Callable[[str], None]) -> None:
        """Read the table. AdapterTableError when the file cannot be read or is malformed as a whole.

        `on_failure` is called once with the text of each new problem.
        """
        self._lock = threading.Lock()
        self._path = path
        self._name = str(path)
        self._on_failure = on_failure
        self._version: object = None
        self._failure = ""
        self._reported: set[str] = set()
        self._reader = TableReader()
        self._digest = b""  # SHA-256 of the text that the table was made of
        self._table = AdapterTable()
        self._read()

    def table(self) -> AdapterTable:
        """The table. It costs one stat, unless the file has changed since it was read, or had changed just before."""
        with self._lock:
            if self._stat() != self._version:
                try:
                    self._read()
                    self._failure = ""
                except AdapterTableError as error:
                    if str(error) != self._failure:
                        self._on_failure(f"keeping the last good adapters.json: {error}")
                    self._failure = str(error)
            return self._table

    def _stat(self) -> object:
        try:
            return version_of(os.stat(self._name))  # noqa: PTH116  runs for every request, and Path is slow
        except OSError:
            return "unreadable"

    def _read(self) -> None:
        version = self._stat()  # before reading, so that a change in between is seen the next time
        try:
            with open(open_file(self._path), "rb") as file:  # noqa: PTH123  a descriptor
                content = file.read()
            digest = hashlib.sha256(content).digest()
            if digest != self._digest:
                self._table = self._table_of(content.decode())
                self._digest = digest
        except (OSError, UnicodeDecodeError) as error:
            raise AdapterTableError(f"cannot read {self._path}: {error}") from None
        finally:
            self._version = None if self._has_just_changed() else version

    def _table_of(self, text: str) -> AdapterTable:
        table = self._reader.read(text)
        problems = list(unavailable(table))
        if new := [problem for problem in problems if problem not in self._reported]:
            more = [f"and {len(new) - MOST_REPORTED} more"] if len(new) > MOST_REPORTED else []
            self._on_failure(one_message("adapters.json: unavailable", [*new[:MOST_REPORTED], *more]))
        self._reported = set(problems)
        return table

    def _has_just_changed(self) -> bool:
        with contextlib.suppress(OSError):
            return not is_settled(self._path.stat())
        return False  # a file that comes later has another version
