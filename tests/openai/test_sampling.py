# SPDX-FileCopyrightText: the tritonlora authors
# SPDX-License-Identifier: Apache-2.0
"""Fields of requests, as numbers for the engine."""

from __future__ import annotations

from typing import Any

import pytest

from tritonlora.openai.api_error import ApiError
from tritonlora.openai.sampling import guide_of, most_tokens, numbers_of, wants_logprobs
from tritonlora.openai.schema import ChatRequest, CompletionRequest

CHAT = {"model": "m", "messages": [{"role": "user", "content": "x"}]}


def chat(**fields: Any) -> ChatRequest:
    """A request of /v1/chat/completions."""
    return ChatRequest.model_validate({**CHAT, **fields})


@pytest.mark.parametrize(
    ("fields", "expected"),
    [
        ({}, {}),
        ({"temperature": 0, "seed": 5, "top_p": 0.5}, {}),
        ({"top_p": 0.0, "temperature": 1.0}, {}),
        ({"temperature": 0.5, "seed": 5}, {"temperature": 0.5, "top_p": 1.0, "seed": 5}),
        ({"temperature": 0.5, "top_k": 3, "seed": 5}, {"temperature": 0.5, "top_k": 3, "seed": 5}),
        ({"top_k": -1, "presence_penalty": 0, "repetition_penalty": 1.0, "min_tokens": 0}, {}),
        ({"frequency_penalty": 0.5, "min_tokens": 2}, {"frequency_penalty": 0.5, "min_tokens": 2}),
        ({"temperature": None, "seed": None}, {}),
    ],
)
def test_fields_become_what_tensorrt_llm_makes_of_them(fields: dict[str, Any], expected: dict[str, float]) -> None:
    """0 is the likeliest token; a temperature alone would not be chance; neutral values are left out."""
    assert expected == numbers_of(chat(**fields))


def test_chance_without_a_seed_differs_each_time() -> None:
    """The engine's own seed is the same one each time."""
    seeds = {numbers_of(chat(temperature=1.0))["seed"] for _ in range(8)}

    assert len(seeds) > 1


def test_both_names_of_the_longest_response_agree_or_are_refused() -> None:
    """max_tokens is the older one."""
    assert [None, 3, 4, 5] == [
        most_tokens(chat()),
        most_tokens(chat(max_tokens=3)),
        most_tokens(chat(max_completion_tokens=4)),
        most_tokens(chat(max_tokens=5, max_completion_tokens=5)),
    ]
    with pytest.raises(ApiError, match="max_tokens and max_completion_tokens differ"):
        most_tokens(chat(max_tokens=3, max_completion_tokens=4))


def test_log_probabilities_of_other_tokens_are_refused_by_name() -> None:
    """The engine tells the chosen token's alone."""
    completion = {"model": "m", "prompt": "x"}
    assert wants_logprobs(chat(logprobs=True, top_logprobs=0))
    assert wants_logprobs(CompletionRequest.model_validate({**completion, "logprobs": 0}))
    assert not wants_logprobs(CompletionRequest.model_validate(completion))
    with pytest.raises(ApiError, match="top_logprobs: the engine tells"):
        wants_logprobs(chat(logprobs=True, top_logprobs=2))
    with pytest.raises(ApiError, match="logprobs: the engine tells"):
        wants_logprobs(CompletionRequest.model_validate({**completion, "logprobs": 1}))


SCHEMA = {"type": "object"}


@pytest.mark.parametrize(
    ("fields", "expected"),
    [
        ({"response_format": {"type": "text"}}, None),
        ({"response_format": {"type": "json_object"}}, ("response_format", "json", "")),
        (
            {"response_format": {"type": "json_schema", "json_schema": {"name": "x", "schema": SCHEMA}}},
            ("response_format", "json_schema", '{"type": "object"}'),
        ),
        ({"guided_json": SCHEMA}, ("guided_json", "json_schema", '{"type": "object"}')),
        ({"guided_regex": "a+"}, ("guided_regex", "regex", "a+")),
        ({"guided_grammar": "root ::= x"}, ("guided_grammar", "ebnf_grammar", "root ::= x")),
    ],
)
def test_guides_have_the_kinds_of_tensorrt_llm(fields: dict[str, Any], expected: tuple[str, str, str] | None) -> None:
    """executor::GuidedDecodingParams::GuideType."""
    assert expected == guide_of(chat(**fields))


@pytest.mark.parametrize(
    "fields",
    [
        {"guided_regex": "a", "guided_json": SCHEMA},
        {"response_format": {"type": "json_schema"}},
        {"response_format": {"type": "text", "json_schema": {"name": "x", "schema": SCHEMA}}},
    ],
)
def test_guides_that_contradict_each_other_are_refused(fields: dict[str, Any]) -> None:
    """With their names."""
    with pytest.raises(ApiError, match="guided_|json_schema"):
        guide_of(chat(**fields))
