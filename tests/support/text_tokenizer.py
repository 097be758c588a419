# SPDX-FileCopyrightText: the tritonlora authors
# SPDX-License-Identifier: Apache-2.0
"""Copies of the text models with a Hugging Face tokenizer from a directory, for tests."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

MODEL_REPOSITORY = Path(__file__).parents[2] / "model_repository"
ALPHABET = sorted(pre_tokenizers.ByteLevel.alphabet())
SPECIAL_TOKENS = ["<s>", "</s>", "<user>", "<model>"]
END, USER, MODEL = range(len(ALPHABET) + 1, len(ALPHABET) + 4)


def save_tokenizer(directory: Path) -> None:
    """A Hugging Face tokenizer with a chat template, whose tokens are the byte-level alphabet."""
    vocabulary = {token: index for index, token in enumerate([*ALPHABET, *SPECIAL_TOKENS])}
    tokenizer = Tokenizer(models.BPE(vocabulary, []))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens(SPECIAL_TOKENS)
    new: Any = PreTrainedTokenizerFast  # its constructor is not typed
    fast = new(tokenizer_object=tokenizer, eos_token="</s>")  # noqa: S106  no password
    fast.chat_template = "{% for message in messages %}<{{ message.role }}>{{ message.content }}{% endfor %}<model>"
    fast.save_pretrained(directory)


def copy_model(name: str, into: Path, copy: str, **parameters: str) -> None:
    """Copy a model under another name, with parameters set to other values."""
    shutil.copytree(MODEL_REPOSITORY / name, into / copy, symlinks=False)
    config = into / copy / "config.pbtxt"
    text = config.read_text(encoding="utf-8").replace(f'name: "{name}"', f'name: "{copy}"')
    for key, value in parameters.items():
        before, after = text.split(f'key: "{key}"')
        _, rest = after.split("}\n", 1)
        text = f'{before}key: "{key}"\n  value: {{ string_value: "{value}" }}\n{rest}'
    config.write_text(text, encoding="utf-8")
