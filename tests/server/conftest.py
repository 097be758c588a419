# SPDX-FileCopyrightText: the tritonlora authors
# SPDX-License-Identifier: Apache-2.0
"""A real tritonserver for the tests of this folder. Where there is none the tests fail: nothing is skipped."""

from __future__ import annotations

import contextlib
import subprocess
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from tritonlora.launch.server import Server

READY_TIMEOUT = 120.0


@pytest.fixture(scope="module")
def launch() -> Iterator[Callable[..., Server]]:
    """`launch(repository, **options)`: a ready server on free ports, stopped at the end of the module."""
    servers: list[Server] = []
    with contextlib.ExitStack() as running:

        def start(repository: Path, **options: object) -> Server:
            server = running.enter_context(Server(repository, exit_timeout=5, **options))  # type: ignore[arg-type]
            servers.append(server)
            server.wait_until_ready(READY_TIMEOUT)
            return server

        yield start
        # Killed: Triton takes 6 s to stop these models in order, which test_server.py and test_serve.py have it do.
        with ThreadPoolExecutor(max(1, len(servers))) as pool:
            list(pool.map(lambda server: server.stop(0), servers))


@pytest.fixture
def processes() -> Iterator[list[subprocess.Popen[str]]]:
    """Processes to end, whatever the test did."""
    started: list[subprocess.Popen[str]] = []
    yield started
    for process in started:
        process.kill()
        process.communicate()
