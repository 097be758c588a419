# SPDX-FileCopyrightText: the tritonlora authors
# SPDX-License-Identifier: Apache-2.0
"""The tensorrt_llm model of tensorrtllm_backend (all_models/inflight_batcher_llm, v0.9 to v1.x) as the target.

An adapter is stored as the two tensors that requests send: lora_weights and lora_config, as raw little-endian files.
"""

from __future__ import annotations

import struct
from collections.abc import Collection, Mapping
from pathlib import Path

from tritonlora.architectures.lora_modules import BY_ID
from tritonlora.conversion.coverage import is_zero, zero_remarks
from tritonlora.conversion.rows import Layout
from tritonlora.conversion.stored_rows import StoredRows, rebuild_adapter
from tritonlora.engine.cpu_engine_settings import is_cpu_engine, parse_settings, read_profile
from tritonlora.engine.lora_cache import Rows
from tritonlora.engine.profile import EngineProfile, load_profile
from tritonlora.errors import EngineMismatch, RepositoryError
from tritonlora.pbtxt.model_config import ModelConfig, has_template
from tritonlora.pbtxt.text_format import Document
from tritonlora.peft.adapter import Adapter
from tritonlora.serving.adapter_table import AdapterEntry
from tritonlora.serving.dtypes import DTYPES
from tritonlora.serving.file_version import open_file, read_file
from tritonlora.serving.wire import ENGINE_MODEL
from tritonlora.targets.declarations import declare_lora_weights
from tritonlora.targets.protocol import (
    AdapterPlaces,
    KeptAdapters,
    SampleInput,
    SharedInput,
    task_id_bytes,
    task_id_file,
)

WIRE = ENGINE_MODEL
ORIGIN = (
    "adapters by task id need the model tensorrt_llm of all_models/inflight_batcher_llm, from v0.9.0 to v1.x (in "
    "tensorrtllm_backend, from v0.19 on in TensorRT-LLM's triton_backend); take its config.pbtxt from there"
)
ENABLE_LORA = "build it with trtllm-build --lora_plugin auto --lora_target_modules …"
PLACES = AdapterPlaces("adapter_model_{id}.bin", "adapter_config_{id}.bin", None)
SHARED_INPUTS: Mapping[str, SharedInput] = {
    # The token ids are in every vocabulary. end_id hardly matters, because the output is one token.
    "input_ids": SharedInput("input_ids", (1, 2, 3, 4)),
    "input_lengths": SharedInput("input_lengths", (4,)),
    "end_id": SharedInput("end_id", (0,)),
    "request_output_len": SharedInput("output_lengths", (1,)),
    "beam_width": SharedInput("beam_width", (1,)),
}
ASSUMED_DTYPE: str | None = None
ENSEMBLE_INPUTS: Mapping[str, str] | None = None
COMPLETES_CONFIGS = False
SERVER_FOR_EACH_PROCESS = True


def sample_inputs(entry: AdapterEntry) -> tuple[SampleInput, ...]:
    """The inputs lora_task_id, lora_weights and lora_config of the adapter's warmup sample."""
    task_id, data_type = entry.lora_task_id, DTYPES[entry.dtype].triton
    return (
        SampleInput("lora_task_id", "TYPE_UINT64", (1,), task_id_file(task_id)),
        SampleInput("lora_weights", data_type, entry.lora_weights_shape, _name_of(entry.lora_weights_file)),
        SampleInput("lora_config", "TYPE_INT32", entry.lora_config_shape, _name_of(entry.lora_config_file)),
    )


def sample_files(lora_name: str, entry: AdapterEntry, served: Path) -> dict[str, bytes]:  # noqa: ARG001
    """The file of the task id."""
    return {task_id_file(entry.lora_task_id): task_id_bytes(entry.lora_task_id)}


def check_adapter(adapter: Adapter) -> None:
    """Refuse nothing: `plan_layout` finds all adapters that this target cannot take."""


def backend_fault(config: ModelConfig, dtype: str) -> tuple[str, str] | None:
    """The fault of the Python backend with bfloat16. The CPU engine, which is a Python model, reads it otherwise."""
    if config.backend != "python" or dtype != "bfloat16" or is_cpu_engine(config.parameters):
        return None
    return (
        "backend 'python' reads lora_weights through numpy, which has no bfloat16",
        'use the C++ backend: backend: "tensorrtllm"',
    )


def store(
    adapter: Adapter, layout: Layout, weights: Path, config: Path, base: Path | None, allow_nonfinite: bool
) -> tuple[str, ...]:
    """Convert the adapter into lora_weights (in the layout's dtype) and lora_config (int32).

    Returns remarks on its values.
    """
    from tritonlora.conversion import tensors  # with torch, which takes seconds to import

    remarks = tensors.convert_file(adapter, layout, weights, base=base, allow_nonfinite=allow_nonfinite)
    config.write_bytes(tensors.lora_config(layout).numpy().astype("<i4").tobytes())
    return remarks


def stored_problems(root: Path, entry: AdapterEntry) -> list[str]:
    """One line for each file whose size is not that of its tensor."""
    parts = (
        (entry.lora_weights_file, entry.lora_weights_nbytes),
        (entry.lora_config_file, entry.lora_config_nbytes),
    )
    found = ((file, (root / file).stat().st_size, expected) for file, expected in parts)
    return [f"{file} has {nbytes} bytes, expected {expected}" for file, nbytes, expected in found if nbytes != expected]


def stored_adapter(root: Path, entry: AdapterEntry, profile: EngineProfile | None) -> Adapter:
    """The adapter, rebuilt from its rows, with each B scaled already.

    EngineMismatch without a profile, and UnsupportedAdapter when the rows do not tell the layers.
    """
    if profile is None:
        raise EngineMismatch(
            "the sizes of its rows are not known, because the engine's config.json is not here; give --base with the "
            "base model's directory"
        )
    stored = StoredRows(
        rows(root, entry, profile), root / entry.lora_weights_file, entry.lora_weights_shape[1], entry.dtype
    )
    return rebuild_adapter(stored, profile, entry.base_model_name_or_path)


def rows(root: Path, entry: AdapterEntry, profile: EngineProfile | None) -> Rows:  # noqa: ARG001
    """The rows of lora_config; RepositoryError when its file cannot be read or has another size."""
    path = root / entry.lora_config_file
    try:
        content = read_file(path)
    except OSError as error:
        raise RepositoryError(f"cannot read {path}: {error.strerror}") from None
    if len(content) != entry.lora_config_nbytes:
        raise RepositoryError(f"{path} has {len(content)} bytes, expected {entry.lora_config_nbytes}")
    return tuple(struct.iter_unpack(f"<{entry.lora_config_shape[1]}i", content))


def stored_remarks(root: Path, entry: AdapterEntry, profile: EngineProfile | None) -> tuple[str, ...]:
    """A remark on rows of zeros. There is none without the profile, which tells where lora_B begins in a row."""
    if profile is None:
        return ()
    found, itemsize = rows(root, entry, profile), DTYPES[entry.dtype].itemsize
    zero, others, dora = set[tuple[str, int]](), False, False
    with open(open_file(root / entry.lora_weights_file), "rb", buffering=0) as file:  # noqa: PTH123  a descriptor
        for module, layer, size, *columns in found:
            values = file.read(entry.lora_weights_nbytes // len(found))
            name = BY_ID[module].name
            dims = profile.modules[name]
            a_end = size * dims.in_features * itemsize
            b_end = a_end + size * dims.out_features * itemsize
            if is_zero(values[:a_end], itemsize) or is_zero(values[a_end:b_end], itemsize):
                zero.add((name, layer))
                dora = dora or any(columns)
            else:
                others = True
    return zero_remarks(zero, others=others, dora=dora)


def declare(document: Document, entries: Collection[AdapterEntry]) -> Document:
    """Declare lora_weights with the adapters' dtype, and lora_config with their number of columns."""
    for dtype in {entry.dtype for entry in entries}:  # at most one, since all adapters share a dtype
        document = declare_lora_weights(document, dtype, {entry.lora_config_shape[1] for entry in entries})
    return document


def served_config(config: ModelConfig, directory: Path) -> ModelConfig:  # noqa: ARG001
    """The config as it is: Triton completes nothing of it."""
    return config


def profile(config: ModelConfig, directory: Path) -> EngineProfile | None:
    """The profile in the config.json at gpt_model_path. The CPU engine has limits in its parameters, too."""
    location = config.parameters.get("gpt_model_path", "")
    if not location or has_template(location) or not (directory / location).exists():
        return None
    if is_cpu_engine(config.parameters):
        return read_profile(parse_settings(config.parameters, directory))
    return load_profile(directory / location)


def model_location(config: ModelConfig, directory: Path) -> str:  # noqa: ARG001
    """The parameter gpt_model_path, for messages."""
    return f"gpt_model_path {config.parameters.get('gpt_model_path', '')!r}"


def kept_adapters(directory: Path) -> KeptAdapters | None:  # noqa: ARG001
    """None, because this target's cache is planned in pages."""
    return None


def _name_of(file: str) -> str:
    return file.rpartition("/")[2]
