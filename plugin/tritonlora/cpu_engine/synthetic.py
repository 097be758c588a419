# SPDX-FileCopyrightText: the tritonlora authors
# SPDX-License-Identifier: Apache-2.0
"""A model without weights. It computes each token from the task id and the prompt, at a set pace.

Benchmarks measure the router's own cost with it, and tests send it thousands of requests. LoRA inputs are checked,
cached and evicted as with a real model, but not used for tokens. Sampling inputs have no effect.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from tritonlora.cpu_engine.request import GenerationRequest, LoraInputs


@dataclass(frozen=True, slots=True)
class SyntheticModel:
    """The response to "hello" with task id 12 is "[12]hello[12]hello...". Each token is one byte."""

    iteration_seconds: float = 0.0
    max_sequence_length: int = 1 << 30
    max_num_tokens: int = 1 << 30

    def load_adapter(self, lora: LoraInputs) -> None:
        """Load nothing."""

    def begin(self, request: GenerationRequest, adapter: None) -> Iterator[int]:  # noqa: ARG002
        """An iterator over the response's tokens, without an end."""
        task_id = request.lora.task_id
        tag = f"[{task_id}]" if task_id else "[base]"
        return itertools.cycle([*tag.encode(), *request.prompt])

    def forward(self, states: Sequence[Iterator[int]]) -> None:
        """Compute nothing."""

    def next_token(self, state: Iterator[int]) -> int:
        """The next token."""
        return next(state)
