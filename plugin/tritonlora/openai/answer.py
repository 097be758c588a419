# SPDX-FileCopyrightText: the tritonlora authors
# SPDX-License-Identifier: Apache-2.0
"""The response to one request, which is generated while it is sent."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, Sequence
from contextlib import aclosing
from typing import Any

from starlette.responses import JSONResponse, Response
from starlette.types import Receive, Scope, Send

from tritonlora.openai import responses
from tritonlora.openai.api_error import ApiError
from tritonlora.openai.discovery import Served
from tritonlora.openai.generation import Audience, Generations, Prompt
from tritonlora.openai.metrics import record_of
from tritonlora.openai.sampling import wants_logprobs
from tritonlora.openai.schema import GenerationRequest
from tritonlora.openai.served_model import ChoiceState, Piece
from tritonlora.openai.tracing import headers_of


class Answer(Response):
    """Generates while it is sent. A client that leaves ends its requests in the engine."""

    def __init__(
        self,
        generations: Generations,
        served: Served,
        request: GenerationRequest,
        prompts: list[Prompt],
        kind: responses.Kind,
    ) -> None:
        self.background = None
        self._generations = generations
        self._served = served
        self._request = request
        self._head = responses.header(kind, request.model)
        self._prompts = prompts
        self._audience = Audience()
        self._sequences: list[ChoiceState] = []
        self._choices = [(prompt, number) for prompt in prompts for number in range(request.n or 1)]

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        self._audience.record = record = record_of(scope)
        self._audience.trace_headers = headers_of(scope)
        record.prompt_tokens = sum(len(prompt.source.tokens) for prompt in self._prompts)
        work = asyncio.create_task(self._stream(send) if self._request.stream else self._whole(scope, receive, send))
        gone = asyncio.create_task(_disconnected(receive))
        try:
            await asyncio.wait((work, gone), return_when=asyncio.FIRST_COMPLETED)
        finally:
            gone.cancel()
            record.has_left = not work.done()
            record.generated_tokens = sum(sequence.count for sequence in self._sequences)
            self._leave([work])
        if work.done():
            work.result()

    def _leave(self, tasks: Sequence[asyncio.Task[Any]]) -> None:
        """Let tasks that have not ended end by themselves, with their next token."""
        for task in tasks:
            if not task.done():
                self._audience.has_left = True
                self._generations.leave(task)

    def _pieces(self, index: int) -> tuple[ChoiceState, AsyncGenerator[Piece, None]]:
        prompt, number = self._choices[index]
        sequence = self._served.model.sequence(self._request, prompt.source, prompt.max_tokens)
        self._sequences.append(sequence)
        return sequence, self._generations.run(self._served, self._request, prompt, sequence, number, self._audience)

    async def _whole(self, scope: Scope, receive: Receive, send: Send) -> None:
        tasks = [asyncio.create_task(self._choice(index)) for index in range(len(self._choices))]
        try:
            choices = await asyncio.gather(*tasks)
        finally:
            self._leave(tasks)
        body = responses.whole(self._head, choices, self._usage(sum(one.tokens for one in choices)))
        await JSONResponse(body)(scope, receive, send)

    async def _choice(self, index: int) -> responses.Choice:
        sequence, pieces = self._pieces(index)
        texts, logprobs = [], []
        async with aclosing(pieces):
            async for part in pieces:
                texts.append(part.text)
                logprobs += self._logprobs(part)
        return responses.Choice(
            index, "".join(texts), sequence.finish_reason, sequence.count,
            logprobs if wants_logprobs(self._request) else None,
        )  # fmt: skip

    def _logprobs(self, part: Piece) -> list[tuple[str, float]]:
        return [(self._served.model.text.tokenizer.text([token]), value) for token, value in part.logprobs]

    def _usage(self, tokens: int) -> dict[str, int]:
        return responses.usage(sum(len(prompt.source.tokens) for prompt in self._prompts), tokens)

    async def _stream(self, send: Send) -> None:
        options = self._request.stream_options
        includes_usage = bool(options and options.include_usage)
        events = responses.Events(self._head, include_usage=includes_usage)
        counts = [0] * len(self._choices)
        has_started = False
        try:
            async with aclosing(self._events(events, counts)) as found:
                async for event in found:
                    if not has_started:
                        has_started = True
                        await send({"type": "http.response.start", "status": 200, "headers": _EVENT_HEADERS})
                    await send({"type": "http.response.body", "body": event, "more_body": True})
        except ApiError as error:
            if not has_started:
                raise
            self._audience.record.failed(error)
            await send({"type": "http.response.body", "body": responses.error_event(error.body()), "more_body": False})
            return
        last = events.usage(self._usage(sum(counts))) if includes_usage else b""
        await send({"type": "http.response.body", "body": last + responses.DONE, "more_body": False})

    async def _events(self, events: responses.Events, counts: list[int]) -> AsyncGenerator[bytes, None]:
        if len(self._choices) == 1:
            async with aclosing(self._events_of(events, counts, 0)) as only:
                async for one in only:
                    yield one
            return
        queue: asyncio.Queue[bytes | Exception | None] = asyncio.Queue()

        async def put(index: int) -> None:
            try:
                async with aclosing(self._events_of(events, counts, index)) as found:
                    async for event in found:
                        queue.put_nowait(event)
                queue.put_nowait(None)
            except Exception as error:  # noqa: BLE001  it is raised where the events are taken
                queue.put_nowait(error)

        tasks = [asyncio.create_task(put(index)) for index in range(len(self._choices))]
        try:
            left = len(tasks)
            while left:
                event = await queue.get()
                if isinstance(event, Exception):
                    raise event
                if event is None:
                    left -= 1
                else:
                    yield event
        finally:
            self._leave(tasks)

    async def _events_of(self, events: responses.Events, counts: list[int], index: int) -> AsyncGenerator[bytes, None]:
        sequence, pieces = self._pieces(index)
        first, offset, wants = events.first(index), 0, wants_logprobs(self._request)
        async with aclosing(pieces):
            async for part in pieces:
                logprobs = None
                if wants:
                    logprobs = responses.logprobs_of(self._head.kind, self._logprobs(part), offset)
                    offset += len(part.text)
                if part.text or part.logprobs:
                    yield first + events.text(index, part.text, logprobs)
                    first = b""
        counts[index] = sequence.count
        yield first + events.finish(index, sequence.finish_reason)


_EVENT_HEADERS = [
    (b"content-type", b"text/event-stream; charset=utf-8"),
    (b"cache-control", b"no-cache"),
    (b"x-accel-buffering", b"no"),
]


async def _disconnected(receive: Receive) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass
