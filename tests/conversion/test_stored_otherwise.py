# SPDX-FileCopyrightText: the tritonlora authors
# SPDX-License-Identifier: Apache-2.0
"""One model, stored with fused layers or with split ones: adapters of either, for engines of either.

The oracle is PEFT: what it adds to each layer, and the logits of its model. Engines cut fused rows as in
test_tensor_parallel.py.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers as hf

from adapters import Saved, lora_pair, lora_weights, rebuilt, save_adapter, write_adapter
from tritonlora.conversion.layout import plan_layout
from tritonlora.conversion.rows import Layout
from tritonlora.conversion.tensors import lora_config
from tritonlora.conversion.unpack import unpack
from tritonlora.engine.profile import EngineProfile, profile_from_engine
from tritonlora.errors import EngineMismatch, UnsupportedAdapter
from tritonlora.peft.adapter import load_adapter

SIZES: dict[str, Any] = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
}
TOKENS: dict[str, Any] = {"vocab_size": 64, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
SPLIT = ("attn_q", "attn_k", "attn_v", "attn_dense", "mlp_h_to_4h", "mlp_4h_to_h", "mlp_gate")
FUSED = ("attn_qkv", "attn_dense", "mlp_gate_up", "mlp_4h_to_h")


def engine(
    architecture: str, modules: Sequence[str], *, tp_size: int = 1, max_lora_rank: int = 64, **fields: Any
) -> EngineProfile:
    """The profile of an engine of these sizes."""
    config = {
        "pretrained_config": {
            "architecture": architecture, "dtype": "float32", **SIZES, "mapping": {"tp_size": tp_size}, **fields,
        },
        "build_config": {
            "plugin_config": {"lora_plugin": "auto"},
            "lora_config": {"lora_target_modules": list(modules), "max_lora_rank": max_lora_rank},
        },
    }  # fmt: skip
    return profile_from_engine(config, "engine")


def rows_of(saved: Saved, profile: EngineProfile) -> tuple[Layout, dict[tuple[int, str], torch.Tensor]]:
    """The layout, and (layer, module) -> B @ A as the engine reads it, in float64."""
    adapter = load_adapter(saved.adapter)
    layout = plan_layout(adapter, dtype="float32", profile=profile)
    modules = {dims.module.id: dims for dims in profile.modules.values()}
    weights = lora_weights(adapter, layout)
    again, same = rebuilt(layout, weights, profile)
    assert layout.rows == again.rows
    assert torch.equal(weights, same)
    pairs = unpack(weights, lora_config(layout), modules)
    return layout, {key: b.double() @ a.double() for key, (a, b) in pairs.items()}


def llama_adapter(directory: Path, **options: Any) -> Saved:
    """An adapter whose base model has q_proj, k_proj, v_proj, gate_proj and up_proj."""
    return save_adapter(
        directory, hf.LlamaForCausalLM, hf.LlamaConfig(**SIZES, **TOKENS), dtype=torch.float32, **options
    )


@pytest.mark.parametrize("architecture", ["Phi3ForCausalLM", "BaiChuanForCausalLM", "InternLM2ForCausalLM"])
def test_a_split_adapter_is_for_an_engine_of_the_fused_checkpoint(architecture: str, tmp_path: Path) -> None:
    """By its sizes. Its rows are the same as for an engine of the split checkpoint."""
    saved = llama_adapter(tmp_path)
    layout, found = rows_of(saved, engine(architecture, SPLIT))
    expected_layout, expected = rows_of(saved, engine("LlamaForCausalLM", SPLIT))

    assert expected_layout.rows == layout.rows
    assert all(torch.equal(expected[key], found[key]) for key in expected)
    assert () == expected_layout.remarks
    (remark,) = layout.remarks
    assert f"the adapter's layers have the names of Llama; checkpoints of the model, a {architecture}" in remark


def test_a_fused_adapter_is_for_an_engine_of_the_split_checkpoint(tmp_path: Path) -> None:
    """Each part is PEFT's, cut as Phi-3's own code cuts it."""
    config = hf.Phi3Config(**SIZES, **TOKENS)
    names = ["qkv_proj", "o_proj", "gate_up_proj", "down_proj"]
    saved = save_adapter(tmp_path, hf.Phi3ForCausalLM, config, dtype=torch.float32, target_modules=names)
    layout, found = rows_of(saved, engine("LlamaForCausalLM", SPLIT))
    deltas = saved.deltas()

    assert 14 == len(layout.rows)
    for layer in range(2):
        path = f"model.layers.{layer}"
        q, k, v = torch.split(deltas[f"{path}.self_attn.qkv_proj"], [32, 16, 16])
        gate, up = deltas[f"{path}.mlp.gate_up_proj"].chunk(2)
        for name, expected in zip(
            ("attn_q", "attn_k", "attn_v", "mlp_h_to_4h", "mlp_gate"), (q, k, v, gate, up), strict=True
        ):
            torch.testing.assert_close(found[layer, name], expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("tp_size", [1, 2])
@pytest.mark.parametrize("architecture", ["Phi3ForCausalLM", "LlamaForCausalLM"])
def test_a_split_adapter_is_block_diagonal_in_a_fused_engine(architecture: str, tp_size: int, tmp_path: Path) -> None:
    """Every tensor-parallel rank gets its share of each part, of the ranks that each part has."""
    saved = llama_adapter(tmp_path, rank_pattern={"k_proj": 2, "up_proj": 5})
    layout, found = rows_of(saved, engine(architecture, FUSED, tp_size=tp_size))
    deltas = saved.deltas()
    ranks = {"attn_qkv": 4 + 2 + 4, "attn_dense": 4, "mlp_gate_up": 5 + 4, "mlp_4h_to_h": 4}

    assert [
        (layer, name, ranks[name])
        for layer in (0, 1)
        for name in ("attn_qkv", "attn_dense", "mlp_4h_to_h", "mlp_gate_up")
    ] == [(row.layer, row.module.name, row.adapter_size) for row in layout.rows]
    assert "the engine has LoRA only for attn_qkv and mlp_gate_up" in layout.remarks[-1]
    parts = {
        "attn_qkv": ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"),
        "mlp_gate_up": ("mlp.up_proj", "mlp.gate_proj"),
    }
    for layer in range(2):
        for name, paths in parts.items():
            shares = [deltas[f"model.layers.{layer}.{path}"].chunk(tp_size) for path in paths]
            expected = torch.cat([share[rank] for rank in range(tp_size) for share in shares])
            torch.testing.assert_close(found[layer, name], expected, rtol=1e-5, atol=1e-5)
        for name, path in (("attn_dense", "self_attn.o_proj"), ("mlp_4h_to_h", "mlp.down_proj")):
            torch.testing.assert_close(found[layer, name], deltas[f"model.layers.{layer}.{path}"], rtol=1e-5, atol=1e-5)


def test_the_fused_model_with_the_joined_rows_is_peft_s_model(tmp_path: Path) -> None:
    """Logits: the rows that the engine of Microsoft's checkpoint gets, added to that checkpoint's own layers."""
    saved = llama_adapter(tmp_path, target_modules=["q_proj", "v_proj", "o_proj"])
    state = hf.LlamaForCausalLM.from_pretrained(saved.base).state_dict()
    for layer in range(2):
        path = f"model.layers.{layer}"
        parts = [state.pop(f"{path}.self_attn.{leaf}.weight") for leaf in ("q_proj", "k_proj", "v_proj")]
        state[f"{path}.self_attn.qkv_proj.weight"] = torch.cat(parts)
        parts = [state.pop(f"{path}.mlp.{leaf}.weight") for leaf in ("gate_proj", "up_proj")]
        state[f"{path}.mlp.gate_up_proj.weight"] = torch.cat(parts)
    config = hf.Phi3Config(**SIZES, **TOKENS, rms_norm_eps=hf.LlamaConfig().rms_norm_eps)
    phi: Any = hf.Phi3ForCausalLM(config).double()
    phi.load_state_dict(state)
    ids = torch.arange(3, 20)[None]
    expected = saved.model.double().eval()(ids).logits
    assert not torch.allclose(expected, phi(ids).logits)
    _, found = rows_of(saved, engine("Phi3ForCausalLM", FUSED))
    for (layer, name), delta in found.items():
        attention: Any = phi.model.layers[layer].self_attn
        {"attn_qkv": attention.qkv_proj, "attn_dense": attention.o_proj}[name].weight.data += delta

    torch.testing.assert_close(phi(ids).logits, expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
    ("options", "profile", "reason"),
    [
        ({}, {"max_lora_rank": 8}, r"attn_\w, .*: the engine has LoRA only for attn_qkv, .* ranks, 12, .*rank 12, or"),
        ({"use_dora": True}, {}, "DoRA of its parts cannot be joined; build it with attn_q attn_k attn_v among"),
        ({}, {"tp_size": 4}, "its parts do not divide by the engine's tp_size, 4"),
        ({}, {"num_hidden_layers": 1}, r"the engine has 1 layers, and not this one \(layer 1\)"),
        ({}, {"head_size": 16}, "attn_q: it is 32 -> 32 in the adapter, but 32 -> 64 in the engine, in its attn_qkv; "),
    ],
    ids=["rank", "dora", "tp", "layer", "sizes"],
)  # fmt: skip
def test_parts_that_do_not_fit_the_fused_module_are_refused_with_the_reason(
    options: dict[str, Any], profile: dict[str, Any], reason: str, tmp_path: Path
) -> None:
    """Never as an adapter of another base model, unless the sizes say so."""
    saved = llama_adapter(tmp_path, target_modules=["q_proj", "k_proj", "v_proj"], **options)
    with pytest.raises(EngineMismatch, match=reason) as caught:
        plan_layout(
            load_adapter(saved.adapter),
            dtype="float32",
            profile=engine("Phi3ForCausalLM", FUSED, **profile),
            base=saved.base,
        )

    assert ("another base model" in str(caught.value)) == ("head_size" in profile)


def test_values_of_joined_rows_are_looked_at_as_those_of_others(tmp_path: Path) -> None:
    """NaN in one part, and zeros in all of them."""
    profile = replace(engine("LlamaForCausalLM", FUSED), dtype="float16")
    pairs = lora_pair("model.layers.0.self_attn.q_proj") | lora_pair("model.layers.0.self_attn.k_proj", out_features=16)
    key = "model.layers.0.self_attn.k_proj.lora_B.weight"
    for value, told in (
        (float("nan"), "lora_B of 'model.layers.0.self_attn.k_proj' has NaN"),
        (1e30, "lora_B of 'model.layers.0.self_attn.k_proj' has values too large for float16"),
        (1e-30, "lora_B of 'model.layers.0.self_attn.k_proj' vanishes in float16"),
    ):
        adapter = load_adapter(write_adapter(tmp_path / str(value), pairs | {key: torch.full((16, 2), value)}))
        with pytest.raises(Exception, match=told) as caught:
            lora_weights(adapter, plan_layout(adapter, dtype="float16", profile=profile))
        assert isinstance(caught.value, UnsupportedAdapter) or "NaN" in told


QWEN = {
    "attn.c_attn": (32, 96),
    "attn.c_proj": (32, 32),
    "mlp.w1": (32, 24),
    "mlp.w2": (32, 24),
    "mlp.c_proj": (24, 32),
}
QWEN_MODULES = {
    "attn.c_attn": "attn_qkv",
    "attn.c_proj": "attn_dense",
    "mlp.w1": "mlp_gate",
    "mlp.w2": "mlp_h_to_4h",
    "mlp.c_proj": "mlp_4h_to_h",
}


def qwen_engine(**options: Any) -> EngineProfile:
    """An engine of the first Qwen, which has no grouped heads, and MLP layers of half its intermediate_size."""
    fields = {"qwen_type": "qwen", "num_key_value_heads": 4}
    return engine("QWenForCausalLM", tuple(QWEN_MODULES.values()), **{**fields, **options})


def qwen_adapter(directory: Path, **config: Any) -> Path:
    """All of its layers, of rank 3."""
    tensors: dict[str, torch.Tensor] = {}
    for layer in range(2):
        for leaf, (inputs, outputs) in QWEN.items():
            path = f"transformer.h.{layer}.{leaf}"
            tensors |= lora_pair(path, r=3, in_features=inputs, out_features=outputs, dtype=torch.float32)
    return write_adapter(directory, tensors, r=3, lora_alpha=6, **config)


def test_the_first_qwen_is_read_as_tensorrt_llm_s_runtime_reads_it(tmp_path: Path) -> None:
    """Its runtime takes MLP layers to be intermediate_size wide, which is twice what they are: A is at the row's start,
    and B where the runtime looks for it, behind an A of that width.
    """
    adapter, profile = load_adapter(qwen_adapter(tmp_path)), qwen_engine()
    layout = plan_layout(adapter, dtype="float32", profile=profile)
    weights = lora_weights(adapter, layout)

    assert 10 == len(layout.rows)
    assert (32, 48) == (profile.modules["mlp_gate"].in_features, profile.modules["mlp_gate"].out_features)
    for row, values in zip(layout.rows, weights, strict=True):
        (leaf,) = (leaf for leaf, name in QWEN_MODULES.items() if name == row.module.name)
        module = adapter.modules[f"transformer.h.{row.layer}.{leaf}"]
        a, b = module.lora_A.load(), module.lora_B.load() * 2
        dims = profile.modules[row.module.name]
        start = 3 * dims.in_features

        assert 3 * (dims.in_features + dims.out_features) <= len(values)
        assert torch.equal(a.reshape(-1), values[: a.numel()])
        assert torch.equal(b.reshape(-1), values[start : start + b.numel()])
        assert not values[a.numel() : start].any()
        assert not values[start + b.numel() :].any()


def test_layers_of_the_first_qwen_that_the_runtime_would_cut_wrongly_are_refused(tmp_path: Path) -> None:
    """Under tensor parallelism it cuts a matrix of twice the width. Attention is as in any other model."""
    adapter = load_adapter(qwen_adapter(tmp_path / "all"))
    with pytest.raises(
        EngineMismatch, match="mlp_gate, mlp_h_to_4h: .* twice as wide as it is: .* tp_size 1"
    ) as caught:
        plan_layout(adapter, dtype="float32", profile=qwen_engine(tp_size=2))

    assert "attn" not in str(caught.value).partition("engine':")[2]
    with pytest.raises(EngineMismatch, match="mlp_gate: it is 32 -> 48 in the adapter, but 32 -> 24 in the engine"):
        plan_layout(
            load_adapter(
                write_adapter(
                    tmp_path / "wide", lora_pair("transformer.h.0.mlp.w1", out_features=48, dtype=torch.float32)
                )
            ),
            dtype="float32",
            profile=qwen_engine(),
        )
