# SPDX-FileCopyrightText: the tritonlora authors
# SPDX-License-Identifier: Apache-2.0
"""The SmolLM2 GGUF file as a Hugging Face checkpoint in bfloat16.

This module reads the file with `gguf` alone. transformers can read GGUF too, but some of its versions give packed
blocks, which cannot be saved.

Covered: Llama models with a byte-level BPE tokenizer of the "smollm" kind, and with the output tied to the embedding.
Every other model is refused.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import torch
from safetensors import SafetensorError
from safetensors.torch import save_file
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers

from tritonlora.demo.progress import Progress
from tritonlora.errors import TritonLoraError

# GGUF tensor name -> Hugging Face name; `blk.N.` becomes `model.layers.N.`
TOP_TENSORS = {
    "token_embd.weight": "model.embed_tokens.weight",
    "output_norm.weight": "model.norm.weight",
}
LAYER_TENSORS = {
    "attn_norm.weight": "input_layernorm.weight",
    "attn_q.weight": "self_attn.q_proj.weight",
    "attn_k.weight": "self_attn.k_proj.weight",
    "attn_v.weight": "self_attn.v_proj.weight",
    "attn_output.weight": "self_attn.o_proj.weight",
    "ffn_norm.weight": "post_attention_layernorm.weight",
    "ffn_gate.weight": "mlp.gate_proj.weight",
    "ffn_up.weight": "mlp.up_proj.weight",
    "ffn_down.weight": "mlp.down_proj.weight",
}


def convert(gguf_file: Path, out: Path, progress: Progress) -> None:
    """Write config.json, generation_config.json, model.safetensors and the tokenizer of `gguf_file` into `out`.

    Raises TritonLoraError when the file is not such a model, OSError when `out` cannot be written.
    """
    reader = gguf.GGUFReader(gguf_file)
    kind = tuple(_field(reader, key) for key in ("general.architecture", "tokenizer.ggml.model", "tokenizer.ggml.pre"))
    if kind != ("llama", "gpt2", "smollm"):
        raise TritonLoraError(f"{gguf_file.name!r} is not a SmolLM2 model: expected llama, gpt2, smollm, got {kind!r}")

    special = {role: int(_field(reader, f"tokenizer.ggml.{role}_token_id")) for role in ("bos", "eos", "padding")}
    token_ids = {"bos_token_id": special["bos"], "eos_token_id": special["eos"], "pad_token_id": special["padding"]}
    _write_json(out / "config.json", _config(reader) | token_ids)
    _write_json(out / "generation_config.json", token_ids)
    _write_tokenizer(reader, out)
    try:
        save_file(_tensors(reader, progress), out / "model.safetensors", metadata={"format": "pt"})
    except SafetensorError as error:  # its text carries the operating system's, a full disk for one
        raise OSError(str(error)) from error


def _config(reader: gguf.GGUFReader) -> dict[str, Any]:
    """config.json without the token ids. `rope_theta` stands where every version of transformers finds it."""
    return {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "dtype": "bfloat16",
        "torch_dtype": "bfloat16",  # the older name of the same
        "hidden_act": "silu",
        "hidden_size": _field(reader, "llama.embedding_length"),
        "intermediate_size": _field(reader, "llama.feed_forward_length"),
        "max_position_embeddings": _field(reader, "llama.context_length"),
        "num_attention_heads": _field(reader, "llama.attention.head_count"),
        "num_key_value_heads": _field(reader, "llama.attention.head_count_kv"),
        "num_hidden_layers": _field(reader, "llama.block_count"),
        "rms_norm_eps": _field(reader, "llama.attention.layer_norm_rms_epsilon"),
        "rope_theta": _field(reader, "llama.rope.freq_base"),
        "tie_word_embeddings": True,
        "vocab_size": _field(reader, "llama.vocab_size"),
    }


def _tensors(reader: gguf.GGUFReader, progress: Progress) -> dict[str, torch.Tensor]:
    """Hugging Face name -> bfloat16 tensor, for every tensor of the file."""
    heads = {
        "attn_q.weight": int(_field(reader, "llama.attention.head_count")),
        "attn_k.weight": int(_field(reader, "llama.attention.head_count_kv")),
    }
    tensors = {}
    for done, tensor in enumerate(reader.tensors):
        progress("converting the base model", done, len(reader.tensors))
        prefix, _, layer_and_rest = tensor.name.partition(".")
        layer, _, rest = layer_and_rest.partition(".")
        if tensor.name in TOP_TENSORS:
            name = TOP_TENSORS[tensor.name]
        elif prefix == "blk" and rest in LAYER_TENSORS:
            name = f"model.layers.{layer}.{LAYER_TENSORS[rest]}"
        else:
            raise TritonLoraError(f"unexpected tensor {tensor.name!r} in the GGUF file of the base model")
        values = gguf.dequantize(tensor.data, tensor.tensor_type)
        if rest in heads:
            values = _unpermute(values, heads[rest])
        tensors[name] = torch.from_numpy(np.array(values)).to(torch.bfloat16)
    return tensors


def _unpermute(weight: np.ndarray[Any, Any], heads: int) -> np.ndarray[Any, Any]:
    """The weight (out, in) of q or k, with its rows in Hugging Face's order.

    Hugging Face rotates dims d and d + head_dim/2 together, and llama.cpp d and d + 1. So the converter of llama.cpp
    (convert_hf_to_gguf.py, `LlamaModel.permute`) interleaves the two halves of each head.
    """
    out_features, in_features = weight.shape
    return weight.reshape(heads, out_features // heads // 2, 2, in_features).swapaxes(1, 2).reshape(weight.shape)


def _write_tokenizer(reader: gguf.GGUFReader, out: Path) -> None:
    tokens = _field(reader, "tokenizer.ggml.tokens")
    types = _field(reader, "tokenizer.ggml.token_type")
    merges = [tuple(merge.split(" ")) for merge in _field(reader, "tokenizer.ggml.merges")]
    special = [token for token, type_ in zip(tokens, types, strict=True) if type_ == gguf.TokenType.CONTROL]

    tokenizer = Tokenizer(models.BPE({token: index for index, token in enumerate(tokens)}, merges))
    # The pre-tokenizer "smollm" of llama.cpp splits digits one by one, then applies GPT-2's expression.
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens([AddedToken(token, special=True, normalized=False) for token in special])
    tokenizer.save(str(out / "tokenizer.json"))

    named = {
        f"{role}_token": tokens[_field(reader, f"tokenizer.ggml.{key}_token_id")]
        for role, key in (("bos", "bos"), ("eos", "eos"), ("pad", "padding"), ("unk", "unknown"))
    }
    _write_json(
        out / "tokenizer_config.json",
        named
        | {
            "tokenizer_class": "PreTrainedTokenizerFast",
            "chat_template": _field(reader, "tokenizer.chat_template"),
            "model_max_length": _field(reader, "llama.context_length"),
            "clean_up_tokenization_spaces": False,
        },
    )


def _field(reader: gguf.GGUFReader, key: str) -> Any:
    field = reader.get_field(key)
    if field is None:
        raise TritonLoraError(f"the GGUF file of the base model has no field {key!r}")
    return field.contents()


def _write_json(path: Path, value: dict[str, Any]) -> None:
    path.write_text(json.dumps(value, indent=2) + "\n", encoding="utf-8")
