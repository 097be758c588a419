# SPDX-FileCopyrightText: the tritonlora authors
# SPDX-License-Identifier: Apache-2.0
"""Read the model.yaml of TensorRT-LLM's LLM API model: the server's config, the base model and LoRA.

Source: TensorRT-LLM triton_backend/all_models/llmapi/tensorrt_llm/1/model.{yaml,py} and tensorrt_llm/lora_helper.py.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from tritonlora.engine.profile import SPECULATIVE, EngineProfile, profile_from_hf, read_config_json
from tritonlora.errors import ConfigError, UnknownArchitecture, one_message
from tritonlora.pbtxt.model_config import ModelConfig
from tritonlora.serving.file_version import read_file

_MAX_BYTES = 1 << 20
NAME_VARIABLE = "LLM_CONFIG_PATH"  # upstream's: another name than model.yaml


@dataclass(frozen=True, slots=True)
class LoraSettings:
    """`lora_config`, with upstream's defaults."""

    lora_target_modules: tuple[str, ...] | None = None  # None: all that the model has
    max_lora_rank: int = 64
    max_loras: int = 4  # on the GPU at one time
    max_cpu_loras: int = 4  # in host memory


@dataclass(frozen=True, slots=True)
class ModelYaml:
    """The settings of a model.yaml that tritonlora needs."""

    path: Path
    model: str  # a directory, or a name on a hub
    max_batch_size: int
    decoupled: bool
    dtype: str | None  # None: the model's own
    tensor_parallel_size: int
    pipeline_parallel_size: int
    lora: LoraSettings | None  # None: the model refuses adapters
    is_speculative: bool = False


def load_model_yaml(directory: Path) -> ModelYaml:
    """The model.yaml of the target in `directory`; ConfigError with every problem in it."""
    import yaml  # here alone, for the sake of the other commands' start

    path = directory / "1" / os.environ.get(NAME_VARIABLE, "model.yaml")
    try:
        document = yaml.safe_load(read_file(path, _MAX_BYTES).decode())
    except (OSError, UnicodeDecodeError, yaml.YAMLError, RecursionError) as error:
        raise ConfigError(f"cannot read {path}, which the LLM API's model needs: {error}") from None
    return parse_model_yaml(document, path)


def parse_model_yaml(document: object, path: Path) -> ModelYaml:
    """Parse the content of a model.yaml. Raises ConfigError with every problem."""
    top = _Section(document, "")
    triton = _Section(top.values.get("triton_config"), "triton_config.")
    lora = _Section(top.values.get("lora_config") or {}, "lora_config.")
    model = top.get("model", _is_text, "", "a directory or a name")
    dtype = top.get("dtype", _is_text, "auto", "a name")
    defaults = LoraSettings()
    targets = lora.get("lora_target_modules", _is_names, [], "a list of modules")
    settings = LoraSettings(
        lora_target_modules=tuple(targets) or None,
        max_lora_rank=lora.get("max_lora_rank", _is_count, defaults.max_lora_rank, "a whole number"),
        max_loras=lora.get("max_loras", _is_count, defaults.max_loras, "a whole number"),
        max_cpu_loras=lora.get("max_cpu_loras", _is_count, defaults.max_cpu_loras, "a whole number"),
    )
    found = ModelYaml(
        path=path,
        model=model,
        max_batch_size=triton.get("max_batch_size", _is_count, None, "a whole number"),
        # Upstream takes any value for a bool. Another type is more likely a mistake.
        decoupled=triton.get("decoupled", _is_bool, None, "true or false"),
        dtype=None if dtype == "auto" else dtype,
        tensor_parallel_size=top.get("tensor_parallel_size", _is_count, 1, "a whole number"),
        pipeline_parallel_size=top.get("pipeline_parallel_size", _is_count, 1, "a whole number"),
        lora=settings if top.values.get("lora_config") or top.values.get("enable_lora") else None,
        is_speculative=bool(top.values.get("speculative_config")),
    )
    problems = [*top.problems, *triton.problems, *lora.problems]
    if problems:
        raise ConfigError(one_message(f"{path} cannot be used", problems))
    return found


def complete(config: ModelConfig, directory: Path) -> ModelConfig:
    """`config` with max_batch_size and the transaction policy, which the model sets when the server loads it."""
    found = load_model_yaml(directory)
    return replace(config, max_batch_size=found.max_batch_size, decoupled=found.decoupled)


def profile_of(found: ModelYaml) -> EngineProfile | None:
    """The profile of the base model; None if it is not on this machine, or has an unknown architecture.

    The model reads adapters by itself, so it may serve adapters that tritonlora cannot convert.
    """
    file = Path(found.model) / "config.json"
    if not found.model or not file.exists():
        return None
    lora = found.lora or LoraSettings()
    try:
        profile = profile_from_hf(
            read_config_json(file),
            found.model,
            max_lora_rank=lora.max_lora_rank,
            target_modules=lora.lora_target_modules if found.lora else (),
            dtype=found.dtype,
        )
    except UnknownArchitecture:
        return None
    return replace(
        profile,
        tp_size=found.tensor_parallel_size,
        pp_size=found.pipeline_parallel_size,
        reports=(SPECULATIVE,) if found.is_speculative else (),
    )


class _Section:
    """Reads the values of one mapping, and remembers every problem instead of stopping at the first."""

    def __init__(self, values: object, prefix: str) -> None:
        self.problems: list[str] = []
        self._prefix = prefix
        self._is_mapping = isinstance(values, dict)
        self.values: Mapping[str, Any] = values if isinstance(values, dict) else {}
        if not self._is_mapping:
            where = prefix.rstrip(".") or "the file"
            self.problems.append(f"{where} must be a mapping, got {type(values).__name__}")

    def get(self, key: str, is_right: Callable[[object], bool], default: Any, expected: str) -> Any:
        value = self.values.get(key, default)
        if self._is_mapping and not is_right(value):
            self.problems.append(f"{self._prefix}{key} must be {expected}, got {value!r}")
            return default
        return value


def _is_text(value: object) -> bool:
    return isinstance(value, str)


def _is_bool(value: object) -> bool:
    return isinstance(value, bool)


def _is_count(value: object) -> bool:
    return type(value) is int and value >= 0


def _is_names(value: object) -> bool:
    return isinstance(value, list) and all(isinstance(name, str) for name in value)
