# SPDX-FileCopyrightText: the tritonlora authors
# SPDX-License-Identifier: Apache-2.0
"""Adapter entries and a table of them, for tests."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from tritonlora.repository.warmup import WarmupSample
from tritonlora.serving.adapter_table import AdapterEntry, AdapterTable, with_adapter
from tritonlora.targets import engine_model


def entry(task_id: int = 1, **changes: Any) -> AdapterEntry:
    """A sound entry."""
    sound = AdapterEntry(
        lora_task_id=task_id,
        lora_weights_file=f"tensorrt_llm/warmup/adapter_model_{task_id}.bin",
        lora_config_file=f"tensorrt_llm/warmup/adapter_config_{task_id}.bin",
        dtype="bfloat16",
        lora_weights_shape=(6, 56),
        lora_config_shape=(6, 3),
        lora_weights_sha256="a" * 64,
        lora_config_sha256="b" * 64,
        adapter_sizes=(2, 8),
        modules=("attn_q", "attn_v"),
        base_model_name_or_path="base",
        warm=True,
        added_at="2026-11-22T13:00:00+00:00",
        pages=1,
    )
    return replace(sound, **changes)


def sample(
    task_id: int, weights_shape: tuple[int, int], config_shape: tuple[int, int], dtype: str = "bfloat16"
) -> WarmupSample:
    """The warmup sample of an adapter with such tensors."""
    shapes = {"lora_weights_shape": weights_shape, "lora_config_shape": config_shape, "dtype": dtype}
    return WarmupSample(task_id, engine_model.sample_inputs(entry(task_id, **shapes)))


TABLE = with_adapter(with_adapter(AdapterTable(), "pirate", entry(1)), "haiku", entry(2, warm=False, pages=None))
