# SPDX-FileCopyrightText: the tritonlora authors
# SPDX-License-Identifier: Apache-2.0
"""Pin adapters: the table notes them, and the resolver keeps them in the engine's LoRA cache.

The pinned adapters must leave capacity for the largest of the others.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

from tritonlora.errors import RepositoryError
from tritonlora.files import locked
from tritonlora.repository import generated
from tritonlora.repository.paths import RESOLVER, Repository
from tritonlora.repository.state import State, read_state
from tritonlora.serving.adapter_table import AdapterTable, adapters_of, pins, with_entry


@dataclass(frozen=True, slots=True)
class Pinned:
    """One adapter of `pin`."""

    name: str
    pinned: bool
    before: bool
    pages: int | None  # of the engine's LoRA cache


def pin(repository: Repository, names: list[str], *, pinned: bool = True) -> list[Pinned]:
    """Pin adapters, or let them go. An alias stands for all adapters that it leads to.

    AdapterTableError for an unknown name. RepositoryError when the resolver could not keep all pinned adapters; nothing
    is changed then.
    """
    with locked(repository.table_path.parent):
        state = read_state(repository)
        table = state.table
        adapters = dict.fromkeys(adapter for name in names for adapter in adapters_of(table, name))
        for name in adapters:
            table = with_entry(table, name, replace(table.entries[name], pinned=pinned))
        if pinned and (problem := problem_of(state, table)):
            raise RepositoryError(f"cannot pin {', '.join(map(repr, adapters))}: {'; '.join(problem)}")
        if table != state.table:
            generated.write(state, table, None)
        entries = state.table.entries
        return [Pinned(name, pinned, entries[name].pinned, entries[name].pages) for name in adapters]


def problem_of(state: State, table: AdapterTable) -> tuple[str, str] | None:
    """Why the resolver cannot keep all pinned adapters of `table`, and a remedy; None if it can."""
    pinned = {name: entry for name, entry in table.entries.items() if entry.pinned}
    if not pinned:
        return None
    if not state.kind.WIRE.sends_weights:
        return (
            "this engine loads adapters by itself, and keeps as many as max_cpu_loras in model.yaml says",
            f"set max_cpu_loras to {len(table.entries)}, which keeps all of them",
        )
    resolver = state.models.present(RESOLVER)
    capacity = int(resolver.parameters.get("cache_pages", "0")) if resolver else 0
    unknown = [name for name, entry in pinned.items() if entry.pages is None]
    if not capacity or unknown:
        what = f"number of pages of {unknown[0]!r}" if capacity else "size of the engine's LoRA cache"
        return f"the {what} is not known", "run tritonlora plan --apply where the engine's config.json is"
    if len(pins(table, capacity)) == len(pinned):
        return None
    pages = sum(entry.pages or 0 for entry in pinned.values())
    largest = max((entry.pages or 0 for entry in table.entries.values() if not entry.pinned), default=0)
    beside = f", and the largest other adapter takes {largest}" if largest else ""
    return (
        f"the {len(pinned)} pinned adapters take {pages} pages of the engine's LoRA cache{beside}; it has {capacity}",
        "let some go, with tritonlora warm NAME --unpin, or enlarge the cache, with tritonlora plan --apply",
    )
