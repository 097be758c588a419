# SPDX-FileCopyrightText: the tritonlora authors
# SPDX-License-Identifier: Apache-2.0
"""Small random Hugging Face models and PEFT adapters, and what PEFT itself says that an adapter adds to them."""

from __future__ import annotations

import functools
import json
import re
import tempfile
import warnings
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ParamSpec, TypeVar

import peft
import torch
import transformers
from safetensors.torch import load_file, save_file

from tritonlora.conversion.layout import plan_layout
from tritonlora.conversion.rows import Layout
from tritonlora.conversion.stored_rows import StoredRows, rebuild_adapter
from tritonlora.conversion.tensors import convert_file
from tritonlora.engine.profile import EngineProfile
from tritonlora.peft.adapter import Adapter

P = ParamSpec("P")
R = TypeVar("R")
LLAMA_CONFIG: Mapping[str, Any] = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": 64,
}
LINEAR = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")


def without_warnings(function: Callable[P, R]) -> Callable[P, R]:
    """transformers and PEFT warn about each other, and warnings are errors in the tests."""

    @functools.wraps(function)
    def quiet(*args: P.args, **kwargs: P.kwargs) -> R:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            return function(*args, **kwargs)

    return quiet


@dataclass(frozen=True)
class Saved:
    """A model and an adapter on disk, and PEFT's model that holds both."""

    model: peft.PeftModel
    adapter: Path
    base: Path

    def deltas(self) -> dict[str, torch.Tensor]:
        """Path in the base model -> what PEFT adds to the layer's weight, (out, in), computed in float64."""
        found = {}
        self.model.double()
        for name, module in self.model.get_base_model().named_modules():
            if isinstance(module, peft.tuners.lora.Linear):
                delta = module.get_delta_weight(self.model.active_adapter).detach()
                found[name] = delta.T if getattr(module, "fan_in_fan_out", False) else delta
        return found


def save_llama_adapter(directory: Path, **options: Any) -> Saved:
    """`save_adapter` on a small random Llama; `options` go to LoraConfig, all linear layers at rank 4 by default."""
    config = transformers.LlamaConfig(**LLAMA_CONFIG)
    return save_adapter(directory, transformers.LlamaForCausalLM, config, **options)


@without_warnings
def save_adapter(
    directory: Path,
    model_class: type,
    config: transformers.PretrainedConfig,
    *,
    dtype: torch.dtype = torch.bfloat16,
    base_dtype: torch.dtype = torch.float32,
    adapter_name: str = "default",
    safe_serialization: bool = True,
    seed: int = 0,
    **options: Any,
) -> Saved:
    """Make a random model of `model_class` in directory/base and a random adapter of it in directory/adapter."""
    torch.manual_seed(seed)
    base = directory / "base"
    model = model_class(config).to(base_dtype)
    model.save_pretrained(base)
    lora = peft.LoraConfig(**{"r": 4, "lora_alpha": 8, "target_modules": list(LINEAR), **options})
    peft_model = peft.get_peft_model(model, lora, adapter_name=adapter_name)
    for name, parameter in peft_model.named_parameters():
        if "lora_A" in name or "lora_B" in name:
            parameter.data = torch.randn(parameter.shape).to(dtype)
        elif "lora_magnitude_vector" in name:
            parameter.data = (parameter.data * (1 + 0.1 * torch.randn(parameter.shape))).to(dtype)
    # PEFT looks for the base model by this name, to see whether its vocabulary was resized.
    peft_model.peft_config[adapter_name].base_model_name_or_path = str(base)
    peft_model.save_pretrained(str(directory / "adapter"), safe_serialization=safe_serialization)
    return Saved(peft_model, directory / "adapter", base)


def write_adapter(
    directory: Path, tensors: Mapping[str, torch.Tensor], *, prefix: str = "base_model.model.", **config: Any
) -> Path:
    """Write an adapter by hand: `tensors` under their names after `prefix`, `config` over r=2 and lora_alpha=4."""
    directory.mkdir(parents=True, exist_ok=True)
    fields = {"peft_type": "LORA", "r": 2, "lora_alpha": 4, "base_model_name_or_path": "base", **config}
    (directory / "adapter_config.json").write_text(json.dumps(fields))
    save_file(
        {prefix + name: tensor.contiguous() for name, tensor in tensors.items()},
        directory / "adapter_model.safetensors",
    )
    return directory


def lora_weights(adapter: Adapter, layout: Layout, *, base: Path | None = None) -> torch.Tensor:
    """What `convert_file` writes: (n, W) of `layout.dtype`."""
    with tempfile.TemporaryDirectory() as directory:
        path = Path(directory) / "lora_weights"
        convert_file(adapter, layout, path, base=base)
        content = bytearray(path.read_bytes())
    return torch.frombuffer(content, dtype=getattr(torch, layout.dtype)).view(layout.weights_shape)


def rebuilt(layout: Layout, weights: torch.Tensor, profile: EngineProfile) -> tuple[Layout, torch.Tensor]:
    """The layout and lora_weights of the adapter that `rebuild_adapter` makes of these rows."""
    with tempfile.TemporaryDirectory() as directory:
        path = Path(directory) / "lora_weights"
        path.write_bytes(weights.contiguous().view(torch.uint8).numpy().tobytes())
        rows = tuple((row.module.id, row.layer, row.adapter_size) for row in layout.rows)
        adapter = rebuild_adapter(StoredRows(rows, path, layout.width, layout.dtype), profile, "base")
        again = plan_layout(adapter, dtype=layout.dtype, profile=profile)
        return again, lora_weights(adapter, again)


def lora_pair(
    path: str, *, r: int = 2, in_features: int = 32, out_features: int = 32, dtype: torch.dtype = torch.bfloat16
) -> dict[str, torch.Tensor]:
    """Random lora_A and lora_B of one module, for `write_adapter`."""
    return {
        f"{path}.lora_A.weight": torch.randn(r, in_features).to(dtype),
        f"{path}.lora_B.weight": torch.randn(out_features, r).to(dtype),
    }


MLX = {"fine_tune_type": "lora", "num_layers": 2, "lora_parameters": {"rank": 4, "scale": 2.5, "dropout": 0.0}}


def as_mlx(saved: Path, directory: Path) -> Path:
    """The adapter of `saved` as mlx-lm writes it: matrices transposed, names without PEFT's prefix."""
    tensors = {
        re.sub(
            r"lora_([AB])\.weight", lambda match: f"lora_{match[1].lower()}", key.removeprefix("base_model.model.")
        ): (tensor.T.contiguous())
        for key, tensor in load_file(saved / "adapter_model.safetensors").items()
    }
    directory.mkdir()
    save_file(tensors, directory / "adapters.safetensors")
    (directory / "adapter_config.json").write_text(json.dumps(MLX))
    return directory
