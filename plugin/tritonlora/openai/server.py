# SPDX-FileCopyrightText: the tritonlora authors
# SPDX-License-Identifier: Apache-2.0
"""Runs the door: sockets, processes and signals. uvicorn does the rest."""

from __future__ import annotations

import functools
import json
import logging
import os
import resource
import socket
import sys
import tempfile
from asyncio import TimerHandle, Transport
from collections.abc import Callable

import uvicorn
from starlette.types import ASGIApp
from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol
from uvicorn.supervisors import Multiprocess

from tritonlora.errors import ServerError
from tritonlora.machine import host_and_port, is_ipv6
from tritonlora.openai import tracing
from tritonlora.openai.api_error import invalid
from tritonlora.openai.app import create_app
from tritonlora.openai.metrics import MULTIPROCESS_DIRECTORY
from tritonlora.openai.settings import Settings, check_access

HEAD_SECONDS = 60.0  # until a connection has sent the head of a request
KEEP_ALIVE_SECONDS = 75  # between two requests of a client
UNREAD_SECONDS = 60.0  # that a client may take before it reads on


def run(settings: Settings, on_listening: Callable[[], None] = lambda: None) -> None:
    """Listen until a signal ends the process. Raises ServerError when it cannot listen there.

    `on_listening` is called once, when clients can connect.
    """
    check_access(settings.address, settings.api_key)
    _allow_many_connections()
    config = uvicorn.Config(
        functools.partial(_application, settings),
        factory=True,
        http=PunctualProtocol,
        ws="none",
        workers=settings.workers,
        log_level="warning",
        access_log=False,
        server_header=False,
        proxy_headers=False,
        timeout_keep_alive=KEEP_ALIVE_SECONDS,
        timeout_graceful_shutdown=int(settings.drain_seconds),
    )
    with listening_socket(settings) as listening:
        on_listening()
        if settings.workers > 1:
            with tempfile.TemporaryDirectory(prefix="tritonlora-metrics-") as directory:
                os.environ[MULTIPROCESS_DIRECTORY] = directory
                Multiprocess(config, sockets=[listening]).run()
        else:
            uvicorn.Server(config).run(sockets=[listening])


def _application(settings: Settings) -> ASGIApp:
    logging.basicConfig(level=logging.INFO, format="%(message)s", stream=sys.stderr)  # in each process
    return create_app(settings, tracing.from_environment())


def listening_socket(settings: Settings) -> socket.socket:
    """A socket that listens where the settings say. Raises ServerError when it cannot."""
    family = socket.AF_INET6 if is_ipv6(settings.address) else socket.AF_INET
    listening = socket.socket(family, socket.SOCK_STREAM, socket.IPPROTO_TCP)  # asyncio sets TCP_NODELAY only then
    listening.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        listening.bind((settings.address, settings.port))
        listening.listen()  # a client that comes early waits
    except OSError as error:
        listening.close()
        where = host_and_port(settings.address, settings.port)
        raise ServerError(f"cannot listen at {where}: {error.strerror}; give another --address or --port") from None
    listening.set_inheritable(True)
    return listening


def _allow_many_connections() -> None:
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if soft != hard:
        resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))


class PunctualProtocol(HttpToolsProtocol):
    """uvicorn's protocol, which closes a connection whose client does not send the head of a request, or does not read.

    uvicorn itself waits for ever for a first request, for the rest of a head, and for a client that does not read.
    """

    _deadline: float | None = None
    _unread: TimerHandle | None = None

    def connection_made(self, transport: Transport) -> None:  # type: ignore[override]
        super().connection_made(transport)
        self._await_head()

    def data_received(self, data: bytes) -> None:
        super().data_received(data)
        self._await_head()

    def pause_writing(self) -> None:
        super().pause_writing()
        self._unread = self.loop.call_later(UNREAD_SECONDS, self.transport.abort)

    def resume_writing(self) -> None:
        super().resume_writing()
        self._forget_unread()

    def connection_lost(self, exc: Exception | None) -> None:
        super().connection_lost(exc)
        self._forget_unread()

    def _forget_unread(self) -> None:
        if self._unread is not None:
            self._unread.cancel()
            self._unread = None

    def send_400_response(self, msg: str) -> None:
        """Answer what is no HTTP in the form of OpenAI's API."""
        body = json.dumps(invalid(msg).body()).encode()
        head = f"HTTP/1.1 400 Bad Request\r\nContent-Type: application/json\r\nContent-Length: {len(body)}\r\n"
        self.transport.write(f"{head}Connection: close\r\n\r\n".encode() + body)
        self.transport.close()

    def _await_head(self) -> None:
        if self.transport.is_closing():
            return
        if self.cycle is not None and not self.cycle.response_complete:
            self._deadline = None
        elif self.timeout_keep_alive_task is None:
            self._deadline = self._deadline or self.loop.time() + HEAD_SECONDS
            self.timeout_keep_alive_task = self.loop.call_at(self._deadline, self.timeout_keep_alive_handler)


logging.getLogger("uvicorn.error").addFilter(lambda record: "Invalid HTTP request" not in record.getMessage())
