# SPDX-FileCopyrightText: the tritonlora authors
# SPDX-License-Identifier: Apache-2.0
"""The router: forwards each request to the engine's model, for the adapter that it names.

This module translates between Triton and `routing` and `forwarding`, which decide.

An instance answers one request at a time, from its first token to its last; Triton runs as many instances, a process
each, as there can be streams (`instance_group` in config.pbtxt). A thread for each would be cheaper, and is a trap: two
decoupled BLS requests at a time in one process deadlock sooner or later. `ResponseIterator::Next` waits for the GIL
while it has the iterator's mutex, the thread that delivers answers for that mutex while it has the mutex of the table
of iterators, and `Stub::GetResponseIterator` for the latter while it has the GIL (python_backend src/pb_stub.cc, seen
with 2.51, and the same in its main branch of July 2026).

The one thread that answers is left behind when an engine falls silent in mid-stream. Triton before 25.04 makes it so:
it loses an error that is not the first answer to a BLS request, and the end of the stream with it
(src/infer_response.cc, SaveToSharedMemory, does not say whose it is).
"""

from __future__ import annotations

import functools
import gc
import itertools
import json
import secrets
import threading
import time
import traceback
from collections import deque
from collections.abc import Callable, Collection, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import triton_python_backend_utils as pb_utils

from .abandonable import Silence, Worker
from .adapter_tensors import DIGESTS, AdapterFiles
from .counters import BASE, OUTCOMES, STATISTICS, Statistics
from .engine_errors import is_unavailable, public
from .errors import ClientLeft, EngineSilent, InvalidRequest, RequestError
from .forwarding import Forwarder
from .parameters import check_parameters, parameters_of
from .residency import Residency, open_inside, take_part
from .response_cache import check_config
from .routing import Route, check_id, resolve_rows
from .stream_state import SequenceState, WholeTexts
from .table_file import TableFile
from .triton import Inputs, inputs_of, new_kept_weights, parameters_in, values_of
from .wire import wire_of

TOKENS = ("output_ids", "sequence_length")
NO_TOKENS = (np.zeros((1, 1, 0), np.int32), np.zeros((1, 1), np.int32))
# Outputs that say whose the tokens are and how likely they were. The end of a sequence repeats them.
REPEATED = ("batch_index", "sequence_index", "cum_log_probs", "output_log_probs")
FINAL = pb_utils.TRITONSERVER_RESPONSE_COMPLETE_FINAL
FAILED = "the router failed on this request; the server's log says why"
OWN_OUTPUTS = {"previous_ids", "all_outputs", "text_diff"}
# Between two looks the server must have left what it shares with this process for the last one (python_backend
# src/python_be.cc, ProcessIsRequestCancelled), which the next look, or letting go of the request, frees.
LOOK_SECONDS = 0.1
MOST_NAMED = 256  # adapters whose naming tensors are kept, of a few hundred bytes each


class TritonPythonModel:
    """One instance of the router."""

    def initialize(self, args: dict[str, str]) -> None:
        """Read the adapter table; the model does not load when there is no good one."""
        config = json.loads(args["model_config"])
        check_config(config)
        parameters = parameters_in(config)
        directory = Path(args["model_repository"])
        self._target = parameters["target"]
        self._batching = config["max_batch_size"] > 0
        inputs = [one["name"] for one in config["input"]]
        self._wire = wire_of(inputs)
        self._stop = self._wire.stop if self._wire.stop in inputs else ""
        self._own_ids = itertools.count(secrets.randbits(62))
        self._routing_inputs = ("lora_name", self._wire.task_id)
        self._engine_outputs = {output["name"] for output in config["output"]} - OWN_OUTPUTS
        self._decoupled = pb_utils.using_decoupled_model_transaction_policy(config)
        self._name = args["model_name"]
        self._cache_pages = int(parameters.get("cache_pages", "0"))
        self._timeouts = {
            "cache_full_timeout": float(parameters["cache_full_timeout_seconds"]),
            "load_timeout": float(parameters["load_timeout_seconds"]),
        }
        self._table = TableFile(directory / "adapters.json", lambda _: None)  # what is wrong is said below, once
        self._residency = self._take_part()
        shared = self._residency.descriptor
        self._statistics = Statistics(open_inside(shared, STATISTICS))
        self._files = AdapterFiles(directory.parent, open_inside(shared, DIGESTS))
        self._kept = new_kept_weights()
        self._table = TableFile(directory / "adapters.json", self._table_failed)
        self._seen_table = self._table.table()
        self._forwarder = self._new_forwarder()
        self._patience = (
            float(parameters.get("first_answer_timeout_seconds", "3600")),
            float(parameters.get("stall_timeout_seconds", "300")),
        )
        self._worker = Worker()
        # The stub forgets a stream in a thread of its own. If nobody else held it by then, that thread would wait for
        # the GIL with the mutex that the next request needs while it holds the GIL.
        self._last_streams: deque[Any] = deque(maxlen=4)
        self._last_replies: deque[Reply] = deque(maxlen=4)
        self._naming_tensors: dict[int, list[pb_utils.Tensor]] = {}  # by lora_task_id
        gc.freeze()  # a full collection, which comes in the midst of an answer, takes 70 ms with all that is there now

    def execute(self, requests: list[pb_utils.InferenceRequest]) -> None:
        """Answer the requests, one after the other."""
        for request in requests:
            inputs = inputs_of(request)
            reply = Reply(request, inputs, self._decoupled, self._wire.needed_outputs)
            silence = Silence(*self._patience)
            serve = functools.partial(self._serve, request, inputs, reply, silence)
            is_done = self._worker.do(serve, silence.is_too_long)
            if not is_done:
                reply.fail(EngineSilent(f"the engine's model has sent nothing for {silence.seconds():.3g} s"))
            self._count(reply.names, "running", -1)
            self._count(reply.names or [BASE], reply.outcome)
            reply.complete()
            self._last_replies.append(reply)
            if not is_done:
                self._leave_behind()

    def finalize(self) -> None:
        """Leave what the instances share."""
        self._worker.end()
        self._last_streams.clear()  # an iterator that outlives this call crashes the stub
        self._last_replies.clear()
        self._residency.close()

    def _leave_behind(self) -> None:
        """What the request holds that was left behind goes free; should it go on, it has what it shares to itself."""
        self._kept = new_kept_weights()
        behind = self._residency
        self._residency = self._take_part()
        self._forwarder = self._new_forwarder()
        behind.abandon()

    def _take_part(self) -> Residency:
        return take_part(self._name, self._table.table(), self._cache_pages)

    def _new_forwarder(self) -> Forwarder[pb_utils.InferenceResponse]:
        return Forwarder(self._residency, error_text, on_load=self._loaded, **self._timeouts)

    def _serve(self, request: pb_utils.InferenceRequest, inputs: Inputs, reply: Reply, silence: Silence) -> None:
        """Answer one request."""
        try:
            parameters = parameters_of(request)
            routes = self._routes(inputs, parameters)
            reply.names = [route.lora_name if route else BASE for route in routes]
            self._count(reply.names, "running")
            self._answer(request, inputs, reply, silence, routes, parameters)
        except Exception as error:  # noqa: BLE001  whatever it is, this request must be answered
            reply.fail(error)

    def _routes(self, inputs: Inputs, parameters: dict[str, Any]) -> list[Route | None]:
        """The adapter of each row."""
        table = self._table.table()
        if table is not self._seen_table:
            self._seen_table = table
            self._naming_tensors.clear()
            self._statistics.add(BASE, "table_reloads")
        if parameters:
            check_parameters(table, parameters)
        lora_names, lora_task_ids = (values_of(inputs, name) for name in self._routing_inputs)
        rows = next(iter(inputs.values())).shape()[0] if self._batching else 1
        return resolve_rows(table, lora_names, lora_task_ids, rows)

    def _answer(
        self,
        request: pb_utils.InferenceRequest,
        inputs: Inputs,
        reply: Reply,
        silence: Silence,
        routes: list[Route | None],
        parameters: dict[str, Any],
    ) -> None:
        """Answer one request, row by row where its rows are streams of their own."""
        tensors = [tensor for name, tensor in inputs.items() if name not in self._routing_inputs]
        split = len(routes) > 1 and (any(routes) or reply.is_stream)
        if split and not self._decoupled:
            raise InvalidRequest("a batch of several rows for LoRA adapters needs a decoupled engine model")
        for row in range(len(routes) if split else 1):
            if split:
                reply.begin_row(row)
            of_row = row_of(tensors, row) if split else tensors
            # Only a request that no other one shares its id with can be stopped. Old engines want numbers.
            own_id = str(next(self._own_ids)) if self._stop and not request.request_id() else ""
            forwarded = functools.partial(
                pb_utils.InferenceRequest,
                model_name=self._target,
                requested_output_names=sorted(self._engine_outputs & reply.asked),
                request_id=request.request_id() or own_id,
                correlation_id=request.correlation_id(),
                timeout=request.timeout(),
                parameters=carried(parameters) or None,  # which saves Triton's stub from writing JSON
                trace=request.trace(),
            )
            send = functools.partial(self._send, silence, forwarded, of_row, routes[row])
            answers = self._forwarder.forward(routes[row], send, reply.has_left)
            try:
                for answer in answers:
                    if reply.is_complete:
                        continue  # left behind; nothing more is said or sent
                    had_left = reply.left
                    if reply.has_left():
                        if not had_left:
                            self._cancel(forwarded if own_id else None, of_row)
                        continue
                    if error := engine_error(answer):
                        raise EngineError(error, routes[row])
                    if outputs := answer.output_tensors():  # the last one may be nothing but a flag
                        reply.send(outputs)
            except Exception as error:  # noqa: BLE001  nor is a stream left when something is wrong
                reply.fail(error)
                reply.complete()  # nobody has to wait for what is still taken
                deque(answers, maxlen=0)
                return
            if reply.left or reply.is_complete:
                raise ClientLeft("the client has left")
            if not reply.answered:
                raise RequestError("the engine's model sent no answer")
            reply.end_row()
        reply.outcome = "OK"

    def _send(
        self,
        silence: Silence,
        forwarded: Callable[..., pb_utils.InferenceRequest],
        tensors: list[pb_utils.Tensor],
        route: Route | None,
        attach: bool,
    ) -> Iterator[pb_utils.InferenceResponse]:
        """Send the request, which `forwarded` makes of its inputs, to the engine's model, and give its answers."""
        kept = self._kept  # this request's, also if it is left behind
        if route:
            tensors = [*tensors, *self._tensors_naming(route)]
        if route and not self._wire.sends_weights:
            check_id(route, self._residency.gives)  # the engine reads it whenever it needs to
        elif route and attach:
            weights, config = kept.tensor(self._files.weights(route)), self._files.config(route)
            check_id(route, self._residency.gives)
            tensors += [weights, pb_utils.Tensor("lora_config", config)]
        request = forwarded(inputs=tensors)
        silence.asked()
        answers = self._stream(request) if self._decoupled else iter([request.exec()])
        kept.sent()
        for answer in answers:
            silence.heard()
            yield answer
        silence.ended()

    def _tensors_naming(self, route: Route) -> list[pb_utils.Tensor]:
        """What tells the engine which adapter it is. Kept: a tensor that was sent is in shared memory the next time."""
        found = self._naming_tensors.get(route.entry.lora_task_id)
        if found is None:
            values = self._wire.naming_inputs(self._files.repository, route)
            found = [pb_utils.Tensor(name, value) for name, value in values.items()]
            if len(self._naming_tensors) == MOST_NAMED:
                self._naming_tensors.clear()
            self._naming_tensors[route.entry.lora_task_id] = found
        return found

    def _stream(self, request: pb_utils.InferenceRequest) -> Iterator[pb_utils.InferenceResponse]:
        answers = request.exec(decoupled=True)
        self._last_streams.append(answers)
        return answers

    def _cancel(
        self, forwarded: Callable[..., pb_utils.InferenceRequest] | None, tensors: list[pb_utils.Tensor]
    ) -> None:
        """End the stream that is being read: Triton from 25.04 on can cancel it; before that the engine is asked to
        stop it, by the same request with its stop input, unless that is None. It is read to its end all the same.

        There is no leaving it: when the model is unloaded, the stub cuts off the streams that have not ended (seen with
        2.51; pb_stub.cc, PYTHONSTUB_FinalizeRequest). Then reading them, or letting go of them, blocks for ever, and
        what the engine still answers would go to an instance that the server has deleted.
        """
        if not self._decoupled:
            return
        cancel = getattr(self._last_streams[-1], "cancel", None)
        if cancel:
            cancel()
        elif forwarded:
            rows = [tensors[0].shape()[0]] if self._batching else []
            stop = pb_utils.Tensor(self._stop, np.ones((*rows, 1), np.bool_))
            others = [tensor for tensor in tensors if tensor.name() != self._stop]
            deque(self._stream(forwarded(inputs=[*others, stop])), maxlen=0)

    def _count(self, names: list[str], column: str, amount: float = 1) -> None:
        for name in names:
            self._statistics.add(name, column, amount)

    def _loaded(self, route: Route, reason: str, seconds: float) -> None:
        self._statistics.add(route.lora_name, reason)
        self._statistics.add(route.lora_name, "load_seconds", seconds)

    def _table_failed(self, problem: str) -> None:
        pb_utils.Logger.log_error(problem)
        self._statistics.add(BASE, "table_failures")


class EngineError(Exception):
    """An error that the engine answered, in words fit for the client."""

    def __init__(self, error: pb_utils.TritonError, route: Route | None) -> None:
        adapter = f"LoRA adapter {route.lora_name!r}: " if route else ""
        super().__init__(adapter + public(error.message()))
        self.code = "UNAVAILABLE" if is_unavailable(error.message()) else name_of(error.code())


class Reply:
    """The answer to one request: what its rows send, and the final flag."""

    def __init__(
        self, request: pb_utils.InferenceRequest, inputs: Inputs, decoupled: bool, needed_outputs: Collection[str]
    ) -> None:
        """`needed_outputs`: those that the engine is asked for although the client may not want them."""
        self._sender = request.get_response_sender()
        self._sending = threading.Lock()  # between the worker, and who has left it behind
        self.is_complete = False  # for who is left behind: nobody hears it any more
        self._decoupled = decoupled
        self.is_stream = decoupled and any(values_of(inputs, "streaming") or [])
        self._beam_widths = values_of(inputs, "beam_width")
        self._sequence_counts = values_of(inputs, "num_return_sequences")
        self.wanted = frozenset(request.requested_output_names())
        # A third tensor in each answer takes a fifth of the tokens per second: the router's own are for who names them.
        named = () if "all_outputs" in self.wanted else self.wanted
        self._detokenised = self.is_stream and "previous_ids" in named
        self._differences = "text_diff" in named
        self.asked = self.wanted.union(needed_outputs, ["sequence_index"] if self._detokenised else [])
        self.names: list[str] = []  # of its rows' adapters
        self._error: pb_utils.TritonError | None = None
        self._has_sent = False
        self.outcome = "INTERNAL"  # until something better is known
        self.left = False  # the client, as far as has been looked
        self._next_look = time.monotonic() + LOOK_SECONDS
        self.begin_row(None)

    def has_left(self) -> bool:
        """Whether the client has gone away, or its time is up; looked at now and then, as asking takes 0.2 ms.

        Triton says so of requests that clients send to the router itself. Of a step of an ensemble it never does: it
        cancels the steps that an ensemble begins later (core, src/ensemble_scheduler, main branch of June 2026).
        """
        now = time.monotonic()
        if not self.left and now >= self._next_look:
            self._next_look = now + LOOK_SECONDS
            with self._sending:  # asked of a request that is complete, Triton would crash
                self.left = self.is_complete or self._sender.is_cancelled()
        return self.left

    def begin_row(self, row: int | None) -> None:
        """What follows is of this row of a batch that is split; None when it is not."""
        self._row = row
        self._has_unwanted = row is not None or not self.wanted.issuperset(self.asked)  # batch_index is one
        self._sequences: dict[int, SequenceState[pb_utils.Tensor]] = {}  # by sequence_index
        self._texts = WholeTexts()
        self.answered = False  # the row

    def send(self, tensors: list[pb_utils.Tensor]) -> None:
        """Pass on one response of the engine: the outputs that the client asked for."""
        if self._row is not None:  # the engine has seen a batch of one
            tensors = [tensor for tensor in tensors if tensor.name() != "batch_index"]
            tensors.append(pb_utils.Tensor("batch_index", np.array([[self._row]], np.int32)))
        if self._detokenised:
            tensors = [*tensors, *self._previous_ids({tensor.name(): tensor for tensor in tensors})]
        if self._differences:
            texts = tensor_of(tensors, "text_output").as_numpy()
            diffs = self._texts.new(texts.reshape(-1).tolist())
            tensors = [*tensors, pb_utils.Tensor("text_diff", np.array(diffs, np.object_).reshape(texts.shape))]
        self._send_wanted(tensors)

    def _previous_ids(self, tensors: Inputs) -> list[pb_utils.Tensor]:
        """The tokens that were sent before this response's, for the detokeniser: one tensor, or none with beams.

        Without new tokens previous_ids mean the end of a sequence, which no response of the engine means.
        """
        output_ids, sequence_length = (tensors[name].as_numpy() for name in TOKENS)
        if max(self._of_row(self._beam_widths), output_ids.shape[1]) > 1:
            return []
        index = 0
        if "sequence_index" in tensors:
            index = tensors["sequence_index"].as_numpy().item()
        elif (count := self._of_row(self._sequence_counts)) > 1:
            raise InvalidRequest(
                f"num_return_sequences is {count}, and the engine's responses have no sequence_index, which says whose "
                "tokens they are; do not stream, or ask for one sequence"
            )
        sequence = self._sequences.setdefault(index, SequenceState())
        sequence.repeated = [tensors[name] for name in REPEATED if name in tensors]
        before, new = sequence.previous_ids.ids(), output_ids[0, 0, : sequence_length[0, 0]]
        sequence.previous_ids.add(new)
        return [pb_utils.Tensor("previous_ids", before)] if new.size else []

    def end_row(self) -> None:
        """Tell the detokeniser, which holds back a character that is not complete, that no more tokens come."""
        for _, sequence in sorted(self._sequences.items()):
            tensors = [pb_utils.Tensor(name, array) for name, array in zip(TOKENS, NO_TOKENS, strict=True)]
            previous_ids = pb_utils.Tensor("previous_ids", sequence.previous_ids.ids())
            self._send_wanted([*tensors, *sequence.repeated, previous_ids])
        self._sequences.clear()  # and the engine's tensors in it

    def _of_row(self, values: list[int] | None) -> int:
        return values[self._row or 0] if values else 1

    def _send_wanted(self, tensors: list[pb_utils.Tensor]) -> None:
        if self._has_unwanted:
            tensors = [tensor for tensor in tensors if tensor.name() in self.wanted]
        self._respond(pb_utils.InferenceResponse(tensors))

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
        self.outcome = code

    def complete(self) -> None:
        """Send the error, if there is one, and the final flag. Nothing that is left to say is heard any more.

        Both at once: an ensemble that gets the flag after an error is under way for ever, and the server waits for it
        when it is stopped. But not where something was sent before: a BLS client would lose both (Triton 2.51).
        """
        with self._sending:
            if self.is_complete:
                return
            self.is_complete = True
            if self.outcome != "OK" and not self._error:  # whatever went wrong, nobody takes it for an answer
                self._error = pb_utils.TritonError(FAILED)
            if not self._has_sent:
                self._sender.send(pb_utils.InferenceResponse(error=self._error), flags=FINAL)
            elif self._decoupled:
                if self._error:
                    self._sender.send(pb_utils.InferenceResponse(error=self._error))
                self._sender.send(flags=FINAL)

    def _respond(self, response: pb_utils.InferenceResponse) -> None:
        with self._sending:
            if self.is_complete:
                return
            if self._decoupled:
                self._sender.send(response)
            else:
                self._sender.send(response, flags=FINAL)
            self.answered = self._has_sent = True


def engine_error(answer: pb_utils.InferenceResponse) -> pb_utils.TritonError | None:
    """The error in an answer of the engine."""
    return answer.error() if answer.has_error() else None


def error_text(answer: pb_utils.InferenceResponse) -> str | None:
    """The text of the error in an answer of the engine."""
    error = engine_error(answer)
    return error.message() if error else None


def name_of(code: object) -> str:
    """The name of a Triton error code."""
    names = (name for name in OUTCOMES if getattr(pb_utils.TritonError, name, None) == code)
    return next(names, "INTERNAL")


def carried(parameters: dict[str, Any]) -> dict[str, Any]:
    """Those that a BLS request can have: Triton 2.51 has no floating-point numbers, and 64 bits for whole ones."""
    return {key: value for key, value in parameters.items() if _is_carried(value)}


def _is_carried(value: object) -> bool:
    if isinstance(value, float):
        return _takes_floats()
    return not isinstance(value, int) or -(1 << 63) <= value < 1 << 63


@functools.cache
def _takes_floats() -> bool:
    try:
        pb_utils.InferenceRequest(model_name="", inputs=[], requested_output_names=[], parameters={"float": 0.5})  # type: ignore[dict-item]
    except Exception:  # noqa: BLE001  which one differs between versions
        return False
    return True


def tensor_of(tensors: list[pb_utils.Tensor], name: str) -> pb_utils.Tensor:
    """The tensor of that name."""
    return next(tensor for tensor in tensors if tensor.name() == name)


def row_of(inputs: list[pb_utils.Tensor], row: int) -> list[pb_utils.Tensor]:
    """One row of every input, as a batch of one."""
    return [pb_utils.Tensor(tensor.name(), tensor.as_numpy()[row : row + 1]) for tensor in inputs]
