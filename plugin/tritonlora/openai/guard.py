# SPDX-FileCopyrightText: the tritonlora authors
# SPDX-License-Identifier: Apache-2.0
"""Refuses requests before the application reads them: without the API key, too large, too slow, too many at a time."""

from __future__ import annotations

import asyncio
import hmac

from starlette.exceptions import HTTPException
from starlette.responses import JSONResponse
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from tritonlora.openai.api_error import ApiError, unavailable

MOST_BODY_BYTES = 8 << 20
BODY_SECONDS = 30.0
MOST_REQUESTS = 4096
OPEN_PATHS = ("/health", "/metrics")  # for probes and Prometheus, which have no key


class Guard:
    """An ASGI application before another one."""

    def __init__(self, app: ASGIApp, api_key: str | None) -> None:
        self._app = app
        self._expected = None if api_key is None else f"Bearer {api_key}".encode()
        self._under_way = 0

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        refusal = self._refusal(scope)
        if refusal is not None:
            await JSONResponse(refusal.body(), refusal.status, headers=refusal.headers)(scope, receive, send)
            return
        self._under_way += 1
        try:
            await self._app(scope, _bounded(receive), send)
        finally:
            self._under_way -= 1

    def _refusal(self, scope: Scope) -> ApiError | None:
        if not self._has_key(scope):
            return ApiError(401, "the API key is missing or wrong", code="invalid_api_key")
        lengths = [value for name, value in scope["headers"] if name == b"content-length"]
        if any(value.isdigit() and int(value[:20]) > MOST_BODY_BYTES for value in lengths):
            return ApiError(413, TOO_LARGE, code="request_too_large", headers={"Connection": "close"})
        if self._under_way >= MOST_REQUESTS:
            return unavailable(f"{MOST_REQUESTS} requests are under way; ask again")
        return None

    def _has_key(self, scope: Scope) -> bool:
        if self._expected is None or scope["path"] in OPEN_PATHS:
            return True
        given = [value for name, value in scope["headers"] if name == b"authorization"]
        return len(given) == 1 and hmac.compare_digest(given[0], self._expected)


TOO_LARGE = f"the body has more than {MOST_BODY_BYTES} bytes"


def _bounded(receive: Receive) -> Receive:
    """`receive` with a bound on the size of a body, and on the time until all of it is there."""
    received, deadline = 0, 0.0

    async def bounded() -> Message:
        nonlocal received, deadline
        if deadline < 0:  # the body is complete, and the next message says that the client has left
            return await receive()
        now = asyncio.get_running_loop().time()
        deadline = deadline or now + BODY_SECONDS
        try:
            message = await asyncio.wait_for(receive(), max(0.0, deadline - now))
        except asyncio.TimeoutError:
            raise HTTPException(408, f"the body did not arrive within {BODY_SECONDS:.0f} s") from None
        received += len(message.get("body", b""))
        if received > MOST_BODY_BYTES:
            raise HTTPException(413, TOO_LARGE)
        if not message.get("more_body", False):
            deadline = -1.0
        return message

    return bounded
