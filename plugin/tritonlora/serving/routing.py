# SPDX-FileCopyrightText: the tritonlora authors
# SPDX-License-Identifier: Apache-2.0
"""Resolves the lora_name and lora_task_id of a request to an adapter.

The base model never responds for an adapter: a name or id that does not resolve to an adapter is an error. This module
does not use Triton.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from .adapter_table import NAME_PATTERN, AdapterEntry, AdapterTable, available
from .errors import (
    AdapterUnavailable,
    InvalidRequest,
    UnknownAdapter,
)

# Names and ids of requests


@dataclass(frozen=True, slots=True)
class Route:
    """The adapter that a request (or a row of a batch) means."""

    lora_name: str  # the adapter's own name, even if the request has an alias
    entry: AdapterEntry


def resolve(table: AdapterTable, lora_name: bytes | str | None, lora_task_id: int | None) -> Route | None:
    """The adapter that a request names, by name, id or both; None when it names none, and means the base model.

    UnknownAdapter when no adapter has the name or id. AdapterUnavailable when its entry is malformed. InvalidRequest
    when the name is not a legal name, or when name and id disagree.
    """
    if lora_name is None and lora_task_id is None:
        return None
    if lora_name is None:
        name = table.name_of(lora_task_id) if lora_task_id is not None else None
        if name is None:
            raise UnknownAdapter(f"unknown lora_task_id {lora_task_id}; {available(table)}")
    else:
        asked = _decoded(lora_name)
        name = table.aliases.get(asked, asked)
        if name not in table.entries:
            _check_legal(asked)
            if name in table.unavailable:
                raise malformed(table, name)
            raise UnknownAdapter(f"unknown LoRA adapter {name!r}; {available(table)}")
    entry = table.entries[name]
    if lora_task_id not in (None, entry.lora_task_id):
        raise InvalidRequest(
            f"lora_name {name!r} has lora_task_id {entry.lora_task_id}, but the request says {lora_task_id}; send one"
        )
    return Route(name, entry)


def malformed(table: AdapterTable, name: str) -> AdapterUnavailable:
    """The error for `name`, one of `table.unavailable`. It gives the rules, but no values, which may be paths."""
    rules = "; ".join(problem.rule for problem in table.unavailable[name])
    return AdapterUnavailable(f"LoRA adapter {name!r}: its entry in adapters.json on the server is malformed: {rules}")


def resolve_rows(
    table: AdapterTable, lora_names: Sequence[bytes | str] | None, lora_task_ids: Sequence[int] | None, rows: int
) -> list[Route | None]:
    """`resolve` for each row of a batch. Either all rows name an adapter, or none does.

    InvalidRequest when a batch has some empty names. A client could mean the base model for those rows, which the
    engine's inputs cannot express.
    """
    for tensor, values in (("lora_name", lora_names), ("lora_task_id", lora_task_ids)):
        if values is not None and len(values) != rows:
            raise InvalidRequest(f"{tensor} has {len(values)} elements, expected one for each of the {rows} rows")
    if rows > 1 and lora_names is not None and any(lora_names) and not all(lora_names):
        raise InvalidRequest("the batch mixes rows for the base model and for adapters; send them apart")
    return [
        resolve(table, lora_names[row] if lora_names else None, lora_task_ids[row] if lora_task_ids else None)
        for row in range(rows)
    ]


def _decoded(lora_name: bytes | str) -> str:
    try:
        return lora_name.decode() if isinstance(lora_name, bytes) else lora_name
    except UnicodeDecodeError:
        raise InvalidRequest(f"lora_name is not UTF-8: {lora_name[:100]!r}") from None


def _check_legal(name: str) -> None:
    if not name:
        raise InvalidRequest("lora_name is empty; to ask the base model, leave it out")
    if not NAME_PATTERN.fullmatch(name):
        raise InvalidRequest(f"lora_name {name[:100]!r} is not a legal adapter name")
