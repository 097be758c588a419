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
from .shares import WHOLE, Shares, choose

# Names and ids of requests

SPLIT_KEY = "lora_split_key"  # an optional input: requests with equal keys get the same adapter of an alias


@dataclass(frozen=True, slots=True)
class Route:
    """The adapter that a request (or a row of a batch) means."""

    lora_name: str  # the adapter's own name, even if the request has an alias
    entry: AdapterEntry


def resolve(
    table: AdapterTable, lora_name: bytes | str | None, lora_task_id: int | None, split_key: bytes | None = None
) -> Route | None:
    """The adapter that a request names, by name, id or both; None when it names none, and means the base model.

    If the name is an alias with shares, the adapter is chosen here, by `split_key` or at random. Call this once for a
    request. An id beside the name chooses, too.

    UnknownAdapter when no adapter has the name or id. AdapterUnavailable when its entry is malformed. InvalidRequest
    when the name is not a legal name, when name and id disagree, or when the key is empty.
    """
    if split_key == b"":
        raise InvalidRequest(f"{SPLIT_KEY} is empty; to get one of the adapters at random, leave it out")
    if lora_name is None and lora_task_id is None:
        return None
    if lora_name is None:
        name = table.name_of(lora_task_id) if lora_task_id is not None else None
        if name is None:
            raise UnknownAdapter(f"unknown lora_task_id {lora_task_id}; {available(table)}")
        return Route(name, table.entries[name])
    shares = shares_of(table, lora_name)
    by_id = table.name_of(lora_task_id) if lora_task_id is not None else None
    name = by_id if by_id is not None and by_id in shares else choose(shares, split_key)
    if name not in table.entries:
        raise malformed(table, name)
    entry = table.entries[name]
    if lora_task_id not in (None, entry.lora_task_id):
        raise InvalidRequest(
            f"lora_name {name!r} has lora_task_id {entry.lora_task_id}, but the request says {lora_task_id}; send one"
        )
    return Route(name, entry)


def shares_of(table: AdapterTable, lora_name: bytes | str) -> Shares:
    """The adapters that a name leads to, with their shares. An adapter's own name leads to that adapter.

    UnknownAdapter when no adapter has the name. AdapterUnavailable when its entry is malformed. InvalidRequest when it
    is not a legal name.
    """
    asked = _decoded(lora_name)
    if asked in table.entries:
        return {asked: WHOLE}
    if asked in table.aliases:
        return table.aliases[asked]
    _check_legal(asked)
    if asked in table.unavailable:
        raise malformed(table, asked)
    raise UnknownAdapter(f"unknown LoRA adapter {asked!r}; {available(table)}")


def malformed(table: AdapterTable, name: str) -> AdapterUnavailable:
    """The error for `name`, one of `table.unavailable`. It gives the rules, but no values, which may be paths."""
    rules = "; ".join(problem.rule for problem in table.unavailable[name])
    return AdapterUnavailable(f"LoRA adapter {name!r}: its entry in adapters.json on the server is malformed: {rules}")


def resolve_rows(
    table: AdapterTable,
    lora_names: Sequence[bytes | str] | None,
    lora_task_ids: Sequence[int] | None,
    rows: int,
    split_keys: Sequence[bytes] | None = None,
) -> list[Route | None]:
    """`resolve` for each row of a batch. Either all rows name an adapter, or none does.

    InvalidRequest when a batch has some empty names. A client could mean the base model for those rows, which the
    engine's inputs cannot express.
    """
    for tensor, values in (("lora_name", lora_names), ("lora_task_id", lora_task_ids), (SPLIT_KEY, split_keys)):
        if values is not None and len(values) != rows:
            raise InvalidRequest(f"{tensor} has {len(values)} elements, expected one for each of the {rows} rows")
    if rows > 1 and lora_names is not None and any(lora_names) and not all(lora_names):
        raise InvalidRequest("the batch mixes rows for the base model and for adapters; send them apart")
    return [
        resolve(
            table,
            lora_names[row] if lora_names else None,
            lora_task_ids[row] if lora_task_ids else None,
            split_keys[row] if split_keys else None,
        )
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
