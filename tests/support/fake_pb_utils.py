# SPDX-FileCopyrightText: the tritonlora authors
# SPDX-License-Identifier: Apache-2.0
"""A strict stand-in for `triton_python_backend_utils`, so that a model can be tested without a server.

`module()` gives the stand-in, with nothing in it that the real module lacks; tests/server/test_pb_utils_surface.py
compares the two inside a real server: names, signatures, and what happens at a list of calls. What would end the real
process raises AssertionError here.

The rest of this file is the other side, which a model cannot see: `Client` sends requests and gets the responses,
`serve` puts up a model that BLS requests reach.
"""

from __future__ import annotations

import enum
import importlib
import json
import sys
import threading
from collections.abc import Awaitable, Callable, Iterable, Iterator
from types import ModuleType
from typing import Any, ClassVar

import numpy as np
import numpy.typing as npt
import pytest
import torch

TRITONSERVER_RESPONSE_COMPLETE_FINAL = 1

NAMES = (
    "InferenceRequest",
    "InferenceResponse",
    "Logger",
    "TRITONSERVER_RESPONSE_COMPLETE_FINAL",
    "Tensor",
    "TritonError",
    "TritonModelException",
    "get_input_tensor_by_name",
    "get_output_tensor_by_name",
    "is_model_ready",
    "load_model",
    "triton_string_to_numpy",
    "using_decoupled_model_transaction_policy",
)


def module() -> ModuleType:
    """What `import triton_python_backend_utils` gives: put it into `sys.modules` under that name."""
    stand_in = ModuleType("triton_python_backend_utils")
    for name in NAMES:
        setattr(stand_in, name, getattr(sys.modules[__name__], name))
    return stand_in


# What a model sees


class TritonModelException(Exception):
    """Raised by Triton's own functions."""


def _require(fits: bool, function: str) -> None:
    """Refuse arguments as the real module does, which checks the type of each."""
    if not fits:
        kind = "constructor" if function == "__init__" else "function"
        raise TypeError(f"{function}(): incompatible {kind} arguments.")


class _ErrorCode(enum.IntEnum):
    UNKNOWN = 0
    INTERNAL = 1
    NOT_FOUND = 2
    INVALID_ARG = 3
    UNAVAILABLE = 4
    UNSUPPORTED = 5
    ALREADY_EXISTS = 6
    CANCELLED = 7


class TritonError:
    """An error, to be put into a response."""

    __slots__ = ("_code", "_message")

    UNKNOWN: ClassVar = _ErrorCode.UNKNOWN
    INTERNAL: ClassVar = _ErrorCode.INTERNAL
    NOT_FOUND: ClassVar = _ErrorCode.NOT_FOUND
    INVALID_ARG: ClassVar = _ErrorCode.INVALID_ARG
    UNAVAILABLE: ClassVar = _ErrorCode.UNAVAILABLE
    UNSUPPORTED: ClassVar = _ErrorCode.UNSUPPORTED
    ALREADY_EXISTS: ClassVar = _ErrorCode.ALREADY_EXISTS
    CANCELLED: ClassVar = _ErrorCode.CANCELLED

    def __init__(self, message: str, code: _ErrorCode = _ErrorCode.INTERNAL) -> None:
        _require(isinstance(message, str) and isinstance(code, _ErrorCode), "__init__")
        self._message = message
        self._code = code

    def code(self) -> _ErrorCode:
        return self._code

    def message(self) -> str:
        return self._message


_NUMPY_DTYPES = frozenset(
    np.dtype(name) for name in ("bool", "u1", "u2", "u4", "u8", "i1", "i2", "i4", "i8", "f2", "f4", "f8", "O")
)
_TORCH_DTYPES = frozenset(
    getattr(torch, name)
    for name in (
        *("bool", "uint8", "uint16", "uint32", "uint64", "int8", "int16", "int32", "int64"),
        *("float16", "bfloat16", "float32", "float64"),
    )
)


class Tensor:
    """A named tensor on the CPU. It shares the memory of what it is made from, until it is sent."""

    __slots__ = ("_data", "_name", "_sent")

    def __init__(self, name: str, array: npt.NDArray[Any], /) -> None:
        _require(isinstance(name, str) and isinstance(array, np.ndarray), "__init__")
        if array.dtype not in _NUMPY_DTYPES:
            raise TritonModelException("NumPy dtype is not supported.")
        self._name = name
        self._data: npt.NDArray[Any] | torch.Tensor = array if array.flags.c_contiguous else array.copy()
        self._sent: torch.Tensor | None = None

    @staticmethod
    def from_dlpack(name: str, tensor: object, /) -> Tensor:
        _require(isinstance(name, str), "from_dlpack")
        if isinstance(tensor, np.ndarray):
            raise AssertionError("the real from_dlpack ends the process when it gets a numpy array")  # noqa: TRY004
        data = tensor if isinstance(tensor, torch.Tensor) else torch.utils.dlpack.from_dlpack(tensor)
        if not data.is_contiguous():
            raise TritonModelException(
                "DLPack tensor is not contiguous. "
                "Only contiguous DLPack tensors that are stored in C-Order are supported."
            )
        if data.dtype not in _TORCH_DTYPES:
            raise TritonModelException("Dtype is invalid.")
        made = Tensor.__new__(Tensor)
        made._name, made._data, made._sent = name, data, None
        return made

    def __dlpack__(self, stream: object = None) -> object:
        return self.to_dlpack()

    def __dlpack_device__(self) -> tuple[int, int]:
        return 1, 0

    def as_numpy(self) -> npt.NDArray[Any]:
        if isinstance(self._data, np.ndarray):
            return self._data
        if self._data.dtype == torch.bfloat16:
            raise TritonModelException(
                "Tensor dtype is BF16 and cannot be converted to NumPy. Use to_dlpack() and from_dlpack() instead."
            )
        return self._data.numpy()

    def is_cpu(self) -> bool:
        return True

    def name(self) -> str:
        return self._name

    def shape(self) -> list[int]:
        return list(self._data.shape)

    def to_dlpack(self) -> object:
        if self._sent is not None:
            return self._sent.__dlpack__()
        if isinstance(self._data, torch.Tensor):
            return self._data.__dlpack__()
        if self._data.dtype == np.object_:
            raise TritonModelException("DLPack does not have support for string tensors.")
        return torch.from_numpy(self._data).__dlpack__()

    def _send(self) -> None:
        """Copy it to memory that is shared with the server, unless it lies there already."""
        if self._sent is None and self._data.dtype != np.object_:
            self._sent = torch.utils.dlpack.from_dlpack(self.to_dlpack()).clone()


class InferenceResponse:
    """Output tensors or an error."""

    __slots__ = ("_error", "_output_tensors")

    def __init__(self, output_tensors: list[Tensor] = [], error: TritonError | None = None) -> None:  # noqa: B006
        _require(_all(Tensor, output_tensors) and isinstance(error, TritonError | None), "__init__")
        self._output_tensors = list(output_tensors)
        self._error = error

    def error(self) -> TritonError | None:
        return self._error

    def has_error(self) -> bool:
        return self._error is not None

    def output_tensors(self) -> list[Tensor]:
        return self._output_tensors


class InferenceResponseSender:
    """Sends the responses to one request, from any thread."""

    __slots__ = ("_client",)

    def __init__(self, client: Client) -> None:
        self._client = client

    def is_cancelled(self) -> bool:
        if self._client.finished.is_set():
            raise AssertionError("the real server crashes")
        return self._client.cancelled.is_set()

    def send(self, response: InferenceResponse | None = None, flags: int = 0) -> None:
        _require(isinstance(response, InferenceResponse | None) and isinstance(flags, int), "send")
        if flags not in (0, TRITONSERVER_RESPONSE_COMPLETE_FINAL):
            raise TritonModelException("Unable to send response. Unsupported flag provided.")
        if response is None and flags == 0:
            raise TritonModelException(
                "Inference Response object must be provided when the response flags is set to zero."
            )
        self._client.receive(response, final=bool(flags))


class InferenceTrace:
    """Where a request was traced; here never."""

    __slots__ = ()

    def get_context(self) -> str | None:
        return None


class InferenceRequest:
    """A request: from a `Client`, or made by a model for BLS."""

    __slots__ = ("_client", "_correlation_id", "_flags", "_inputs", "_model_name", "_parameters", "_request_id",
                 "_requested_output_names", "_timeout", "_trace")  # fmt: skip

    def __init__(
        self,
        *,
        request_id: str = "",
        correlation_id: int | str = 0,
        inputs: list[Tensor],
        requested_output_names: list[str],
        model_name: str,
        model_version: int = -1,
        flags: int = 0,
        timeout: int = 0,
        trace: InferenceTrace = InferenceTrace(),  # noqa: B008
        parameters: dict[str, bool | int | str] | None = None,
    ) -> None:
        texts = isinstance(request_id, str) and isinstance(model_name, str) and _all(str, requested_output_names)
        numbers = all(isinstance(number, int) for number in (model_version, flags, timeout))
        _require(texts and numbers and _all(Tensor, inputs) and isinstance(trace, InferenceTrace), "__init__")
        if not isinstance(correlation_id, int | str):
            raise TritonModelException("Correlation ID must be integer or string")
        if not isinstance(parameters, dict | None):
            raise TritonModelException(f"Expect N8pybind114dictE, got {type(parameters)}")
        for value in (parameters or {}).values():
            if not isinstance(value, bool | int | str):
                raise TritonModelException(
                    f"Expect parameters values to have type bool/int/str, found type {type(value)}"
                )
        self._client: Client | None = None
        self._request_id = request_id
        self._correlation_id = correlation_id
        self._inputs = list(inputs)
        self._requested_output_names = set(requested_output_names)
        self._model_name = model_name
        self._flags = flags
        self._timeout = timeout
        self._trace = trace
        self._parameters = json.dumps(parameters or {})

    def exec(self, decoupled: bool = False) -> InferenceResponse | Iterator[InferenceResponse]:
        for tensor in self._inputs:
            tensor._send()
        responses = _answer(self)
        return responses if decoupled else next(responses)

    def async_exec(self, decoupled: bool = False) -> Awaitable[InferenceResponse | Iterator[InferenceResponse]]:
        async def answer() -> InferenceResponse | Iterator[InferenceResponse]:
            return self.exec(decoupled)

        return answer()

    def correlation_id(self) -> int | str:
        return self._correlation_id

    def flags(self) -> int:
        return self._flags

    def get_response_sender(self) -> InferenceResponseSender:
        return InferenceResponseSender(self._sent_by())

    def inputs(self) -> list[Tensor]:
        return self._inputs

    def is_cancelled(self) -> bool:
        return self._sent_by().cancelled.is_set()

    def parameters(self) -> str:
        return self._parameters

    def request_id(self) -> str:
        return self._request_id

    def requested_output_names(self) -> set[str]:
        return self._requested_output_names

    def timeout(self) -> int:
        return self._timeout

    def trace(self) -> InferenceTrace:
        return self._trace

    def _sent_by(self) -> Client:
        if self._client is None:
            raise AssertionError("no client sent this request: the real one ends the server here")
        return self._client


def _all(kind: type, values: object) -> bool:
    return isinstance(values, list | tuple) and all(isinstance(value, kind) for value in values)


class Logger:
    """The server's log; here the list `LOG` of this file."""

    def __init__(self) -> None:
        raise TypeError("Logger: No constructor defined!")

    @staticmethod
    def log_info(message: str) -> None:
        _log("info", message)

    @staticmethod
    def log_warn(message: str) -> None:
        _log("warn", message)

    @staticmethod
    def log_error(message: str) -> None:
        _log("error", message)

    @staticmethod
    def log_verbose(message: str) -> None:
        _log("verbose", message)


def get_input_tensor_by_name(inference_request: InferenceRequest, name: str) -> Tensor | None:
    return next((tensor for tensor in inference_request.inputs() if tensor.name() == name), None)


def get_output_tensor_by_name(inference_response: InferenceResponse, name: str) -> Tensor | None:
    return next((tensor for tensor in inference_response.output_tensors() if tensor.name() == name), None)


def is_model_ready(model_name: str, model_version: str = "") -> bool:
    return model_name in _MODELS and model_version in ("", "1")


def load_model(model_name: str, config: str = "", files: dict[str, bytes] | None = None) -> None:
    raise TritonModelException(f"failed to load '{model_name}', explicit model load / unload is not allowed")


def triton_string_to_numpy(triton_type_string: str) -> type[Any]:
    return {"TYPE_BOOL": np.bool_, "TYPE_INT32": np.int32, "TYPE_STRING": np.object_}[triton_type_string]


def using_decoupled_model_transaction_policy(model_config: dict[str, Any]) -> bool:
    decoupled: bool = model_config.get("model_transaction_policy", {"decoupled": False})["decoupled"]
    return decoupled


# The other side


LOG: list[tuple[str, str]] = []
_MODELS: dict[str, Callable[[InferenceRequest], Iterable[InferenceResponse]]] = {}


def serve(name: str, answer: Callable[[InferenceRequest], Iterable[InferenceResponse]]) -> None:
    """Put up a model: BLS requests to `name` get what `answer` gives."""
    _MODELS[name] = answer


def clear() -> None:
    """Forget the log and the models."""
    LOG.clear()
    _MODELS.clear()


class Client:
    """Sends one request to a model, and gets the responses."""

    def __init__(self) -> None:
        self.responses: list[InferenceResponse] = []
        self.cancelled = threading.Event()
        self.finished = threading.Event()

    def request(self, **inputs: npt.NDArray[Any]) -> InferenceRequest:
        """The request as the model's `execute` gets it; change its other properties with `InferenceRequest(...)`."""
        tensors = [Tensor(name, array) for name, array in inputs.items()]
        return self.send(InferenceRequest(model_name="", inputs=tensors, requested_output_names=[]))

    def send(self, request: InferenceRequest) -> InferenceRequest:
        """Make `request` this client's."""
        request._client = self
        return request

    def receive(self, response: InferenceResponse | None, *, final: bool) -> None:
        """What the response sender calls. Nothing may follow the final flag."""
        if self.finished.is_set():
            raise AssertionError("a response was sent after the final flag")
        if response is not None:
            self.responses.append(response)
        if final:
            self.finished.set()


def _answer(request: InferenceRequest) -> Iterator[InferenceResponse]:
    """The responses of the model that a BLS request is for."""
    model = _MODELS.get(request._model_name)
    if model is not None:
        return iter(model(request))
    reason = f"Failed for execute the inference request. Model '{request._model_name}' is not ready."
    message = f"Model {request._model_name} - Error when running inference: {reason}"
    return iter([InferenceResponse(error=TritonError(message))])


def _log(level: str, message: str) -> None:
    _require(isinstance(message, str), f"log_{level}")
    LOG.append((level, message))


def import_model(monkeypatch: pytest.MonkeyPatch, name: str) -> ModuleType:
    """The module `name`, which a model runs, imported anew with this fake in the place of the real module."""
    monkeypatch.setitem(sys.modules, "triton_python_backend_utils", module())
    for importing in [name, *(known for known, one in [*sys.modules.items()] if hasattr(one, "pb_utils"))]:
        monkeypatch.delitem(sys.modules, importing, raising=False)
    return importlib.import_module(name)
