# SPDX-FileCopyrightText: the tritonlora authors
# SPDX-License-Identifier: Apache-2.0
"""What goes back to a client, and reading Triton's requests and answers: the model's other half.

Like model.py it only translates.
"""

from __future__ import annotations

import threading
import traceback
from typing import Any

import numpy as np
import torch
import triton_python_backend_utils as pb_utils

from tritonlora.errors import RequestError
from tritonlora.forwarding import is_unavailable, public
from tritonlora.routing import PreviousIds, Route

ENGINE_NEEDS = ("output_ids", "sequence_length")  # it refuses a request that does not ask for both


class EngineError(Exception):
    """An error that the engine answered, in words fit for the client."""

    def __init__(self, error: pb_utils.TritonError, route: Route | None) -> None:
        adapter = f"LoRA adapter {route.lora_name!r}: " if route else ""
        super().__init__(adapter + public(error.message()))
        self.code = pb_utils.TritonError.UNAVAILABLE if is_unavailable(error.message()) else error.code()


class Reply:
    """The answer to one request: what its rows send, and the final flag once all of them have finished."""

    def __init__(self, request: pb_utils.InferenceRequest, decoupled: bool) -> None:
        self.rows = 1
        self._sender = request.get_response_sender()
        self._decoupled = decoupled
        self._wanted = request.requested_output_names()
        self.is_stream = decoupled and any(values_of(request, "streaming") or [])
        self._detokenised = self.is_stream and "previous_ids" in self._wanted
        self._previous_ids: dict[int, PreviousIds] = {}
        self._lock = threading.Lock()
        self._finished_rows = 0
        self._complete = False

    def send(self, tensors: list[pb_utils.Tensor], row: int, *, ends: bool = False) -> None:
        """Pass on one answer of the engine: the outputs that the client asked for."""
        if self.rows > 1:  # the engine has seen a batch of one
            tensors = [tensor for tensor in tensors if tensor.name() != "batch_index"]
            tensors.append(pb_utils.Tensor("batch_index", np.array([[row]], np.int32)))
        if self._detokenised:
            output_ids, sequence_length = (tensor_of(tensors, name).as_numpy() for name in ENGINE_NEEDS)
            new = output_ids[0, 0, : sequence_length[0, 0]].tolist()
            previous_ids = self._previous_ids.setdefault(row, PreviousIds())
            # Without new tokens previous_ids mean the end of the stream, which the engine's answers never do.
            if ends or (new and output_ids.shape[1] == 1):
                tensors = [*tensors, pb_utils.Tensor("previous_ids", np.array([previous_ids.ids()], np.int32))]
            previous_ids.add(new)
        self._respond(pb_utils.InferenceResponse([tensor for tensor in tensors if tensor.name() in self._wanted]))

    def end_of_stream(self, row: int) -> None:
        """Tell the detokeniser, which holds back a character that is not complete, that no more tokens come."""
        if self._detokenised:
            nothing = (np.zeros((1, 1, 0), np.int32), np.zeros((1, 1), np.int32))
            tensors = [pb_utils.Tensor(name, value) for name, value in zip(ENGINE_NEEDS, nothing, strict=True)]
            self.send(tensors, row, ends=True)

    def fail(self, error: Exception) -> None:
        """Answer with an error: its own words if it is one for clients, else a log entry and INTERNAL."""
        if isinstance(error, RequestError):
            status = pb_utils.TritonError(str(error), getattr(pb_utils.TritonError, error.code))
        elif isinstance(error, EngineError):
            status = pb_utils.TritonError(str(error), error.code)
        else:
            pb_utils.Logger.log_error("".join(traceback.format_exception(error)))
            status = pb_utils.TritonError("the router failed on this request; the server's log says why")
        self._respond(pb_utils.InferenceResponse(error=status))

    def row_finished(self) -> None:
        """Send the final flag after the last row."""
        with self._lock:
            self._finished_rows += 1
            if self._finished_rows < self.rows or self._complete:
                return
            if self._decoupled:
                self._complete = True
                self._sender.send(flags=pb_utils.TRITONSERVER_RESPONSE_COMPLETE_FINAL)
                return
        self.fail(RequestError("the engine's model sent no answer"))

    def _respond(self, response: pb_utils.InferenceResponse) -> None:
        with self._lock:
            if self._complete:
                return
            if self._decoupled:
                self._sender.send(response)
            else:
                self._complete = True
                self._sender.send(response, flags=pb_utils.TRITONSERVER_RESPONSE_COMPLETE_FINAL)


def engine_error(answer: pb_utils.InferenceResponse) -> pb_utils.TritonError | None:
    """The error in an answer of the engine."""
    return answer.error() if answer.has_error() else None


def error_text(answer: pb_utils.InferenceResponse) -> str | None:
    """The text of the error in an answer of the engine."""
    error = engine_error(answer)
    return error.message() if error else None


def values_of(request: pb_utils.InferenceRequest, name: str) -> list[Any] | None:
    """The elements of an input, or None when the request does not have it."""
    tensor = pb_utils.get_input_tensor_by_name(request, name)
    return None if tensor is None else tensor.as_numpy().reshape(-1).tolist()


def tensor_of(tensors: list[pb_utils.Tensor], name: str) -> pb_utils.Tensor:
    """The tensor of that name."""
    return next(tensor for tensor in tensors if tensor.name() == name)


def row_of(inputs: list[pb_utils.Tensor], row: int) -> list[pb_utils.Tensor]:
    """One row of every input, as a batch of one. No input of an engine is of strings; numpy has no bfloat16."""
    return [
        pb_utils.Tensor.from_dlpack(tensor.name(), torch.utils.dlpack.from_dlpack(tensor.to_dlpack())[row : row + 1])
        for tensor in inputs
    ]
