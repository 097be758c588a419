# SPDX-FileCopyrightText: the tritonlora authors
# SPDX-License-Identifier: Apache-2.0
"""Proves that a message comes from one of tritonlora's own processes, and shows whether that process still lives.

A `Holder` is a file in memory (memfd_create(2)) with a secret name. Its token has the process, the descriptor and the
name. Only a process of the same user can look the name up, in /proc/PID/fd, and only while the holder's process lives.
"""

from __future__ import annotations

import os
import re
import secrets

_TOKEN = re.compile(r"([1-9]\d{0,9}):(\d{1,9}):(tritonlora-[0-9a-f]{32})", re.ASCII)


class Holder:
    """The proof that this process is one of tritonlora's, for as long as the process lives or until `close`."""

    def __init__(self) -> None:
        name = f"tritonlora-{secrets.token_hex(16)}"
        self._descriptor = os.memfd_create(name)
        self.token = f"{os.getpid()}:{self._descriptor}:{name}"

    def close(self) -> None:
        """End the proof."""
        os.close(self._descriptor)


def is_held(token: object) -> bool:
    """Whether a `Holder` with this token exists now, in a process of this user."""
    match = _TOKEN.fullmatch(token) if isinstance(token, str) else None
    if match is None:
        return False
    pid, descriptor, name = match.groups()
    try:
        return os.readlink(f"/proc/{pid}/fd/{descriptor}") == f"/memfd:{name} (deleted)"  # noqa: PTH115
    except OSError:
        return False
