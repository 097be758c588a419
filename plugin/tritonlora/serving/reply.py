# SPDX-FileCopyrightText: the tritonlora authors
# SPDX-License-Identifier: Apache-2.0
"""The router's reply to one request: its responses, its error and its final flag, sent through Triton.

A reply is thread-safe. The thread that responds may be abandoned, and then another thread completes the reply.
"""

from __future__ import annotations

import threading
import time
import traceback
from collections.abc import Sequence

import triton_python_backend_utils as pb_utils

from .engine_errors import public
from .errors import RequestError
from .resolver_client import ResolverError
from .triton import code_of

FINAL = pb_utils.TRITONSERVER_RESPONSE_COMPLETE_FINAL
FAILED = "the router failed on this request; the server's log says why"
# Between two calls of `is_cancelled` on a request. The server must be done with the shared memory of the last call
# (python_backend src/python_be.cc, ProcessIsRequestCancelled): the next call, or deleting the request, frees that
# memory.
LOOK_SECONDS = 0.1


class EngineError(Exception):
    """An error response of the engine, with a text that clients may see. `code` is a name in `pb_utils.TritonError`."""

    def __init__(self, error: pb_utils.TritonError, lora_name: str | None) -> None:
        adapter = f"LoRA adapter {lora_name!r}: " if lora_name else ""
        super().__init__(adapter + public(error.message()))
        self.code = code_of(error)


class Reply:
    """The responses to one request."""

    def __init__(self, request: pb_utils.InferenceRequest, *, decoupled: bool) -> None:
        self._sender = request.get_response_sender()
        self._decoupled = decoupled
        self._sending = threading.Lock()  # against a second thread, which completes the reply of an abandoned one
        self._error: pb_utils.TritonError | None = None
        self._arrived_at = time.monotonic()
        self._first_sent_at: float | None = None
        self.is_stream = False  # until the request has been read
        self._is_complete = False
        self._has_left = False  # at the last look
        self._next_look = time.monotonic() + LOOK_SECONDS
        self._outcome = "INTERNAL"  # until `succeed` or `fail` sets it

    @property
    def is_complete(self) -> bool:
        """Whether the reply has ended, maybe by another thread. Then nothing more is sent."""
        return self._is_complete

    @property
    def outcome(self) -> str:
        """The outcome of the request, one of `counters.OUTCOMES`."""
        return self._outcome

    @property
    def first_token_seconds(self) -> float | None:
        """The seconds from the request's arrival to the first response of a stream; None without one."""
        return self._first_sent_at - self._arrived_at if self.is_stream and self._first_sent_at else None

    def has_left(self) -> bool:
        """Whether the client has left, or its timeout has passed. Triton is asked every LOOK_SECONDS: it takes 0.2 ms.

        Triton tells it of requests that clients send to the router itself. Triton never tells it of a step of an
        ensemble: it only cancels the steps that would begin later (core, src/ensemble_scheduler, main branch of June
        2026).
        """
        now = time.monotonic()
        if not self._has_left and now >= self._next_look:
            self._next_look = now + LOOK_SECONDS
            with self._sending:  # Triton crashes when `is_cancelled` is called after the final flag
                self._has_left = self._is_complete or self._sender.is_cancelled()
        return self._has_left

    def send(self, tensors: Sequence[pb_utils.Tensor]) -> None:
        """Send one response."""
        response = pb_utils.InferenceResponse([*tensors])
        with self._sending:
            if self._is_complete:
                return
            if self._decoupled:
                self._sender.send(response)
            else:
                self._sender.send(response, flags=FINAL)
            self._first_sent_at = self._first_sent_at or time.monotonic()

    def succeed(self) -> None:
        """Note that all responses were sent. `complete` ends the reply."""
        self._outcome = "OK"

    def fail(self, error: Exception) -> None:
        """Note the error with which the reply ends; only the first one counts.

        A RequestError, EngineError or ResolverError goes to the client as it is. Any other error goes to the log, and
        the client gets INTERNAL.
        """
        if self._error:
            return
        message = str(error).encode(errors="replace").decode()  # Triton takes no lone surrogates
        code = "INTERNAL"
        if isinstance(error, (RequestError, EngineError, ResolverError)):
            code = error.code
        else:
            pb_utils.Logger.log_error("".join(traceback.format_exception(error)))
            message = FAILED
        self._error = pb_utils.TritonError(message, getattr(pb_utils.TritonError, code))
        self._outcome = code

    def complete(self) -> None:
        """Send the error, if there is one, and the final flag. Nothing is sent after that.

        The error and the flag are one response: an ensemble that gets the flag after an error never ends, and a server
        that is stopped waits for it. After an earlier response they are two: a BLS client would lose both (Triton
        2.51).
        """
        with self._sending:
            if self._is_complete:
                return
            self._is_complete = True
            if self._outcome != "OK" and not self._error:  # a reply without an outcome must not look like a success
                self._error = pb_utils.TritonError(FAILED)
            if self._first_sent_at is None:
                self._sender.send(pb_utils.InferenceResponse(error=self._error), flags=FINAL)
            elif self._decoupled:
                if self._error:
                    self._sender.send(pb_utils.InferenceResponse(error=self._error))
                self._sender.send(flags=FINAL)
