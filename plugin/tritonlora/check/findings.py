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

    repository: Repository
    table: AdapterTable
    config_text: str
    config: ModelConfig
    kind: Target
    configs: Mapping[str, ModelConfig]  # of all models whose config.pbtxt can be read, by name
    profile: EngineProfile | None
    plan: CachePlan | None  # None, too, where an adapter's files are not what they should be
    ports: Ports | None  # that a server is to listen on


def error(where: str, problem: str, remedy: str) -> Finding:
    """A finding that keeps the server from loading, or makes it answer wrongly."""
    return Finding("error", where, problem, remedy)


def warning(where: str, problem: str, remedy: str) -> Finding:
    """A finding that may do so, or that wastes something."""
    return Finding("warning", where, problem, remedy)
