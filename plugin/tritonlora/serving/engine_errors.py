# SPDX-FileCopyrightText: the tritonlora authors
# SPDX-License-Identifier: Apache-2.0
"""What an error of the engine's model means, and what of it a client may see."""

from __future__ import annotations

import enum
import re


class Meaning(enum.Enum):
    """What an answer of the engine says about its LoRA cache."""

    ANSWER = enum.auto()
    MISS = enum.auto()  # the adapter is not cached: send its weights
    FULL = enum.auto()  # every cached adapter is in use: wait until one is not
    ERROR = enum.auto()  # anything else: the client's to see


# Substrings, because prefixes and suffixes differ between versions and backends. The first one that is found counts.
# Sources: TensorRT-LLM batch_manager/peftCacheManager.cpp, runtime/loraCache.cpp. The first three are trouble with
# the GPU, which ends all running requests; their errors may quote the other texts. The last text is upstream's when
# some adapters could be evicted, but not enough.
_MEANINGS = {
    "forwardAsync": Meaning.ERROR,
    "copyTask": Meaning.ERROR,
    "storing peft weights": Meaning.ERROR,
    "not found in cache. Please send LoRA weights with request": Meaning.MISS,
    "There are no done tasks to evict": Meaning.FULL,
    "pageIds.has_value()": Meaning.FULL,
}


def meaning_of(error: str | None) -> Meaning:
    """What an answer with this error text (None: no error) means."""
    if error is None:
        return Meaning.ANSWER
    return next((meaning for text, meaning in _MEANINGS.items() if text in error), Meaning.ERROR)


# What Triton says of a model that it cannot ask now; the code of these is INTERNAL.
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
    """Whether the engine's model is not there now, but may be again."""
    return any(text in error for text in _NOT_NOW)


_BACKTRACE = re.compile(r"\s*\n\s*\d+\s+0x[0-9a-f]+.*", re.DOTALL)
_SOURCE_LOCATION = re.compile(r"\s*\((?:/[^\s():]+)+:\d+\)")
_PATH = re.compile(r"(?<![\w:/])(?:/[\w.+@-]+){2,}")


def public(message: str) -> str:
    """An engine's error text without what is the server's own business: backtraces and paths."""
    for pattern, replacement in ((_BACKTRACE, ""), (_SOURCE_LOCATION, ""), (_PATH, "<path>")):
        message = pattern.sub(replacement, message)
    return message
