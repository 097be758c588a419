# SPDX-FileCopyrightText: the tritonlora authors
# SPDX-License-Identifier: Apache-2.0
"""Send requests for text, by adapter name, to a running server.

The requests use Triton's generate extension: HTTP, with server-sent events as responses.

Source: triton-inference-server/server, docs/protocol/extension_generate.md.
"""

from __future__ import annotations

import http.client
import json
import re
import urllib.parse
import uuid
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

from tritonlora.errors import ServerError
from tritonlora.machine import host_and_port
from tritonlora.repository.paths import LISTING
from tritonlora.serving.engine_errors import advice_on

DEFAULT_URL = "localhost:8000"
DEFAULT_MODEL = "ensemble"
TIMEOUT_SECONDS = 600.0
LISTING_TIMEOUT_SECONDS = METRICS_TIMEOUT_SECONDS = 30.0
READY_TIMEOUT_SECONDS = 5.0
_CANNOT_STREAM = "Streaming is only supported"  # begins the error of both kinds of target; it arrives before any text
_CONNECTIONS: dict[str, tuple[type[http.client.HTTPConnection], int]] = {
    "http": (http.client.HTTPConnection, 8000),
    "https": (http.client.HTTPSConnection, 443),
}

# Triton core, src/model_repository_manager and src/model_lifecycle.cc
_NO_MODEL = re.compile(r"unknown model|is not found|is not ready|no available versions")


def request_body(prompt: str, lora_name: str | None, max_tokens: int, inputs: Mapping[str, Any]) -> bytes:
    """The JSON body of a request. Of the adapter it holds only the name."""
    name = {} if lora_name is None else {"lora_name": lora_name}
    return json.dumps({"text_input": prompt, "max_tokens": max_tokens, **name, **inputs}).encode()


def generate(
    prompt: str,
    *,
    lora_name: str | None = None,
    max_tokens: int = 64,
    url: str = DEFAULT_URL,
    model: str = DEFAULT_MODEL,
    inputs: Mapping[str, Any] | None = None,
    timeout: float = TIMEOUT_SECONDS,
) -> Iterator[str]:
    """Send a request for text, and yield the pieces of the response as the server sends them.

    `url` is HOST:PORT of the HTTP endpoint. `inputs` are further inputs of `model`, by name. `timeout`, in seconds, is
    for each wait on the connection. An engine that is not decoupled cannot stream: the whole text comes as one piece.

    Each request has an id of its own, unless `inputs` has an `id`. By the id the server joins the pieces of a streamed
    character. If a model's responses have the whole text so far, the pieces are the new part of each. Closing the
    iterator cancels the request. Raises ServerError with the server's message, or if the server cannot be reached.
    """
    for stream in (True, False):
        own: dict[str, Any] = {"id": uuid.uuid4().hex, "stream": stream}
        body = request_body(prompt, lora_name, max_tokens, {**own, **(inputs or {})})
        sent, is_whole = 0, None  # characters; whether a response has the whole text, asked once the first has come
        try:
            for event in _answers(url, model, body, timeout):
                found = event.get("text_output", "")
                text = "".join(map(str, found)) if isinstance(found, list) else str(found)
                yield text[sent:]
                if is_whole is None:
                    is_whole = stream and _has_whole_texts(url, model, timeout)
                sent = len(text) if is_whole else 0
            return
        except ServerError as error:
            if advice := advice_on(str(error)):
                raise ServerError(f"{advice} (the engine: {error})") from None
            if not stream or _CANNOT_STREAM not in str(error):
                raise


def _has_whole_texts(url: str, model: str, timeout: float) -> bool:
    """Whether each streamed response of a model has the whole text so far.

    So it is in an ensemble whose text is the engine's own: the LLM API's model gives text_output.
    """
    config = _json_of(url, f"/v2/models/{urllib.parse.quote(model, safe='')}/config", timeout)
    steps = config.get("ensemble_scheduling", {}).get("step", [])
    return any("text_output" in step.get("output_map", {}) for step in steps)


def ask(model: str, inputs: Mapping[str, Any], *, url: str = DEFAULT_URL, timeout: float = TIMEOUT_SECONDS) -> int:
    """Send one request to any model, and return the number of its responses. Raises ServerError as `generate` does."""
    return sum(1 for _ in _answers(url, model, json.dumps(inputs).encode(), timeout))


def adapters(url: str = DEFAULT_URL, *, timeout: float = LISTING_TIMEOUT_SECONDS) -> dict[str, dict[str, Any]]:
    """The server's listing of its adapters, by lora_name (`serving.listing.describe`). Raises ServerError."""
    return _listing(url, {}, timeout)


def _listing(url: str, inputs: Mapping[str, Any], timeout: float) -> dict[str, dict[str, Any]]:
    try:
        texts = [event["adapters"] for event in _answers(url, LISTING, json.dumps(inputs).encode(), timeout)]
        found: dict[str, dict[str, Any]] = _json_object(*texts)
    except ServerError as error:
        if _NO_MODEL.search(str(error)):
            raise ServerError(
                f"the server at {url} has no model {LISTING!r} that is ready ({error}); "
                "run tritonlora init on its model repository, and start it again"
            ) from None
        raise
    except (KeyError, TypeError, ValueError):
        raise ServerError(
            f"model {LISTING!r} at {url} did not answer with a listing; run tritonlora init on its "
            "model repository, and start it again"
        ) from None
    return found


def load(lora_name: str, url: str = DEFAULT_URL, *, timeout: float = TIMEOUT_SECONDS) -> dict[str, dict[str, Any]]:
    """Have the server's engine load the adapters that a name leads to, and wait for it.

    Returns their listing, by lora_name, each with `load`: its `result` is "loaded", "held" (it was there already) or
    "refused", then with a `reason`. Raises ServerError, also when the server knows no such name, or is too old.
    """
    found = _listing(url, {"lora_name": lora_name, "load": True}, timeout)
    if not all("load" in about for about in found.values()):
        raise ServerError(
            f"model {LISTING!r} at {url} is of an older tritonlora, which loads nothing; run tritonlora init on its "
            "model repository, and start it again"
        )
    return found


def is_ready(url: str, *, timeout: float = READY_TIMEOUT_SECONDS) -> bool:
    """Whether the server says that it is ready. ServerError when it cannot be reached."""
    with _connected(url, timeout) as connection:
        connection.request("GET", "/v2/health/ready")
        return connection.getresponse().status == http.client.OK


def metrics_url(url: str, port: int) -> str:
    """The URL of the metrics of the server whose HTTP endpoint is at `url`. ServerError if `url` is no HOST:PORT."""
    return f"http://{host_and_port(_connection(url, READY_TIMEOUT_SECONDS).host, port)}/metrics"


def metrics(url: str, *, timeout: float = METRICS_TIMEOUT_SECONDS) -> str:
    """The text of a server's metrics. `url` is http://HOST:PORT/metrics, with the port of the metrics endpoint.

    ServerError when the server cannot be reached, or answers with an error.
    """
    with _connected(url, timeout) as connection:
        connection.request("GET", urllib.parse.urlsplit(url).path or "/metrics")
        response = connection.getresponse()
        if response.status != http.client.OK:
            raise ServerError(
                f"no metrics at {url}: HTTP status {response.status}; Triton's metrics port is 8002 by default"
            )
        try:
            return response.read().decode()
        except UnicodeDecodeError:
            raise ServerError(f"{url} answered something other than text; is it the metrics endpoint?") from None


def _answers(url: str, model: str, body: bytes, timeout: float) -> Iterator[dict[str, Any]]:
    for event in _events(url, f"/v2/models/{urllib.parse.quote(model, safe='')}/generate_stream", body, timeout):
        if "error" in event:
            raise ServerError(str(event["error"]))
        yield event


def _events(url: str, path: str, body: bytes, timeout: float) -> Iterator[dict[str, Any]]:
    """The JSON objects of a stream of server-sent events. Raises ServerError."""
    with _connected(url, timeout) as connection:
        connection.request("POST", path, body, {"Content-Type": "application/json"})
        response = connection.getresponse()
        if response.status != http.client.OK:
            raise ServerError(_error_text(url, response))
        try:
            for line in response:
                if line.startswith(b"data:"):
                    yield _json_object(line[len(b"data:") :])
        except (ValueError, RecursionError) as error:
            raise ServerError(
                f"{url} answered something other than a JSON object: {error}; is it a Triton server?"
            ) from None


def _json_of(url: str, path: str, timeout: float) -> dict[str, Any]:
    """The JSON object of a GET; {} if the server does not give it. ServerError when there is no server."""
    with _connected(url, timeout) as connection:
        connection.request("GET", path)
        try:
            return _json_object(connection.getresponse().read())
        except (ValueError, RecursionError):
            return {}


@contextmanager
def _connected(url: str, timeout: float) -> Iterator[http.client.HTTPConnection]:
    """A connection for one request. ServerError when the server cannot be reached, or does not use HTTP."""
    connection = _connection(url, timeout)
    try:
        yield connection
    except (OSError, http.client.HTTPException) as error:
        if isinstance(error, http.client.BadStatusLine) and not isinstance(error, http.client.RemoteDisconnected):
            raise ServerError(f"{url} does not answer in HTTP; is that the gRPC endpoint?") from None
        reason = getattr(error, "strerror", None) or str(error) or type(error).__name__
        raise ServerError(f"no answer from {url}: {reason}; is the server running?") from None
    finally:
        connection.close()


def _connection(url: str, timeout: float) -> http.client.HTTPConnection:
    try:
        parts = urllib.parse.urlsplit(url if "://" in url else f"http://{url}")
        kind, default_port = _CONNECTIONS[parts.scheme]
        host = (parts.hostname or "").encode("idna").decode()
        if host:
            return kind(host, parts.port or default_port, timeout=timeout)
    except (KeyError, ValueError, http.client.InvalidURL):
        pass
    raise ServerError(f"{url!r} is not HOST:PORT")


def _json_object(text: str | bytes) -> dict[str, Any]:
    found = json.loads(text)
    if not isinstance(found, dict):
        raise ValueError(f"got {found!r:.100}")  # noqa: TRY004  as json.loads does
    return found


def _error_text(url: str, response: http.client.HTTPResponse) -> str:
    """Triton's own message for an error status. generate_stream may send the message as an event, too.

    Triton's metrics endpoint answers 405, and in other servers' errors `error` is no text.
    """
    body = response.read().decode(errors="replace").removeprefix("data:")
    try:
        message = json.loads(body)["error"]
    except (ValueError, KeyError, TypeError):
        message = None
    if isinstance(message, str) and response.status != http.client.METHOD_NOT_ALLOWED:
        return message
    return f"{url} answered with HTTP status {response.status}: {body[:200].strip() or response.reason}; {_ELSE}"


_ELSE = "is that Triton's HTTP endpoint, port 8000 by default?"
