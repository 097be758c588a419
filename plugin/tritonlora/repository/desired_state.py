# SPDX-FileCopyrightText: the tritonlora authors
# SPDX-License-Identifier: Apache-2.0
"""The desired state of a repository: a YAML file with its adapters, their sources, and its aliases.

    adapters:
      pirate-v3: adapters/pirate            # a source, as `tritonlora add` takes it
      pirate-v4: {source: hf://org/pirate, warm: false, pinned: true}
      haiku: {}                             # registered already; its content stays as it is
    aliases:
      canary: pirate-v4
      prod: {pirate-v3: 90, pirate-v4: 10}

`parse` takes names as they are written: YAML's own rules would make a number of the name 2024, and a truth value of the
name on. Anchors, tags and names that stand twice are problems. All problems are reported at once, each with its line.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import yaml

from tritonlora.errors import DesiredStateError, one_message
from tritonlora.serving.adapter_table import NAME_PATTERN, NAME_RULE, AdapterTable, as_written
from tritonlora.serving.shares import WHOLE, Shares, problems_of

MOST_BYTES = 4 << 20  # some 40,000 adapters
MOST_PROBLEMS = 50  # that one error names
COMPOSED = "compose:"  # begins the location of an adapter that was made of others, and has no source


@dataclass(frozen=True, slots=True)
class WantedAdapter:
    """One adapter of a desired state."""

    source: str | None = None  # None: the adapter is registered, and its content stays
    warm: bool = True
    pinned: bool = False


@dataclass(frozen=True, slots=True)
class DesiredState:
    """The adapters and aliases that a repository should have, by name."""

    adapters: Mapping[str, WantedAdapter] = field(default_factory=dict)
    aliases: Mapping[str, Shares] = field(default_factory=dict)


def parse(content: bytes) -> DesiredState:
    """The desired state in a YAML file. DesiredStateError with every problem found, a line each."""
    if len(content) > MOST_BYTES:
        raise DesiredStateError(f"it has {len(content)} bytes, and at most {MOST_BYTES} are read; split it")
    reader = _Reader(content)
    state = reader.state()
    if reader.problems:
        lines = [f"line {line}: {problem}" for line, problem in sorted(reader.problems)]
        more = [f"and {len(lines) - MOST_PROBLEMS} more"] if len(lines) > MOST_PROBLEMS else []
        raise DesiredStateError(one_message("it cannot be used", [*lines[:MOST_PROBLEMS], *more]))
    return state


def render(table: AdapterTable) -> str:
    """The YAML file that describes `table`. An adapter whose source is not known has none there."""
    text: str = yaml.safe_dump(document_of(table), sort_keys=False, allow_unicode=True, width=1 << 20)
    return text


def document_of(table: AdapterTable) -> dict[str, Any]:
    """The content of the file that describes `table`."""
    adapters: dict[str, Any] = {}
    for name, entry in sorted(table.entries.items()):
        location = entry.source.location if entry.source else COMPOSED
        source = {} if location.startswith(COMPOSED) else {"source": location}
        flags = {**({} if entry.warm else {"warm": False}), **({"pinned": True} if entry.pinned else {})}
        adapters[name] = location if source and not flags else {**source, **flags}
    aliases = {alias: as_written(shares) for alias, shares in sorted(table.aliases.items())}
    return {"adapters": adapters, **({"aliases": aliases} if aliases else {})}


_NULL = {"", "~", "null", "Null", "NULL"}
_TRUTH = {"true": True, "True": True, "TRUE": True, "false": False, "False": False, "FALSE": False}
_ADAPTER = "a source, or a mapping with source, warm and pinned"
_ALIAS = "the name of an adapter, or a mapping of adapters to percentages"


class _Reader:
    """Reads the events of YAML's parser from the first to the last one, and keeps every problem with its line.

    Events have no depth, and values of another type than the expected one are passed over. So neither deep nesting nor
    anchors that multiply can exhaust the memory.
    """

    def __init__(self, content: bytes) -> None:
        self.problems: list[tuple[int, str]] = []
        self._events = self._read(content)

    def _read(self, content: bytes) -> Iterator[Any]:
        """The events, without those of the stream and of documents. Anchors and tags are noted as problems."""
        documents = 0
        try:
            for event in yaml.parse(content, Loader=getattr(yaml, "CSafeLoader", yaml.SafeLoader)):
                line = event.start_mark.line + 1
                if isinstance(event, yaml.AliasEvent):
                    self.problems.append((line, f"anchors are not taken, got *{event.anchor}; write the value itself"))
                elif getattr(event, "anchor", None):
                    self.problems.append((line, f"anchors are not taken, got &{event.anchor}; write the value itself"))
                if getattr(event, "tag", None):
                    self.problems.append((line, f"tags are not taken, got {event.tag!r}"))
                if isinstance(event, yaml.DocumentStartEvent):
                    documents += 1
                    if documents == 2:
                        self.problems.append((line, "a second document begins; a file has one"))
                        return
                elif isinstance(event, yaml.NodeEvent | yaml.CollectionEndEvent):
                    yield event
        except yaml.MarkedYAMLError as error:
            mark = error.problem_mark or error.context_mark
            self.problems.append((mark.line + 1 if mark else 1, f"it is not YAML: {error.problem or error.context}"))
        except yaml.reader.ReaderError as error:
            line = content[: error.position].count(b"\n") + 1
            self.problems.append((line, f"it is not YAML: {error.reason}, got #x{error.character:02x}"))

    def state(self) -> DesiredState:
        """The whole file."""
        adapters: dict[str, WantedAdapter] = {}
        aliases: dict[str, tuple[int, Shares]] = {}
        sections = set()
        event = next(self._events, None)
        if event is None or (_is_scalar(event) and event.value in _NULL):
            if not self.problems:
                self.problems.append((1, "it is empty; for a repository without adapters write: adapters: {}"))
            return DesiredState()
        for section, line, value in self._pairs(event, "the file", "a mapping with adapters and aliases"):
            sections.add(section)
            if section == "adapters":
                adapters = {
                    name: self._adapter(name, at, one)
                    for name, at, one in self._pairs(value, "adapters", "a mapping of names to sources")
                    if self._is_name(name, at, one)
                }
            elif section == "aliases":
                aliases = {
                    name: (at, self._alias(name, at, one))
                    for name, at, one in self._pairs(value, "aliases", "a mapping of aliases to adapters")
                    if self._is_name(name, at, one)
                }
            else:
                self.problems.append((line, f"{section[:200]!r} is not known; expected adapters or aliases"))
                self._pass_over(value)
        for _ in self._events:
            pass  # notes the problems after the end
        if "adapters" not in sections and not self.problems:
            self.problems.append((1, "adapters is missing; for a repository without adapters write: adapters: {}"))
        self._check_names(adapters, aliases)
        return DesiredState(adapters, {alias: shares for alias, (_, shares) in aliases.items()})

    def _check_names(self, adapters: Mapping[str, WantedAdapter], aliases: Mapping[str, tuple[int, Shares]]) -> None:
        for alias, (line, shares) in aliases.items():
            if alias in adapters:
                self.problems.append((line, f"{alias!r} is the name of an adapter and of an alias"))
            for name in shares:
                if name in aliases:
                    self.problems.append((line, f"alias {alias!r} leads to {name!r}, which is an alias; name adapters"))
                elif name not in adapters:
                    self.problems.append(
                        (line, f"alias {alias!r} leads to {name[:200]!r}, which is not among the adapters of this file")
                    )

    def _adapter(self, name: str, line: int, event: Any) -> WantedAdapter:
        if _is_scalar(event):
            return WantedAdapter(self._source(name, line, event))
        source, flags = None, {"warm": True, "pinned": False}
        for key, at, value in self._pairs(event, f"adapter {name!r}", _ADAPTER):
            if key == "source":
                source = self._source(name, at, value)
            elif key in flags:
                flags[key] = self._truth(f"{key} of adapter {name!r}", at, value)
            else:
                expected = "source, warm or pinned"
                self.problems.append((at, f"adapter {name!r}: {key[:200]!r} is not known; expected {expected}"))
                self._pass_over(value)
        return WantedAdapter(source, **flags)

    def _source(self, name: str, line: int, event: Any) -> str | None:
        if _is_scalar(event) and event.value and not (_is_plain(event) and event.value in _NULL):
            return str(event.value)
        self._expected(f"the source of adapter {name!r}", "a directory or an address", line, event)
        return None

    def _truth(self, what: str, line: int, event: Any) -> bool:
        if _is_scalar(event) and _is_plain(event) and event.value in _TRUTH:
            return _TRUTH[event.value]
        self._expected(what, "true or false", line, event)
        return True

    def _alias(self, alias: str, line: int, event: Any) -> Shares:
        if _is_scalar(event) and event.value not in _NULL:
            return {event.value: WHOLE}
        if not isinstance(event, yaml.MappingStartEvent):
            self._expected(f"alias {alias!r}", _ALIAS, line, event)
            return {}
        shares: dict[str, Any] = {}
        for name, at, value in self._pairs(event, f"alias {alias!r}", _ALIAS):
            if _is_scalar(value) and _is_plain(value) and value.value.isascii() and value.value.isdecimal():
                shares[name] = int(value.value[:9])
            else:
                self._expected(f"the share of {name[:200]!r} in alias {alias!r}", "a whole number", at, value)
                shares[name] = None
        if None not in shares.values():
            self.problems += [
                (line, f"alias {alias!r}: {rule}, got {got!r}"[:300]) for rule, got in problems_of(shares)
            ]
        return shares

    def _is_name(self, name: str, line: int, event: Any) -> bool:
        """Whether a name is legal. If it is not, its value is passed over."""
        if NAME_PATTERN.fullmatch(name):
            return True
        self.problems.append((line, f"{name[:200]!r} is not a legal adapter name; use {NAME_RULE}"))
        self._pass_over(event)
        return False

    def _pairs(self, event: Any, what: str, expected: str) -> Iterator[tuple[str, int, Any]]:
        """(key, its line, the first event of its value) of a mapping. The caller reads the rest of each value."""
        if not isinstance(event, yaml.MappingStartEvent):
            self._expected(what, expected, event.start_mark.line + 1, event)
            return
        seen: dict[str, int] = {}
        for key in self._events:
            if isinstance(key, yaml.MappingEndEvent):
                return
            line = key.start_mark.line + 1
            if not _is_scalar(key):
                self._expected(f"a key of {what}", "a name", line, key)
            value = next(self._events, None)
            if value is None:
                return  # the text breaks off, which is noted
            if not _is_scalar(key):
                self._pass_over(value)
            elif key.value in seen:
                self.problems.append((line, f"{key.value[:200]!r} stands twice; first in line {seen[key.value]}"))
                self._pass_over(value)
            else:
                seen[key.value] = line
                yield key.value, line, value

    def _expected(self, what: str, expected: str, line: int, event: Any) -> None:
        """Note that a value is of another type, and pass over it. An anchor is a problem of its own."""
        if isinstance(event, yaml.MappingStartEvent | yaml.SequenceStartEvent):
            got = "a list" if isinstance(event, yaml.SequenceStartEvent) else "a mapping"
        elif isinstance(event, yaml.AliasEvent):
            return
        else:
            got = "nothing" if event.value in _NULL and _is_plain(event) else repr(event.value[:200])
        self.problems.append((line, f"{what} must be {expected}, got {got}"))
        self._pass_over(event)

    def _pass_over(self, event: Any) -> None:
        """Read the rest of a value of which `event` is the first one."""
        depth = int(isinstance(event, yaml.CollectionStartEvent))
        while depth:
            inner = next(self._events, None)
            if inner is None:
                return
            depth += isinstance(inner, yaml.CollectionStartEvent) - isinstance(inner, yaml.CollectionEndEvent)


def _is_scalar(event: Any) -> bool:
    return isinstance(event, yaml.ScalarEvent)


def _is_plain(event: Any) -> bool:
    """Whether a scalar stands without quotes."""
    return event.style in (None, "")
