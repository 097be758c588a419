# SPDX-FileCopyrightText: the tritonlora authors
# SPDX-License-Identifier: Apache-2.0
"""Sends the router's requests to the engine's model, by BLS.

An instance sends one request at a time, from one thread. A thread for each stream would be cheaper than a process, but
two decoupled BLS requests at a time in one process deadlock sooner or later. Three threads of the stub can wait for
each other (python_backend src/pb_stub.cc, seen with 2.51, and the same in its main branch of July 2026):

| thread | holds | waits for |
|---|---|---|
| in `ResponseIterator::Next` | the iterator's mutex | the GIL |
| the one that delivers responses | the mutex of the table of iterators | the iterator's mutex |
| in `Stub::GetResponseIterator` | the GIL | the mutex of the table of iterators |
"""

from __future__ import annotations

import functools
import itertools
import secrets
from collections import deque
from collections.abc import Callable, Collection, Iterator, Sequence
from collections.abc import Set as AbstractSet
from typing import Any, TypeAlias

import numpy as np
import triton_python_backend_utils as pb_utils

from .abandonable import Silence
from .wire import Wire

Responses: TypeAlias = "Iterator[pb_utils.InferenceResponse]"


class Engine:
    """Makes and sends requests to the engine's model, from one thread of the router."""

    def __init__(
        self,
        target: str,
        wire: Wire,
        *,
        inputs: Collection[str],
        outputs: AbstractSet[str],
        decoupled: bool,
        batching: bool,
    ) -> None:
        self.decoupled = decoupled
        self.batching = batching
        self.stop = wire.stop if wire.stop in inputs else ""
        self._target = target
        self._outputs = outputs
        self._own_ids = itertools.count(secrets.randbits(62))
        # A thread of the stub drops its reference to a stream. If that is the last reference, the thread waits for the
        # GIL while it holds a mutex, which the next request needs while it holds the GIL. So we keep references, too.
        self._last_streams: deque[Any] = deque(maxlen=4)

    def request(
        self, request: pb_utils.InferenceRequest, parameters: dict[str, Any], wanted: AbstractSet[str], silence: Silence
    ) -> Callable[[Sequence[pb_utils.Tensor]], Outgoing]:
        """A function (tensors) -> the request to the engine for those rows of a client's request.

        `wanted` are the outputs to ask for. `silence` notes when the request is sent, and each response.
        """

        def outgoing(tensors: Sequence[pb_utils.Tensor]) -> Outgoing:
            # The engine stops all requests with an id, so only a request with an id of its own can be stopped. Old
            # engines take numbers alone.
            own_id = str(next(self._own_ids)) if self.stop and not request.request_id() else ""
            make = functools.partial(
                pb_utils.InferenceRequest,
                model_name=self._target,
                requested_output_names=sorted(self._outputs & wanted),
                request_id=request.request_id() or own_id,
                correlation_id=request.correlation_id(),
                timeout=request.timeout(),
                parameters=_carried(parameters) or None,  # None saves Triton's stub from writing JSON
                trace=request.trace(),
            )
            return Outgoing(self, make, tensors, silence, can_stop=bool(own_id))

        return outgoing

    def responses(self, request: pb_utils.InferenceRequest) -> Responses:
        """Send a request and return the engine's responses. Read all of them: Triton hangs on an abandoned request."""
        if not self.decoupled:
            return iter([request.exec()])
        responses = request.exec(decoupled=True)
        self._last_streams.append(responses)
        return iter(responses)

    def cancel_last(self) -> bool:
        """Cancel the last stream; False if Triton is older than 25.04, which cannot cancel it."""
        cancel = getattr(self._last_streams[-1], "cancel", None)
        if cancel:
            cancel()
        return bool(cancel)

    def finalize(self) -> None:
        """Drop the last streams, because a stream that outlives the model's `finalize` crashes the stub."""
        self._last_streams.clear()


class Outgoing:
    """One request to the engine's model, which may be sent again."""

    def __init__(
        self,
        engine: Engine,
        make: Callable[..., pb_utils.InferenceRequest],
        tensors: Sequence[pb_utils.Tensor],
        silence: Silence,
        *,
        can_stop: bool,
    ) -> None:
        self._engine = engine
        self._make = make
        self._tensors = tensors
        self._silence = silence
        self._can_stop = can_stop

    def send(self) -> Responses:
        """Send the request, and return the engine's responses."""
        request = self._make(inputs=self._tensors)
        self._silence.asked()
        for response in self._engine.responses(request):
            self._silence.heard()
            yield response
        self._silence.ended()

    def cancel(self) -> None:
        """End the stream that is being read. The caller still reads it to its end.

        Triton from 25.04 on can cancel the stream. With older versions, the same request with its stop input asks the
        engine to stop it, if no other request can have its id.

        A stream must not be abandoned. When the model is unloaded, the stub cuts off the streams that have not ended
        (seen with 2.51; pb_stub.cc, PYTHONSTUB_FinalizeRequest). Then reading or dropping such a stream blocks for
        ever, and later responses of the engine go to an instance that the server has deleted.
        """
        engine = self._engine
        if not engine.decoupled or engine.cancel_last() or not self._can_stop:
            return
        rows = [self._tensors[0].shape()[0]] if engine.batching else []
        stop = pb_utils.Tensor(engine.stop, np.ones((*rows, 1), np.bool_))
        others = [tensor for tensor in self._tensors if tensor.name() != engine.stop]
        deque(engine.responses(self._make(inputs=[*others, stop])), maxlen=0)


def _carried(parameters: dict[str, Any]) -> dict[str, Any]:
    """The parameters that a BLS request can have: Triton 2.51 takes no floats, and integers of 64 bits alone."""
    return {key: value for key, value in parameters.items() if _is_carried(value)}


def _is_carried(value: object) -> bool:
    if isinstance(value, float):
        return _takes_floats()
    return not isinstance(value, int) or -(1 << 63) <= value < 1 << 63


@functools.cache
def _takes_floats() -> bool:
    try:
        pb_utils.InferenceRequest(model_name="", inputs=[], requested_output_names=[], parameters={"float": 0.5})  # type: ignore[dict-item]
    except Exception:  # noqa: BLE001  its type differs between versions
        return False
    return True
