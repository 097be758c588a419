# SPDX-FileCopyrightText: the tritonlora authors
# SPDX-License-Identifier: Apache-2.0
"""Refuses Triton's response cache, which must be off for every model that serves adapters."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from .errors import ModelConfigError

# Why the response cache must be off.
CACHED = (
    "Triton's response cache keeps an error as an empty success, and returns an adapter's old responses after it was "
    "replaced or removed"
)


def check_config(config: Mapping[str, Any]) -> None:
    """Raise ModelConfigError when Triton's response cache is on. `config` is a model's config, parsed from JSON."""
    if config.get("response_cache", {}).get("enable"):
        raise ModelConfigError(f"response_cache is on in the config.pbtxt of {config['name']}; take it out: {CACHED}")
