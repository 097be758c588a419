# SPDX-FileCopyrightText: the tritonlora authors
# SPDX-License-Identifier: Apache-2.0
"""A model without weights: each token follows from the task id and the prompt, at a set pace.

It makes the router's own cost measurable, and thousands of requests drivable. The LoRA inputs are checked, counted in
pages and evicted as with a real model; only nothing is computed with them, and how to sample has no effect.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from dataclasses import dataclass

from tritonlora.cpu_engine.request import GenerationRequest, LoraInputs


@dataclass(frozen=True, slots=True)
class SyntheticModel:
    """Answers "[12]hello[12]hello..." to "hello" with task id 12, in a tokenizer whose tokens are bytes."""

    iteration_seconds: float = 0.0
    max_sequence_length: int = 1 << 30

    def load_adapter(self, lora: LoraInputs) -> None:
        """Nothing to load."""

    def begin(self, request: GenerationRequest, adapter: None) -> Iterator[int]:  # noqa: ARG002
        """The endless answer."""
        task_id = request.lora.task_id
        tag = f"[{task_id}]" if task_id else "[base]"
        return itertools.cycle([*tag.encode(), *request.prompt])

    def next_token(self, state: Iterator[int]) -> int:
        """The next of them."""
        return next(state)
