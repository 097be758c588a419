# SPDX-FileCopyrightText: the tritonlora authors
# SPDX-License-Identifier: Apache-2.0
"""Which adapter a request means.

The base model never answers for an adapter: what is not resolved to an adapter is an error. Nothing here knows Triton.

This file runs inside a plain Triton container: standard library only.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from tritonlora.adapters import NAME_PATTERN, AdapterEntry, AdapterTable, available
from tritonlora.adapters_json import TableReader, unavailable
from tritonlora.errors import (
    AdapterTableError,
    AdapterUnavailable,
    ConfigError,
    InvalidRequest,
    UnknownAdapter,
    one_message,
)
from tritonlora.versions import is_settled, open_file, version_of

MOST_REPORTED = 20  # malformed entries in one log entry

# Which adapter


@dataclass(frozen=True, slots=True)
class Route:
    """The adapter that a request (or a row of a batch) means."""

    lora_name: str  # the adapter's own, also where the request says an alias of it
    entry: AdapterEntry


def resolve(table: AdapterTable, lora_name: bytes | str | None, lora_task_id: int | None) -> Route | None:
    """The adapter that a request names, by name, id or both; None when it names none: the base model.

    UnknownAdapter when nothing is registered under it; AdapterUnavailable when what is registered is malformed;
    InvalidRequest when it cannot be a name, or when name and id disagree.
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
    """Why `name`, one of `table.unavailable`, cannot be served: what its entry must be. What it is may be a path."""
    rules = "; ".join(problem.rule for problem in table.unavailable[name])
    return AdapterUnavailable(f"LoRA adapter {name!r}: its entry in adapters.json on the server is malformed: {rules}")


def resolve_rows(
    table: AdapterTable, lora_names: Sequence[bytes | str] | None, lora_task_ids: Sequence[int] | None, rows: int
) -> list[Route | None]:
    """`resolve` for each row of a batch; all rows name an adapter, or none does.

    In a batch an empty name is how a client would say "base model" for one row; the engine's inputs cannot say that,
    so such a batch is InvalidRequest.
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


# A request's parameters

# By these names other servers are told of an adapter: lora_name (Triton's vLLM backend), lora_request (the servers of
# TensorRT-LLM and vLLM), adapter_id and merged_adapters (TGI, LoRAX), lora_path (SGLang), lora (llama.cpp). One of the
# name's words begins with "lora" or "adapter".
_MEANS_AN_ADAPTER = re.compile(r"(?i:(?:^|[^a-z])(?:lora|adapter))|(?<=[a-z])(?:Lo[Rr][Aa]|LORA|Adapter)")
# OpenAI's `model` may be the base model's name, which nobody knows here. In lower case.
_MAY_NAME_AN_ADAPTER = frozenset({"model", "model_name"})
_QUOTED = re.compile(r"""["']([\w-]+)["']""")
MOST_JSON_CHARACTERS = 1 << 18  # in the parameters of a request


class ParametersOfRequest(Protocol):
    """A request of Triton's Python backend. Each of these raises UnicodeDecodeError for what is no UTF-8."""

    def request_id(self) -> str: ...
    def correlation_id(self) -> int | str: ...
    def parameters(self) -> str: ...


def parameters_of(request: ParametersOfRequest) -> dict[str, Any]:
    """A request's parameters. InvalidRequest when these, or its ids, are not UTF-8: nothing can be passed on then."""
    for what, read in (("id", request.request_id), ("correlation id", request.correlation_id)):
        try:
            read()
        except UnicodeDecodeError:
            raise InvalidRequest(f"the request's {what} is not UTF-8") from None
    try:
        text = request.parameters()
        parameters: dict[str, Any] = {} if text in {"", "{}"} else json.loads(text)
    except ValueError:
        raise InvalidRequest("the request's parameters are not UTF-8, or cannot be read") from None
    return parameters


def check_parameters(table: AdapterTable, parameters: Mapping[str, object]) -> None:
    """InvalidRequest when a parameter of a request means an adapter: by its name, in capitals or not, or because it is
    `model` and an adapter's name; or when it is JSON, as Triton's vLLM backend takes sampling_parameters, and something
    in it does.

    Triton's generate extension makes a parameter of whatever it knows no input for, a misspelt lora_name among it, and
    other servers take parameters: the base model must not answer for these. Nor is it for clients to choose what only
    the router sends.
    """
    found = _Parameters(table)
    if names := sorted(name for name, value in parameters.items() if found.means_an_adapter(name, value)):
        raise InvalidRequest(f"{', '.join(names)}: not taken as a parameter; name the adapter with the input lora_name")


class _Parameters:
    """Looks through the parameters of one request, of which a bounded number of characters is read as JSON."""

    def __init__(self, table: AdapterTable) -> None:
        self._known = (table.entries, table.aliases, table.unavailable)
        self._unread = MOST_JSON_CHARACTERS

    def means_an_adapter(self, name: str, value: object) -> bool:
        """Whether the parameter, or something in it, means an adapter. Elements of a list have the list's name."""
        left = [(name, value)]
        while left:
            key, value = left.pop()
            if value is not None and _MEANS_AN_ADAPTER.search(key):
                return True
            if isinstance(value, str):
                if key.casefold() in _MAY_NAME_AN_ADAPTER and any(value in known for known in self._known):
                    return True
                if value.lstrip().startswith(("{", "[")):
                    value = self._read(name, value)
            if isinstance(value, dict):
                left += value.items()
            elif isinstance(value, list):
                left += [(key, element) for element in value]
        return False

    def _read(self, name: str, text: str) -> object:
        """What a text that begins like JSON says. Where it is not JSON, every word in quotes may be a name in it."""
        self._unread -= len(text)
        if self._unread < 0:
            most = f"{MOST_JSON_CHARACTERS} characters of JSON are read in the parameters of a request"
            raise InvalidRequest(f"{name}: at most {most}; send less")
        try:
            return json.loads(text, parse_int=str, parse_float=str)  # to make numbers of them takes far longer
        except (ValueError, RecursionError):
            return dict.fromkeys(_QUOTED.findall(text), True)


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


# Why no model that adapters depend on has a response_cache.
CACHED = (
    "Triton's response cache keeps an error as an empty success, and gives what an adapter said also when it was "
    "replaced or removed"
)


def check_config(config: Mapping[str, Any]) -> None:
    """ConfigError when Triton's response cache is on for a model of ours, whose config.pbtxt Triton has as `config`."""
    if config.get("response_cache", {}).get("enable"):
        raise ConfigError(f"response_cache is on in the config.pbtxt of {config['name']}; take it out: {CACHED}")


def warmed(table: AdapterTable) -> dict[int, int]:
    """Pages of the adapters that the engine is started with, by lora_task_id, in the order in which it loads them."""
    return {entry.lora_task_id: entry.pages or 1 for entry in table.entries.values() if entry.warm}


class TableFile:
    """adapters.json as it is on disk now, but for adapters whose own entry is malformed: these are unavailable.

    Of what it said before nothing is kept: every process that reads it comes to the same table.

    A file that is malformed as a whole, or has vanished, leaves the last good table in place.
    """

    def __init__(self, path: Path, on_failure: Callable[[str], None]) -> None:
        """Read the table; AdapterTableError when there is no good one to begin with.

        `on_failure` is told once of what is wrong, when it comes up.
        """
        self._path = path
        self._name = str(path)
        self._on_failure = on_failure
        self._version: object = None
        self._failure = ""
        self._reported: set[str] = set()
        self._reader = TableReader()
        self._digest = b""  # of the text that the table was made of
        self._table = AdapterTable()
        self._read()

    def table(self) -> AdapterTable:
        """The table; read again when the file has changed since, or just before (else one stat). Not thread-safe."""
        if self._stat() != self._version:
            try:
                self._read()
                self._failure = ""
            except AdapterTableError as error:
                if str(error) != self._failure:
                    self._on_failure(f"keeping the last good adapters.json: {error}")
                self._failure = str(error)
        return self._table

    def _stat(self) -> object:
        try:
            return version_of(os.stat(self._name))  # noqa: PTH116  for every request: Path is slow
        except OSError:
            return "unreadable"

    def _read(self) -> None:
        version = self._stat()  # before reading: a change in between is seen the next time
        try:
            with open(open_file(self._path), "rb") as file:  # noqa: PTH123  a descriptor
                content = file.read()
            digest = hashlib.sha256(content).digest()
            if digest != self._digest:
                self._table = self._table_of(content.decode())
                self._digest = digest
        except (OSError, UnicodeDecodeError) as error:
            raise AdapterTableError(f"cannot read {self._path}: {error}") from None
        finally:
            self._version = None if self._has_just_changed() else version

    def _table_of(self, text: str) -> AdapterTable:
        table = self._reader.read(text)
        problems = list(unavailable(table))
        if new := [problem for problem in problems if problem not in self._reported]:
            more = [f"and {len(new) - MOST_REPORTED} more"] if len(new) > MOST_REPORTED else []
            self._on_failure(one_message("adapters.json: unavailable", [*new[:MOST_REPORTED], *more]))
        self._reported = set(problems)
        return table

    def _has_just_changed(self) -> bool:
        with contextlib.suppress(OSError):
            return not is_settled(self._path.stat())
        return False  # one that comes is another version


# What an id stands for


def check_id(route: Route, is_its: Callable[[int, str], bool]) -> None:
    """AdapterUnavailable unless the adapter's lora_task_id is its own, as `is_its` says of the id and the content: the
    engine may hold another content under it, and would answer from that.
    """
    task_id = route.entry.lora_task_id
    if not is_its(task_id, content_of(route.entry)):
        raise AdapterUnavailable(
            f"LoRA adapter {route.lora_name!r}: lora_task_id {task_id} was given to other weights; the engine may hold "
            f"them under it; give these a new id: tritonlora add {route.lora_name} ADAPTER_DIR --task-id N"
        )


def warmed_contents(table: AdapterTable) -> dict[int, str]:
    """What the engine is started with, by lora_task_id."""
    return {entry.lora_task_id: content_of(entry) for entry in table.entries.values() if entry.warm}


def content_of(entry: AdapterEntry) -> str:
    """What another content of the adapter's files does not share."""
    return f"{entry.lora_weights_sha256}-{entry.lora_config_sha256}"
