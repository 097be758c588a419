# SPDX-FileCopyrightText: the tritonlora authors
# SPDX-License-Identifier: Apache-2.0
"""The tensors by which each kind of target takes adapters.

`ENGINE_MODEL` is the tensorrt_llm model of tensorrtllm_backend (all_models/inflight_batcher_llm, v0.9 to v1.x). There
an adapter is two tensors. A request carries them, and the engine's cache may evict them.

`LLM_API` is the Python model of TensorRT-LLM's main branch (triton_backend/all_models/llmapi). There an adapter is a
PEFT directory, which every request names. The model reads the directory by itself, and may read it again.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from .routing import Route

# Tensors of the resolver beside those of adapters.
INPUT_LENGTHS = "input_lengths"  # tells how long the engine takes for the prompt
REQUIRED = "request_output_len"  # `Wire.required` of the engine's model; tells how long a request may take
CONTROL, STATE = "lora_control", "lora_state"  # between tritonlora's own models


@dataclass(frozen=True, slots=True)
class Wire:
    """The tensors of one kind of target, as far as adapters are concerned."""

    inputs: tuple[str, ...]  # a model that declares these is of this kind
    task_id: str  # the input with an adapter's lora_task_id
    router_only: tuple[str, ...]  # inputs that no client may send
    # (repository, adapters of the rows) -> the inputs that name the adapters
    naming_inputs: Callable[[Path, Sequence[Route]], dict[str, npt.NDArray[Any]]]
    names: tuple[str, ...]  # the names of these inputs
    # An input that every request has: it goes through the resolver, so that the target does not take an empty response
    # of the resolver for a request to the base model. Triton itself only counts the required inputs of a request.
    required: str
    resolved: tuple[str, ...]  # the inputs that name or hold adapters, which the resolver responds with
    stop: str  # an input: a request with it ends the request with the same id; "": there is no such input
    needed_outputs: tuple[str, ...]  # the target refuses a request that does not ask for all of these
    sends_weights: bool  # requests carry weights into a cache of pages; False: the target reads adapters by itself
    router_output: tuple[str, str] | None  # (an output that the router adds, the target's output that it is made of)

    def missing(self, inputs: Collection[str]) -> list[str]:
        """The inputs of this kind that a model with `inputs` does not declare."""
        return [name for name in self.inputs if name not in inputs]


def wire_of(inputs: Collection[str]) -> Wire:
    """The wire of a target or router whose inputs have these names: the wire with the largest share of its inputs."""
    return max(WIRES, key=lambda wire: 1 - len(wire.missing(inputs)) / len(wire.inputs))


def _by_id(_repository: Path, routes: Sequence[Route]) -> dict[str, npt.NDArray[Any]]:
    return {"lora_task_id": np.array([[route.entry.lora_task_id] for route in routes], np.uint64)}


def _by_path(repository: Path, routes: Sequence[Route]) -> dict[str, npt.NDArray[Any]]:
    [route] = routes  # this target takes no batches
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
    names=("lora_task_id",),
    required=REQUIRED,
    resolved=("lora_task_id", "lora_weights", "lora_config"),
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
    names=("lora_id", "lora_name", "lora_path"),
    required="text_input",
    resolved=("lora_id", "lora_name", "lora_path"),
    stop="",
    needed_outputs=("text_output",),
    sends_weights=False,
    # Each streamed response has the whole text so far. Where an ensemble forwards, its clients get the new text alone.
    router_output=("text_diff", "text_output"),
)

WIRES = (ENGINE_MODEL, LLM_API)
