# SPDX-FileCopyrightText: the tritonlora authors
# SPDX-License-Identifier: Apache-2.0
"""Every supported architecture, as a small random model with a PEFT adapter: our rows against PEFT's own weights.

The oracle is `get_delta_weight` of each PEFT layer; fused layers are taken apart here by the words of the model's own
code in transformers, not by the package's tables.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers as hf

from adapters import LINEAR, LLAMA_CONFIG, lora_weights, rebuilt, save_adapter
from tritonlora.architectures.lora_modules import BY_NAME, ModuleDims
from tritonlora.conversion.layout import plan_layout
from tritonlora.conversion.tensors import lora_config
from tritonlora.conversion.unpack import unpack
from tritonlora.engine.profile import EngineProfile, load_profile, profile_from_hf, read_config_json
from tritonlora.errors import AdapterError, EngineMismatch, UnsupportedAdapter
from tritonlora.peft.adapter import load_adapter

Split = Callable[[torch.Tensor], dict[str, torch.Tensor]]  # the delta of one layer -> by module


def one(module: str) -> Split:
    return lambda delta: {module: delta}


def in_turn(*sizes: int) -> Split:
    return lambda delta: dict(zip(("attn_q", "attn_k", "attn_v"), torch.split(delta, list(sizes)), strict=True))


def per_head(heads: int) -> Split:
    """GPT-NeoX, Bloom and the first Falcons: `view(heads, 3, head_size)`."""

    def split(delta: torch.Tensor) -> dict[str, torch.Tensor]:
        parts = delta.view(heads, 3, -1, delta.shape[1])
        return {name: parts[:, i].flatten(0, 1) for i, name in enumerate(("attn_q", "attn_k", "attn_v"))}

    return split


def per_group(groups: int, head_size: int) -> Split:
    """Falcon's new decoder: `view(groups, heads / groups + 2, head_size)`, key and value last."""

    def split(delta: torch.Tensor) -> dict[str, torch.Tensor]:
        parts = delta.view(groups, -1, head_size, delta.shape[1])
        q, k, v = parts[:, :-2], parts[:, -2], parts[:, -1]
        return {"attn_q": q.flatten(0, 2), "attn_k": k.flatten(0, 1), "attn_v": v.flatten(0, 1)}

    return split


def gate_up(delta: torch.Tensor) -> dict[str, torch.Tensor]:
    """Phi-3: `gate, up_states = up_states.chunk(2)`."""
    gate, up = delta.chunk(2)
    return {"mlp_h_to_4h": gate, "mlp_gate": up}


SEPARATE: Mapping[str, Split] = {
    "q_proj": one("attn_q"),
    "k_proj": one("attn_k"),
    "v_proj": one("attn_v"),
    "o_proj": one("attn_dense"),
    "gate_proj": one("mlp_h_to_4h"),
    "up_proj": one("mlp_gate"),
    "down_proj": one("mlp_4h_to_h"),
}
ATTENTION = {name: SEPARATE[name] for name in ("q_proj", "k_proj", "v_proj", "o_proj")}
DENSE_MLP = {"dense_h_to_4h": one("mlp_h_to_4h"), "dense_4h_to_h": one("mlp_4h_to_h")}
UNGATED = {**ATTENTION, "up_proj": one("mlp_h_to_4h"), "down_proj": one("mlp_4h_to_h")}
OUT_PROJ = {**{name: ATTENTION[name] for name in ("q_proj", "k_proj", "v_proj")}, "out_proj": one("attn_dense")}
FC1_FC2 = {"fc1": one("mlp_h_to_4h"), "fc2": one("mlp_4h_to_h")}
C_MLP = {"c_fc": one("mlp_h_to_4h"), "mlp.c_proj": one("mlp_4h_to_h")}
CROSS_ATTENTION = {
    "encoder_attn.q_proj": one("cross_attn_q"),
    "encoder_attn.k_proj": one("cross_attn_k"),
    "encoder_attn.v_proj": one("cross_attn_v"),
    "encoder_attn.out_proj": one("cross_attn_dense"),
    "self_attn.q_proj": one("attn_q"),
    "self_attn.k_proj": one("attn_k"),
    "self_attn.v_proj": one("attn_v"),
    "self_attn.out_proj": one("attn_dense"),
    "fc1": one("mlp_h_to_4h"),
    "fc2": one("mlp_4h_to_h"),
}
NLLB_MOE_ATTENTION = {
    end.replace("encoder_attn", "cross_attention"): split for end, split in CROSS_ATTENTION.items() if "." in end
}
T5GEMMA = {
    **{f"self_attn.{name}": split for name, split in ATTENTION.items()},
    "cross_attn.q_proj": one("cross_attn_q"),
    "cross_attn.k_proj": one("cross_attn_k"),
    "cross_attn.v_proj": one("cross_attn_v"),
    "cross_attn.o_proj": one("cross_attn_dense"),
    **{name: SEPARATE[name] for name in ("gate_proj", "up_proj", "down_proj")},
}
W1_W2_W3 = {"w1": one("mlp_h_to_4h"), "w3": one("mlp_gate"), "w2": one("mlp_4h_to_h")}
BART_SIZES = {
    "d_model": 32,
    "encoder_layers": 1,
    "decoder_layers": 2,
    "encoder_attention_heads": 2,
    "decoder_attention_heads": 4,
    "encoder_ffn_dim": 40,
    "decoder_ffn_dim": 48,
    "vocab_size": 64,
    "pad_token_id": 0,
}


@dataclass(frozen=True)
class Case:
    """One architecture: its classes, its sizes, and which of its layers are which modules."""

    model: type
    config: type
    sizes: Mapping[str, Any]
    layers: Mapping[str, Split]  # the end of a layer's path -> how its outputs divide
    target_modules: str | None = None  # a regular expression, where the ends alone would hit other layers


GQA = dict(LLAMA_CONFIG)
OPT = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "ffn_dim": 48, "vocab_size": 64} | {
    "word_embed_proj_dim": 32,
    "pad_token_id": 0,
}
FALCON = {"hidden_size": 32, "ffn_hidden_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4, "vocab_size": 64}
T5 = {"d_model": 32, "d_kv": 16, "d_ff": 48, "num_layers": 1, "num_decoder_layers": 2, "num_heads": 4} | {
    "vocab_size": 64,
    "decoder_start_token_id": 0,
}
T5_LAYERS = {
    "SelfAttention.q": one("attn_q"),
    "SelfAttention.k": one("attn_k"),
    "SelfAttention.v": one("attn_v"),
    "SelfAttention.o": one("attn_dense"),
    "EncDecAttention.q": one("cross_attn_q"),
    "EncDecAttention.k": one("cross_attn_k"),
    "EncDecAttention.v": one("cross_attn_v"),
    "EncDecAttention.o": one("cross_attn_dense"),
    "wo": one("mlp_4h_to_h"),
}
T5_GATED_LAYERS = {**T5_LAYERS, "wi_0": one("mlp_h_to_4h"), "wi_1": one("mlp_gate")}
T5_DECODER = r"decoder\..*\.(q|k|v|o|wi|wi_0|wi_1|wo)"
BART_DECODER = r".*decoder\.layers\..*(_proj|fc1|fc2)"
MHA = {name: size for name, size in GQA.items() if name != "num_key_value_heads"}
BIGCODE = {"n_embd": 32, "n_layer": 2, "n_head": 4, "vocab_size": 64}
MOE = {**GQA, "num_experts": 2, "num_local_experts": 2, "num_experts_per_tok": 1}
WIDE_HEADS = {**GQA, "head_dim": 16}  # heads * head_dim is not hidden_size
SPECIAL = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
WIDE_MOE = {**MOE, **SPECIAL, "head_dim": 16, "n_routed_experts": 2, "moe_intermediate_size": 16} | {
    "shared_expert_intermediate_size": 16
}
ONLY_EXPERTS = {name: size for name, size in WIDE_MOE.items() if name != "intermediate_size"}
ONE_DENSE_LAYER = {"mlp_layer_types": ["dense", "sparse"]}
STATE_SPACE = {"mamba_n_heads": 4, "mamba_d_head": 16, "mamba_d_state": 8, "mamba_n_groups": 1}
LINEAR_ATTENTION = {"linear_num_key_heads": 2, "linear_num_value_heads": 2} | {
    "linear_key_head_dim": 8,
    "linear_value_head_dim": 8,
}
AUDIO = {"hidden_size": 12, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
IN_ATTENTION = r".*\.self_attn\..*_proj"
IN_ATTENTION_AND_MLP = r".*\.(self_attn\..*_proj|(mlp|feed_forward)\.(w.|(gate|up|down)_proj))"
TEXT_MODEL = r".*\.(language|text)_model\.layers\..*_proj"
CASES = {
    "llama": Case(hf.LlamaForCausalLM, hf.LlamaConfig, GQA, SEPARATE),
    "mistral": Case(hf.MistralForCausalLM, hf.MistralConfig, GQA, SEPARATE),
    "qwen2": Case(hf.Qwen2ForCausalLM, hf.Qwen2Config, GQA, SEPARATE),
    "qwen3": Case(hf.Qwen3ForCausalLM, hf.Qwen3Config, WIDE_HEADS, SEPARATE),
    "gemma": Case(hf.GemmaForCausalLM, hf.GemmaConfig, WIDE_HEADS, SEPARATE),
    "gemma2": Case(hf.Gemma2ForCausalLM, hf.Gemma2Config, WIDE_HEADS, SEPARATE),
    "gemma3": Case(hf.Gemma3ForCausalLM, hf.Gemma3TextConfig, WIDE_HEADS, SEPARATE),
    "granite": Case(hf.GraniteForCausalLM, hf.GraniteConfig, GQA, SEPARATE),
    "olmo": Case(hf.OlmoForCausalLM, hf.OlmoConfig, GQA, SEPARATE),
    "olmo2": Case(hf.Olmo2ForCausalLM, hf.Olmo2Config, GQA, SEPARATE),
    "cohere": Case(hf.CohereForCausalLM, hf.CohereConfig, GQA, SEPARATE),
    "cohere2": Case(hf.Cohere2ForCausalLM, hf.Cohere2Config, GQA, SEPARATE),
    "phi3": Case(
        hf.Phi3ForCausalLM,
        hf.Phi3Config,
        {**GQA, "pad_token_id": 0},
        {
            "qkv_proj": in_turn(32, 16, 16),
            "o_proj": one("attn_dense"),
            "gate_up_proj": gate_up,
            "down_proj": one("mlp_4h_to_h"),
        },
    ),
    "phi": Case(
        hf.PhiForCausalLM,
        hf.PhiConfig,
        GQA,
        {**{k: ATTENTION[k] for k in ("q_proj", "k_proj", "v_proj")}, "dense": one("attn_dense")}
        | {"fc1": one("mlp_h_to_4h"), "fc2": one("mlp_4h_to_h")},
    ),
    "starcoder2": Case(
        hf.Starcoder2ForCausalLM,
        hf.Starcoder2Config,
        {**GQA, "bos_token_id": 0, "eos_token_id": 0},
        ATTENTION | {"c_fc": one("mlp_h_to_4h"), "c_proj": one("mlp_4h_to_h")},
    ),
    "gpt_neox": Case(
        hf.GPTNeoXForCausalLM,
        hf.GPTNeoXConfig,
        {k: v for k, v in GQA.items() if k != "num_key_value_heads"},
        {"query_key_value": per_head(4), "attention.dense": one("attn_dense"), **DENSE_MLP},
    ),
    "falcon_7b": Case(
        hf.FalconForCausalLM,
        hf.FalconConfig,
        {**FALCON, "multi_query": True, "new_decoder_architecture": False},
        {"query_key_value": in_turn(32, 8, 8), "self_attention.dense": one("attn_dense"), **DENSE_MLP},
    ),
    "falcon_40b": Case(
        hf.FalconForCausalLM,
        hf.FalconConfig,
        {**FALCON, "num_kv_heads": 2, "new_decoder_architecture": True},
        {"query_key_value": per_group(2, 8), "self_attention.dense": one("attn_dense"), **DENSE_MLP},
    ),
    "falcon_rw": Case(
        hf.FalconForCausalLM,
        hf.FalconConfig,
        {**FALCON, "multi_query": False, "new_decoder_architecture": False},
        {"query_key_value": per_head(4), "self_attention.dense": one("attn_dense"), **DENSE_MLP},
    ),
    "falcon_rw_with_null": Case(
        hf.FalconForCausalLM,
        hf.FalconConfig,
        {**FALCON, "multi_query": None, "new_decoder_architecture": False},
        {"query_key_value": per_head(4), "self_attention.dense": one("attn_dense"), **DENSE_MLP},
    ),
    "bloom": Case(
        hf.BloomForCausalLM,
        hf.BloomConfig,
        {"hidden_size": 32, "n_layer": 2, "n_head": 4, "vocab_size": 64},
        {"query_key_value": per_head(4), "self_attention.dense": one("attn_dense"), **DENSE_MLP},
    ),
    "gpt2": Case(
        hf.GPT2LMHeadModel,
        hf.GPT2Config,
        {"n_embd": 32, "n_layer": 2, "n_head": 4, "vocab_size": 64},
        {"c_attn": in_turn(32, 32, 32), "attn.c_proj": one("attn_dense")}
        | {"c_fc": one("mlp_h_to_4h"), "mlp.c_proj": one("mlp_4h_to_h")},
    ),
    "gptj": Case(
        hf.GPTJForCausalLM,
        hf.GPTJConfig,
        {"n_embd": 32, "n_layer": 2, "n_head": 4, "rotary_dim": 4, "vocab_size": 64},
        {**{k: ATTENTION[k] for k in ("q_proj", "k_proj", "v_proj")}, "out_proj": one("attn_dense")}
        | {"fc_in": one("mlp_h_to_4h"), "fc_out": one("mlp_4h_to_h")},
    ),
    "mpt": Case(
        hf.MptForCausalLM,
        hf.MptConfig,
        {"d_model": 32, "n_layers": 2, "n_heads": 4, "expansion_ratio": 2, "vocab_size": 64},
        {"Wqkv": in_turn(32, 32, 32), "out_proj": one("attn_dense")}
        | {"up_proj": one("mlp_h_to_4h"), "down_proj": one("mlp_4h_to_h")},
    ),
    "opt": Case(
        hf.OPTForCausalLM,
        hf.OPTConfig,
        OPT,
        {**{k: ATTENTION[k] for k in ("q_proj", "k_proj", "v_proj")}, "out_proj": one("attn_dense")}
        | {"fc1": one("mlp_h_to_4h"), "fc2": one("mlp_4h_to_h")},
    ),
    "mixtral": Case(hf.MixtralForCausalLM, hf.MixtralConfig, {**GQA, "num_local_experts": 2}, ATTENTION),
    "qwen2_moe": Case(
        hf.Qwen2MoeForCausalLM,
        hf.Qwen2MoeConfig,
        {**GQA, "num_experts": 2, "num_experts_per_tok": 1, "moe_intermediate_size": 16}
        | {"shared_expert_intermediate_size": 16},
        ATTENTION,
    ),
    "qwen3_moe": Case(
        hf.Qwen3MoeForCausalLM,
        hf.Qwen3MoeConfig,
        {**WIDE_HEADS, "num_experts": 2, "num_experts_per_tok": 1, "moe_intermediate_size": 16},
        ATTENTION,
    ),
    "t5": Case(
        hf.T5ForConditionalGeneration,
        hf.T5Config,
        {**T5, "feed_forward_proj": "gated-gelu"},
        T5_GATED_LAYERS,
        T5_DECODER,
    ),
    "t5_ungated": Case(
        hf.T5ForConditionalGeneration, hf.T5Config, T5, {**T5_LAYERS, "wi": one("mlp_h_to_4h")}, T5_DECODER
    ),
    "mt5": Case(hf.MT5ForConditionalGeneration, hf.MT5Config, T5, T5_GATED_LAYERS, T5_DECODER),
    "umt5": Case(hf.UMT5ForConditionalGeneration, hf.UMT5Config, T5, T5_GATED_LAYERS, T5_DECODER),
    "bart": Case(
        hf.BartForConditionalGeneration,
        hf.BartConfig,
        BART_SIZES,
        CROSS_ATTENTION,
        BART_DECODER,
    ),
    "whisper": Case(
        hf.WhisperForConditionalGeneration,
        hf.WhisperConfig,
        {**BART_SIZES, "num_mel_bins": 8, "bos_token_id": 1, "eos_token_id": 1, "decoder_start_token_id": 1}
        | {"begin_suppress_tokens": None, "suppress_tokens": None},
        CROSS_ATTENTION,
        BART_DECODER,
    ),
    "mbart": Case(hf.MBartForConditionalGeneration, hf.MBartConfig, BART_SIZES, CROSS_ATTENTION, BART_DECODER),
    "pegasus": Case(hf.PegasusForConditionalGeneration, hf.PegasusConfig, BART_SIZES, CROSS_ATTENTION, BART_DECODER),
    "marian": Case(hf.MarianMTModel, hf.MarianConfig, BART_SIZES, CROSS_ATTENTION, BART_DECODER),
    "m2m_100": Case(hf.M2M100ForConditionalGeneration, hf.M2M100Config, BART_SIZES, CROSS_ATTENTION, BART_DECODER),
    "blenderbot": Case(
        hf.BlenderbotForConditionalGeneration, hf.BlenderbotConfig, BART_SIZES, CROSS_ATTENTION, BART_DECODER
    ),
    "llava": Case(
        hf.LlavaForConditionalGeneration,
        hf.LlavaConfig,
        {"text_config": {**GQA, "model_type": "llama"}}
        | {"vision_config": {"model_type": "clip_vision_model", "hidden_size": 12, "num_hidden_layers": 1}}
        | {"image_token_index": 1},
        SEPARATE,
        r".*language_model\.layers\..*_proj",
    ),
    "blip2": Case(
        hf.Blip2ForConditionalGeneration,
        hf.Blip2Config,
        {"text_config": {**OPT, "model_type": "opt"}}
        | {"vision_config": {"hidden_size": 12, "num_attention_heads": 1, "num_hidden_layers": 1}}
        | {"qformer_config": {"hidden_size": 12, "num_attention_heads": 1, "num_hidden_layers": 1, "vocab_size": 8}},
        OUT_PROJ | FC1_FC2,
        r".*language_model\.model\.decoder\.layers\..*(_proj|fc1|fc2)",
    ),
    "stablelm": Case(hf.StableLmForCausalLM, hf.StableLmConfig, GQA, SEPARATE),
    "smollm3": Case(hf.SmolLM3ForCausalLM, hf.SmolLM3Config, {**GQA, "pad_token_id": 0}, SEPARATE),
    "ministral": Case(hf.MinistralForCausalLM, hf.MinistralConfig, {**GQA, "head_dim": 8}, SEPARATE),
    "ernie4_5": Case(hf.Ernie4_5ForCausalLM, hf.Ernie4_5Config, WIDE_HEADS, SEPARATE),
    "nemotron": Case(hf.NemotronForCausalLM, hf.NemotronConfig, {**GQA, "head_dim": 8}, UNGATED),
    "arcee": Case(hf.ArceeForCausalLM, hf.ArceeConfig, {**GQA, "head_dim": 8}, UNGATED),
    "apertus": Case(hf.ApertusForCausalLM, hf.ApertusConfig, GQA, UNGATED),
    "apertus1p5": Case(hf.Apertus1p5TextForCausalLM, hf.Apertus1p5TextConfig, GQA, UNGATED),
    "glm": Case(
        hf.GlmForCausalLM,
        hf.GlmConfig,
        {**GQA, "head_dim": 8, "pad_token_id": 0},
        ATTENTION | {"gate_up_proj": gate_up, "down_proj": one("mlp_4h_to_h")},
    ),
    "persimmon": Case(
        hf.PersimmonForCausalLM,
        hf.PersimmonConfig,
        MHA,
        {"query_key_value": per_head(4), "self_attn.dense": one("attn_dense"), **DENSE_MLP},
    ),
    "gpt_bigcode": Case(
        hf.GPTBigCodeForCausalLM,
        hf.GPTBigCodeConfig,
        {**BIGCODE, "multi_query": True},
        {"c_attn": in_turn(32, 8, 8), "attn.c_proj": one("attn_dense"), **C_MLP},
    ),
    "gpt_bigcode_of_many_queries": Case(
        hf.GPTBigCodeForCausalLM,
        hf.GPTBigCodeConfig,
        {**BIGCODE, "multi_query": False},
        {"c_attn": per_head(4), "attn.c_proj": one("attn_dense"), **C_MLP},
    ),
    "gpt_neo": Case(
        hf.GPTNeoForCausalLM,
        hf.GPTNeoConfig,
        {"hidden_size": 32, "num_layers": 2, "num_heads": 4, "vocab_size": 64}
        | {"attention_types": [[["global", "local"], 1]]},
        OUT_PROJ | C_MLP,
    ),
    "xglm": Case(
        hf.XGLMForCausalLM,
        hf.XGLMConfig,
        {"d_model": 32, "num_layers": 2, "attention_heads": 4, "ffn_dim": 48, "vocab_size": 64},
        OUT_PROJ | FC1_FC2,
    ),
    "biogpt": Case(hf.BioGptForCausalLM, hf.BioGptConfig, MHA, OUT_PROJ | FC1_FC2),
    "olmoe": Case(hf.OlmoeForCausalLM, hf.OlmoeConfig, MOE, ATTENTION),
    "phimoe": Case(hf.PhimoeForCausalLM, hf.PhimoeConfig, {**MOE, "pad_token_id": 0}, ATTENTION),
    "granitemoe": Case(hf.GraniteMoeForCausalLM, hf.GraniteMoeConfig, MOE, ATTENTION),
    "plbart": Case(hf.PLBartForConditionalGeneration, hf.PLBartConfig, BART_SIZES, CROSS_ATTENTION, BART_DECODER),
    "mvp": Case(hf.MvpForConditionalGeneration, hf.MvpConfig, BART_SIZES, CROSS_ATTENTION, BART_DECODER),
    "blenderbot_small": Case(
        hf.BlenderbotSmallForConditionalGeneration, hf.BlenderbotSmallConfig, BART_SIZES, CROSS_ATTENTION, BART_DECODER
    ),
    "bigbird_pegasus": Case(
        hf.BigBirdPegasusForConditionalGeneration, hf.BigBirdPegasusConfig, BART_SIZES, CROSS_ATTENTION, BART_DECODER
    ),
    "pegasus_x": Case(
        hf.PegasusXForConditionalGeneration, hf.PegasusXConfig, BART_SIZES, CROSS_ATTENTION, BART_DECODER
    ),
    "diffllama": Case(hf.DiffLlamaForCausalLM, hf.DiffLlamaConfig, GQA, SEPARATE),
    "emu3": Case(
        hf.Emu3ForCausalLM,
        hf.Emu3TextConfig,
        {**GQA, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2},
        SEPARATE,
    ),
    "granite_swa": Case(hf.GraniteSWAForCausalLM, hf.GraniteSWAConfig, GQA, SEPARATE),
    "nanochat": Case(hf.NanoChatForCausalLM, hf.NanoChatConfig, GQA, ATTENTION | FC1_FC2),
    "flex_olmo": Case(hf.FlexOlmoForCausalLM, hf.FlexOlmoConfig, {**MOE, "pad_token_id": 0}, ATTENTION),
    "bitnet": Case(hf.BitNetForCausalLM, hf.BitNetConfig, GQA, SEPARATE),
    "granitemoe_swa": Case(hf.GraniteMoeSWAForCausalLM, hf.GraniteMoeSWAConfig, MOE, ATTENTION),
    "granitemoeshared": Case(hf.GraniteMoeSharedForCausalLM, hf.GraniteMoeSharedConfig, MOE, ATTENTION),
    "ernie4_5_moe": Case(
        hf.Ernie4_5_MoeForCausalLM,
        hf.Ernie4_5_MoeConfig,
        {**GQA, "moe_num_experts": 2, "moe_k": 1, "moe_intermediate_size": 16, "pad_token_id": 0},
        ATTENTION,
    ),
    "glm4_moe": Case(
        hf.Glm4MoeForCausalLM,
        hf.Glm4MoeConfig,
        {**WIDE_HEADS, "n_routed_experts": 2, "moe_intermediate_size": 16, "num_experts_per_tok": 1, "pad_token_id": 0},
        ATTENTION,
    ),
    "minimax_m2": Case(
        hf.MiniMaxM2ForCausalLM,
        hf.MiniMaxM2Config,
        {**WIDE_HEADS, "num_local_experts": 2, "num_experts_per_tok": 1, "rotary_dim": 8, "bos_token_id": 1}
        | {"eos_token_id": 1, "pad_token_id": 0},
        ATTENTION,
    ),
    "exaone_moe": Case(
        hf.ExaoneMoeForCausalLM,
        hf.ExaoneMoeConfig,
        {**WIDE_MOE, **ONE_DENSE_LAYER, "num_shared_experts": 1},
        ATTENTION,
    ),
    "hy_v3": Case(hf.HYV3ForCausalLM, hf.HYV3Config, {**WIDE_MOE, **ONE_DENSE_LAYER}, ATTENTION),
    "solar_open": Case(hf.SolarOpenForCausalLM, hf.SolarOpenConfig, ONLY_EXPERTS, ATTENTION),
    "mellum": Case(hf.MellumForCausalLM, hf.MellumConfig, {**WIDE_MOE, **ONE_DENSE_LAYER}, ATTENTION),
    "lara_mini": Case(
        hf.LaraMiniForCausalLM,
        hf.LaraMiniConfig,
        {**ONLY_EXPERTS, **LINEAR_ATTENTION, "layer_types": ["linear_attention", "full_attention"]},
        ATTENTION,
    ),
    "flint": Case(hf.FlintForCausalLM, hf.FlintConfig, {**WIDE_MOE, "mlp_only_layers": [0]}, ATTENTION),
    "kolibri1": Case(hf.Kolibri1ForCausalLM, hf.Kolibri1Config, ONLY_EXPERTS, ATTENTION),
    "granitemoehybrid": Case(
        hf.GraniteMoeHybridForCausalLM,
        hf.GraniteMoeHybridConfig,
        {**MOE, **STATE_SPACE, "layer_types": ["linear_attention", "full_attention"]},
        ATTENTION,
    ),
    "bamba": Case(hf.BambaForCausalLM, hf.BambaConfig, {**GQA, **STATE_SPACE, "attn_layer_indices": [1]}, SEPARATE),
    "olmo_hybrid": Case(
        hf.OlmoHybridForCausalLM,
        hf.OlmoHybridConfig,
        {**GQA, **SPECIAL, **LINEAR_ATTENTION, "layer_types": ["linear_attention", "full_attention"]},
        SEPARATE,
        IN_ATTENTION_AND_MLP,
    ),
    "lfm2": Case(
        hf.Lfm2ForCausalLM,
        hf.Lfm2Config,
        {**GQA, "full_attn_idxs": [1], "block_multiple_of": 16, "block_ffn_dim_multiplier": 1.1},
        OUT_PROJ | W1_W2_W3,
        IN_ATTENTION_AND_MLP,
    ),
    "lfm2_moe": Case(
        hf.Lfm2MoeForCausalLM,
        hf.Lfm2MoeConfig,
        {**MOE, "moe_intermediate_size": 16, "layer_types": ["conv", "full_attention"], "num_dense_layers": 1},
        OUT_PROJ,
        IN_ATTENTION,
    ),
    "gpt_neox_japanese": Case(
        hf.GPTNeoXJapaneseForCausalLM,
        hf.GPTNeoXJapaneseConfig,
        {name: size for name, size in MHA.items() if name != "intermediate_size"} | {"intermediate_multiple_size": 2},
        {"query_key_value": per_head(4), "attention.dense": one("attn_dense"), **DENSE_MLP},
    ),
    "fsmt": Case(
        hf.FSMTForConditionalGeneration,
        hf.FSMTConfig,
        {**{name: size for name, size in BART_SIZES.items() if name != "vocab_size"}, "langs": ["en", "de"]}
        | {"src_vocab_size": 64, "tgt_vocab_size": 64},
        CROSS_ATTENTION,
        BART_DECODER,
    ),
    "led": Case(
        hf.LEDForConditionalGeneration,
        hf.LEDConfig,
        {**BART_SIZES, "attention_window": 4},
        CROSS_ATTENTION,
        BART_DECODER,
    ),
    "nllb_moe": Case(
        hf.NllbMoeForConditionalGeneration,
        hf.NllbMoeConfig,
        {**BART_SIZES, "num_experts": 2, "decoder_sparse_step": 2},
        NLLB_MOE_ATTENTION,
        r".*decoder\.layers\..*_proj",
    ),
    "t5gemma": Case(
        hf.T5GemmaForConditionalGeneration,
        hf.T5GemmaConfig,
        {"encoder": {**WIDE_HEADS, "intermediate_size": 40}, "decoder": WIDE_HEADS, "vocab_size": 64},
        T5GEMMA,
        r".*decoder\.layers\..*_proj",
    ),
    "voxtral": Case(
        hf.VoxtralForConditionalGeneration,
        hf.VoxtralConfig,
        {"text_config": {**WIDE_HEADS, "model_type": "llama"}, "audio_config": {**AUDIO, "num_mel_bins": 8}},
        SEPARATE,
        TEXT_MODEL,
    ),
    "glmasr": Case(
        hf.GlmAsrForConditionalGeneration,
        hf.GlmAsrConfig,
        {"text_config": {**GQA, "model_type": "llama"}, "audio_config": {**AUDIO, "num_mel_bins": 8}},
        SEPARATE,
        TEXT_MODEL,
    ),
    "granite_docling": Case(
        hf.GraniteDoclingForConditionalGeneration,
        hf.GraniteDoclingConfig,
        {"text_config": {**GQA, **SPECIAL}} | {"vision_config": {"num_hidden_layers": 1, "out_hidden_size": 32}},
        SEPARATE,
        TEXT_MODEL,
    ),
    "gpt_oss": Case(hf.GptOssForCausalLM, hf.GptOssConfig, {**MOE, "head_dim": 16}, ATTENTION),
}


def expected_deltas(case: Case, deltas: Mapping[str, torch.Tensor]) -> dict[tuple[int, str], torch.Tensor]:
    """(layer, module) -> what PEFT adds, by the split that `case` writes down."""
    expected = {}
    for path, delta in deltas.items():
        layer = int(next(part for part in path.split(".") if part.isdecimal()))
        split = next(split for end, split in case.layers.items() if path.endswith(f".{end}"))
        expected.update({(layer, module): part for module, part in split(delta).items()})
    return expected


def converted(
    adapter: Path, profile: EngineProfile, dtype: str
) -> dict[tuple[int, str], tuple[torch.Tensor, torch.Tensor]]:
    """(layer, module) -> A and B of the packed rows. The adapter that is rebuilt from them has the same rows."""
    loaded, profile = load_adapter(adapter), replace(profile, dtype=dtype)
    layout = plan_layout(loaded, dtype=dtype, profile=profile)
    weights = lora_weights(loaded, layout)
    again, same = rebuilt(layout, weights, profile)
    assert layout.rows == again.rows
    assert torch.equal(weights, same)
    return unpack(weights, lora_config(layout), {dims.module.id: dims for dims in profile.modules.values()})


@pytest.mark.parametrize("name", CASES)
def test_rows_equal_what_peft_adds_to_every_layer(name: str, tmp_path: Path) -> None:
    """B @ A of each row is PEFT's delta of that layer: exact in float32, and in bfloat16 B is that, rounded once."""
    case = CASES[name]
    saved = save_adapter(
        tmp_path,
        case.model,
        case.config(**case.sizes),
        target_modules=case.target_modules or list(case.layers),
        lora_alpha=7,
        use_rslora=True,
    )
    profile = load_profile(saved.base)
    expected = expected_deltas(case, saved.deltas())
    exact = converted(saved.adapter, profile, "float32")
    rounded = converted(saved.adapter, profile, "bfloat16")

    assert expected.keys() == exact.keys() == rounded.keys()
    assert set(profile.modules) == {module for _, module in expected}
    for key, delta in expected.items():
        (a, b), (a_bf16, b_bf16) = exact[key], rounded[key]
        torch.testing.assert_close(b.double() @ a.double(), delta, rtol=1e-6, atol=1e-6 * float(delta.abs().max()))
        assert torch.equal(a, a_bf16.float())
        assert torch.equal(b.bfloat16(), b_bf16)


@pytest.mark.parametrize("name", ["hy_v3", "flint", "lfm2_moe", "nllb_moe"])
def test_layers_without_experts_in_a_mixture_are_rows_of_an_mlp(name: str, tmp_path: Path) -> None:
    """Where the engine has LoRA for these. (For EXAONE and Mellum PEFT makes parameters of the experts besides.)"""
    fc = {"ffn.fc1": one("mlp_h_to_4h"), "ffn.fc2": one("mlp_4h_to_h")}
    layers = {"lfm2_moe": W1_W2_W3, "nllb_moe": fc}.get(name) or {
        f"mlp.{end}": SEPARATE[end] for end in ("gate_proj", "up_proj", "down_proj")
    }
    case = replace(CASES[name], layers=layers)
    target_modules = rf".*(?<!encoder)\.layers\.0\..*({'|'.join(layers)})"
    saved = save_adapter(tmp_path, case.model, case.config(**case.sizes), target_modules=target_modules)
    expected = expected_deltas(case, saved.deltas())
    profile = profile_from_hf(
        read_config_json(saved.base / "config.json"), "model", target_modules={module for _, module in expected}
    )
    rows = converted(saved.adapter, profile, "float32")

    assert len(layers) == len(rows)
    assert expected.keys() == rows.keys()
    for key, (a, b) in rows.items():
        torch.testing.assert_close(b.double() @ a.double(), expected[key], rtol=1e-6, atol=1e-5)


@pytest.mark.parametrize("tp_size", [1, 2])
def test_fused_rows_are_interleaved_by_tensor_parallel_rank(tp_size: int, tmp_path: Path) -> None:
    """A rank's contiguous piece of a fused row is its own share of every part, in the engine's order."""
    case = CASES["phi3"]
    saved = save_adapter(tmp_path, case.model, case.config(**case.sizes), target_modules=list(case.layers))
    hf_profile = load_profile(saved.base)
    fused = {
        "attn_qkv": ModuleDims(BY_NAME["attn_qkv"], 32, 64),
        "attn_dense": hf_profile.modules["attn_dense"],
        "mlp_4h_to_h": hf_profile.modules["mlp_4h_to_h"],
        "mlp_gate_up": ModuleDims(BY_NAME["mlp_gate_up"], 32, 96),
    }
    rows = converted(saved.adapter, replace(hf_profile, modules=fused, tp_size=tp_size), "float32")
    parts = expected_deltas(case, saved.deltas())
    for layer in (0, 1):
        for module, order in (
            ("attn_qkv", ("attn_q", "attn_k", "attn_v")),
            ("mlp_gate_up", ("mlp_gate", "mlp_h_to_4h")),
        ):
            shares = [parts[layer, part].chunk(tp_size) for part in order]
            expected = torch.cat([share[rank] for rank in range(tp_size) for share in shares])
            a, b = rows[layer, module]

            torch.testing.assert_close(b.double() @ a.double(), expected, rtol=1e-6, atol=1e-5)


def test_fused_by_head_rows_become_query_then_key_then_value(tmp_path: Path) -> None:
    """Falcon's groups of heads are put in the order of the engine's attn_qkv, rank by rank."""
    case = CASES["falcon_40b"]
    saved = save_adapter(tmp_path, case.model, case.config(**case.sizes), target_modules=["query_key_value"])
    profile = replace(
        load_profile(saved.base), modules={"attn_qkv": ModuleDims(BY_NAME["attn_qkv"], 32, 64)}, tp_size=2
    )
    rows = converted(saved.adapter, profile, "float32")
    parts = expected_deltas(case, saved.deltas())
    shares = [parts[0, part].chunk(2) for part in ("attn_q", "attn_k", "attn_v")]
    a, b = rows[0, "attn_qkv"]

    torch.testing.assert_close(
        b.double() @ a.double(), torch.cat([share[rank] for rank in (0, 1) for share in shares]), rtol=1e-6, atol=1e-5
    )


def test_encoder_layers_are_refused_by_name(tmp_path: Path) -> None:
    """An encoder's LoRA has no place in the decoder's tensors, and dropping it would change the answers."""
    case = CASES["bart"]
    saved = save_adapter(tmp_path, case.model, case.config(**case.sizes), target_modules=["q_proj"])

    with pytest.raises(UnsupportedAdapter, match=r"'model\.encoder\.layers\.0\.self_attn\.q_proj': an encoder's LoRA"):
        load_adapter(saved.adapter)


def test_cross_attention_to_an_encoder_of_another_size_is_refused(tmp_path: Path) -> None:
    """T5Gemma's encoder may be the larger one; TensorRT-LLM takes keys and values to be made of the hidden size."""
    case = CASES["t5gemma"]
    sizes = {**case.sizes, "encoder": {**WIDE_HEADS, "hidden_size": 64}}
    saved = save_adapter(tmp_path, case.model, case.config(**sizes), target_modules=case.target_modules)

    with pytest.raises(
        EngineMismatch, match="cross_attn_k, cross_attn_v: it is 64 -> 32 in the adapter, but 32 -> 32 in the base"
    ):
        plan_layout(load_adapter(saved.adapter), dtype="float32", profile=load_profile(saved.base))
    with pytest.raises(EngineMismatch, match="cross_attn_q has 32 inputs, and cross_attn_k 64 inputs"):
        plan_layout(load_adapter(saved.adapter), dtype="float32")


def test_expert_layers_are_refused_by_name(tmp_path: Path) -> None:
    """LoRA on the experts of a mixture is refused, naming the layers."""
    case = CASES["qwen2_moe"]
    saved = save_adapter(
        tmp_path, case.model, case.config(**case.sizes), target_modules=["q_proj", *LINEAR[4:]], seed=1
    )

    with pytest.raises(UnsupportedAdapter, match=r"shared_expert\.down_proj', .*: LoRA on expert layers"):
        load_adapter(saved.adapter)


@pytest.mark.parametrize(
    ("name", "target", "message"),
    [
        ("lfm2", "in_proj", r"layers\.0\.conv\.in_proj': not a linear layer that TensorRT-LLM has a LoRA for"),
        ("lfm2_moe", "out_proj", r"layers\.0\.conv\.out_proj': not a linear layer"),
        ("bamba", "in_proj", r"mamba\.in_proj': not a linear layer"),
        ("granitemoehybrid", "out_proj", r"mamba\.out_proj': not a linear layer"),
        ("granitemoehybrid", "input_linear", r"shared_mlp\.input_linear': LoRA on expert layers"),
        ("olmo_hybrid", "q_proj", r"linear_attn\.q_proj': not a linear layer"),
        ("lara_mini", "in_proj_qkv", r"linear_attn\.in_proj_qkv': not a linear layer"),
        ("kolibri1", "down_proj", r"shared_experts\.down_proj': LoRA on expert layers"),
        ("nllb_moe", "fc1", r"ffn\.experts\.expert_0\.fc1', .*: LoRA on expert layers"),
        ("nllb_moe", "classifier", r"ffn\.router\.classifier': LoRA on an expert router"),
        ("led", "query", r"longformer_self_attn\.query': an encoder's LoRA"),
        ("t5gemma", "q_proj", r"encoder\.layers\.0\.self_attn\.q_proj': an encoder's LoRA"),
        ("voxtral", "q_proj", r"audio_tower\.layers\.0\.self_attn\.q_proj': not a part of the text model"),
        ("glmasr", "q_proj", r"audio_tower\.layers\.0\.self_attn\.q_proj': not a part of the text model"),
        ("granite_docling", "q_proj", r"vision_model\..*\.self_attn\.q_proj': not a part of the text model"),
    ],
)
def test_other_layers_of_these_models_are_refused_by_name(name: str, target: str, message: str, tmp_path: Path) -> None:
    """Convolutions, state spaces, linear attention, experts, routers, encoders and towers."""
    case = CASES[name]
    saved = save_adapter(tmp_path, case.model, case.config(**case.sizes), target_modules=[target])

    with pytest.raises(UnsupportedAdapter, match=message):
        load_adapter(saved.adapter)


def test_remedy_for_experts_is_what_keeps_peft_from_them(tmp_path: Path) -> None:
    """PEFT makes parameters of them, whatever `exclude_modules` says; naming other layers is what helps."""
    case = CASES["mixtral"]
    config = case.config(**case.sizes)
    experts = save_adapter(
        tmp_path / "x", case.model, config, target_modules="all-linear", exclude_modules=r".*\.(experts|gate)\b.*"
    )
    others = save_adapter(tmp_path / "y", case.model, config, target_modules=list(ATTENTION))

    with pytest.raises(UnsupportedAdapter, match=r"`target_modules` that name other layers only \(`exclude_modules`"):
        load_adapter(experts.adapter)
    assert 8 == len(load_adapter(others.adapter).modules)


@pytest.mark.parametrize(
    ("task_type", "kind", "message"),
    [
        (None, UnsupportedAdapter, "Qwen3NextForCausalLM: its q_proj has a gate"),
        ("CAUSAL_LM", EngineMismatch, "attn_q has 64 outputs, and attn_dense 32 inputs"),
    ],
)
def test_attention_with_a_gate_is_refused(
    task_type: str | None, kind: type[AdapterError], message: str, tmp_path: Path
) -> None:
    """Under the names of Llama's layers, of which Qwen3-Next has some; also where nothing says whose they are."""
    config = hf.Qwen3NextConfig(**GQA, head_dim=8, layer_types=["linear_attention", "full_attention"], num_experts=2)
    attention = ["q_proj", "k_proj", "v_proj", "o_proj"]
    saved = save_adapter(tmp_path, hf.Qwen3NextForCausalLM, config, target_modules=attention, task_type=task_type)

    with pytest.raises(kind, match=message):
        plan_layout(load_adapter(saved.adapter), dtype="bfloat16")
    with pytest.raises(EngineMismatch, match="Qwen3NextForCausalLM: its q_proj has a gate"):
        load_profile(saved.base)


UNLIKE_HEADS = "its layers differ in their heads"


@pytest.mark.parametrize(
    ("model", "config", "sizes", "why"),
    [
        (
            hf.Gemma4ForCausalLM,
            hf.Gemma4TextConfig,
            {"global_head_dim": 16, "vocab_size_per_layer_input": 64, "hidden_size_per_layer_input": 8}
            | {"layer_types": ["sliding_attention", "full_attention"], "num_kv_shared_layers": 0},
            UNLIKE_HEADS,
        ),
        (
            hf.LagunaForCausalLM,
            hf.LagunaConfig,
            {"num_attention_heads_per_layer": [4, 2], "num_experts": 2, "num_experts_per_tok": 1},
            UNLIKE_HEADS,
        ),
        (hf.DoryForCausalLM, hf.DoryConfig, {}, "its layers are run several times over"),
    ],
)
def test_models_of_these_names_with_layers_that_an_engine_has_otherwise_are_refused(
    model: type, config: type, sizes: Mapping[str, Any], why: str, tmp_path: Path
) -> None:
    """Each layer's rows would be right by themselves; the engine would take them for others."""
    small = config(**{**GQA, **SPECIAL, "head_dim": 8, **sizes})
    saved = save_adapter(tmp_path, model, small, target_modules=r".*self_attn\.(q|k|v)_proj")

    with pytest.raises(UnsupportedAdapter, match=f"{model.__name__}: {why}"):
        plan_layout(load_adapter(saved.adapter), dtype="bfloat16")
    with pytest.raises(EngineMismatch, match=f"{model.__name__}: {why}"):
        load_profile(saved.base)
