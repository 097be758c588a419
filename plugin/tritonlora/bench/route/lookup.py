# SPDX-FileCopyrightText: the tritonlora authors
# SPDX-License-Identifier: Apache-2.0
"""The part `lookup`: finding an adapter, and reading a changed table, in this process."""

from __future__ import annotations

import time
from collections.abc import Iterator

from tritonlora.bench import scratch
from tritonlora.bench.measured import MICRO, MILLI, Part, at_most, seconds_of, series
from tritonlora.bench.route.options import Options
from tritonlora.errors import AdapterTableError
from tritonlora.files import write_text
from tritonlora.serving.adapter_table import AdapterEntry
from tritonlora.serving.adapter_table_json import render
from tritonlora.serving.routing import resolve
from tritonlora.serving.table_file import TableFile


def lookup(options: Options) -> Part:
    """Measure tables of several sizes, in turns."""
    lookups: dict[int, list[float]] = {size: [] for size in options.sizes}
    reloads: dict[int, list[float]] = {size: [] for size in options.sizes}
    with scratch.directory() as directory:
        texts = {size: render(scratch.table_of(_ENTRY, size)) for size in options.sizes}
        for size, text in texts.items():
            (directory / f"{size}.json").write_text(text)
        tables = {size: TableFile(directory / f"{size}.json", _refuse) for size in options.sizes}
        for number in range(options.rounds):
            for size, table in tables.items():
                lookups[size] += _lookup_seconds(table, size)
                changed = texts[size].replace('"pages": 200', f'"pages": {number + 1}', 1)  # of one adapter
                write_text(directory / f"{size}.json", changed)
                reloads[size].append(seconds_of(table.table))
    found = [series(f"lookup among {size:,}", "µs", values, scale=MICRO) for size, values in lookups.items()]
    read = [series(f"reload of {size:,}", "ms", values, scale=MILLI) for size, values in reloads.items()]
    return Part(
        "lookup",
        "Finding an adapter, and reading the table again",
        (*found, *read),
        (
            at_most(f"µs of a {found[-1].name}", found[-1].p50, 20),
            at_most(f"{found[-1].name} / {found[0].name}", found[-1].p50 / found[0].p50, 1.5),
            at_most(f"ms of a {read[-1].name}", read[-1].p50, 100),
        ),
    )


def _lookup_seconds(table: TableFile, size: int) -> Iterator[float]:
    """Seconds of each of many look-ups, by name and by id, spread over the table."""
    for number in range(1, size + 1, max(1, size // 500)):
        for lora_name, lora_task_id in ((f"n{number}".encode(), None), (None, number)):
            start = time.perf_counter()
            resolve(table.table(), lora_name, lora_task_id)
            yield time.perf_counter() - start


def _refuse(problem: str) -> None:
    raise AdapterTableError(problem)


_ENTRY = AdapterEntry(
    lora_task_id=1,
    lora_weights_file="tensorrt_llm/warmup/adapter_model_1.bin",
    lora_config_file="tensorrt_llm/warmup/adapter_config_1.bin",
    dtype="bfloat16",
    lora_weights_shape=(224, 589824),
    lora_config_shape=(224, 3),
    lora_weights_sha256="0" * 64,
    lora_config_sha256="0" * 64,
    adapter_sizes=(32,),
    modules=("attn_q", "attn_k", "attn_v", "attn_dense", "mlp_h_to_4h", "mlp_4h_to_h", "mlp_gate"),
    base_model_name_or_path="meta-llama/Llama-3.1-8B-Instruct",
    warm=True,
    added_at="2026-01-01T00:00:00+00:00",
    pages=200,
)
