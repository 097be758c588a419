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
from .adapter_tensors import AdapterFiles
from .routing import Route
from .triton import new_kept_weights
from .wire import Wire

MOST_NAMED = 256  # adapters whose naming tensors are kept, of a few hundred bytes each

Responses: TypeAlias = "Iterator[pb_utils.InferenceResponse]"


class Engine:
    """Makes and sends requests to the engine's model, from one thread of the router."""

    def __init__(
        self,
        target: str,
        wire: Wire,
        files: AdapterFiles,
        *,
        inputs: Collection[str],
        outputs: AbstractSet[str],
        decoupled: bool,
        batching: bool,
        gives: Callable[[Route], None],
    ) -> None:
        """`gives` binds an adapter's lora_task_id to its content, just before the engine gets that content.

        It raises AdapterUnavailable when the id is bound to other content.
        """
        self.wire = wire
        self.gives = gives
        self.decoupled = decoupled
        self.batching = batching
        self.stop = wire.stop if wire.stop in inputs else ""
        self._target = target
        self._files = files
        self._outputs = outputs
        self._own_ids = itertools.count(secrets.randbits(62))
        self._kept = new_kept_weights()
        # A thread of the stub drops its reference to a stream. If that is the last reference, the thread waits for the
        # GIL while it holds a mutex, which the next request needs while it holds the GIL. So we keep references, too.
        self._last_streams: deque[Any] = deque(maxlen=4)
        self._naming_tensors: dict[int, list[pb_utils.Tensor]] = {}  # by lora_task_id

    def request(
        self, request: pb_utils.InferenceRequest, parameters: dict[str, Any], wanted: AbstractSet[str], silence: Silence
    ) -> Callable[[Sequence[pb_utils.Tensor], Route | None], Outgoing]:
        """A function (tensors, adapter) -> the request to the engine for those rows of a client's request.

        `wanted` are the outputs to ask for. `silence` notes when the request is sent, and each response.
        """

        def outgoing(tensors: Sequence[pb_utils.Tensor], route: Route | None) -> Outgoing:
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
            return Outgoing(self, make, tensors, route, silence, can_stop=bool(own_id))

        return outgoing

    def naming_tensors(self, route: Route) -> list[pb_utils.Tensor]:
        """The tensors that name the adapter. They are kept: a tensor that was sent lies in shared memory already."""
        found = self._naming_tensors.get(route.entry.lora_task_id)
        if found is None:
            values = self.wire.naming_inputs(self._files.repository, route)
            found = [pb_utils.Tensor(name, value) for name, value in values.items()]
            if len(self._naming_tensors) == MOST_NAMED:
                self._naming_tensors.clear()
            self._naming_tensors[route.entry.lora_task_id] = found
        return found

    def weights(self, route: Route) -> tuple[list[pb_utils.Tensor], Callable[[], None]]:
        """lora_weights and lora_config, to be sent once, and a function to call after sending them."""
        kept = self._kept  # this thread's: `left_behind` replaces self._kept
        weights, config = kept.tensor(self._files.weights(route)), self._files.config(route)
        self.gives(route)
        return [weights, pb_utils.Tensor("lora_config", config)], kept.sent

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

    def forget_names(self) -> None:
        """Drop the naming tensors, because the adapter table has changed."""
        self._naming_tensors.clear()

    def left_behind(self) -> None:
        """Take a new weights tensor, because an abandoned thread may still send the old one."""
        self._kept = new_kept_weights()

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
        route: Route | None,
        silence: Silence,
        *,
        can_stop: bool,
    ) -> None:
        self._engine = engine
        self._make = make
        self._tensors = tensors
        self._route = route
        self._silence = silence
        self._can_stop = can_stop

    def send(self, attach: bool) -> Responses:
        """Send the request, with the adapter's weights if `attach`, and return the engine's responses."""
        engine, route = self._engine, self._route
        tensors = [*self._tensors, *(engine.naming_tensors(route) if route else ())]
        sent: Callable[[], None] | None = None
        if route and not engine.wire.sends_weights:
            engine.gives(route)  # the engine may read the adapter's files at any time
        elif route and attach:
            weights, sent = engine.weights(route)
            tensors += weights
        request = self._make(inputs=tensors)
        self._silence.asked()
        responses = engine.responses(request)
        if sent:
            sent()
        for response in responses:
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
