# SPDX-FileCopyrightText: the tritonlora authors
# SPDX-License-Identifier: Apache-2.0
"""The prompts of a request, as tokens that fit the engine's context."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from typing import Any

from tritonlora.openai.api_error import invalid
from tritonlora.openai.discovery import Served
from tritonlora.openai.generation import Prompt
from tritonlora.openai.sampling import most_tokens
from tritonlora.openai.schema import ChatRequest, CompletionRequest, GenerationRequest, Message

MOST_PROMPTS = 256
_LONG = 20_000  # characters, for which a tokenizer takes milliseconds
_INT32 = (1 << 31) - 1


async def chat_prompt(served: Served, request: ChatRequest) -> Prompt:
    """The conversation of a request. ApiError when it has no template or does not fit."""
    messages = [_for_template(message) for message in request.messages]
    tools = [tool.model_dump() for tool in request.tools] if request.tools else None
    text = served.model.text.render(messages, tools, None)
    return _prompt(served, request, await _tokens(served, text, is_rendered=True), "messages")


async def completion_prompts(served: Served, request: CompletionRequest) -> list[Prompt]:
    """The prompts of a request. ApiError when one of them does not fit."""
    given: Any = request.prompt
    prompts = [given] if isinstance(given, str) or (given and isinstance(given[0], int)) else given
    if not 1 <= len(prompts) <= MOST_PROMPTS:
        raise invalid(f"prompt: send 1 to {MOST_PROMPTS} prompts, got {len(prompts)}", "prompt")
    found = []
    for one in prompts:
        tokens = await _tokens(served, one, is_rendered=False) if isinstance(one, str) else one
        found.append(_prompt(served, request, tokens, "prompt"))
    return found


def _for_template(message: Message) -> dict[str, Any]:
    """A message with its text as one string, as templates expect it."""
    fields = message.model_dump(exclude_none=True)
    if isinstance(message.content, list):
        fields["content"] = "\n".join(part.text for part in message.content)
    return fields


async def _tokens(served: Served, text: str, *, is_rendered: bool) -> list[int]:
    if len(text) > _LONG:
        return await asyncio.to_thread(served.model.text.tokens, text, is_rendered=is_rendered)
    return served.model.text.tokens(text, is_rendered=is_rendered)


def _prompt(served: Served, request: GenerationRequest, tokens: Sequence[int], field: str) -> Prompt:
    """The inputs of a prompt. ApiError when the prompt and the response do not fit the context."""
    if not tokens:
        raise invalid(f"{field}: the prompt has no tokens; send some text", field)
    vocabulary = served.model.text.tokenizer.vocab_size
    if not (min(tokens) >= 0 and max(tokens) < vocabulary):
        raise invalid(f"{field}: token ids must be from 0 to {vocabulary - 1}", field)
    context, most = served.context_length, most_tokens(request)
    if context is None and most is None:
        raise invalid("max_tokens: the length of the engine's context is not known here, so send it", "max_tokens")
    if context is not None and len(tokens) + (most or 1) > context:
        asked = f" and {most} of the response" if most else ""
        raise invalid(
            f"the context has {context} tokens, and the request asks for {len(tokens)} of the prompt{asked}",
            "max_tokens" if len(tokens) < context else field,
            "context_length_exceeded",
        )
    max_tokens = most or (context or 0) - len(tokens)
    if max_tokens > _INT32:
        raise invalid(f"max_tokens: at most {_INT32}, got {max_tokens}", "max_tokens")
    if (request.min_tokens or 0) > max_tokens:
        raise invalid(f"min_tokens is {request.min_tokens}, and max_tokens is {max_tokens}", "min_tokens")
    return Prompt(tokens, served.model.request_inputs(request, tokens, max_tokens), max_tokens)
