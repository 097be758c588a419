# SPDX-FileCopyrightText: the tritonlora authors
# SPDX-License-Identifier: Apache-2.0
"""Embeddings that PEFT saved whole beside the LoRA: needed by nobody where no row of the base model was changed."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import peft
import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file

from adapters import LLAMA_CONFIG, lora_pair, without_warnings, write_adapter
from tritonlora.conversion.convert import convert
from tritonlora.errors import UnsupportedAdapter
from tritonlora.peft import embeddings
from tritonlora.peft.adapter import load_adapter

EMBED, HEAD = "base_model.model.model.embed_tokens.weight", "base_model.model.lm_head.weight"


@without_warnings
def resized(directory: Path, *, tied: bool = False, dtype: torch.dtype = torch.float32) -> tuple[Path, Path]:
    """(adapter, base): an adapter of a model whose vocabulary of 64 got 3 more tokens, as PEFT saves it."""
    torch.manual_seed(0)
    config = transformers.LlamaConfig(**LLAMA_CONFIG, tie_word_embeddings=tied)
    base: Any = transformers.LlamaForCausalLM(config)
    base.to(dtype).save_pretrained(directory / "base")
    model: Any = transformers.LlamaForCausalLM.from_pretrained(directory / "base", dtype=dtype)
    model.resize_token_embeddings(67)
    lora = peft.LoraConfig(r=2, lora_alpha=4, target_modules=["q_proj"], init_lora_weights=False)
    peft.get_peft_model(model, lora).save_pretrained(str(directory / "adapter"), save_embedding_layers=True)
    return directory / "adapter", directory / "base"


def change(adapter: Path, key: str, row: int) -> None:
    """Train a row of an embedding: by one unit in the last place of one value."""
    file = adapter / "adapter_model.safetensors"
    tensors = load_file(file)
    tensors[key][row, 0] = torch.nextafter(tensors[key][row, 0], torch.tensor(9.0, dtype=tensors[key].dtype))
    save_file(tensors, file)


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_embeddings_of_a_resized_vocabulary_are_a_remark(tied: bool, dtype: torch.dtype, tmp_path: Path) -> None:
    """With --base. The rows are those of the same adapter, saved without embeddings."""
    adapter, base = resized(tmp_path, tied=tied, dtype=dtype)
    converted = convert(adapter, tmp_path / "out", base=base)
    tensors = load_file(adapter / "adapter_model.safetensors")
    assert {EMBED, HEAD} <= tensors.keys()
    save_file({key: one for key, one in tensors.items() if "lora_" in key}, adapter / "adapter_model.safetensors")
    without = convert(adapter, tmp_path / "without", base=base)

    assert converted.weights_path.read_bytes() == without.weights_path.read_bytes()
    assert () == without.remarks
    (remark,) = converted.remarks
    assert f"{HEAD!r}, {EMBED!r}: saved whole, and left out" in remark
    assert "the engine has no embeddings for its new tokens (3): requests must not hold them" in remark


def test_without_the_base_model_the_refusal_says_what_decides(tmp_path: Path) -> None:
    """And what the other way costs. A base that is an engine, without weights, decides nothing."""
    adapter, base = resized(tmp_path)
    with pytest.raises(
        UnsupportedAdapter, match=r"embed_tokens\.weight': an embedding, saved whole; --base with .* memory"
    ):
        load_adapter(adapter)
    (base / "model.safetensors").unlink()
    with pytest.raises(
        UnsupportedAdapter, match="saved whole; --base with .*; there is neither a file model.safetensors"
    ):
        load_adapter(adapter, base)


@pytest.mark.parametrize(("key", "row"), [(EMBED, 0), (EMBED, 63), (HEAD, 40)])
def test_a_row_that_was_trained_is_refused(key: str, row: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whichever of them, also where they are read in several parts."""
    monkeypatch.setattr(embeddings, "_NBYTES_AT_A_TIME", 1000)
    adapter, base = resized(tmp_path)
    change(adapter, key, row)
    with pytest.raises(
        UnsupportedAdapter, match=f"'{key}': an embedding in which 1 of the base model's 64 rows are changed"
    ):
        load_adapter(adapter, base)


def test_a_new_row_may_be_trained(tmp_path: Path) -> None:
    """The engine has no such token."""
    adapter, base = resized(tmp_path)
    change(adapter, EMBED, 64)

    assert 1 == len(load_adapter(adapter, base).remarks)


def test_an_embedding_saved_in_a_wider_dtype_is_compared_exactly(tmp_path: Path) -> None:
    """A change that bfloat16 would not show is training all the same."""
    adapter, base = resized(tmp_path, dtype=torch.bfloat16)
    file = adapter / "adapter_model.safetensors"
    save_file({key: one.float() for key, one in load_file(file).items()}, file)

    assert 1 == len(load_adapter(adapter, base).remarks)
    change(adapter, EMBED, 5)
    with pytest.raises(UnsupportedAdapter, match="1 of the base model's 64 rows are changed"):
        load_adapter(adapter, base)


def test_an_embedding_of_another_model_is_told(tmp_path: Path) -> None:
    """By its width."""
    _, base = resized(tmp_path)
    tensors = lora_pair("model.layers.0.self_attn.q_proj") | {"model.embed_tokens.weight": torch.ones(64, 8)}
    adapter = write_adapter(tmp_path / "other", tensors)
    with pytest.raises(
        UnsupportedAdapter, match=r"an embedding of \(64, 8\), and the base model's is \(64, 32\); give the"
    ):
        load_adapter(adapter, base)
