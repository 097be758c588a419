# SPDX-FileCopyrightText: the tritonlora authors
# SPDX-License-Identifier: Apache-2.0
"""What the two kinds of target have in common for the door: `engine_model` and `llm_api_model` implement it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt

from tritonlora.openai.api_error import UNSUPPORTED, invalid
from tritonlora.openai.chat_tokenizer import ChatTokenizer
from tritonlora.openai.schema import GenerationRequest
from tritonlora.serving.routing import SPLIT_KEY

Inputs = dict[str, npt.NDArray[Any]]


@dataclass(frozen=True, slots=True)
class Source:
    """A prompt. `text` is None if the client sent tokens."""

    text: str | None
    tokens: Sequence[int]
    is_rendered: bool = False  # a chat template wrote the text


@dataclass(frozen=True, slots=True)
class Piece:
    """What a response of the server adds to a choice."""

    text: str = ""
    logprobs: tuple[tuple[int, float], ...] = ()  # token and log-probability, if they were asked for


class ChoiceState(Protocol):
    """One choice: responses of the server come in, text goes out."""

    @property
    def count(self) -> int:
        """The tokens so far."""

    @property
    def is_stopped(self) -> bool:
        """Whether a stop string has come: nothing after it counts."""

    @property
    def finish_reason(self) -> str:
        """ "length" or "stop", once the choice has ended."""

    def add(self, response: Any) -> Piece:
        """What a ModelInferResponse adds."""

    def end(self) -> Piece:
        """What was held back until the end."""


class ServedModel(Protocol):
    """A model of the server, and how it is asked."""

    @property
    def model(self) -> str:
        """The model that requests go to."""

    @property
    def target(self) -> str:
        """The engine's model, behind it."""

    @property
    def text(self) -> ChatTokenizer:
        """The base model's tokenizer."""

    def request_inputs(self, request: GenerationRequest, source: Source, max_tokens: int) -> Inputs:
        """The inputs that all choices of a request share. ApiError naming a field that the model has no input for."""

    def choice_inputs(self, inputs: Inputs, lora_name: str | None, number: int) -> Inputs:
        """The inputs of choice `number`: with its adapter, and a seed of its own if there is a seed."""

    def outputs(self, request: GenerationRequest) -> list[str]:
        """The outputs to ask for."""

    def stop_inputs(self) -> Inputs | None:
        """The inputs of a request to `target` that ends the request with the same id.

        None: closing the call ends the request, as far as the target can.
        """

    def sequence(self, request: GenerationRequest, source: Source, max_tokens: int) -> ChoiceState:
        """The state of one choice."""


@dataclass(frozen=True, slots=True)
class Declared:
    """The declared inputs of a model."""

    model: str  # for messages
    types: Mapping[str, str]  # input -> its data type, TYPE_…
    is_batched: bool  # its tensors have a batch dimension first

    def name(self, field: str, *names: str) -> str:
        """The first of `names` that is declared. ApiError that refuses the request's `field` when none is."""
        found = next((name for name in names if name in self.types), None)
        if found is None:
            inputs = f"no input {' or '.join(names)}" if names else "no input for it"
            raise invalid(f"{field}: model {self.model!r} has {inputs}; leave it out", field, UNSUPPORTED)
        return found

    def scalar(self, name: str, value: float | str) -> npt.NDArray[Any]:
        """The input `name` with one element, [1, 1] or [1]."""
        if isinstance(value, str):
            return self.strings([value])
        dtype = DTYPES[self.types[name]]
        if dtype is np.uint64:
            value = int(value) % (1 << 64)
        return np.full((1, 1) if self.is_batched else (1,), value, dtype)

    def split_key(self, request: GenerationRequest) -> Inputs:
        """The input by which all choices of a request get the same adapter, if the model has that input."""
        return {SPLIT_KEY: self.strings([request.split_key])} if SPLIT_KEY in self.types else {}

    def strings(self, values: Sequence[str]) -> npt.NDArray[Any]:
        """A STRING input with these elements, [1, n] or [n]."""
        array = np.empty(len(values), np.object_)
        array[:] = [value.encode() for value in values]
        return array.reshape(1, -1) if self.is_batched else array


DTYPES: Mapping[str, Any] = {
    "TYPE_INT32": np.int32,
    "TYPE_UINT32": np.uint32,
    "TYPE_INT64": np.int64,
    "TYPE_UINT64": np.uint64,
    "TYPE_FP32": np.float32,
    "TYPE_BOOL": np.bool_,
}


def with_choice(declared: Declared, inputs: Inputs, seeds: Sequence[str], lora_name: str | None, number: int) -> Inputs:
    """`inputs` with the adapter's name, and with the seed of choice `number`. `seeds` are the inputs of a seed."""
    own = dict(inputs)
    if lora_name is None:
        own.pop(SPLIT_KEY, None)
    else:
        own["lora_name"] = declared.strings([lora_name])
    for name in seeds:
        if number and name in own:
            own[name] = own[name] + np.array(number, own[name].dtype)
    return own
