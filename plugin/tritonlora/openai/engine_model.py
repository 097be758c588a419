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
from tritonlora.openai.sampling import guide_of, numbers_of, stops_of, wants_logprobs
from tritonlora.openai.schema import GenerationRequest
from tritonlora.openai.served_model import DTYPES, Declared, Inputs, Piece, Source, with_choice
from tritonlora.openai.stop_strings import StopStrings
from tritonlora.openai.triton_client import float32s, int32s, outputs_of
from tritonlora.serving.text import CONTEXT_TOKENS, piece, word_lists

# A field of a request -> the inputs that take it in some version; the first one that the model declares is used.
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
# The inputs of a request to stop, beside the input of that name: Triton counts the required ones.
_NEEDED_TO_STOP = ("input_ids", "input_lengths", "request_output_len", "stop")
_NO_END = -1


@dataclass(frozen=True, slots=True)
class EngineModel:
    """The ensemble of the resolver and the engine, or the router. It implements `served_model.ServedModel`."""

    model: str
    target: str
    declared: Declared
    target_types: Mapping[str, str]  # input of the target -> its data type
    decoupled: bool
    text: ChatTokenizer

    def request_inputs(self, request: GenerationRequest, source: Source, max_tokens: int) -> Inputs:
        """The inputs that all choices of a request share. ApiError naming a field that the model has no input for."""
        declared, tokenizer = self.declared, self.text.tokenizer
        inputs: Inputs = {"input_ids": np.array([source.tokens], np.int32), **declared.split_key(request)}
        scalars: dict[str, float | str] = {"input_lengths": len(source.tokens), "request_output_len": max_tokens}
        scalars |= {declared.name(field, *_NUMBERS[field]): value for field, value in numbers_of(request).items()}
        if tokenizer.end_id is not None and "end_id" in declared.types:
            scalars["end_id"] = _NO_END if request.ignore_eos else tokenizer.end_id
        words = word_lists(tokenizer, [stops]) if (stops := stops_of(request)) else None
        if words is not None:
            inputs[declared.name("stop", "stop_words_list")] = words
        if request.logit_bias:
            inputs[declared.name("logit_bias", "embedding_bias")] = _bias(request.logit_bias, tokenizer.vocab_size)
        if wants_logprobs(request):
            scalars[declared.name("logprobs", "return_log_probs")] = True
        if guide := guide_of(request):
            field, kind, text = guide
            scalars[declared.name(field, "guided_decoding_guide_type")] = kind
            scalars |= {declared.name(field, "guided_decoding_guide"): text} if text else {}
        if self.decoupled:
            # Also if the client wants the whole. A stop string may begin in the middle of a token, where the engine
            # does not find it, and a client may leave. With the next token the door asks the engine to stop.
            scalars["streaming"] = True
        elif "exclude_input_in_output" in declared.types:
            scalars["exclude_input_in_output"] = True
        return inputs | {name: declared.scalar(name, value) for name, value in scalars.items()}

    def choice_inputs(self, inputs: Inputs, lora_name: str | None, number: int) -> Inputs:
        """The inputs of choice `number`: with its adapter, and a seed of its own if there is a seed."""
        return with_choice(self.declared, inputs, _NUMBERS["seed"], lora_name, number)

    def outputs(self, request: GenerationRequest) -> list[str]:
        """The outputs to ask for."""
        return ["output_ids", "sequence_length", *(["output_log_probs"] if wants_logprobs(request) else [])]

    def stop_inputs(self) -> Inputs | None:
        """The inputs of a request that ends the request with the same id; None if the target has no such input."""
        found = {name: self.target_types[name] for name in _NEEDED_TO_STOP if name in self.target_types}
        return {name: np.ones((1, 1), DTYPES[kind]) for name, kind in found.items()} if "stop" in found else None

    def sequence(self, request: GenerationRequest, source: Source, max_tokens: int) -> TokenSequence:
        """The state of one choice."""
        has_prompt = not self.decoupled and "exclude_input_in_output" not in self.declared.types
        return TokenSequence(self.text, stops_of(request), max_tokens, skip=len(source.tokens) if has_prompt else 0)


def _bias(biases: Mapping[str, float], vocab_size: int) -> npt.NDArray[np.float32]:
    """[1, vocabulary] float32."""
    bias = np.zeros((1, vocab_size), np.float32)
    for key, value in biases.items():
        if not (key.isascii() and key.isdigit() and len(key) <= 10 and int(key) < vocab_size):
            raise invalid(f"logit_bias: {key[:100]!r} is no token id below {vocab_size}", "logit_bias")
        bias[0, int(key)] = value
    return bias


class TokenSequence:
    """One choice: tokens come in, text goes out. It implements `served_model.ChoiceState`."""

    def __init__(self, text: ChatTokenizer, stops: Sequence[str], max_tokens: int, *, skip: int = 0) -> None:
        self._tokenizer = text.tokenizer
        self._stops = StopStrings(stops)
        self._context: list[int] = []
        self._max_tokens = max_tokens
        self._skip = skip  # tokens of the prompt that the engine sends first
        self.count = 0

    @property
    def is_stopped(self) -> bool:
        """Whether a stop string has come: nothing after it counts."""
        return self._stops.found

    @property
    def finish_reason(self) -> str:
        """ "length" if the response has as many tokens as it may have, and otherwise "stop"."""
        return "length" if self.count >= self._max_tokens and not self._stops.found else "stop"

    def add(self, response: Any) -> Piece:
        """What a ModelInferResponse adds."""
        outputs = outputs_of(response)
        if "output_ids" not in outputs or "sequence_length" not in outputs:
            return Piece()
        ids = int32s(outputs["output_ids"])[: int32s(outputs["sequence_length"])[0]]
        if self._skip:
            ids, self._skip = ids[self._skip :], 0
        if not ids:
            return Piece()
        self.count += len(ids)
        text = self._stops.pass_on(piece(self._tokenizer, self._context, ids))
        self._context = [*self._context, *ids][-_KEPT:]
        return Piece(text, self._logprobs(ids, outputs.get("output_log_probs")))

    def end(self) -> Piece:
        """The text that was held back."""
        return Piece(self._stops.pass_on(piece(self._tokenizer, self._context, []), ends=True))

    def _logprobs(self, ids: Sequence[int], found: bytes | None) -> tuple[tuple[int, float], ...]:
        if not found:
            return ()
        values = float32s(found)[: self.count][-len(ids) :]  # an engine may send those of all tokens so far
        return tuple(zip(ids, values, strict=True))


_KEPT = 4 * CONTEXT_TOKENS  # some of the last tokens may have no text
