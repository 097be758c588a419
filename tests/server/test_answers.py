# SPDX-FileCopyrightText: the tritonlora authors
# SPDX-License-Identifier: Apache-2.0
"""The answers are right: HTTP, ensemble, router and warmed engine against PEFT's own greedy generate."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import pytest
import torch

from adapters import LINEAR
from peft_answers import PROMPTS, TOKENS, save_llama
from repositories import set_cache_pages, set_streams
from tritonlora.launch import client
from tritonlora.launch.server import Server
from tritonlora.repository import add, init, paths

ADAPTERS: dict[str, dict[str, Any]] = {
    "attention": {"r": 8, "lora_alpha": 16, "target_modules": ["q_proj", "v_proj"]},
    # Of the same shape: its weights are sent from the memory in which those before were.
    "twin": {"r": 8, "lora_alpha": 8, "target_modules": ["q_proj", "v_proj"]},
    "all": {"r": 4, "lora_alpha": 8, "target_modules": list(LINEAR)},
    "rslora": {"r": 16, "lora_alpha": 16, "use_rslora": True, "target_modules": ["o_proj", "up_proj", "gate_proj"]},
    "patterns": {
        "r": 4,
        "lora_alpha": 4,
        "target_modules": ["q_proj", "k_proj", "down_proj"],
        "rank_pattern": {"layers.0.self_attn.q_proj": 2},
        "alpha_pattern": {"down_proj": 32},
        "layers_to_transform": [0, 2],
    },
    "dora": {"r": 4, "lora_alpha": 8, "use_dora": True, "target_modules": ["q_proj", "up_proj"]},
}


@dataclass(frozen=True)
class Served:
    """A server, and what PEFT says that its adapters answer."""

    server: Server
    answers: dict[tuple[str | None, str], str]  # (lora_name, prompt) -> text


@pytest.fixture(scope="module", params=["bfloat16", "float32"])
def served(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory, launch: Callable[..., Server]
) -> Served:
    """A small random Llama with random adapters, and an engine cache that holds some of them."""
    directory = tmp_path_factory.mktemp("answers")
    answers = save_llama(directory, ADAPTERS, layers=3, dtype=getattr(torch, request.param))

    engine = {"gpt_model_path": str(directory / "base"), "synthetic": "false"}
    init.create_repository(directory / "repo", {"tensorrt_llm": engine})
    opened = paths.open_repository(directory / "repo")
    set_streams(opened, 1)  # so that one process sends all of them
    for name in ADAPTERS:
        add.add(opened, name, directory / name, add.Options(base=directory / "base"))
    set_cache_pages(opened, 4)  # "rslora" takes two pages
    return Served(launch(opened.root), answers)


def _ask(served: Served, lora_name: str | None, prompt: str) -> str:
    inputs = {"end_id": -1}  # no token ends the answer, as in greedy
    pieces = client.generate(prompt, lora_name=lora_name, max_tokens=TOKENS, url=served.server.http_url, inputs=inputs)
    return "".join(pieces)


def test_the_adapters_answer_differently(served: Served) -> None:
    """Else the other tests would prove nothing."""
    for prompt in PROMPTS:
        texts = {served.answers[name, prompt] for name in (None, *ADAPTERS)}

        assert len(ADAPTERS) + 1 == len(texts)


@pytest.mark.parametrize("lora_name", [None, *ADAPTERS])
@pytest.mark.parametrize("prompt", PROMPTS)
def test_an_answer_is_peft_s_own_token_for_token(served: Served, lora_name: str | None, prompt: str) -> None:
    """Greedy, for the base model and every adapter."""
    assert served.answers[lora_name, prompt] == _ask(served, lora_name, prompt)


def test_answers_stay_right_when_adapters_are_evicted(served: Served) -> None:
    """Seven pages of adapters take turns in a cache of four."""
    asked = [(name, prompt) for _ in range(3) for name in (*ADAPTERS, None) for prompt in PROMPTS]

    assert [served.answers[one] for one in asked] == [_ask(served, *one) for one in asked]
