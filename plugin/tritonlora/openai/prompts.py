# SPDX-FileCopyrightText: the tritonlora authors
# SPDX-License-Identifier: Apache-2.0
"""The prompts of a request, as tokens that fit the engine's context."""

from __future__ import annotations

import asyncio
from typing import Any

from tritonlora.openai.api_error import TOO_LONG, invalid
from tritonlora.openai.discovery import Served
from tritonlora.openai.generation import Prompt
from tritonlora.openai.sampling import most_tokens
from tritonlora.openai.schema import ChatRequest, CompletionRequest, GenerationRequest, Message
from tritonlora.openai.served_model import Source

MOST_PROMPTS = 256
_LONG = 20_000  # characters, for which a tokenizer takes milliseconds
_INT32 = (1 << 31) - 1


async def chat_prompt(served: Served, request: ChatRequest) -> Prompt:
    """The conversation of a request. ApiError when it has no template or does not fit."""
    messages = [_for_template(message) for message in request.messages]
    tools = [tool.model_dump() for tool in request.tools] if request.tools else None
    own = served.templates.template_of(request.model) if served.templates else None
    text = served.model.text.render(messages, tools, own)
    source = Source(text, await _tokens(served, text, "messages", is_rendered=True), is_rendered=True)
    return _prompt(served, request, source, "messages")


async def completion_prompts(served: Served, request: CompletionRequest) -> list[Prompt]:
    """The prompts of a request. ApiError when one of them does not fit."""
    given: Any = request.prompt
    prompts = [given] if isinstance(given, str) or (given and isinstance(given[0], int)) else given
    if not 1 <= len(prompts) <= MOST_PROMPTS:
        raise invalid(f"prompt: send 1 to {MOST_PROMPTS} prompts, got {len(prompts)}", "prompt")
    found = []
    for one in prompts:
        if isinstance(one, str):
            source = Source(one, await _tokens(served, one, "prompt", is_rendered=False))
        else:
            source = Source(None, one)
        found.append(_prompt(served, request, source, "prompt"))
    return found


def _for_template(message: Message) -> dict[str, Any]:
    """A message with its text as one string, as templates expect it."""
    fields = message.model_dump(exclude_none=True)
    if isinstance(message.content, list):
        fields["content"] = "\n".join(part.text for part in message.content)
    return fields


async def _tokens(served: Served, text: str, field: str, *, is_rendered: bool) -> list[int]:
    tokenizer, context = served.model.text, served.context_length
    if context is not None and len(text) > context * tokenizer.longest_token:  # tokenizing it would take seconds
        raise invalid(f"{field}: the context has {context} tokens, too few for {len(text)} characters", field, TOO_LONG)
    if len(text) > _LONG:
        return await asyncio.to_thread(tokenizer.tokens, text, is_rendered=is_rendered)
    return tokenizer.tokens(text, is_rendered=is_rendered)


def _prompt(served: Served, request: GenerationRequest, source: Source, field: str) -> Prompt:
    """The inputs of a prompt. ApiError when the prompt and the response do not fit the context."""
    tokens = source.tokens
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
            TOO_LONG,
        )
    max_tokens = most or (context or 0) - len(tokens)
    if max_tokens > _INT32:
        raise invalid(f"max_tokens: at most {_INT32}, got {max_tokens}", "max_tokens")
    if (request.min_tokens or 0) > max_tokens:
        raise invalid(f"min_tokens is {request.min_tokens}, and max_tokens is {max_tokens}", "min_tokens")
    return Prompt(source, served.model.request_inputs(request, source, max_tokens), max_tokens)
