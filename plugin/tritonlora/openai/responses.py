# SPDX-FileCopyrightText: the tritonlora authors
# SPDX-License-Identifier: Apache-2.0
"""The JSON of responses: whole, and as the events of a stream.

The parts of an event that all events of a request share are rendered once, because an engine has thousands of tokens a
second.
"""

from __future__ import annotations

import json
import secrets
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

DONE = b"data: [DONE]\n\n"


@dataclass(frozen=True, slots=True)
class Kind:
    """What differs between the two endpoints."""

    prefix: str
    whole: str
    chunk: str


CHAT = Kind("chatcmpl-", "chat.completion", "chat.completion.chunk")
COMPLETION = Kind("cmpl-", "text_completion", "text_completion")


@dataclass(slots=True)
class Choice:
    """One whole choice."""

    index: int
    text: str
    finish_reason: str
    tokens: int
    logprobs: list[tuple[str, float]] | None = None


@dataclass(frozen=True, slots=True)
class Header:
    """What all events of one request share."""

    kind: Kind
    model: str
    id: str = ""
    created: int = field(default_factory=lambda: int(time.time()))

    def fields(self, object_name: str) -> dict[str, Any]:
        return {"id": self.id, "object": object_name, "created": self.created, "model": self.model}


def header(kind: Kind, model: str) -> Header:
    """The header of a new response."""
    return Header(kind, model, kind.prefix + secrets.token_hex(16))


def usage(prompt_tokens: int, completion_tokens: int) -> dict[str, int]:
    """The tokens of a response."""
    return {
        "prompt_tokens": prompt_tokens,
        "completion_tokens": completion_tokens,
        "total_tokens": prompt_tokens + completion_tokens,
    }


def whole(head: Header, choices: Sequence[Choice], tokens: Mapping[str, int]) -> dict[str, Any]:
    """The body of a response that is not streamed."""
    rendered = []
    for one in choices:
        if head.kind is CHAT:
            content: dict[str, Any] = {"message": {"role": "assistant", "content": one.text, "refusal": None}}
        else:
            content = {"text": one.text}
        logprobs = None if one.logprobs is None else logprobs_of(head.kind, one.logprobs)
        rendered.append({"index": one.index, **content, "logprobs": logprobs, "finish_reason": one.finish_reason})
    return {**head.fields(head.kind.whole), "choices": rendered, "usage": dict(tokens)}


def logprobs_of(kind: Kind, found: Sequence[tuple[str, float]], offset: int = 0) -> dict[str, Any]:
    """The log-probabilities of tokens, each with its text. `offset` is the length of the text before them."""
    if kind is CHAT:
        entries = [
            {"token": text, "logprob": value, "bytes": list(text.encode()), "top_logprobs": []} for text, value in found
        ]
        return {"content": entries, "refusal": None}
    offsets = []
    for text, _ in found:
        offsets.append(offset)
        offset += len(text)
    return {
        "tokens": [text for text, _ in found],
        "token_logprobs": [value for _, value in found],
        "top_logprobs": None,
        "text_offset": offsets,
    }


class Events:
    """The events of one request, as bytes."""

    def __init__(self, head: Header, *, include_usage: bool) -> None:
        fields = json.dumps(head.fields(head.kind.chunk), ensure_ascii=False)
        self._head = head
        self._start = f"data: {fields[:-1]}, "
        self._end = ', "usage": null}\n\n' if include_usage else "}\n\n"
        self._is_chat = head.kind is CHAT
        content = '"delta": {"content": ' if self._is_chat else '"text": '
        close = "}" if self._is_chat else ""
        self._text_end = f'{close}, "logprobs": null, "finish_reason": null}}]{self._end}'
        self._content = content

    def first(self, index: int) -> bytes:
        """The event before the first text of a choice; b"" where there is none."""
        if not self._is_chat:
            return b""
        return self._event({"index": index, "delta": {"role": "assistant", "content": ""}, **_NOT_FINISHED})

    def text(self, index: int, text: str, logprobs: dict[str, Any] | None = None) -> bytes:
        """The event of a piece of text."""
        if logprobs is None:
            encoded = _ENCODE(text)
            return f'{self._start}"choices": [{{"index": {index}, {self._content}{encoded}{self._text_end}'.encode()
        content = {"delta": {"content": text}} if self._is_chat else {"text": text}
        return self._event({"index": index, **content, "logprobs": logprobs, "finish_reason": None})

    def finish(self, index: int, reason: str) -> bytes:
        """The last event of a choice."""
        content: dict[str, Any] = {"delta": {}} if self._is_chat else {"text": ""}
        return self._event({"index": index, **content, "logprobs": None, "finish_reason": reason})

    def usage(self, tokens: Mapping[str, int]) -> bytes:
        """The event with the usage, which has no choices."""
        return f'{self._start}"choices": [], "usage": {json.dumps(tokens)}}}\n\n'.encode()

    def _event(self, choice: Mapping[str, Any]) -> bytes:
        return f'{self._start}"choices": [{json.dumps(choice, ensure_ascii=False)}]{self._end}'.encode()


_NOT_FINISHED = {"logprobs": None, "finish_reason": None}
_ENCODE = json.JSONEncoder(ensure_ascii=False).encode


def error_event(body: Mapping[str, Any]) -> bytes:
    """The event of a stream that failed."""
    return f"data: {json.dumps(body)}\n\n".encode()
