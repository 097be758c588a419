# SPDX-FileCopyrightText: the tritonlora authors
# SPDX-License-Identifier: Apache-2.0
"""Asks a Triton server over gRPC: for configs, and for the responses to one request.

It uses the stubs of tritonclient. Its InferenceServerClient would copy each response into further Python objects.
"""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncGenerator, Callable, Mapping
from types import MappingProxyType, TracebackType
from typing import Any

import grpc
import numpy.typing as npt
from tritonclient.grpc import service_pb2 as pb
from tritonclient.grpc.service_pb2_grpc import GRPCInferenceServiceStub

_OPTIONS = [
    ("grpc.max_receive_message_length", -1),
    ("grpc.max_send_message_length", -1),
    ("grpc.use_local_subchannel_pool", 1),
    ("grpc.initial_reconnect_backoff_ms", 100),
    ("grpc.max_reconnect_backoff_ms", 1000),
    ("grpc.enable_http_proxy", 0),
]
ASK_SECONDS = 10.0


class ServerGone(Exception):
    """The server does not answer, or the connection to it broke."""


class ServerRefused(Exception):
    """The server answered with an error."""


class ServerSilent(Exception):
    """The server did not respond for too long, in the midst of a stream or before its first response."""


class TritonClient:
    """A connection to one server. Make it inside of the event loop that uses it."""

    def __init__(self, url: str) -> None:
        self.url = url
        self._channel = grpc.aio.insecure_channel(url, options=_OPTIONS)
        self._stub: Any = GRPCInferenceServiceStub(self._channel)
        self._readers: set[asyncio.Task[None]] = set()

    async def __aenter__(self) -> TritonClient:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        await self._channel.close()

    async def is_ready(self, model: str) -> bool:
        """Whether the server answers and the model is ready."""
        try:
            found = await self._stub.ModelReady(pb.ModelReadyRequest(name=model), timeout=ASK_SECONDS)
        except grpc.aio.AioRpcError:
            return False
        return bool(found.ready)

    async def config(self, model: str) -> Any:
        """A model's config as the server has it, a ModelConfig of protobuf."""
        return (await self._call(self._stub.ModelConfig, pb.ModelConfigRequest(name=model))).config

    async def models(self) -> list[str]:
        """The names of the models that are ready, sorted."""
        index = await self._call(self._stub.RepositoryIndex, pb.RepositoryIndexRequest(ready=True))
        return sorted({one.name for one in index.models})

    async def json_of(self, model: str, inputs: Mapping[str, npt.NDArray[Any]], output: str) -> Any:
        """The JSON in the only element of an output of a model that is not decoupled."""
        request = infer_request(model, "", inputs, [output])
        found = await self._call(self._stub.ModelInfer, request)
        return json.loads(found.raw_output_contents[0][4:])

    async def stream(
        self, request: Any, silence_seconds: float, headers: Mapping[str, str] = MappingProxyType({})
    ) -> AsyncGenerator[Any, None]:
        """The responses to a request, each a ModelInferResponse. Closing the iterator cancels the call.

        ServerSilent when `silence_seconds` pass without a response. Then the call is not cancelled, since Triton 2.51
        crashes now and then when many calls are: later responses are read, and dropped.
        """
        call = self._stub.ModelStreamInfer(metadata=tuple(headers.items()) or None)
        found: asyncio.Queue[Any] = asyncio.Queue()
        silence = _Silence(silence_seconds, lambda: found.put_nowait(ServerSilent()))
        reader = asyncio.create_task(
            _read(call, request, lambda one: None if silence.is_over else found.put_nowait(one))
        )
        self._readers.add(reader)
        reader.add_done_callback(self._readers.discard)
        try:
            while (received := await found.get()) is not None:
                silence.start_again()
                if isinstance(received, Exception):
                    raise received
                yield received
        finally:
            silence.close()
            if not silence.is_over:
                call.cancel()

    async def _call(self, method: Any, request: Any) -> Any:
        try:
            return await method(request, timeout=ASK_SECONDS)
        except grpc.aio.AioRpcError as error:
            raise _error_of(error.code(), error.details()) from None


async def _read(call: Any, request: Any, found: Callable[[Any], None]) -> None:
    """Send the request of a call, and read its responses. `found` gets each; at the end an exception, or None."""
    try:
        await call.write(request)
        await call.done_writing()
        while (received := await call.read()) is not grpc.aio.EOF:
            if received.error_message:
                found(ServerRefused(received.error_message))
            else:
                found(received.infer_response)
        code = await call.code()
        found(None if code is grpc.StatusCode.OK else _error_of(code, await call.details()))
    except grpc.aio.AioRpcError as error:
        found(_error_of(error.code(), error.details()))
    except asyncio.CancelledError:
        found(ServerGone("the call was cancelled"))


class _Silence:
    """Calls `end` when `seconds` have passed since the last `start_again`, which costs no timer of its own."""

    def __init__(self, seconds: float, end: Callable[[], object]) -> None:
        self._loop = asyncio.get_running_loop()
        self._seconds = seconds
        self._end = end
        self.start_again()
        self._timer = self._loop.call_at(self._due, self._look)
        self.is_over = False

    def start_again(self) -> None:
        self._due = self._loop.time() + self._seconds

    def close(self) -> None:
        self._timer.cancel()

    def _look(self) -> None:
        if self._loop.time() < self._due:
            self._timer = self._loop.call_at(self._due, self._look)
        else:
            self.is_over = True
            self._end()


_GONE = (grpc.StatusCode.UNAVAILABLE, grpc.StatusCode.DEADLINE_EXCEEDED, grpc.StatusCode.CANCELLED)


def _error_of(code: grpc.StatusCode, details: str | None) -> Exception:
    return ServerGone(details or code.name) if code in _GONE else ServerRefused(details or code.name)


_DATATYPES = {"i4": "INT32", "i8": "INT64", "u8": "UINT64", "u4": "UINT32", "f4": "FP32", "b1": "BOOL"}


def infer_request(model: str, request_id: str, inputs: Mapping[str, npt.NDArray[Any]], outputs: list[str]) -> Any:
    """A ModelInferRequest. Arrays of objects hold bytes, and become BYTES tensors."""
    request = pb.ModelInferRequest(model_name=model, id=request_id)
    for name, array in inputs.items():
        datatype = _DATATYPES.get(array.dtype.str[1:], "BYTES")
        request.inputs.add(name=name, datatype=datatype, shape=array.shape)
        request.raw_input_contents.append(_bytes_of(array) if datatype == "BYTES" else array.tobytes())
    for name in outputs:
        request.outputs.add(name=name)
    return request


def _bytes_of(array: npt.NDArray[Any]) -> bytes:
    return b"".join(len(one).to_bytes(4, "little") + one for one in array.reshape(-1).tolist())


def outputs_of(response: Any) -> dict[str, bytes]:
    """The outputs of a ModelInferResponse by name, as they are on the wire."""
    return {spec.name: raw for spec, raw in zip(response.outputs, response.raw_output_contents, strict=False)}


def int32s(raw: bytes) -> list[int]:
    """The elements of an INT32 tensor."""
    return memoryview(raw).cast("i").tolist()


def float32s(raw: bytes) -> list[float]:
    """The elements of an FP32 tensor."""
    return [float(value) for value in memoryview(raw).cast("f")]


def text(raw: bytes) -> str:
    """The elements of a BYTES tensor, joined."""
    texts, place = [], 0
    while place < len(raw):
        size = int.from_bytes(raw[place : place + 4], "little")
        texts.append(raw[place + 4 : place + 4 + size].decode(errors="replace"))
        place += 4 + size
    return "".join(texts)
