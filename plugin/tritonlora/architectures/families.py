# SPDX-FileCopyrightText: the tritonlora authors
# SPDX-License-Identifier: Apache-2.0
"""List the linear layers of each Hugging Face architecture, and the LoRA module of the engine for each layer.

A new architecture that is built like one of the families below is one line in `_TABLE`.

Trap: TensorRT-LLM's `mlp_h_to_4h` is the branch that goes through the activation, so it is `gate_proj`, and its
`mlp_gate` is `up_proj` (`get_default_trtllm_modules_to_hf_modules` in TensorRT-LLM tensorrt_llm/lora_manager.py).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field


@dataclass(frozen=True, slots=True)
class Leaf:
    """One linear layer of the Hugging Face model. A fused layer's outputs belong to several LoRA modules."""

    modules: tuple[str, ...]  # in the order of the outputs
    fused: str = ""  # the engine's fused module for all `modules` together
    fused_order: tuple[str, ...] = ()  # the order of the outputs in the engine's fused module
    by_head_group: bool = False  # the outputs are (q heads, k head, v head), for each key-value head in turn


@dataclass(frozen=True, slots=True)
class Family:
    """Architectures whose layers have the same names."""

    name: str
    stems: tuple[str, ...]  # the parts of a path before the layer number
    leaves: Mapping[str, Leaf]  # part of a path after the layer number -> the layer
    # size -> keys of config.json, where they are unusual; "decoder.hidden_size" is in the section `decoder`
    sizes: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    conv1d: bool = False  # the layers are transformers' Conv1D: PEFT sets `fan_in_fan_out`
    rare: frozenset[str] = frozenset()  # modules that only some models have; an engine has them only if it lists them

    @property
    def modules(self) -> frozenset[str]:
        """Every LoRA module that all models of the family have. A fused layer counts as its parts."""
        return frozenset(module for leaf in self.leaves.values() for module in leaf.modules) - self.rare


@dataclass(frozen=True, slots=True)
class Architecture:
    """One line of the table."""

    model_type: str  # in config.json, or in its `text_config`
    name: str  # in config.json's `architectures`
    family: Family
    defaults: Mapping[str, int | str] = field(default_factory=dict)  # key of config.json -> its value if missing
    nested: Mapping[str, int] = field(default_factory=dict)  # further such keys, for a `text_config` only


def _leaves(prefix: str, **names: str) -> dict[str, Leaf]:
    return {f"{prefix}.{name}" if prefix else name: Leaf((module,)) for module, name in names.items()}


def _cross(prefix: str, dense: str) -> dict[str, Leaf]:
    return _leaves(prefix, cross_attn_q="q_proj", cross_attn_k="k_proj", cross_attn_v="v_proj", cross_attn_dense=dense)


# The three parts of attention, in the order of every fused layer.
_QKV = ("attn_q", "attn_k", "attn_v")
_QKV_IN_TURN = Leaf(_QKV, "attn_qkv", _QKV)
_QKV_BY_HEAD_GROUP = Leaf(_QKV, "attn_qkv", _QKV, by_head_group=True)
# Phi-3 has gate before up; TensorRT-LLM's fused layer has the linear half first and the activated half second
# (`swiglu` in TensorRT-LLM tensorrt_llm/functional.py).
_GATE_UP = Leaf(("mlp_h_to_4h", "mlp_gate"), "mlp_gate_up", ("mlp_gate", "mlp_h_to_4h"))

_SEPARATE_ATTENTION = _leaves("self_attn", attn_q="q_proj", attn_k="k_proj", attn_v="v_proj", attn_dense="o_proj")
_SEPARATE_OUT_PROJ = _leaves("self_attn", attn_q="q_proj", attn_k="k_proj", attn_v="v_proj", attn_dense="out_proj")
_GATED_MLP = _leaves("mlp", mlp_h_to_4h="gate_proj", mlp_gate="up_proj", mlp_4h_to_h="down_proj")
_GATED_MLP_MODULES = frozenset({"mlp_h_to_4h", "mlp_gate", "mlp_4h_to_h"})
_GATED_FEED_FORWARD = _leaves("feed_forward", mlp_h_to_4h="w1", mlp_gate="w3", mlp_4h_to_h="w2")
_UNGATED_MLP = _leaves("mlp", mlp_h_to_4h="up_proj", mlp_4h_to_h="down_proj")
_C_MLP = _leaves("mlp", mlp_h_to_4h="c_fc", mlp_4h_to_h="c_proj")
_DENSE_MLP = _leaves("mlp", mlp_h_to_4h="dense_h_to_4h", mlp_4h_to_h="dense_4h_to_h")
_FC_MLP = _leaves("mlp", mlp_h_to_4h="fc1", mlp_4h_to_h="fc2")
_NESTED_ATTENTION = _leaves("attn.attention", attn_q="q_proj", attn_k="k_proj", attn_v="v_proj", attn_dense="out_proj")
_FC1_FC2 = {"fc1": Leaf(("mlp_h_to_4h",)), "fc2": Leaf(("mlp_4h_to_h",))}

# Stems with `language_model` or `text_model` are of the text model inside a vision-language model.
_MODEL_LAYERS = (
    "model.layers",
    "model.language_model.layers",
    "model.text_model.layers",
    "language_model.model.layers",
    "language_model.layers",
    "text_model.layers",
    "layers",
)
_TRANSFORMER_H = ("transformer.h", "h")
_DECODER_LAYERS = ("model.decoder.layers", "decoder.layers")

LLAMA = Family("Llama", _MODEL_LAYERS, _SEPARATE_ATTENTION | _GATED_MLP)
# Expert layers are left out: a row per module cannot carry their LoRA. Some models also have layers without experts.
MIXTURE = Family(
    "Mixture of experts",
    _MODEL_LAYERS,
    _SEPARATE_ATTENTION | _GATED_MLP,
    {"mlp": ("intermediate_size", "moe_intermediate_size")},  # the second key where every layer has experts
    rare=_GATED_MLP_MODULES,
)
# The other layers of these models are state spaces or convolutions, and have other names.
BAMBA = Family(
    "Bamba",
    _MODEL_LAYERS,
    _SEPARATE_ATTENTION | _leaves("feed_forward", mlp_h_to_4h="gate_proj", mlp_gate="up_proj", mlp_4h_to_h="down_proj"),
)
_LFM2_LAYERS = _SEPARATE_OUT_PROJ | _GATED_FEED_FORWARD
LFM2 = Family("LFM2", _MODEL_LAYERS, _LFM2_LAYERS, {"mlp": ("block_ff_dim", "intermediate_size")})
LFM2_MOE = Family("LFM2-MoE", _MODEL_LAYERS, _LFM2_LAYERS, rare=_GATED_MLP_MODULES)
# Like Llama, but the MLP has no gate: up_proj goes through the activation.
NEMOTRON = Family("Nemotron", _MODEL_LAYERS, _SEPARATE_ATTENTION | _UNGATED_MLP)
GLM = Family(
    "GLM",
    _MODEL_LAYERS,
    _SEPARATE_ATTENTION | {"mlp.gate_up_proj": _GATE_UP, "mlp.down_proj": Leaf(("mlp_4h_to_h",))},
)
PHI3 = Family(
    "Phi-3",
    _MODEL_LAYERS,
    {
        "self_attn.qkv_proj": _QKV_IN_TURN,
        "self_attn.o_proj": Leaf(("attn_dense",)),
        "mlp.gate_up_proj": _GATE_UP,
        "mlp.down_proj": Leaf(("mlp_4h_to_h",)),
    },
)
PHI = Family(
    "Phi",
    _MODEL_LAYERS,
    _leaves("self_attn", attn_q="q_proj", attn_k="k_proj", attn_v="v_proj", attn_dense="dense") | _FC_MLP,
)
NANOCHAT = Family("nanochat", _MODEL_LAYERS, _SEPARATE_ATTENTION | _FC_MLP)
STARCODER2 = Family("StarCoder2", _MODEL_LAYERS, _SEPARATE_ATTENTION | _C_MLP)
GPT_NEOX = Family(
    "GPT-NeoX",
    ("gpt_neox.layers", "gpt_neox_japanese.layers", "layers"),
    {"attention.query_key_value": _QKV_BY_HEAD_GROUP, "attention.dense": Leaf(("attn_dense",))} | _DENSE_MLP,
)
# Falcon's three generations differ only in the number of key-value heads.
FALCON = Family(
    "Falcon and Bloom",
    _TRANSFORMER_H,
    {"self_attention.query_key_value": _QKV_BY_HEAD_GROUP, "self_attention.dense": Leaf(("attn_dense",))} | _DENSE_MLP,
    {"mlp": ("ffn_hidden_size",)},
)
PERSIMMON = Family(
    "Persimmon",
    _MODEL_LAYERS,
    {"self_attn.query_key_value": _QKV_BY_HEAD_GROUP, "self_attn.dense": Leaf(("attn_dense",))} | _DENSE_MLP,
)
CHATGLM = Family(
    "ChatGLM",
    ("transformer.encoder.layers",),
    {
        "self_attention.query_key_value": _QKV_IN_TURN,
        "self_attention.dense": Leaf(("attn_dense",)),
        "mlp.dense_h_to_4h": _GATE_UP,
        "mlp.dense_4h_to_h": Leaf(("mlp_4h_to_h",)),
    },
    {"kv_heads": ("multi_query_group_num",), "head_size": ("kv_channels",)},
)
BAICHUAN = Family(
    "Baichuan",
    _MODEL_LAYERS,
    {"self_attn.W_pack": _QKV_IN_TURN, "self_attn.o_proj": Leaf(("attn_dense",))} | _GATED_MLP,
)
INTERNLM2 = Family(
    "InternLM2",
    _MODEL_LAYERS,
    {"attention.wqkv": _QKV_BY_HEAD_GROUP, "attention.wo": Leaf(("attn_dense",))} | _GATED_FEED_FORWARD,
)
_C_PROJ = {"attn.c_proj": Leaf(("attn_dense",))}
GPT2 = Family("GPT-2", _TRANSFORMER_H, {"attn.c_attn": _QKV_IN_TURN} | _C_PROJ | _C_MLP, conv1d=True)
# c_fc2 goes through the activation, so c_fc is another module than in GPT-2.
JAIS = Family(
    "JAIS",
    _TRANSFORMER_H,
    {"attn.c_attn": _QKV_IN_TURN}
    | _C_PROJ
    | _leaves("mlp", mlp_h_to_4h="c_fc2", mlp_gate="c_fc", mlp_4h_to_h="c_proj"),
    conv1d=True,
)
GPT_BIGCODE = Family("GPTBigCode", _TRANSFORMER_H, {"attn.c_attn": _QKV_BY_HEAD_GROUP} | _C_PROJ | _C_MLP)
# The first Qwen. w2 goes through the activation (`models/qwen/model.py` in TensorRT-LLM tensorrt_llm).
QWEN = Family(
    "Qwen 1",
    _TRANSFORMER_H,
    {"attn.c_attn": _QKV_IN_TURN} | _C_PROJ | _leaves("mlp", mlp_h_to_4h="w2", mlp_gate="w1", mlp_4h_to_h="c_proj"),
    {"head_size": ("kv_channels",)},
)
GPT_NEO = Family(
    "GPT-Neo",
    _TRANSFORMER_H,
    _NESTED_ATTENTION | _C_MLP,
)
EXAONE = Family(
    "EXAONE",
    _TRANSFORMER_H,
    _NESTED_ATTENTION | _leaves("mlp", mlp_h_to_4h="c_fc_0", mlp_gate="c_fc_1", mlp_4h_to_h="c_proj"),
)
GPTJ = Family(
    "GPT-J",
    _TRANSFORMER_H,
    _leaves("attn", attn_q="q_proj", attn_k="k_proj", attn_v="v_proj", attn_dense="out_proj")
    | _leaves("mlp", mlp_h_to_4h="fc_in", mlp_4h_to_h="fc_out"),
)
MPT = Family(
    "MPT",
    ("transformer.blocks", "blocks"),
    {"attn.Wqkv": _QKV_IN_TURN, "attn.out_proj": Leaf(("attn_dense",))}
    | _leaves("ffn", mlp_h_to_4h="up_proj", mlp_4h_to_h="down_proj"),
)
# BLIP-2 has OPT below `language_model`, as other vision-language models had it before transformers 4.52.
OPT = Family("OPT", (*_DECODER_LAYERS, "language_model.model.decoder.layers"), _SEPARATE_OUT_PROJ | _FC1_FC2)
XGLM = Family(
    "XGLM and BioGPT",
    ("model.layers", "biogpt.layers", "layers"),
    _SEPARATE_OUT_PROJ | _FC1_FC2,
    {"heads": ("num_attention_heads", "attention_heads")},
)
_DECODER_SIZES = {"layers": ("decoder_layers",), "heads": ("decoder_attention_heads",), "mlp": ("decoder_ffn_dim",)}
BART = Family(
    "BART and Whisper decoders",
    (*_DECODER_LAYERS, "led.decoder.layers"),
    _SEPARATE_OUT_PROJ | _cross("encoder_attn", "out_proj") | _FC1_FC2,
    _DECODER_SIZES,
)
NLLB_MOE = Family(
    "NLLB-MoE decoder",
    _DECODER_LAYERS,
    _SEPARATE_OUT_PROJ | _cross("cross_attention", "out_proj") | _leaves("ffn", mlp_h_to_4h="fc1", mlp_4h_to_h="fc2"),
    _DECODER_SIZES,
    rare=frozenset({"mlp_h_to_4h", "mlp_4h_to_h"}),
)
T5GEMMA = Family(
    "T5Gemma decoder",
    _DECODER_LAYERS,
    _SEPARATE_ATTENTION | _cross("cross_attn", "o_proj") | _GATED_MLP,
    {
        "hidden": ("decoder.hidden_size",),
        "layers": ("decoder.num_hidden_layers",),
        "heads": ("decoder.num_attention_heads",),
        "kv_heads": ("decoder.num_key_value_heads",),
        "head_size": ("decoder.head_dim",),
        "mlp": ("decoder.intermediate_size",),
    },
)
T5 = Family(
    "T5 decoder",
    ("decoder.block", "language_model.decoder.block"),  # the second stem is BLIP-2's
    _leaves("layer.0.SelfAttention", attn_q="q", attn_k="k", attn_v="v", attn_dense="o")
    | _leaves("layer.1.EncDecAttention", cross_attn_q="q", cross_attn_k="k", cross_attn_v="v", cross_attn_dense="o")
    | {
        "layer.2.DenseReluDense.wi": Leaf(("mlp_h_to_4h",)),
        "layer.2.DenseReluDense.wi_0": Leaf(("mlp_h_to_4h",)),  # wi_0 goes through the activation
        "layer.2.DenseReluDense.wi_1": Leaf(("mlp_gate",)),
        "layer.2.DenseReluDense.wo": Leaf(("mlp_4h_to_h",)),
    },
    {"layers": ("num_decoder_layers", "num_layers")},
)

# Older releases left the class's default values out of a `text_config`. LLaVA, Idefics and Pixtral still do.
_SEVEN_BILLION = {"hidden_size": 4096, "num_hidden_layers": 32, "num_attention_heads": 32}
# Voxtral's and GLM-ASR's `text_config` is of Llama's class, but missing keys mean their own default values.
_VOXTRAL = {
    "hidden_size": 3072, "num_hidden_layers": 30, "num_attention_heads": 32, "num_key_value_heads": 8, "head_dim": 128,
    "intermediate_size": 8192,
}  # fmt: skip
_GLM_ASR = {
    "hidden_size": 2048, "num_hidden_layers": 28, "num_attention_heads": 16, "num_key_value_heads": 4,
    "intermediate_size": 6144,
}  # fmt: skip
_LFM2: Mapping[str, int | str] = {
    "num_key_value_heads": 8, "block_auto_adjust_ff_dim": True, "block_ffn_dim_multiplier": 1, "block_multiple_of": 256,
}  # fmt: skip
_GEMMA2 = {"num_attention_heads": 8, "num_key_value_heads": 4, "head_dim": 256}
_MT5: Mapping[str, int | str] = {"d_kv": 64, "feed_forward_proj": "gated-gelu"}
_TABLE = (
    Architecture("llama", "LlamaForCausalLM", LLAMA, nested={**_SEVEN_BILLION, "intermediate_size": 11008}),
    Architecture(
        "mistral",
        "MistralForCausalLM",
        LLAMA,
        {"num_key_value_heads": 8},
        nested={**_SEVEN_BILLION, "intermediate_size": 14336},
    ),
    Architecture("ministral", "MinistralForCausalLM", LLAMA, {"num_key_value_heads": 8}),
    Architecture("ministral3", "Ministral3ForCausalLM", LLAMA, {"num_key_value_heads": 8, "head_dim": 128}),
    Architecture(
        "qwen2",
        "Qwen2ForCausalLM",
        LLAMA,
        {"num_key_value_heads": 32},
        nested={**_SEVEN_BILLION, "intermediate_size": 22016},
    ),
    Architecture("qwen2_vl_text", "Qwen2VLForConditionalGeneration", LLAMA, {"num_key_value_heads": 8}),
    Architecture("qwen2_5_vl_text", "Qwen2_5_VLForConditionalGeneration", LLAMA, {"num_key_value_heads": 8}),
    Architecture("qwen3", "Qwen3ForCausalLM", LLAMA, {"num_key_value_heads": 32, "head_dim": 128}),
    Architecture("qwen3_vl_text", "Qwen3VLForConditionalGeneration", LLAMA, {"head_dim": 128}),
    Architecture(
        "gemma", "GemmaForCausalLM", LLAMA, {"num_attention_heads": 16, "num_key_value_heads": 16, "head_dim": 256}
    ),
    Architecture("gemma2", "Gemma2ForCausalLM", LLAMA, _GEMMA2),
    Architecture("gemma3_text", "Gemma3ForCausalLM", LLAMA, _GEMMA2),
    Architecture("gemma3", "Gemma3ForConditionalGeneration", LLAMA, _GEMMA2),
    Architecture("vaultgemma", "VaultGemmaForCausalLM", LLAMA, _GEMMA2),
    Architecture("mllama_text_model", "MllamaForCausalLM", LLAMA, {"num_key_value_heads": 8}),
    Architecture("granite", "GraniteForCausalLM", LLAMA),
    Architecture("olmo", "OlmoForCausalLM", LLAMA),
    Architecture("olmo2", "Olmo2ForCausalLM", LLAMA),
    Architecture("olmo3", "Olmo3ForCausalLM", LLAMA),
    Architecture("cohere", "CohereForCausalLM", LLAMA),
    Architecture("cohere2", "Cohere2ForCausalLM", LLAMA),
    Architecture("stablelm", "StableLmForCausalLM", LLAMA, {"num_key_value_heads": 32}),
    Architecture("smollm3", "SmolLM3ForCausalLM", LLAMA, {"num_key_value_heads": 4}),
    Architecture("helium", "HeliumForCausalLM", LLAMA, {"num_key_value_heads": 20, "head_dim": 128}),
    Architecture("ernie4_5", "Ernie4_5ForCausalLM", LLAMA, {"num_key_value_heads": 2, "head_dim": 128}),
    Architecture("exaone4", "Exaone4ForCausalLM", LLAMA, {"num_key_value_heads": 32}),
    Architecture("seed_oss", "SeedOssForCausalLM", LLAMA, {"num_key_value_heads": 8, "head_dim": 128}),
    Architecture("hyperclovax", "HyperCLOVAXForCausalLM", LLAMA),
    Architecture("cwm", "CwmForCausalLM", LLAMA, {"num_key_value_heads": 8, "head_dim": 128}),
    Architecture("hunyuan_v1_dense", "HunYuanDenseV1ForCausalLM", LLAMA),
    Architecture("diffllama", "DiffLlamaForCausalLM", LLAMA),
    Architecture("emu3_text_model", "Emu3ForCausalLM", LLAMA, {"num_key_value_heads": 8}),
    Architecture("granite_swa", "GraniteSWAForCausalLM", LLAMA, {"num_key_value_heads": 4}),
    Architecture("qwen2_5_omni_text", "Qwen2_5OmniThinkerForConditionalGeneration", LLAMA, {"num_key_value_heads": 4}),
    Architecture(
        "paddleocr_vl_text", "PaddleOCRVLForConditionalGeneration", LLAMA, {"num_key_value_heads": 2, "head_dim": 128}
    ),
    Architecture("bitnet", "BitNetForCausalLM", LLAMA, {"num_key_value_heads": 5}),
    Architecture("olmo_hybrid", "OlmoHybridForCausalLM", LLAMA),
    Architecture("granite_docling_text", "GraniteDoclingForConditionalGeneration", LLAMA, {"num_key_value_heads": 4}),
    Architecture("voxtral", "VoxtralForConditionalGeneration", LLAMA, nested=_VOXTRAL),
    Architecture("glmasr", "GlmAsrForConditionalGeneration", LLAMA, nested=_GLM_ASR),
    Architecture("bamba", "BambaForCausalLM", BAMBA, {"num_key_value_heads": 8}),
    Architecture("lfm2", "Lfm2ForCausalLM", LFM2, _LFM2),
    Architecture("baichuan", "BaichuanForCausalLM", BAICHUAN),
    Architecture("qwen", "QWenLMHeadModel", QWEN),
    Architecture("internlm2", "InternLM2ForCausalLM", INTERNLM2),
    Architecture("exaone", "ExaoneForCausalLM", EXAONE),
    Architecture("chatglm", "ChatGLMModel", CHATGLM),
    Architecture("nemotron", "NemotronForCausalLM", NEMOTRON),
    Architecture("arcee", "ArceeForCausalLM", NEMOTRON),
    Architecture("jais2", "Jais2ForCausalLM", NEMOTRON, {"head_dim": 128}),
    Architecture("apertus", "ApertusForCausalLM", NEMOTRON),
    Architecture("apertus1p5_text", "Apertus1p5TextForCausalLM", NEMOTRON),
    Architecture("glm", "GlmForCausalLM", GLM, {"num_key_value_heads": 2, "head_dim": 128}),
    Architecture("glm4", "Glm4ForCausalLM", GLM, {"num_key_value_heads": 2, "head_dim": 128}),
    Architecture("glm4v_text", "Glm4vForConditionalGeneration", GLM, {"num_key_value_heads": 2}),
    Architecture("glm_ocr_text", "GlmOcrForConditionalGeneration", GLM, {"num_key_value_heads": 8}),
    Architecture("phi3", "Phi3ForCausalLM", PHI3),
    Architecture("phi3_v", "Phi3VForCausalLM", PHI3),
    Architecture("phi4_multimodal", "Phi4MultimodalForCausalLM", PHI3, {"num_key_value_heads": 8}),
    Architecture("phi4mm", "Phi4MMForCausalLM", PHI3),
    Architecture("phi", "PhiForCausalLM", PHI),
    Architecture("nanochat", "NanoChatForCausalLM", NANOCHAT),
    Architecture("persimmon", "PersimmonForCausalLM", PERSIMMON),
    Architecture("starcoder2", "Starcoder2ForCausalLM", STARCODER2, {"num_key_value_heads": 2}),
    Architecture("gpt_neox", "GPTNeoXForCausalLM", GPT_NEOX),
    Architecture("gpt_neox_japanese", "GPTNeoXJapaneseForCausalLM", GPT_NEOX),
    Architecture("falcon", "FalconForCausalLM", FALCON),
    Architecture("bloom", "BloomForCausalLM", FALCON),
    Architecture("gpt2", "GPT2LMHeadModel", GPT2),
    Architecture("jais", "JAISLMHeadModel", JAIS),
    Architecture("gpt_bigcode", "GPTBigCodeForCausalLM", GPT_BIGCODE),
    Architecture("gpt_neo", "GPTNeoForCausalLM", GPT_NEO),
    Architecture("gptj", "GPTJForCausalLM", GPTJ),
    Architecture("mpt", "MptForCausalLM", MPT),
    Architecture("opt", "OPTForCausalLM", OPT),
    Architecture("xglm", "XGLMForCausalLM", XGLM),
    Architecture("biogpt", "BioGptForCausalLM", XGLM),
    Architecture("mixtral", "MixtralForCausalLM", MIXTURE, {"num_key_value_heads": 8}),
    Architecture("qwen2_moe", "Qwen2MoeForCausalLM", MIXTURE, {"num_key_value_heads": 16}),
    Architecture("qwen3_moe", "Qwen3MoeForCausalLM", MIXTURE, {"num_key_value_heads": 4}),
    Architecture("olmoe", "OlmoeForCausalLM", MIXTURE),
    Architecture("phimoe", "PhimoeForCausalLM", MIXTURE, {"num_key_value_heads": 8}),
    Architecture("granitemoe", "GraniteMoeForCausalLM", MIXTURE),
    Architecture("granitemoe_swa", "GraniteMoeSWAForCausalLM", MIXTURE),
    Architecture(
        "qwen3_vl_moe_text", "Qwen3VLMoeForConditionalGeneration", MIXTURE, {"num_key_value_heads": 16, "head_dim": 128}
    ),
    Architecture("flex_olmo", "FlexOlmoForCausalLM", MIXTURE),
    Architecture("dots1", "Dots1ForCausalLM", MIXTURE),
    Architecture("hunyuan_v1_moe", "HunYuanMoEV1ForCausalLM", MIXTURE),
    Architecture("cohere2_moe", "Cohere2MoeForCausalLM", MIXTURE, {"head_dim": 128}),
    Architecture("granitemoeshared", "GraniteMoeSharedForCausalLM", MIXTURE),
    Architecture("ernie4_5_moe", "Ernie4_5_MoeForCausalLM", MIXTURE, {"num_key_value_heads": 4}),
    Architecture("glm4_moe", "Glm4MoeForCausalLM", MIXTURE, {"num_key_value_heads": 8}),
    Architecture("minimax_m2", "MiniMaxM2ForCausalLM", MIXTURE, {"num_key_value_heads": 8, "head_dim": 128}),
    Architecture("gpt_oss", "GptOssForCausalLM", MIXTURE, {"num_key_value_heads": 8, "head_dim": 64}),
    Architecture("llama4_text", "Llama4ForCausalLM", MIXTURE, {"num_key_value_heads": 8, "head_dim": 128}),
    Architecture("exaone_moe", "ExaoneMoeForCausalLM", MIXTURE, {"num_key_value_heads": 32}),
    Architecture("hy_v3", "HYV3ForCausalLM", MIXTURE, {"num_key_value_heads": 8, "head_dim": 128}),
    Architecture("solar_open", "SolarOpenForCausalLM", MIXTURE, {"num_key_value_heads": 8, "head_dim": 128}),
    Architecture("mellum", "MellumForCausalLM", MIXTURE, {"num_key_value_heads": 4, "head_dim": 128}),
    Architecture("lara_mini", "LaraMiniForCausalLM", MIXTURE, {"num_key_value_heads": 4, "head_dim": 128}),
    Architecture("flint", "FlintForCausalLM", MIXTURE, {"num_key_value_heads": 4, "head_dim": 128}),
    Architecture("kolibri1", "Kolibri1ForCausalLM", MIXTURE, {"num_key_value_heads": 4, "head_dim": 128}),
    Architecture("granitemoehybrid", "GraniteMoeHybridForCausalLM", MIXTURE),
    Architecture("lfm2_moe", "Lfm2MoeForCausalLM", LFM2_MOE, {"num_key_value_heads": 8}),
    Architecture("t5", "T5ForConditionalGeneration", T5, {"d_kv": 64}),
    Architecture("mt5", "MT5ForConditionalGeneration", T5, _MT5),
    Architecture("umt5", "UMT5ForConditionalGeneration", T5, _MT5),
    Architecture("longt5", "LongT5ForConditionalGeneration", T5, {"d_kv": 64}),
    Architecture("bart", "BartForConditionalGeneration", BART),
    Architecture("mbart", "MBartForConditionalGeneration", BART),
    Architecture("pegasus", "PegasusForConditionalGeneration", BART),
    Architecture("blenderbot", "BlenderbotForConditionalGeneration", BART),
    Architecture("marian", "MarianMTModel", BART),
    Architecture("m2m_100", "M2M100ForConditionalGeneration", BART),
    Architecture("plbart", "PLBartForConditionalGeneration", BART),
    Architecture("mvp", "MvpForConditionalGeneration", BART),
    Architecture("blenderbot-small", "BlenderbotSmallForConditionalGeneration", BART),
    Architecture("bigbird_pegasus", "BigBirdPegasusForConditionalGeneration", BART),
    Architecture("pegasus_x", "PegasusXForConditionalGeneration", BART),
    Architecture("fsmt", "FSMTForConditionalGeneration", BART),
    Architecture("led", "LEDForConditionalGeneration", BART),
    Architecture("nllb-moe", "NllbMoeForConditionalGeneration", NLLB_MOE),
    Architecture(
        "t5gemma",
        "T5GemmaForConditionalGeneration",
        T5GEMMA,
        {"decoder.num_key_value_heads": 4, "decoder.head_dim": 256},
    ),
    Architecture("whisper", "WhisperForConditionalGeneration", BART),
)
# Models whose layers have the names above but are other layers: beginning of the class name -> the reason.
_LATENT = "its attention is latent, for which TensorRT-LLM has no LoRA"
_GATED_QUERY = "its q_proj has a gate beside the queries, for which TensorRT-LLM has no LoRA"
_UNLIKE_HEADS = "its layers differ in their heads, and TensorRT-LLM has one number and one size for all"
NOT_THESE: Mapping[str, str] = {
    **dict.fromkeys(
        (
            *("AXK1", "AXK2", "BailingHybrid", "DeepseekV2", "DeepseekV3", "Dots3Note", "Glm4MoeLite", "Glm5Next"),
            *("GlmMoeDsa", "HYV4", "KimiLinear", "Kimi_K25", "LongcatFlash", "MiniCPM3", "Mistral4"),
            *("MistralLarge4", "Youtu"),
        ),
        _LATENT,
    ),
    **dict.fromkeys(
        ("MiniCPMOcr", "MiniCPMV4_6", "MiniCPMV4_7", "Qwen3Next", "Qwen3_5", "Qwen4Exp"),
        _GATED_QUERY,
    ),
    **dict.fromkeys(("Gemma4", "Laguna", "Step3p5", "Step3p7"), _UNLIKE_HEADS),
    "Dory": "its layers are run several times over, and TensorRT-LLM has a LoRA for each run",
    "Moshi": "its fc1 is two layers in one",
    "T5Gemma2": "its q_proj is that of two attentions in one",
}
# The same models by the checkpoint's name in lower case, a regular expression, if the architecture is not known.
NOT_THESE_BY_NAME: Mapping[str, str] = {
    r"qwen-?3([-_.]?next|\.5)|minicpm-(v-4[._][67]|ocr)": _GATED_QUERY,
    r"(^|[-/])gemma-4-|step-3[._][57]|poolside/laguna": _UNLIKE_HEADS,
    r"t5gemma-2-": "its q_proj is that of two attentions in one",
    r"deepseek[-_.]?(v[23]|coder-v2)|minicpm3|glm-?4\.7-flash|kimi-(k2|linear)": _LATENT,
}
ARCHITECTURES: Mapping[str, Architecture] = {architecture.name: architecture for architecture in _TABLE}
BY_MODEL_TYPE: Mapping[str, Architecture] = {architecture.model_type: architecture for architecture in _TABLE}
# Families and architectures with several kinds of layers, so that a module is only in some of the layers.
LAYERS_DIFFER = frozenset(
    {
        *(family.name for family in (BAMBA, LFM2, LFM2_MOE)),
        *("OlmoHybridForCausalLM", "GraniteMoeHybridForCausalLM", "MllamaForCausalLM"),
    }
)
# Other architecture names in engines' config.json (`MODEL_MAP` in TensorRT-LLM tensorrt_llm/models/__init__.py).
ENGINE_NAMES: Mapping[str, tuple[Family, ...]] = {
    "GPTForCausalLM": (GPT2, GPT_BIGCODE, STARCODER2, NEMOTRON),
    "QWenForCausalLM": (LLAMA, MIXTURE, QWEN),
    "RWForCausalLM": (FALCON,),
    "MPTForCausalLM": (MPT,),
    "InternLMForCausalLM": (LLAMA,),
    "SkyworkForCausalLM": (LLAMA,),
    "DeciLMForCausalLM": (LLAMA,),
    "LlavaLlamaModel": (LLAMA,),
    "BaiChuanForCausalLM": (BAICHUAN,),
    "ChatGLMForCausalLM": (CHATGLM,),
    "ChatGLMForConditionalGeneration": (CHATGLM,),
}
# Pairs of families in which checkpoints of the same model are stored: with fused layers, or "llamafied", with separate
# layers. An engine knows one family of the pair. The sizes show whether an adapter of the other family fits it.
STORED_AS: tuple[frozenset[str], ...] = tuple(
    frozenset({LLAMA.name, family.name}) for family in (PHI3, BAICHUAN, INTERNLM2)
)
# The parts of the engine's fused modules, in the order of their outputs.
FUSED: Mapping[str, tuple[str, ...]] = {
    "attn_qkv": _QKV,
    "cross_attn_qkv": ("cross_attn_q", "cross_attn_k", "cross_attn_v"),
    _GATE_UP.fused: _GATE_UP.fused_order,
}
FAMILIES: tuple[Family, ...] = tuple(
    {architecture.family.name: architecture.family for architecture in _TABLE}.values()
)
