# SPDX-FileCopyrightText: the tritonlora authors
# SPDX-License-Identifier: Apache-2.0
"""A Hugging Face causal language model that applies a different adapter to each request.

The adapter is read from the wire tensors alone. A forward hook of each linear layer adds `x Aᵀ Bᵀ` of each request's
adapter to the layer's output at that request's tokens. Each request has a KV cache of its own, so no request sees the
adapter of another one.
"""

from __future__ import annotations

import inspect
import itertools
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM, DynamicCache

from tritonlora.architectures.layers import families_of, locate
from tritonlora.conversion.unpack import unpack, unpack_magnitudes
from tritonlora.cpu_engine.packed import enable_packing, packed_logits
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
_BASE_MODEL: Adapter = {}


@dataclass(slots=True)
class Generation:
    """One request between its tokens."""

    request: GenerationRequest
    adapter: Adapter
    generator: torch.Generator
    unread: list[int]  # tokens that the model has not seen yet
    generated: list[int] = field(default_factory=list)
    kv_cache: Any = None
    logits: Any = None  # (vocabulary,), of the token after `generated`


class CausalLM:
    """The model of one checkpoint. One pass computes a token for each of its requests."""

    iteration_seconds = 0.0
    max_num_tokens = 256  # a small model reads them within a second on a laptop

    def __init__(self, checkpoint: Path, profile: EngineProfile, *, compute_dtype: str = "float32") -> None:
        """Load the checkpoint. EngineMismatch if there is none, or if a LoRA module of `profile` has no own layer."""
        self._dtype = getattr(torch, compute_dtype)
        self._modules = {dims.module.id: dims for dims in profile.modules.values()}
        self._model = _load_checkpoint(checkpoint, self._dtype)
        self._adapters: list[tuple[Adapter, slice]] = []  # of the pass that runs, each with its tokens
        self._hook_layers(profile)
        self._packs = enable_packing(self._model)
        self._vocabulary_size = self._model.get_input_embeddings().num_embeddings
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
        """The state of a new request; nothing is computed yet. ValueError for a token that the model does not have."""
        for token in request.prompt:
            if not 0 <= token < self._vocabulary_size:
                raise ValueError(f"token {token} is not one of the model's {self._vocabulary_size} tokens")
        generator = torch.Generator().manual_seed(request.sampling.seed % (1 << 63))
        kv_cache = DynamicCache() if self._packs else None  # else the model makes its own
        return Generation(request, adapter or _BASE_MODEL, generator, list(request.prompt), kv_cache=kv_cache)

    def forward(self, states: Sequence[Generation]) -> None:
        """Compute the logits of each request's next token. The first pass of a request reads its prompt."""
        with torch.inference_mode():
            if self._packs:
                self._forward_packed(states)
            else:
                for state in states:
                    self._forward_alone(state)

    def next_token(self, state: Generation) -> int:
        """Choose the next token by the logits that `forward` has computed."""
        token = choose_token(state.logits, state.request, state.generated, state.generator)
        state.unread = [token]
        state.generated.append(token)
        return token

    def _forward_packed(self, states: Sequence[Generation]) -> None:
        states = sorted(states, key=_adapter_id)  # so that a layer computes all tokens of an adapter together
        self._adapters, end = [], 0
        for _, group in itertools.groupby(states, key=_adapter_id):
            members = list(group)
            start, end = end, end + sum(len(state.unread) for state in members)
            self._adapters.append((members[0].adapter, slice(start, end)))
        logits = packed_logits(self._model, [state.unread for state in states], [state.kv_cache for state in states])
        for state, of_state in zip(states, logits, strict=True):
            state.logits = of_state

    def _forward_alone(self, state: Generation) -> None:
        self._adapters = [(state.adapter, slice(None))]
        kv_cache = {self._kv_cache: state.kv_cache}
        output = self._model(input_ids=torch.tensor([state.unread]), **kv_cache, **self._options)
        state.kv_cache = output[self._kv_cache]
        state.logits = output.logits[0, -1]

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

    def _hook(self, layer: int, name: str) -> Callable[[torch.nn.Module, tuple[torch.Tensor], torch.Tensor], None]:
        def add_lora(module: torch.nn.Module, inputs: tuple[torch.Tensor], output: torch.Tensor) -> None:
            for adapter, tokens in self._adapters:
                lora = adapter.get((layer, name))
                if lora is None:
                    continue
                part = output[..., tokens, :]
                part += (inputs[0][..., tokens, :] @ lora.a.T) @ lora.b.T
                if lora.magnitude is not None:
                    bias = getattr(module, "bias", None)
                    bias = 0 if bias is None else bias
                    part.sub_(bias).mul_(lora.magnitude).add_(bias)

        return add_lora


def _adapter_id(state: Generation) -> int:
    return id(state.adapter)


def _load_checkpoint(directory: Path, dtype: torch.dtype) -> Any:
    try:
        return AutoModelForCausalLM.from_pretrained(directory, dtype=dtype, local_files_only=True)
    except (OSError, ValueError) as error:
        raise EngineMismatch(
            f"gpt_model_path: {str(directory)!r} is not a checkpoint that transformers can load: {error}"
        ) from error
