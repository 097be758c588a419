# SPDX-FileCopyrightText: the tritonlora authors
# SPDX-License-Identifier: Apache-2.0
"""What `check` finds, and what it looks at."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from tritonlora.engine.cache_plan import CachePlan
from tritonlora.engine.profile import EngineProfile
from tritonlora.machine import Ports
from tritonlora.pbtxt.model_config import ModelConfig
from tritonlora.repository.paths import Repository
from tritonlora.repository.state import State
from tritonlora.serving.adapter_table import AdapterTable
from tritonlora.targets import Target


@dataclass(frozen=True, slots=True)
class Finding:
    """One thing that is wrong."""

    severity: str  # "error": it will not load or will answer wrongly; "warning": it may, or wastes something
    where: str  # the file, model or adapter
    problem: str
    remedy: str


@dataclass(frozen=True, slots=True)
class Subject:
    """What was read of a repository."""

    state: State
    config: ModelConfig  # of the engine's model, as the server has it
    configs: Mapping[str, ModelConfig]  # of all models whose config.pbtxt can be read, by name
    profile: EngineProfile | None  # None, too, where the engine's own files cannot be read
    plan: CachePlan | None  # None, too, where an adapter's files are not what they should be
    ports: Ports | None  # that a server is to listen on

    @property
    def repository(self) -> Repository:
        """Where its files are."""
        return self.state.repository

    @property
    def table(self) -> AdapterTable:
        """adapters.json."""
        return self.state.table

    @property
    def kind(self) -> Target:
        """The kind of target that the engine's model is."""
        return self.state.kind


def error(where: str, problem: str, remedy: str) -> Finding:
    """A finding that keeps the server from loading, or makes it answer wrongly."""
    return Finding("error", where, problem, remedy)


def warning(where: str, problem: str, remedy: str) -> Finding:
    """A finding that may do so, or that wastes something."""
    return Finding("warning", where, problem, remedy)
