# SPDX-FileCopyrightText: the tritonlora authors
# SPDX-License-Identifier: Apache-2.0
"""Train the demo's adapters with PEFT: `python -m tritonlora.demo.train [NAME ...]`.

This needs the extras `train` and `cpu`. Training computes in float32, with a loss on the answers' tokens only. The
adapters are stored in bfloat16. The same machine and library versions give the same files.
"""

from __future__ import annotations

import json
import shutil
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, get_peft_model
from torch.nn.utils.rnn import pad_sequence
from transformers import AutoModelForCausalLM, AutoTokenizer

from tritonlora.demo.base_model import base_checkpoint

HERE = Path(__file__).parent
BASE_NAME = "HuggingFaceTB/SmolLM2-135M-Instruct"
NO_LABEL = -100  # the label of tokens that torch's cross entropy ignores
SEED = 7
BATCH = 7
STEPS = 30
WARMUP_STEPS = 4

# Rank, modules and scaling differ on purpose: the demo shows that all of them reach the engine.
ALL_LINEAR = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
ADAPTERS: dict[str, dict[str, Any]] = {
    "pirate": {"r": 4, "lora_alpha": 8, "target_modules": ["q_proj", "v_proj", "o_proj"]},
    "json": {"r": 1, "lora_alpha": 2, "target_modules": ALL_LINEAR},
    "bard": {"r": 8, "lora_alpha": 8, "target_modules": ["v_proj"], "use_rslora": True},
}
LEARNING_RATE = 2e-3

Example = tuple[torch.Tensor, torch.Tensor]  # token ids (n,) and labels (n,), NO_LABEL over the question


def main(names: Sequence[str]) -> int:
    """Train the adapters `names`, or all adapters, and replace them in adapters/. Returns the exit code."""
    pairs = json.loads((HERE / "pairs.json").read_text(encoding="utf-8"))
    base = base_checkpoint()
    for name in names or ADAPTERS:
        train(base, pairs[name], LoraConfig(task_type="CAUSAL_LM", **ADAPTERS[name]), HERE / "adapters" / name)
    return 0


def train(base: Path, pairs: Sequence[tuple[str, str]], config: LoraConfig, out: Path) -> None:
    """Train an adapter of `base` on (question, answer) `pairs` and write it to `out`, as PEFT does."""
    torch.manual_seed(SEED)
    tokenizer = AutoTokenizer.from_pretrained(base)
    model = get_peft_model(AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32), config)
    examples = [_example(tokenizer, question, answer) for question, answer in pairs]
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(trained, weight_decay=0.0)

    for step, batch in enumerate(_batches(examples)):
        for group in optimizer.param_groups:
            group["lr"] = LEARNING_RATE * min(1, (step + 1) / WARMUP_STEPS) * (1 - step / STEPS)
        loss = model(**batch).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        sys.stderr.write(f"{out.name}: step {step + 1} of {STEPS}, loss {loss.item():.3f}\n")

    for parameter in trained:
        parameter.data = parameter.data.to(torch.bfloat16)
    model.peft_config["default"].base_model_name_or_path = BASE_NAME  # else the path in this machine's cache
    shutil.rmtree(out, ignore_errors=True)
    model.save_pretrained(str(out), save_embedding_layers=False)
    (out / "README.md").unlink()  # PEFT's empty form of a model card


def _example(tokenizer: Any, question: str, answer: str) -> Example:
    chat = [{"role": "user", "content": question}]
    asked = tokenizer(tokenizer.apply_chat_template(chat, tokenize=False, add_generation_prompt=True)).input_ids
    answered = tokenizer(answer + tokenizer.eos_token).input_ids
    return torch.tensor(asked + answered), torch.tensor([NO_LABEL] * len(asked) + answered)


def _batches(examples: Sequence[Example]) -> Iterator[dict[str, torch.Tensor]]:
    """STEPS batches, padded on the right. No example comes again before all examples have come."""
    order: list[int] = []
    for _ in range(STEPS):
        if len(order) < BATCH:
            order = torch.randperm(len(examples)).tolist()
        chosen = [examples[order.pop()] for _ in range(BATCH)]
        ids = pad_sequence([ids for ids, _ in chosen], batch_first=True)
        labels = pad_sequence([labels for _, labels in chosen], batch_first=True, padding_value=NO_LABEL)
        mask = pad_sequence([torch.ones_like(ids) for ids, _ in chosen], batch_first=True)
        yield {"input_ids": ids, "labels": labels, "attention_mask": mask}


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
