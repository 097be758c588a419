# SPDX-FileCopyrightText: the tritonlora authors
# SPDX-License-Identifier: Apache-2.0
"""The CPU engine as a whole: from config.pbtxt's parameters to something that takes the tensors of requests."""

from __future__ import annotations

import json
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tritonlora.cache import LoraCacheError, parse_parameters
from tritonlora.cpu_engine.executor import Answers, Executor
from tritonlora.cpu_engine.flavour import FLAVOURS, Flavour
from tritonlora.cpu_engine.request import Tensors, asks_to_stop, parse_requests
from tritonlora.cpu_engine.synthetic import SyntheticModel
from tritonlora.cpu_engine.validation import check_lora_config
from tritonlora.engine import EngineProfile, profile_from_hf
from tritonlora.errors import EngineMismatch, InvalidRequest, one_message

COMPUTE_DTYPES = ("float32", "bfloat16", "float16")


@dataclass(frozen=True, slots=True)
class Settings:
    """What this engine reads of config.pbtxt's parameters, besides lora_cache_*; upstream's names where it has one."""

    gpt_model_path: Path  # a Hugging Face checkpoint; with `synthetic`, only its config.json is read
    exclude_input_in_output: bool = False
    max_num_requests: int = 64  # taken at one time; more wait
    cancellation_check_period_ms: float = 100
    max_lora_rank: int = 64
    lora_target_modules: tuple[str, ...] | None = None  # None: all that the architecture has; ("none",): no LoRA
    compute_dtype: str = "float32"
    engine_flavour: str = "cpp"  # whose error texts
    synthetic: bool = False
    synthetic_token_seconds: float = 0.0


def parse_settings(parameters: Mapping[str, str], model_directory: Path) -> Settings:
    """`parameters` as config.pbtxt has them; an empty one and an unfilled `${...}` count as not given.

    Relative paths are relative to the model's directory. EngineMismatch names every parameter that is wrong.
    """
    given = {name: text.strip() for name, text in parameters.items() if text.strip() and not text.startswith("${")}
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


_BOOLEANS = {"true": True, "1": True, "false": False, "0": False}
_CONVERT: dict[str, tuple[Callable[[str], Any], str]] = {
    "gpt_model_path": (Path, "a path"),
    "exclude_input_in_output": (lambda text: _BOOLEANS[text.lower()], "true or false"),
    "max_num_requests": (_at_least_one, "a whole number above 0"),
    "cancellation_check_period_ms": (_duration, "milliseconds"),
    "max_lora_rank": (_at_least_one, "a whole number above 0"),
    "lora_target_modules": (lambda text: tuple(text.replace(",", " ").split()), "names of LoRA modules"),
    "compute_dtype": _one_of(*COMPUTE_DTYPES),
    "engine_flavour": _one_of(*FLAVOURS),
    "synthetic": (lambda text: _BOOLEANS[text.lower()], "true or false"),
    "synthetic_token_seconds": (_duration, "seconds"),
}


class CpuEngine:
    """One loaded model. `close` ends its thread."""

    def __init__(self, executor: Executor[Any, Any], flavour: Flavour, *, decoupled: bool, exclude_input: bool) -> None:
        self._executor = executor
        self._flavour = flavour
        self._decoupled = decoupled
        self._exclude_input = exclude_input

    def submit(
        self,
        tensors: Tensors,
        answers: Callable[[int, int], Answers],
        *,
        requested_outputs: Collection[str] = ("output_ids", "sequence_length"),
        label: str = "",
    ) -> None:
        """Take one Triton request and return at once; `answers(row, rows)` says where the answers of a row go.

        `label` is the client's request id: a later request with it and `stop` ends this one.
        """
        if asks_to_stop(tensors):
            self._executor.stop(label)
            answers(0, 1).send([], last=True)
            return
        try:
            rows = parse_requests(
                tensors,
                flavour=self._flavour,
                decoupled=self._decoupled,
                exclude_input=self._exclude_input,
                requested_outputs=requested_outputs,
            )
            for row in rows:
                check_lora_config(row.lora)
        except (InvalidRequest, LoraCacheError) as error:
            answers(0, 1).fail(self._flavour.input_error.format(id=label, error=error))
            return
        for index, row in enumerate(rows):
            self._executor.submit(row, answers(index, len(rows)), label=label)

    def close(self) -> None:
        """Requests that are not answered yet get an error."""
        self._executor.close()


def load_engine(parameters: Mapping[str, str], model_directory: Path, *, decoupled: bool) -> CpuEngine:
    """The engine that config.pbtxt asks for. EngineMismatch: it cannot be loaded so, and why."""
    settings = parse_settings(parameters, model_directory)
    cache_parameters, _ = parse_parameters(parameters)
    profile = _load_profile(settings)
    executor: Executor[Any, Any] = Executor(
        _load_model(settings, profile),
        profile,
        cache_parameters,
        FLAVOURS[settings.engine_flavour],
        max_num_requests=settings.max_num_requests,
        cancellation_check_seconds=settings.cancellation_check_period_ms / 1000,
    )
    return CpuEngine(
        executor,
        FLAVOURS[settings.engine_flavour],
        decoupled=decoupled,
        exclude_input=settings.exclude_input_in_output,
    )


def _load_profile(settings: Settings) -> EngineProfile:
    file = settings.gpt_model_path / "config.json"
    try:
        config = json.loads(file.read_bytes())
    except (OSError, ValueError) as error:
        raise EngineMismatch(f"gpt_model_path: cannot read {str(file)!r}: {error}") from error
    targets = settings.lora_target_modules
    return profile_from_hf(
        config,
        str(settings.gpt_model_path),
        max_lora_rank=settings.max_lora_rank,
        target_modules=() if targets == ("none",) else targets,
    )


def _load_model(settings: Settings, profile: EngineProfile) -> Any:
    if settings.synthetic:
        return SyntheticModel(settings.synthetic_token_seconds)
    from tritonlora.cpu_engine.causal_lm import CausalLM  # transformers takes seconds to import

    return CausalLM(settings.gpt_model_path, profile, compute_dtype=settings.compute_dtype)
