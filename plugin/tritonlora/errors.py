# SPDX-FileCopyrightText: the tritonlora authors
# SPDX-License-Identifier: Apache-2.0
"""Every error that tritonlora raises.

* TritonLoraError
  - AdapterError              an adapter directory, while it is read or converted
    - InvalidAdapter          broken: truncated, contradictory, not PEFT
    - UnsupportedAdapter      sound, but something in it cannot be carried to the engine exactly
    - EngineMismatch          sound, but not for this engine
      - UnknownArchitecture   whose base model is one of which nothing is known here
  - ConfigError               a config.pbtxt that cannot be read or edited; carries line and column
  - RepositoryError           a model repository that is not in the state the command needs
    - AdapterTableError       adapters.json is malformed
  - SharedMemoryError         what the router's instances share in /dev/shm is not theirs alone
  - ServerError               tritonserver cannot be found, did not start, or answered with an error
  - RequestError              one inference request; `code` names the Triton error code of the answer
    - InvalidRequest          INVALID_ARG
    - UnknownAdapter          NOT_FOUND
    - AdapterUnavailable      UNAVAILABLE
    - EngineSilent            UNAVAILABLE
    - ClientLeft              CANCELLED

An error is raised once with all the problems found, a line each, and each line names the thing and,
where there is one, the remedy.

This file runs inside a plain Triton container: standard library only.
"""

from __future__ import annotations

import re
from collections.abc import Iterable


class TritonLoraError(Exception):
    """All errors that this package raises on purpose. However much is wrong, the message is `bounded`."""

    def __init__(self, message: str = "") -> None:
        super().__init__(bounded(message))


class AdapterError(TritonLoraError):
    """An adapter directory cannot be read or converted."""


class InvalidAdapter(AdapterError):
    """The adapter is broken: truncated, contradictory, or not a PEFT adapter."""


class UnsupportedAdapter(AdapterError):
    """The adapter is sound, but part of it cannot be carried to the engine exactly."""


class EngineMismatch(AdapterError):
    """The adapter is sound, but it is not for this engine."""


class UnknownArchitecture(EngineMismatch):
    """Nothing is known here of the layers of the base model."""


class ConfigError(TritonLoraError):
    """A config.pbtxt cannot be read, or cannot be edited as asked.

    `line` and `column` count from 1; both are 0 where the error is not at one place.
    """

    def __init__(self, message: str, *, line: int = 0, column: int = 0) -> None:
        super().__init__(f"line {line}, column {column}: {message}" if line else message)
        self.line = line
        self.column = column


class RepositoryError(TritonLoraError):
    """A model repository is not in the state that the command needs."""


class AdapterTableError(RepositoryError):
    """adapters.json is malformed."""


class SharedMemoryError(TritonLoraError):
    """What the router's instances share in /dev/shm is not theirs alone."""


class ServerError(TritonLoraError):
    """A tritonserver cannot be found, did not start, or answered with an error."""


class RequestError(TritonLoraError):
    """One inference request cannot be answered. `code` is a name in `pb_utils.TritonError`."""

    code = "INTERNAL"


class InvalidRequest(RequestError):
    """The request contradicts itself or the wire."""

    code = "INVALID_ARG"


class UnknownAdapter(RequestError):
    """No adapter is registered under that lora_name or lora_task_id."""

    code = "NOT_FOUND"


class AdapterUnavailable(RequestError):
    """The adapter is registered, but cannot be served now."""

    code = "UNAVAILABLE"


class EngineSilent(RequestError):
    """The engine's model does not answer, or does not go on."""

    code = "UNAVAILABLE"


class ClientLeft(RequestError):
    """Nobody waits for the answer any more."""

    code = "CANCELLED"


def one_message(heading: str, problems: Iterable[str]) -> str:
    """`heading`, then the problems: on the same line when there is one, else a line each, and "and 9 more" at the end.

    The message is `bounded`.
    """
    lines = list(problems)
    if len(lines) == 1:
        return bounded(f"{heading}: {lines[0]}")
    more = [f"and {len(lines) - _MAX_PROBLEMS} more"] if len(lines) > _MAX_PROBLEMS else []
    return bounded("\n  ".join([f"{heading}:", *lines[:_MAX_PROBLEMS], *more]))


def bounded(message: str) -> str:
    """`message` without the middles of lines that are too long, and without its own where it is too long itself."""
    lines = [_without_middle(line, _MAX_WIDTH) for line in message.split("\n")]
    if len(lines) > _MAX_LINES:
        first, last = _MAX_LINES // 2, _MAX_LINES // 2 - 1
        lines = [*lines[:first], f"  ... {len(lines) - first - last} lines are left out ...", *lines[-last:]]
    return _without_middle("\n".join(lines), _MAX_CHARACTERS)


def merge_layers(problems: Iterable[str]) -> list[str]:
    """`problems`, with one line for those that differ only in the numbers of a layer's path.

    "'layers.0.fc1': no", "'layers.1.fc1': no", "'layers.2.fc1': no" are "'layers.0.fc1': no (the same in layers 1, 2)".
    """
    groups: dict[str, dict[str, int]] = {}
    for problem in problems:
        number = _NUMBER.search(problem)
        groups.setdefault(_NUMBER.sub("*", problem), {})[problem] = int(number[0]) if number else 0
    lines = []
    for texts in groups.values():
        first = min(texts, key=lambda text: (texts[text], text))
        others = set(texts.values()) - {texts[first]}
        same = f"in {layers_text(others)}" if others else f"{len(texts) - 1} times more" if len(texts) > 1 else ""
        lines.append(f"{first} (the same {same})" if same else first)
    return lines


def layers_text(layers: Iterable[int]) -> str:
    """ "layer 3", "layers 0, 2" or "layers 0 to 31"."""
    ordered = sorted(set(layers))
    if len(ordered) > 2 and ordered == list(range(ordered[0], ordered[-1] + 1)):
        return f"layers {ordered[0]} to {ordered[-1]}"
    return f"layer{'s' if len(ordered) > 1 else ''} {', '.join(map(str, ordered))}"


def _without_middle(text: str, most: int) -> str:
    half = most // 2
    return text if len(text) <= most else f"{text[:half]} ... {text[-half:]}"


_NUMBER = re.compile(r"(?<=\.)[0-9]{1,9}(?=\.)")
_MAX_PROBLEMS = 100
_MAX_LINES = 200  # a problem may have several
_MAX_WIDTH = 10_000  # characters; two paths fit, and a name that a file's header makes up can have megabytes
_MAX_CHARACTERS = 50_000
