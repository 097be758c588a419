# SPDX-FileCopyrightText: the tritonlora authors
# SPDX-License-Identifier: Apache-2.0
"""The config.json of a TensorRT-LLM engine."""

from __future__ import annotations

from typing import Any

# As trtllm-build writes it, with the fields that LoRA has nothing to do with left out.
ENGINE: dict[str, Any] = {
    "version": "0.18.0",
    "pretrained_config": {
        "architecture": "LlamaForCausalLM",
        "dtype": "bfloat16",
        "num_hidden_layers": 32,
        "num_attention_heads": 32,
        "hidden_size": 4096,
        "intermediate_size": 14336,
        "num_key_value_heads": 8,
        "head_size": 128,
        "mapping": {"world_size": 2, "gpus_per_node": 8, "cp_size": 1, "tp_size": 2, "pp_size": 1},
        "quantization": {"quant_algo": None},
    },
    "build_config": {
        "max_beam_width": 3,
        "lora_config": {
            "lora_dir": [],
            "lora_ckpt_source": "hf",
            "max_lora_rank": 32,
            "lora_target_modules": ["attn_q", "attn_v", "attn_dense"],
            "trtllm_modules_to_hf_modules": {},
        },
        "plugin_config": {"dtype": "bfloat16", "lora_plugin": "bfloat16"},
    },
}
