# SPDX-FileCopyrightText: the tritonlora authors
# SPDX-License-Identifier: Apache-2.0
"""The resolver's own requests to the engine's model: loads and probes. Each is the sample of the warmup, sent by BLS.

One thread sends them, one at a time: two decoupled BLS requests at a time in one process deadlock Triton's stub (see
`outgoing`).

No own request may be under way when the resolver is unloaded. Triton's stub would cut off its responses, so that the
thread that reads them waits for ever, and the server crashes (seen with 2.51). The server unloads no model that still
has a request to respond to. So a probe holds a `Guard`, which is such a request. If the server refuses the guard, the
model is being unloaded. A load needs no guard if a client's request waits for it.
"""

from __future__ import annotations

import contextlib
import itertools
import json
import secrets
import threading
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from queue import SimpleQueue
from typing import Any

import numpy as np
import triton_python_backend_utils as pb_utils

from .adapter_tensors import AdapterFiles
from .errors import AdapterUnavailable, EngineSilent, ServerStopping
from .reused_tensor import KeptWeights
from .routing import Route
from .triton import new_kept_weights
from .wire import CONTROL, ENGINE_MODEL, REQUIRED, STATE


class Guard:
    """A context in which the server does not unload this model: a request of the model to itself waits meanwhile.

    ServerStopping when the server takes no more requests for this model.
    """

    def __init__(self, model: str) -> None:
        self._model = model
        self.key = secrets.token_hex(16)  # the beginning of a lora_control that only this process knows
        self._numbers = itertools.count()  # Triton's response cache would respond to an equal request by itself
        self._arrivals: SimpleQueue[Any] = SimpleQueue()  # response senders, or None if the server has refused

    def arrive(self, sender: Any) -> None:
        """Note that the guard's request has come. `sender` sends its response."""
        self._arrivals.put(sender)

    @contextlib.contextmanager
    def __call__(self) -> Iterator[None]:
        thread = threading.Thread(target=self._ask, daemon=True)
        thread.start()
        sender = self._arrivals.get()
        if sender is None:
            raise ServerStopping
        try:
            yield
        finally:
            sender.send(pb_utils.InferenceResponse([]), flags=pb_utils.TRITONSERVER_RESPONSE_COMPLETE_FINAL)
            thread.join()

    def _ask(self) -> None:
        control = pb_utils.Tensor(CONTROL, np.array([[f"{self.key} {next(self._numbers)}".encode()]], np.object_))
        request = pb_utils.InferenceRequest(model_name=self._model, inputs=[control], requested_output_names=[STATE])
        is_answered = False
        try:
            is_answered = not request.exec().has_error()
        finally:
            if not is_answered:
                self._arrivals.put(None)


class OwnRequests:
    """Sends loads and probes to one engine's model."""

    def __init__(
        self,
        target: str,
        sample: str,
        files: AdapterFiles,
        route_of: Callable[[int], Route | None],
        bind: Callable[[Route], None],
        guard: Callable[[], AbstractContextManager[None]],
        *,
        decoupled: bool,
    ) -> None:
        """`sample` is JSON: input -> [its data type, its elements], of a batch of one.

        `route_of` returns the adapter of a lora_task_id. `bind` binds the id to the adapter's content, just before the
        weights are sent.
        """
        self._target = target
        self._sample: dict[str, np.ndarray[Any, Any]] = {
            name: np.array([values], pb_utils.triton_string_to_numpy(data_type))
            for name, (data_type, values) in json.loads(sample).items()
        }
        self._files = files
        self._route_of = route_of
        self._bind = bind
        self._guard = guard
        self._decoupled = decoupled
        self._kept = new_kept_weights()
        # A thread of the stub drops its reference to a stream, which must not be the last one. See `outgoing.Engine`.
        self._last_streams: deque[Any] = deque(maxlen=4)

    def load(self, task_id: int, heard: Callable[[], None], *, is_of_pin: bool = False) -> str | None:
        """See `dispatcher.Engine`."""
        if not is_of_pin:
            return self._load(task_id, heard)
        with self._guard():
            if not pb_utils.is_model_ready(self._target):
                raise EngineSilent(f"{self._target!r} is not loaded")
            return self._load(task_id, heard)

    def _load(self, task_id: int, heard: Callable[[], None]) -> str | None:
        route = self._route_of(task_id)
        if route is None:
            raise AdapterUnavailable(f"lora_task_id {task_id} is no longer registered")
        kept = self._kept
        weights, config = kept.tensor(self._files.weights(route)), self._files.config(route)
        self._bind(route)
        return self._ask(1, [task_id_tensor([task_id]), weights, pb_utils.Tensor("lora_config", config)], heard, kept)

    def probe(self, task_id: int | None, tokens: int, heard: Callable[[], None]) -> str | None:
        """See `dispatcher.Engine`."""
        with self._guard():
            return self._ask(tokens, [] if task_id is None else [task_id_tensor([task_id])], heard)

    def left_behind(self) -> None:
        """Take a new weights tensor, because an abandoned thread may still send the old one."""
        self._kept = new_kept_weights()

    def finalize(self) -> None:
        """Drop the last streams, because a stream that outlives the model's `finalize` crashes the stub."""
        self._last_streams.clear()

    def _ask(
        self,
        tokens: int,
        naming: list[pb_utils.Tensor],
        heard: Callable[[], None],
        kept: KeptWeights[pb_utils.Tensor] | None = None,
    ) -> str | None:
        sample = self._sample | {REQUIRED: np.full_like(self._sample[REQUIRED], tokens)}
        request = pb_utils.InferenceRequest(
            model_name=self._target,
            inputs=[*(pb_utils.Tensor(name, array) for name, array in sample.items()), *naming],
            requested_output_names=list(ENGINE_MODEL.needed_outputs),
        )
        found = None
        for response in self._responses(request):
            if error := response.error() if response.has_error() else None:
                found = found or error.message()
            elif response.output_tensors():  # the last response may be the final flag alone
                heard()
        if kept is not None:
            kept.sent()
        return found

    def _responses(self, request: pb_utils.InferenceRequest) -> Iterator[pb_utils.InferenceResponse]:
        if not self._decoupled:
            return iter([request.exec()])
        responses = request.exec(decoupled=True)
        self._last_streams.append(responses)
        return iter(responses)


def task_id_tensor(task_ids: list[int]) -> pb_utils.Tensor:
    """lora_task_id (b, 1) uint64 of a batch."""
    return pb_utils.Tensor(ENGINE_MODEL.task_id, np.array([[task_id] for task_id in task_ids], np.uint64))
