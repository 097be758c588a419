# SPDX-FileCopyrightText: the tritonlora authors
# SPDX-License-Identifier: Apache-2.0
"""The adapter table: which lora_name has which lora_task_id, and where the adapter's tensors lie.

The table is the only thing that preparing and serving share. Its functions take values and return values:
`with_adapter` and the functions like it return a new table. `adapter_table_json` parses and renders it as
adapters.json.

Rule: a lora_task_id is used once, and never again, even after its adapter was removed. The engine ignores new weights
under an id that it has cached (TensorRT-LLM cpp/tensorrt_llm/runtime/loraCache.cpp, `put`). With an id that was used
before, the engine could respond with the adapter that had the id first.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any

from .dtypes import DTYPES
from .errors import AdapterTableError, one_message
from .shares import WHOLE, Shares, problems_of

# An id must fit a signed 32-bit integer: the engine reads the folder names of lora_prefetch_dir into a C int.
MAX_TASK_ID = 2**31 - 1
NAME_PATTERN = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,127}")
NAME_RULE = "letters, digits, '.', '_' and '-', at most 128, the first a letter or a digit"


@dataclass(frozen=True, slots=True)
class Source:
    """Where an adapter came from. Commands read it; a server does not."""

    location: str  # as `tritonlora add` takes it, without credentials; or "compose:a=0.7,b=0.3"
    revision: str | None  # the source's own name for the content: a commit, a version, an ETag; None: it has none
    sha256: str  # over the names and contents of the adapter's files, wherever they came from


@dataclass(frozen=True, slots=True)
class AdapterEntry:
    """One registered adapter. File names are relative to the model repository, in POSIX form."""

    lora_task_id: int
    lora_weights_file: str
    lora_config_file: str
    dtype: str  # of lora_weights: one of LORA_DTYPES
    lora_weights_shape: tuple[int, int]  # (n, W)
    lora_config_shape: tuple[int, int]  # (n, 3), or (n, 4) with DoRA
    lora_weights_sha256: str
    lora_config_sha256: str
    adapter_sizes: tuple[int, ...]  # the distinct ranks, ascending
    modules: tuple[str, ...]  # TensorRT-LLM's names
    base_model_name_or_path: str
    warm: bool  # loaded by the engine's model_warmup
    added_at: str  # ISO 8601, UTC
    pages: int | None = None  # that it takes in the engine's LoRA cache; None: the engine was not known
    lora_path: str | None = None  # the directory of both files, for a target that reads it by itself
    remarks: tuple[str, ...] = ()  # of `add`, on layers that adapter_config.json targets and that have no tensors
    source: Source | None = None  # None: not known, as for an adapter that version 0.2 or an older one added
    pinned: bool = False  # the resolver keeps it in the engine, see `pins`

    @property
    def lora_weights_nbytes(self) -> int:
        """Bytes of lora_weights."""
        n, width = self.lora_weights_shape
        return n * width * DTYPES[self.dtype].itemsize

    @property
    def lora_config_nbytes(self) -> int:
        """Bytes of lora_config (int32)."""
        n, columns = self.lora_config_shape
        return n * columns * 4

    @property
    def sha256_by_file(self) -> dict[str, str]:
        """The registered SHA-256 of each of the two files."""
        return {self.lora_weights_file: self.lora_weights_sha256, self.lora_config_file: self.lora_config_sha256}


@dataclass(frozen=True, slots=True)
class Problem:
    """One problem of an entry of the table."""

    rule: str  # what the value must be
    got: str = ""  # the value, which clients must not see: it may be a path

    def __str__(self) -> str:
        """The rule and the value, at most 300 characters."""
        return f"{self.rule}, got {self.got}"[:300] if self.got else self.rule


@dataclass(frozen=True, slots=True)
class AdapterTable:
    """All registered adapters of a model repository, by lora_name. Adapters and aliases share one namespace."""

    entries: Mapping[str, AdapterEntry] = field(default_factory=dict)
    next_lora_task_id: int = 1
    retired_lora_task_ids: tuple[int, ...] = ()
    aliases: Mapping[str, Shares] = field(default_factory=dict)  # alias -> its adapters; most aliases have one
    unavailable: Mapping[str, tuple[Problem, ...]] = field(default_factory=dict)  # malformed adapters and aliases
    names: tuple[str, ...] = field(init=False, repr=False, compare=False)  # what a client may ask for, sorted
    _names_by_id: Mapping[int, str] = field(init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        """Index the names, so that the time of a look-up does not grow with the table."""
        names = {entry.lora_task_id: name for name, entry in self.entries.items()}
        object.__setattr__(self, "_names_by_id", names)
        aliases = [alias for alias, shares in self.aliases.items() if not self.entries.keys().isdisjoint(shares)]
        object.__setattr__(self, "names", tuple(sorted([*self.entries, *aliases])))

    def name_of(self, lora_task_id: int) -> str | None:
        """The lora_name that has this id, or None."""
        return self._names_by_id.get(lora_task_id)

    def aliases_by_name(self) -> dict[str, dict[str, int]]:
        """The aliases, sorted, of each adapter that has any, with the share of their requests that the adapter gets."""
        found: dict[str, dict[str, int]] = {}
        for alias, shares in sorted(self.aliases.items()):
            for name, share in shares.items():
                found.setdefault(name, {})[alias] = share
        return found


def pins(table: AdapterTable, capacity: int) -> dict[int, int]:
    """lora_task_id -> pages of the pinned adapters that the resolver keeps in an engine's cache of `capacity` pages.

    The largest of the other adapters fits beside them. If not all pinned adapters leave that capacity, those with the
    smallest ids are kept. If the capacity or an adapter's pages are not known, none is.
    """
    if not capacity or any(entry.pages is None for entry in table.entries.values() if entry.pinned):
        return {}
    left = capacity - max((entry.pages or 0 for entry in table.entries.values() if not entry.pinned), default=0)
    kept = {}
    for entry in sorted(table.entries.values(), key=lambda entry: entry.lora_task_id):
        if entry.pinned and entry.pages is not None and entry.pages <= left:
            kept[entry.lora_task_id] = entry.pages
            left -= entry.pages
    return kept


def check_name(name: str) -> None:
    """Raise AdapterTableError unless `name` is a legal lora_name."""
    if not NAME_PATTERN.fullmatch(name):
        raise AdapterTableError(f"{name[:200]!r} is not a legal adapter name; use {NAME_RULE}")


def with_adapter(table: AdapterTable, name: str, entry: AdapterEntry) -> AdapterTable:
    """`table` with `entry` under `name`. An entry that `name` had before is replaced, and its id is retired.

    AdapterTableError when `name` is not legal or is an alias, or when the id was ever used before or is out of range.
    """
    check_name(name)
    if name in table.aliases:
        raise AdapterTableError(
            f"{name!r} is an alias of adapter {' and '.join(map(repr, table.aliases[name]))}; use another name, or "
            f"remove the alias with: tritonlora remove {name}"
        )
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
    return replace(
        table,
        entries={**table.entries, name: entry},
        next_lora_task_id=max(table.next_lora_task_id, task_id + 1),
        retired_lora_task_ids=_retired(table, name),
    )


def with_entry(table: AdapterTable, name: str, entry: AdapterEntry) -> AdapterTable:
    """`table` with another entry of the registered adapter `name`, whose lora_task_id stays."""
    return replace(table, entries={**table.entries, name: entry})


def without_adapter(table: AdapterTable, name: str) -> AdapterTable:
    """`table` without the adapter `name`, whose id is retired.

    AdapterTableError when no such adapter is registered, or when aliases lead to it.
    """
    if name not in table.entries:
        raise AdapterTableError(f"no adapter {name!r} is registered; {available(table)}")
    if aliases := [*table.aliases_by_name().get(name, ())]:
        raise AdapterTableError(
            f"adapter {name!r} has aliases: {', '.join(aliases)}; lead them to another adapter first, with: "
            f"tritonlora alias {aliases[0]} OTHER, or remove them, with: tritonlora remove {aliases[0]}"
        )
    return replace(
        table,
        entries={other: entry for other, entry in table.entries.items() if other != name},
        retired_lora_task_ids=_retired(table, name),
    )


def _retired(table: AdapterTable, name: str) -> tuple[int, ...]:
    """The retired ids, with the id that `name` has now, if it has one."""
    known = table.entries.get(name)
    return tuple(sorted({*table.retired_lora_task_ids, *([known.lora_task_id] if known else [])}))


def with_alias(table: AdapterTable, alias: str, to: str | Shares) -> AdapterTable:
    """`table` with `alias` leading to one adapter, or divided between several adapters by shares.

    If `to` is an alias, `alias` leads to the same adapters with the same shares. A name in shares may be an alias of
    one adapter, which then gets the share.

    AdapterTableError, with every problem found, when `alias` is not legal or is an adapter, when no adapter of such a
    name is registered, or when shares are not whole percents that add up to 100.
    """
    check_name(alias)
    if alias in table.entries:
        raise AdapterTableError(f"{alias!r} is an adapter; an alias needs a name of its own")
    if isinstance(to, str):
        return replace(table, aliases={**table.aliases, alias: adapters_of(table, to)})
    problems = [str(Problem(rule, repr(got))) for rule, got in problems_of(to)]
    shares: dict[str, int] = {}
    for name, share in to.items():
        try:
            adapter, *others = adapters_of(table, name)
        except AdapterTableError as error:
            problems.append(str(error))
            continue
        if others:
            problems.append(f"{name!r} is divided between adapters itself; name adapters")
        elif adapter in shares:
            problems.append(f"adapter {adapter!r} is named twice")
        shares[adapter] = share
    if problems:
        raise AdapterTableError(one_message(f"cannot divide {alias!r}", problems))
    return replace(table, aliases={**table.aliases, alias: shares})


def adapters_of(table: AdapterTable, name: str) -> Shares:
    """The adapters that a name leads to. AdapterTableError when it is neither an adapter nor an alias."""
    shares = table.aliases.get(name, {name: WHOLE})
    for adapter in shares:
        if adapter not in table.entries:
            raise AdapterTableError(f"no adapter {adapter!r} is registered; {available(table)}")
    return shares


def as_written(shares: Shares) -> str | dict[str, int]:
    """Shares as files and outputs have them: the name alone if there is only one adapter."""
    return next(iter(shares)) if len(shares) == 1 else dict(sorted(shares.items()))


def described_aliases(aliases: Mapping[str, int]) -> dict[str, Any]:
    """The fields `aliases` and `shares` of a listed adapter. `shares` has the aliases that lead to other adapters, too.

    `aliases` is the adapter's part of `AdapterTable.aliases_by_name`.
    """
    return {"aliases": [*aliases], "shares": {alias: share for alias, share in aliases.items() if share != WHOLE}}


def without_alias(table: AdapterTable, alias: str) -> AdapterTable:
    """`table` without this alias; its adapters stay."""
    return replace(table, aliases={other: shares for other, shares in table.aliases.items() if other != alias})


def available(table: AdapterTable, most: int = 20) -> str:
    """'available: a, b, c', with at most `most` names and the number of the others."""
    if not table.names:
        return "no adapter is registered"
    more = f" and {len(table.names) - most} more" if len(table.names) > most else ""
    return f"available: {', '.join(table.names[:most])}{more}"
