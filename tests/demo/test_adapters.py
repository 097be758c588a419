# SPDX-FileCopyrightText: the tritonlora authors
# SPDX-License-Identifier: Apache-2.0
"""The committed adapters are what the demo promises to show."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from peft import LoraConfig, PeftConfig
from safetensors import safe_open
from safetensors.torch import load_file

from tritonlora.demo.questions import QUESTIONS

DEMO = Path(__file__).parents[2] / "plugin" / "tritonlora" / "demo"
NAMES = ("pirate", "json", "bard")
SEVEN_LINEAR_LAYERS = {"q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"}
SMOLLM2_135M_DIMS = {  # (in, out) of each linear layer
    "q_proj": (576, 576),
    "k_proj": (576, 192),
    "v_proj": (576, 192),
    "o_proj": (576, 576),
    "gate_proj": (576, 1536),
    "up_proj": (576, 1536),
    "down_proj": (1536, 576),
}
LAYERS = 30


def config_of(name: str) -> LoraConfig:
    config = PeftConfig.from_pretrained(str(DEMO / "adapters" / name))
    assert isinstance(config, LoraConfig)
    return config


def test_the_adapters_are_there() -> None:
    """Three adapters, each as PEFT writes it and nothing beside."""
    found = {path.relative_to(DEMO / "adapters").as_posix() for path in (DEMO / "adapters").glob("**/*.*")}

    assert {
        f"{name}/{file}" for name in NAMES for file in ("adapter_config.json", "adapter_model.safetensors")
    } == found


def test_all_together_stay_small() -> None:
    """A clone carries under 2 MB of adapters."""
    assert 2_000_000 > sum(path.stat().st_size for path in (DEMO / "adapters").glob("**/*.*"))


@pytest.mark.parametrize("name", NAMES)
def test_weights_are_those_of_the_config_in_bfloat16(name: str) -> None:
    """Every layer has A (r, in) and B (out, r) for each target module, bfloat16, and neither is all zero."""
    config = config_of(name)
    expected = {}
    for layer in range(LAYERS):
        for module in config.target_modules or ():
            part = "self_attn" if module in {"q_proj", "k_proj", "v_proj", "o_proj"} else "mlp"
            key = f"base_model.model.model.layers.{layer}.{part}.{module}"
            in_features, out_features = SMOLLM2_135M_DIMS[module]
            expected[f"{key}.lora_A.weight"] = ("BF16", [config.r, in_features])
            expected[f"{key}.lora_B.weight"] = ("BF16", [out_features, config.r])
    file = DEMO / "adapters" / name / "adapter_model.safetensors"
    with safe_open(file, framework="pt") as tensors:
        found = {key: tensors.get_slice(key) for key in tensors.keys()}  # noqa: SIM118  it is not a dict
        shapes = {key: (piece.get_dtype(), piece.get_shape()) for key, piece in found.items()}

    assert expected == shapes
    assert [] == [key for key, tensor in load_file(file).items() if not tensor.any()]


def test_the_adapters_differ_in_what_conversion_must_carry() -> None:
    """Three ranks; one with all seven linear layers, one with other modules only, one with rank-stabilised scaling."""
    configs = {name: config_of(name) for name in NAMES}

    assert {"pirate": 4, "json": 1, "bard": 8} == {name: config.r for name, config in configs.items()}
    assert ["json"] == [name for name in NAMES if set(configs[name].target_modules or ()) == SEVEN_LINEAR_LAYERS]
    assert ["bard"] == [name for name in NAMES if configs[name].use_rslora]
    assert 3 == len({frozenset(config.target_modules or ()) for config in configs.values()})


@pytest.mark.parametrize("name", NAMES)
def test_no_path_of_the_machine_that_trained_it(name: str) -> None:
    """The base model is named by its public name, and no value of the config is a path."""
    text = (DEMO / "adapters" / name / "adapter_config.json").read_text(encoding="utf-8")

    assert "HuggingFaceTB/SmolLM2-135M-Instruct" == json.loads(text)["base_model_name_or_path"]
    assert '"/' not in text
    assert "\\\\" not in text


def test_no_question_of_the_demo_was_trained_on() -> None:
    """What the demo asks shows what an adapter learned, not what it was told; each trained question is one too."""
    pairs = json.loads((DEMO / "pairs.json").read_text(encoding="utf-8"))
    trained = {question for of_one_adapter in pairs.values() for question, _ in of_one_adapter}

    assert set() == trained & set(QUESTIONS)
    assert set(NAMES) == pairs.keys()
    assert {14} == {len({question for question, _ in of_one_adapter}) for of_one_adapter in pairs.values()}
