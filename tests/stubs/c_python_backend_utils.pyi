# SPDX-FileCopyrightText: the tritonlora authors
# SPDX-License-Identifier: Apache-2.0
"""Types of the module that Triton compiles into `triton_python_backend_stub`.

Read off tritonserver 2.51.0: the names and signatures are those of its pybind11 doc strings, and
tests/server/test_pb_utils_surface.py compares them with the running server. Parameters that the real module
takes by position only are positional-only here; `InferenceRequest` takes all of its by keyword.
"""

from collections.abc import Awaitable
from typing import Any, ClassVar, Literal, overload

import numpy.typing as npt

class TritonModelException(Exception): ...  # noqa: N818

class TritonError:
    class __ErrorCode:
        name: str
        value: int
        def __int__(self) -> int: ...

    UNKNOWN: ClassVar[__ErrorCode]
    INTERNAL: ClassVar[__ErrorCode]
    NOT_FOUND: ClassVar[__ErrorCode]
    INVALID_ARG: ClassVar[__ErrorCode]
    UNAVAILABLE: ClassVar[__ErrorCode]
    UNSUPPORTED: ClassVar[__ErrorCode]
    ALREADY_EXISTS: ClassVar[__ErrorCode]
    CANCELLED: ClassVar[__ErrorCode]

    def __init__(self, message: str, code: __ErrorCode = ...) -> None: ...
    def code(self) -> __ErrorCode: ...
    def message(self) -> str: ...

class Tensor:
    def __init__(self, name: str, array: npt.NDArray[Any], /) -> None:
        """The dtype is one that Triton knows, or object (each element bytes or str). Memory is shared until sent."""

    def __dlpack__(self, stream: object = None) -> object: ...
    def __dlpack_device__(self) -> tuple[int, int]: ...
    def as_numpy(self) -> npt.NDArray[Any]:
        """Raises TritonModelException for BF16."""

    @staticmethod
    def from_dlpack(name: str, tensor: object, /) -> Tensor:
        """`tensor` is a contiguous torch tensor or a capsule. A numpy array ends the process."""

    def is_cpu(self) -> bool: ...
    def name(self) -> str: ...
    def shape(self) -> list[int]: ...
    def to_dlpack(self) -> object: ...
    def triton_dtype(self) -> object:
        """Raises TypeError in this version: the return value has no Python type."""

class InferenceResponse:
    def __init__(self, output_tensors: list[Tensor] = ..., error: TritonError | None = None) -> None: ...
    def error(self) -> TritonError | None: ...
    def has_error(self) -> bool: ...
    def output_tensors(self) -> list[Tensor]: ...

class ResponseIterator:
    """What `exec(decoupled=True)` gives. It is synchronous, also where it came from `async_exec`."""

    def __init__(self, response: InferenceResponse, /) -> None: ...
    def __iter__(self) -> ResponseIterator: ...
    def __next__(self) -> InferenceResponse: ...

class InferenceResponseSender:
    def is_cancelled(self) -> bool: ...
    def send(self, response: InferenceResponse | None = None, flags: int = 0) -> None: ...

class InferenceTrace:
    def get_context(self) -> str | None: ...

class MemoryType:
    TRITONSERVER_MEMORY_CPU: ClassVar[MemoryType]
    TRITONSERVER_MEMORY_GPU: ClassVar[MemoryType]
    name: str
    value: int
    def __int__(self) -> int: ...

TRITONSERVER_MEMORY_CPU: MemoryType
TRITONSERVER_MEMORY_GPU: MemoryType

class PreferredMemory:
    def __init__(self, preferred_memory_type: MemoryType, preferred_device_id: int = 0) -> None: ...

class InferenceRequest:
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
        preferred_memory: PreferredMemory = ...,
        trace: InferenceTrace = ...,
        parameters: dict[str, bool | int | str] | None = None,
    ) -> None: ...
    @overload
    def exec(self, decoupled: Literal[False] = False) -> InferenceResponse: ...
    @overload
    def exec(self, decoupled: Literal[True]) -> ResponseIterator: ...
    @overload
    def exec(self, decoupled: bool) -> InferenceResponse | ResponseIterator: ...
    @overload
    def async_exec(self, decoupled: Literal[False] = False) -> Awaitable[InferenceResponse]: ...
    @overload
    def async_exec(self, decoupled: Literal[True]) -> Awaitable[ResponseIterator]: ...
    @overload
    def async_exec(self, decoupled: bool) -> Awaitable[InferenceResponse | ResponseIterator]: ...
    def correlation_id(self) -> int | str: ...
    def flags(self) -> int: ...
    def get_response_sender(self) -> InferenceResponseSender: ...
    def inputs(self) -> list[Tensor]: ...
    def is_cancelled(self) -> bool:
        """Only on a request that came from a client: on one made here it ends the server."""

    def parameters(self) -> str:
        """A JSON object, "" when there are none."""

    def request_id(self) -> str: ...
    def requested_output_names(self) -> set[str]: ...
    def set_flags(self, flags: int, /) -> None: ...
    def set_release_flags(self, flags: int, /) -> None: ...
    def timeout(self) -> int: ...
    def trace(self) -> InferenceTrace: ...

class Logger:
    class LogLevel:
        name: str
        value: int
        def __int__(self) -> int: ...

    INFO: ClassVar[LogLevel]
    WARNING: ClassVar[LogLevel]
    ERROR: ClassVar[LogLevel]
    VERBOSE: ClassVar[LogLevel]

    @staticmethod
    def log(message: str, level: LogLevel = ...) -> None: ...
    @staticmethod
    def log_info(message: str) -> None: ...
    @staticmethod
    def log_warn(message: str) -> None: ...
    @staticmethod
    def log_error(message: str) -> None: ...
    @staticmethod
    def log_verbose(message: str) -> None: ...

class MetricKind:
    COUNTER: ClassVar[MetricKind]
    GAUGE: ClassVar[MetricKind]
    HISTOGRAM: ClassVar[MetricKind]
    name: str
    value: int
    def __int__(self) -> int: ...

class Metric:
    """Keep the family alive for as long as its metrics: they fail after it is gone."""

    def increment(self, value: float, /) -> None: ...
    def observe(self, value: float, /) -> None: ...
    def set(self, value: float, /) -> None: ...
    def value(self) -> float: ...

class MetricFamily:
    COUNTER: ClassVar[MetricKind]
    GAUGE: ClassVar[MetricKind]
    HISTOGRAM: ClassVar[MetricKind]

    def __init__(self, name: str, description: str, kind: MetricKind) -> None: ...
    def Metric(self, labels: dict[str, str] | None = None, buckets: list[float] | None = None) -> Metric: ...  # noqa: N802

def is_model_ready(model_name: str, model_version: str = "") -> bool: ...
def load_model(model_name: str, config: str = "", files: dict[str, bytes] | None = None) -> None: ...
def unload_model(model_name: str, unload_dependents: bool = False) -> None: ...
