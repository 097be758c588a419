# SPDX-FileCopyrightText: the tritonlora authors
# SPDX-License-Identifier: Apache-2.0
"""The two kinds of target, the engine's model that adapters are served with. All that differs between them is here.

A target's declared inputs say of which kind it is. Nobody outside this package asks that.
"""

from __future__ import annotations

from tritonlora.pbtxt.model_config import ModelConfig
from tritonlora.serving.wire import wire_of
from tritonlora.targets import engine_model, llm_api
from tritonlora.targets.protocol import (
    AdapterPlaces,
    KeptAdapters,
    Rows,
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
    "Rows",
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
    """The kind of target that a config.pbtxt is, or stands in front of."""
    wire = wire_of([spec.name for spec in config.inputs])
    return next(target for target in TARGETS if target.WIRE is wire)
