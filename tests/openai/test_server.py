# SPDX-FileCopyrightText: the tritonlora authors
# SPDX-License-Identifier: Apache-2.0
"""Sockets: connections that send nothing, or too slowly, or no HTTP."""

from __future__ import annotations

import asyncio
import contextlib
import json
import socket
import threading
import time
from collections.abc import Iterator

import pytest
import uvicorn
from starlette.types import Receive, Scope, Send

from tritonlora.errors import ServerError
from tritonlora.openai import server
from tritonlora.openai.settings import Settings


@pytest.fixture
def port(monkeypatch: pytest.MonkeyPatch) -> Iterator[int]:
    """A door's protocol, which is patient for a moment only, before an application that writes without an end."""
    monkeypatch.setattr(server, "HEAD_SECONDS", 0.2)
    monkeypatch.setattr(server, "UNREAD_SECONDS", 0.2)

    async def application(scope: Scope, receive: Receive, send: Send) -> None:
        await send({"type": "http.response.start", "status": 200, "headers": []})
        while not LEFT.is_set():
            await send({"type": "http.response.body", "body": b"x" * (1 << 16), "more_body": True})
            LEFT.set() if await _has_left(receive) else None

    config = uvicorn.Config(application, http=server.PunctualProtocol, ws="none", lifespan="off", log_level="critical")
    running = uvicorn.Server(config)
    with socket.create_server(("127.0.0.1", 0)) as listening:
        thread = threading.Thread(target=running.run, kwargs={"sockets": [listening]})
        thread.start()
        yield listening.getsockname()[1]
        running.should_exit = True
        thread.join()


async def _has_left(receive: Receive) -> bool:
    with contextlib.suppress(asyncio.TimeoutError):
        message = await asyncio.wait_for(receive(), 0.001)
        return bool(message["type"] == "http.disconnect")
    return False


LEFT = threading.Event()


def test_a_client_that_does_not_read_is_cut_off(port: int) -> None:
    """The application learns that it has left."""
    LEFT.clear()
    with socket.create_connection(("127.0.0.1", port), timeout=10) as client:
        client.sendall(b"GET / HTTP/1.1\r\nHost: x\r\n\r\n")

        assert LEFT.wait(20)


@pytest.mark.parametrize("sent", [b"", b"POST /v1/models HT", b"GET / HTTP/1.1\r\nX-Slow: "])
def test_a_connection_that_sends_no_head_is_closed(port: int, sent: bytes) -> None:
    """Half open, or in the midst of a header."""
    with socket.create_connection(("127.0.0.1", port), timeout=10) as client:
        client.sendall(sent)

        assert b"" == client.recv(1)


def test_a_head_that_drips_is_not_waited_for(port: int) -> None:
    """Each byte comes in time, and the whole does not."""
    with socket.create_connection(("127.0.0.1", port), timeout=10) as client, contextlib.suppress(OSError):
        begun = time.monotonic()
        client.sendall(b"GET / HTTP/1.1\r\nX-Slow: ")
        client.settimeout(0.05)
        while True:
            client.sendall(b"x")
            with contextlib.suppress(TimeoutError):
                if client.recv(1) == b"":
                    return
            assert time.monotonic() - begun < 10, "the connection is still open"


def test_what_is_no_http_is_answered_in_openai_s_form(port: int) -> None:
    """And the connection closed."""
    with socket.create_connection(("127.0.0.1", port), timeout=10) as client:
        client.sendall(b"\x16\x03\x01 hello\r\n\r\n")
        received = b"".join(iter(lambda: client.recv(4096), b""))
    head, _, body = received.partition(b"\r\n\r\n")

    assert head.startswith(b"HTTP/1.1 400")
    assert "Invalid HTTP request" in json.loads(body)["error"]["message"]


def test_a_port_that_is_taken_is_named() -> None:
    """With what to do."""
    with socket.create_server(("127.0.0.1", 0)) as taken:
        number = taken.getsockname()[1]
        with pytest.raises(ServerError, match=f"cannot listen at 127.0.0.1:{number}: .*give another --address"):
            server.run(Settings(port=number), lambda: pytest.fail("it does not listen"))


def test_a_small_piece_goes_out_at_once() -> None:
    """Without TCP_NODELAY a second small piece waits 40 ms for the client's acknowledgement of the first."""
    delays = list[int]()

    async def connect() -> None:
        async def note(_: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
            delays.append(writer.get_extra_info("socket").getsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY))
            writer.close()

        with server.listening_socket(Settings(port=0)) as listening:
            async with await asyncio.start_server(note, sock=listening):
                reader, writer = await asyncio.open_connection(*listening.getsockname())
                assert b"" == await reader.read()
                writer.close()

    asyncio.run(connect())

    assert [1] == delays
