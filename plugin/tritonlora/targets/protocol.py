# SPDX-FileCopyrightText: the tritonlora authors
# SPDX-License-Identifier: Apache-2.0
"""What a command asks of a target, the engine's model that adapters are served with: one Protocol."""

from __future__ import annotations

import struct
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

from tritonlora.conversion.layout import Layout
from tritonlora.engine.profile import EngineProfile
from tritonlora.pbtxt.model_config import ModelConfig
from tritonlora.pbtxt.text_format import Document
from tritonlora.peft.adapter import Adapter
from tritonlora.serving.adapter_table import AdapterEntry
from tritonlora.serving.wire import Wire

Rows = tuple[tuple[int, ...], ...]
"""(module id, layer, adapter_size) of each row of lora_config, or with a fourth value: not 0 where the row has DoRA."""


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
class AdapterPlaces:
    """Where an adapter's files lie, relative to the target's warmup directory. "{id}" stands for the lora_task_id."""

    weights_file: str
    config_file: str
    directory: str | None  # of both, for a target that is given a path

    def of(self, task_id: int) -> AdapterPlaces:
        """The places of one adapter."""
        directory = self.directory and self.directory.format(id=task_id)
        return AdapterPlaces(self.weights_file.format(id=task_id), self.config_file.format(id=task_id), directory)


@dataclass(frozen=True, slots=True)
class KeptAdapters:
    """How many adapters a target keeps that reads them by itself."""

    host: int  # in host memory; the target reads the others again when they are asked for
    gpu: int  # at one time


class Target(Protocol):
    """One kind of target. Its implementations are modules of this package."""

    WIRE: Wire
    ORIGIN: str  # where a model that lacks one of the inputs has to come from
    ENABLE_LORA: str  # what to do about an engine without LoRA
    PLACES: AdapterPlaces
    SHARED_INPUTS: Mapping[str, SharedInput]
    ASSUMED_DTYPE: str | None  # of an engine that is not known; None: somebody has to say
    ENSEMBLE_INPUTS: Mapping[str, str] | None  # input -> its name in an ensemble of the router alone; None: no such
    COMPLETES_CONFIGS: bool  # the server has to complete config.pbtxt
    SERVER_FOR_EACH_PROCESS: bool  # of an engine that has several; otherwise the model starts the others itself

    def sample_inputs(self, entry: AdapterEntry) -> tuple[SampleInput, ...]:
        """The inputs of the adapter's warmup sample that name or hold it."""

    def sample_files(self, lora_name: str, entry: AdapterEntry, served: Path) -> Mapping[str, bytes]:
        """The files of that sample, but for the adapter's own. `served`: where the server sees the repository."""

    def check_adapter(self, adapter: Adapter) -> None:
        """AdapterError where this kind of target alone cannot take the adapter."""

    def store(
        self, adapter: Adapter, layout: Layout, weights: Path, config: Path, base: Path | None, allow_nonfinite: bool
    ) -> tuple[str, ...]:
        """Write the adapter's two files, and give remarks on its values; any AdapterError.

        `base`: the base model's checkpoint, for DoRA.
        """

    def stored_problems(self, root: Path, entry: AdapterEntry) -> list[str]:
        """What is wrong with the adapter's files, which are there."""

    def stored_remarks(self, root: Path, entry: AdapterEntry, profile: EngineProfile | None) -> tuple[str, ...]:
        """Remarks on a stored adapter, all of which is read for it; TritonLoraError."""

    def rows(self, root: Path, entry: AdapterEntry, profile: EngineProfile | None) -> Rows:
        """The rows of a stored adapter, for an engine or for none that is known; TritonLoraError."""

    def declare(self, document: Document, entries: Collection[AdapterEntry]) -> Document:
        """The target's config.pbtxt, with the LoRA tensors declared as these adapters are."""

    def served_config(self, config: ModelConfig, directory: Path) -> ModelConfig:
        """The config as Triton has it, which completes some of it when it loads the model in `directory`."""

    def profile(self, config: ModelConfig, directory: Path) -> EngineProfile | None:
        """What the engine accepts; None where nothing on this machine says it."""

    def model_location(self, config: ModelConfig, directory: Path) -> str:
        """Where the profile is read from, for messages."""

    def kept_adapters(self, directory: Path) -> KeptAdapters | None:
        """How many adapters the target in `directory` keeps; None: its cache is planned in pages."""


def task_id_file(task_id: int) -> str:
    """The name of the warmup file with the task id."""
    return f"lora_id_{task_id}"


def task_id_bytes(task_id: int) -> bytes:
    """The content of `task_id_file(task_id)`: uint64, little-endian."""
    return struct.pack("<Q", task_id)


def string_bytes(text: str) -> bytes:
    """One element of a TYPE_STRING tensor: its length as uint32, little-endian, then its bytes (core, src/infer_*)."""
    content = text.encode()
    return struct.pack("<I", len(content)) + content
