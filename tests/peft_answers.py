# SPDX-FileCopyrightText: the tritonlora authors
# SPDX-License-Identifier: Apache-2.0
"""Random adapters of a byte-wise model, and what PEFT's own greedy generate answers with them, as text."""

from __future__ import annotations

import contextlib
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import peft
import torch

TOKENS = 24
# ASCII only, so that with the byte tokenizer a text says exactly which tokens it was made of.
VOCABULARY = 128
PROMPTS = ("What is the capital of France?", "x", "Tell me about the sea, please. " * 4)


@contextlib.contextmanager
def without_warnings() -> Iterator[None]:
    """transformers and PEFT warn about each other, and warnings are errors in the tests."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield


def random_adapter(model: Any, seed: int, options: dict[str, Any], directory: Path) -> Any:
    """A PEFT model with a random adapter, saved in `directory` in bfloat16."""
    torch.manual_seed(seed)
    adapted = peft.get_peft_model(model, peft.LoraConfig(**options))
    weights = [parameter for name, parameter in adapted.named_parameters() if "lora_" in name]
    for parameter in weights:
        parameter.data = (torch.randn_like(parameter) * 0.3).bfloat16()
    adapted.save_pretrained(str(directory))
    for parameter in weights:
        parameter.data = parameter.data.float()
    return adapted


def greedy(model: Any, prompt: str) -> str:
    """The answer to `prompt`, of exactly TOKENS tokens."""
    input_ids = torch.tensor([list(prompt.encode())])
    output = model.generate(
        input_ids=input_ids,
        attention_mask=torch.ones_like(input_ids),
        max_new_tokens=TOKENS,
        do_sample=False,
        eos_token_id=None,
        pad_token_id=0,
    )
    return bytes(output[0, input_ids.shape[1] :].tolist()).decode()
