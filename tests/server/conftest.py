# SPDX-FileCopyrightText: the tritonlora authors
# SPDX-License-Identifier: Apache-2.0
"""A real tritonserver for the tests of this folder. Where there is none the tests fail: nothing is skipped."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from tritonlora.server import Server

READY_TIMEOUT = 120.0


@pytest.fixture(scope="module")
def launch() -> Iterator[Callable[..., Server]]:
    """`launch(repository, **options)`: a ready server on free ports, stopped at the end of the module."""
    with contextlib.ExitStack() as servers:

        def start(repository: Path, **options: object) -> Server:
            server = servers.enter_context(Server(repository, exit_timeout=5, **options))  # type: ignore[arg-type]
            server.wait_until_ready(READY_TIMEOUT)
            return server

        yield start
