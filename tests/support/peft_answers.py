# SPDX-FileCopyrightText: the tritonlora authors
# SPDX-License-Identifier: Apache-2.0
"""Random adapters of a byte-wise model, and what PEFT's own greedy generate answers with them, as text."""

from __future__ import annotations

import contextlib
import warnings
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import peft
import torch
import transformers

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


def save_llama(
    directory: Path, adapters: Mapping[str, dict[str, Any]], *, layers: int, dtype: torch.dtype
) -> dict[tuple[str | None, str], str]:
    """Save a small random Llama in `directory`/base and a random adapter of it beside that for each of `adapters`.

    What they answer to PROMPTS: (adapter, or None for the base model, and prompt) -> text.
    """
    config = transformers.LlamaConfig(
        vocab_size=VOCABULARY,
        hidden_size=64,
        intermediate_size=96,
        num_hidden_layers=layers,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=512,
    )
    answers: dict[tuple[str | None, str], str] = {}
    with without_warnings():
        torch.manual_seed(0)
        model: Any = transformers.LlamaForCausalLM(config)
        model.to(dtype).save_pretrained(directory / "base")
        for seed, name in enumerate([None, *adapters]):
            model = transformers.LlamaForCausalLM.from_pretrained(directory / "base", dtype=torch.float32)
            if name is not None:
                model = random_adapter(model, seed, adapters[name], directory / name)
            answers |= {(name, prompt): greedy(model, prompt) for prompt in PROMPTS}
    return answers


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
