# SPDX-FileCopyrightText: the tritonlora authors
# SPDX-License-Identifier: Apache-2.0
"""Errors as clients of OpenAI's API expect them, and the HTTP status of each error of the server.

Source of the form: OpenAI's API reference, and openai-python, src/openai/_exceptions.py.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

from tritonlora.serving.engine_errors import advice_on

INVALID, NOT_FOUND, OVERLOADED, FAILED = (
    "invalid_request_error",
    "not_found_error",
    "overloaded_error",
    "server_error",
)
UNSUPPORTED, TOO_LONG = "unsupported", "context_length_exceeded"  # codes
UNKNOWN_MODEL, STALLED = "model_not_found", "stalled"


class ApiError(Exception):
    """A request cannot be answered. `param` is the field of the request that is to blame, if one is."""

    def __init__(
        self,
        status: int,
        message: str,
        *,
        kind: str = INVALID,
        param: str | None = None,
        code: str | None = None,
        headers: Mapping[str, str] | None = None,
    ) -> None:
        super().__init__(message)
        self.status = status
        self.kind = kind
        self.param = param
        self.code = code
        self.headers = dict(headers or {})

    def body(self) -> dict[str, Any]:
        """The JSON body of the response, which is also the event of a stream that fails."""
        return {"error": {"message": str(self), "type": self.kind, "param": self.param, "code": self.code}}


def invalid(message: str, param: str | None = None, code: str | None = None) -> ApiError:
    """The error of a request that must change before it is sent again."""
    return ApiError(400, message, param=param, code=code)


def unavailable(message: str) -> ApiError:
    """The error of a request that may be sent again as it is."""
    return ApiError(503, message, kind=OVERLOADED, headers={"Retry-After": "1"})


def stalled(seconds: float) -> ApiError:
    """The error of a request for which the engine fell silent."""
    return ApiError(504, f"the engine sent no token for {seconds:g} s; ask again", kind=FAILED, code=STALLED)


# What a message of the server contains -> status and code. The first match counts. A gRPC stream of Triton has the
# message of an error alone, without its code.
_ERRORS: tuple[tuple[str, int, str | None], ...] = (
    (r"exceeds maximum input length|[Pp]rompt length|max_input_len|max_seq_len", 400, TOO_LONG),
    (r"does not implement|not implemented|not supported|unsupported", 400, UNSUPPORTED),
    (r"is not a legal adapter name|lora_name is empty|is not UTF-8", 400, None),
    (r"ask again|(?:is|are) in use", 503, None),
    (r"is not ready|is not found|unknown model|no available versions|being stopped|shutting down", 503, None),
    (r"Error generating request|Assertion failed|Encountered an error", 500, None),
    (r"LoRA adapter '", 503, None),  # the adapter is registered, and cannot be served now
)
_UNKNOWN = re.compile(r"unknown LoRA adapter '.*?'(?:; available: (?P<names>.*))?", re.DOTALL)
_WHERE = re.compile(r"^in ensemble '[^']*', ")


def error_of_server(message: str, model: str, base_name: str) -> ApiError:
    """The error of a request for `model` that the server answered with `message`.

    The client does not see other messages than these: there may be paths of the server in them.
    """
    if unknown := _UNKNOWN.search(message):
        return unknown_model(model, base_name, unknown["names"] or "")
    if advice := advice_on(message):
        return unavailable(advice)
    found = ((status, code) for pattern, status, code in _ERRORS if re.search(pattern, message))
    status, code = next(found, (500, None))
    text = _WHERE.sub("", message)
    if status == 400:
        return invalid(text, code=code)
    if status == 503:
        return unavailable(text)
    return ApiError(500, "the engine failed on this request; the log of tritonlora openai says why", kind=FAILED)


def unknown_model(model: str, base_name: str, names: str) -> ApiError:
    """The error of a request for a model that does not exist. `names` are the adapters, separated by commas."""
    available = ", ".join(filter(None, (base_name, names)))
    message = f"The model {model[:200]!r} does not exist; available: {available}"
    return ApiError(404, message, kind=NOT_FOUND, param="model", code=UNKNOWN_MODEL)
