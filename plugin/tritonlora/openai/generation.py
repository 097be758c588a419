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
from collections.abc import AsyncGenerator
from contextlib import aclosing
from dataclasses import dataclass
from typing import Any

from tritonlora.openai.api_error import error_of_server, unavailable
from tritonlora.openai.discovery import Served
from tritonlora.openai.schema import GenerationRequest
from tritonlora.openai.served_model import ChoiceState, Inputs, Piece, ServedModel, Source
from tritonlora.openai.triton_client import ServerGone, ServerRefused, TritonClient, infer_request

log = logging.getLogger("tritonlora.openai")
STOP_SECONDS = 10.0


@dataclass(frozen=True, slots=True)
class Prompt:
    """The inputs of one prompt of a request, which its choices share."""

    source: Source
    inputs: Inputs
    max_tokens: int


class Generations:
    """Sends requests to the server, and ends those that nobody waits for."""

    def __init__(self, client: TritonClient) -> None:
        self._client = client
        self._own_ids = itertools.count(secrets.randbits(62))  # old engines take numbers alone
        self._abandoned: set[asyncio.Task[None]] = set()

    async def run(
        self, served: Served, request: GenerationRequest, prompt: Prompt, sequence: ChoiceState, number: int
    ) -> AsyncGenerator[Piece, None]:
        """The pieces of choice `number`. Closing the iterator ends the request in the engine. Raises ApiError."""
        model, request_id = served.model, str(next(self._own_ids))
        lora_name = None if request.model == served.base_name else request.model
        inputs = model.choice_inputs(prompt.inputs, lora_name, number)
        stream = self._client.stream(infer_request(model.model, request_id, inputs, model.outputs(request)))
        has_begun = has_ended = False
        try:
            async for response in stream:
                has_begun = True
                part = sequence.add(response)
                if sequence.is_stopped:
                    yield part
                    return
                if part.text or part.logprobs:
                    yield part
            has_ended = True
            yield sequence.end()
        except ServerGone as error:
            has_ended = True
            log.warning("the server at %s does not answer: %s", self._client.url, error)
            raise unavailable("the server behind this API does not answer; ask again") from None
        except ServerRefused as error:
            has_ended = True
            found = error_of_server(str(error), request.model, served.base_name)
            if found.status >= 500:
                log.warning("the server answered: %s", error)
            raise found from None
        finally:
            if not has_ended:
                self._abandon(stream, model, request_id, has_begun=has_begun)

    def _abandon(
        self, stream: AsyncGenerator[Any, None], model: ServedModel, request_id: str, *, has_begun: bool
    ) -> None:
        task = asyncio.create_task(self._stop(stream, model, request_id, has_begun=has_begun))
        self._abandoned.add(task)
        task.add_done_callback(self._abandoned.discard)

    async def _stop(self, stream: Any, model: ServedModel, request_id: str, *, has_begun: bool) -> None:
        async with aclosing(stream):
            try:
                inputs = model.stop_inputs()
                if inputs is None:
                    return
                if not has_begun:
                    await anext(stream, None)
                async with aclosing(self._client.stream(infer_request(model.target, request_id, inputs, []))) as ends:
                    async for _ in ends:
                        pass
                async for _ in stream:
                    pass
            except (ServerGone, ServerRefused) as error:
                log.info("a request whose client has left ended with: %s", error)

    async def close(self) -> None:
        """Wait until the engine has been asked to end what nobody waits for."""
        if self._abandoned:
            await asyncio.wait(self._abandoned, timeout=STOP_SECONDS)
