# SPDX-FileCopyrightText: the tritonlora authors
# SPDX-License-Identifier: Apache-2.0
"""What an error of the engine's model means for the LoRA cache, and which part of its text a client may see."""

from __future__ import annotations

import enum
import re


class Meaning(enum.Enum):
    """What a response of the engine says about its LoRA cache."""

    ANSWER = enum.auto()  # no error
    MISS = enum.auto()  # the adapter is not cached: send its weights
    FULL = enum.auto()  # every cached adapter is in use: wait until one is not
    ERROR = enum.auto()  # any other error, which the client gets


# Substrings of error texts, because prefixes and suffixes differ between versions and backends. The first substring
# that is found counts. Sources: TensorRT-LLM batch_manager/peftCacheManager.cpp, runtime/loraCache.cpp.
# The first three are GPU errors, which end all running requests; their texts may quote the other substrings.
# TensorRT-LLM sends the last one when it could evict some adapters, but not enough of them.
_MEANINGS = {
    "forwardAsync": Meaning.ERROR,
    "copyTask": Meaning.ERROR,
    "storing peft weights": Meaning.ERROR,
    "not found in cache. Please send LoRA weights with request": Meaning.MISS,
    "There are no done tasks to evict": Meaning.FULL,
    "pageIds.has_value()": Meaning.FULL,
}


def meaning_of(error: str | None) -> Meaning:
    """What a response with this error text (None: no error) means."""
    if error is None:
        return Meaning.ANSWER
    return next((meaning for text, meaning in _MEANINGS.items() if text in error), Meaning.ERROR)


# What a client can do about an error of its request. The engine's own texts speak to whoever sends weights.
_ADVICE = {
    Meaning.MISS: "the engine lost the adapter for a moment; ask again",
    Meaning.FULL: "the engine's cache is full of adapters in use; ask again",
}


def advice_on(error: str) -> str | None:
    """What an error of the engine means for a client that sends a name, and what to do; None for any other error."""
    return _ADVICE.get(meaning_of(error))


# Substrings of Triton's errors for a model that is not ready. Triton's code for these errors is INTERNAL.
# Sources: Triton core src/model_repository_manager, python_backend src/python_be.cc.
_NOT_NOW = (
    "is not ready",
    "is not found",
    "has no available versions",
    "is not healthy",
    "is unhealthy",
    "shutting down",
)


def is_unavailable(error: str) -> bool:
    """Whether the engine's model is not ready now, but may be ready later."""
    return any(text in error for text in _NOT_NOW)


_BACKTRACE = re.compile(r"\s*\n\s*\d+\s+0x[0-9a-f]+.*", re.DOTALL)
_SOURCE_LOCATION = re.compile(r"\s*\((?:/[^\s():]+)+:\d+\)")
_PATH = re.compile(r"(?<![\w:/])(?:/[\w.+@-]+){2,}")


def public(message: str) -> str:
    """An engine's error text without backtraces and paths of the server, which clients must not see."""
    for pattern, replacement in ((_BACKTRACE, ""), (_SOURCE_LOCATION, ""), (_PATH, "<path>")):
        message = pattern.sub(replacement, message)
    return message
