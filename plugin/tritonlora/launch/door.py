# SPDX-FileCopyrightText: the tritonlora authors
# SPDX-License-Identifier: Apache-2.0
"""The OpenAI door of `serve --openai-port`: `tritonlora openai` as a process before a running server."""

from __future__ import annotations

import contextlib
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

from tritonlora.errors import ServerError
from tritonlora.interrupts import held
from tritonlora.launch.server import Server

POLL_SECONDS = 1.0
KILL_SECONDS = 60.0  # the door ends requests under way after 30 seconds


@contextlib.contextmanager
def opened(repository: Path, grpc_url: str, *, address: str, port: int) -> Iterator[subprocess.Popen[bytes]]:
    """The door before the server at `grpc_url`, while the block runs. Requests under way end first.

    Clients can connect when the block begins. ServerError when the door has ended before that.

    The door ends with this process, however that ends, because its stdin is closed then.
    """
    options = ["--url", grpc_url, "--address", address, "--port", str(port), "--while-stdin"]
    with held():  # an interrupt in the midst of Popen would lose the process
        command = [sys.executable, "-m", "tritonlora", "openai", str(repository), *options]
        process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, start_new_session=True)
    try:
        if process.stdout is None or not process.stdout.readline():  # "listening on …"
            raise _ended(process.wait())
        yield process
    finally:
        process.terminate()
        try:
            process.wait(KILL_SECONDS)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()


def wait(door: subprocess.Popen[bytes], running: Server) -> int:
    """Wait for the server to end by itself, as `Server.wait` does. ServerError when the door ends before that."""
    while (status := running.wait(POLL_SECONDS)) is None:
        if door.poll() is not None:
            raise _ended(door.returncode)
    return status


def _ended(status: int) -> ServerError:
    return ServerError(f"the OpenAI API ended by itself, with status {status}; its messages say why")
