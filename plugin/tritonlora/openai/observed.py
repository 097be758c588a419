# SPDX-FileCopyrightText: the tritonlora authors
# SPDX-License-Identifier: Apache-2.0
"""Counts and traces each request, also those that the guard refuses."""

from __future__ import annotations

import contextlib

from starlette.types import ASGIApp, Message, Receive, Scope, Send

from tritonlora.openai.metrics import Metrics
from tritonlora.openai.tracing import Tracing

_NOT_OBSERVED = ("/health", "/metrics")


class Observed:
    """An ASGI application before another one, whose requests it counts, and traces if there is a `tracing`."""

    def __init__(self, app: ASGIApp, metrics: Metrics, tracing: Tracing | None) -> None:
        self._app = app
        self._metrics = metrics
        self._tracing = tracing

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http" or scope["path"] in _NOT_OBSERVED:
            await self._app(scope, receive, send)
            return
        with contextlib.ExitStack() as observed:
            record = observed.enter_context(self._metrics.recorded(scope))
            if self._tracing is not None:
                observed.enter_context(self._tracing.span(scope, record))

            async def noted(message: Message) -> None:
                if message["type"] == "http.response.start":
                    record.status = message["status"]
                await send(message)

            await self._app(scope, receive, noted)
