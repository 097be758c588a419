# SPDX-FileCopyrightText: the tritonlora authors
# SPDX-License-Identifier: Apache-2.0
"""The two contracts that TensorRT-LLM has for adapters in Triton, side by side. All that differs between them is here.

`TENSORS` are the engine's models (all_models/inflight_batcher_llm, v0.9 to v1.x): an adapter is two tensors, which the
client (here: the router) sends with a request, and which the engine's cache may forget. `LLM_API` is the Python model
of TensorRT-LLM's main branch (triton_backend/all_models/llmapi): an adapter is a PEFT directory that the server reads,
and reads again by itself, so that every request names it. A target's declared inputs say which of them it is.

This file runs inside a plain Triton container: standard library and numpy only. What else is imported inside of
functions is for preparing a repository, which the router never does.
"""

from __future__ import annotations

import struct
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from tritonlora.errors import AdapterError, EngineMismatch, RepositoryError
from tritonlora.versions import read_file

if TYPE_CHECKING:
    from tritonlora.adapters import AdapterEntry
    from tritonlora.engine import EngineProfile
    from tritonlora.layout import Layout
    from tritonlora.model_config import ModelConfig
    from tritonlora.peft import Adapter
    from tritonlora.routing import Route


Rows = tuple[tuple[int, ...], ...]


@dataclass(frozen=True, slots=True)
class SharedInput:
    """An input that has the same value in all warmup samples."""

    file: str  # in the target's warmup directory
    value: str | tuple[int, ...]  # in the type that the target declares


@dataclass(frozen=True, slots=True)
class SampleInput:
    """One of the inputs of a warmup sample that name or hold its adapter."""

    name: str
    data_type: str
    shape: tuple[int, ...]  # without the batch dim
    file: str


@dataclass(frozen=True, slots=True)
class Room:
    """How many adapters an engine keeps that reads them by itself."""

    host: int  # in host memory; the others are read again when they are asked for
    gpu: int  # at one time


@dataclass(frozen=True, slots=True)
class Flavour:
    """What one of the contracts asks for."""

    name: str
    inputs: tuple[str, ...]  # a model that declares these is of this flavour
    origin: str  # where a model that lacks one of them has to come from
    task_id: str  # the input that has an adapter's lora_task_id
    from_router: tuple[str, ...]  # inputs that the router gives; no client may
    # (repository, adapter): what each request for it says of it, weights apart
    naming_inputs: Callable[[Path, Route], dict[str, npt.NDArray[Any]]]
    stop: str  # the input of a request that ends the one with the same id; "": there is none
    needed_outputs: tuple[str, ...]  # of the target: the router asks for these, whatever the client wants
    to_lora: str  # what to do about an engine without LoRA
    weights_file: str  # of an adapter, in the target's warmup directory, with {id} for the lora_task_id
    config_file: str
    lora_path: str | None  # the directory of these two, where the engine is given that
    shared_inputs: Mapping[str, SharedInput]
    sample_inputs: Callable[[AdapterEntry], tuple[SampleInput, ...]]
    sample_files: Callable[[str, AdapterEntry, Path], Mapping[str, bytes]]  # (lora_name, entry, repository as served)
    check_adapter: Callable[[Adapter], None]  # AdapterError: what this flavour alone cannot take
    store: Callable[[Adapter, Layout, Path, Path, Path | None, bool], None]  # (…, weights, config, base, nonfinite)
    stored_problems: Callable[[Path, AdapterEntry], list[str]]  # with its files, which are there
    # (module id, layer, rank, …) of each row, for an engine or none that is known; TritonLoraError
    rows: Callable[[Path, AdapterEntry, EngineProfile | None], Rows]
    declare: Callable[[str, Collection[AdapterEntry]], str]  # the target's config.pbtxt, for these adapters
    served_config: Callable[[ModelConfig, Path], ModelConfig]  # as Triton completes it, for the target's directory
    profile: Callable[[ModelConfig, Path], EngineProfile | None]
    model_location: Callable[[ModelConfig, Path], str]  # where the profile is read from, for messages
    room: Callable[[Path], Room | None]  # of the target in a directory; None: its cache is planned in pages
    assumed_dtype: str | None  # of an engine that is not known; None: somebody has to say
    sends_weights: (
        bool  # into a cache of pages that forgets them; else the engine reads an adapter whenever it needs to
    )
    ensemble_inputs: Mapping[str, str] | None  # input -> its name in an ensemble of the router alone; None: no such
    router_output: tuple[str, str] | None  # (an output of the router's own, the target's output that it is made of)
    completes_configs: bool  # the server has to complete config.pbtxt
    server_for_each_process: bool  # of an engine that has several; else the model starts the others itself

    def missing(self, inputs: Collection[str]) -> list[str]:
        """Which of its inputs a model with these does not declare."""
        return [name for name in self.inputs if name not in inputs]


def flavour_of(inputs: Collection[str]) -> Flavour:
    """The flavour of a target, or of the router before it, by the names of its inputs: the one it has most of."""
    return max(FLAVOURS, key=lambda flavour: 1 - len(flavour.missing(inputs)) / len(flavour.inputs))


def flavour_of_config(config: ModelConfig) -> Flavour:
    """`flavour_of` a config.pbtxt."""
    return flavour_of([spec.name for spec in config.inputs])


# The engine's models


def _task_id_input(_repository: Path, route: Route) -> dict[str, npt.NDArray[Any]]:
    return {"lora_task_id": np.array([[route.entry.lora_task_id]], np.uint64)}


def _tensor_inputs(entry: AdapterEntry) -> tuple[SampleInput, ...]:
    from tritonlora.model_config import TRITON_TYPES

    task_id = entry.lora_task_id
    return (
        SampleInput("lora_task_id", "TYPE_UINT64", (1,), task_id_file(task_id)),
        SampleInput(
            "lora_weights", TRITON_TYPES[entry.dtype], entry.lora_weights_shape, _name_of(entry.lora_weights_file)
        ),
        SampleInput("lora_config", "TYPE_INT32", entry.lora_config_shape, _name_of(entry.lora_config_file)),
    )


def _tensor_files(_name: str, entry: AdapterEntry, _served: Path) -> dict[str, bytes]:
    return {task_id_file(entry.lora_task_id): task_id_bytes(entry.lora_task_id)}


def _convert(
    adapter: Adapter, layout: Layout, weights: Path, config: Path, base: Path | None, allow_nonfinite: bool
) -> None:
    from tritonlora import pack

    pack.convert_file(adapter, layout, weights, base=base, allow_nonfinite=allow_nonfinite)
    config.write_bytes(pack.lora_config(layout).numpy().astype("<i4").tobytes())


def _size_problems(root: Path, entry: AdapterEntry) -> list[str]:
    parts = (
        (entry.lora_weights_file, entry.lora_weights_nbytes),
        (entry.lora_config_file, entry.lora_config_nbytes),
    )
    found = ((file, (root / file).stat().st_size, expected) for file, expected in parts)
    return [f"{file} has {nbytes} bytes, expected {expected}" for file, nbytes, expected in found if nbytes != expected]


def _tensor_rows(root: Path, entry: AdapterEntry, _profile: EngineProfile | None) -> Rows:
    path = root / entry.lora_config_file
    try:
        content = read_file(path)
    except OSError as error:
        raise RepositoryError(f"cannot read {path}: {error.strerror}") from None
    if len(content) != entry.lora_config_nbytes:
        raise RepositoryError(f"{path} has {len(content)} bytes, expected {entry.lora_config_nbytes}")
    return tuple(struct.iter_unpack(f"<{entry.lora_config_shape[1]}i", content))


def _declare_tensors(text: str, entries: Collection[AdapterEntry]) -> str:
    from tritonlora.declarations import declare_lora_weights

    for dtype in {entry.dtype for entry in entries}:  # one, at most
        text = declare_lora_weights(text, dtype, {entry.lora_config_shape[1] for entry in entries})
    return text


def _engine_profile(config: ModelConfig, directory: Path) -> EngineProfile | None:
    from tritonlora.cpu_engine.settings import is_cpu_engine, parse_settings, read_profile
    from tritonlora.engine import load_profile
    from tritonlora.model_config import has_template

    location = config.parameters.get("gpt_model_path", "")
    if not location or has_template(location) or not (directory / location).exists():
        return None
    if is_cpu_engine(config.parameters):  # its LoRA limits are parameters; TensorRT-LLM's are in config.json
        return read_profile(parse_settings(config.parameters, directory))
    return load_profile(directory / location)


# The LLM API's model


def _path_input(repository: Path, route: Route) -> dict[str, npt.NDArray[Any]]:
    """The engine looks into the directory when it does not hold the adapter."""
    path = repository / (route.entry.lora_path or "")
    return {
        "lora_id": np.array([route.entry.lora_task_id], np.uint64),
        "lora_name": np.array([route.lora_name.encode()], np.object_),
        "lora_path": np.array([str(path).encode()], np.object_),
    }


def _path_inputs(entry: AdapterEntry) -> tuple[SampleInput, ...]:
    task_id = entry.lora_task_id
    return (
        SampleInput("lora_id", "TYPE_UINT64", (1,), task_id_file(task_id)),
        SampleInput("lora_name", "TYPE_STRING", (1,), f"lora_name_{task_id}"),
        SampleInput("lora_path", "TYPE_STRING", (1,), f"lora_path_{task_id}"),
    )


def _path_files(name: str, entry: AdapterEntry, served: Path) -> dict[str, bytes]:
    task_id = entry.lora_task_id
    return {
        task_id_file(task_id): task_id_bytes(task_id),
        f"lora_name_{task_id}": string_bytes(name),
        f"lora_path_{task_id}": string_bytes(str(served / (entry.lora_path or ""))),
    }


def _check_for_llm_api(adapter: Adapter) -> None:
    from tritonlora.peft_copy import check_for_llm_api

    check_for_llm_api(adapter)


def _copy(
    adapter: Adapter, layout: Layout, weights: Path, config: Path, _base: Path | None, allow_nonfinite: bool
) -> None:
    from tritonlora import pack, peft_copy

    pack.check_values(adapter, layout, allow_nonfinite=allow_nonfinite)
    peft_copy.copy_adapter(adapter, weights, config)


def _directory_problems(root: Path, entry: AdapterEntry) -> list[str]:
    from tritonlora.peft import load_adapter

    try:
        load_adapter(root / (entry.lora_path or ""))
    except AdapterError as error:
        return [str(error)]
    return []


def _adapter_rows(root: Path, entry: AdapterEntry, profile: EngineProfile | None) -> Rows:
    from tritonlora.layout import plan_layout
    from tritonlora.peft import load_adapter

    adapter = load_adapter(root / (entry.lora_path or ""))
    try:
        layout = plan_layout(adapter, dtype=entry.dtype)
    except EngineMismatch:  # names alone do not say what its layers are
        if profile is None:
            raise
        layout = plan_layout(adapter, dtype=profile.dtype, profile=profile)
    return tuple((row.module.id, row.layer, row.adapter_size) for row in layout.rows)


def _completed(config: ModelConfig, directory: Path) -> ModelConfig:
    from tritonlora.model_yaml import complete

    return complete(config, directory)


def _yaml_profile(_config: ModelConfig, directory: Path) -> EngineProfile | None:
    from tritonlora.model_yaml import load_model_yaml, profile_of

    return profile_of(load_model_yaml(directory))


def _yaml_location(_config: ModelConfig, directory: Path) -> str:
    from tritonlora.model_yaml import load_model_yaml

    found = load_model_yaml(directory)
    return f"the model {found.model!r} of {found.path.name}"


def _yaml_room(directory: Path) -> Room:
    from tritonlora.model_yaml import load_model_yaml

    lora = load_model_yaml(directory).lora
    return Room(lora.max_cpu_loras, lora.max_loras) if lora else Room(0, 0)


TENSORS = Flavour(
    name="tensors",
    inputs=("lora_task_id", "lora_weights", "lora_config"),
    origin="adapters by task id need the tensorrt_llm model of tensorrtllm_backend v0.9.0 to v1.x; take its "
    "config.pbtxt from there",
    task_id="lora_task_id",
    from_router=("lora_weights", "lora_config"),
    naming_inputs=_task_id_input,
    stop="stop",
    needed_outputs=("output_ids", "sequence_length"),  # the engine refuses a request that does not ask for both
    to_lora="build it with trtllm-build --lora_plugin auto --lora_target_modules …",
    weights_file="adapter_model_{id}.bin",
    config_file="adapter_config_{id}.bin",
    lora_path=None,
    shared_inputs={
        # Token ids that every vocabulary has, and one token of output, so that it hardly matters which token ends it.
        "input_ids": SharedInput("input_ids", (1, 2, 3, 4)),
        "input_lengths": SharedInput("input_lengths", (4,)),
        "end_id": SharedInput("end_id", (0,)),
        "request_output_len": SharedInput("output_lengths", (1,)),
        "beam_width": SharedInput("beam_width", (1,)),
    },
    sample_inputs=_tensor_inputs,
    sample_files=_tensor_files,
    check_adapter=lambda _adapter: None,
    store=_convert,
    stored_problems=_size_problems,
    rows=_tensor_rows,
    declare=_declare_tensors,
    served_config=lambda config, _directory: config,
    profile=_engine_profile,
    model_location=lambda config, _directory: f"gpt_model_path {config.parameters.get('gpt_model_path', '')!r}",
    room=lambda _directory: None,
    assumed_dtype=None,
    sends_weights=True,
    ensemble_inputs=None,
    router_output=None,
    completes_configs=False,
    server_for_each_process=True,
)

LLM_API = Flavour(
    name="llmapi",
    inputs=("sampling_param_max_tokens", "lora_id", "lora_name", "lora_path"),
    origin="adapters need the llmapi model of TensorRT-LLM from its pull request 14079 (2026) on; take its "
    "config.pbtxt and 1/*.py from there",
    task_id="lora_id",
    from_router=("lora_path", "lora_ckpt_source"),
    naming_inputs=_path_input,
    stop="",
    needed_outputs=("text_output",),
    to_lora="give it a lora_config in model.yaml: lora_target_modules, max_lora_rank, max_loras, max_cpu_loras",
    weights_file="adapter_{id}/adapter_model.safetensors",
    config_file="adapter_{id}/adapter_config.json",
    lora_path="adapter_{id}",
    shared_inputs={
        "text_input": SharedInput("text_input", "Hello"),
        "sampling_param_max_tokens": SharedInput("max_tokens", (1,)),
    },
    sample_inputs=_path_inputs,
    sample_files=_path_files,
    check_adapter=_check_for_llm_api,
    store=_copy,
    stored_problems=_directory_problems,
    rows=_adapter_rows,
    declare=lambda text, _entries: text,
    served_config=_completed,
    profile=_yaml_profile,
    model_location=_yaml_location,
    room=_yaml_room,
    assumed_dtype="bfloat16",
    sends_weights=False,
    # What the ensembles of the other flavour call it. The rest keep their names, less "sampling_param_".
    ensemble_inputs={
        "streaming": "stream",
        "sampling_param_stop": "stop_words",
        "sampling_param_seed": "random_seed",
        "lora_id": "lora_task_id",
    },
    # Each streamed answer has the whole text so far; clients of an ensemble expect what is new in it.
    router_output=("text_diff", "text_output"),
    completes_configs=True,  # max_batch_size and the transaction policy come from model.yaml
    server_for_each_process=False,
)

FLAVOURS = (TENSORS, LLM_API)


# What warmup files hold


def task_id_file(task_id: int) -> str:
    """The name of the file with the task id."""
    return f"lora_id_{task_id}"


def task_id_bytes(task_id: int) -> bytes:
    """The content of `task_id_file(task_id)`: uint64, little-endian."""
    return struct.pack("<Q", task_id)


def string_bytes(text: str) -> bytes:
    """One element of a TYPE_STRING tensor: its length as uint32, little-endian, then its bytes (core, src/infer_*)."""
    content = text.encode()
    return struct.pack("<I", len(content)) + content


def _name_of(file: str) -> str:
    return file.rpartition("/")[2]
