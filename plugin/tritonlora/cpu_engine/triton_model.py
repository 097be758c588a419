# SPDX-FileCopyrightText: the tritonlora authors
# SPDX-License-Identifier: Apache-2.0
"""The CPU engine as a Triton model, in the place of a TensorRT-LLM engine.

This module translates between Triton and `cpu_engine`. `execute` returns at once, and the engine's thread sends the
responses.
"""

from __future__ import annotations

import functools
import json
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import triton_python_backend_utils as pb_utils

from tritonlora.cpu_engine.engine import load_engine
from tritonlora.cpu_engine.wire_arrays import WireArray, array_in
from tritonlora.errors import TritonLoraError

FINAL = pb_utils.TRITONSERVER_RESPONSE_COMPLETE_FINAL


class TritonPythonModel:
    """One instance of the engine."""

    def initialize(self, args: dict[str, str]) -> None:
        """Load the engine that the parameters of config.pbtxt describe."""
        config = json.loads(args["model_config"])
        parameters = {name: value["string_value"] for name, value in config["parameters"].items()}
        decoupled = pb_utils.using_decoupled_model_transaction_policy(config)
        try:
            self._engine = load_engine(parameters, Path(args["model_repository"]), decoupled=decoupled)
        except TritonLoraError as error:
            raise pb_utils.TritonModelException(str(error)) from error

    def execute(self, requests: list[pb_utils.InferenceRequest]) -> None:
        """Queue all requests in the engine."""
        for request in requests:
            self._engine.submit(
                {tensor.name(): array_of(tensor) for tensor in request.inputs()},
                functools.partial(RowSender, Reply(request)),
                requested_outputs=request.requested_output_names(),
                label=request.request_id(),
            )

    def finalize(self) -> None:
        """End the engine's thread."""
        self._engine.close()


class Reply:
    """The responses to one request. They are complete when all rows of its batch have ended."""

    def __init__(self, request: pb_utils.InferenceRequest) -> None:
        self.wants_batch_index = "batch_index" in request.requested_output_names()
        self._sender = request.get_response_sender()
        self._rows_ended = 0
        self._has_responded = False
        self.is_cancelled = self._sender.is_cancelled

    def send(self, response: pb_utils.InferenceResponse, *, ends_row: bool, rows: int) -> None:
        """Send one response. The last response of the last row gets the final flag."""
        self._rows_ended += ends_row
        is_final = self._rows_ended == rows
        # Triton 2.51 loses an error that is not the first response to a BLS request, and the final flag with it.
        apart = is_final and self._has_responded and response.has_error()
        self._sender.send(response, flags=FINAL if is_final and not apart else 0)
        if apart:
            self._sender.send(flags=FINAL)
        self._has_responded = True


class RowSender:
    """Sends the responses to one row of a batch; implements `tritonlora.cpu_engine.executor.Sender`."""

    def __init__(self, reply: Reply, row: int, rows: int) -> None:
        self._reply = reply
        self._rows = rows
        self._batch_index = [row] if rows > 1 and reply.wants_batch_index else None
        self.is_cancelled = reply.is_cancelled

    def send(self, tokens: Sequence[int], *, last: bool) -> None:
        """Send tokens as output_ids [1, 1 beam, len] and sequence_length [1, 1 beam]."""
        tensors = [
            pb_utils.Tensor("output_ids", np.array([[tokens]], np.int32)),
            pb_utils.Tensor("sequence_length", np.array([[len(tokens)]], np.int32)),
        ]
        if self._batch_index:
            tensors.append(pb_utils.Tensor("batch_index", np.array([self._batch_index], np.int32)))
        self._reply.send(pb_utils.InferenceResponse(tensors), ends_row=last, rows=self._rows)

    def fail(self, message: str) -> None:
        """End the row with an error."""
        error = pb_utils.InferenceResponse(error=pb_utils.TritonError(message))
        self._reply.send(error, ends_row=True, rows=self._rows)

    def cancel(self) -> None:
        """End the row without an error, because its client has left.

        Triton 2.51 would lose an error after the first response to a BLS request, and the end of the stream with it.
        """
        self.send([], last=True)


def array_of(tensor: pb_utils.Tensor) -> WireArray:
    """A view of the tensor. `as_numpy` refuses bfloat16, which only the weights may have."""
    found = array_in(tensor.to_dlpack()) if tensor.name() == "lora_weights" else None
    return tensor.as_numpy() if found is None else found
