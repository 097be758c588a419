# SPDX-FileCopyrightText: the tritonlora authors
# SPDX-License-Identifier: Apache-2.0
"""Engine profiles from config.json files."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import transformers

from engine_configs import ENGINE
from tritonlora.architectures.families import ARCHITECTURES
from tritonlora.architectures.lora_modules import BY_NAME, ModuleDims
from tritonlora.engine.profile import load_profile, profile_from_engine, profile_from_hf
from tritonlora.errors import EngineMismatch, UnknownArchitecture

LLAMA_8B: dict[str, Any] = {
    "architectures": ["LlamaForCausalLM"],
    "hidden_size": 4096,
    "intermediate_size": 14336,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "torch_dtype": "bfloat16",
}


def with_changes(config: dict[str, Any], path: str, value: Any) -> dict[str, Any]:
    changed: dict[str, Any] = json.loads(json.dumps(config))
    *parents, last = path.split(".")
    section = changed
    for parent in parents:
        section = section[parent]
    section[last] = value
    return changed


def test_a_llama_has_lora_for_its_seven_linear_layers() -> None:
    """q, k, v, o, gate, up and down, with the dims of grouped-query attention."""
    profile = profile_from_hf(LLAMA_8B, "llama")

    assert {
        "attn_q": (4096, 4096),
        "attn_k": (4096, 1024),
        "attn_v": (4096, 1024),
        "attn_dense": (4096, 4096),
        "mlp_h_to_4h": (4096, 14336),
        "mlp_4h_to_h": (14336, 4096),
        "mlp_gate": (4096, 14336),
    } == {name: (dims.in_features, dims.out_features) for name, dims in profile.modules.items()}
    assert ("bfloat16", 32, None, 1) == (profile.dtype, profile.num_layers, profile.max_lora_rank, profile.tp_size)


def test_target_modules_and_dtype_can_be_given() -> None:
    """What the caller says goes before what the model says."""
    profile = profile_from_hf(LLAMA_8B, "llama", max_lora_rank=8, target_modules=["attn_v", "attn_q"], dtype="float16")

    assert (["attn_q", "attn_v"], 8, "float16") == (list(profile.modules), profile.max_lora_rank, profile.dtype)


def test_nested_text_config_is_read() -> None:
    """Gemma 3 holds the text model's sizes in text_config, and leaves out those that are the class's defaults."""
    config = {
        "architectures": ["Gemma3ForConditionalGeneration"],
        "torch_dtype": "bfloat16",
        "text_config": {"hidden_size": 2560, "intermediate_size": 10240, "num_hidden_layers": 34},
        "vision_config": {"hidden_size": 1152},
    }
    profile = profile_from_hf(config, "gemma3")

    assert (34, ModuleDims(BY_NAME["attn_k"], 2560, 1024)) == (profile.num_layers, profile.modules["attn_k"])


@pytest.mark.parametrize("name", [name for name, line in ARCHITECTURES.items() if line.defaults])
def test_defaults_of_missing_keys_are_those_of_transformers(name: str) -> None:
    """The table's defaults are what the configuration class itself fills in."""
    config = getattr(transformers, name).config_class().get_text_config().to_dict()

    assert {key: config[key.rpartition(".")[2]] for key in ARCHITECTURES[name].defaults} == ARCHITECTURES[name].defaults


@pytest.mark.parametrize("name", [name for name, line in ARCHITECTURES.items() if line.nested])
def test_sizes_that_a_text_config_leaves_out_are_those_of_the_class(name: str) -> None:
    """LLaVA's config.json says of its text model hardly more than which class it is of; Voxtral's class is its own."""
    text = {"model_type": ARCHITECTURES[name].model_type, "vocab_size": 32064}
    whose = "LlavaForConditionalGeneration" if name.endswith("ForCausalLM") else name
    config = {"architectures": [whose], "text_config": text, "torch_dtype": "float16"}
    whole = {**getattr(transformers, name).config_class().to_dict(), "architectures": [name], "dtype": "float16"}

    assert profile_from_hf(whole, "llava") == profile_from_hf(config, "llava")


@pytest.mark.parametrize(("name", "gated"), [("T5", False), ("MT5", True), ("UMT5", True), ("LongT5", False)])
def test_t5s_that_do_not_say_it_have_the_layers_of_their_class(name: str, gated: bool) -> None:
    """A gate in the MLP, and heads of 64 whatever the hidden size."""
    sizes = {"d_model": 128, "num_layers": 1, "num_heads": 4, "d_ff": 96, "dtype": "float16"}
    profile = profile_from_hf({**sizes, "architectures": [f"{name}ForConditionalGeneration"]}, "t5")

    assert (gated, 256) == ("mlp_gate" in profile.modules, profile.modules["attn_q"].out_features)


@pytest.mark.parametrize(
    ("says", "mlp"),
    [
        ({}, 6912),
        ({"block_ff_dim": 12288}, 8192),
        ({"block_ffn_dim_multiplier": 1.1}, 7680),
        ({"block_ffn_dim_multiplier": None}, 6826),
        ({"block_ffn_dim_multiplier": None, "block_multiple_of": None}, 6826),
        ({"block_multiple_of": 100}, 6900),
        ({"block_auto_adjust_ff_dim": False}, 10240),
    ],
)
def test_mlp_of_lfm2_is_smaller_than_its_config_says(says: dict[str, Any], mlp: int) -> None:
    """As in transformers, which makes the layers of the same config."""
    config = {**LLAMA_8B, "architectures": ["Lfm2ForCausalLM"], "intermediate_size": 10240, **says}

    assert mlp == profile_from_hf(config, "lfm2").modules["mlp_gate"].out_features


@pytest.mark.parametrize("multiplier", ["1", -1, float("inf"), float("nan"), [1]])
def test_multiplier_of_lfm2_that_is_none_is_refused(multiplier: object) -> None:
    """As every size that is not one."""
    config = {**LLAMA_8B, "architectures": ["Lfm2ForCausalLM"], "block_ffn_dim_multiplier": multiplier}

    with pytest.raises(EngineMismatch, match="'block_ffn_dim_multiplier' is .*, expected a positive number"):
        profile_from_hf(config, "lfm2")


def test_cohere2_divides_its_hidden_size_among_the_heads() -> None:
    """The class's head_dim of 128 is that of its other sizes."""
    sizes: dict[str, Any] = {"hidden_size": 1024, "num_hidden_layers": 1, "num_attention_heads": 16}
    sizes["intermediate_size"] = 64
    config = transformers.Cohere2Config(**sizes)
    profile = profile_from_hf({**sizes, "architectures": ["Cohere2ForCausalLM"]}, "cohere2", dtype="float16")

    assert config.head_dim == profile.head_size


def test_every_missing_size_is_named_at_once() -> None:
    """Nothing is made up for a config.json that lacks sizes, and one error says which."""
    with pytest.raises(EngineMismatch, match=r"(?s)'hidden_size'.*'num_attention_heads'.*dtype is None"):
        profile_from_hf({"architectures": ["LlamaForCausalLM"], "num_hidden_layers": 2}, "x")


@pytest.mark.parametrize(
    "config",
    [
        {**LLAMA_8B, "architectures": ["LlamaModel"], "model_type": "llama"},
        {"architectures": ["NewVisionModel"], "text_config": {**LLAMA_8B, "model_type": "llama"}},
        {"architectures": ["InternVLChatModel"], "llm_config": {**LLAMA_8B, "model_type": "llama"}},
    ],
    ids=["without its head", "inside another", "inside InternVL"],
)
def test_architecture_is_known_by_the_model_type_of_the_text_model(config: dict[str, Any]) -> None:
    """Neither a checkpoint without lm_head nor a model with a vision tower needs a line of its own."""
    assert "LlamaForCausalLM" == profile_from_hf(config, "x", dtype="bfloat16").architecture


def test_phi3_vision_has_the_sizes_of_its_text_model_beside_those_of_the_tower() -> None:
    """It has no class in transformers, and no text_config."""
    profile = profile_from_hf({**LLAMA_8B, "architectures": ["Phi3VForCausalLM"], "img_processor": {}}, "x")

    assert profile_from_hf({**LLAMA_8B, "architectures": ["Phi3ForCausalLM"]}, "x").modules == profile.modules


def test_unknown_architecture_is_refused() -> None:
    """An architecture that is not in the table is named, and DoRA is not sent round between --base and none."""
    message = "unknown architecture 'NewForCausalLM'.*; merge the adapter into .* convert without .*, which only DoRA"
    with pytest.raises(EngineMismatch, match=message):
        profile_from_hf({**LLAMA_8B, "architectures": ["NewForCausalLM"]}, "x")


@pytest.mark.parametrize(
    ("name", "why"),
    [
        ("Qwen3NextForCausalLM", "its q_proj has a gate"),
        ("Kimi_K25ForConditionalGeneration", "its attention is latent"),
        ("MiniCPMV4_6ForConditionalGeneration", "its q_proj has a gate"),
        ("DeepseekV3ForCausalLM", "its attention is latent"),
        ("Gemma4ForConditionalGeneration", "its layers differ in their heads"),
        ("Step3p7ForConditionalGeneration", "its layers differ in their heads"),
    ],
)
def test_an_architecture_that_is_known_to_be_another_is_told_why(name: str, why: str) -> None:
    """It must not be sent round to convert without the base model: the names of its layers are those of others."""
    with pytest.raises(UnknownArchitecture, match=f"{name}: {why}.*; merge the adapter into the base model$"):
        profile_from_hf({**LLAMA_8B, "architectures": [name]}, "x")


def test_engine_profile_is_read_from_a_build() -> None:
    """Parallelism, rank, beam width and target modules come from the engine; attn_q and attn_v bring attn_k in."""
    profile = profile_from_engine(ENGINE, "engine")

    assert ["attn_q", "attn_k", "attn_v", "attn_dense"] == list(profile.modules)
    assert ModuleDims(BY_NAME["attn_k"], 4096, 1024) == profile.modules["attn_k"]
    assert (32, 2, 1, 3) == (profile.max_lora_rank, profile.tp_size, profile.pp_size, profile.max_beam_width)


@pytest.mark.parametrize(("hidden_act", "architecture"), [("swiglu", "JAISLMHeadModel"), ("gelu", "GPTForCausalLM")])
def test_jais_is_the_gpt_that_has_a_gate(hidden_act: str, architecture: str) -> None:
    """Its c_fc is another module than GPT-2's, and TensorRT-LLM can call both by one name."""
    gpt = {**ENGINE["pretrained_config"], "architecture": "GPTForCausalLM", "hidden_act": hidden_act}

    assert architecture == profile_from_engine({**ENGINE, "pretrained_config": gpt}, "engine").architecture


# What the releases write for one Llama, as far as LoRA is concerned: (pretrained_config, build_config) over ENGINE's.
LORA_CONFIG = ENGINE["build_config"]["lora_config"]
LAYOUTS: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "0.9.0": (
        {"max_lora_rank": 32, "lora_target_modules": ["attn_q", "attn_v", "attn_dense"], "moe_num_experts": 0},
        {"lora_config": ...},
    ),
    "0.10.0": ({"moe_num_experts": 0, "moe_top_k": 0}, {"auto_parallel_config": {"world_size": 1}}),
    "0.13.0": (
        {"moe": {"num_experts": 0, "top_k": 0, "normalization_mode": None}, "mlp_bias": False},
        {"kv_cache_type": "PAGED", "plugin_config": {"dtype": "bfloat16", "lora_plugin": "auto"}},
    ),
    "0.17.0.post1": (
        {"moe": {"num_experts": 0, "shared_expert_intermediate_size": 0, "top_k": 0}, "runtime_defaults": None},
        {"use_mrope": False, "monitor_memory": False},
    ),
    "1.0.0": (
        {"moe": {"num_experts": 0}, "model_type": "llama", "has_partial_lora_mask": False},
        {"lora_config": {**LORA_CONFIG, "max_loras": None, "max_cpu_loras": None, "lora_request": None}},
    ),
}


@pytest.mark.parametrize("version", LAYOUTS)
def test_engines_of_every_release_have_the_same_profile(version: str) -> None:
    """What has moved or been added since v0.9 makes no difference."""
    pretrained, build = LAYOUTS[version]
    engine: dict[str, Any] = {
        "version": version,
        "pretrained_config": {**ENGINE["pretrained_config"], **pretrained},
        "build_config": {k: v for k, v in {**ENGINE["build_config"], **build}.items() if v is not ...},
    }

    assert profile_from_engine(ENGINE, "e") == profile_from_engine(engine, "e")


def test_experts_are_counted() -> None:
    """Wherever the release writes them."""
    moe = with_changes(ENGINE, "build_config.lora_config.lora_target_modules", ["moe_router"])
    for path, value in {"moe": {"num_experts": 8}, "moe_num_experts": 8}.items():
        profile = profile_from_engine(with_changes(moe, f"pretrained_config.{path}", value), "e")

        assert ModuleDims(BY_NAME["moe_router"], 4096, 8) == profile.modules["moe_router"]


@pytest.mark.parametrize("plugin", [None, False, ""])
def test_engine_without_the_lora_plugin_has_no_modules(plugin: object) -> None:
    """An engine that was not built for LoRA is a profile with nothing in it, not an error, whatever else it says."""
    without = with_changes(ENGINE, "build_config.plugin_config.lora_plugin", plugin)
    bare = with_changes(without, "build_config.lora_config", {"max_lora_rank": 0, "lora_target_modules": []})

    assert [{}, {}] == [profile_from_engine(config, "e").modules for config in (without, bare)]


def test_attention_output_of_an_engine_is_hidden_by_hidden() -> None:
    """createLoraModules takes attn_dense to be hidden x hidden, whatever the heads are."""
    wide = with_changes(ENGINE, "pretrained_config.head_size", 256)
    profile = profile_from_engine(wide, "e")

    assert (4096, 8192) == (profile.modules["attn_dense"].in_features, profile.modules["attn_q"].out_features)


@pytest.mark.parametrize(
    ("path", "value", "message"),
    [
        ("pretrained_config.dtype", "float8", r"pretrained_config.dtype is 'float8'"),
        ("pretrained_config.hidden_size", "4096", r"'hidden_size' is '4096', expected a positive integer"),
        ("pretrained_config.mapping", [], r"pretrained_config.mapping is \[\], expected an object"),
        ("build_config.lora_config.lora_target_modules", ["attn_z"], r"unknown LoRA module 'attn_z'"),
        ("build_config.lora_config.lora_target_modules", [["attn_q"], {}], r"(?s)module \['attn_q'\].*module {}"),
        ("build_config.lora_config.lora_target_modules", [], r"has the LoRA plugin but .*--lora_target_modules"),
        ("build_config.lora_config.max_lora_rank", 0, r"'max_lora_rank' is 0, expected a positive integer"),
        ("pretrained_config.moe", {"num_experts": "8"}, r"'num_experts' is '8', expected a positive integer"),
        ("build_config", None, r"unknown layout \(version '0.18.0'\)"),
    ],
)
def test_broken_engine_config_is_refused(path: str, value: object, message: str) -> None:
    """Each field that is read is checked, and named."""
    with pytest.raises(EngineMismatch, match=message):
        profile_from_engine(with_changes(ENGINE, path, value), "e")


def test_load_profile_tells_an_engine_from_a_model(tmp_path: Path) -> None:
    """A directory or a config.json, of either kind; an encoder-decoder engine stands for its decoder."""
    (tmp_path / "hf").mkdir()
    (tmp_path / "engine" / "decoder").mkdir(parents=True)
    (tmp_path / "hf" / "config.json").write_text(json.dumps(LLAMA_8B))
    (tmp_path / "engine" / "decoder" / "config.json").write_text(json.dumps(ENGINE))

    assert load_profile(tmp_path / "hf" / "config.json").max_lora_rank is None
    assert "float16" == load_profile(tmp_path / "hf", dtype="float16").dtype
    assert "bfloat16" == load_profile(tmp_path / "engine", dtype="float16").dtype
    assert 32 == load_profile(tmp_path / "engine").max_lora_rank


@pytest.mark.parametrize(
    ("text", "message"),
    [("{", "is not JSON"), ("[]", "is not a JSON object"), ("[" * 100_000, "is not JSON"), (None, "no config.json")],
)
def test_unreadable_config_is_refused(text: str | None, message: str, tmp_path: Path) -> None:
    """Whatever stands there, the error is a named one."""
    if text is not None:
        (tmp_path / "config.json").write_text(text)

    with pytest.raises(EngineMismatch, match=message):
        load_profile(tmp_path)


def test_reading_a_profile_does_not_import_torch() -> None:
    """The command line reads profiles in commands that must answer at once."""
    modules = (
        "tritonlora.engine.profile, tritonlora.conversion.layout, tritonlora.repository.add, tritonlora.check.checks"
    )
    code = f"import sys, {modules}; sys.exit('torch' in sys.modules)"

    assert 0 == subprocess.run([sys.executable, "-c", code], check=False).returncode
