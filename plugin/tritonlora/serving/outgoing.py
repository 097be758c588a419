# SPDX-FileCopyrightText: the tritonlora authors
# SPDX-License-Identifier: Apache-2.0
"""The requests that the router sends on to the engine's model, by BLS.

An instance sends one at a time, from one thread. A thread for each stream would be cheaper than a process, and is a
trap: two decoupled BLS requests at a time in one process deadlock sooner or later. `ResponseIterator::Next` waits for
the GIL while it has the iterator's mutex, the thread that delivers responses for that mutex while it has the mutex of
the table of iterators, and `Stub::GetResponseIterator` for the latter while it has the GIL (python_backend
src/pb_stub.cc, seen with 2.51, and the same in its main branch of July 2026).
"""

from __future__ import annotations

import functools
import itertools
import secrets
from collections import deque
from collections.abc import Callable, Collection, Iterator, Sequence
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
    """The engine's model, as one thread of the router asks it."""

    def __init__(
        self,
        target: str,
        wire: Wire,
        files: AdapterFiles,
        *,
        inputs: Collection[str],
        outputs: Collection[str],
        decoupled: bool,
        batching: bool,
        gives: Callable[[Route], None],
    ) -> None:
        """`gives` is told that the engine is about to get an adapter's content; it raises where it must not."""
        self.wire = wire
        self.decoupled = decoupled
        self.batching = batching
        self.stop = wire.stop if wire.stop in inputs else ""
        self._target = target
        self._files = files
        self._outputs = frozenset(outputs)
        self._gives = gives
        self._own_ids = itertools.count(secrets.randbits(62))
        self._kept = new_kept_weights()
        # The stub forgets a stream in a thread of its own. If nobody else held it by then, that thread would wait for
        # the GIL with the mutex that the next request needs while it holds the GIL.
        self._last_streams: deque[Any] = deque(maxlen=4)
        self._naming_tensors: dict[int, list[pb_utils.Tensor]] = {}  # by lora_task_id

    def request(
        self, request: pb_utils.InferenceRequest, parameters: dict[str, Any], wanted: Collection[str], silence: Silence
    ) -> Callable[[Sequence[pb_utils.Tensor], Route | None], Outgoing]:
        """What makes a request of a client one to the engine, for some of its rows and their adapter.

        `wanted` are the outputs to ask for. `silence` is told when the engine is asked, and when it is heard.
        """

        def outgoing(tensors: Sequence[pb_utils.Tensor], route: Route | None) -> Outgoing:
            # Only a request that no other one shares its id with can be stopped. Old engines want numbers.
            own_id = str(next(self._own_ids)) if self.stop and not request.request_id() else ""
            make = functools.partial(
                pb_utils.InferenceRequest,
                model_name=self._target,
                requested_output_names=sorted(self._outputs & {*wanted}),
                request_id=request.request_id() or own_id,
                correlation_id=request.correlation_id(),
                timeout=request.timeout(),
                parameters=_carried(parameters) or None,  # which saves Triton's stub from writing JSON
                trace=request.trace(),
            )
            return Outgoing(self, make, tensors, route, silence, can_stop=bool(own_id))

        return outgoing

    def naming_tensors(self, route: Route) -> list[pb_utils.Tensor]:
        """What tells the engine which adapter it is. Kept: a tensor that was sent is in shared memory the next time."""
        found = self._naming_tensors.get(route.entry.lora_task_id)
        if found is None:
            values = self.wire.naming_inputs(self._files.repository, route)
            found = [pb_utils.Tensor(name, value) for name, value in values.items()]
            if len(self._naming_tensors) == MOST_NAMED:
                self._naming_tensors.clear()
            self._naming_tensors[route.entry.lora_task_id] = found
        return found

    def weights(self, route: Route) -> tuple[list[pb_utils.Tensor], Callable[[], None]]:
        """lora_weights and lora_config, to be sent once, and what to call then."""
        kept = self._kept  # this request's, also if it is left behind
        weights, config = kept.tensor(self._files.weights(route)), self._files.config(route)
        self.gives(route)
        return [weights, pb_utils.Tensor("lora_config", config)], kept.sent

    def gives(self, route: Route) -> None:
        """The engine is about to get the adapter's content."""
        self._gives(route)

    def responses(self, request: pb_utils.InferenceRequest) -> Responses:
        """Send a request, and give the engine's responses. All must be read: Triton hangs on one that is abandoned."""
        if not self.decoupled:
            return iter([request.exec()])
        responses = request.exec(decoupled=True)
        self._last_streams.append(responses)
        return iter(responses)

    def cancel_last(self) -> bool:
        """End the last stream; False where Triton cannot (before 25.04)."""
        cancel = getattr(self._last_streams[-1], "cancel", None)
        if cancel:
            cancel()
        return bool(cancel)

    def forget_names(self) -> None:
        """The table has changed."""
        self._naming_tensors.clear()

    def left_behind(self) -> None:
        """The thread that asks is stuck in a request, and may go on: it has what it sends to itself."""
        self._kept = new_kept_weights()

    def finalize(self) -> None:
        """A stream that outlives the model's `finalize` crashes the stub."""
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
        """Send it, with the adapter's weights if `attach`, and give the engine's responses."""
        engine, route = self._engine, self._route
        tensors = [*self._tensors, *(engine.naming_tensors(route) if route else ())]
        sent: Callable[[], None] | None = None
        if route and not engine.wire.sends_weights:
            engine.gives(route)  # the engine reads it whenever it needs to
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
        """End the stream that is being read: Triton from 25.04 on can cancel it; before that the engine is asked to
        stop it, by the same request with its stop input, where no other one can have its id. It is read to its end all
        the same.

        There is no leaving it: when the model is unloaded, the stub cuts off the streams that have not ended (seen with
        2.51; pb_stub.cc, PYTHONSTUB_FinalizeRequest). Then reading them, or letting go of them, blocks for ever, and
        what the engine still answers would go to an instance that the server has deleted.
        """
        engine = self._engine
        if not engine.decoupled or engine.cancel_last() or not self._can_stop:
            return
        rows = [self._tensors[0].shape()[0]] if engine.batching else []
        stop = pb_utils.Tensor(engine.stop, np.ones((*rows, 1), np.bool_))
        others = [tensor for tensor in self._tensors if tensor.name() != engine.stop]
        deque(engine.responses(self._make(inputs=[*others, stop])), maxlen=0)


def _carried(parameters: dict[str, Any]) -> dict[str, Any]:
    """Those that a BLS request can have: Triton 2.51 has no floating-point numbers, and 64 bits for whole ones."""
    return {key: value for key, value in parameters.items() if _is_carried(value)}


def _is_carried(value: object) -> bool:
    if isinstance(value, float):
        return _takes_floats()
    return not isinstance(value, int) or -(1 << 63) <= value < 1 << 63


@functools.cache
def _takes_floats() -> bool:
    try:
        pb_utils.InferenceRequest(model_name="", inputs=[], requested_output_names=[], parameters={"float": 0.5})  # type: ignore[dict-item]
    except Exception:  # noqa: BLE001  which one differs between versions
        return False
    return True
