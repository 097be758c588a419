# SPDX-FileCopyrightText: the tritonlora authors
# SPDX-License-Identifier: Apache-2.0
"""Asks the resolver, from other models of tritonlora, by BLS requests that are not decoupled.

`leases` has the messages of the router. `lora_adapters` has two more:

| message | meaning | response |
|---|---|---|
| tell | | what the engine holds |
| load | the engine is to have this adapter | once it has the adapter |
"""

from __future__ import annotations

import itertools
import json
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import triton_python_backend_utils as pb_utils

from .engine_errors import is_unavailable
from .holder import Holder
from .routing import SPLIT_KEY
from .triton import Inputs, code_of, error_of
from .wire import CONTROL, INPUT_LENGTHS, REQUIRED, STATE, Wire

# The inputs of a client's request that the resolver needs, beside the id.
ASKED = ("lora_name", SPLIT_KEY, REQUIRED, INPUT_LENGTHS)


class ResolverError(Exception):
    """The resolver has refused a request, or is not there. `code` is a name in `pb_utils.TritonError`."""

    def __init__(self, message: str, code: str) -> None:
        super().__init__(message)
        self.code = code


class ResolverClient:
    """Sends messages to the model `name`."""

    def __init__(self, name: str) -> None:
        self._name = name
        self._holder = Holder()
        self._numbers = itertools.count()

    def close(self) -> None:
        """End the proof that messages come from here."""
        self._holder.close()

    def lease(self, wire: Wire) -> RouterLease:
        """A new request of the router's."""
        return RouterLease(self, wire, next(self._numbers))

    def tell(self) -> dict[str, Any]:
        """What the resolver knows of the engine: `states` and `contents`, see `listing.Engine`."""
        return self.ask("tell", next(self._numbers))[0]

    def load(self, lora_name: str) -> None:
        """Wait until the engine has the adapter. ResolverError says why it cannot have it."""
        self.ask("load", next(self._numbers), name=lora_name)

    def ask(
        self,
        do: str,
        number: int,
        tensors: Sequence[pb_utils.Tensor] = (),
        names: Sequence[str] = (),
        rows: int = 1,
        **more: object,
    ) -> tuple[dict[str, Any], dict[str, pb_utils.Tensor]]:
        """Send a message, with `tensors`, and wait for the response: lora_state, and the outputs `names` that it has.

        `rows` is the number of rows of `tensors`. ResolverError when the resolver refuses, or is not there.
        """
        message = json.dumps({"holder": self._holder.token, "number": number, "do": do, **more}).encode()
        control = pb_utils.Tensor(CONTROL, np.array([[message]] * rows, np.object_))
        request = pb_utils.InferenceRequest(
            model_name=self._name,
            inputs=[control, *tensors],
            requested_output_names=[*names, STATE],
        )
        found = {one.name(): one for one in self._responded(request).output_tensors()}
        state: dict[str, Any] = json.loads(found.pop(STATE).as_numpy().reshape(-1)[0])
        if "refused" in state:
            raise ResolverError(*state["refused"])
        return state, found

    def _responded(self, request: pb_utils.InferenceRequest) -> pb_utils.InferenceResponse:
        response = request.exec()
        if (error := error_of(response)) and is_unavailable(error.message()) and self._load():
            response = request.exec()
        if error := error_of(response):
            raise ResolverError(error.message(), code_of(error))
        return response

    def _load(self) -> bool:
        """Have the server load the resolver, if it loads models when it is asked to. Whether the resolver is ready."""
        if not pb_utils.is_model_ready(self._name):
            try:
                pb_utils.load_model(self._name)
            except Exception as error:  # noqa: BLE001  its type differs between versions
                pb_utils.Logger.log_error(f"{self._name!r}, which this model asks for adapters, is not loaded: {error}")
        return bool(pb_utils.is_model_ready(self._name))


class RouterLease:
    """The use of the engine's adapters by one request of the router's. See `leases` for the messages."""

    def __init__(self, client: ResolverClient, wire: Wire, number: int) -> None:
        self.names: list[str] = []  # the adapters of its rows; empty for the base model
        self._client = client
        self._wire = wire
        self._number = number
        self._naming: dict[str, pb_utils.Tensor] = {}
        self.waits = False  # whether a thread waits for the resolver
        self._is_refused = False

    def enter(self, inputs: Inputs, rows: int, parameters: Mapping[str, object]) -> None:
        """Begin: resolve the rows' adapters, and wait until the engine has that of the first row."""
        tensors = [inputs[name] for name in (*ASKED, self._wire.task_id) if name in inputs]
        self.waits = True
        try:
            state, self._naming = self._client.ask(
                "enter", self._number, tensors, self._wire.names, rows, parameters=parameters
            )
        except BaseException:
            self._is_refused = True
            raise
        finally:
            self.waits = False
        self.names = state["lora_names"]

    def naming(self, row: int | None) -> list[pb_utils.Tensor]:
        """The inputs that name the adapter of a row, or of the only row if None. None of them for the base model."""
        if row is None:
            return [*self._naming.values()]
        return [pb_utils.Tensor(name, one.as_numpy()[row : row + 1]) for name, one in self._naming.items()]

    def row(self, row: int) -> None:
        """End the row before, and wait until the engine has the adapter of this row."""
        self._wait("row", row=row)

    def lost(self) -> None:
        """Wait until the engine, which lacked the row's adapter, has it again."""
        self._wait("lost")

    def leave(self) -> None:
        """Note that the client has left. The thread that waits gets an error with the code CANCELLED."""
        self._client.ask("leave", self._number)

    def end(self, outcome: str, *, is_over: bool, first_token_seconds: float | None) -> None:
        """End. `outcome` is one of `counters.OUTCOMES`, and `is_over` is False if the engine may still work on it.

        `first_token_seconds` is None for a request that is not a stream, or that had no response.
        """
        if not self._is_refused:
            self._client.ask(
                "end", self._number, outcome=outcome, is_over=is_over, first_token_seconds=first_token_seconds
            )

    def _wait(self, do: str, **more: object) -> None:
        self.waits = True
        try:
            self._client.ask(do, self._number, (), (), 1, **more)
        finally:
            self.waits = False
