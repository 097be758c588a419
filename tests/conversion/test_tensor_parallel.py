# SPDX-FileCopyrightText: the tritonlora authors
# SPDX-License-Identifier: Apache-2.0
"""What each tensor-parallel rank of the engine takes from the rows, cut as TensorRT-LLM cuts them.

Source: TensorRT-LLM cpp/tensorrt_llm/runtime/loraCache.cpp, `copyToPages` and `splitTransposeCpu`.
"""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from adapters import LINEAR, lora_pair, lora_weights, write_adapter
from tritonlora.architectures import lora_modules
from tritonlora.conversion.layout import plan_layout
from tritonlora.engine.profile import profile_from_engine, profile_from_hf
from tritonlora.errors import EngineMismatch
from tritonlora.peft import adapter as peft

GEOMETRY = {
    "architectures": ["LlamaForCausalLM"],
    "dtype": "float32",
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 1,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": 8,
}


def split_transpose(values: torch.Tensor, ranks: int, rank: int) -> torch.Tensor:
    """A rank's columns of a matrix, flat: what the engine does with A of a row-parallel module."""
    return values.view(values.shape[0], ranks, -1)[:, rank].reshape(-1)


@pytest.mark.parametrize(
    ("shape", "shares"),
    [
        ((6, 2), ([28524, 5093, 23316, 11, 263, 355], [287, 12, 4881, 30022, 8776, 257])),
        ((3, 4), ([28524, 287, 23316, 4881, 263, 8776], [5093, 12, 11, 30022, 355, 257])),
    ],
)
def test_columns_are_cut_as_upstream_s_test_says(shape: tuple[int, int], shares: tuple[list[int], list[int]]) -> None:
    """loraCacheTest, splitTransposeCpu: the reader below cuts as the engine does."""
    values = torch.tensor([28524, 287, 5093, 12, 23316, 4881, 11, 30022, 263, 8776, 355, 257]).view(shape)

    assert shares == tuple(split_transpose(values, 2, rank).tolist() for rank in range(2))


def test_every_rank_finds_its_share_of_a_and_b_in_the_row(tmp_path: Path) -> None:
    """Read off the file by offsets alone, for each of the seven linear layers of a Llama."""
    dims = {"q_proj": (16, 16), "k_proj": (16, 8), "v_proj": (16, 8), "o_proj": (16, 16)}
    dims |= {"gate_proj": (16, 24), "up_proj": (16, 24), "down_proj": (24, 16)}
    torch.manual_seed(0)
    tensors: dict[str, torch.Tensor] = {}
    for leaf in LINEAR:
        block = "self_attn" if leaf in ("q_proj", "k_proj", "v_proj", "o_proj") else "mlp"
        path = f"model.layers.0.{block}.{leaf}"
        tensors |= lora_pair(path, r=2, in_features=dims[leaf][0], out_features=dims[leaf][1], dtype=torch.float32)
    adapter = peft.load_adapter(write_adapter(tmp_path, tensors))  # alpha / r is 2
    profile = profile_from_hf(GEOMETRY, "a small Llama")
    layout = plan_layout(adapter, dtype="float32", profile=profile)
    rows = lora_weights(adapter, layout)
    by_leaf = {path.rsplit(".", 1)[1]: module for path, module in adapter.modules.items()}
    leaves = {"attn_q": "q_proj", "attn_k": "k_proj", "attn_v": "v_proj", "attn_dense": "o_proj"}
    leaves |= {"mlp_h_to_4h": "gate_proj", "mlp_gate": "up_proj", "mlp_4h_to_h": "down_proj"}

    assert leaves.keys() == {row.module.name for row in layout.rows}
    for row, values in zip(layout.rows, rows, strict=True):
        leaf = leaves[row.module.name]
        in_features, out_features = dims[leaf]
        lora_a = values[: 2 * in_features].view(2, in_features)
        lora_b = values[2 * in_features : 2 * (in_features + out_features)].view(out_features, 2)
        local_in, local_out = lora_modules.ModuleDims(row.module, in_features, out_features).local(2)
        for rank in range(2):
            a, b = by_leaf[leaf].lora_A.load(), by_leaf[leaf].lora_B.load() * 2
            if row.module.split == "in":
                share_of_a, share_of_b = split_transpose(lora_a, 2, rank), lora_b.reshape(-1)
                a = a[:, rank * local_in : (rank + 1) * local_in]
            else:
                share_of_a, share_of_b = lora_a.reshape(-1), lora_b.reshape(-1).chunk(2)[rank]
                b = b[rank * local_out : (rank + 1) * local_out]

            assert torch.equal(a.reshape(-1), share_of_a)
            assert torch.equal(b.reshape(-1), share_of_b)


@pytest.mark.parametrize("fused", [False, True])
def test_an_engine_that_repeats_key_value_heads_takes_no_lora_of_theirs(fused: bool, tmp_path: Path) -> None:
    """Of two heads on four ranks it reads four: a row of two would be read past its end, into the padding."""
    paths = {"qkv_proj": 32} if fused else {"q_proj": 16, "k_proj": 8, "v_proj": 8}
    pairs = [lora_pair(f"model.layers.0.self_attn.{leaf}", in_features=16, out_features=n) for leaf, n in paths.items()]
    adapter = peft.load_adapter(write_adapter(tmp_path, {key: value for pair in pairs for key, value in pair.items()}))
    profiles = {
        tp_size: profile_from_engine(
            {
                "pretrained_config": {
                    "architecture": "Phi3ForCausalLM" if fused else "LlamaForCausalLM",
                    "dtype": "bfloat16",
                    **{key: value for key, value in GEOMETRY.items() if key.endswith(("size", "layers", "heads"))},
                    "mapping": {"tp_size": tp_size},
                },
                "build_config": {
                    "plugin_config": {"lora_plugin": "auto"},
                    "lora_config": {"lora_target_modules": ["attn_q", "attn_k", "attn_v"], "max_lora_rank": 8},
                },
            },
            "engine",
        )
        for tp_size in (2, 4)
    }

    assert 3 == len(plan_layout(adapter, dtype="bfloat16", profile=profiles[2]).rows)
    assert 16 == profiles[4].modules["attn_k"].out_features
    told = r"attn_k, attn_v: it is 16 -> 8 in .* more ranks \(tp_size 4\) than key-value heads \(2\)"
    with pytest.raises(EngineMismatch, match=told):
        plan_layout(adapter, dtype="bfloat16", profile=profiles[4])
