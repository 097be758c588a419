# SPDX-FileCopyrightText: the tritonlora authors
# SPDX-License-Identifier: Apache-2.0
"""Messages of the server, as errors for clients."""

from __future__ import annotations

import re

import pytest

from tritonlora.openai.api_error import error_of_server

MISS = "LoRA task 3 not found in cache. Please send LoRA weights with request"


@pytest.mark.parametrize(
    ("message", "status", "told"),
    [
        ("in ensemble 'lora_tokens', unknown LoRA adapter 'x'; available: a, b", 404, "available: base, a, b"),
        ("Prompt length (600) exceeds maximum input length (511).", 400, "600"),
        ("inputs that the CPU engine does not implement: 'embedding_bias'", 400, "embedding_bias"),
        (
            "in ensemble 'x', 9 requests wait for LoRA adapters to be loaded; ask again",
            503,
            "9 requests wait",
        ),
        (MISS, 503, "the engine lost the adapter for a moment; ask again"),
        (f"in ensemble 'ensemble', {MISS}", 503, "the engine lost the adapter for a moment; ask again"),
        ("Cache is full. There are no done tasks to evict", 503, "the engine's cache is full of adapters in use; ask"),
        ("Assertion failed: pageIds.has_value() (/src/y.cpp:9)", 503, "the engine's cache is full of adapters in use"),
        (f"Encountered an error in forwardAsync function: {MISS}", 500, "the log of tritonlora openai"),
        ("Request for unknown model: 'lora_tokens' is not found", 503, "unknown model"),
        ("LoRA adapter 'a': adapter_model_1.bin has 3 bytes on the server, expected 4", 503, "3 bytes"),
        ("LoRA adapter 'a': Error generating request: /secret/path", 500, "the log of tritonlora openai"),
        ("[TensorRT-LLM][ERROR] Assertion failed: (/src/x.cpp:5)", 500, "the log of tritonlora openai"),
    ],
)
def test_a_message_becomes_a_status_and_paths_stay_inside(message: str, status: int, told: str) -> None:
    """In OpenAI's form."""
    found = error_of_server(message, "x", "base")

    assert (status, True) == (found.status, told in str(found))
    assert {"message", "type", "param", "code"} == found.body()["error"].keys()
    assert not re.search("/s|not found in cache|send LoRA weights|done tasks", str(found))
    assert (status == 503) == ("Retry-After" in found.headers)
