# SPDX-FileCopyrightText: the tritonlora authors
# SPDX-License-Identifier: Apache-2.0
"""adapters.json, and what is generated from it: the warmup files and the model_warmup block; and what outlives it.

The files of an adapter that was replaced or removed stay for a while. A request that came before may still have to send
them to the engine, and a server that shares the repository over NFS may see the change a minute later.
"""

from __future__ import annotations

import contextlib
import os
import time
from collections.abc import Iterator, Mapping
from pathlib import Path

from tritonlora.errors import ConfigError, RepositoryError
from tritonlora.files import delete, write_text
from tritonlora.pbtxt.model_config import config_of, parse_config
from tritonlora.pbtxt.text_format import parse
from tritonlora.repository import ensemble_edits, undo, warmup
from tritonlora.repository.paths import (
    RESOLVER,
    Repository,
    half_written,
    outlived,
    read_config,
    read_configs,
    read_text,
)
from tritonlora.serving.adapter_table import AdapterTable
from tritonlora.serving.adapter_table_json import render
from tritonlora.serving.file_version import has_content
from tritonlora.targets import target_of
from tritonlora.targets.declarations import declare_output

FILES_STAY_SECONDS = 600.0


def rendered_config(repository: Repository, table: AdapterTable) -> str:
    """The engine model's config.pbtxt for `table`; RepositoryError, naming the file, when it cannot be edited."""
    text = read_text(repository.config_path)
    try:
        document = parse(text)
        document = target_of(config_of(document)).declare(document, table.entries.values())
        text, config = document.text, config_of(document)
        block = warmup.render_block(config, warmup.samples(config, table))
        _keep_foreign_files(repository, text, warmup.files(config, table, repository.served_root))
        return warmup.replace_block(text, block)
    except ConfigError as error:
        raise RepositoryError(f"{repository.config_path}: {error}") from None


def _keep_foreign_files(repository: Repository, text: str, files: Mapping[str, bytes]) -> None:
    """Refuse to write over a file that warmup samples of the user's own read, unless it says the same."""
    paths = {name: repository.warmup_directory / name for name in warmup.foreign_files(text) if name in files}
    taken = sorted(name for name, path in paths.items() if path.exists() and not has_content(path, files[name]))
    if taken:
        raise RepositoryError(
            f"model_warmup samples of your own read {', '.join(f'warmup/{name}' for name in taken)}, which tritonlora "
            "writes, too; give your files other names, or take out the samples that load adapters: `add` writes them"
        )


def write_table(repository: Repository, before: AdapterTable, table: AdapterTable) -> None:
    """Write `table` in the place of `before`, and bring the rest in step with it."""
    keep_for_a_while(repository, before, table)
    _write_warmup_files(repository, table, rendered_config(repository, table))  # before anybody can ask for an adapter
    write_text(repository.table_path, render(table))
    write_config(repository, table)


def keep_for_a_while(repository: Repository, before: AdapterTable, table: AdapterTable) -> None:
    """The files of adapters that are in `before` alone stay from now on for as long as they must."""
    retired = {*table.retired_lora_task_ids} - {*before.retired_lora_task_ids}
    for path in warmup.files_of(repository.warmup_directory, retired):
        os.utime(path)


def write_config(repository: Repository, table: AdapterTable) -> None:
    """Bring the warmup files and config.pbtxt in step with `table`."""
    text = rendered_config(repository, table)
    _write_warmup_files(repository, table, text)
    with _resolver_in_step(repository, text):
        undo.write(repository.root, {repository.config_path: text.encode()})


def _write_warmup_files(repository: Repository, table: AdapterTable, text: str) -> None:
    files = warmup.files(parse_config(text), table, repository.served_root)
    undo.write(repository.root, {repository.warmup_directory / name: content for name, content in files.items()})


@contextlib.contextmanager
def _resolver_in_step(repository: Repository, text: str) -> Iterator[None]:
    """Give the resolver's lora_weights the type of the engine's, whose config.pbtxt becomes `text` in this context.

    Triton loads no ensemble that leads from one type to another. So where it changes, the ensembles lead to the router
    meanwhile: the repository loads whenever this is stopped, and `tritonlora init --topology resolve` completes it.
    """
    weights = parse_config(text).input("lora_weights")
    path = repository.root / RESOLVER / "config.pbtxt"
    now = read_config(path).output("lora_weights") if weights and path.is_file() else None
    if weights is None or now is None or now.data_type == weights.data_type:
        yield
        return
    configs = read_configs(repository.root)
    resolving = {one: read_text(one) for one, config in configs.items() if config.leads_to(RESOLVER)}
    forward = {
        one: ensemble_edits.rewire_to_forward(parse(before), target=repository.target)
        for one, before in resolving.items()
    }
    undo.write(repository.root, {one: after.text.encode() for one, after in forward.items()})
    yield
    resolver = declare_output(parse(read_text(path)), "lora_weights", str(weights.data_type))
    undo.write(repository.root, {path: resolver.text.encode()})
    undo.write(repository.root, {one: text.encode() for one, text in resolving.items()})


def sweep(repository: Repository, table: AdapterTable) -> list[str]:
    """Delete what a stopped command left half-written, and the files of retired ids that no request needs any more.

    Gives a line for each file that could not be deleted. It is in nobody's way, and `check` reports it.
    """
    problems = []
    for path in [*half_written(repository.root), *left_over(repository, table)]:
        try:
            delete(path)
        except OSError as error:
            problems.append(f"cannot delete {error.filename or path}: {error.strerror}")
    return problems


def left_over(repository: Repository, table: AdapterTable) -> list[Path]:
    """Files of adapters that were replaced or removed so long ago that no request needs them."""
    return outlived(repository, table, time.time() - FILES_STAY_SECONDS)
