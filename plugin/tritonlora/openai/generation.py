# SPDX-FileCopyrightText: the tritonlora authors
# SPDX-License-Identifier: Apache-2.0
"""Runs the choices of a request on the server, each as a request of its own with an id of the door's own.

A request whose client has left is ended by a request to stop, because Triton does not tell the steps of an ensemble
that a client has left. The engine knows an id only once it has the request, which a first response tells.
"""

from __future__ import annotations

import asyncio
import itertools
import logging
import secrets
from collections.abc import AsyncGenerator, Mapping
from contextlib import aclosing
from dataclasses import dataclass, field
from typing import Any

from tritonlora.openai.api_error import error_of_server, stalled, unavailable
from tritonlora.openai.discovery import Served
from tritonlora.openai.metrics import Record
from tritonlora.openai.schema import GenerationRequest
from tritonlora.openai.served_model import ChoiceState, Inputs, Piece, ServedModel, Source
from tritonlora.openai.triton_client import ServerGone, ServerRefused, ServerSilent, TritonClient, infer_request

log = logging.getLogger("tritonlora.openai")
STOP_SECONDS = 10.0


@dataclass(frozen=True, slots=True)
class Prompt:
    """The inputs of one prompt of a request, which its choices share."""

    source: Source
    inputs: Inputs
    max_tokens: int


@dataclass(slots=True)
class Audience:
    """Whoever waits for the choices of one request."""

    has_left: bool = False
    record: Record = field(default_factory=Record)
    trace_headers: Mapping[str, str] = field(default_factory=dict)


class Generations:
    """Sends requests to the server, and ends those that nobody waits for."""

    def __init__(self, client: TritonClient, stall_seconds: float) -> None:
        self._client = client
        self._stall_seconds = stall_seconds
        self._own_ids = itertools.count(secrets.randbits(62))  # old engines take numbers alone
        self._unattended: set[asyncio.Task[Any]] = set()

    async def run(
        self,
        served: Served,
        request: GenerationRequest,
        prompt: Prompt,
        state: ChoiceState,
        number: int,
        audience: Audience,
    ) -> AsyncGenerator[Piece, None]:
        """The pieces of choice `number`. Raises ApiError.

        When the audience has left, the request ends in the engine with its next response. Do not cancel the task that
        reads here: gRPC would cancel the call, of which no step of an ensemble learns. Triton 2.51 crashed once after
        many cancelled calls.
        """
        model, request_id = served.model, str(next(self._own_ids))
        lora_name = None if request.model == served.base_name else request.model
        inputs = model.choice_inputs(prompt.inputs, lora_name, number)
        asked = infer_request(model.model, request_id, inputs, model.outputs(request))
        stream = self._client.stream(asked, self._stall_seconds, audience.trace_headers)
        try:
            async for response in stream:
                audience.record.responded()
                part = state.add(response)
                if part.text or part.logprobs:
                    yield part
                if state.is_stopped or audience.has_left:
                    self.leave(asyncio.create_task(self._end(stream, model, request_id)))
                    return
            yield state.end()
        except ServerSilent:
            log.warning("the server at %s sent no token for %g s", self._client.url, self._stall_seconds)
            self.leave(asyncio.create_task(self._stop(model, request_id)))
            raise stalled(self._stall_seconds) from None
        except ServerGone as error:
            log.warning("the server at %s does not answer: %s", self._client.url, error)
            raise unavailable("the server behind this API does not answer; ask again") from None
        except ServerRefused as error:
            found = error_of_server(str(error), request.model, served.base_name)
            if found.status >= 500:
                log.warning("the server answered: %s", error)
            raise found from None

    def leave(self, task: asyncio.Task[Any]) -> None:
        """Let a task end by itself."""
        self._unattended.add(task)
        task.add_done_callback(self._forget)

    async def close(self) -> None:
        """Wait until the engine has been asked to end what nobody waits for."""
        if self._unattended:
            await asyncio.wait(self._unattended, timeout=STOP_SECONDS)

    def _forget(self, task: asyncio.Task[Any]) -> None:
        self._unattended.discard(task)
        if not task.cancelled() and (error := task.exception()) is not None:
            log.info("a request that nobody waited for ended with: %r", error)

    async def _end(self, stream: AsyncGenerator[Any, None], model: ServedModel, request_id: str) -> None:
        """End the request that `stream` responds to. Where the target can stop it, the stream is read to its end."""
        async with aclosing(stream):
            if await self._stop(model, request_id):
                async for _ in stream:
                    pass

    async def _stop(self, model: ServedModel, request_id: str) -> bool:
        """Ask the target to stop a request. False: it cannot, and closing the call is all."""
        inputs = model.stop_inputs()
        if inputs is None:
            return False
        asked = infer_request(model.target, request_id, inputs, [])
        async with aclosing(self._client.stream(asked, STOP_SECONDS)) as ends:
            async for _ in ends:
                pass
        return True
