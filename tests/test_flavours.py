# SPDX-FileCopyrightText: the tritonlora authors
# SPDX-License-Identifier: Apache-2.0
"""flavours.py: which contract a model follows is read off its inputs."""

from __future__ import annotations

import pytest

from repositories import LLM_API as STAND_IN
from tritonlora.flavours import LLM_API, TENSORS, flavour_of, flavour_of_config
from tritonlora.model_config import parse_config
from tritonlora.wiring import router_config
from upstream_configs import VERSIONS, fill, upstream


@pytest.mark.parametrize("version", VERSIONS)
@pytest.mark.parametrize("model", ["tensorrt_llm", "tensorrt_llm_bls"])
def test_upstream_s_engine_models_take_tensors(version: str, model: str) -> None:
    """All that v0.10 to v0.18 ship."""
    config = parse_config(upstream(version, model))

    assert TENSORS is flavour_of_config(config)
    assert [] == TENSORS.missing([spec.name for spec in config.inputs]) or model == "tensorrt_llm_bls"


def test_the_llm_api_s_model_takes_a_path() -> None:
    """With all that adapters need."""
    config = parse_config((STAND_IN / "config.pbtxt").read_text())

    assert LLM_API is flavour_of_config(config)
    assert [] == LLM_API.missing([spec.name for spec in config.inputs])


def test_the_llm_api_s_model_from_before_lora_is_still_one() -> None:
    """So that what it lacks is named, and not what the other flavour has."""
    inputs = ["text_input", "streaming", "sampling_param_max_tokens", "stop"]

    assert LLM_API is flavour_of(inputs)
    assert ["lora_id", "lora_name", "lora_path"] == LLM_API.missing(inputs)


def test_a_router_is_of_the_flavour_of_its_target() -> None:
    """The router's model finds its flavour by the inputs that it declares itself."""
    tensors = parse_config(fill(upstream("v0.18.0", "tensorrt_llm")))
    path = parse_config((STAND_IN / "config.pbtxt").read_text())

    assert [TENSORS, LLM_API] == [flavour_of_config(parse_config(router_config(one))) for one in (tensors, path)]
