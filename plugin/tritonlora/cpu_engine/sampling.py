# SPDX-FileCopyrightText: the tritonlora authors
# SPDX-License-Identifier: Apache-2.0
"""Choose the next token from logits."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from tritonlora.cpu_engine.request import GenerationRequest


def choose_token(
    logits: torch.Tensor, request: GenerationRequest, generated: Sequence[int], generator: torch.Generator
) -> int:
    """The token after `generated`, from `logits` of shape (vocabulary,).

    The steps come in TensorRT-LLM's order: penalties, forbidden tokens, temperature, top_k, top_p.
    """
    sampling = request.sampling
    logits = logits.float()
    logits = _penalize(logits, request, generated)
    if request.end_id is not None and len(generated) < sampling.min_length:
        logits[request.end_id] = -torch.inf
    for word in sampling.bad_words:
        if tuple(generated[len(generated) - len(word) + 1 :]) == word[:-1]:
            logits[word[-1]] = -torch.inf
    if sampling.greedy:
        return int(logits.argmax())

    logits = logits / sampling.temperature
    values, tokens = logits.sort(descending=True)
    if sampling.top_k > 0:
        values, tokens = values[: sampling.top_k], tokens[: sampling.top_k]
    probabilities = values.softmax(dim=-1)
    if 0 < sampling.top_p < 1:
        before = probabilities.cumsum(dim=-1) - probabilities  # the sum over all likelier tokens; 0 for the likeliest
        probabilities = torch.where(before < sampling.top_p, probabilities, 0)
    return int(tokens[torch.multinomial(probabilities, 1, generator=generator)])


def _penalize(logits: torch.Tensor, request: GenerationRequest, generated: Sequence[int]) -> torch.Tensor:
    sampling = request.sampling
    logits = logits.clone()
    if sampling.repetition_penalty != 1:
        seen = torch.tensor(sorted({*request.prompt, *generated}))
        there = logits[seen]
        logits[seen] = torch.where(there < 0, there * sampling.repetition_penalty, there / sampling.repetition_penalty)
    if (sampling.presence_penalty or sampling.frequency_penalty) and generated:
        counts = torch.bincount(torch.tensor(generated), minlength=len(logits))
        logits -= sampling.frequency_penalty * counts + sampling.presence_penalty * (counts > 0)
    return logits
