# SPDX-FileCopyrightText: the tritonlora authors
# SPDX-License-Identifier: Apache-2.0
"""The handlers of the application's errors: each becomes a response in the form of OpenAI's API."""

from __future__ import annotations

import re
from collections.abc import Awaitable, Callable
from typing import Any

from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from starlette.exceptions import HTTPException
from starlette.responses import JSONResponse

from tritonlora.openai.api_error import FAILED, INVALID, NOT_FOUND, ApiError, invalid
from tritonlora.openai.metrics import record_of


def add_handlers(app: FastAPI) -> None:
    """Let the application answer all errors in this form."""
    for kind, error_of in _HANDLERS.items():
        app.add_exception_handler(kind, _handler(error_of))


def _handler(error_of: Callable[[Any], ApiError]) -> Callable[[Request, Exception], Awaitable[JSONResponse]]:
    async def handle(request: Request, error: Exception) -> JSONResponse:
        found = error_of(error)
        record_of(request.scope).failed(found)
        return JSONResponse(found.body(), found.status, headers=found.headers)

    return handle


def _itself(error: ApiError) -> ApiError:
    return error


def _bad_body(error: RequestValidationError) -> ApiError:
    """The error that names each field that is wrong."""
    problems: dict[str, str] = {}
    for one in error.errors():
        path = [str(part) for part in one["loc"][1:] if not _KIND.search(str(part))]
        if one["type"] == "json_invalid":
            return invalid(f"the body is not JSON: {one.get('ctx', {}).get('error', one['msg'])}")
        if not path:
            return invalid(NOT_SENT_AS_JSON if isinstance(one["input"], bytes) else NO_OBJECT)
        text = "the field is unknown here" if one["type"] == "extra_forbidden" else str(one["msg"])
        problems.setdefault(path[0], f"{'.'.join(path)}: {text}")
    return invalid("; ".join(problems.values())[:MOST_CHARACTERS], next(iter(problems), None))


def _half_a_character(_: UnicodeEncodeError) -> ApiError:
    return invalid("the request has half of a surrogate pair, which is no character")


def _http_error(error: HTTPException) -> ApiError:
    kind = NOT_FOUND if error.status_code == 404 else INVALID
    text = _OF_THE_PATH.get(error.status_code, str(error.detail))
    return ApiError(error.status_code, text, kind=kind, headers=error.headers)


def _failure(_: Exception) -> ApiError:
    return ApiError(500, "tritonlora openai failed on this request; its log says why", kind=FAILED)


_OF_THE_PATH = {
    404: "there is nothing at this path; ask /v1/chat/completions, /v1/completions or /v1/models",
    405: "this path does not take this method; /openapi.json has the methods of each path",
}
NOT_SENT_AS_JSON = (
    "the request's Content-Type is not application/json; add that header, as curl does with "
    "-H 'Content-Type: application/json'"
)
NO_OBJECT = "the body is empty, or no JSON object; send an object with the field model"
MOST_CHARACTERS = 2000
_KIND = re.compile(r"constrained-|\[")  # pydantic names the kinds of a field that has several
_HANDLERS: dict[type[Exception], Callable[[Any], ApiError]] = {
    ApiError: _itself,
    RequestValidationError: _bad_body,
    UnicodeEncodeError: _half_a_character,
    HTTPException: _http_error,
    Exception: _failure,
}
