# SPDX-FileCopyrightText: the tritonlora authors
# SPDX-License-Identifier: Apache-2.0
"""Every way of asking a tritonserver: one question, in each of Triton's protocols, for text or for tokens.

What an answer says is the same in all of them; only the status of an error is in the protocol's own terms.
"""

from __future__ import annotations

import http.client
import json
import queue
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import tritonclient.grpc as triton_grpc
import tritonclient.http as triton_http
from tritonclient.utils import InferenceServerException, np_to_triton_dtype

from tritonlora.launch.server import Server

PROMPT = "hello"
OUTPUTS = ("text_output", "output_ids", "batch_index")  # those that are read
TIMEOUT = 60.0

Tensors = Mapping[str, npt.NDArray[Any]]


@dataclass(frozen=True, slots=True)
class Question:
    """A request about PROMPT, with a row for each element of `tokens`: how many are wanted."""

    lora_name: Sequence[bytes] | None = None
    lora_task_id: Sequence[int] | None = None
    lora_split_key: Sequence[bytes] | None = None
    tokens: Sequence[int] = (12,)


@dataclass(frozen=True, slots=True)
class Refusal:
    """An error. `status` is None where the protocol has none, as in gRPC streaming."""

    status: str | None
    message: str


# Models: the tensors that ask a question, and the text of an answer


@dataclass(frozen=True, slots=True)
class Interface:
    """How a model is asked. `error_prefix` is what Triton puts before the error of a step of an ensemble."""

    model: str
    tensors: Callable[[Question, bool], Tensors]  # (question, whether to stream) -> inputs
    text: Callable[[Tensors], bytes]
    error_prefix: str = ""


def tokens_in(question: Question, streams: bool = False) -> Tensors:
    """For the engine's model, and the router."""
    rows = len(question.tokens)
    return {
        "input_ids": np.array([list(PROMPT.encode())] * rows, np.int32),
        "input_lengths": _column([len(PROMPT)] * rows, np.int32),
        "request_output_len": _column(question.tokens, np.int32),
        "streaming": _column([streams] * rows, np.bool_),
        **_adapters(question),
    }


def text_in(question: Question, streams: bool = False) -> Tensors:
    """For an ensemble."""
    rows = len(question.tokens)
    return {
        "text_input": _column([PROMPT.encode()] * rows, np.object_),
        "max_tokens": _column(question.tokens, np.int32),
        "stream": _column([streams] * rows, np.bool_),
        **_adapters(question),
    }


def tokens_out(outputs: Tensors) -> bytes:
    """In the shipped repository a token is a byte."""
    return bytes(outputs["output_ids"].reshape(-1).tolist())


def text_out(outputs: Tensors) -> bytes:
    """Of an ensemble."""
    return b"".join(outputs["text_output"].reshape(-1).tolist())


def _adapters(question: Question) -> Tensors:
    given = {
        "lora_name": (question.lora_name, np.object_),
        "lora_task_id": (question.lora_task_id, np.uint64),
        "lora_split_key": (question.lora_split_key, np.object_),
    }
    return {name: _column(values, dtype) for name, (values, dtype) in given.items() if values is not None}


def _column(values: Sequence[Any], dtype: type) -> npt.NDArray[Any]:
    return np.array(values, dtype).reshape(-1, 1)


def ensemble(name: str) -> Interface:
    """The interface of an ensemble of upstream's."""
    return Interface(name, text_in, text_out, f"in ensemble {name!r}, ")


ENGINE = Interface("tensorrt_llm", tokens_in, tokens_out)
ROUTER = Interface("lora_router", tokens_in, tokens_out)
ENSEMBLE = ensemble("ensemble")
TOKENS = Interface("lora_tokens", tokens_in, tokens_out, "in ensemble 'lora_tokens', ")


# Protocols: (server, model, inputs) -> the outputs of each answer; errors are InferenceServerException


@dataclass(frozen=True, slots=True)
class Protocol:
    """`streams`: gives any number of answers. `statuses`: by the name of the error in `pb_utils.TritonError`."""

    send: Callable[[Server, str, Tensors], Iterator[Tensors]]
    streams: bool
    statuses: Mapping[str, str | None]


def generate(server: Server, model: str, inputs: Tensors) -> Iterator[Tensors]:
    """Triton's generate extension: JSON, one answer."""
    yield _from_json(_post(server, f"/v2/models/{model}/generate", inputs))


def generate_stream(server: Server, model: str, inputs: Tensors) -> Iterator[Tensors]:
    """The same with an event for each answer."""
    for line in _post(server, f"/v2/models/{model}/generate_stream", inputs).splitlines():
        if line.startswith(b"data:"):
            yield _from_json(line)


def http_infer(server: Server, model: str, inputs: Tensors) -> Iterator[Tensors]:
    """One answer, in binary."""
    with triton_http.InferenceServerClient(server.http_url, network_timeout=TIMEOUT) as connection:
        yield _outputs(connection.infer(model, _inputs(triton_http.InferInput, inputs)))


def grpc_infer(server: Server, model: str, inputs: Tensors) -> Iterator[Tensors]:
    """One answer."""
    with triton_grpc.InferenceServerClient(server.grpc_url) as connection:
        yield _outputs(connection.infer(model, grpc_inputs(inputs), client_timeout=TIMEOUT))


def grpc_stream(server: Server, model: str, inputs: Tensors, **options: Any) -> Iterator[Tensors]:
    """Any number of answers, to a request with these options of the client."""
    results: queue.SimpleQueue[tuple[Any, Any]] = queue.SimpleQueue()
    with triton_grpc.InferenceServerClient(server.grpc_url) as connection:
        connection.start_stream(lambda result, error: results.put((result, error)))
        connection.async_stream_infer(model, grpc_inputs(inputs), enable_empty_final_response=True, **options)
        while True:
            result, error = results.get(timeout=TIMEOUT)
            if error is not None:
                raise error
            response = result.get_response()
            if response.outputs:
                yield {output.name: result.as_numpy(output.name) for output in response.outputs}
            if response.parameters["triton_final_response"].bool_param:
                return


def grpc_inputs(inputs: Tensors) -> list[Any]:
    """As tritonclient's gRPC client takes them."""
    return _inputs(triton_grpc.InferInput, inputs)


def _inputs(kind: Callable[..., Any], inputs: Tensors) -> list[Any]:
    tensors = [kind(name, list(array.shape), np_to_triton_dtype(array.dtype)) for name, array in inputs.items()]
    for tensor, array in zip(tensors, inputs.values(), strict=True):
        tensor.set_data_from_numpy(array)
    return tensors


def _outputs(result: Any) -> Tensors:
    return {name: array for name in OUTPUTS if (array := result.as_numpy(name)) is not None}


def _post(server: Server, path: str, inputs: Tensors) -> bytes:
    """The answer to a JSON object, with a list for a tensor of several elements. Texts may be no UTF-8."""
    values = {name: array.reshape(-1).tolist() if array.size > 1 else array.item() for name, array in inputs.items()}
    body = json.dumps(values, default=lambda text: text.decode(errors="surrogateescape"), ensure_ascii=False)
    connection = http.client.HTTPConnection(server.http_url, timeout=TIMEOUT)
    try:
        connection.request("POST", path, body.encode(errors="surrogateescape"))
        response = connection.getresponse()
        answer = response.read()
    finally:
        connection.close()
    if response.status != 200:
        raise InferenceServerException(_json(answer)["error"], str(response.status))
    return answer


def _from_json(answer: bytes) -> Tensors:
    outputs = _json(answer)
    if "error" in outputs:
        raise InferenceServerException(outputs["error"], "200")
    return {
        name: np.array(value.encode() if isinstance(value, str) else value, object if name == "text_output" else int)
        for name, value in outputs.items()
        if name in OUTPUTS
    }


def _json(answer: bytes) -> dict[str, Any]:
    found: dict[str, Any] = json.loads(answer.removeprefix(b"data:"))
    return found


ERRORS = ("NOT_FOUND", "INVALID_ARG", "UNAVAILABLE", "INTERNAL")
HTTP_STATUSES = {"NOT_FOUND": "404", "INVALID_ARG": "400", "UNAVAILABLE": "503", "INTERNAL": "500"}
GRPC_STATUSES = {code: f"StatusCode.{code}" for code in ERRORS} | {"INVALID_ARG": "StatusCode.INVALID_ARGUMENT"}
BAD_REQUEST = dict.fromkeys(ERRORS, "400")

PROTOCOLS = {
    "generate": Protocol(generate, False, BAD_REQUEST),
    "generate_stream": Protocol(generate_stream, True, BAD_REQUEST),
    "http_infer": Protocol(http_infer, False, HTTP_STATUSES),
    "grpc_infer": Protocol(grpc_infer, False, GRPC_STATUSES),
    "grpc_stream": Protocol(grpc_stream, True, dict.fromkeys(ERRORS)),
}


# Ways


@dataclass(frozen=True, slots=True)
class Way:
    """A model, asked in a protocol."""

    protocol: str
    interface: Interface
    streams: bool  # the tokens one by one, if the engine's model is decoupled and the protocol can

    def ask(self, server: Server, question: Question) -> tuple[str, ...] | Refusal:
        """The text of each row, or the error."""
        rows: dict[int, bytes] = {}
        inputs = self.interface.tensors(question, self.streams)
        try:
            for outputs in PROTOCOLS[self.protocol].send(server, self.interface.model, inputs):
                row = int(outputs["batch_index"].item()) if "batch_index" in outputs else 0
                rows[row] = rows.get(row, b"") + self.interface.text(outputs)
        except InferenceServerException as error:
            return Refusal(error.status(), error.message())
        return tuple(rows[row].decode() for row in sorted(rows))

    def refusal(self, code: str, message: str) -> Refusal:
        """How an error of the model, or of an ensemble's step, comes back."""
        return Refusal(PROTOCOLS[self.protocol].statuses[code], self.interface.error_prefix + message)


def ways(interfaces: Sequence[Interface], *, decoupled: bool) -> list[Way]:
    """Each of the interfaces in each protocol."""
    return [
        Way(name, interface, streams=decoupled and protocol.streams)
        for interface in interfaces
        for name, protocol in PROTOCOLS.items()
    ]
