# SPDX-FileCopyrightText: the tritonlora authors
# SPDX-License-Identifier: Apache-2.0
"""Build the CPU engine from config.pbtxt's parameters, and submit the tensors of requests to it."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping
from pathlib import Path
from typing import Any

from tritonlora.cpu_engine.backend import BACKENDS, Backend
from tritonlora.cpu_engine.executor import Executor, Sender
from tritonlora.cpu_engine.peft_cache import LoraCacheError
from tritonlora.cpu_engine.request import Tensors, asks_to_stop, parse_requests
from tritonlora.cpu_engine.synthetic import SyntheticModel
from tritonlora.cpu_engine.validation import check_lora_config
from tritonlora.engine.cpu_engine_settings import Settings, parse_settings, read_profile
from tritonlora.engine.lora_cache import parse_parameters
from tritonlora.engine.profile import EngineProfile
from tritonlora.errors import InvalidRequest


class CpuEngine:
    """One loaded model. `close` ends its thread."""

    def __init__(self, executor: Executor[Any, Any], backend: Backend, *, decoupled: bool, exclude_input: bool) -> None:
        self._executor = executor
        self._backend = backend
        self._decoupled = decoupled
        self._exclude_input = exclude_input

    def submit(
        self,
        tensors: Tensors,
        senders: Callable[[int, int], Sender],
        *,
        requested_outputs: Collection[str] = ("output_ids", "sequence_length"),
        label: str = "",
    ) -> None:
        """Queue one Triton request and return at once; `senders(row, rows)` gives the sender of a row's responses.

        `label` is the client's request id: a later request with it and `stop` ends this one.
        """
        if asks_to_stop(tensors):
            self._executor.stop(label)
            senders(0, 1).send([], last=True)
            return
        try:
            rows = parse_requests(
                tensors,
                backend=self._backend,
                decoupled=self._decoupled,
                exclude_input=self._exclude_input,
                requested_outputs=requested_outputs,
            )
            for row in rows:
                check_lora_config(row.lora)
        except (InvalidRequest, LoraCacheError) as error:
            senders(0, 1).fail(self._backend.input_error.format(id=label, error=error))
            return
        for index, row in enumerate(rows):
            self._executor.submit(row, senders(index, len(rows)), label=label)

    def close(self) -> None:
        """End the thread. Requests that have not ended get an error."""
        self._executor.close()


def load_engine(parameters: Mapping[str, str], model_directory: Path, *, decoupled: bool) -> CpuEngine:
    """Load the engine that config.pbtxt describes. Raises EngineMismatch with the reason if that is not possible."""
    settings = parse_settings(parameters, model_directory)
    cache_parameters, _ = parse_parameters(parameters)
    profile = read_profile(settings)
    executor: Executor[Any, Any] = Executor(
        _load_model(settings, profile),
        profile,
        cache_parameters,
        BACKENDS[settings.engine_flavour],
        max_num_requests=settings.max_num_requests,
        cancellation_check_seconds=settings.cancellation_check_period_ms / 1000,
    )
    return CpuEngine(
        executor,
        BACKENDS[settings.engine_flavour],
        decoupled=decoupled,
        exclude_input=settings.exclude_input_in_output,
    )


def _load_model(settings: Settings, profile: EngineProfile) -> Any:
    if settings.synthetic:
        return SyntheticModel(settings.synthetic_token_seconds)
    from tritonlora.cpu_engine.causal_lm import CausalLM  # transformers takes seconds to import

    return CausalLM(settings.gpt_model_path, profile, compute_dtype=settings.compute_dtype)
