# SPDX-FileCopyrightText: the tritonlora authors
# SPDX-License-Identifier: Apache-2.0
"""The LLM API's model as the door asks it, through the resolver or the router: text in, text out.

The model does not tell how many tokens its text has. The base model's tokenizer counts them.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from tritonlora.openai.api_error import invalid
from tritonlora.openai.chat_tokenizer import ChatTokenizer
from tritonlora.openai.sampling import guide_of, numbers_of, stops_of, wants_logprobs
from tritonlora.openai.schema import GenerationRequest
from tritonlora.openai.served_model import Declared, Inputs, Piece, Source, with_choice
from tritonlora.openai.stop_strings import StopStrings
from tritonlora.openai.triton_client import outputs_of, text
from tritonlora.serving.tokenizer import Tokenizer

_PREFIX = "sampling_param_"
_SEED = "sampling_param_seed"
_NEW, _WHOLE, _REASON = "text_diff", "text_output", "finish_reason"


@dataclass(frozen=True, slots=True)
class LlmApiModel:
    """The model that leads to the LLM API's model. It implements `served_model.ServedModel`."""

    model: str
    target: str
    declared: Declared
    decoupled: bool
    text: ChatTokenizer
    has_new_text: bool  # as the router does; otherwise a response has only the whole text so far

    def request_inputs(self, request: GenerationRequest, source: Source, max_tokens: int) -> Inputs:
        """The inputs that all choices of a request share. ApiError naming a field that the model has no input for."""
        declared = self.declared
        if source.text is None:
            raise invalid("prompt: the model takes text; send no tokens", "prompt")
        scalars: dict[str, float | str] = {
            "text_input": self.text.without_start(source.text) if source.is_rendered else source.text,
            "sampling_param_max_tokens": max_tokens,
        }
        scalars |= {declared.name(field, _PREFIX + field): value for field, value in numbers_of(request).items()}
        for field, is_asked in (
            ("ignore_eos", bool(request.ignore_eos)),
            ("logit_bias", bool(request.logit_bias)),
            ("logprobs", wants_logprobs(request)),
            ((guide_of(request) or ("",))[0], guide_of(request) is not None),
        ):
            if is_asked:
                declared.name(field)
        if "return_finish_reason" in declared.types:
            scalars["return_finish_reason"] = True
        if self.decoupled and request.stream:
            scalars["streaming"] = True
        inputs = {name: declared.scalar(name, value) for name, value in scalars.items()} | declared.split_key(request)
        if stops := stops_of(request):
            inputs[declared.name("stop", "sampling_param_stop")] = declared.strings(stops)
        return inputs

    def choice_inputs(self, inputs: Inputs, lora_name: str | None, number: int) -> Inputs:
        """The inputs of choice `number`: with its adapter, and a seed of its own if there is a seed."""
        return with_choice(self.declared, inputs, (_SEED,), lora_name, number)

    def outputs(self, request: GenerationRequest) -> list[str]:
        """The outputs to ask for. The model takes a stop string out again, which only the whole text shows."""
        reason = [_REASON] if "return_finish_reason" in self.declared.types else []
        return [_NEW if self.has_new_text and not request.stop else _WHOLE, *reason]

    def stop_inputs(self) -> Inputs | None:
        """None: the model has no request that ends another one. Only the router learns that the call was closed."""
        return None

    def sequence(self, request: GenerationRequest, source: Source, max_tokens: int) -> TextSequence:  # noqa: ARG002
        """The state of one choice."""
        return TextSequence(self.text.tokenizer, stops_of(request), max_tokens)


class TextSequence:
    """One choice: text comes in pieces or whole, and goes out in pieces. It implements `served_model.ChoiceState`."""

    def __init__(self, tokenizer: Tokenizer, stops: Sequence[str], max_tokens: int) -> None:
        self._tokenizer = tokenizer
        self._stops = StopStrings(stops)
        self._max_tokens = max_tokens
        self._said = ""  # the reason to end, as the model says
        self._received = ""  # the whole text so far
        self._passed = ""  # the text that went out

    @property
    def count(self) -> int:
        """The tokens of the text so far."""
        return len(self._tokenizer.encode(self._passed, False))

    @property
    def is_stopped(self) -> bool:
        """Whether a stop string has come: nothing after it counts."""
        return self._stops.found

    @property
    def finish_reason(self) -> str:
        """As the model says, or "length" if the text has as many tokens as it may have."""
        said = self._said or ("length" if self.count >= self._max_tokens else "stop")
        return "stop" if self._stops.found else said

    def add(self, response: Any) -> Piece:
        """What a ModelInferResponse adds."""
        outputs = outputs_of(response)
        self._said = text(outputs.get(_REASON, b"")) or self._said
        before = len(self._received)
        self._received = text(outputs[_WHOLE]) if _WHOLE in outputs else self._received + text(outputs.get(_NEW, b""))
        return self._pass_on(self._stops.pass_on(self._received[before:]))

    def end(self) -> Piece:
        """The text that was held back, unless the model has taken it out as the beginning of a stop string."""
        return self._pass_on("" if self._stops.found else self._received[len(self._passed) :])

    def _pass_on(self, passed: str) -> Piece:
        self._passed += passed
        return Piece(passed)
