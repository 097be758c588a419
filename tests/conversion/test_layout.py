# SPDX-FileCopyrightText: the tritonlora authors
# SPDX-License-Identifier: Apache-2.0
"""Which module a layer is, where its name alone does not say."""

from __future__ import annotations

from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from adapters import lora_pair, write_adapter
from tritonlora.architectures.lora_modules import BY_NAME, ModuleDims
from tritonlora.conversion.layout import plan_layout
from tritonlora.conversion.rows import RowSource
from tritonlora.engine.profile import EngineProfile
from tritonlora.errors import EngineMismatch, UnsupportedAdapter
from tritonlora.peft.adapter import load_adapter

QKV = ("attn_q", "attn_k", "attn_v")
PROFILE = EngineProfile(
    source="engine",
    architecture="LlamaForCausalLM",
    dtype="bfloat16",
    num_layers=2,
    modules={name: ModuleDims(BY_NAME[name], 32, 32) for name in (*QKV, "mlp_gate", "mlp_h_to_4h")},
    max_lora_rank=8,
)


def test_layer_that_the_engines_model_has_not_is_refused(tmp_path: Path) -> None:
    """An adapter of another architecture is told by its names, even where the dims happen to fit."""
    adapter = load_adapter(write_adapter(tmp_path, lora_pair("transformer.h.0.attn.q_proj")))

    with pytest.raises(
        EngineMismatch,
        match="q_proj: LlamaForCausalLM has no such layer that a LoRA can be sent for; .* another base model",
    ):
        plan_layout(adapter, dtype="bfloat16", profile=PROFILE)


def test_layers_without_experts_are_those_of_an_engine_that_has_lora_for_them(tmp_path: Path) -> None:
    """The first layers of GLM-4.5 have a plain MLP; what its config.json says decides nothing about the engine."""
    pairs = lora_pair("model.layers.0.self_attn.q_proj") | lora_pair("model.layers.0.mlp.up_proj")
    adapter = load_adapter(write_adapter(tmp_path, pairs))
    profile = replace(PROFILE, architecture="Glm4MoeForCausalLM")
    rows = plan_layout(adapter, dtype="bfloat16", profile=profile).rows

    assert ["attn_q", "mlp_gate"] == [row.module.name for row in rows]
    with pytest.raises(
        EngineMismatch,
        match=r": mlp_gate: not among the LoRA .*: attn_q, .*modules attn_q attn_k attn_v mlp_gate, or train with",
    ):
        plan_layout(
            adapter,
            dtype="bfloat16",
            profile=replace(profile, modules={name: profile.modules[name] for name in QKV}),
        )


@pytest.mark.parametrize(
    ("architecture", "module"),
    [("LlamaForCausalLM", "mlp_gate"), ("QWenForCausalLM", "mlp_gate"), ("NemotronForCausalLM", "mlp_h_to_4h")],
)
def test_up_proj_without_a_gate_is_what_the_architecture_says(architecture: str, module: str, tmp_path: Path) -> None:
    """Nemotron's up_proj goes through the activation, Llama's does not; the name alone decides nothing."""
    adapter = load_adapter(write_adapter(tmp_path, lora_pair("model.layers.0.mlp.up_proj")))
    profile = replace(PROFILE, architecture=architecture)

    assert [module] == [row.module.name for row in plan_layout(adapter, dtype="bfloat16", profile=profile).rows]
    for unknown in (None, replace(profile, architecture="NewForCausalLM")):
        with pytest.raises(EngineMismatch, match=r"up_proj: .* is mlp_gate or mlp_h_to_4h, by the arch.*\(--base\)"):
            plan_layout(adapter, dtype="bfloat16", profile=unknown)


@pytest.mark.parametrize(
    ("base_model_class", "path", "module"),
    [
        ("LlamaForCausalLM", "model.layers.0.mlp.up_proj", "mlp_gate"),
        ("NemotronForCausalLM", "model.layers.0.mlp.up_proj", "mlp_h_to_4h"),
        ("GPT2LMHeadModel", "transformer.h.0.mlp.c_fc", "mlp_h_to_4h"),
        ("JAISLMHeadModel", "transformer.h.0.mlp.c_fc", "mlp_gate"),
    ],
)
def test_class_that_peft_noted_says_what_the_name_does_not(
    base_model_class: str, path: str, module: str, tmp_path: Path
) -> None:
    """Without a task_type, PEFT writes the class of the base model into the adapter; an engine's word goes before."""
    noted = {"base_model_class": base_model_class, "parent_library": "transformers.models"}
    adapter = load_adapter(write_adapter(tmp_path, lora_pair(path), auto_mapping=noted))
    engine = replace(PROFILE, architecture="LlamaForCausalLM" if "model" in path else "")

    assert [module] == [row.module.name for row in plan_layout(adapter, dtype="bfloat16").rows]
    expected = "mlp_gate" if engine.architecture else module
    assert [expected] == [row.module.name for row in plan_layout(adapter, dtype="bfloat16", profile=engine).rows]


@pytest.mark.parametrize("engine", [None, replace(PROFILE, architecture="DeepseekV2ForCausalLM")])
def test_models_with_layers_of_these_names_that_are_something_else_are_refused(
    engine: EngineProfile | None, tmp_path: Path
) -> None:
    """By their class, as PEFT or the engine says it: in what is usually adapted, the names say nothing."""
    noted = {"base_model_class": "Qwen3_5ForCausalLM"} if engine is None else None
    adapter = load_adapter(write_adapter(tmp_path, lora_pair("model.layers.0.self_attn.q_proj"), auto_mapping=noted))
    message = (
        "DeepseekV2ForCausalLM: its attention is latent" if engine else "Qwen3_5ForCausalLM: its q_proj has a gate"
    )

    with pytest.raises(UnsupportedAdapter, match=f"{message}.*; merge the adapter into the base model"):
        plan_layout(adapter, dtype="bfloat16", profile=engine)


@pytest.mark.parametrize(
    ("name", "is_refused"),
    [
        ("Qwen/Qwen3.5-9B", True),
        ("unsloth/Qwen3-Next-80B-A3B-Instruct-bnb-4bit", True),
        ("/models/DeepSeek-V2-Lite/", True),
        ("google/gemma-4-e2b-it", True),
        ("gemma-4-e2b-it", True),
        ("stepfun-ai/Step-3.7-Flash", True),
        ("stepfun-ai/Step-3.5-Flash", True),
        ("poolside/laguna-XS.2", True),
        ("openbmb/MiniCPM-V-4.6", True),
        ("google/t5gemma-2-270m-270m", True),
        ("google/t5gemma-2b-2b-prefixlm-it", False),
        ("google/medgemma-4b-it", False),
        ("google/gemma-3-4b-it", False),
        ("openbmb/MiniCPM-V-2_6", False),
        ("Qwen/Qwen3-0.6B", False),
        ("Qwen/Qwen2.5-3B", False),
        ("deepseek-ai/DeepSeek-R1-Distill-Qwen-7B", False),
        (None, False),
    ],
)
def test_a_base_model_that_is_one_of_these_by_its_name_is_refused(
    name: str | None, is_refused: bool, tmp_path: Path
) -> None:
    """Where no engine and no class says what it is; --base does, whatever it is called."""
    pair = lora_pair("model.layers.0.self_attn.q_proj")
    adapter = load_adapter(write_adapter(tmp_path, pair, base_model_name_or_path=name))

    with pytest.raises(UnsupportedAdapter, match=r"by name: its .*\(--base\)") if is_refused else nullcontext():
        plan_layout(adapter, dtype="bfloat16")
    plan_layout(adapter, dtype="bfloat16", profile=PROFILE)
    plan_layout(adapter, dtype="bfloat16", engine_reads=True)


@pytest.mark.parametrize(
    ("one", "other", "message"),
    [
        ("self_attn.q_proj", "self_attn.o_proj", "attn_q has 64 outputs, and attn_dense 32 inputs"),
        ("self_attn.k_proj", "self_attn.v_proj", "attn_k has 64 outputs, and attn_v 32 outputs"),
        ("mlp.gate_proj", "mlp.down_proj", "mlp_h_to_4h has 64 outputs, and mlp_4h_to_h 32 inputs"),
    ],
)
def test_layers_of_one_that_do_not_fit_each_other_are_refused(
    one: str, other: str, message: str, tmp_path: Path
) -> None:
    """A gate beside the queries, latent attention: such a layer is not what its name says, and no engine is known."""
    path = "model.layers.{}.{}"
    pairs = lora_pair(path.format(0, one), out_features=64) | lora_pair(path.format(0, other))
    adapter = load_adapter(write_adapter(tmp_path, pairs | lora_pair(path.format(1, other))))

    plan_layout(adapter, dtype="bfloat16", engine_reads=True)
    with pytest.raises(EngineMismatch, match=rf"{message}, and these are equal .*\(--base\).* \(layer 0\)"):
        plan_layout(adapter, dtype="bfloat16")


@pytest.mark.parametrize("note", [None, "x", {}, {"base_model_class": 3}, {"base_model_class": "NewForCausalLM"}])
def test_class_that_says_nothing_decides_nothing(note: object, tmp_path: Path) -> None:
    """Whatever stands there, an ambiguous layer stays one."""
    adapter = load_adapter(write_adapter(tmp_path, lora_pair("transformer.h.0.mlp.c_fc"), auto_mapping=note))

    with pytest.raises(EngineMismatch, match=r"c_fc: a layer of this name is mlp_gate or mlp_h_to_4h, .*\(--base\)"):
        plan_layout(adapter, dtype="bfloat16")


def test_gate_proj_says_that_up_proj_is_gated(tmp_path: Path) -> None:
    """An adapter of all linear layers needs no base model to be told apart."""
    pairs = lora_pair("model.layers.0.mlp.gate_proj") | lora_pair("model.layers.1.mlp.up_proj")
    rows = plan_layout(load_adapter(write_adapter(tmp_path, pairs)), dtype="bfloat16").rows

    assert ["mlp_h_to_4h", "mlp_gate"] == [row.module.name for row in rows]


@pytest.mark.parametrize(
    ("fan_in_fan_out", "kv_heads", "is_told"), [(True, 4, True), (False, 4, False), (True, 1, True), (False, 1, True)]
)
def test_c_attn_of_an_engine_for_several_architectures_is_told_apart_or_refused(
    fan_in_fan_out: bool, kv_heads: int, is_told: bool, tmp_path: Path
) -> None:
    """GPT-2 has q, k and v in turn and GPTBigCode by head; TensorRT-LLM's GPTForCausalLM can be both."""
    pair = lora_pair("transformer.h.0.attn.c_attn", out_features=(4 + 2 * kv_heads) * 8)
    adapter = load_adapter(write_adapter(tmp_path, pair, fan_in_fan_out=fan_in_fan_out))
    modules = {name: ModuleDims(BY_NAME[name], 32, 32 if name == "attn_q" else kv_heads * 8) for name in QKV}
    profile = replace(
        PROFILE, architecture="GPTForCausalLM", modules=modules, num_heads=4, num_kv_heads=kv_heads, head_size=8
    )
    if is_told:
        sources = plan_layout(adapter, dtype="bfloat16", profile=profile).sources

        assert [(1, 0), (1, 32), (1, 32 + kv_heads * 8)] == [
            (piece.groups, piece.start)
            for source in sources
            if isinstance(source, RowSource)
            for piece in source.pieces
        ]
    else:
        with pytest.raises(EngineMismatch, match="c_attn: .* its outputs in one order or another, by the architecture"):
            plan_layout(adapter, dtype="bfloat16", profile=profile)


def test_an_engine_without_lora_is_one_line(tmp_path: Path) -> None:
    """Not one for each module and layer. The remedy is what makes an engine with LoRA, or a model.yaml."""
    pairs = lora_pair("model.layers.0.self_attn.q_proj") | lora_pair("model.layers.1.mlp.up_proj")
    adapter = load_adapter(write_adapter(tmp_path, pairs))
    for engine_reads, remedy in (
        (False, r"trtllm-build --lora_plugin auto --lora_target_modules"),
        (True, "model.yaml"),
    ):
        with pytest.raises(EngineMismatch, match=f"^'engine': the engine has no LoRA: it would .*{remedy}") as caught:
            plan_layout(adapter, dtype="float32", profile=replace(PROFILE, modules={}), engine_reads=engine_reads)

        assert 1 == len(str(caught.value).splitlines())


def test_one_reason_is_one_line_for_all_modules(tmp_path: Path) -> None:
    """A rank that is too large for all of them, and a base model that has none of them."""
    pairs: dict[str, torch.Tensor] = {}
    for layer in (0, 1):
        for leaf in ("q_proj", "k_proj", "v_proj"):
            pairs |= lora_pair(f"model.layers.{layer}.self_attn.{leaf}", r=16)
    adapter = load_adapter(write_adapter(tmp_path, pairs, r=16))
    with pytest.raises(
        EngineMismatch, match=r"': attn_\w, .*: rank 16 is .* raise that to 16 .* \(layers 0, 1\)$"
    ) as caught:
        plan_layout(adapter, dtype="bfloat16", profile=PROFILE)

    assert 1 == len(str(caught.value).splitlines())


def test_a_base_model_is_not_called_an_engine(tmp_path: Path) -> None:
    """`convert --base` knows no engine that could be built in another way."""
    adapter = load_adapter(write_adapter(tmp_path, lora_pair("model.layers.7.self_attn.q_proj", out_features=8)))
    with pytest.raises(EngineMismatch) as caught:
        plan_layout(adapter, dtype="bfloat16", profile=replace(PROFILE, source="base", max_lora_rank=None))

    assert "32 -> 32 in the base model" in str(caught.value)
    assert "attn_q: the base model has 2 layers, and not this one (layer 7)" in str(caught.value)
    assert "engine" not in str(caught.value)
