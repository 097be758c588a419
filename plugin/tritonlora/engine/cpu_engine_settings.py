# SPDX-FileCopyrightText: the tritonlora authors
# SPDX-License-Identifier: Apache-2.0
"""The CPU engine's parameters in config.pbtxt, and its engine profile. This module does not import torch."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tritonlora.engine.profile import EngineProfile, profile_from_hf, read_config_json
from tritonlora.errors import EngineMismatch, one_message
from tritonlora.pbtxt.model_config import has_template
from tritonlora.serving.dtypes import LORA_DTYPES

BACKENDS = ("cpp", "python")
"""Upstream's two backends for the same engine."""


@dataclass(frozen=True, slots=True)
class Settings:
    """The CPU engine's parameters, without lora_cache_*. Names are upstream's where upstream has the parameter."""

    gpt_model_path: Path  # a Hugging Face checkpoint; with `synthetic`, only its config.json is read
    exclude_input_in_output: bool = False
    max_num_requests: int = 64  # active at one time; further requests wait
    cancellation_check_period_ms: float = 100
    max_lora_rank: int = 64
    lora_target_modules: tuple[str, ...] | None = None  # None: all that the architecture has; ("none",): no LoRA
    compute_dtype: str = "float32"
    engine_flavour: str = "cpp"  # one of BACKENDS, whose error texts the engine uses
    synthetic: bool = False
    synthetic_token_seconds: float = 0.0


def parse_settings(parameters: Mapping[str, str], model_directory: Path) -> Settings:
    """Parse the `parameters` of config.pbtxt. An empty value and a placeholder `${...}` count as not given.

    Relative paths are relative to the model's directory. EngineMismatch names every parameter that is wrong.
    """
    given = {name: text.strip() for name, text in parameters.items() if text.strip() and not has_template(text)}
    values: dict[str, Any] = {}
    problems = []
    for name, (convert, expected) in _CONVERT.items():
        if name in given:
            try:
                values[name] = convert(given[name])
            except (ValueError, KeyError):
                problems.append(f"{name} is {given[name]!r}, expected {expected}")
    if "gpt_model_path" in values:
        values["gpt_model_path"] = model_directory / values["gpt_model_path"]
    elif "gpt_model_path" not in given:
        problems.append("gpt_model_path is not set: give the directory of a Hugging Face checkpoint")
    if problems:
        raise EngineMismatch(one_message("parameters of the CPU engine", problems))
    return Settings(**values)


def is_cpu_engine(parameters: Mapping[str, str]) -> bool:
    """Whether a model with these parameters is the engine that ships with tritonlora."""
    return "synthetic" in parameters


def _one_of(*choices: str) -> tuple[Callable[[str], str], str]:
    return {choice: choice for choice in choices}.__getitem__, f"one of {', '.join(choices)}"


def _at_least_one(text: str) -> int:
    number = int(text)
    if number < 1:
        raise ValueError
    return number


def _duration(text: str) -> float:
    number = float(text)
    if not 0 <= number < 1e6:
        raise ValueError
    return number


# protobuf's grammar (pbtxt.model_config) takes t and refuses TRUE, and the text models (serving.text) take yes. So this
# table is not shared with them.
_BOOLEANS = {"true": True, "1": True, "false": False, "0": False}
_CONVERT: dict[str, tuple[Callable[[str], Any], str]] = {
    "gpt_model_path": (Path, "a path"),
    "exclude_input_in_output": (lambda text: _BOOLEANS[text.lower()], "true or false"),
    "max_num_requests": (_at_least_one, "a whole number above 0"),
    "cancellation_check_period_ms": (_duration, "milliseconds"),
    "max_lora_rank": (_at_least_one, "a whole number above 0"),
    "lora_target_modules": (lambda text: tuple(text.replace(",", " ").split()), "names of LoRA modules"),
    "compute_dtype": _one_of(*LORA_DTYPES),
    "engine_flavour": _one_of(*BACKENDS),
    "synthetic": (lambda text: _BOOLEANS[text.lower()], "true or false"),
    "synthetic_token_seconds": (_duration, "seconds"),
}


def read_profile(settings: Settings) -> EngineProfile:
    """The engine's profile. Raises EngineMismatch if its config.json cannot be read."""
    try:
        config = read_config_json(settings.gpt_model_path / "config.json")
    except EngineMismatch as error:
        raise EngineMismatch(f"gpt_model_path: {error}") from error
    targets = settings.lora_target_modules
    return profile_from_hf(
        config,
        str(settings.gpt_model_path),
        max_lora_rank=settings.max_lora_rank,
        target_modules=() if targets == ("none",) else targets,
    )
