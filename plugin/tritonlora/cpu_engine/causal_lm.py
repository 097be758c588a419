# SPDX-FileCopyrightText: the tritonlora authors
# SPDX-License-Identifier: Apache-2.0
"""A Hugging Face causal language model that applies a different adapter to each request.

The adapter is read from the wire tensors alone. A forward hook of each linear layer adds `x Aᵀ Bᵀ` of the current
adapter to the layer's output. A forward pass has one current adapter. Each request has a KV cache of its own, so no
request sees the adapter of another one.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM

from tritonlora.architectures.layers import families_of, locate
from tritonlora.conversion.unpack import unpack, unpack_magnitudes
from tritonlora.cpu_engine.request import GenerationRequest, LoraInputs
from tritonlora.cpu_engine.sampling import choose_token
from tritonlora.cpu_engine.wire_arrays import as_torch
from tritonlora.engine.profile import EngineProfile
from tritonlora.errors import EngineMismatch, one_message


@dataclass(frozen=True, slots=True)
class LoraLayer:
    """The LoRA of one linear layer."""

    a: torch.Tensor  # (r, in)
    b: torch.Tensor  # (out, r), with the scaling in it
    magnitude: torch.Tensor | None  # (out,), DoRA's, divided by the norm of the whole weight


Adapter = Mapping[tuple[int, str], LoraLayer]


@dataclass(slots=True)
class Generation:
    """One request between its tokens."""

    request: GenerationRequest
    adapter: Adapter
    generator: torch.Generator
    unread: list[int]  # tokens that the model has not seen yet
    generated: list[int] = field(default_factory=list)
    kv_cache: Any = None


class CausalLM:
    """The model of one checkpoint. Its requests can take turns, token by token."""

    iteration_seconds = 0.0

    def __init__(self, checkpoint: Path, profile: EngineProfile, *, compute_dtype: str = "float32") -> None:
        """Load the checkpoint. EngineMismatch if there is none, or if a LoRA module of `profile` has no own layer."""
        self._dtype = getattr(torch, compute_dtype)
        self._modules = {dims.module.id: dims for dims in profile.modules.values()}
        self._model = _load_checkpoint(checkpoint, self._dtype)
        self._adapter: Adapter = {}
        self._hook_layers(profile)
        self.max_sequence_length: int = getattr(self._model.config, "max_position_embeddings", None) or 1 << 30
        takes = inspect.signature(self._model.forward).parameters
        # The name of the KV cache in transformers, as an argument and as an output: past_key_values before 5.24.
        self._kv_cache = "cache" if "cache" in takes else "past_key_values"
        # Only the last position is needed, and the output embedding is a large part of a small model.
        self._options = {"use_cache": True, **({"logits_to_keep": 1} if "logits_to_keep" in takes else {})}

    def load_adapter(self, lora: LoraInputs) -> Adapter:
        """Copy the adapter's layers out of the request's memory, in the dtype of the computation."""
        if lora.weights is None or lora.config is None:
            return {}
        weights, config = as_torch(lora.weights)[0], as_torch(lora.config)[0]
        magnitudes = unpack_magnitudes(weights, config, self._modules)
        return {
            key: LoraLayer(
                self._own(lora_A), self._own(lora_B), self._own(magnitudes[key]) if key in magnitudes else None
            )
            for key, (lora_A, lora_B) in unpack(weights, config, self._modules).items()
        }

    def _own(self, tensor: torch.Tensor) -> torch.Tensor:
        return tensor.to(self._dtype, copy=True)

    def begin(self, request: GenerationRequest, adapter: Adapter | None) -> Generation:
        """The state of a new request; nothing is computed yet."""
        generator = torch.Generator().manual_seed(request.sampling.seed % (1 << 63))
        return Generation(request, adapter or {}, generator, list(request.prompt))

    def next_token(self, state: Generation) -> int:
        """The next token, by one forward pass. The first pass of a request reads its prompt."""
        self._adapter = state.adapter
        with torch.inference_mode():
            kv_cache = {self._kv_cache: state.kv_cache}
            output = self._model(input_ids=torch.tensor([state.unread]), **kv_cache, **self._options)
            token = choose_token(output.logits[0, -1], state.request, state.generated, state.generator)
        state.kv_cache = output[self._kv_cache]
        state.unread = [token]
        state.generated.append(token)
        return token

    def _hook_layers(self, profile: EngineProfile) -> None:
        missing = {(layer, name) for layer in range(profile.num_layers) for name in profile.modules}
        families = families_of(profile.architecture)
        problems = set()
        for path, layer_module in self._model.named_modules():
            number, leaves = locate(path) or (0, {})
            leaf = next((leaf for family, leaf in leaves.items() if family in families), None)
            if leaf is None:
                continue
            if len(leaf.modules) == 1:
                missing.discard((number, leaf.modules[0]))
                layer_module.register_forward_hook(self._hook(number, leaf.modules[0]))
            elif any(name in profile.modules for name in (*leaf.modules, leaf.fused)):
                problems.add(f"{leaf.fused} is one fused layer, which the CPU engine does not take apart")
        problems = problems or {f"layer {number} has no {name}" for number, name in missing}
        if problems:
            heading = (
                f"{profile.source!r} has LoRA modules that cannot be applied; leave them out of lora_target_modules"
            )
            raise EngineMismatch(one_message(heading, sorted(problems)))

    def _hook(self, layer: int, name: str) -> Callable[[torch.nn.Module, tuple[torch.Tensor], torch.Tensor], Any]:
        def add_lora(module: torch.nn.Module, inputs: tuple[torch.Tensor], output: torch.Tensor) -> torch.Tensor | None:
            lora = self._adapter.get((layer, name))
            if lora is None:
                return None
            delta = (inputs[0] @ lora.a.T) @ lora.b.T
            if lora.magnitude is None:
                return output + delta
            bias = getattr(module, "bias", None)
            bias = 0 if bias is None else bias
            return lora.magnitude * (output - bias + delta) + bias

        return add_lora


def _load_checkpoint(directory: Path, dtype: torch.dtype) -> Any:
    try:
        return AutoModelForCausalLM.from_pretrained(directory, dtype=dtype, local_files_only=True)
    except (OSError, ValueError) as error:
        raise EngineMismatch(
            f"gpt_model_path: {str(directory)!r} is not a checkpoint that transformers can load: {error}"
        ) from error
