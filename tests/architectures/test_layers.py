# SPDX-FileCopyrightText: the tritonlora authors
# SPDX-License-Identifier: Apache-2.0
"""What a path says of its layer."""

from __future__ import annotations

import pytest

from tritonlora.architectures.layers import families_of, locate, why_not


@pytest.mark.parametrize(
    ("path", "layer", "modules"),
    [
        ("model.layers.11.mlp.gate_proj", 11, ("mlp_h_to_4h",)),
        ("model.layers.0.mlp.up_proj", 0, ("mlp_gate",)),
        ("model.language_model.layers.3.self_attn.q_proj", 3, ("attn_q",)),
        ("decoder.block.2.layer.1.EncDecAttention.k", 2, ("cross_attn_k",)),
        ("language_model.decoder.block.2.layer.0.SelfAttention.k", 2, ("attn_k",)),
        ("model.layers.9999.self_attn.q_proj", 9999, ("attn_q",)),
        ("transformer.h.5.attn.c_attn", 5, ("attn_q", "attn_k", "attn_v")),
    ],
)
def test_paths_are_located(path: str, layer: int, modules: tuple[str, ...]) -> None:
    """The first number in a path is the layer."""
    place = locate(path)

    assert place is not None
    assert layer == place[0]
    assert modules in {leaf.modules for leaf in place[1].values()}


QKV = ("attn_q", "attn_k", "attn_v")


@pytest.mark.parametrize(
    ("architecture", "path", "modules", "by_head_group"),
    [
        ("JAISLMHeadModel", "transformer.h.0.attn.c_attn", QKV, False),
        ("JAISLMHeadModel", "transformer.h.0.mlp.c_fc", ("mlp_gate",), False),
        ("JAISLMHeadModel", "transformer.h.0.mlp.c_fc2", ("mlp_h_to_4h",), False),
        ("GPT2LMHeadModel", "transformer.h.0.mlp.c_fc", ("mlp_h_to_4h",), False),
        ("ExaoneForCausalLM", "transformer.h.0.attn.attention.out_proj", ("attn_dense",), False),
        ("ExaoneForCausalLM", "transformer.h.0.mlp.c_fc_0", ("mlp_h_to_4h",), False),
        ("ExaoneForCausalLM", "transformer.h.0.mlp.c_fc_1", ("mlp_gate",), False),
        ("InternLM2ForCausalLM", "model.layers.0.attention.wqkv", QKV, True),
        ("InternLM2ForCausalLM", "model.layers.0.feed_forward.w1", ("mlp_h_to_4h",), False),
        ("InternLM2ForCausalLM", "model.layers.0.feed_forward.w3", ("mlp_gate",), False),
        ("InternLM2ForCausalLM", "model.layers.0.feed_forward.w2", ("mlp_4h_to_h",), False),
        ("BaichuanForCausalLM", "model.layers.0.self_attn.W_pack", QKV, False),
        ("ChatGLMModel", "transformer.encoder.layers.0.self_attention.query_key_value", QKV, False),
        ("ChatGLMModel", "transformer.encoder.layers.0.mlp.dense_h_to_4h", ("mlp_h_to_4h", "mlp_gate"), False),
    ],
)
def test_layers_of_models_that_transformers_has_not_are_what_their_own_code_says(
    architecture: str, path: str, modules: tuple[str, ...], by_head_group: bool
) -> None:
    """There is no model here to compare with, as for the other architectures."""
    place = locate(path)
    (family,) = families_of(architecture)

    assert place is not None
    assert (modules, by_head_group) == (place[1][family].modules, place[1][family].by_head_group)


@pytest.mark.parametrize(
    ("path", "reason"),
    [
        ("lm_head", "output embedding"),
        ("model.embed_tokens", "embeddings"),
        ("model.layers.0.block_sparse_moe.experts.1.w1", "expert"),
        ("model.vision_tower.vision_model.encoder.layers.0.self_attn.q_proj", "not a part of the text model"),
        ("model.encoder.layers.0.self_attn.q_proj", "encoder"),
        ("model.layers.007.self_attn.q_proj", "a layer's number is below 10000 and has no leading zeros"),
        ("model.layers.10000.self_attn.q_proj", "a layer's number is below 10000"),
        ("model.layers.99999999999999999999.self_attn.q_proj", "a layer's number is below 10000"),
        ("transformer.encoder.layers.0.self_attention.core", "not a linear layer"),  # ChatGLM's decoder
        ("model.layers.-1.self_attn.q_proj", "not a linear layer"),
        ("model.layers.0.self_attn.q_proj.base_layer", "not a linear layer"),
        ("base_model.model.model.layers.0.self_attn.q_proj", "saved through PEFT twice (base_model.model.), so"),
    ],
)
def test_other_paths_are_refused_with_a_reason(path: str, reason: str) -> None:
    """What has no LoRA in the engine is not mistaken for something that has."""
    assert locate(path) is None
    assert reason in why_not(path)
