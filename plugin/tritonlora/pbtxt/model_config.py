# SPDX-FileCopyrightText: the tritonlora authors
# SPDX-License-Identifier: Apache-2.0
"""The meaning of a config.pbtxt: `ModelConfig`, read from its text.

A value that is still a placeholder `${name}` is read as `Unfilled`. It is an error only for code that needs the value.
Meaning and defaults are those of triton-inference-server/common, protobuf/model_config.proto.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import TypeVar

from tritonlora.errors import ConfigError, one_message
from tritonlora.pbtxt.text_format import Document, Message, Scalar, error_at, parse

_TEMPLATE = re.compile(r"\$\{[^{}]*\}")
_INTEGER = re.compile(r"-?(?:0[xX][0-9a-fA-F]+|0[0-7]*|[1-9][0-9]*)", re.ASCII)
_BOOLEANS = {
    "true": True, "True": True, "t": True, "1": True,
    "false": False, "False": False, "f": False, "0": False,
}  # fmt: skip

_T = TypeVar("_T")

DATA_TYPES = (
    "TYPE_INVALID", "TYPE_BOOL", "TYPE_UINT8", "TYPE_UINT16", "TYPE_UINT32", "TYPE_UINT64", "TYPE_INT8", "TYPE_INT16",
    "TYPE_INT32", "TYPE_INT64", "TYPE_FP16", "TYPE_FP32", "TYPE_FP64", "TYPE_STRING", "TYPE_BF16",
)  # fmt: skip
"""inference.DataType in the order of its numbers (triton-inference-server/common, protobuf/model_config.proto)."""


@dataclass(frozen=True, slots=True)
class Unfilled:
    """A value that is still a placeholder. Read values with `filled`, which raises ConfigError for this one."""

    template: str  # "${logits_datatype}"
    what: str  # "data_type of output 'context_logits'"
    line: int
    column: int

    def error(self) -> ConfigError:
        return ConfigError(
            f"{self.what} is still {self.template}: set it with tools/fill_template.py, or edit the file",
            line=self.line,
            column=self.column,
        )

    def __bool__(self) -> bool:
        raise self.error()


def filled(value: _T | Unfilled) -> _T:
    """`value`; raises ConfigError, with the placeholder and the remedy, when it is not filled in yet."""
    if isinstance(value, Unfilled):
        raise value.error()
    return value


def has_template(content: str) -> bool:
    """Whether a string, such as a parameter's, still has a placeholder `${name}`."""
    return _TEMPLATE.search(content) is not None


@dataclass(frozen=True, slots=True)
class TensorSpec:
    """One declared input or output. `dims` are those of the file, without the batch dim."""

    name: str
    data_type: str | Unfilled  # "TYPE_INT32"
    dims: tuple[int, ...] | Unfilled
    optional: bool | Unfilled = False
    allow_ragged_batch: bool | Unfilled = False


@dataclass(frozen=True, slots=True)
class Step:
    """One step of an ensemble; the maps go from the model's tensor to the ensemble's."""

    model_name: str
    input_map: Mapping[str, str]
    output_map: Mapping[str, str]


@dataclass(frozen=True, slots=True)
class ModelConfig:
    """The fields of a config.pbtxt that tritonlora needs. A string may have placeholders; see `has_template`."""

    name: str  # "" if the file has none, and the directory's name counts
    backend: str
    max_batch_size: int | Unfilled
    dynamic_batching: bool  # whether the block is there
    response_cache: bool | Unfilled  # whether Triton may keep responses
    decoupled: bool | Unfilled
    inputs: tuple[TensorSpec, ...]
    outputs: tuple[TensorSpec, ...]
    parameters: Mapping[str, str]  # key -> string_value
    instance_count: int | Unfilled  # the sum over all groups; 1 without a group
    steps: tuple[Step, ...]

    def input(self, name: str) -> TensorSpec | None:
        """The input of that name, or None."""
        return next((spec for spec in self.inputs if spec.name == name), None)

    def output(self, name: str) -> TensorSpec | None:
        """The output of that name, or None."""
        return next((spec for spec in self.outputs if spec.name == name), None)

    def leads_to(self, model: str) -> bool:
        """Whether the model is an ensemble with a step for `model`."""
        return any(step.model_name == model for step in self.steps)


def parse_config(text: str) -> ModelConfig:
    """The meaning of a config.pbtxt's text; ConfigError when it cannot be parsed or understood."""
    return config_of(parse(text))


def config_of(document: Document) -> ModelConfig:
    """The meaning of a config.pbtxt; one ConfigError with every problem found. Placeholders are no error here."""
    reader = _Reader(document.text)
    root = document.message
    policy = reader.message(root, "model_transaction_policy")
    scheduling = reader.message(root, "ensemble_scheduling")
    cache = reader.message(root, "response_cache")
    config = ModelConfig(
        name=reader.string(root, "name"),
        backend=reader.string(root, "backend"),
        max_batch_size=reader.integer(root, "max_batch_size"),
        dynamic_batching=bool(reader.messages(root, "dynamic_batching")),
        response_cache=reader.boolean(cache, "enable", of="response_cache"),
        decoupled=reader.boolean(policy, "decoupled"),
        inputs=tuple(reader.tensor(spec, "input") for spec in reader.messages(root, "input")),
        outputs=tuple(reader.tensor(spec, "output") for spec in reader.messages(root, "output")),
        parameters=MappingProxyType(reader.parameters(root)),
        instance_count=reader.instance_count(root),
        steps=tuple(reader.step(step) for step in reader.messages(scheduling, "step")),
    )
    reader.finish()
    return config


_NOTHING = Message(0, 0, ())


def _what(name: str, of: str) -> str:
    """A field for messages: "dims of input 'x'"."""
    return f"{name} of {of}" if of else name


class _Reader:
    """Reads typed values. It collects all problems, and `finish` raises them as one ConfigError."""

    def __init__(self, text: str) -> None:
        self.text = text
        self.problems: list[ConfigError] = []

    def finish(self) -> None:
        if len(self.problems) == 1:
            raise self.problems[0]
        if self.problems:
            raise ConfigError(one_message("the config cannot be read", map(str, self.problems)))

    def problem(self, node: Scalar | Message, message: str) -> None:
        self.problems.append(error_at(self.text, node.start, message))

    def messages(self, parent: Message, name: str) -> tuple[Message, ...]:
        for value in parent.scalars(name):
            self.problem(value, f"expected {name} {{ … }}, got {value.value!r}")
        return parent.messages(name)

    def message(self, parent: Message, name: str) -> Message:
        values = self.messages(parent, name)
        for value in values[1:]:
            self.problem(value, f"{name} is given twice")
        return values[0] if values else _NOTHING

    def scalar(self, parent: Message, name: str, what: str) -> Scalar | None:
        for message in parent.messages(name):
            self.problem(message, f"expected {what} to be one value, got a message")
        values = parent.scalars(name)
        for value in values[1:]:
            self.problem(value, f"{what} is given twice")
        return values[0] if values else None

    def string(self, parent: Message, name: str, of: str = "") -> str:
        what = _what(name, of)
        value = self.scalar(parent, name, what)
        if value is None:
            return ""
        if not value.quoted and not value.is_template:
            self.problem(value, f"expected {what} to be a string in quotes, got {value.value!r}")
        return value.value

    def unfilled(self, value: Scalar, what: str) -> Unfilled:
        error = error_at(self.text, value.start, "")
        return Unfilled(value.value, what, error.line, error.column)

    def number(self, value: Scalar, what: str) -> int:
        if value.quoted or not _INTEGER.fullmatch(value.value):
            self.problem(value, f"expected {what} to be an integer, got {value.value!r}")
            return 0
        digits = value.value.lstrip("-")
        base = 16 if digits[:2] in ("0x", "0X") else 8 if digits[0] == "0" else 10
        return int(value.value, base)

    def integer(self, parent: Message, name: str, of: str = "", default: int = 0) -> int | Unfilled:
        what = _what(name, of)
        value = self.scalar(parent, name, what)
        if value is None:
            return default
        return self.unfilled(value, what) if value.is_template else self.number(value, what)

    def integers(self, parent: Message, name: str, of: str) -> tuple[int, ...] | Unfilled:
        what = _what(name, of)
        for message in parent.messages(name):
            self.problem(message, f"expected {what} to be integers, got a message")
        values = parent.scalars(name)
        for value in values:
            if value.is_template:
                return self.unfilled(value, what)
        return tuple(self.number(value, what) for value in values)

    def boolean(self, parent: Message, name: str, of: str = "") -> bool | Unfilled:
        what = _what(name, of)
        value = self.scalar(parent, name, what)
        if value is None:
            return False
        if value.is_template:
            return self.unfilled(value, what)
        if value.quoted or value.value not in _BOOLEANS:
            self.problem(value, f"expected {what} to be true or false, got {value.value!r}")
        return _BOOLEANS.get(value.value, False)

    def data_type(self, parent: Message, of: str) -> str | Unfilled:
        what = _what("data_type", of)
        value = self.scalar(parent, "data_type", what)
        if value is None:
            return "TYPE_INVALID"
        if value.is_template:
            return self.unfilled(value, what)
        if not value.quoted and value.value in DATA_TYPES:
            return value.value
        if not value.quoted and value.value.isdecimal() and int(value.value) < len(DATA_TYPES):
            return DATA_TYPES[int(value.value)]
        self.problem(value, f"expected {what} to be one of {', '.join(DATA_TYPES[1:])}; got {value.value!r}")
        return "TYPE_INVALID"

    def tensor(self, spec: Message, kind: str) -> TensorSpec:
        name = self.string(spec, "name", f"an {kind}")
        of = f"{kind} {name!r}"
        return TensorSpec(
            name=name,
            data_type=self.data_type(spec, of),
            dims=self.integers(spec, "dims", of),
            optional=self.boolean(spec, "optional", of),
            allow_ragged_batch=self.boolean(spec, "allow_ragged_batch", of),
        )

    def string_map(self, parent: Message, name: str) -> dict[str, str]:
        return {
            self.string(entry, "key", name): self.string(entry, "value", name) for entry in self.messages(parent, name)
        }

    def parameters(self, root: Message) -> dict[str, str]:
        return {
            self.string(entry, "key", "parameters"): self.string(self.message(entry, "value"), "string_value")
            for entry in self.messages(root, "parameters")
        }

    def step(self, step: Message) -> Step:
        return Step(
            self.string(step, "model_name", "a step"),
            self.string_map(step, "input_map"),
            self.string_map(step, "output_map"),
        )

    def instance_count(self, root: Message) -> int | Unfilled:
        total = 0
        for group in self.messages(root, "instance_group"):
            count = self.integer(group, "count", "instance_group", default=1)
            if isinstance(count, Unfilled):
                return count
            total += count
        return total or 1
