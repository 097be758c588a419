# SPDX-FileCopyrightText: the tritonlora authors
# SPDX-License-Identifier: Apache-2.0
"""What is refused before the server is asked: the application in this process, before a server that is not there."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from typing import Any

import httpx
import pytest

from tritonlora.errors import ServerError
from tritonlora.openai import guard
from tritonlora.openai.app import create_app
from tritonlora.openai.settings import Settings, check_access

URL = "http://door"
CHAT = "/v1/chat/completions"
EVERYBODY = "0.0.0.0"  # noqa: S104  which is refused


def ask(method: str, path: str, api_key: str | None = None, **request: Any) -> httpx.Response:
    """One request to a door without a server."""

    async def asked() -> httpx.Response:
        transport = httpx.ASGITransport(create_app(Settings(api_key=api_key)))
        async with httpx.AsyncClient(transport=transport, base_url=URL) as client:
            return await client.request(method, path, **request)

    return asyncio.run(asked())


@pytest.mark.parametrize(
    "headers",
    [
        {},
        {"Authorization": "Bearer wrong"},
        {"Authorization": "Bearer "},
        {"Authorization": "right"},
        {"Authorization": "Basic right"},
        [("Authorization", "Bearer right"), ("Authorization", "Bearer wrong")],
        {"Authorization": b"Bearer \xff"},
    ],
)
@pytest.mark.parametrize("path", ["/v1/models", "/openapi.json", "/nothing", "//health", "/health/", "/Health"])
def test_without_the_key_nobody_gets_in(path: str, headers: Any) -> None:
    """In OpenAI's form."""
    response = ask("GET", path, "right", headers=headers)

    assert (401, "invalid_api_key") == (response.status_code, response.json()["error"]["code"])


def test_with_the_key_one_gets_in_and_probes_need_none() -> None:
    """The server is not there: 503. The metrics are."""
    statuses = [
        ask("GET", path, key, headers=headers).status_code
        for path, key, headers in (
            ("/v1/models", "right", {"Authorization": "Bearer right"}),
            ("/v1/models", None, {}),
            ("/health", "right", {}),
            ("/metrics", "right", {}),
        )
    ]

    assert [503, 503, 503, 200] == statuses


@pytest.mark.parametrize(("address", "key"), [(EVERYBODY, None), ("::", None), ("10.0.0.1", None), ("127.0.0.1", "")])
def test_without_a_key_only_this_machine_is_served(address: str, key: str | None) -> None:
    """And an empty key is none."""
    with pytest.raises(ServerError, match="API key"):
        check_access(address, key)
    for good in (("127.0.0.1", None), ("::1", None), (EVERYBODY, "secret")):
        check_access(*good)


def test_a_body_that_is_too_large_is_refused_however_it_comes(monkeypatch: pytest.MonkeyPatch) -> None:
    """Announced, and in chunks."""
    monkeypatch.setattr(guard, "MOST_BODY_BYTES", 100)

    async def chunks() -> AsyncIterator[bytes]:
        for _ in range(11):
            yield b"x" * 10

    announced, chunked = (ask("POST", CHAT, content=content) for content in (b"x" * 101, chunks()))

    assert [413, 413] == [announced.status_code, chunked.status_code]
    assert "error" in chunked.json()


def test_a_body_that_does_not_come_is_not_waited_for(monkeypatch: pytest.MonkeyPatch) -> None:
    """The wait is bounded."""
    monkeypatch.setattr(guard, "BODY_SECONDS", 0.05)

    async def stalls() -> AsyncIterator[bytes]:
        yield b"{"
        await asyncio.Event().wait()

    response = ask("POST", CHAT, content=stalls())

    assert (408, True) == (response.status_code, "error" in response.json())


def test_too_many_at_a_time_are_asked_to_come_again(monkeypatch: pytest.MonkeyPatch) -> None:
    """With Retry-After."""
    monkeypatch.setattr(guard, "MOST_REQUESTS", 0)
    response = ask("GET", "/v1/models")

    assert (503, "1") == (response.status_code, response.headers["retry-after"])


@pytest.mark.parametrize(
    ("content", "told"),
    [
        (b"{", "not JSON"),
        (b"", "the body is empty, or no JSON object"),
        (b"[]", "the body is empty, or no JSON object"),
        (b"null", "the body is empty, or no JSON object"),
        (b"\xff", "parsing"),
        (b"[" * 100_000, "parsing"),
        (b'{"model": 5, "messages": [{"role": "user", "content": "x"}]}', "model: "),
        (b'{"model": "m", "messages": []}', "messages: "),
        (b'{"model": "m", "messages": [{"role": "king", "content": "x"}]}', "messages.0.role: "),
        (b'{"model": "m", "messages": [{"role": "user", "content": "\\ud800"}]}', "unicode"),
        (b'{"model": "m", "messages": [{"role": "user", "content": [{"type": "image_url"}]}]}', "messages.0.content"),
        (b'{"model": "m", "messages": [{"role": "user", "content": "x"}], "max_tokens": "3"}', "max_tokens: "),
        (b'{"model": "m", "messages": [{"role": "user", "content": "x"}], "max_tokens": 1e400}', "max_tokens: "),
        (b'{"model": "m", "messages": [{"role": "user", "content": "x"}], "temperature": NaN}', "temperature: "),
        (b'{"model": "m", "messages": [{"role": "user", "content": "x"}], "n": 0}', "n: "),
        (
            b'{"model": "m", "messages": [{"role": "user", "content": "x"}], "lora_name": "y"}',
            "lora_name: the field",
        ),
        (b'{"model": "m", "messages": [{"role": "user", "content": "x"}], "functions": []}', "functions: the field is"),
        (b'{"model": "m", "messages": [{"role": "user", "content": "x"}], "tool_choice": "auto"}', "tool_choice: "),
        (b'{"model": "m", "messages": [{"role": "user", "content": "x"}], "store": true}', "store: "),
    ],
)
def test_bad_bodies_are_named_in_openai_s_form(content: bytes, told: str) -> None:
    """400, before the server is asked."""
    response = ask("POST", CHAT, content=content, headers={"Content-Type": "application/json"})

    assert (400, True) == (response.status_code, told in response.json()["error"]["message"]), response.text


@pytest.mark.parametrize(
    ("path", "status", "told"),
    [("/completions", 404, "nothing at this path; ask /v1/chat/completions"), (CHAT, 405, "does not take this method")],
)
def test_a_wrong_path_or_method_is_told_the_right_ones(path: str, status: int, told: str) -> None:
    """In OpenAI's form."""
    response = ask("GET", path)

    assert (status, True) == (response.status_code, told in response.json()["error"]["message"])


@pytest.mark.parametrize("headers", [{}, {"Content-Type": "application/x-www-form-urlencoded"}])
def test_json_without_its_content_type_is_told_what_to_add(headers: dict[str, str]) -> None:
    """As curl -d sends it."""
    response = ask("POST", CHAT, content=b'{"model": "m", "messages": []}', headers=headers)

    assert response.status_code == 400
    assert (
        "add that header, as curl does with -H 'Content-Type: application/json'" in response.json()["error"]["message"]
    )
