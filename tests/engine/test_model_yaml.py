# SPDX-FileCopyrightText: the tritonlora authors
# SPDX-License-Identifier: Apache-2.0
"""model_yaml.py: what the LLM API's model.yaml says."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from tritonlora.engine.model_yaml import LoraSettings, ModelYaml, load_model_yaml, parse_model_yaml, profile_of
from tritonlora.errors import ConfigError, EngineMismatch

PATH = Path("1/model.yaml")
LEAST = {"model": "TinyLlama/TinyLlama-1.1B-Chat-v1.0", "triton_config": {"max_batch_size": 0, "decoupled": False}}


def test_upstream_s_file_is_read_with_its_defaults() -> None:
    """A name on a hub, one GPU, no LoRA."""
    expected = ModelYaml(PATH, "TinyLlama/TinyLlama-1.1B-Chat-v1.0", 0, False, None, 1, 1, None)

    assert expected == parse_model_yaml(LEAST, PATH)
    assert profile_of(expected) is None


def test_of_an_architecture_that_is_not_known_here_nothing_is_known(tmp_path: Path) -> None:
    """As of a base model that is not on this machine: the model reads adapters by itself."""
    (tmp_path / "config.json").write_text('{"architectures": ["TomorrowsForCausalLM"], "model_type": "tomorrow"}')

    assert profile_of(parse_model_yaml({**LEAST, "model": str(tmp_path)}, PATH)) is None


@pytest.mark.parametrize("content", ["{", "[]", '{"model_type": "llama"}'])
def test_a_broken_base_model_is_an_error(tmp_path: Path, content: str) -> None:
    """Which names it."""
    (tmp_path / "config.json").write_text(content)

    with pytest.raises(EngineMismatch, match=tmp_path.name):
        profile_of(parse_model_yaml({**LEAST, "model": str(tmp_path)}, PATH))


def test_lora_settings_have_upstream_s_defaults() -> None:
    """Only what is given differs."""
    document = {**LEAST, "dtype": "float16", "lora_config": {"lora_target_modules": ["attn_q"], "max_cpu_loras": 9}}

    found = parse_model_yaml(document, PATH)

    assert (LoraSettings(("attn_q",), 64, 4, 9), "float16") == (found.lora, found.dtype)


def test_enable_lora_is_enough() -> None:
    """As for TensorRT-LLM."""
    assert LoraSettings() == parse_model_yaml({**LEAST, "enable_lora": True}, PATH).lora


@pytest.mark.parametrize(
    ("document", "message"),
    [
        (["a list"], "the file must be a mapping, got list"),
        ({"model": "x"}, "triton_config must be a mapping, got NoneType"),
        ({**LEAST, "triton_config": {}}, "triton_config.max_batch_size must be a whole number, got None"),
        ({**LEAST, "triton_config": {"decoupled": "False"}}, "triton_config.decoupled must be true or false, got 'Fal"),
        ({**LEAST, "triton_config": {"decoupled": True}}, "triton_config.max_batch_size must be a whole number, got N"),
        ({**LEAST, "lora_config": {"max_lora_rank": -1}}, "lora_config.max_lora_rank must be a whole number, got -1"),
        ({**LEAST, "lora_config": ["x"]}, "lora_config must be a mapping, got list"),
        ({**LEAST, "tensor_parallel_size": "two"}, "tensor_parallel_size must be a whole number, got 'two'"),
    ],
)
def test_what_it_cannot_mean_is_named(document: Any, message: str) -> None:
    """With the file's name."""
    with pytest.raises(ConfigError, match=message) as raised:
        parse_model_yaml(document, PATH)

    assert str(raised.value).startswith("1/model.yaml cannot be used: ") or "\n" in str(raised.value)


def test_a_file_that_is_not_yaml_or_not_there_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Under the name that upstream's environment variable gives it."""
    with pytest.raises(ConfigError, match=r"cannot read .*/1/model\.yaml, which the LLM API's model needs"):
        load_model_yaml(tmp_path)
    (tmp_path / "1").mkdir()
    (tmp_path / "1" / "other.yaml").write_text("a: [")
    monkeypatch.setenv("LLM_CONFIG_PATH", "other.yaml")

    with pytest.raises(ConfigError, match=r"cannot read .*/1/other\.yaml"):
        load_model_yaml(tmp_path)


def test_speculative_decoding_is_reported(tmp_path: Path) -> None:
    """LoRA failed with it before a release that model.yaml does not name."""
    shipped = Path(__file__).parents[2] / "model_repository" / "tensorrt_llm" / "1" / "config.json"
    (tmp_path / "config.json").write_bytes(shipped.read_bytes())
    document = {**LEAST, "model": str(tmp_path), "enable_lora": True}
    plain = profile_of(parse_model_yaml(document, PATH))
    speculative = profile_of(parse_model_yaml({**document, "speculative_config": {"decoding_type": "NGram"}}, PATH))

    assert plain is not None
    assert () == plain.reports
    assert speculative is not None
    assert ["12661" in problem for problem, _ in speculative.reports] == [True]
