# SPDX-FileCopyrightText: the tritonlora authors
# SPDX-License-Identifier: Apache-2.0
"""The bodies of requests. A field that is not declared here is refused by name, and null means that it is absent.

Fields and bounds are those of OpenAI's API reference. top_k, min_tokens, repetition_penalty, ignore_eos and guided_*
are extensions with the names of vLLM.
"""

from __future__ import annotations

import secrets
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, PrivateAttr

MOST_CHOICES = 128
MOST_STOPS = 16
INT32 = (1 << 31) - 1
INT64 = (1 << 63) - 1024  # the largest that is a double, too, as readers of JSON have it

Text = Annotated[str, Field(max_length=1 << 24)]
Finite = Annotated[float, Field(allow_inf_nan=False)]
Stop = Annotated[str, Field(min_length=1, max_length=1000)]


class _Strict(BaseModel):
    model_config = ConfigDict(extra="forbid", strict=True)


class StreamOptions(_Strict):
    """What a stream contains beside its text."""

    include_usage: bool | None = None
    include_obfuscation: Literal[False] | None = None


class JsonSchema(_Strict):
    """The JSON schema that a response has to follow."""

    name: str
    description: str | None = None
    strict: bool | None = None
    json_schema: dict[str, Any] = Field(alias="schema")


class ResponseFormat(_Strict):
    """The form of a response."""

    type: Literal["text", "json_object", "json_schema"]
    json_schema: JsonSchema | None = None


class GenerationRequest(_Strict):
    """The fields that both endpoints take."""

    model: Annotated[str, Field(min_length=1, max_length=1000)]
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    n: Annotated[int, Field(ge=1, le=MOST_CHOICES)] | None = None
    max_tokens: Annotated[int, Field(ge=1, le=INT64)] | None = None
    min_tokens: Annotated[int, Field(ge=0, le=INT32)] | None = None
    temperature: Annotated[Finite, Field(ge=0, le=2)] | None = None
    top_p: Annotated[Finite, Field(ge=0, le=1)] | None = None
    top_k: Annotated[int, Field(ge=-1, le=INT32)] | None = None
    seed: Annotated[int, Field(ge=-INT64, le=INT64)] | None = None
    stop: Annotated[list[Stop], Field(max_length=MOST_STOPS)] | Stop | None = None
    frequency_penalty: Annotated[Finite, Field(ge=-2, le=2)] | None = None
    presence_penalty: Annotated[Finite, Field(ge=-2, le=2)] | None = None
    repetition_penalty: Annotated[Finite, Field(gt=0, le=100)] | None = None
    logit_bias: dict[str, Annotated[Finite, Field(ge=-100, le=100)]] | None = None
    ignore_eos: bool | None = None
    response_format: ResponseFormat | None = None
    guided_json: dict[str, Any] | str | None = None
    guided_regex: str | None = None
    guided_grammar: str | None = None
    user: Text | None = None  # gets the same adapter each time from an alias that is divided between adapters
    # Without effect on the response.
    metadata: dict[str, Any] | None = None
    service_tier: Literal["auto", "default"] | None = None
    store: Literal[False] | None = None
    _own_key: str = PrivateAttr(default_factory=lambda: secrets.token_hex(16))

    @property
    def split_key(self) -> str:
        """The key by which all choices of the request get the same adapter of an alias: the user, or a random one."""
        return self.user or self._own_key


class CompletionRequest(GenerationRequest):
    """A request of /v1/completions."""

    prompt: Text | list[int] | list[Text] | list[list[int]]
    logprobs: Annotated[int, Field(ge=0, le=5)] | None = None
    echo: Literal[False] | None = None
    best_of: Literal[1] | None = None


class TextPart(_Strict):
    """A part of a message."""

    type: Literal["text"]
    text: Text


class Message(_Strict):
    """A message of a conversation."""

    role: Literal["system", "developer", "user", "assistant", "tool"]
    content: Text | list[TextPart] | None = None
    name: str | None = None
    tool_calls: list[dict[str, Any]] | None = None
    tool_call_id: str | None = None
    refusal: None = None


class Tool(_Strict):
    """A function that the template tells the model about."""

    type: Literal["function"]
    function: dict[str, Any]


class ChatRequest(GenerationRequest):
    """A request of /v1/chat/completions."""

    messages: Annotated[list[Message], Field(min_length=1)]
    max_completion_tokens: Annotated[int, Field(ge=1, le=INT64)] | None = None
    logprobs: bool | None = None
    top_logprobs: Annotated[int, Field(ge=0, le=20)] | None = None
    tools: list[Tool] | None = None
    tool_choice: Literal["none"] | None = None
    parallel_tool_calls: bool | None = None
    safety_identifier: str | None = None
    prompt_cache_key: str | None = None


class ErrorDetail(BaseModel):
    """An error, as OpenAI's API describes it."""

    message: str
    type: str
    param: str | None
    code: str | None


class ErrorBody(BaseModel):
    """The body of a response with an error."""

    error: ErrorDetail
