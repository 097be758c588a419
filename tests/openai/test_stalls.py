# SPDX-FileCopyrightText: the tritonlora authors
# SPDX-License-Identifier: Apache-2.0
"""An engine that falls silent in the midst of a response."""

from __future__ import annotations

import asyncio
import json
from typing import Any

import pytest

from scripted_triton import BEFORE_SILENCE, opened

BODY = {"model": "pirate", "prompt": "x!", "max_tokens": 9}


def ask(body: dict[str, Any]) -> tuple[int, str, bool]:
    """Status and text of a response, and whether the request was ended in the engine by its own id."""

    async def asked() -> tuple[int, str, bool]:
        async with opened(stall_seconds=0.2) as (triton, client):
            response = await client.post("/v1/completions", json=body)
            ended = await asyncio.wait_for(triton.stopped.get(), 10)
            return response.status_code, response.text, ended in {one.id for one in triton.asked}

    return asyncio.run(asked())


def test_a_stream_ends_with_an_error_and_its_request_in_the_engine() -> None:
    """After the tokens that came."""
    status, text, is_ended = ask({**BODY, "stream": True})
    *tokens, last = [json.loads(line.removeprefix("data: ")) for line in text.split("\n\n") if line]

    assert (200, BEFORE_SILENCE, True) == (status, len(tokens), is_ended)
    assert ("stalled", "the engine sent no token for 0.2 s; ask again") == (
        last["error"]["code"], last["error"]["message"],
    )  # fmt: skip


@pytest.mark.parametrize("count", [1, 2])
def test_a_whole_response_that_does_not_come_is_a_504(count: int) -> None:
    """In OpenAI's form; part of a response is none."""
    status, text, is_ended = ask({**BODY, "n": count})

    assert (504, "stalled", True) == (status, json.loads(text)["error"]["code"], is_ended)
