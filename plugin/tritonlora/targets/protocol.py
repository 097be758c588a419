# SPDX-FileCopyrightText: the tritonlora authors
# SPDX-License-Identifier: Apache-2.0
"""`Target`, the Protocol of a kind of target. A target is the engine's model, with which adapters are served."""

from __future__ import annotations

import struct
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

from tritonlora.conversion.rows import Layout
from tritonlora.engine.lora_cache import Rows
from tritonlora.engine.profile import EngineProfile
from tritonlora.pbtxt.model_config import ModelConfig
from tritonlora.pbtxt.text_format import Document
from tritonlora.peft.adapter import Adapter
from tritonlora.serving.adapter_table import AdapterEntry
from tritonlora.serving.wire import Wire


@dataclass(frozen=True, slots=True)
class SharedInput:
    """An input that has the same value in all warmup samples."""

    file: str  # in the target's warmup directory
    value: str | tuple[int, ...]  # the file has it in the type that the target declares


@dataclass(frozen=True, slots=True)
class SampleInput:
    """One of the inputs of a warmup sample that name or hold its adapter."""

    name: str
    data_type: str
    shape: tuple[int, ...]  # without the batch dim
    file: str


@dataclass(frozen=True, slots=True)
class AdapterPlaces:
    """The paths of an adapter's files, relative to the target's warmup directory. "{id}" means the lora_task_id."""

    weights_file: str
    config_file: str
    directory: str | None  # of both files, for a target that takes a path

    def of(self, task_id: int) -> AdapterPlaces:
        """The places of one adapter."""
        directory = self.directory and self.directory.format(id=task_id)
        return AdapterPlaces(self.weights_file.format(id=task_id), self.config_file.format(id=task_id), directory)


@dataclass(frozen=True, slots=True)
class KeptAdapters:
    """The numbers of adapters that a target keeps in memory, if it reads adapters by itself."""

    host: int  # in host memory; the target reads another adapter again when a request needs it
    gpu: int  # in GPU memory


class Target(Protocol):
    """One kind of target. Its implementations are modules of this package."""

    WIRE: Wire
    ORIGIN: str  # for messages: where to get a model with all inputs
    ENABLE_LORA: str  # for messages: how to give an engine LoRA
    PLACES: AdapterPlaces
    SHARED_INPUTS: Mapping[str, SharedInput]
    ASSUMED_DTYPE: str | None  # the dtype if the engine is not known; None: the user must name it
    ENSEMBLE_INPUTS: Mapping[str, str] | None  # input -> its name in ensembles; None: the target takes no text
    COMPLETES_CONFIGS: bool  # whether the server has to complete config.pbtxt
    SERVER_FOR_EACH_PROCESS: bool  # whether each process of an engine needs a server; False: the model starts them

    def sample_inputs(self, entry: AdapterEntry) -> tuple[SampleInput, ...]:
        """The inputs of the adapter's warmup sample that name or hold the adapter."""

    def sample_files(self, lora_name: str, entry: AdapterEntry, served: Path) -> Mapping[str, bytes]:
        """The files of that sample, without the adapter's own: name -> content.

        `served` is the repository's path on the server.
        """

    def check_adapter(self, adapter: Adapter) -> None:
        """Raise AdapterError when this kind of target cannot take the adapter, and the other kind may."""

    def backend_fault(self, config: ModelConfig, dtype: str) -> tuple[str, str] | None:
        """Why the model's backend cannot read adapters of `dtype`, and the remedy; None when it can."""

    def store(
        self, adapter: Adapter, layout: Layout, weights: Path, config: Path, base: Path | None, allow_nonfinite: bool
    ) -> tuple[str, ...]:
        """Write the adapter's two files. Returns remarks on its values. Raises AdapterError.

        `base` is the base model's checkpoint, for DoRA.
        """

    def stored_problems(self, root: Path, entry: AdapterEntry) -> list[str]:
        """One line for each problem of the adapter's files, all of which exist."""

    def stored_remarks(self, root: Path, entry: AdapterEntry, profile: EngineProfile | None) -> tuple[str, ...]:
        """Remarks on a stored adapter's values, which are read as a whole. Raises TritonLoraError."""

    def stored_adapter(self, root: Path, entry: AdapterEntry, profile: EngineProfile | None) -> Adapter:
        """The adapter that a stored adapter's files convert from. Raises TritonLoraError when they do not tell it."""

    def rows(self, root: Path, entry: AdapterEntry, profile: EngineProfile | None) -> Rows:
        """The rows of a stored adapter. `profile` is None if the engine is not known. Raises TritonLoraError."""

    def declare(self, document: Document, entries: Collection[AdapterEntry]) -> Document:
        """The target's config.pbtxt, with its LoRA tensors declared with the types and dims of these adapters."""

    def served_config(self, config: ModelConfig, directory: Path) -> ModelConfig:
        """The config as Triton has it after loading the model in `directory`, when it may complete some fields."""

    def profile(self, config: ModelConfig, directory: Path) -> EngineProfile | None:
        """What the engine accepts; None when no file on this machine tells it."""

    def model_location(self, config: ModelConfig, directory: Path) -> str:
        """The place that the profile is read from, for messages."""

    def kept_adapters(self, directory: Path) -> KeptAdapters | None:
        """The numbers of adapters that the target in `directory` keeps; None: its cache is planned in pages."""


def task_id_file(task_id: int) -> str:
    """The name of the warmup file that has the task id."""
    return f"lora_id_{task_id}"


def task_id_bytes(task_id: int) -> bytes:
    """The content of `task_id_file(task_id)`: uint64, little-endian."""
    return struct.pack("<Q", task_id)


def string_bytes(text: str) -> bytes:
    """One element of a TYPE_STRING tensor: its length as uint32, little-endian, then its bytes (core, src/infer_*)."""
    content = text.encode()
    return struct.pack("<I", len(content)) + content
