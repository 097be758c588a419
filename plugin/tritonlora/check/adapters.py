# SPDX-FileCopyrightText: the tritonlora authors
# SPDX-License-Identifier: Apache-2.0
"""Checks of the adapters: their files, their rows, and what they were made of."""

from __future__ import annotations

import contextlib
from collections.abc import Collection, Iterator

from tritonlora.architectures.lora_modules import BY_ID, row_elements
from tritonlora.check.findings import Finding, Subject, error, warning
from tritonlora.engine.cache_plan import pipeline_problems
from tritonlora.engine.lora_cache import Rows
from tritonlora.errors import EngineMismatch, TritonLoraError
from tritonlora.files import reading, sha256_of
from tritonlora.repository.compose import command_again, replaced_since
from tritonlora.repository.paths import Repository, read_table
from tritonlora.repository.state import read_state
from tritonlora.serving.adapter_table import AdapterEntry


def files(subject: Subject) -> Iterator[Finding]:
    """Each adapter's files exist, are whole, and belong to no other adapter."""
    root = subject.repository.root
    registered: dict[str, set[str]] = {}
    for entry in subject.table.entries.values():
        for file, digest in entry.sha256_by_file.items():
            registered.setdefault(file, set()).add(digest)
    for name, entry in subject.table.entries.items():
        files = entry.sha256_by_file
        missing = [
            f"{file} is {'not a file' if (root / file).exists() else 'missing'}"
            for file in files
            if not (root / file).is_file()
        ]
        twice = [
            f"{file} is another adapter's, too, with another SHA-256" for file in files if len(registered[file]) > 1
        ]
        for problem in missing or twice or subject.kind.stored_problems(root, entry):
            yield error(f"adapter {name}", problem, _add_again(name, entry))


def rows(subject: Subject) -> Iterator[Finding]:
    """This engine accepts the rows of each adapter."""
    for name, entry in subject.table.entries.items():
        try:
            rows = subject.kind.rows(subject.repository.root, entry, subject.profile)
            problems = list(dict.fromkeys(_row_problems(entry, rows, subject)))
        except TritonLoraError as wrong:
            # `files` reports broken files. Without the engine's profile nothing can be compared.
            problems = [str(wrong)] if subject.profile and isinstance(wrong, EngineMismatch) else []
        for problem in problems:
            remedy = f"convert it for this engine: {command_again(name, entry)}; or tritonlora remove {name}"
            yield error(f"adapter {name}", problem, remedy)


def _row_problems(entry: AdapterEntry, rows: Rows, subject: Subject) -> Iterator[str]:
    """Reasons why TensorRT-LLM's loraValidateRequestTensors (runtime/loraUtils.cpp) would refuse the adapter."""
    profile = subject.profile
    if profile and subject.kind.WIRE.sends_weights and entry.dtype != profile.dtype:
        yield f"it is {entry.dtype}, and the engine takes {profile.dtype}"
    for module_id, layer, size, *dora in rows:
        module = BY_ID.get(module_id)
        if module is None or size < 1:
            yield f"lora_config has the row ({module_id}, {layer}, {size}), which no engine takes"
        elif profile is not None:
            dims, width = profile.modules.get(module.name), entry.lora_weights_shape[1]
            if dims is None:
                yield f"the engine has no LoRA for {module.name}"
            elif row_elements(size, dims.in_features, dims.out_features, dora=any(dora)) > width:
                yield f"its rows are too short for {module.name} ({dims.in_features} to {dims.out_features})"
            if not 0 <= layer < profile.num_layers:
                yield f"it has layer {layer}, and the engine has {profile.num_layers}"
            if size > profile.rank_limit:
                yield f"it has rank {size}, and the engine's max_lora_rank is {profile.max_lora_rank}"
    if profile and subject.kind.WIRE.sends_weights:
        yield from pipeline_problems(rows, profile)


def compositions(subject: Subject) -> Iterator[Finding]:
    """Each composition was made of the adapters that are registered now."""
    for name, entry in subject.table.entries.items():
        for part, (then, now) in replaced_since(subject.table, entry).items():
            yield warning(
                f"adapter {name}",
                f"it was composed of {part} as it was under lora_task_id {then}, and {part} has {now} now",
                f"if it is to follow, compose it again: {command_again(name, entry)}",
            )


def altered(repository: Repository) -> Iterator[Finding]:
    """Each adapter's files have the registered SHA-256. Files that do not are hashed again under the lock."""
    entries = read_table(repository).entries
    suspects = {name for name, entry in entries.items() if any(_alterations(repository, entry))}
    if suspects:
        with reading(repository.table_path.parent):
            entries = read_table(repository).entries
            for name in sorted(suspects & entries.keys()):
                for problem in _alterations(repository, entries[name]):
                    yield error(f"adapter {name}", problem, _add_again(name, entries[name]))


def _alterations(repository: Repository, entry: AdapterEntry) -> Iterator[str]:
    for file, digest in entry.sha256_by_file.items():
        path = repository.root / file
        try:
            if path.is_file() and sha256_of(path) != digest:
                yield f"{file} was altered: its SHA-256 is not the registered one"
        except FileNotFoundError:
            continue  # it was removed meanwhile
        except OSError as wrong:
            yield f"{file} cannot be read: {wrong.strerror}"


def remarks(repository: Repository, altered: Collection[str]) -> Iterator[Finding]:
    """Layers in which an unaltered adapter changes nothing. Faults of files or the engine are left to other checks.

    The table has the remark of `add` on layers without tensors: lora_config does not say which layers were targeted.
    """
    state = read_state(repository)
    profile = None
    with contextlib.suppress(TritonLoraError):
        profile = state.profile
    for name, entry in state.table.entries.items():
        remarks = [*entry.remarks]
        if f"adapter {name}" in altered:
            continue
        with contextlib.suppress(TritonLoraError, OSError, KeyError):
            remarks += state.kind.stored_remarks(repository.root, entry, profile)
        for remark in remarks:
            yield warning(
                f"adapter {name}",
                remark,
                f"if that is not meant, take another checkpoint of the adapter, or {_add_again(name, entry)}",
            )


def _add_again(name: str, entry: AdapterEntry) -> str:
    return f"add it again: {command_again(name, entry)}"
