# SPDX-FileCopyrightText: the tritonlora authors
# SPDX-License-Identifier: Apache-2.0
"""The routes of the door."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator, Mapping
from contextlib import asynccontextmanager
from typing import Any

from fastapi import FastAPI
from starlette.requests import Request
from starlette.responses import JSONResponse, Response
from starlette.types import ASGIApp

from tritonlora import __version__
from tritonlora.openai import responses
from tritonlora.openai.answer import Answer
from tritonlora.openai.api_error import ApiError, unavailable
from tritonlora.openai.discovery import Served
from tritonlora.openai.door import Door
from tritonlora.openai.error_responses import add_handlers
from tritonlora.openai.guard import Guard
from tritonlora.openai.metrics import CONTENT_TYPE, Metrics, record_of
from tritonlora.openai.observed import Observed
from tritonlora.openai.prompts import chat_prompt, completion_prompts
from tritonlora.openai.schema import ChatRequest, CompletionRequest, ErrorBody
from tritonlora.openai.settings import Settings
from tritonlora.openai.tracing import Tracing

_ERRORS: dict[int | str, dict[str, Any]] = {
    status: {"model": ErrorBody, "description": text}
    for status, text in {
        400: "the request cannot be answered as it is",
        401: "the API key is missing or wrong",
        404: "there is no such model",
        408: "the request took too long to arrive",
        413: "the request is too large",
        500: "the engine failed",
        503: "ask again",
        504: "the engine fell silent",
    }.items()
}


def create_app(settings: Settings, tracing: Tracing | None = None) -> ASGIApp:
    """The door as an ASGI application."""
    metrics = Metrics()
    door = Door(settings, metrics)

    @asynccontextmanager
    async def lifespan(_: FastAPI) -> AsyncIterator[None]:
        async with door.opened():
            yield
        if tracing is not None:
            await asyncio.to_thread(tracing.close)

    app = FastAPI(
        title="tritonlora", version=__version__, lifespan=lifespan, responses=_ERRORS, docs_url=None, redoc_url=None
    )
    add_handlers(app)

    @app.get("/health")
    async def health() -> JSONResponse:
        """Ready when the engine's model is, with its warm adapters, and so are the models that lead to it."""
        model = door.served().model
        if not all(await asyncio.gather(*(door.client.is_ready(name) for name in (model.model, model.target)))):
            raise unavailable("the server behind this API is not ready; ask again")
        return JSONResponse({"status": "ok"})

    @app.get("/metrics", response_class=Response)
    async def metrics_page() -> Response:
        """The metrics, as Prometheus reads them."""
        return Response(metrics.page(), media_type=CONTENT_TYPE)

    @app.get("/v1/models")
    async def models() -> JSONResponse:
        """The base model, the adapters and their aliases."""
        served = door.served()
        return JSONResponse({"object": "list", "data": _cards(served, await door.adapters())})

    @app.get("/v1/models/{name:path}")
    async def model(name: str) -> JSONResponse:
        """The base model, an adapter or an alias."""
        served = door.served()
        card = next((one for one in _cards(served, await door.adapters()) if one["id"] == name), None)
        if card is None:
            raise await door.unknown(served, name)
        return JSONResponse(card)

    @app.post("/v1/chat/completions", response_model=None)
    async def chat(request: ChatRequest, http: Request) -> Response:
        """The next message of a conversation."""
        record_of(http.scope).model = request.model
        served = door.served()
        await door.check_name(served, request.model)
        try:
            prompt = await chat_prompt(served, request)
        except ApiError as error:
            raise await door.first_of(served, request.model, error) from None
        return Answer(door.generations, served, request, [prompt], responses.CHAT)

    @app.post("/v1/completions", response_model=None)
    async def completions(request: CompletionRequest, http: Request) -> Response:
        """The text after each prompt."""
        record_of(http.scope).model = request.model
        served = door.served()
        await door.check_name(served, request.model)
        try:
            prompts = await completion_prompts(served, request)
        except ApiError as error:
            raise await door.first_of(served, request.model, error) from None
        return Answer(door.generations, served, request, prompts, responses.COMPLETION)

    return Observed(Guard(app, settings.api_key), metrics, tracing)


def _cards(served: Served, found: Mapping[str, Mapping[str, Any]]) -> list[dict[str, Any]]:
    """The models as OpenAI's API lists them. `root` of an alias is the adapter; `parent` is the base model."""
    base = served.base_name
    roots: dict[str, str] = {}
    for name, one in sorted(found.items()):
        divided = one.get("shares", {})  # aliases that lead to other adapters, too
        roots |= {alias: alias if alias in divided else name for alias in (name, *one.get("aliases", ()))}
    common = {"object": "model", "created": _STARTED, "owned_by": "tritonlora"}
    cards: list[dict[str, Any]] = [{"id": base, **common, "root": base, "parent": None}]
    return cards + [{"id": name, **common, "root": root, "parent": base} for name, root in roots.items()]


_STARTED = int(time.time())
