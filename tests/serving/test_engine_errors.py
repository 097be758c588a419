# SPDX-FileCopyrightText: the tritonlora authors
# SPDX-License-Identifier: Apache-2.0
"""engine_errors.py: what an error of the engine means, and what clients see of it."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from tritonlora.serving.engine_errors import Meaning, is_unavailable, meaning_of, public

MISS = "LoRA task 1 not found in cache. Please send LoRA weights with request"
FULL = "Error storing task=4 in PEFT cache -- Cache is full. There are no done tasks to evict"


@pytest.mark.parametrize(
    ("error", "meaning"),
    [
        (None, Meaning.ANSWER),
        (MISS, Meaning.MISS),
        (f"Executor failed process requestId 1 due to the following error: {MISS}", Meaning.MISS),
        (f"Cannot process new request: [TensorRT-LLM][ERROR] Assertion failed: {MISS} (/a/b.cpp:1)", Meaning.MISS),
        (f"Encountered an error when fetching new request: {FULL}", Meaning.FULL),
        ("Error storing task=5 in PEFT cache -- Assertion failed: pageIds.has_value() (/x/y.cpp:9)", Meaning.FULL),
        ("Assertion failed: lora module attn_q not enabled for this model", Meaning.ERROR),
        ("", Meaning.ERROR),
    ],
)
def test_an_engine_error_is_understood_whatever_surrounds_it(error: str | None, meaning: Meaning) -> None:
    """Prefixes and suffixes differ between versions and backends."""
    assert meaning is meaning_of(error)


FETCHING = "Encountered an error when fetching new request: "
ASYNC = "Encountered an error in forwardAsync function: "
COPY = "Caught exception during copyTask ensure batch -- "
THROWN = " (/src/cpp/tensorrt_llm/batch_manager/peftCacheManager.cpp:432)\n1       0x7f tensorrt_llm::common::throw"
GOLDEN = json.loads((Path(__file__).parents[1] / "support" / "golden" / "lora_cache.json").read_text())
REFUSED = sorted({case[-1] for case in GOLDEN["validation"] if case[-1]})
# The texts are those of TensorRT-LLM's executed code.
ENGINE_TEXTS = [
    (MISS, Meaning.MISS),
    (FETCHING + FULL, Meaning.FULL),
    (f"{FETCHING}Error storing task=3 in PEFT cache -- {FULL}{THROWN}", Meaning.FULL),
    (f"{FETCHING}Error storing task=3 in PEFT cache -- Assertion failed: pageIds.has_value(){THROWN}", Meaning.FULL),
    (f"{ASYNC}slice 128 exceeds buffer size 64", Meaning.ERROR),
    (f"{ASYNC}{COPY}can't move a processing task taskId=3", Meaning.ERROR),
    (f"{ASYNC}{COPY}Couldn't claim pages during copyTask -- {FULL}", Meaning.ERROR),
    (f"{COPY}Couldn't claim pages during copyTask -- Assertion failed: pageIds.has_value()", Meaning.ERROR),
    (f"{ASYNC}Caught Exception while storing peft weights -- {FULL}", Meaning.ERROR),
    (f"{ASYNC}any other text -- {FULL}", Meaning.ERROR),
    ("Not enough space allocated to device LoRA cache to hold 1 max sized LoRA 34 < 2048", Meaning.ERROR),
    ("[TensorRT-LLM][ERROR] Assertion failed: !peftValues.empty()", Meaning.ERROR),
    *((f"{FETCHING}[TensorRT-LLM][ERROR] Assertion failed: {text}{THROWN}", Meaning.ERROR) for text in REFUSED),
]


@pytest.mark.parametrize("prefix", ["", "Executor failed process requestId 1 due to the following error: "])
@pytest.mark.parametrize(("text", "meaning"), ENGINE_TEXTS)
def test_only_a_miss_and_a_full_cache_are_more_than_an_error(prefix: str, text: str, meaning: Meaning) -> None:
    """Trouble of the device, and what validation refuses, is the client's at once."""
    assert meaning is meaning_of(prefix + text)


def test_backtraces_and_paths_stay_on_the_server() -> None:
    """What is left says what is wrong."""
    error = (
        "Executor failed process requestId 1 due to the following error: Encountered an error when fetching new "
        "request: [TensorRT-LLM][ERROR] Assertion failed: Expected lora weights to be the same data type as base model "
        "(/home/jenkins/agent/TensorRT-LLM/cpp/tensorrt_llm/runtime/loraUtils.cpp:66)\n"
        "1       0x7f2c8ab0a1c6 /opt/tritonserver/backends/tensorrtllm/libtensorrt_llm.so(+0x7cb1c6)\n"
        "2       0x7f2c8c9f9e3b tensorrt_llm::runtime::lora::loraValidateRequestTensors + 2059"
    )

    assert public(error).endswith("Expected lora weights to be the same data type as base model")
    assert public("cannot open /data/models/x.bin now") == "cannot open <path> now"
    assert public("rank 8/16 and/or https://a.b/c") == "rank 8/16 and/or https://a.b/c"


@pytest.mark.parametrize(
    ("error", "unavailable"),
    [
        ("Failed for execute the inference request. Model 'tensorrt_llm' is not ready.", True),
        ("Request for unknown model: 'tensorrt_llm' is not found", True),
        ("Stub process 'tensorrt_llm_0_0' is not healthy.", True),
        ("Server is stopping, scheduler for model has stopped accepting new inference requests: shutting down", True),
        ("lora module attn_q not enabled for this model", False),
    ],
)
def test_a_model_that_triton_cannot_ask_now_is_unavailable(error: str, unavailable: bool) -> None:
    """Triton itself says INTERNAL."""
    assert unavailable == is_unavailable(error)
