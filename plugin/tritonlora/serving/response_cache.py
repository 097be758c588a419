# SPDX-FileCopyrightText: the tritonlora authors
# SPDX-License-Identifier: Apache-2.0
"""Triton's response cache, which must be off for every model that adapters depend on."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from .errors import ModelConfigError

# Why no model that adapters depend on has a response_cache.
CACHED = (
    "Triton's response cache keeps an error as an empty success, and gives what an adapter said also when it was "
    "replaced or removed"
)


def check_config(config: Mapping[str, Any]) -> None:
    """ModelConfigError when Triton's response cache is on for one of our models; `config` is from Triton's JSON."""
    if config.get("response_cache", {}).get("enable"):
        raise ModelConfigError(f"response_cache is on in the config.pbtxt of {config['name']}; take it out: {CACHED}")
