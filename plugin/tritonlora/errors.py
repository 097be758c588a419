# SPDX-FileCopyrightText: the tritonlora authors
# SPDX-License-Identifier: Apache-2.0
"""The errors that a caller of tritonlora may catch, and that commands report with exit code 1.

* TritonLoraError
  - AdapterError              an adapter directory, while it is read or converted
    - InvalidAdapter          broken: truncated, contradictory, not PEFT
    - UnsupportedAdapter      sound, but something in it cannot be carried to the engine exactly
    - EngineMismatch          sound, but not for this engine
      - UnknownArchitecture   the base model is of an architecture that is not in our tables
    - SourceError             an adapter's source cannot be reached, or what it sent is not whole
  - ConfigError               a config.pbtxt that cannot be read or edited; carries line and column
  - RepositoryError           a model repository that is not in the state the command needs
  - DesiredStateError         a file for `sync` that cannot be read
  - ServerError               tritonserver cannot be found, did not start, or answered with an error
  - MissingExtra              a command needs packages that only an extra of tritonlora installs
  - AdapterTableError, ModelConfigError, SharedMemoryError, RequestError and its kinds: see `serving.errors`

An error is raised once with all the problems found, a line each. Each line names the thing and, where there is one, the
remedy.
"""

from __future__ import annotations

import contextlib
import re
from collections.abc import Iterable, Iterator, Mapping

from tritonlora.serving.errors import (
    AdapterTableError,
    AdapterUnavailable,
    ClientLeft,
    EngineSilent,
    InvalidRequest,
    ModelConfigError,
    RequestError,
    SharedMemoryError,
    TritonLoraError,
    UnknownAdapter,
    bounded,
    one_message,
)

__all__ = [
    "AdapterError",
    "AdapterTableError",
    "AdapterUnavailable",
    "ClientLeft",
    "ConfigError",
    "DesiredStateError",
    "EngineMismatch",
    "EngineSilent",
    "InvalidAdapter",
    "InvalidRequest",
    "MissingExtra",
    "ModelConfigError",
    "Problems",
    "RepositoryError",
    "RequestError",
    "ServerError",
    "SharedMemoryError",
    "SourceError",
    "TritonLoraError",
    "UnknownAdapter",
    "UnknownArchitecture",
    "UnsupportedAdapter",
    "bounded",
    "collected",
    "error_of",
    "layer_names",
    "layers_text",
    "merge_layers",
    "one_message",
]


class AdapterError(TritonLoraError):
    """An adapter directory cannot be read or converted."""


class InvalidAdapter(AdapterError):
    """The adapter is broken: truncated, contradictory, or not a PEFT adapter."""


class UnsupportedAdapter(AdapterError):
    """The adapter is sound, but part of it cannot be carried to the engine exactly."""


class EngineMismatch(AdapterError):
    """The adapter is sound, but it is not for this engine."""


class UnknownArchitecture(EngineMismatch):
    """The base model is of an architecture that is not in our tables."""


class SourceError(AdapterError):
    """An adapter's source cannot be reached, is not allowed, or sent something else than it promised."""


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


class DesiredStateError(TritonLoraError):
    """A file that says which adapters a repository should have cannot be read."""


class ServerError(TritonLoraError):
    """A tritonserver cannot be found, did not start, or answered with an error."""


class MissingExtra(TritonLoraError):
    """A command needs packages that only an extra of tritonlora installs."""


Problems = Mapping[type[TritonLoraError], list[str]]
"""What was found to be wrong, by the kind of error that each is; the gravest kind first."""


def error_of(heading: str, problems: Problems) -> TritonLoraError:
    """The gravest kind of error of which there are problems, with the problems of all kinds, a line each."""
    kind = next(kind for kind, texts in problems.items() if texts)
    return kind(one_message(heading, [text for texts in problems.values() for text in texts]))


@contextlib.contextmanager
def collected(problems: Problems) -> Iterator[None]:
    """Keep an error of one of these kinds among the problems instead of letting it end the reading."""
    try:
        yield
    except tuple(problems) as error:
        texts = next(texts for kind, texts in problems.items() if isinstance(error, kind))
        texts.append(str(error).replace("\n", "\n  "))


def merge_layers(problems: Iterable[str]) -> list[str]:
    """`problems`, with one line for those that differ only in the path of a layer.

    "'layers.0.fc1': no", "'layers.1.fc1': no", "'layers.2.fc1': no" are "'layers.0.fc1': no (the same in layers 1, 2)".
    "'layers.0.fc1': no", "'layers.0.fc2': no" are "'layers.0.fc1', 'layers.0.fc2': no".
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
    by_reason: dict[str, list[str]] = {}
    for line in lines:
        path, colon, reason = line.partition(": ")
        quoted = colon and path[:1] == path[-1:] == "'"
        by_reason.setdefault(reason if quoted else line, []).append(path if quoted else line)
    return [reason if paths == [reason] else f"{_listed(paths)}: {reason}" for reason, paths in by_reason.items()]


def _listed(paths: list[str]) -> str:
    more = f" and {len(paths) - _MAX_PATHS} more" if len(paths) > _MAX_PATHS else ""
    return ", ".join(paths[:_MAX_PATHS]) + more


def layers_text(layers: Iterable[int]) -> str:
    """ "layer 3", "layers 0, 2" or "layers 0 to 31"."""
    ordered = sorted(set(layers))
    if len(ordered) > 2 and ordered == list(range(ordered[0], ordered[-1] + 1)):
        return f"layers {ordered[0]} to {ordered[-1]}"
    return f"layer{'s' if len(ordered) > 1 else ''} {', '.join(map(str, ordered))}"


def layer_names(found: Iterable[tuple[str, int]]) -> str:
    """ "k_proj, v_proj in layers 0 to 3; q_proj in layer 1", for pairs of a name and a layer."""
    layers: dict[str, set[int]] = {}
    for name, layer in found:
        layers.setdefault(name, set()).add(layer)
    names: dict[str, list[str]] = {}
    for name in sorted(layers):
        names.setdefault(layers_text(layers[name]), []).append(name)
    return "; ".join(f"{', '.join(same)} in {text}" for text, same in names.items())


_MAX_PATHS = 20  # in one line
_NUMBER = re.compile(r"(?<=\.)[0-9]{1,9}(?=\.)")
