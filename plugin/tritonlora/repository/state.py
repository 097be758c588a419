# SPDX-FileCopyrightText: the tritonlora authors
# SPDX-License-Identifier: Apache-2.0
"""The content of a model repository, read once.

A command reads a `State` and decides on a new table. It renders the files that follow from that table
(`generated.rendered`), and writes each file once (`generated.write`).
"""

from __future__ import annotations

import functools
import math
import os
from collections.abc import Collection, Mapping
from dataclasses import dataclass, field
from pathlib import Path

from tritonlora.engine.cache_plan import CachePlan
from tritonlora.engine.profile import EngineProfile
from tritonlora.errors import ConfigError, RepositoryError
from tritonlora.pbtxt.model_config import ModelConfig, config_of
from tritonlora.pbtxt.text_format import Document, parse
from tritonlora.repository import paths, warmup
from tritonlora.repository.paths import WARMUP, Repository, naming, read_bytes, read_text
from tritonlora.serving.adapter_table import AdapterTable
from tritonlora.targets import Target, target_of


@dataclass(frozen=True, slots=True)
class Models:
    """The config.pbtxt files of a model repository. Each is read and parsed once, when it is first asked for."""

    root: Path
    _documents: dict[str, Document] = field(default_factory=dict, repr=False)
    _configs: dict[str, ModelConfig] = field(default_factory=dict, repr=False)

    def names(self) -> list[str]:
        """The models that have a config.pbtxt, sorted."""
        return sorted(path.parent.name for path in self.root.glob("*/config.pbtxt"))

    def path(self, name: str) -> Path:
        """The config.pbtxt of a model, which may be absent."""
        return self.root / name / "config.pbtxt"

    def document(self, name: str) -> Document:
        """The text and the tree of a config.pbtxt; RepositoryError, naming the file, when it cannot be parsed."""
        if name not in self._documents:
            with naming(self.path(name)):
                self._documents[name] = parse(read_text(self.path(name)))
        return self._documents[name]

    def config(self, name: str) -> ModelConfig:
        """The meaning of a config.pbtxt; RepositoryError, naming the file, when it cannot be understood."""
        if name not in self._configs:
            with naming(self.path(name)):
                self._configs[name] = config_of(self.document(name))
        return self._configs[name]

    def served_config(self, name: str) -> ModelConfig:
        """The config of a target as the server has it. A server may complete a config when it loads the model."""
        config = self.config(name)
        try:
            return target_of(config).served_config(config, self.path(name).parent)
        except ConfigError as error:
            raise RepositoryError(str(error)) from None

    def present(self, name: str) -> ModelConfig | None:
        """The meaning of a model's config.pbtxt; None when there is none."""
        return self.config(name) if self.path(name).is_file() else None

    def configs(self) -> dict[str, ModelConfig]:
        """The meaning of every config.pbtxt, by the models' names, sorted."""
        return {name: self.config(name) for name in self.names()}

    def without(self, names: Collection[str]) -> Models:
        """The same configs, except those of `names`, which were written and have to be read again."""
        documents = {name: one for name, one in self._documents.items() if name not in names}
        return Models(self.root, documents, {name: self._configs[name] for name in self._configs if name in documents})


@dataclass(frozen=True)  # without slots, since cached_property needs a __dict__
class State:
    """A repository with a router: its table, and its models' configs, which are read when they are first needed.

    Each property raises a TritonLoraError when its file cannot be read.
    """

    repository: Repository
    table: AdapterTable
    models: Models

    @property
    def document(self) -> Document:
        """The text and the tree of the engine model's config.pbtxt."""
        return self.models.document(self.repository.target)

    @property
    def config(self) -> ModelConfig:
        """The meaning of the engine model's config.pbtxt."""
        return self.models.config(self.repository.target)

    @property
    def kind(self) -> Target:
        """The kind of target that the engine's model is."""
        return target_of(self.config)

    @functools.cached_property
    def profile(self) -> EngineProfile | None:
        """What the engine accepts; None when the engine's config.json is not on this machine."""
        return paths.engine_profile(self.repository, self.config)

    @functools.cached_property
    def foreign_files(self) -> Mapping[str, tuple[str, ...]]:
        """Warmup file -> the inputs that it is read for, over the user's own warmup samples."""
        found: dict[str, tuple[str, ...]] = {}
        for name, file in warmup.foreign_inputs(self.document):
            found[file] = (*found.get(file, ()), name)
        return found

    @functools.cached_property
    def foreign_task_ids(self) -> frozenset[int]:
        """The lora_task_ids that the user's own warmup samples load an adapter under, or name a file after."""
        taken = {task_id for file in self.foreign_files if (task_id := warmup.task_id_of(file)) is not None}
        for file, inputs in self.foreign_files.items():
            if warmup.TASK_IDS.isdisjoint(inputs):
                continue
            path = self.repository.warmup_directory / file
            if not path.exists():
                config = self.repository.config_path
                raise RepositoryError(f"a model_warmup sample of {config} needs {path}, which is missing")
            taken.add(int.from_bytes(read_bytes(path)[:8], "little"))
        return frozenset(taken)

    def plan(self, *, gpu_memory: int | None = None) -> CachePlan | None:
        """The cache plan of the adapters; None when the engine is not known or its cache is not in pages."""
        return paths.plan_of(self.repository, self.table, self.config, self.profile, gpu_memory=gpu_memory)

    def after(self, table: AdapterTable, written: Collection[str]) -> State:
        """The state after `table` and the config.pbtxt of the models `written` were written."""
        return State(self.repository, table, self.models.without(written))


def read_state(repository: Repository) -> State:
    """The state of a repository; AdapterTableError when adapters.json cannot be read."""
    return State(repository, paths.read_table(repository), Models(repository.root))


def plan(repository: Repository, *, gpu_memory: int | None = None) -> CachePlan | None:
    """The cache plan of a repository's adapters; None when the engine is not known or its cache is not in pages.

    `gpu_memory` is what is free of each GPU's memory once the engine's weights are loaded, in bytes.
    """
    return read_state(repository).plan(gpu_memory=gpu_memory)


# Files that may be deleted. Commands delete these and half-written files, and no others.


def outlived(state: State, oldest: float = math.inf) -> list[Path]:
    """Files of retired ids that were last touched before `oldest`, in seconds since 1970, and that no sample names.

    A file that a model_warmup sample of any config.pbtxt names is never in the list: Triton would not load the model
    without it. The other files of its id are not in the list either, since the named file may contain their path. If a
    config.pbtxt cannot be read, the list is empty.
    """
    home = state.repository.warmup_directory
    retired = warmup.files_of(home, state.table.retired_lora_task_ids)
    found = [path for path in retired if path.lstat().st_mtime <= oldest]
    try:
        named = named_by_samples(state.models) if found else set()
    except RepositoryError:
        return []
    inside = (path.relative_to(place) for place in {home, home.resolve()} for path in named if place in path.parents)
    kept = {warmup.task_id_of(path.parts[0]) for path in inside}
    return [path for path in found if warmup.task_id_of(path.name) not in kept]


def named_by_samples(models: Models) -> set[Path]:
    """The files that the model_warmup samples of all models name: each as written, and with its links resolved.

    RepositoryError when a config.pbtxt cannot be read.
    """
    found = set()
    for name in models.names():
        config = models.path(name)
        try:
            for file in warmup.named_files(models.document(name)):
                path = config.parent / WARMUP / file
                found |= {Path(os.path.normpath(path)), path.resolve()}
        except (ValueError, RuntimeError) as error:  # a name that cannot be a path; links in a circle
            raise RepositoryError(f"{config}: {error}") from None
    return found
