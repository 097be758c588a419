# SPDX-FileCopyrightText: the tritonlora authors
# SPDX-License-Identifier: Apache-2.0
"""adapters.json while it changes: each request sees the table that is on disk."""

from __future__ import annotations

import contextlib
import hashlib
import os
from collections.abc import Callable
from pathlib import Path

from .adapter_table import AdapterTable
from .adapter_table_json import TableReader, unavailable
from .errors import AdapterTableError, one_message
from .file_version import is_settled, open_file, version_of

MOST_REPORTED = 20  # malformed entries in one log entry


class TableFile:
    """adapters.json as it is on disk now, but for adapters whose own entry is malformed: these are unavailable.

    Of what it said before nothing is kept: every process that reads it comes to the same table.

    A file that is malformed as a whole, or has vanished, leaves the last good table in place.
    """

    def __init__(self, path: Path, on_failure: Callable[[str], None]) -> None:
        """Read the table; AdapterTableError when there is no good one to begin with.

        `on_failure` is told once of what is wrong, when it comes up.
        """
        self._path = path
        self._name = str(path)
        self._on_failure = on_failure
        self._version: object = None
        self._failure = ""
        self._reported: set[str] = set()
        self._reader = TableReader()
        self._digest = b""  # of the text that the table was made of
        self._table = AdapterTable()
        self._read()

    def table(self) -> AdapterTable:
        """The table; read again when the file has changed since, or just before (else one stat). Not thread-safe."""
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
            return version_of(os.stat(self._name))  # noqa: PTH116  for every request: Path is slow
        except OSError:
            return "unreadable"

    def _read(self) -> None:
        version = self._stat()  # before reading: a change in between is seen the next time
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
        return False  # one that comes is another version
