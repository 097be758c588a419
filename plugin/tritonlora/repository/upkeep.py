# SPDX-FileCopyrightText: the tritonlora authors
# SPDX-License-Identifier: Apache-2.0
"""Repair a repository, and set parameters of its engine."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import replace

from tritonlora.engine import cache_plan
from tritonlora.engine.lora_cache import parse_parameters
from tritonlora.engine.profile import EngineProfile
from tritonlora.errors import RepositoryError, one_message
from tritonlora.files import locked
from tritonlora.pbtxt.model_config import config_of
from tritonlora.repository import generated, model_configs, undo
from tritonlora.repository.paths import Repository, cache_pages, plan_entries
from tritonlora.repository.state import read_state
from tritonlora.serving.adapter_table_json import render
from tritonlora.serving.file_version import has_content


def repair(repository: Repository) -> list[undo.FileChange]:
    """Write the generated files again from adapters.json, and delete the files that stopped commands left behind.

    Returns the files that were missing or altered, and the files that were deleted. RepositoryError names the files
    that could not be deleted.
    """
    with locked(repository.table_path.parent):
        state = read_state(repository)
        files = generated.rendered(state, state.table)
        changes = [
            undo.FileChange(path, undo.text_of(path), content.decode(errors="replace"))
            for path, content in files.files().items()
            if not has_content(path, content)
        ]
        state = generated.write(state, state.table, files)
        changes += [undo.FileChange(path, "", None) for path in generated.swept(state)]
        if problems := generated.sweep(state):
            raise RepositoryError(one_message("not everything that was left behind can be deleted", problems))
    return changes


def set_parameters(repository: Repository, parameters: Mapping[str, str]) -> None:
    """Set parameters of the engine's model. Every other byte of its config.pbtxt stays as it is.

    The router and the resolver get the new size of the engine's cache.
    """
    with locked(repository.table_path.parent):
        state = read_state(repository)
        document = model_configs.set_parameters(state.document, parameters)
        pages = cache_pages(config_of(document), lambda: state.profile)
        in_step = generated.cache_in_step(state.models, pages)
        undo.write(repository.root, {repository.config_path: document.text.encode(), **in_step})


def apply_plan(
    repository: Repository, recommendations: Iterable[cache_plan.Recommendation], profile: EngineProfile
) -> dict[str, str]:
    """Set the recommended parameters of the engine's model, and the new size of its cache in the router and resolver.

    Returns the parameters of the engine's model that were changed.
    """
    with locked(repository.table_path.parent):
        state = read_state(repository)
        _, ignored = parse_parameters(state.config.parameters)
        changed = {
            one.parameter: str(one.value)
            for one in recommendations
            if one.value != one.in_effect or one.parameter in ignored
        }
        entries = plan_entries(repository, state.table, state.config)
        planned = cache_plan.plan_cache(entries, profile, {**state.config.parameters, **changed})
        pages = {adapter.name: adapter.pages for adapter in planned.adapters}
        sized = {name: replace(entry, pages=pages[name]) for name, entry in state.table.entries.items()}
        document = model_configs.set_parameters(state.document, changed)
        in_step = generated.cache_in_step(state.models, planned.tightest.host_pages)
        contents = {repository.config_path: document.text.encode(), **in_step}
        if sized != state.table.entries:
            contents[repository.table_path] = render(replace(state.table, entries=sized)).encode()
        undo.write(repository.root, contents)
    return changed
