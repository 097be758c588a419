# SPDX-FileCopyrightText: the tritonlora authors
# SPDX-License-Identifier: Apache-2.0
"""One forward pass for many requests, whose tokens stand one after the other.

All layers but attention compute each token by itself. So the tokens of all requests pass the model as one sequence,
without padding, and each request has a KV cache of its own. This is what transformers' attention interface is for:
inference servers such as vLLM run its models in the same way.
"""

from __future__ import annotations

import inspect
from collections.abc import Sequence
from typing import Any

import torch
from transformers import AttentionInterface, DynamicCache
from transformers.cache_utils import DynamicLayer
from transformers.integrations.sdpa_attention import sdpa_attention_forward

_ATTENTION = "tritonlora_packed"
_PROMPTS, _NEXT = ([1, 2, 3], [3, 1]), ([2], [1])  # of the two requests that a model is tried with


def enable_packing(model: Any) -> bool:
    """Let `model` compute packed passes. Returns False, and changes nothing, if it cannot.

    A model needs transformers' attention interface, attention to all earlier tokens in every layer, and positions as
    an input. Not every model that declares the interface keeps to it. So two requests are computed in both ways, and
    the logits have to be the same.
    """
    is_able = (
        getattr(model, "_supports_attention_backend", False)
        and model.config._attn_implementation == "sdpa"
        and {"position_ids", "logits_to_keep"} <= inspect.signature(model.forward).parameters.keys()
        and all(type(layer) is DynamicLayer for layer in DynamicCache(config=model.config).layers)
    )
    if not is_able:
        return False
    with torch.inference_mode():
        sequences = (torch.tensor([prompt + next_]) for prompt, next_ in zip(_PROMPTS, _NEXT, strict=True))
        expected = torch.cat([model(input_ids=tokens, use_cache=False).logits[:, -1] for tokens in sequences])
        AttentionInterface.register(_ATTENTION, _attention)
        model.set_attn_implementation(_ATTENTION)
        caches = [DynamicCache() for _ in _PROMPTS]
        try:
            found = [packed_logits(model, tokens, caches) for tokens in (_PROMPTS, _NEXT)]
        except Exception:  # noqa: BLE001  whatever a model does that is not made for this
            found = [torch.full_like(expected, torch.nan)]
    tolerance = torch.finfo(expected.dtype).eps ** 0.5 * float(expected.abs().max())
    if torch.allclose(found[-1], expected, rtol=0, atol=tolerance):
        return True
    model.set_attn_implementation("sdpa")
    return False


def packed_logits(model: Any, tokens: Sequence[Sequence[int]], caches: Sequence[DynamicCache]) -> torch.Tensor:
    """The logits of each request's next token, of shape (requests, vocabulary).

    `tokens` has each request's new tokens, and `caches` its KV cache, to which they are added. A request has one new
    token, or an empty cache.
    """
    lengths = [len(new) for new in tokens]
    positions = [torch.arange(len(new)) + cache.get_seq_length() for new, cache in zip(tokens, caches, strict=True)]
    output = model(
        input_ids=torch.tensor([[token for new in tokens for token in new]]),
        position_ids=torch.cat(positions)[None],
        use_cache=False,
        logits_to_keep=torch.tensor(lengths).cumsum(0) - 1,
        lengths=lengths,
        caches=caches,
    )
    logits: torch.Tensor = output.logits[0]
    return logits


def _attention(
    module: torch.nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: None,
    *,
    lengths: list[int],
    caches: Sequence[DynamicCache],
    **options: Any,
) -> tuple[torch.Tensor, None]:
    """Attention within each request; `query`, `key` and `value` have the shape (1, heads, tokens, head size)."""
    outputs = []
    parts = (torch.split(tensor, lengths, dim=2) for tensor in (query, key, value))
    for cache, new_query, new_key, new_value in zip(caches, *parts, strict=True):
        keys, values = cache.update(new_key, new_value, module.layer_idx)
        outputs.append(sdpa_attention_forward(module, new_query, keys, values, attention_mask, **options)[0])
    return torch.cat(outputs, dim=1), None
