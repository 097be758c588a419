# SPDX-FileCopyrightText: the tritonlora authors
# SPDX-License-Identifier: Apache-2.0
"""Packed passes against passes of each request alone, for models of several families."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import transformers as hf

from adapters import LLAMA_CONFIG
from tritonlora.cpu_engine.packed import enable_packing, packed_logits

PROMPTS = ([5, 17, 3, 42, 7, 9, 11], [9, 9, 1], [60])
NEXT = ([4], [8], [15])
CASES = list(zip(PROMPTS, NEXT, strict=True))
MOE = {**LLAMA_CONFIG, "num_local_experts": 2, "num_experts_per_tok": 1}
GPT2 = {"n_embd": 32, "n_layer": 2, "n_head": 4, "vocab_size": 64}
MHA = {name: size for name, size in LLAMA_CONFIG.items() if name != "num_key_value_heads"}

Make = Callable[[], Any]


def model_of(name: str, config: Any) -> Any:
    torch.manual_seed(0)
    return getattr(hf, name)(config).eval()


PACKED: dict[str, Make] = {
    "grouped queries": lambda: model_of("LlamaForCausalLM", hf.LlamaConfig(**LLAMA_CONFIG)),
    "wide heads": lambda: model_of("Qwen3ForCausalLM", hf.Qwen3Config(**LLAMA_CONFIG, head_dim=16)),
    "experts": lambda: model_of("MixtralForCausalLM", hf.MixtralConfig(**MOE, sliding_window=None)),
    "one layer for q, k and v": lambda: model_of("GPTNeoXForCausalLM", hf.GPTNeoXConfig(**MHA)),
    "a window that is off": lambda: model_of(
        "MistralForCausalLM", hf.MistralConfig(**LLAMA_CONFIG, sliding_window=None)
    ),
}


@pytest.mark.parametrize("make", PACKED.values(), ids=PACKED.keys())
def test_a_packed_pass_gives_what_each_request_gets_alone(make: Make) -> None:
    """For prompts, for the tokens after them, and for both in one pass."""
    model = make()
    with torch.inference_mode():
        alone = [[model(input_ids=torch.tensor([p + n[:more]])).logits[0, -1] for more in (0, 1)] for p, n in CASES]
        assert enable_packing(model)
        caches = [hf.DynamicCache() for _ in PROMPTS]
        first = packed_logits(model, PROMPTS[:2], caches[:2])
        mixed = packed_logits(model, [*NEXT[:2], PROMPTS[2]], caches)
        last = packed_logits(model, NEXT[2:], caches[2:])

    torch.testing.assert_close(first, torch.stack([alone[0][0], alone[1][0]]))
    torch.testing.assert_close(mixed, torch.stack([alone[0][1], alone[1][1], alone[2][0]]))
    torch.testing.assert_close(last, alone[2][1][None])


def mixing(_: Any, __: Any, output: torch.Tensor) -> torch.Tensor:
    return output + output.mean(dim=1, keepdim=True)


def failing(_: Any, __: Any, output: torch.Tensor) -> torch.Tensor:
    if output.shape[1] == sum(map(len, NEXT[:2])):
        raise TypeError("attention() missing 2 required keyword-only arguments")
    return output


def changed(hook: Callable[[Any, Any, torch.Tensor], torch.Tensor]) -> Any:
    """A Llama whose layers do more than they declare."""
    model = PACKED["grouped queries"]()
    model.model.layers[1].mlp.register_forward_hook(hook)
    return model


ALONE: dict[str, Make] = {
    "a sliding window": lambda: model_of("MistralForCausalLM", hf.MistralConfig(**LLAMA_CONFIG, sliding_window=4)),
    "some layers with a window": lambda: model_of("Gemma2ForCausalLM", hf.Gemma2Config(**LLAMA_CONFIG, head_dim=16)),
    "no attention interface": lambda: model_of("BloomForCausalLM", hf.BloomConfig(**GPT2)),
    "tokens that mix outside of attention": lambda: changed(mixing),
    "a model that fails": lambda: changed(failing),
}


@pytest.mark.parametrize("make", ALONE.values(), ids=ALONE.keys())
def test_a_model_that_cannot_pack_stays_as_it_was(make: Make) -> None:
    """It gives the same logits as before."""
    model = make()
    tokens = torch.tensor([PROMPTS[0]])
    with torch.inference_mode():
        before, implementation = model(input_ids=tokens).logits, model.config._attn_implementation
        assert not enable_packing(model)

        torch.testing.assert_close(before, model(input_ids=tokens).logits, rtol=0, atol=0)
    assert implementation == model.config._attn_implementation
