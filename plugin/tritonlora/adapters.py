# SPDX-FileCopyrightText: the tritonlora authors
# SPDX-License-Identifier: Apache-2.0
"""adapters.json: which lora_name has which lora_task_id, and where its tensors lie.

The table is the only thing that preparing and serving share. Values in, values out: `parse` and `render` are inverse,
and `with_adapter` and `without_adapter` return a new table.

Rule: a lora_task_id is given once and never again, also not after its adapter is gone. The engine ignores new weights
under an id that it has cached (TensorRT-LLM cpp/tensorrt_llm/runtime/loraCache.cpp, `put`), so a second use of an id
could be answered by the adapter that had it first.

This file runs inside a plain Triton container: standard library only.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, field, replace
from typing import Any

from tritonlora.errors import AdapterTableError, one_message

SCHEMA_VERSION = 1
# Fits a signed 32-bit integer too: folder names of lora_prefetch_dir are read into a C int.
MAX_TASK_ID = 2**31 - 1
NAME_PATTERN = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,127}")
NAME_RULE = "letters, digits, '.', '_' and '-', at most 128, the first a letter or a digit"
DTYPES = ("bfloat16", "float16", "float32")


@dataclass(frozen=True, slots=True)
class AdapterEntry:
    """One registered adapter. File names are relative to the model repository, in POSIX form."""

    lora_task_id: int
    lora_weights_file: str
    lora_config_file: str
    dtype: str  # of lora_weights: one of DTYPES
    lora_weights_shape: tuple[int, int]  # (n, W)
    lora_config_shape: tuple[int, int]  # (n, 3), or (n, 4) with DoRA
    lora_weights_sha256: str
    lora_config_sha256: str
    adapter_sizes: tuple[int, ...]  # the distinct ranks, ascending
    modules: tuple[str, ...]  # TensorRT-LLM's names
    base_model_name_or_path: str
    warm: bool  # loaded by the engine's model_warmup
    added_at: str  # ISO 8601, UTC
    pages: int | None = None  # of the engine's LoRA cache; None: the engine was not known
    lora_path: str | None = None  # the directory of both files, where the engine reads it by itself

    @property
    def lora_weights_nbytes(self) -> int:
        """Bytes of lora_weights."""
        n, width = self.lora_weights_shape
        return n * width * (4 if self.dtype == "float32" else 2)

    @property
    def lora_config_nbytes(self) -> int:
        """Bytes of lora_config (int32)."""
        n, columns = self.lora_config_shape
        return n * columns * 4


@dataclass(frozen=True, slots=True)
class AdapterTable:
    """All registered adapters of a model repository, by lora_name."""

    entries: Mapping[str, AdapterEntry] = field(default_factory=dict)
    next_lora_task_id: int = 1
    retired_lora_task_ids: tuple[int, ...] = ()
    _names: Mapping[int, str] = field(init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        """Index the names by id, so that looking one up does not take longer the more there are."""
        object.__setattr__(self, "_names", {entry.lora_task_id: name for name, entry in self.entries.items()})

    def name_of(self, lora_task_id: int) -> str | None:
        """The lora_name that has this id, or None."""
        return self._names.get(lora_task_id)


def check_name(name: str) -> None:
    """Raise AdapterTableError unless `name` is a legal lora_name."""
    if not NAME_PATTERN.fullmatch(name):
        raise AdapterTableError(f"{name[:200]!r} is not a legal adapter name; use {NAME_RULE}")


def with_adapter(table: AdapterTable, name: str, entry: AdapterEntry) -> AdapterTable:
    """`table` with `entry` under `name`; an entry that was there retires its id. Refuses an id that was ever used."""
    check_name(name)
    task_id = entry.lora_task_id
    owner = table.name_of(task_id)
    if owner is not None or task_id in table.retired_lora_task_ids:
        by = f"adapter {owner!r}" if owner is not None else "an adapter that was removed"
        raise AdapterTableError(
            f"lora_task_id {task_id} was given to {by}, and an id is never used twice; "
            f"the next free one is {table.next_lora_task_id}"
        )
    if not 1 <= task_id <= MAX_TASK_ID:
        raise AdapterTableError(f"lora_task_id {task_id} is out of range; expected 1 to {MAX_TASK_ID}")
    rest = without_adapter(table, name) if name in table.entries else table
    return AdapterTable(
        entries={**rest.entries, name: entry},
        next_lora_task_id=max(rest.next_lora_task_id, task_id + 1),
        retired_lora_task_ids=rest.retired_lora_task_ids,
    )


def with_warm(table: AdapterTable, name: str, warm: bool) -> AdapterTable:
    """`table` with the adapter `name` loaded at start, or on its first request."""
    return replace(table, entries={**table.entries, name: replace(table.entries[name], warm=warm)})


def without_adapter(table: AdapterTable, name: str) -> AdapterTable:
    """`table` without `name`, whose id is retired; AdapterTableError when it is not there."""
    if name not in table.entries:
        raise AdapterTableError(f"no adapter {name!r} is registered; {available(table)}")
    retired = table.entries[name].lora_task_id
    return replace(
        table,
        entries={other: entry for other, entry in table.entries.items() if other != name},
        retired_lora_task_ids=tuple(sorted({*table.retired_lora_task_ids, retired})),
    )


def available(table: AdapterTable, most: int = 20) -> str:
    """'available: a, b, c', cut to `most` names and a count."""
    names = sorted(table.entries)
    if not names:
        return "no adapter is registered"
    more = f" and {len(names) - most} more" if len(names) > most else ""
    return f"available: {', '.join(names[:most])}{more}"


def render(table: AdapterTable) -> str:
    """The text of adapters.json."""
    document = {
        "schema_version": SCHEMA_VERSION,
        "next_lora_task_id": table.next_lora_task_id,
        "retired_lora_task_ids": list(table.retired_lora_task_ids),
        "adapters": {name: asdict(entry) for name, entry in sorted(table.entries.items())},
    }
    return json.dumps(document, indent=2) + "\n"


def parse(text: str) -> AdapterTable:
    """The table in the text of adapters.json; AdapterTableError with every problem found."""
    try:
        document = json.loads(text, object_pairs_hook=_no_duplicates)
    except (ValueError, RecursionError) as error:
        raise AdapterTableError(f"adapters.json is not JSON: {error}") from None
    if not isinstance(document, dict):
        raise AdapterTableError("adapters.json must hold an object")
    if document.get("schema_version") != SCHEMA_VERSION:
        raise AdapterTableError(
            f"adapters.json has schema_version {document.get('schema_version')!r}, expected {SCHEMA_VERSION}"
        )

    problems = [
        f"{key!r} must be {expected}, got {document.get(key)!r}"[:300]
        for key, (is_right, expected) in _TABLE_CHECKS.items()
        if not is_right(document.get(key))
    ]
    if problems:
        raise AdapterTableError(one_message("adapters.json is malformed", problems))

    entries: dict[str, AdapterEntry] = {}
    for name, fields in document["adapters"].items():
        found = [*_name_problems(name), *_entry_problems(fields)]
        problems += [f"adapter {name[:200]!r}: {problem}" for problem in found]
        if not found:
            entries[name] = _entry(fields)
    table = AdapterTable(entries, document["next_lora_task_id"], tuple(document["retired_lora_task_ids"]))
    problems += _task_id_problems(table)
    if problems:
        raise AdapterTableError(one_message("adapters.json is malformed", problems))
    return table


def _no_duplicates(pairs: list[tuple[str, object]]) -> dict[str, object]:
    document = dict(pairs)
    if len(document) != len(pairs):
        keys = [key for key, _ in pairs]
        twice = sorted({key for key in keys if keys.count(key) > 1})
        raise ValueError(f"{twice[0]!r} stands twice in one object")
    return document


def _is_task_id(value: object) -> bool:
    return type(value) is int and 1 <= value <= MAX_TASK_ID


def _is_shape(value: object) -> bool:
    return isinstance(value, list) and len(value) == 2 and all(type(dim) is int and dim > 0 for dim in value)


def _is_inside_repository(value: object) -> bool:
    if not isinstance(value, str) or not value or "\\" in value or "\0" in value:
        return False
    return not value.startswith("/") and ".." not in value.split("/")


_Check = tuple[Callable[[Any], bool], str]  # is it right, and what was expected
_FIELD_CHECKS: dict[str, _Check] = {
    "lora_task_id": (_is_task_id, "an integer from 1"),
    "lora_weights_file": (_is_inside_repository, "a path relative to the model repository and inside it"),
    "lora_config_file": (_is_inside_repository, "a path relative to the model repository and inside it"),
    "dtype": (lambda value: value in DTYPES, f"one of {', '.join(DTYPES)}"),
    "lora_weights_shape": (_is_shape, "two positive integers"),
    "lora_config_shape": (lambda value: _is_shape(value) and value[1] in (3, 4), "[n, 3] or [n, 4]"),
    "lora_weights_sha256": (lambda value: isinstance(value, str) and len(value) == 64, "64 hexadecimal digits"),
    "lora_config_sha256": (lambda value: isinstance(value, str) and len(value) == 64, "64 hexadecimal digits"),
    "adapter_sizes": (
        lambda value: isinstance(value, list) and all(type(size) is int and size > 0 for size in value),
        "a list of positive integers",
    ),
    "modules": (
        lambda value: isinstance(value, list) and all(isinstance(module, str) for module in value),
        "a list of module names",
    ),
    "base_model_name_or_path": (lambda value: isinstance(value, str), "a string"),
    "warm": (lambda value: isinstance(value, bool), "true or false"),
    "added_at": (lambda value: isinstance(value, str), "a string"),
    "pages": (lambda value: value is None or (type(value) is int and value > 0), "a positive integer or null"),
    "lora_path": (
        lambda value: value is None or _is_inside_repository(value),
        "a path relative to the model repository and inside it, or null",
    ),
}


_TABLE_CHECKS: dict[str, _Check] = {
    "adapters": (lambda value: isinstance(value, dict), "an object"),
    "next_lora_task_id": (lambda value: type(value) is int and 1 <= value <= MAX_TASK_ID + 1, "an integer from 1"),
    "retired_lora_task_ids": (
        lambda value: isinstance(value, list) and all(_is_task_id(task_id) for task_id in value),
        "a list of integers from 1",
    ),
}


def _entry(fields: Mapping[str, Any]) -> AdapterEntry:
    """The entry of checked `fields`; keys that this version does not know are left alone."""
    values: list[Any] = [
        tuple(fields[key]) if type(fields.get(key)) is list else fields.get(key) for key in _FIELD_CHECKS
    ]
    return AdapterEntry(*values)  # _FIELD_CHECKS has the order of the fields


def _entry_problems(fields: object) -> list[str]:
    if not isinstance(fields, dict):
        return ["must be an object"]
    problems = [
        f"{key!r} must be {expected}, got {fields.get(key)!r}"[:300]
        for key, (is_right, expected) in _FIELD_CHECKS.items()
        if not is_right(fields.get(key))
    ]
    if not problems and fields["lora_weights_shape"][0] != fields["lora_config_shape"][0]:
        problems.append("lora_weights_shape and lora_config_shape have different row counts")
    return problems


def _name_problems(name: str) -> list[str]:
    return [] if NAME_PATTERN.fullmatch(name) else [f"the name is not legal; use {NAME_RULE}"]


def _task_id_problems(table: AdapterTable) -> list[str]:
    """Ids that two adapters have, that are retired, or that are still to be given."""
    problems = []
    owners: dict[int, str] = {}
    retired = set(table.retired_lora_task_ids)
    for name, entry in table.entries.items():
        task_id = entry.lora_task_id
        if task_id in owners:
            problems.append(f"adapter {name!r}: lora_task_id {task_id} is also that of adapter {owners[task_id]!r}")
        if task_id in retired:
            problems.append(f"adapter {name!r}: lora_task_id {task_id} is retired")
        if task_id >= table.next_lora_task_id:
            problems.append(
                f"adapter {name!r}: lora_task_id {task_id} is not below next_lora_task_id {table.next_lora_task_id}"
            )
        owners.setdefault(task_id, name)
    return problems
