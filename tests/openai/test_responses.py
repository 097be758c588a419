# SPDX-FileCopyrightText: the tritonlora authors
# SPDX-License-Identifier: Apache-2.0
"""The events of a stream, as the official client's types read them."""

from __future__ import annotations

import json
from typing import Any

import pytest
from openai.types import Completion
from openai.types.chat import ChatCompletion, ChatCompletionChunk

from tritonlora.openai import responses
from tritonlora.openai.responses import CHAT, COMPLETION, Choice, Events, Kind, header, logprobs_of, usage, whole

TEXTS = ["a", 'quote " and \\ and \n', "é日🎉", "\u2028", "\x00"]


def parsed(event: bytes) -> Any:
    """The JSON of an event."""
    assert event.startswith(b"data: ")
    assert event.endswith(b"\n\n")
    assert event.count(b"\n") == 2
    return json.loads(event[len(b"data: ") :])


@pytest.mark.parametrize("kind", [CHAT, COMPLETION])
@pytest.mark.parametrize("include_usage", [True, False])
@pytest.mark.parametrize("text", TEXTS)
def test_events_are_chunks_of_the_official_client(kind: Kind, include_usage: bool, text: str) -> None:
    """Text, reason and usage; usage is null in all events but the last, if it was asked for."""
    events = Events(header(kind, 'a "model" ü'), include_usage=include_usage)
    bodies = [parsed(events.text(3, text)), parsed(events.finish(3, "stop"))]
    chunk: Any = ChatCompletionChunk if kind is CHAT else Completion
    first, last = (chunk.construct(**body) for body in bodies)

    found = first.choices[0].delta.content if kind is CHAT else first.choices[0].text
    assert (3, text, None) == (first.choices[0].index, found, first.choices[0].finish_reason)
    assert (3, "stop", 'a "model" ü') == (last.choices[0].index, last.choices[0].finish_reason, last.model)
    assert [include_usage] * 2 == ["usage" in body for body in bodies]
    counted = chunk.construct(**parsed(events.usage(usage(2, 5))))
    assert ([], 7) == (counted.choices, counted.usage.total_tokens)


def test_the_first_event_of_a_conversation_names_the_role() -> None:
    """Completions have none."""
    event = parsed(Events(header(CHAT, "m"), include_usage=False).first(0))

    assert "assistant" == ChatCompletionChunk.model_validate(event).choices[0].delta.role
    assert b"" == Events(header(COMPLETION, "m"), include_usage=False).first(0)


def test_a_whole_response_is_the_official_client_s() -> None:
    """With the log-probabilities, and the place of each token in the text."""
    choices = [Choice(0, "ab", "stop", 2, [("a", -0.5), ("b", -1.0)])]
    chat = ChatCompletion.model_validate(whole(header(CHAT, "m"), choices, usage(1, 2)))
    text = Completion.model_validate(whole(header(COMPLETION, "m"), choices, usage(1, 2)))

    assert ("ab", 3) == (chat.choices[0].message.content, chat.usage.total_tokens if chat.usage else 0)
    assert chat.choices[0].logprobs is not None
    assert chat.choices[0].logprobs.content is not None
    assert [("a", -0.5), ("b", -1.0)] == [(one.token, one.logprob) for one in chat.choices[0].logprobs.content]
    assert text.choices[0].logprobs is not None
    assert ["a", "b"] == text.choices[0].logprobs.tokens
    assert [7, 8] == logprobs_of(COMPLETION, [("a", -0.5), ("b", -1.0)], 7)["text_offset"]
    assert b"data: [DONE]\n\n" == responses.DONE
