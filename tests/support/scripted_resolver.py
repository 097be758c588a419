# SPDX-FileCopyrightText: the tritonlora authors
# SPDX-License-Identifier: Apache-2.0
"""A resolver for tests of the models that ask it, with the fake in the place of Triton: it does as it is told."""

from __future__ import annotations

import json
import threading
from collections.abc import Callable
from typing import Any

import numpy as np

from fake_pb_utils import InferenceRequest, InferenceResponse, Tensor
from tritonlora.serving.holder import is_held

WAIT_SECONDS = 30


class ScriptedResolver:
    """Serve it as "lora_resolver". It knows the adapters in `task_ids`, and notes the messages."""

    def __init__(self, **task_ids: int) -> None:
        self.task_ids = task_ids
        self.messages: list[dict[str, Any]] = []
        self.on_lost: Callable[[], dict[str, Any]] = dict
        self.told: dict[str, Any] = {"states": {}, "contents": {}}
        self.holds_up = False  # whether requests wait until their client leaves
        self.waits = threading.Event()
        self._has_left = threading.Event()

    def __call__(self, request: InferenceRequest) -> list[InferenceResponse]:
        """The response to one message."""
        inputs = {tensor.name(): tensor.as_numpy() for tensor in request.inputs()}
        message = json.loads(inputs["lora_control"].reshape(-1)[0])
        assert is_held(message.pop("holder"))
        self.messages.append(message)
        state, tensors = self._answer(message, inputs)
        return [InferenceResponse([*tensors, Tensor("lora_state", np.array([[json.dumps(state)]], np.object_))])]

    def _answer(self, message: dict[str, Any], inputs: dict[str, Any]) -> tuple[dict[str, Any], list[Tensor]]:
        if message["do"] == "tell":
            return self.told, []
        if message["do"] == "leave":
            self._has_left.set()
        if message["do"] == "lost":
            return self.on_lost(), []
        if message["do"] not in ("enter", "load"):
            return {}, []
        names = [name.decode() for name in inputs.get("lora_name", np.array([])).reshape(-1)]
        names += [message["name"]] if "name" in message else []
        if unknown := [name for name in names if name not in self.task_ids]:
            return {"refused": [f"unknown LoRA adapter {unknown[0]!r}", "NOT_FOUND"]}, []
        if self.holds_up:
            self.waits.set()
            assert self._has_left.wait(WAIT_SECONDS)
            return {"refused": ["the client has left", "CANCELLED"]}, []
        ids = np.array([[self.task_ids[name]] for name in names], np.uint64)
        return {"lora_names": names}, [Tensor("lora_task_id", ids)] if names else []

    def go_on(self) -> None:
        """Refuse the requests that wait."""
        self._has_left.set()

    @property
    def done(self) -> list[str]:
        """What the messages asked for."""
        return [message["do"] for message in self.messages]

    @property
    def outcomes(self) -> list[tuple[str, bool]]:
        """Outcome, and whether it is over, of each request that has ended."""
        return [(message["outcome"], message["is_over"]) for message in self.messages if message["do"] == "end"]
