# SPDX-FileCopyrightText: the tritonlora authors
# SPDX-License-Identifier: Apache-2.0
"""The files that follow from a table: the engine model's config.pbtxt, and the warmup files.

A command renders these files once, and writes them once. The files of an adapter that was replaced or removed stay for
a while. A request that came before may still have to send them to the engine, and a server that shares the repository
over NFS may see the change a minute later.
"""

from __future__ import annotations

import os
import time
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path

from tritonlora.errors import ConfigError, RepositoryError
from tritonlora.files import delete
from tritonlora.pbtxt.differences import differences
from tritonlora.pbtxt.model_config import ModelConfig, config_of
from tritonlora.pbtxt.text_format import Document
from tritonlora.repository import ensemble_edits, model_configs, undo, warmup
from tritonlora.repository.paths import LISTING, RESOLVER, ROUTER, cache_pages, half_written, served_version
from tritonlora.repository.state import Models, State, outlived
from tritonlora.serving.adapter_table import AdapterEntry, AdapterTable
from tritonlora.serving.adapter_table_json import render, schema_version_of
from tritonlora.serving.file_version import has_content
from tritonlora.targets.declarations import declare_output

FILES_STAY_SECONDS = 600.0
Contents = Mapping[Path, bytes]


@dataclass(frozen=True, slots=True)
class Rendered:
    """The files that `rendered` makes of a table: whole files, in the order in which they are written."""

    entries: Mapping[str, AdapterEntry]  # of the table
    config_path: Path  # of the engine's model
    warmup_files: Contents
    config_text: str  # of the engine's model
    detour: Contents  # ensembles that lead to the router while the type of the resolver's lora_weights changes
    after_detour: Contents  # config.pbtxt of the router and of the resolver, and the ensembles as they were before
    settings: tuple[
        str, ...
    ]  # settings of config.pbtxt files that differ from now, "MODEL/config.pbtxt: what: old -> new"

    def files(self) -> Contents:
        """All files, as they are in the end."""
        return {**self.warmup_files, self.config_path: self.config_text.encode(), **self.after_detour}


def rendered(state: State, table: AdapterTable, known: Rendered | None = None) -> Rendered:
    """The files that follow from `table`. `known` is returned if its table differs in digests alone.

    RepositoryError, naming the file, when the engine model's config.pbtxt cannot be edited, or when a file of the
    user's own would be overwritten.
    """
    if known is not None and _without_digests(known.entries) == _without_digests(table.entries):
        return known
    repository = state.repository
    try:
        document = state.kind.declare(state.document, table.entries.values())
        config = state.config if document is state.document else config_of(document)
        files = warmup.files(config, table, repository.served_root)
        text = warmup.replace_block(document.text, warmup.render_block(config, warmup.samples(config, table)))
        _keep_foreign_files(state, files)
    except ConfigError as error:
        raise RepositoryError(f"{repository.config_path}: {error}") from None
    detour, changed = _types_in_step(state, config)
    pages = cache_pages(config, lambda: state.profile)
    changed = {**changed, **_cache_documents(state.models, pages, changed)}
    after_detour = _contents(state.models, changed)
    paths = {repository.warmup_directory / name: content for name, content in files.items()}
    configs = {repository.target: config, **{name: config_of(one) for name, one in changed.items()}}
    settings = tuple(
        f"{name}/config.pbtxt: {line}"
        for name, after in configs.items()
        for line in differences(state.models.config(name), after)
    )
    detoured = _contents(state.models, detour)
    return Rendered(table.entries, repository.config_path, paths, text, detoured, after_detour, settings)


def _without_digests(entries: Mapping[str, AdapterEntry]) -> dict[str, AdapterEntry]:
    return {name: replace(one, lora_weights_sha256="", lora_config_sha256="") for name, one in entries.items()}


def _keep_foreign_files(state: State, files: Mapping[str, bytes]) -> None:
    """Raise RepositoryError if a file that the user's own warmup samples read would get other content."""
    paths = {name: state.repository.warmup_directory / name for name in state.foreign_files if name in files}
    taken = sorted(name for name, path in paths.items() if path.exists() and not has_content(path, files[name]))
    if taken:
        raise RepositoryError(
            f"model_warmup samples of your own read {', '.join(f'warmup/{name}' for name in taken)}, which tritonlora "
            "writes, too; rename your files, or take out your samples that load adapters: `add` writes such samples"
        )


def _types_in_step(state: State, engine: ModelConfig) -> tuple[dict[str, Document], dict[str, Document]]:
    """Give the resolver's lora_weights the engine's type: models' config.pbtxt to write before the engine's, and after.

    Triton refuses an ensemble that connects tensors of different types, so the ensembles lead to the router meanwhile.
    If the command is stopped in between, the repository still loads, and `tritonlora init --topology resolve` completes
    the change.
    """
    weights, models = engine.input("lora_weights"), state.models
    resolver = models.present(RESOLVER) if weights else None
    now = resolver.output("lora_weights") if resolver else None
    if weights is None or now is None or now.data_type == weights.data_type:
        return {}, {}
    resolving = {name: models.document(name) for name, config in models.configs().items() if config.leads_to(RESOLVER)}
    target = state.repository.target
    detour = {name: ensemble_edits.rewire_to_forward(one, target=target) for name, one in resolving.items()}
    declared = declare_output(models.document(RESOLVER), "lora_weights", str(weights.data_type))
    return detour, {RESOLVER: declared, **resolving}


def cache_in_step(models: Models, pages: int | None) -> Contents:
    """The config.pbtxt of the router and of the resolver, if `pages` of the engine's cache is new to them.

    Without a known size nothing changes.
    """
    return _contents(models, _cache_documents(models, pages, {}))


def _cache_documents(models: Models, pages: int | None, documents: Mapping[str, Document]) -> dict[str, Document]:
    """As `cache_in_step`. `documents` are those that are written anyway."""
    changed: dict[str, Document] = {}
    for model in (RESOLVER,) if pages else ():
        if models.path(model).is_file():
            before = documents.get(model) or models.document(model)
            after = model_configs.set_parameters(before, {"cache_pages": str(pages)})
            changed |= {model: after} if after is not before else {}
    return changed


def _contents(models: Models, documents: Mapping[str, Document]) -> Contents:
    return {models.path(name): document.text.encode() for name, document in documents.items()}


def write(state: State, table: AdapterTable, files: Rendered | None) -> State:
    """Write `table` and the files that were rendered of it, or the table alone. Returns the state after that.

    An adapter's files are written before its name appears in adapters.json. If adapters were only removed,
    adapters.json is written after the engine model's config.pbtxt; otherwise it is written before.
    """
    repository = state.repository
    _require_readers(repository.root, table)
    _keep_for_a_while(state, table)
    contents = {repository.table_path: render(table).encode()}
    if files is None:
        undo.write(repository.root, contents)
        return state.after(table, ())
    config = {files.config_path: files.config_text.encode()}
    only_removes = table.entries.keys() < state.table.entries.keys()
    contents = {**files.warmup_files, **(config | contents if only_removes else contents | config)}
    steps = [files.detour, contents, files.after_detour] if files.detour else [{**contents, **files.after_detour}]
    for step in steps:
        undo.write(repository.root, step)
    return state.after(table, {repository.target, *(path.parent.name for path in files.after_detour)})


def _require_readers(root: Path, table: AdapterTable) -> None:
    """Raise RepositoryError if a model in the repository runs code that is too old for `table`.

    The server would keep the last table that its code could read, or ignore the pins.
    """
    needs = {
        "divide the requests for an alias": schema_version_of(table) > _SCHEMA_VERSION_OF_OLD,
        "pin adapters": any(entry.pinned for entry in table.entries.values()),
    }
    needed = " or ".join(what for what, is_needed in needs.items() if is_needed)
    for model in (ROUTER, RESOLVER, LISTING) if needed else ():
        if (root / model).is_dir() and served_version(root, model) in _OLD:
            raise RepositoryError(
                f"{model} runs code of an older tritonlora, which cannot {needed}; "
                f"update it with: tritonlora init {root}, and start the server again"
            )


_OLD = ("0.1.0", None)  # versions of code that knows neither shares nor pins; None: no version of tritonlora wrote it
_SCHEMA_VERSION_OF_OLD = 2  # the highest that such code reads


def _keep_for_a_while(state: State, table: AdapterTable) -> None:
    """Touch the files of adapters that `table` retires, so that they stay for FILES_STAY_SECONDS from now on."""
    retired = {*table.retired_lora_task_ids} - {*state.table.retired_lora_task_ids}
    for path in warmup.files_of(state.repository.warmup_directory, retired):
        os.utime(path)


def sweep(state: State) -> list[str]:
    """Delete half-written files of stopped commands, and the files of retired ids that no request needs any more.

    Returns one line for each file that could not be deleted. Such a file does no harm, and `check` reports it.
    """
    problems = []
    for path in swept(state):
        try:
            delete(path)
        except OSError as error:
            problems.append(f"cannot delete {error.filename or path}: {error.strerror}")
    return problems


def swept(state: State) -> list[Path]:
    """The files that `sweep` deletes."""
    return [*half_written(state.repository.root), *left_over(state)]


def left_over(state: State) -> list[Path]:
    """Files of adapters that were replaced or removed more than FILES_STAY_SECONDS ago."""
    return outlived(state, time.time() - FILES_STAY_SECONDS)
