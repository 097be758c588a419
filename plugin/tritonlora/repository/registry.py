# SPDX-FileCopyrightText: the tritonlora authors
# SPDX-License-Identifier: Apache-2.0
"""Change what is registered: take adapters out, lead aliases to others, keep adapters warm or pinned.

See `add` for the order in which files are written.
"""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass, replace

from tritonlora.errors import RepositoryError
from tritonlora.files import locked
from tritonlora.repository import generated
from tritonlora.repository.add import change
from tritonlora.repository.paths import RESOLVER, Repository
from tritonlora.repository.state import State, read_state
from tritonlora.serving.adapter_table import (
    AdapterEntry,
    AdapterTable,
    adapters_of,
    as_written,
    pins,
    with_alias,
    with_entry,
    without_adapter,
    without_alias,
)
from tritonlora.serving.shares import Shares


@dataclass(frozen=True, slots=True)
class Removed:
    """An adapter or an alias that `remove` took out."""

    name: str
    entry: AdapterEntry | None  # of an adapter; None for an alias
    alias_of: str | Shares | None  # of an alias: its adapter, or its adapters with their shares, which stay


def remove(repository: Repository, *names: str) -> list[Removed]:
    """Take adapters and aliases out of the table and the warmup block, all of them or none. Their ids are retired.

    The adapters' files stay while requests under way may need them; a later command deletes them. Removing an alias
    leaves its adapter alone. AdapterTableError for an unknown name, and for an adapter with an alias that would stay.
    """
    with locked(repository.table_path.parent):
        state = read_state(repository)
        before = table = state.table
        removed = []
        for name in sorted(dict.fromkeys(names), key=lambda name: name not in before.aliases):  # aliases first
            if name in table.aliases:
                removed.append(Removed(name, None, alias_of=as_written(table.aliases[name])))
                table = without_alias(table, name)
            else:
                table, entry = without_adapter(table, name), table.entries.get(name)
                removed.append(Removed(name, entry, alias_of=None))
        files = generated.rendered(state, table) if table.entries != before.entries else None
        generated.sweep(generated.write(state, table, files))
        return removed


@dataclass(frozen=True, slots=True)
class Aliased:
    """The result of `alias`."""

    alias: str
    name: str | Shares  # of the adapter, or the adapters' shares in percent
    before: str | Shares | None  # where the alias led until now


def alias(repository: Repository, alias: str, name: str | Shares) -> Aliased:
    """Make `alias` a second name of an adapter, or lead an existing alias to another adapter, in one step.

    With shares, such as {"pirate-v3": 90, "pirate-v4": 10}, the requests for `alias` are divided between adapters. If
    `name` is an alias, `alias` leads to the adapters that `name` leads to now, and stays there.

    AdapterTableError for an unknown name or wrong shares. RepositoryError when the code that the server runs cannot
    divide requests.
    """
    with locked(repository.table_path.parent):
        state = read_state(repository)
        table = with_alias(state.table, alias, name)
        generated.write(state, table, None)
        before = state.table.aliases.get(alias)
        return Aliased(alias, as_written(table.aliases[alias]), None if before is None else as_written(before))


def keep_warm(repository: Repository, warm: Collection[str]) -> dict[str, bool]:
    """Let the server load these adapters when it starts, and the others on their first request.

    Returns the adapters for which that is new, by name.
    """
    changed: dict[str, bool] = {}

    def then(table: AdapterTable) -> AdapterTable:
        for name, entry in table.entries.items():
            if entry.warm != (name in warm):
                changed[name] = name in warm
                table = with_entry(table, name, replace(entry, warm=name in warm))
        return table

    change(repository, {}, then)
    return changed


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
        if pinned and (problem := pin_problem(state, table)):
            raise RepositoryError(f"cannot pin {', '.join(map(repr, adapters))}: {'; '.join(problem)}")
        if table != state.table:
            generated.write(state, table, None)
        entries = state.table.entries
        return [Pinned(name, pinned, entries[name].pinned, entries[name].pages) for name in adapters]


def pin_problem(state: State, table: AdapterTable) -> tuple[str, str] | None:
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
