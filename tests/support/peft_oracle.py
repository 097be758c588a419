# SPDX-FileCopyrightText: the tritonlora authors
# SPDX-License-Identifier: Apache-2.0
"""What transformers and PEFT themselves answer: the oracle for everything that comes out of the CPU engine."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import peft
import torch
import transformers

EOS = 2  # Llama's


def load_peft(base: Path, adapter: Path) -> peft.PeftModel:
    """The adapter on its base model, as PEFT loads them, in float32."""
    model = transformers.AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return peft.PeftModel.from_pretrained(model, adapter).eval()


def generate(model: Any, prompt: Sequence[int], length: int, **options: Any) -> list[int]:
    """The greedy answer of at most `length` tokens; without the end token, as the engine gives it."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        output = model.generate(
            input_ids=torch.tensor([prompt]),
            attention_mask=torch.ones(1, len(prompt), dtype=torch.long),
            generation_config=transformers.GenerationConfig(
                do_sample=False, max_new_tokens=length, eos_token_id=EOS, pad_token_id=0, **options
            ),
        )
    answer: list[int] = output[0, len(prompt) :].tolist()
    return answer[:-1] if answer[-1] == EOS else answer
