# SPDX-FileCopyrightText: the tritonlora authors
# SPDX-License-Identifier: Apache-2.0
"""The router's reply to one request: its responses, its error and its final flag, in Triton's terms.

A reply is thread-safe. The thread that answers may be left behind, and then another one completes the reply.
"""

from __future__ import annotations

import threading
import time
import traceback
from collections.abc import Sequence

import triton_python_backend_utils as pb_utils

from .counters import OUTCOMES
from .engine_errors import is_unavailable, public
from .errors import RequestError
from .routing import Route

FINAL = pb_utils.TRITONSERVER_RESPONSE_COMPLETE_FINAL
FAILED = "the router failed on this request; the server's log says why"
# Between two looks the server must have left what it shares with this process for the last one (python_backend
# src/python_be.cc, ProcessIsRequestCancelled), which the next look, or letting go of the request, frees.
LOOK_SECONDS = 0.1


class EngineError(Exception):
    """An error that the engine answered, in words fit for the client."""

    def __init__(self, error: pb_utils.TritonError, route: Route | None) -> None:
        adapter = f"LoRA adapter {route.lora_name!r}: " if route else ""
        super().__init__(adapter + public(error.message()))
        self.code = "UNAVAILABLE" if is_unavailable(error.message()) else _name_of(error.code())


class Reply:
    """What the client of one request is told."""

    def __init__(self, request: pb_utils.InferenceRequest, *, decoupled: bool) -> None:
        self._sender = request.get_response_sender()
        self._decoupled = decoupled
        self._sending = threading.Lock()  # between the thread that answers, and the one that has left it behind
        self._error: pb_utils.TritonError | None = None
        self._has_sent = False
        self._is_complete = False
        self._has_left = False  # as far as has been looked
        self._next_look = time.monotonic() + LOOK_SECONDS
        self._outcome = "INTERNAL"  # until something better is known

    @property
    def is_complete(self) -> bool:
        """Whether nothing more is heard: the reply has ended, maybe for another thread."""
        return self._is_complete

    @property
    def outcome(self) -> str:
        """One of `counters.OUTCOMES`."""
        return self._outcome

    def has_left(self) -> bool:
        """Whether the client has gone away, or its time is up; looked at now and then, as asking takes 0.2 ms.

        Triton says so of requests that clients send to the router itself. Of a step of an ensemble it never does: it
        cancels the steps that an ensemble begins later (core, src/ensemble_scheduler, main branch of June 2026).
        """
        now = time.monotonic()
        if not self._has_left and now >= self._next_look:
            self._next_look = now + LOOK_SECONDS
            with self._sending:  # asked of a request that is complete, Triton would crash
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
            self._has_sent = True

    def succeed(self) -> None:
        """All has been sent. `complete` ends the reply."""
        self._outcome = "OK"

    def fail(self, error: Exception) -> None:
        """End with an error, the first one: its own words if it is for clients, else a log entry and INTERNAL."""
        if self._error:
            return
        message = str(error).encode(errors="replace").decode()  # Triton takes no lone surrogates
        code = "INTERNAL"
        if isinstance(error, (RequestError, EngineError)):
            code = error.code
        else:
            pb_utils.Logger.log_error("".join(traceback.format_exception(error)))
            message = FAILED
        self._error = pb_utils.TritonError(message, getattr(pb_utils.TritonError, code))
        self._outcome = code

    def complete(self) -> None:
        """Send the error, if there is one, and the final flag. Nothing that is left to say is heard any more.

        Both at once: an ensemble that gets the flag after an error is under way for ever, and the server waits for it
        when it is stopped. But not where something was sent before: a BLS client would lose both (Triton 2.51).
        """
        with self._sending:
            if self._is_complete:
                return
            self._is_complete = True
            if self._outcome != "OK" and not self._error:  # whatever went wrong, nobody takes it for an answer
                self._error = pb_utils.TritonError(FAILED)
            if not self._has_sent:
                self._sender.send(pb_utils.InferenceResponse(error=self._error), flags=FINAL)
            elif self._decoupled:
                if self._error:
                    self._sender.send(pb_utils.InferenceResponse(error=self._error))
                self._sender.send(flags=FINAL)


def _name_of(code: object) -> str:
    """The name of a Triton error code."""
    names = (name for name in OUTCOMES if getattr(pb_utils.TritonError, name, None) == code)
    return next(names, "INTERNAL")
