# SPDX-FileCopyrightText: the tritonlora authors
# SPDX-License-Identifier: Apache-2.0
"""The model of TensorRT-LLM's LLM API (triton_backend/all_models/llmapi) as the target.

An adapter is stored as a PEFT directory, which the model reads by itself. model.yaml has the limits of the model.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from pathlib import Path

from tritonlora.conversion import peft_directory
from tritonlora.conversion.coverage import is_zero, zero_remarks
from tritonlora.conversion.layout import plan_layout
from tritonlora.conversion.rows import Layout
from tritonlora.engine.lora_cache import Rows
from tritonlora.engine.model_yaml import complete, load_model_yaml, profile_of
from tritonlora.engine.profile import EngineProfile
from tritonlora.errors import AdapterError, EngineMismatch
from tritonlora.pbtxt.model_config import ModelConfig
from tritonlora.pbtxt.text_format import Document
from tritonlora.peft.adapter import Adapter, load_adapter
from tritonlora.serving.adapter_table import AdapterEntry
from tritonlora.serving.wire import LLM_API
from tritonlora.targets.protocol import (
    AdapterPlaces,
    KeptAdapters,
    SampleInput,
    SharedInput,
    string_bytes,
    task_id_bytes,
    task_id_file,
)

WIRE = LLM_API
ORIGIN = (
    "adapters need the llmapi model of TensorRT-LLM from its pull request 14079 (2026) on; take its config.pbtxt and "
    "1/*.py from there"
)
ENABLE_LORA = "give it a lora_config in model.yaml: lora_target_modules, max_lora_rank, max_loras, max_cpu_loras"
PLACES = AdapterPlaces(
    "adapter_{id}/adapter_model.safetensors", "adapter_{id}/adapter_config.json", directory="adapter_{id}"
)
SHARED_INPUTS: Mapping[str, SharedInput] = {
    "text_input": SharedInput("text_input", "Hello"),
    "sampling_param_max_tokens": SharedInput("max_tokens", (1,)),
}
ASSUMED_DTYPE: str | None = "bfloat16"
# Input -> its name in ensembles of the engine's models. Other inputs keep their names, without "sampling_param_".
ENSEMBLE_INPUTS: Mapping[str, str] | None = {
    "streaming": "stream",
    "sampling_param_stop": "stop_words",
    "sampling_param_seed": "random_seed",
    "lora_id": "lora_task_id",
}
COMPLETES_CONFIGS = True  # max_batch_size and the transaction policy come from model.yaml
SERVER_FOR_EACH_PROCESS = False


def sample_inputs(entry: AdapterEntry) -> tuple[SampleInput, ...]:
    """The inputs lora_id, lora_name and lora_path of the adapter's warmup sample."""
    task_id = entry.lora_task_id
    return (
        SampleInput("lora_id", "TYPE_UINT64", (1,), task_id_file(task_id)),
        SampleInput("lora_name", "TYPE_STRING", (1,), f"lora_name_{task_id}"),
        SampleInput("lora_path", "TYPE_STRING", (1,), f"lora_path_{task_id}"),
    )


def sample_files(lora_name: str, entry: AdapterEntry, served: Path) -> dict[str, bytes]:
    """The files of the id, the name and the path."""
    task_id = entry.lora_task_id
    return {
        task_id_file(task_id): task_id_bytes(task_id),
        f"lora_name_{task_id}": string_bytes(lora_name),
        f"lora_path_{task_id}": string_bytes(str(served / (entry.lora_path or ""))),
    }


def check_adapter(adapter: Adapter) -> None:
    """Raise UnsupportedAdapter when the model would read the adapter as something else."""
    peft_directory.check_for_llm_api(adapter)


def backend_fault(config: ModelConfig, dtype: str) -> tuple[str, str] | None:  # noqa: ARG001
    """None: the model reads adapters from disk."""
    return None


def store(
    adapter: Adapter,
    layout: Layout,
    weights: Path,
    config: Path,
    base: Path | None,  # noqa: ARG001
    allow_nonfinite: bool,
) -> tuple[str, ...]:
    """Check the adapter's values, and copy its files bit for bit. Returns remarks on its values."""
    from tritonlora.conversion import tensors  # with torch, which takes seconds to import

    remarks = tensors.check_values(adapter, layout, allow_nonfinite=allow_nonfinite)
    peft_directory.copy_adapter(adapter, weights, config)
    return remarks


def stored_problems(root: Path, entry: AdapterEntry) -> list[str]:
    """The error of an adapter directory that cannot be read, in a list; [] without an error."""
    try:
        load_adapter(root / (entry.lora_path or ""))
    except AdapterError as error:
        return [str(error)]
    return []


def stored_adapter(root: Path, entry: AdapterEntry, profile: EngineProfile | None) -> Adapter:  # noqa: ARG001
    """The adapter in the stored directory."""
    return load_adapter(root / (entry.lora_path or ""))


def rows(root: Path, entry: AdapterEntry, profile: EngineProfile | None) -> Rows:
    """The rows that a conversion of the directory would have; AdapterError when it cannot be read."""
    adapter = load_adapter(root / (entry.lora_path or ""))
    try:
        layout = plan_layout(adapter, dtype=entry.dtype)
    except EngineMismatch:  # the tensors' names alone do not tell the layers
        if profile is None:
            raise
        layout = plan_layout(adapter, dtype=profile.dtype, profile=profile)
    return tuple((row.module.id, row.layer, row.adapter_size) for row in layout.rows)


def stored_remarks(root: Path, entry: AdapterEntry, profile: EngineProfile | None) -> tuple[str, ...]:  # noqa: ARG001
    """A remark on layers whose lora_A or lora_B is zero."""
    adapter = load_adapter(root / (entry.lora_path or ""))
    zero, others = set[tuple[str, int]](), False
    for module in adapter.modules.values():
        if any(is_zero(tensor.load_bytes(), tensor.dtype.itemsize) for tensor in (module.lora_A, module.lora_B)):
            zero.add((module.name, module.layer))
        else:
            others = True
    return zero_remarks(zero, others=others, dora=False)


def declare(document: Document, entries: Collection[AdapterEntry]) -> Document:  # noqa: ARG001
    """Leave the config as it is: its inputs are the same for all adapters."""
    return document


def served_config(config: ModelConfig, directory: Path) -> ModelConfig:
    """The config, completed from model.yaml."""
    return complete(config, directory)


def profile(config: ModelConfig, directory: Path) -> EngineProfile | None:  # noqa: ARG001
    """The profile of the base model that model.yaml names."""
    return profile_of(load_model_yaml(directory))


def model_location(config: ModelConfig, directory: Path) -> str:  # noqa: ARG001
    """The model that model.yaml names, for messages."""
    found = load_model_yaml(directory)
    return f"the model {found.model!r} of {found.path.name}"


def kept_adapters(directory: Path) -> KeptAdapters | None:
    """The numbers max_cpu_loras and max_loras in model.yaml; 0 without a lora_config."""
    lora = load_model_yaml(directory).lora
    return KeptAdapters(lora.max_cpu_loras, lora.max_loras) if lora else KeptAdapters(0, 0)
