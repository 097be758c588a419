# SPDX-FileCopyrightText: the tritonlora authors
# SPDX-License-Identifier: Apache-2.0
"""Make a repository what a desired state says: `plan_sync` finds the differences, and `apply` makes the changes.

An adapter whose source has not changed is not converted again, and keeps its lora_task_id. The table is written once.
A refused adapter does not stop the others. An alias that should lead to it stays as it was.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Mapping
from collections.abc import Set as AbstractSet
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from tritonlora.errors import AdapterTableError, RepositoryError, SourceError, TritonLoraError
from tritonlora.repository.add import DEFAULTS, Added, Incoming, Options, Refused, change
from tritonlora.repository.desired_state import DesiredState, WantedAdapter
from tritonlora.repository.paths import Repository, read_table
from tritonlora.repository.registry import pin_problem
from tritonlora.repository.state import read_state
from tritonlora.serving.adapter_table import (
    AdapterEntry,
    AdapterTable,
    Source,
    as_written,
    with_alias,
    with_entry,
    without_adapter,
    without_alias,
)
from tritonlora.serving.shares import Shares
from tritonlora.sources import fetch
from tritonlora.sources.adapter_files import OnProgress
from tritonlora.sources.location import HUB_NAME
from tritonlora.sources.policy import Policy


@dataclass(frozen=True, slots=True)
class Change:
    """One change that a sync makes."""

    action: str  # "add", "change" or "remove"
    kind: str  # "adapter" or "alias"
    name: str
    before: Any  # where an alias led, or the fields of an adapter that a sync can change; None: there was nothing
    after: Any


@dataclass(frozen=True, slots=True)
class Conversion:
    """An adapter that a sync converts: it is new, or its content may have changed."""

    source: str  # as the file has it; it may hold credentials, and is never printed
    location: str  # the same without credentials
    revision: str | None  # of the source when the plan was made
    warm: bool


@dataclass(frozen=True, slots=True)
class SyncPlan:
    """The differences between a repository and a desired state."""

    before: AdapterTable
    to_convert: Mapping[str, Conversion]
    warm: Mapping[str, bool]  # adapters whose content stays
    pinned: Mapping[str, bool]  # those for which it is new
    sources: Mapping[str, Source]  # adapters whose content stays, and comes from another place now
    aliases: Mapping[str, Shares]
    removed_aliases: tuple[str, ...]
    removed: tuple[str, ...]  # adapters
    unmanaged: tuple[str, ...]  # adapters and aliases that stay, and are not in the desired state
    refused: tuple[Refused, ...] = field(default=())

    def changed(self, name: str, entries: Mapping[str, AdapterEntry]) -> AdapterEntry:
        """The entry of an adapter whose content stays, or was converted, with the other changes of the plan."""
        entry = entries[name]
        return replace(
            entry,
            warm=self.warm.get(name, entry.warm),
            source=self.sources.get(name, entry.source),
            pinned=self.pinned.get(name, entry.pinned),
        )

    def changes(self) -> Iterator[Change]:
        """The changes, in the order in which people read them."""
        entries = self.before.entries
        for name, one in self.to_convert.items():
            after = {
                "source": one.location,
                "revision": one.revision,
                "warm": one.warm,
                "pinned": self.pinned.get(name, name in entries and entries[name].pinned),
            }
            yield Change("change" if name in entries else "add", "adapter", name, _described(entries.get(name)), after)
        for name in sorted({*self.warm, *self.sources, *self.pinned} - self.to_convert.keys()):
            yield Change("change", "adapter", name, _described(entries[name]), _described(self.changed(name, entries)))
        for name in self.removed:
            yield Change("remove", "adapter", name, _described(entries[name]), None)
        for alias, shares in self.aliases.items():
            led = self.before.aliases.get(alias)
            before = None if led is None else as_written(led)
            yield Change("add" if led is None else "change", "alias", alias, before, as_written(shares))
        for alias in self.removed_aliases:
            yield Change("remove", "alias", alias, as_written(self.before.aliases[alias]), None)


def _described(entry: AdapterEntry | None) -> dict[str, Any] | None:
    if entry is None:
        return None
    return {
        "source": entry.source.location if entry.source else None,
        "revision": entry.source.revision if entry.source else None,
        "warm": entry.warm,
        "pinned": entry.pinned,
        "lora_task_id": entry.lora_task_id,
    }


def located(desired: DesiredState, directory: Path) -> DesiredState:
    """`desired`, with relative paths of its sources taken from `directory`."""

    def at(wanted: WantedAdapter) -> WantedAdapter:
        source = wanted.source
        return wanted if source is None or "://" in source else replace(wanted, source=str(directory / source))

    return replace(desired, adapters={name: at(wanted) for name, wanted in desired.adapters.items()})


def plan_sync(
    repository: Repository, desired: DesiredState, policy: Policy = fetch.ALL_ALLOWED, *, prune: bool = False
) -> SyncPlan:
    """The changes that make `repository` what `desired` says. Writes nothing.

    With `prune`, adapters and aliases that `desired` does not have are removed. Sources are asked for their revision;
    directories are read. A source that cannot be reached is in `SyncPlan.refused`.
    """
    table = read_table(repository)
    to_convert: dict[str, Conversion] = {}
    warm, pinned, sources, refused = dict[str, bool](), dict[str, bool](), dict[str, Source](), list[Refused]()
    for name, wanted in desired.adapters.items():
        known = table.entries.get(name)
        try:
            found = _compared(repository, known, wanted, policy)
        except TritonLoraError as error:
            refused.append(Refused(name, str(error)))
            continue
        if wanted.pinned != (known is not None and known.pinned):
            pinned[name] = wanted.pinned
        if isinstance(found, Conversion):
            to_convert[name] = found
            continue
        if found.warm != wanted.warm:
            warm[name] = wanted.warm
        if found is not known and found.source is not None:
            sources[name] = found.source
    aliases = {alias: shares for alias, shares in desired.aliases.items() if table.aliases.get(alias) != shares}
    for alias, problem in _leading_nowhere(aliases, table.entries.keys() | to_convert.keys()):
        refused.append(Refused(alias, str(problem)))
        del aliases[alias]
    other = sorted(table.entries.keys() - desired.adapters.keys())
    other_aliases = sorted(table.aliases.keys() - desired.aliases.keys())
    return SyncPlan(
        table,
        to_convert,
        warm,
        pinned,
        sources,
        aliases,
        tuple(other_aliases) if prune else (),
        tuple(other) if prune else (),
        () if prune else (*other, *other_aliases),
        tuple(refused),
    )


def _leading_nowhere(aliases: Mapping[str, Shares], adapters: AbstractSet[str]) -> list[tuple[str, AdapterTableError]]:
    """The aliases that lead to an adapter which is not among `adapters`, each with the error that says so."""
    missing = {alias: sorted(shares.keys() - adapters) for alias, shares in aliases.items()}
    return [
        (alias, AdapterTableError(f"it leads to {', '.join(map(repr, names))}, which is not registered"))
        for alias, names in missing.items()
        if names
    ]


def _compared(
    repository: Repository, known: AdapterEntry | None, wanted: WantedAdapter, policy: Policy
) -> AdapterEntry | Conversion:
    """The entry `known`, with the source of `wanted`, if its content is that of the source; otherwise a Conversion."""
    if wanted.source is None:
        if known is None:
            raise AdapterTableError("it is not registered, and has no source here; give its source")
        return known
    _check_place(wanted.source)
    location, revision = fetch.resolved(wanted.source, policy)
    conversion = Conversion(wanted.source, location, revision, wanted.warm)
    if known is None or known.source is None:
        return conversion
    if not all((repository.root / file).is_file() for file in known.sha256_by_file):
        return conversion  # `add` writes the files again
    if revision is not None:
        return known if (known.source.location, known.source.revision) == (location, revision) else conversion
    with fetch.fetched(wanted.source, policy) as found:
        if found.source.sha256 != known.source.sha256:
            return conversion
        return known if found.source == known.source else replace(known, source=found.source)


def _check_place(source: str) -> None:
    """Raise SourceError if `source` is a path that leads nowhere, and may be meant as a name on the hub."""
    path = Path(source)
    if "://" not in source and not path.exists():
        name = "/".join(path.parts[-2:])
        hint = f"; for the Hugging Face hub write hf://{name}" if HUB_NAME.fullmatch(name) else ""
        raise SourceError(f"there is nothing at {source!r}{hint}")


def apply(
    repository: Repository,
    plan: SyncPlan,
    options: Options = DEFAULTS,
    policy: Policy = fetch.ALL_ALLOWED,
    on_done: Callable[[Added | Refused], None] = lambda _: None,
    on_progress: OnProgress = fetch.no_progress,
) -> list[Added | Refused]:
    """Make the changes of a plan. Returns what became of each adapter in `plan.to_convert`, and what was refused.

    The table is written once. The warm of `options` is ignored: each adapter has its own.
    """
    refused = list(plan.refused)

    def refuse(name: str, error: TritonLoraError) -> None:
        refused.append(Refused(name, str(error)))
        on_done(refused[-1])

    with contextlib.ExitStack() as stack:
        incoming: dict[str, Incoming] = {}
        for name, one in plan.to_convert.items():
            try:
                found = stack.enter_context(fetch.fetched(one.source, policy, on_progress))
            except TritonLoraError as error:
                refuse(name, error)
            else:
                incoming[name] = Incoming(found, replace(options, warm=one.warm))
        results = change(
            repository,
            incoming,
            lambda table: _without_refused_pins(repository, _with_plan(table, plan, refuse), plan, refuse),
            on_done,
        )
    return [*results, *refused]


def _with_plan(table: AdapterTable, plan: SyncPlan, refuse: Callable[[str, TritonLoraError], None]) -> AdapterTable:
    """`table`, which has the converted adapters already, with all other changes of the plan.

    `refuse` is called for each change that `table` does not allow.
    """
    for name in table.entries.keys() & {*plan.warm, *plan.sources, *plan.pinned}:
        table = with_entry(table, name, plan.changed(name, table.entries))
    aliases = dict(plan.aliases)
    for alias, problem in _leading_nowhere(aliases, table.entries.keys()):
        refuse(alias, problem)
        del aliases[alias]
    # The aliases that are set below no longer lead to the adapters that are removed here.
    for alias in {*plan.removed_aliases, *aliases}:
        table = without_alias(table, alias)
    for name in sorted(table.entries.keys() & plan.removed):
        try:
            table = without_adapter(table, name)
        except AdapterTableError as error:
            refuse(name, error)
    for alias, shares in aliases.items():
        try:
            table = with_alias(table, alias, shares)
        except AdapterTableError as error:
            refuse(alias, error)
    return table


def _without_refused_pins(
    repository: Repository, table: AdapterTable, plan: SyncPlan, refuse: Callable[[str, TritonLoraError], None]
) -> AdapterTable:
    """`table`, in which the adapters that the plan pins are not pinned if the resolver could not keep all of them."""
    new = [name for name, pinned in plan.pinned.items() if pinned and name in table.entries]
    if not new or (problem := pin_problem(read_state(repository), table)) is None:
        return table
    for name in new:
        table = with_entry(table, name, replace(table.entries[name], pinned=False))
        refuse(name, RepositoryError(f"it is not pinned: {'; '.join(problem)}"))
    return table
