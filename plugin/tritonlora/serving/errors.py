# SPDX-FileCopyrightText: the tritonlora authors
# SPDX-License-Identifier: Apache-2.0
"""The errors of the code that runs inside tritonserver.

* TritonLoraError
  - AdapterTableError         adapters.json is malformed
  - ModelConfigError          the config.pbtxt of one of our models asks for what the model cannot do
  - SharedMemoryError         the resolver's file in /dev/shm is not its own
  - RequestError              one inference request; `code` names the Triton error code of the response
    - InvalidRequest          INVALID_ARG
    - UnknownAdapter          NOT_FOUND
    - AdapterUnavailable      UNAVAILABLE
    - EngineSilent            UNAVAILABLE
    - ServerStopping          UNAVAILABLE
    - ClientLeft              CANCELLED
"""

from __future__ import annotations

from collections.abc import Iterable


class TritonLoraError(Exception):
    """The base class of tritonlora's errors. The length of the message is `bounded`."""

    def __init__(self, message: str = "") -> None:
        super().__init__(bounded(message))


class AdapterTableError(TritonLoraError):
    """adapters.json is malformed."""


class ModelConfigError(TritonLoraError):
    """The config.pbtxt of one of our models asks for what the model cannot do."""


class SharedMemoryError(TritonLoraError):
    """The resolver's file in /dev/shm cannot be read, or another user can write to it."""


class RequestError(TritonLoraError):
    """One inference request fails. `code` is a name in `pb_utils.TritonError`."""

    code = "INTERNAL"


class InvalidRequest(RequestError):
    """The request contradicts itself, or one of its inputs or parameters is not allowed."""

    code = "INVALID_ARG"


class UnknownAdapter(RequestError):
    """No adapter is registered under that lora_name or lora_task_id."""

    code = "NOT_FOUND"


class AdapterUnavailable(RequestError):
    """The adapter is registered, but cannot be served now."""

    code = "UNAVAILABLE"


class EngineSilent(RequestError):
    """The engine's model does not respond, or has stalled in the midst of a response."""

    code = "UNAVAILABLE"


class ServerStopping(RequestError):
    """The model is being unloaded."""

    code = "UNAVAILABLE"

    def __init__(self) -> None:
        super().__init__("the server is being stopped")


class ClientLeft(RequestError):
    """The client has left before the response was complete."""

    code = "CANCELLED"


def one_message(heading: str, problems: Iterable[str]) -> str:
    """`heading`, then the problems, as one `bounded` message.

    One problem stands on the line of the heading. Several stand on a line each, at most _MAX_PROBLEMS of them, and then
    "and 9 more".
    """
    lines = list(problems)
    if len(lines) == 1:
        return bounded(f"{heading}: {lines[0]}")
    more = [f"and {len(lines) - _MAX_PROBLEMS} more"] if len(lines) > _MAX_PROBLEMS else []
    return bounded("\n  ".join([f"{heading}:", *lines[:_MAX_PROBLEMS], *more]))


def bounded(message: str) -> str:
    """`message`, shortened in the middle: of each line beyond _MAX_WIDTH, and of the whole beyond its own limits."""
    lines = [_without_middle(line, _MAX_WIDTH) for line in message.split("\n")]
    if len(lines) > _MAX_LINES:
        first, last = _MAX_LINES // 2, _MAX_LINES // 2 - 1
        lines = [*lines[:first], f"  ... {len(lines) - first - last} lines are left out ...", *lines[-last:]]
    return _without_middle("\n".join(lines), _MAX_CHARACTERS)


def _without_middle(text: str, most: int) -> str:
    half = most // 2
    return text if len(text) <= most else f"{text[:half]} ... {text[-half:]}"


_MAX_PROBLEMS = 100
_MAX_LINES = 200  # a problem may have several
_MAX_WIDTH = 10_000  # characters of a line: two paths fit; a name in a hostile file's header can have megabytes
_MAX_CHARACTERS = 50_000
