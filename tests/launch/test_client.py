# SPDX-FileCopyrightText: the tritonlora authors
# SPDX-License-Identifier: Apache-2.0
"""client.py, asking what is no address and who is no Triton; tests/server has the real one."""

from __future__ import annotations

import re
import socket
import threading
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from http.server import BaseHTTPRequestHandler, HTTPServer

import pytest

from tritonlora.errors import ServerError
from tritonlora.launch import client


@pytest.fixture
def answering() -> Iterator[Callable[[bytes], str]]:
    """`answering(body)`: HOST:PORT of a server that answers everything with it."""
    with ExitStack() as stack:

        def start(body: bytes) -> str:
            class Handler(BaseHTTPRequestHandler):
                def do_POST(self) -> None:
                    self.rfile.read(int(self.headers["Content-Length"]))
                    self.send_response(200)
                    self.end_headers()
                    self.wfile.write(body)

                def log_message(self, *_: object) -> None:
                    pass

            server = stack.enter_context(HTTPServer(("127.0.0.1", 0), Handler))
            thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
            thread.start()
            stack.callback(thread.join)
            stack.callback(server.shutdown)
            return f"127.0.0.1:{server.server_port}"

        yield start


@pytest.mark.parametrize("url", ["[", "a..b:8000", 80 * "é", "local host:8000", "host:99999", "", "http://"])
@pytest.mark.parametrize("ask", [lambda url: list(client.generate("hi", url=url)), client.adapters])
def test_what_is_no_address_is_refused_by_name(ask: Callable[[str], object], url: str) -> None:
    """Whoever notices: the parser of URLs, the one of names, or the connection."""
    with pytest.raises(ServerError) as refused:
        ask(url)

    assert f"{url!r} is not HOST:PORT" == str(refused.value)


@pytest.mark.parametrize(
    "body", [b"data: \xff\n", b"data: 5\n", b"data: [1]\n", b"data: {\n", b"data: " + 99999 * b"["]
)
def test_an_answer_that_is_no_json_object_is_an_error(answering: Callable[[bytes], str], body: bytes) -> None:
    """With the address."""
    url = answering(body)

    with pytest.raises(ServerError, match=f"^{url} answered something other than a JSON object: .*; is it a Triton"):
        list(client.generate("hi", url=url))


def _refusal(status: int, body: bytes) -> bytes:
    return b"HTTP/1.1 %d No\r\nContent-Length: %d\r\n\r\n%b" % (status, len(body), body)


@pytest.mark.parametrize(
    ("answered", "message"),
    [
        (b"\0\x1b\n", r"{} does not answer in HTTP; is that the gRPC endpoint\?"),
        (b"", r"no answer from {}: [ -~]*; is the server running\?"),
        (
            _refusal(405, b'{"error":"Method Not Allowed"}'),
            r"{} answered with HTTP status 405: .*; is that Triton's .*",
        ),
        (
            _refusal(404, b'{"error":{"message":"Not Found"}}'),
            r"{} answered with HTTP status 404: .*; is that Triton's .*",
        ),
        (_refusal(404, b'{"error":"unknown"}'), "unknown"),
    ],
    ids=["bytes", "nothing", "metrics", "openai", "triton"],
)
def test_the_answer_of_another_endpoint_is_an_error(answered: bytes, message: str) -> None:
    """As that of the gRPC endpoint, whose bytes no terminal should get; a server that goes away says nothing at all.

    Triton's own errors stay as they are.
    """
    with socket.create_server(("127.0.0.1", 0)) as server:

        def answer() -> None:
            with server.accept()[0] as connection:
                connection.sendall(answered)
                connection.shutdown(socket.SHUT_WR)
                while connection.recv(1 << 16):
                    pass

        thread = threading.Thread(target=answer)
        thread.start()
        url = f"127.0.0.1:{server.getsockname()[1]}"
        with pytest.raises(ServerError, match=f"^{message.format(url)}$"):
            client.adapters(url)
        thread.join()


@pytest.mark.parametrize(
    ("error", "advice"),
    [
        ("LoRA task 3 not found in cache. Please send LoRA weights with request", "the engine lost the adapter for a"),
        ("Cache is full. There are no done tasks to evict", "the engine's cache is full of adapters in use"),
    ],
)
def test_an_error_of_the_engine_s_cache_says_to_ask_again(
    answering: Callable[[bytes], str], error: str, advice: str
) -> None:
    """Before the engine's own text."""
    url = answering(b'data: {"error": "%b"}\n' % error.encode())

    with pytest.raises(ServerError, match=rf"^{advice}.*; ask again \(the engine: {re.escape(error)}\)$"):
        list(client.generate("hi", url=url))


def test_texts_may_be_anything(answering: Callable[[bytes], str]) -> None:
    """The server's types are what they are."""
    url = answering(b'data: {"text_output": ["a", 1]}\n\ndata: {"text_output": 2}\n')

    assert ["a1", "2"] == list(client.generate("hi", url=url))


def test_a_listing_that_is_none_is_an_error(answering: Callable[[bytes], str]) -> None:
    """Another model may have the name."""
    with pytest.raises(ServerError, match="did not answer with a listing; run tritonlora init"):
        client.adapters(answering(b'data: {"adapters": "[]"}\n'))
