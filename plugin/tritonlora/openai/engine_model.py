# SPDX-FileCopyrightText: the tritonlora authors
# SPDX-License-Identifier: Apache-2.0
"""The engine's model as the door asks it: tokens in, tokens out, and `stop` to end a request.

Text is exact: `serving.text.piece` joins the tokens of a character, as in the ensemble with postprocessing.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from tritonlora.openai.api_error import invalid
from tritonlora.openai.chat_tokenizer import ChatTokenizer
from tritonlora.openai.sampling import UNSUPPORTED, guide_of, numbers_of, stops_of, wants_logprobs
from tritonlora.openai.schema import GenerationRequest
from tritonlora.openai.stop_strings import StopStrings
from tritonlora.openai.triton_client import outputs_of
from tritonlora.serving.text import CONTEXT_TOKENS, piece, word_lists

Inputs = dict[str, npt.NDArray[Any]]
# A field of a request -> the inputs that take it, the first that the model declares; and what the input is called.
_NUMBERS = {
    "temperature": ("temperature",),
    "top_p": ("runtime_top_p",),
    "top_k": ("runtime_top_k",),
    "seed": ("random_seed", "seed"),
    "frequency_penalty": ("frequency_penalty",),
    "presence_penalty": ("presence_penalty",),
    "repetition_penalty": ("repetition_penalty",),
    "min_tokens": ("min_length", "min_tokens"),
}
_DTYPES = {
    "TYPE_INT32": np.int32,
    "TYPE_UINT32": np.uint32,
    "TYPE_INT64": np.int64,
    "TYPE_UINT64": np.uint64,
    "TYPE_FP32": np.float32,
    "TYPE_BOOL": np.bool_,
}


@dataclass(frozen=True, slots=True)
class EngineModel:
    """The model that is asked, and its tensors."""

    model: str  # that requests go to: the ensemble of the resolver and the engine, or the router
    target: str  # the engine's model, which is asked to stop
    inputs: Mapping[str, str]  # input of the model -> its data type, TYPE_…
    stop_inputs: Mapping[str, str]  # input of the target that a request to stop needs -> its data type
    decoupled: bool
    text: ChatTokenizer

    takes_tokens = True

    def request_inputs(self, request: GenerationRequest, prompt: Sequence[int], max_tokens: int) -> Inputs:
        """The inputs that all choices of a request share. ApiError naming a field that the model has no input for."""
        inputs: Inputs = {
            "input_ids": np.array([prompt], np.int32),
            "input_lengths": self._scalar("input_lengths", len(prompt)),
            "request_output_len": self._scalar("request_output_len", max_tokens),
        }
        for field, value in numbers_of(request).items():
            name = self._input(field, *_NUMBERS[field])
            inputs[name] = self._scalar(name, value)
        end_id = self.text.tokenizer.end_id
        if end_id is not None and not request.ignore_eos:
            inputs["end_id"] = self._scalar(self._input("ignore_eos", "end_id"), end_id)
        if stops := stops_of(request):
            words = word_lists(self.text.tokenizer, [stops])
            if words is not None:
                inputs[self._input("stop", "stop_words_list")] = words
        if request.logit_bias:
            inputs[self._input("logit_bias", "embedding_bias")] = self._bias(request.logit_bias)
        if wants_logprobs(request):
            name = self._input("logprobs", "return_log_probs")
            inputs[name] = self._scalar(name, True)
        if guide := guide_of(request):
            field, kind, text = guide
            inputs[self._input(field, "guided_decoding_guide_type")] = _strings(kind)
            if text:
                inputs[self._input(field, "guided_decoding_guide")] = _strings(text)
        if self._streams(request):
            inputs["streaming"] = self._scalar("streaming", True)
        elif "exclude_input_in_output" in self.inputs:
            inputs["exclude_input_in_output"] = self._scalar("exclude_input_in_output", True)
        return inputs

    def seed_input(self) -> str | None:
        """The input of the seed, or None."""
        return next((name for name in _NUMBERS["seed"] if name in self.inputs), None)

    def outputs(self, request: GenerationRequest) -> list[str]:
        """The outputs to ask for."""
        return ["output_ids", "sequence_length", *(["output_log_probs"] if wants_logprobs(request) else [])]

    def stop_request_inputs(self) -> Inputs | None:
        """The inputs of a request that ends the request with the same id; None if the target has no such input."""
        if "stop" not in self.stop_inputs:
            return None
        return {name: np.array([[1]], _DTYPES[kind]) for name, kind in self.stop_inputs.items()}

    def sequence(self, request: GenerationRequest, prompt: Sequence[int], max_tokens: int) -> TokenSequence:
        """The state of one choice."""
        includes_prompt = not self._streams(request) and "exclude_input_in_output" not in self.inputs
        return TokenSequence(self.text, stops_of(request), max_tokens, skip=len(prompt) if includes_prompt else 0)

    def _streams(self, request: GenerationRequest) -> bool:
        # A stop string can begin in the middle of a token, so the text of each token is looked at.
        return self.decoupled and (bool(request.stream) or bool(request.stop))

    def _input(self, field: str, *names: str) -> str:
        name = next((name for name in names if name in self.inputs), None)
        if name is None:
            raise invalid(
                f"{field}: model {self.target!r} has no input {' or '.join(names)}; leave it out", field, UNSUPPORTED
            )
        return name

    def _scalar(self, name: str, value: float) -> npt.NDArray[Any]:
        dtype = _DTYPES[self.inputs[name]]
        if dtype is np.uint64:
            value = int(value) % (1 << 64)
        return np.array([[value]], dtype)

    def _bias(self, biases: Mapping[str, float]) -> npt.NDArray[Any]:
        bias = np.zeros((1, self.text.tokenizer.vocab_size), np.float32)
        for key, value in biases.items():
            if not (key.isascii() and key.isdigit() and int(key[:10]) < bias.shape[1] and len(key) <= 10):
                raise invalid(f"logit_bias: {key[:100]!r} is no token id below {bias.shape[1]}", "logit_bias")
            bias[0, int(key)] = value
        return bias


def _strings(text: str) -> npt.NDArray[Any]:
    array = np.empty((1, 1), np.object_)
    array[0, 0] = text.encode()
    return array


@dataclass(slots=True)
class Piece:
    """What a response of the server adds to a choice."""

    text: str = ""
    tokens: tuple[tuple[int, float], ...] = ()  # token and log-probability, if they were asked for


class TokenSequence:
    """One choice: tokens come in, text goes out."""

    def __init__(self, text: ChatTokenizer, stops: Sequence[str], max_tokens: int, *, skip: int = 0) -> None:
        self._tokenizer = text.tokenizer
        self._stops = StopStrings(stops)
        self._context: list[int] = []
        self._max_tokens = max_tokens
        self._skip = skip
        self.count = 0  # tokens so far

    @property
    def is_stopped(self) -> bool:
        """Whether a stop string has come: nothing after it counts."""
        return self._stops.found

    def add(self, response: Any) -> Piece:
        """What a ModelInferResponse adds."""
        outputs = outputs_of(response)
        found, length = outputs.get("output_ids"), outputs.get("sequence_length")
        if found is None or length is None:
            return Piece()
        ids = found[0, 0].tolist()[: int(length[0, 0])]  # type: ignore[call-overload]
        if self._skip:
            ids, self._skip = ids[self._skip :], 0
        self.count += len(ids)
        if not ids:
            return Piece()
        text = self._stops.pass_on(piece(self._tokenizer, self._context, ids))
        self._context = [*self._context, *ids][-4 * CONTEXT_TOKENS :]
        return Piece(text, self._logprobs(ids, outputs.get("output_log_probs")))

    def end(self) -> Piece:
        """The text that was held back."""
        return Piece(self._stops.pass_on(piece(self._tokenizer, self._context, []), ends=True))

    @property
    def finish_reason(self) -> str:
        """ "length" if the response has as many tokens as it may have, and otherwise "stop"."""
        return "length" if self.count >= self._max_tokens and not self._stops.found else "stop"

    def _logprobs(self, ids: Sequence[int], found: Any) -> tuple[tuple[int, float], ...]:
        if found is None:
            return ()
        values = found.reshape(-1).tolist()[: self.count][-len(ids) :]  # an engine may send those of all tokens so far
        return tuple(zip(ids, values, strict=True))
