# SPDX-FileCopyrightText: the tritonlora authors
# SPDX-License-Identifier: Apache-2.0
"""The text of adapters.json: `parse` reads it into a table, and `render` writes a table as such a text.

Commands read the table with `parse`, which refuses a text with any malformed entry. Otherwise a command would lose that
entry when it writes the table back. The router reads the table with `parse_sound`: an adapter whose own entry is
malformed is unavailable, and the others are served.
"""

from __future__ import annotations

import contextlib
import gc
import json
import re
from collections import Counter
from collections.abc import Callable, Collection, Iterator, Mapping
from dataclasses import asdict
from datetime import datetime
from typing import Any

from .adapter_table import (
    MAX_TASK_ID,
    NAME_PATTERN,
    NAME_RULE,
    AdapterEntry,
    AdapterTable,
    Problem,
    Source,
    as_written,
)
from .dtypes import LORA_DTYPES
from .errors import AdapterTableError, one_message
from .shares import WHOLE, Shares, problems_of

MAX_PAGES = 1 << 31  # TensorRT-LLM counts pages in 32 bits
# Version 2 added aliases, and version 3 the shares of aliases. A table is written with the lowest version that can hold
# it, so that older code reads it.
SCHEMA_VERSIONS = (1, 2, 3)
REPAIR = "put this right by hand, or put the file back from a backup"
_MALFORMED = f"adapters.json is malformed; {REPAIR}"


def schema_version_of(table: AdapterTable) -> int:
    """The schema_version with which `render` writes `table`."""
    return max((3 if len(shares) > 1 else 2 for shares in table.aliases.values()), default=1)


def render(table: AdapterTable) -> str:
    """The text of adapters.json, with one line for each adapter.

    ValueError when adapters or aliases of `table` are unavailable: their entries would be lost.
    """
    if table.unavailable:
        raise ValueError("the table lacks the adapters that are unavailable; writing it would lose them")
    aliases = {alias: as_written(shares) for alias, shares in sorted(table.aliases.items())}
    document = {
        "schema_version": schema_version_of(table),
        "next_lora_task_id": table.next_lora_task_id,
        "retired_lora_task_ids": list(table.retired_lora_task_ids),
        **({"aliases": aliases} if aliases else {}),
    }
    head = ",\n".join(f"  {json.dumps(key)}: {json.dumps(value)}" for key, value in document.items())
    entries = (f"    {json.dumps(name)}: {json.dumps(asdict(entry))}" for name, entry in sorted(table.entries.items()))
    return f"{{\n{head},{_BEGIN}{_BETWEEN.join(entries)}{_END}\n"


def parse(text: str) -> AdapterTable:
    """The table in the text of adapters.json; AdapterTableError with every problem found."""
    table = parse_sound(text)
    if table.unavailable:
        raise AdapterTableError(one_message(_MALFORMED, unavailable(table)))
    return table


def unavailable(table: AdapterTable) -> Iterator[str]:
    """One line for each problem of the adapters and aliases that cannot be served."""
    return (f"adapter {name[:200]!r}: {problem}" for name, found in table.unavailable.items() for problem in found)


def parse_sound(text: str) -> AdapterTable:
    """The table of the adapters and aliases that are sound. The others are in `AdapterTable.unavailable`.

    AdapterTableError, with every problem found, when nothing in the table can be trusted:

    - The text is not JSON, or has another schema_version.
    - The table's own fields are malformed.
    - An id belongs to two adapters, is retired, or is not below next_lora_task_id.
    - A name belongs to an adapter and to an alias.
    """
    with _without_collections():
        document = _document(text)
        return _table(document, *_entries(document["adapters"]))


class TableReader:
    """Reads a changing adapters.json as `parse_sound` does, and parses only the lines that are new.

    This is for a table of thousands of adapters of which one has changed. Each line must be one adapter, which the
    reader checks: the text without the lines must be a table without adapters, and each line in braces must be an
    object with one member. A text with another layout than that of `render` is parsed as a whole.

    With 10,000 adapters, a change takes 0.08 s, and json with the same checks 0.7 s (two busy cores). Every request of
    the process waits for that time, so this reader is kept beside json.
    """

    def __init__(self) -> None:
        """Start without known lines."""
        self._known: dict[str, tuple[str, AdapterEntry]] = {}  # line -> (lora_name, entry)

    def read(self, text: str) -> AdapterTable:
        """The table in `text`; raises what `parse_sound` raises."""
        with _without_collections():
            try:
                return self._read_lines(text)
            except (ValueError, RecursionError):
                return parse_sound(text)

    def _read_lines(self, text: str) -> AdapterTable:
        """The table; ValueError when the text has not one line for each adapter."""
        head, begin, rest = text.partition(_BEGIN)
        body, end, tail = rest.rpartition(_END)
        document = _object(head + begin + end + tail)
        lines = body.split(_BETWEEN)
        new = {line: _member(line) for line in lines if line not in self._known}
        entries, problems = _entries(dict(new.values()))
        known = self._known | {line: (name, entries[name]) for line, (name, _) in new.items() if name in entries}
        known = {line: known[line] for line in lines if line in known}
        entries = dict(known.values())
        if len(entries.keys() | problems.keys()) != len(lines):
            raise ValueError("a name stands twice")
        self._known = known
        return _table(_checked(document), entries, problems)


_BEGIN = '\n  "adapters": {\n'
_BETWEEN = ",\n"
_END = "\n  }\n}"


def _member(line: str) -> tuple[str, Any]:
    """The lora_name and the fields in one line; ValueError when the line is not exactly one member of an object."""
    ((name, fields),) = _object(f"{{{line}}}").items()
    return name, fields


def _table(
    document: Mapping[str, Any], entries: Mapping[str, AdapterEntry], problems: dict[str, list[Problem]]
) -> AdapterTable:
    """The table with its aliases; AdapterTableError when an id or a name is ambiguous."""
    aliases: dict[str, Shares] = {}
    adapters = entries.keys() | problems.keys()
    asked = document.get("aliases") or {}
    both = [f"{name[:200]!r} is the name of an adapter and of an alias" for name in sorted(adapters & asked.keys())]
    for alias, to in asked.items():
        if found := _alias_problems(alias, to, adapters):
            problems[alias] = found
        else:
            aliases[alias] = {to: WHOLE} if isinstance(to, str) else to
    table = AdapterTable(
        entries,
        document["next_lora_task_id"],
        tuple(document["retired_lora_task_ids"]),
        aliases,
        {name: tuple(found) for name, found in problems.items()},
    )
    if wrong := [*_task_id_problems(table), *both]:
        raise AdapterTableError(one_message(_MALFORMED, [*unavailable(table), *wrong]))
    return table


@contextlib.contextmanager
def _without_collections() -> Iterator[None]:
    """Turn the garbage collector off. Its passes over a growing table take a fifth of the parsing time."""
    was_enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if was_enabled:
            gc.enable()


def _document(text: str) -> dict[str, Any]:
    """The JSON object in `text`, checked by `_checked`; AdapterTableError when it is not JSON."""
    try:
        document = _object(text)
    except (ValueError, RecursionError) as error:
        raise AdapterTableError(f"adapters.json is not JSON: {error}; {REPAIR}") from None
    return _checked(document)


def _object(text: str) -> Any:
    return json.loads(text, object_pairs_hook=_no_duplicates)


def _checked(document: Any) -> dict[str, Any]:
    """`document`, once the table's own fields were checked; AdapterTableError with every problem found."""
    if not isinstance(document, dict):
        raise AdapterTableError(f"adapters.json must hold an object; {REPAIR}")
    version = document.get("schema_version")
    if version not in SCHEMA_VERSIONS:
        raise AdapterTableError(
            f"adapters.json has schema_version {version!r}, expected {' or '.join(map(str, SCHEMA_VERSIONS))}; "
            "if a newer tritonlora wrote it, run init of that version on the repository, and start the server again; "
            f"otherwise {REPAIR}"
        )
    problems = [
        f"{key!r} must be {expected}, got {document.get(key)!r}"[:300]
        for key, (is_right, expected) in _TABLE_CHECKS.items()
        if not is_right(document.get(key))
    ]
    if problems:
        raise AdapterTableError(one_message(_MALFORMED, problems))
    return document


def _no_duplicates(pairs: list[tuple[str, object]]) -> dict[str, object]:
    document = dict(pairs)
    if len(document) != len(pairs):
        twice = min(key for key, count in Counter(key for key, _ in pairs).items() if count > 1)
        raise ValueError(f"{twice!r} stands twice in one object")
    return document


_DIGEST = re.compile(r"[0-9a-f]{64}")


def _is_task_id(value: object) -> bool:
    return type(value) is int and 1 <= value <= MAX_TASK_ID


def _is_shape(value: object) -> bool:
    return type(value) is list and list(map(type, value)) == [int, int] and min(value) > 0


def _is_text(value: object) -> bool:
    """Whether `value` is a string that can be encoded: JSON escapes can spell lone surrogates, which UTF-8 cannot."""
    return isinstance(value, str) and (value.isascii() or not any("\ud800" <= one <= "\udfff" for one in value))


def _is_digest(value: object) -> bool:
    return isinstance(value, str) and _DIGEST.fullmatch(value) is not None


def _is_time(value: object) -> bool:
    try:
        return isinstance(value, str) and bool(datetime.fromisoformat(value))
    except ValueError:
        return False


def _is_source(value: object) -> bool:
    """Whether `value` is the object of a Source. Keys that this version does not know are ignored."""
    if not isinstance(value, dict) or not value.get("location") or not _is_digest(value.get("sha256")):
        return False
    return _is_text(value["location"]) and (value.get("revision") is None or _is_text(value["revision"]))


def _source(value: Any) -> Source | None:
    return Source(value["location"], value.get("revision"), value["sha256"]) if _is_source(value) else None


def _is_inside_repository(value: object) -> bool:
    if not _is_text(value) or not isinstance(value, str) or not value or "\\" in value or "\0" in value:
        return False
    return not value.startswith("/") and (".." not in value or ".." not in value.split("/"))


_Check = tuple[Callable[[Any], bool], str]  # whether a value is right, and what was expected
_FIELD_CHECKS: dict[str, _Check] = {
    "lora_task_id": (_is_task_id, "an integer from 1"),
    "lora_weights_file": (_is_inside_repository, "a path relative to the model repository and inside it"),
    "lora_config_file": (_is_inside_repository, "a path relative to the model repository and inside it"),
    "dtype": (lambda value: value in LORA_DTYPES, f"one of {', '.join(LORA_DTYPES)}"),
    "lora_weights_shape": (_is_shape, "two positive integers"),
    "lora_config_shape": (lambda value: _is_shape(value) and value[1] in (3, 4), "[n, 3] or [n, 4]"),
    "lora_weights_sha256": (_is_digest, "64 lowercase hexadecimal digits"),
    "lora_config_sha256": (_is_digest, "64 lowercase hexadecimal digits"),
    "adapter_sizes": (
        lambda value: type(value) is list and {*map(type, value)} <= {int} and min(value, default=1) > 0,
        "a list of positive integers",
    ),
    "modules": (
        lambda value: type(value) is list and all(map(_is_text, value)),
        "a list of module names",
    ),
    "base_model_name_or_path": (_is_text, "a string"),
    "warm": (lambda value: isinstance(value, bool), "true or false"),
    "added_at": (_is_time, "a time in ISO 8601"),
    "pages": (
        lambda value: value is None or (type(value) is int and 0 < value <= MAX_PAGES),
        f"an integer from 1 to {MAX_PAGES}, or null",
    ),
    "lora_path": (
        lambda value: value is None or _is_inside_repository(value),
        "a path relative to the model repository and inside it, or null",
    ),
    # Absent before version 0.2.
    "remarks": (
        lambda value: value is None or (type(value) is list and all(map(_is_text, value))),
        "a list of sentences, or null",
    ),
    "source": (
        lambda value: value is None or _is_source(value),
        "an object with location, revision and sha256, or null",
    ),
    "pinned": (lambda value: value is None or isinstance(value, bool), "true or false"),
}


_LISTS = ("lora_weights_shape", "lora_config_shape", "adapter_sizes", "modules", "remarks")
_ILLEGAL_NAME = Problem(f"the name is not legal; use {NAME_RULE}")

_TABLE_CHECKS: dict[str, _Check] = {
    "aliases": (lambda value: value is None or isinstance(value, dict), "an object"),
    "adapters": (lambda value: isinstance(value, dict), "an object"),
    "next_lora_task_id": (lambda value: type(value) is int and 1 <= value <= MAX_TASK_ID + 1, "an integer from 1"),
    "retired_lora_task_ids": (
        lambda value: isinstance(value, list) and all(_is_task_id(task_id) for task_id in value),
        "a list of integers from 1",
    ),
}


def _entries(adapters: Mapping[str, Any]) -> tuple[dict[str, AdapterEntry], dict[str, list[Problem]]]:
    """The sound entries, and the problems of the others. Keys that this version does not know are ignored.

    Each field is checked for all adapters at a time. This takes half as long as checking adapter by adapter.
    """
    problems: dict[str, list[Problem]] = {}
    objects = {name: fields for name, fields in adapters.items() if isinstance(fields, dict)}
    columns: dict[str, list[Any]] = {key: [fields.get(key) for fields in objects.values()] for key in _FIELD_CHECKS}
    for key, (is_right, expected) in _FIELD_CHECKS.items():
        if not all(map(is_right, columns[key])):
            for name, value in zip(objects, columns[key], strict=True):
                if not is_right(value):
                    problems.setdefault(name, []).append(Problem(f"{key!r} must be {expected}", repr(value)))
    for name, weights, config in zip(objects, columns["lora_weights_shape"], columns["lora_config_shape"], strict=True):
        if name not in problems and weights[0] != config[0]:
            problems[name] = [Problem("lora_weights_shape and lora_config_shape have different row counts")]
    for name, fields in adapters.items():
        if not NAME_PATTERN.fullmatch(name):
            problems.setdefault(name, []).append(_ILLEGAL_NAME)
        if not isinstance(fields, dict):
            problems.setdefault(name, []).append(Problem("it must be an object", repr(fields)))
    for key in _LISTS:
        columns[key] = [tuple(value) if type(value) is list else value for value in columns[key]]
    columns["remarks"] = [() if value is None else value for value in columns["remarks"]]
    columns["source"] = [*map(_source, columns["source"])]
    columns["pinned"] = [*map(bool, columns["pinned"])]
    entries = map(AdapterEntry, *columns.values())  # _FIELD_CHECKS has the order of AdapterEntry's fields
    return {name: entry for name, entry in zip(objects, entries, strict=True) if name not in problems}, problems


def _alias_problems(alias: str, to: object, adapters: Collection[str]) -> list[Problem]:
    if not NAME_PATTERN.fullmatch(alias):
        return [_ILLEGAL_NAME]
    if not isinstance(to, (str, dict)):
        return [Problem("it must be the name of an adapter, or an object of shares", repr(to))]
    problems = [] if isinstance(to, str) else [Problem(rule, repr(got)) for rule, got in problems_of(to)]
    unknown = [name for name in ([to] if isinstance(to, str) else to) if name not in adapters]
    return problems + [Problem(f"it is an alias of {name[:200]!r}, which is not registered") for name in unknown]


def _task_id_problems(table: AdapterTable) -> list[str]:
    """One line for each id that two adapters have, that is retired, or that is not below next_lora_task_id."""
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
