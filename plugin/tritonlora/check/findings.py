# SPDX-FileCopyrightText: the tritonlora authors
# SPDX-License-Identifier: Apache-2.0
"""The findings that `check` returns, and the subject that its checks read."""

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

REPAIR = "tritonlora check --fix"  # a remedy


@dataclass(frozen=True, slots=True)
class Finding:
    """One fault, its place and its remedy."""

    severity: str  # "error": the server does not load, or responds wrongly; "warning": it may, or wastes memory or time
    where: str  # the file, model or adapter
    problem: str
    remedy: str


@dataclass(frozen=True, slots=True)
class Subject:
    """Everything that was read of a repository, for all checks."""

    state: State
    config: ModelConfig  # of the engine's model, as the server has it
    configs: Mapping[str, ModelConfig]  # of all models whose config.pbtxt can be read, by name
    profile: EngineProfile | None  # None where the engine's files are not here or cannot be read
    plan: CachePlan | None  # None where there is no profile or an adapter's files are broken
    ports: Ports | None  # the ports of the server that is to be started

    @property
    def repository(self) -> Repository:
        """The repository, with the paths of its files."""
        return self.state.repository

    @property
    def table(self) -> AdapterTable:
        """The table in adapters.json."""
        return self.state.table

    @property
    def kind(self) -> Target:
        """The kind of target that the engine's model is, `engine_model` or `llm_api`."""
        return self.state.kind


def error(where: str, problem: str, remedy: str) -> Finding:
    """A finding that keeps the server from loading or makes its responses wrong."""
    return Finding("error", where, problem, remedy)


def warning(where: str, problem: str, remedy: str) -> Finding:
    """A finding that may keep the server from loading, make responses wrong, or waste memory or time."""
    return Finding("warning", where, problem, remedy)
