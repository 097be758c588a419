# SPDX-FileCopyrightText: the tritonlora authors
# SPDX-License-Identifier: Apache-2.0
"""The door once it knows what its server serves."""

from __future__ import annotations

import asyncio
import gc
from collections.abc import Iterator
from typing import Any, cast

import pytest

from tritonlora.openai import door
from tritonlora.openai.discovery import Served
from tritonlora.openai.metrics import Metrics
from tritonlora.openai.settings import Settings
from tritonlora.openai.triton_client import ServerGone


def test_a_server_that_does_not_answer_is_told_of_once(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """Although gRPC has another text each time, such as those of two addresses of a host."""
    texts = ["ipv6:[::1]:8001: refused", "ipv4:127.0.0.1:8001: refused"]

    async def look() -> None:
        over = asyncio.Event()

        async def discover(*_: Any) -> Served:
            if texts:
                raise ServerGone(texts.pop())
            over.set()
            return await asyncio.Future()

        monkeypatch.setattr(door, "discover", discover)
        async with door.Door(Settings(), Metrics()).opened():
            await asyncio.wait_for(over.wait(), 30)

    monkeypatch.setattr(door, "RETRY_SECONDS", 0)
    asyncio.run(look())

    assert [
        "not ready yet: no answer from localhost:8001; is that the gRPC endpoint of a running server?"
    ] == caplog.messages


@pytest.fixture
def thawed() -> Iterator[None]:
    """The collector looks at everything again."""
    yield
    gc.unfreeze()


@pytest.mark.usefixtures("thawed")
def test_the_collector_does_not_look_at_the_libraries_objects(monkeypatch: pytest.MonkeyPatch) -> None:
    """It would hold up every stream."""
    found = cast(Served, type("Found", (), {"base_name": "base"}))

    async def discover(*_: Any) -> Served:
        return found

    async def served() -> Served:
        opened = door.Door(Settings(), Metrics())
        async with opened.opened():
            while opened._served is None:
                await asyncio.sleep(0)
            return opened.served()

    monkeypatch.setattr(door, "discover", discover)
    before = gc.get_freeze_count()

    assert found is asyncio.run(served())
    assert gc.get_freeze_count() > before
