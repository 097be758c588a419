# SPDX-FileCopyrightText: the tritonlora authors
# SPDX-License-Identifier: Apache-2.0
"""The tensors by which each kind of target takes adapters.

`ENGINE_MODEL` is the tensorrt_llm model of tensorrtllm_backend (all_models/inflight_batcher_llm, v0.9 to v1.x). An
adapter is two tensors there, which a request carries, and which the engine's cache may forget. `LLM_API` is the Python
model of TensorRT-LLM's main branch (triton_backend/all_models/llmapi). An adapter is a PEFT directory there, which the
model reads, and reads again by itself, so that every request names it.
"""

from __future__ import annotations

from collections.abc import Callable, Collection
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from .routing import Route

# Beside the adapters' tensors, what the resolver reads and gives.
INPUT_LENGTHS = "input_lengths"  # which tells how long the engine takes for the prompt
# The engine refuses to be without it. Triton counts required inputs, and does not look which ones are there.
REQUIRED = "request_output_len"
CONTROL, STATE = "lora_control", "lora_state"  # between tritonlora's own models


@dataclass(frozen=True, slots=True)
class Wire:
    """The tensors of one kind of target, as far as adapters are concerned."""

    inputs: tuple[str, ...]  # a model that declares these is of this kind
    task_id: str  # the input that has an adapter's lora_task_id
    router_only: tuple[str, ...]  # inputs that no client may send
    # (repository, adapter) -> the tensors that name the adapter in each request for it
    naming_inputs: Callable[[Path, Route], dict[str, npt.NDArray[Any]]]
    stop: str  # the input of a request that ends the request with the same id; "": there is none
    needed_outputs: tuple[str, ...]  # the target refuses a request that does not ask for all of these
    sends_weights: bool  # into a cache of pages; otherwise the target reads an adapter whenever it needs to
    router_output: tuple[str, str] | None  # (an output of the router's own, the target's output that it is made of)

    def missing(self, inputs: Collection[str]) -> list[str]:
        """The inputs of this kind that a model with `inputs` does not declare."""
        return [name for name in self.inputs if name not in inputs]


def wire_of(inputs: Collection[str]) -> Wire:
    """The wire of a target, or of the router in front of it, by the names of its inputs: the kind it has most of."""
    return max(WIRES, key=lambda wire: 1 - len(wire.missing(inputs)) / len(wire.inputs))


def _by_id(_repository: Path, route: Route) -> dict[str, npt.NDArray[Any]]:
    return {"lora_task_id": np.array([[route.entry.lora_task_id]], np.uint64)}


def _by_path(repository: Path, route: Route) -> dict[str, npt.NDArray[Any]]:
    path = repository / (route.entry.lora_path or "")
    return {
        "lora_id": np.array([route.entry.lora_task_id], np.uint64),
        "lora_name": np.array([route.lora_name.encode()], np.object_),
        "lora_path": np.array([str(path).encode()], np.object_),
    }


ENGINE_MODEL = Wire(
    inputs=("lora_task_id", "lora_weights", "lora_config"),
    task_id="lora_task_id",
    router_only=("lora_weights", "lora_config"),
    naming_inputs=_by_id,
    stop="stop",
    needed_outputs=("output_ids", "sequence_length"),
    sends_weights=True,
    router_output=None,
)

LLM_API = Wire(
    inputs=("sampling_param_max_tokens", "lora_id", "lora_name", "lora_path"),
    task_id="lora_id",
    router_only=("lora_path", "lora_ckpt_source"),
    naming_inputs=_by_path,
    stop="",
    needed_outputs=("text_output",),
    sends_weights=False,
    # Each streamed response has the whole text so far; clients of an ensemble expect what is new in it.
    router_output=("text_diff", "text_output"),
)

WIRES = (ENGINE_MODEL, LLM_API)
