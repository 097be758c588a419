# SPDX-FileCopyrightText: the tritonlora authors
# SPDX-License-Identifier: Apache-2.0
"""What an engine accepts: dims, dtype, target modules, max rank, parallelism."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from tritonlora.modules import ModuleDims


@dataclass(frozen=True, slots=True)
class EngineProfile:
    """The facts about one engine that LoRA conversion, cache planning and the CPU engine need."""

    source: str  # what this was read from, for messages
    architecture: str  # "LlamaForCausalLM"
    dtype: str  # "bfloat16", "float16" or "float32": what lora_weights must be
    num_layers: int
    modules: Mapping[str, ModuleDims]  # module name -> full dims, only those the engine has LoRA for; empty: no LoRA
    max_lora_rank: int
    tp_size: int = 1
    pp_size: int = 1
    max_beam_width: int = 1
