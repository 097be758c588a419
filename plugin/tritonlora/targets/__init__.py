# SPDX-FileCopyrightText: the tritonlora authors
# SPDX-License-Identifier: Apache-2.0
"""The two kinds of target: a target is the engine's model, with which adapters are served.

All differences between the two kinds are in this package and in `serving.wire`. `target_of` tells the kind of a model
by its declared inputs. Code outside of this package does not ask which kind a target is.
"""

from __future__ import annotations

from tritonlora.pbtxt.model_config import ModelConfig
from tritonlora.serving.wire import wire_of
from tritonlora.targets import engine_model, llm_api
from tritonlora.targets.protocol import (
    AdapterPlaces,
    KeptAdapters,
    SampleInput,
    SharedInput,
    Target,
    string_bytes,
    task_id_bytes,
    task_id_file,
)

__all__ = [
    "TARGETS",
    "AdapterPlaces",
    "KeptAdapters",
    "SampleInput",
    "SharedInput",
    "Target",
    "string_bytes",
    "target_of",
    "task_id_bytes",
    "task_id_file",
]

TARGETS: tuple[Target, ...] = (engine_model, llm_api)


def target_of(config: ModelConfig) -> Target:
    """The kind of a target, from its config or from that of the router in front of it."""
    wire = wire_of([spec.name for spec in config.inputs])
    return next(target for target in TARGETS if target.WIRE is wire)
