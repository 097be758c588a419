# SPDX-FileCopyrightText: the tritonlora authors
# SPDX-License-Identifier: Apache-2.0
"""The router: forwards each request to the engine's model, for the adapter that the request names.

| module | does |
|---|---|
| `resolver_client` | asks the resolver which adapter each row means, and waits until the engine has it |
| `forwarding` | sends a request again when the engine lacked the adapter |
| `row_outputs` | decides which tensors of a response go to the client |
| `outgoing` | sends requests to the engine's model through Triton |
| `reply` | responds to the client through Triton |

An instance serves one request at a time, from its first token to its last; `outgoing` gives the reason. Triton runs one
instance for each concurrent stream, and one process for each instance (`instance_group` in config.pbtxt).

If the engine falls silent in the midst of a stream, the thread that serves the request is abandoned. Triton before
25.04 causes such silence: it loses an error that is not the first response to a BLS request, and the end of the stream
with it (python_backend src/infer_response.cc, SaveToSharedMemory, does not note which request the error belongs to).
"""

from __future__ import annotations

import functools
import gc
import json
from collections import deque
from collections.abc import Iterator

import triton_python_backend_utils as pb_utils

from .abandonable import Silence, Worker
from .errors import ClientLeft, EngineSilent, InvalidRequest, RequestError
from .forwarding import forward
from .outgoing import Engine, Outgoing
from .parameters import parameters_of
from .reply import EngineError, Reply
from .resolver_client import ResolverClient, ResolverError, RouterLease
from .response_cache import check_config
from .routing import SPLIT_KEY
from .row_outputs import OWN_OUTPUTS, RowOutputs, wanted_outputs
from .triton import Inputs, error_of, inputs_of, parameters_in, values_of
from .wire import wire_of


class TritonPythonModel:
    """One instance of the router."""

    def initialize(self, args: dict[str, str]) -> None:
        """Read the config. The router has no state of its own."""
        config = json.loads(args["model_config"])
        check_config(config)
        parameters = parameters_in(config)
        inputs = [one["name"] for one in config["input"]]
        self._wire = wire_of(inputs)
        self._batching = config["max_batch_size"] > 0
        self._decoupled = pb_utils.using_decoupled_model_transaction_policy(config)
        self._resolver = ResolverClient(parameters.get("resolver", "lora_resolver"))
        self._engine = Engine(
            parameters["target"],
            self._wire,
            inputs=inputs,
            outputs={output["name"] for output in config["output"]} - OWN_OUTPUTS,
            decoupled=self._decoupled,
            batching=self._batching,
        )
        self._patience = (
            float(parameters.get("first_answer_timeout_seconds", "3600")),
            float(parameters.get("stall_timeout_seconds", "300")),
        )
        self._worker = Worker()
        self._last_replies: deque[Reply] = deque(maxlen=4)
        gc.freeze()  # otherwise a full collection, in the midst of a response, takes 70 ms for the objects made so far

    def execute(self, requests: list[pb_utils.InferenceRequest]) -> None:
        """Serve the requests, one after the other."""
        for request in requests:
            reply = Reply(request, decoupled=self._decoupled)
            silence = Silence(*self._patience)
            lease = self._resolver.lease(self._wire)

            def is_stuck(reply: Reply = reply, silence: Silence = silence, lease: RouterLease = lease) -> bool:
                if lease.waits and reply.has_left():
                    lease.leave()
                return silence.is_too_long()

            is_done = self._worker.do(functools.partial(self._serve, request, reply, silence, lease), is_stuck)
            if not is_done:
                reply.fail(EngineSilent(f"the engine's model has sent nothing for {silence.seconds():.3g} s"))
            reply.complete()
            try:
                lease.end(reply.outcome, is_over=is_done, first_token_seconds=reply.first_token_seconds)
            except ResolverError as error:
                pb_utils.Logger.log_error(f"the resolver was not told the end of a request: {error}")
            self._last_replies.append(reply)

    def finalize(self) -> None:
        """End the thread, and the proof that messages to the resolver come from here."""
        self._worker.end()
        self._engine.finalize()
        self._last_replies.clear()
        self._resolver.close()

    # One request

    def _serve(self, request: pb_utils.InferenceRequest, reply: Reply, silence: Silence, lease: RouterLease) -> None:
        try:
            inputs, parameters = inputs_of(request), parameters_of(request)
            rows = next(iter(inputs.values())).shape()[0] if self._batching else 1
            lease.enter(inputs, rows, parameters)
            reply.is_stream = self._is_stream(inputs)
            wanted = wanted_outputs(
                request.requested_output_names(), self._wire.needed_outputs, is_stream=reply.is_stream
            )
            outgoing = self._engine.request(request, parameters, wanted.of_engine, silence)
            beam_widths, sequence_counts = (values_of(inputs, name) for name in ("beam_width", "num_return_sequences"))
            for row, tensors in self._rows(inputs, rows, lease):
                if row and lease.names:
                    lease.row(row)
                name = lease.names[row or 0] if lease.names else None
                outputs = RowOutputs(
                    wanted,
                    pb_utils.Tensor,
                    row=row,
                    lora_name=name or "",
                    batching=self._batching,
                    beam_width=beam_widths[row or 0] if beam_widths else 1,
                    sequence_count=sequence_counts[row or 0] if sequence_counts else 1,
                )
                if not self._answer(outgoing([*tensors, *lease.naming(row)]), name, lease, outputs, reply):
                    return
            reply.succeed()
        except Exception as error:  # noqa: BLE001  any error must become the request's response
            reply.fail(error)

    def _is_stream(self, inputs: Inputs) -> bool:
        return self._decoupled and any(values_of(inputs, "streaming") or [])

    def _rows(
        self, inputs: Inputs, rows: int, lease: RouterLease
    ) -> Iterator[tuple[int | None, list[pb_utils.Tensor]]]:
        """(row, tensors) of each request to the engine.

        The rows of a batch go one by one if they name adapters or are streamed. Otherwise the batch goes as a whole,
        and its row is None.
        """
        tensors = [
            tensor for name, tensor in inputs.items() if name not in ("lora_name", self._wire.task_id, SPLIT_KEY)
        ]
        if rows == 1 or not (lease.names or self._is_stream(inputs)):
            yield None, tensors
            return
        if not self._decoupled:
            raise InvalidRequest("a batch of several rows for LoRA adapters needs a decoupled engine model")
        for row in range(rows):
            yield row, [pb_utils.Tensor(one.name(), one.as_numpy()[row : row + 1]) for one in tensors]

    def _answer(
        self,
        outgoing: Outgoing,
        lora_name: str | None,
        lease: RouterLease,
        outputs: RowOutputs[pb_utils.Tensor],
        reply: Reply,
    ) -> bool:
        """Pass on the engine's responses to one of its requests; False when the reply has ended with an error."""

        def lost() -> None:
            if reply.has_left():
                raise ClientLeft("the client has left")
            lease.lost()

        responses = forward(outgoing.send, lost, _error_text) if lora_name else outgoing.send()
        is_answered = has_left = False
        try:
            for response in responses:
                if reply.is_complete:
                    continue  # this thread was abandoned, and another one has completed the reply
                if reply.has_left():
                    if not has_left:
                        outgoing.cancel()
                    has_left = True
                elif error := error_of(response):
                    raise EngineError(error, lora_name)
                elif tensors := response.output_tensors():  # the last response may be the final flag alone
                    reply.send(outputs.of_response(tensors))
                    is_answered = True
        except Exception as error:  # noqa: BLE001  the stream must be read to its end after any error
            reply.fail(error)
            reply.complete()  # before the rest of the stream is read, so that the client need not wait for it
            deque(responses, maxlen=0)
            return False
        if has_left or reply.is_complete:
            raise ClientLeft("the client has left")
        if not is_answered:
            raise RequestError("the engine's model sent no response")
        for last in outputs.of_end():
            reply.send(last)
        return True


def _error_text(response: pb_utils.InferenceResponse) -> str | None:
    error = error_of(response)
    return error.message() if error else None
