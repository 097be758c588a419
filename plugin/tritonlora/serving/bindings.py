# SPDX-FileCopyrightText: the tritonlora authors
# SPDX-License-Identifier: Apache-2.0
"""Which content the engine was started with, or sent, under each lora_task_id. The engine ignores any other.

An adapter's content is identified by the SHA-256 of both of its files. `add` gives new content a new id. So an id means
other content only if somebody has edited adapters.json, and then requests for it are refused.

The resolver may be loaded again while the engine keeps its adapters. So it keeps the bindings in a file in /dev/shm,
for the next resolver of the same server. Others may write to /dev/shm. So the file is read only if nobody else can
write to it, and without following links.
"""

from __future__ import annotations

import contextlib
import os
import re
import stat
from collections.abc import Mapping
from pathlib import Path

from .adapter_table import AdapterEntry, AdapterTable
from .errors import AdapterUnavailable, SharedMemoryError
from .routing import Route
from .server_process import start_ticks

_FILE = re.compile(r"tritonlora-(\d+)-(\d+)-(\d+)-.+", re.ASCII)  # as `server_process.name_for` names it
_OTHERS_WRITE = stat.S_IWGRP | stat.S_IWOTH


class Bindings:
    """lora_task_id -> content. An id stays bound for as long as the server lives."""

    def __init__(self, path: Path, contents: Mapping[int, str]) -> None:
        """Take over the bindings in the file `path`. If there is no such file, make it with `contents`.

        SharedMemoryError when others could write to the file. Files that servers have left behind are removed.
        """
        for other in path.parent.glob("tritonlora-*"):
            if other != path and _is_left_behind(other):
                with contextlib.suppress(OSError):
                    other.unlink()
        self._file = _open(path)
        with open(self._file, "r+b", closefd=False) as file:
            lines, newline, _ = file.read().rpartition(b"\n")
            file.truncate(len(lines + newline))
        self._contents = {int(task_id): content for task_id, content in map(str.split, lines.decode().splitlines())}
        for task_id, content in () if self._contents else contents.items():
            self._bind(task_id, content)

    def close(self) -> None:
        """Close the file, which stays."""
        os.close(self._file)

    def contents(self) -> dict[int, str]:
        """A copy, lora_task_id -> content."""
        return self._contents.copy()

    def bind(self, route: Route) -> None:
        """Bind the adapter's id to its content. AdapterUnavailable when the id is bound to other content.

        Call it once the weights are read, and before they are sent. Otherwise an id would stay bound to content that
        the engine never got.
        """
        if route.entry.lora_task_id not in self._contents:
            self._bind(route.entry.lora_task_id, content_of(route.entry))
        self.check(route)

    def _bind(self, task_id: int, content: str) -> None:
        self._contents[task_id] = content
        os.write(self._file, f"{task_id} {content}\n".encode())

    def check(self, route: Route) -> None:
        """Raise AdapterUnavailable if the adapter's id is bound to other content."""
        check_content(route, self._contents)


def check_content(route: Route, contents: Mapping[int, str]) -> None:
    """Raise AdapterUnavailable if the adapter's lora_task_id has other content according to `contents`.

    An engine that holds other content under the id would respond with that content.
    """
    task_id, content = route.entry.lora_task_id, content_of(route.entry)
    if contents.get(task_id, content) != content:
        raise AdapterUnavailable(
            f"LoRA adapter {route.lora_name!r}: lora_task_id {task_id} was given to other weights; the engine may hold "
            f"them under it; give these a new id: tritonlora add {route.lora_name} ADAPTER_DIR --task-id N"
        )


def contents_of(table: AdapterTable, *, only_warm: bool) -> dict[int, str]:
    """lora_task_id -> content of the adapters in a table, or of those that the engine's warmup loads."""
    return {entry.lora_task_id: content_of(entry) for entry in table.entries.values() if entry.warm or not only_warm}


def content_of(entry: AdapterEntry) -> str:
    """A string that identifies the content of the adapter's files: both SHA-256."""
    return f"{entry.lora_weights_sha256}-{entry.lora_config_sha256}"


def _open(path: Path) -> int:
    """A descriptor of the file, to read it and to append to it; it is made if it is not there."""
    flags = os.O_RDWR | os.O_APPEND | os.O_CREAT | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC
    try:
        descriptor = os.open(path, flags, 0o600)
    except OSError as error:
        raise SharedMemoryError(f"{path} cannot be read and written ({error.strerror}); remove it") from None
    found = os.fstat(descriptor)
    if stat.S_ISREG(found.st_mode) and found.st_uid == os.geteuid() and not found.st_mode & _OTHERS_WRITE:
        return descriptor
    os.close(descriptor)
    raise SharedMemoryError(
        f"{path} belongs to user {found.st_uid}, with mode {stat.S_IMODE(found.st_mode):o}; expected a file of user "
        f"{os.geteuid()}, and nobody else to have write permission; remove it"
    )


def _is_left_behind(path: Path) -> bool:
    """Whether the file is of a server in this namespace that has ended."""
    match = _FILE.fullmatch(path.name)
    if match is None or int(match[1]) != Path("/proc/self/ns/pid").stat().st_ino:
        return False
    try:
        return start_ticks(int(match[3])) != int(match[2])
    except OSError:
        return True
