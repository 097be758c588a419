# SPDX-FileCopyrightText: the tritonlora authors
# SPDX-License-Identifier: Apache-2.0
"""Which kind of target a model is, read off its inputs."""

from __future__ import annotations

import pytest

from repositories import LLM_API
from tritonlora.pbtxt.model_config import parse_config
from tritonlora.repository.model_configs import router_config
from tritonlora.serving.wire import wire_of
from tritonlora.targets import engine_model, llm_api, target_of
from upstream_configs import VERSIONS, fill, upstream


@pytest.mark.parametrize("version", VERSIONS)
@pytest.mark.parametrize("model", ["tensorrt_llm", "tensorrt_llm_bls"])
def test_upstream_s_engine_models_take_tensors(version: str, model: str) -> None:
    """All that v0.10 to v0.18 ship."""
    config = parse_config(upstream(version, model))

    assert engine_model is target_of(config)
    assert [] == engine_model.WIRE.missing([spec.name for spec in config.inputs]) or model == "tensorrt_llm_bls"


def test_the_llm_api_s_model_takes_a_path() -> None:
    """With all that adapters need."""
    config = parse_config((LLM_API / "config.pbtxt").read_text())

    assert llm_api is target_of(config)
    assert [] == llm_api.WIRE.missing([spec.name for spec in config.inputs])


def test_the_llm_api_s_model_from_before_lora_is_still_one() -> None:
    """So that what it lacks is named, and not what the other kind has."""
    inputs = ["text_input", "streaming", "sampling_param_max_tokens", "stop"]

    assert llm_api.WIRE is wire_of(inputs)
    assert ["lora_id", "lora_name", "lora_path"] == llm_api.WIRE.missing(inputs)


def test_a_router_is_of_the_kind_of_its_target() -> None:
    """The router's model finds the kind by the inputs that it declares itself."""
    tensors = parse_config(fill(upstream("v0.18.0", "tensorrt_llm")))
    path = parse_config((LLM_API / "config.pbtxt").read_text())

    assert [engine_model, llm_api] == [target_of(parse_config(router_config(one))) for one in (tensors, path)]
