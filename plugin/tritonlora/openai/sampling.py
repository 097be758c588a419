# SPDX-FileCopyrightText: the tritonlora authors
# SPDX-License-Identifier: Apache-2.0
"""Which fields of a request become which inputs of the server's model.

Rule: a field that the model has no input for is refused by name. A field with a neutral value, such as a penalty of 0,
is left out. What a request leaves out is left to the engine, whose default is the likeliest token.
"""

from __future__ import annotations

import json
import secrets
from collections.abc import Mapping
from typing import Any

from tritonlora.openai.api_error import UNSUPPORTED, invalid
from tritonlora.openai.schema import ChatRequest, CompletionRequest, GenerationRequest

_NEUTRAL: Mapping[str, tuple[float, ...]] = {
    "top_k": (0, -1),
    "frequency_penalty": (0,),
    "presence_penalty": (0,),
    "repetition_penalty": (1,),
    "min_tokens": (0,),
}
_OF_CHANCE = {"temperature", "top_p", "top_k", "seed"}
_NUMBERS = ("temperature", "top_p", "seed", *_NEUTRAL)


def numbers_of(request: GenerationRequest) -> dict[str, float]:
    """The sampling fields of a request that are not neutral, so that TensorRT-LLM does what OpenAI's API says.

    Without top_k and top_p TensorRT-LLM takes the likeliest token, whatever the temperature is. Without a seed it takes
    the same tokens each time.
    """
    given = {name: value for name in _NUMBERS if (value := getattr(request, name)) is not None}
    found = {name: value for name, value in given.items() if value not in _NEUTRAL.get(name, ())}
    if found.get("temperature") == 0 or found.get("top_p") == 0:
        return {name: value for name, value in found.items() if name not in _OF_CHANCE}
    if "temperature" in found and not {"top_p", "top_k"} & found.keys():
        found["top_p"] = 1.0
    if _OF_CHANCE & found.keys():
        found.setdefault("seed", secrets.randbits(31))
    return found


def stops_of(request: GenerationRequest) -> list[str]:
    """The stop strings of a request."""
    stop = request.stop
    return [] if stop is None else [stop] if isinstance(stop, str) else stop


def most_tokens(request: GenerationRequest) -> int | None:
    """The longest response that a request allows; None if it does not say."""
    fields = [request.max_tokens]
    if isinstance(request, ChatRequest):
        fields.append(request.max_completion_tokens)
    given = {one for one in fields if one is not None}
    if len(given) > 1:
        raise invalid("max_tokens and max_completion_tokens differ; send one", "max_tokens")
    return next(iter(given), None)


def wants_logprobs(request: GenerationRequest) -> bool:
    """Whether a request asks for the log-probabilities of its tokens. ApiError when it asks for those of others."""
    if isinstance(request, ChatRequest):
        if request.top_logprobs:
            raise invalid(
                "top_logprobs: the engine tells the chosen token's alone; send 0", "top_logprobs", UNSUPPORTED
            )
        return bool(request.logprobs)
    if isinstance(request, CompletionRequest) and request.logprobs:
        raise invalid("logprobs: the engine tells the chosen token's alone; send 0", "logprobs", UNSUPPORTED)
    return isinstance(request, CompletionRequest) and request.logprobs is not None


_FORMATS = ("response_format", "guided_json", "guided_regex", "guided_grammar")


def guide_of(request: GenerationRequest) -> tuple[str, str, str] | None:
    """(field, kind, guide) of guided decoding, with the kinds of TensorRT-LLM; None if the request asks for none."""
    given = [name for name in _FORMATS if getattr(request, name) is not None]
    found: list[tuple[str, str, str]] = []
    for name in given:
        value: Any = getattr(request, name)
        if name == "response_format":
            if (value.type == "json_schema") != (value.json_schema is not None):
                raise invalid("response_format: json_schema goes with the type 'json_schema'", "response_format")
            if value.type == "json_object":
                found.append((name, "json", ""))
            elif value.json_schema is not None:
                found.append((name, "json_schema", json.dumps(value.json_schema.json_schema)))
        elif name == "guided_json":
            found.append((name, "json_schema", value if isinstance(value, str) else json.dumps(value)))
        else:
            found.append((name, {"guided_regex": "regex", "guided_grammar": "ebnf_grammar"}[name], value))
    if len(found) > 1:
        raise invalid(f"{' and '.join(one[0] for one in found)}: send one of them", found[1][0])
    return found[0] if found else None
