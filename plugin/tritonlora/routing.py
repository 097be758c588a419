# SPDX-FileCopyrightText: the tritonlora authors
# SPDX-License-Identifier: Apache-2.0
"""What the router decides: which adapter a request means, when its weights travel along, what an engine error means.

Strategy. A request for an adapter normally carries its lora_task_id alone. The engine holds a bounded cache of
adapters and answers a miss before it has produced a token, so the same request can be sent again with the weights and
the client sees nothing of it. What the router believes about that cache is learnt from answers only: an adapter counts
as loaded once the engine has answered a request for it, and no longer once the engine has missed it.

Rules. Nothing here knows Triton: requests and answers are opaque, sending is a function that is passed in.
The base model never answers for an adapter: what is not resolved to an adapter is an error.
After the first answer of a stream nothing is ever sent again: that would repeat text.

This file runs inside a plain Triton container: standard library, and torch where tensors are mapped.
"""

from __future__ import annotations

import contextlib
import enum
import functools
import re
import threading
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import chain
from pathlib import Path
from typing import TYPE_CHECKING, Generic, TypeVar

from tritonlora.adapters import NAME_PATTERN, AdapterEntry, AdapterTable, available, parse
from tritonlora.errors import AdapterTableError, AdapterUnavailable, InvalidRequest, UnknownAdapter

if TYPE_CHECKING:
    import torch

Answer = TypeVar("Answer")


# Which adapter


@dataclass(frozen=True, slots=True)
class Route:
    """The adapter that a request (or a row of a batch) means."""

    lora_name: str
    entry: AdapterEntry


def resolve(table: AdapterTable, lora_name: bytes | str | None, lora_task_id: int | None) -> Route | None:
    """The adapter that a request names, by name, id or both; None when it names none: the base model.

    UnknownAdapter when nothing is registered under it; InvalidRequest when it cannot be a name, or when name and id
    disagree.
    """
    if lora_name is None and lora_task_id is None:
        return None
    if lora_name is None:
        name = table.name_of(lora_task_id) if lora_task_id is not None else None
        if name is None:
            raise UnknownAdapter(f"unknown lora_task_id {lora_task_id}; {available(table)}")
    else:
        name = _decoded(lora_name)
        if name not in table.entries:
            raise UnknownAdapter(f"unknown LoRA adapter {name!r}; {available(table)}")
    entry = table.entries[name]
    if lora_task_id not in (None, entry.lora_task_id):
        raise InvalidRequest(
            f"lora_name {name!r} has lora_task_id {entry.lora_task_id}, but the request says {lora_task_id}; send one"
        )
    return Route(name, entry)


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


def _decoded(lora_name: bytes | str) -> str:
    try:
        name = lora_name.decode() if isinstance(lora_name, bytes) else lora_name
    except UnicodeDecodeError:
        raise InvalidRequest(f"lora_name is not UTF-8: {lora_name[:100]!r}") from None
    if not name:
        raise InvalidRequest("lora_name is empty; to ask the base model, leave it out")
    if not NAME_PATTERN.fullmatch(name):
        raise InvalidRequest(f"lora_name {name[:100]!r} is not a legal adapter name")
    return name


class TableFile:
    """adapters.json as it is on disk now. A malformed or vanished file leaves the last good table in place."""

    def __init__(self, path: Path, on_failure: Callable[[str], None]) -> None:
        """Read the table; AdapterTableError when there is no good one to begin with."""
        self._path = path
        self._on_failure = on_failure
        self._lock = threading.Lock()
        self._version: object = None
        self._table = self._read()

    def table(self) -> AdapterTable:
        """The table; read again when the file has changed since (one stat when it has not)."""
        with self._lock:
            if self._stat() != self._version:
                try:
                    self._table = self._read()
                except AdapterTableError as error:
                    self._on_failure(f"keeping the last good adapters.json: {error}")
            return self._table

    def _stat(self) -> object:
        try:
            found = self._path.stat()
        except OSError:
            return "unreadable"
        return (found.st_ino, found.st_mtime_ns, found.st_size)

    def _read(self) -> AdapterTable:
        self._version = self._stat()  # before reading: a change in between is seen the next time
        try:
            text = self._path.read_text(encoding="utf-8")
        except (OSError, UnicodeDecodeError) as error:
            raise AdapterTableError(f"cannot read {self._path}: {error}") from None
        return parse(text)


class PreviousIds:
    """The last tokens of a stream: what a stateless detokeniser must know to continue a text."""

    # A character is at most a handful of tokens, and decoders look back over one word at most.
    COUNT = 32

    def __init__(self) -> None:
        self._ids: deque[int] = deque(maxlen=self.COUNT)

    def ids(self) -> list[int]:
        """The tokens sent before now, the oldest first."""
        return list(self._ids)

    def add(self, ids: Iterable[int]) -> None:
        """These have been sent."""
        self._ids.extend(ids)


# An adapter's tensors


def map_tensors(repository: Path, route: Route) -> tuple[torch.Tensor, torch.Tensor]:
    """(lora_weights (1, n, W), lora_config (1, n, 3 or 4) int32) of an adapter, mapped from its files.

    Both are views of the page cache: nothing is read before the tensors are sent. AdapterUnavailable when a file is
    missing or has the wrong size, which would otherwise be served as other weights or as a bus error.
    """
    import torch

    entry = route.entry
    parts = (
        (entry.lora_weights_file, entry.lora_weights_nbytes, getattr(torch, entry.dtype), entry.lora_weights_shape),
        (entry.lora_config_file, entry.lora_config_nbytes, torch.int32, entry.lora_config_shape),
    )
    tensors = []
    for file, nbytes, dtype, shape in parts:
        path = repository / file
        try:
            found = path.stat().st_size
        except OSError:
            raise AdapterUnavailable(f"LoRA adapter {route.lora_name!r}: {file} is missing on the server") from None
        if found != nbytes:
            raise AdapterUnavailable(
                f"LoRA adapter {route.lora_name!r}: {file} has {found} bytes on the server, expected {nbytes}"
            )
        mapped = torch.from_file(str(path), shared=False, size=shape[0] * shape[1], dtype=dtype)
        tensors.append(mapped.view(1, *shape))
    return tensors[0], tensors[1]


# What an engine error means


class Meaning(enum.Enum):
    """What an answer of the engine says about its LoRA cache."""

    ANSWER = enum.auto()
    MISS = enum.auto()  # the adapter is not cached: send its weights
    FULL = enum.auto()  # every cached adapter is in use: wait until one is not
    ERROR = enum.auto()  # anything else: the client's to see


# Substrings, because prefixes and suffixes differ between versions and backends.
# Sources: TensorRT-LLM batch_manager/peftCacheManager.cpp, runtime/loraCache.cpp. The last one is what is left of
# "cache full" when some adapters could be evicted, but not enough.
_MEANINGS = {
    "not found in cache. Please send LoRA weights with request": Meaning.MISS,
    "There are no done tasks to evict": Meaning.FULL,
    "pageIds.has_value()": Meaning.FULL,
}


def meaning_of(error: str | None) -> Meaning:
    """What an answer with this error text (None: no error) means."""
    if error is None:
        return Meaning.ANSWER
    return next((meaning for text, meaning in _MEANINGS.items() if text in error), Meaning.ERROR)


_BACKTRACE = re.compile(r"\s*\n\s*\d+\s+0x[0-9a-f]+.*", re.DOTALL)
_SOURCE_LOCATION = re.compile(r"\s*\((?:/[^\s():]+)+:\d+\)")
_PATH = re.compile(r"(?<![\w:/])(?:/[\w.+@-]+){2,}")


def public(message: str) -> str:
    """An engine's error text without what is the server's own business: backtraces and paths."""
    for pattern, replacement in ((_BACKTRACE, ""), (_SOURCE_LOCATION, ""), (_PATH, "<path>")):
        message = pattern.sub(replacement, message)
    return message


# When weights travel along


class Loads:
    """Which adapters the engine has been seen to hold, and which are being loaded right now. Thread-safe."""

    def __init__(self, warmed: Iterable[int]) -> None:
        self._changed = threading.Condition()
        self._loading: set[int] = set()
        self._loaded = set(warmed)
        self._ended = 0

    def is_loaded(self, task_id: int) -> bool:
        """Whether a request for it can go out without weights."""
        with self._changed:
            return task_id in self._loaded

    def answered(self, task_id: int) -> None:
        """The engine answered a request for `task_id`."""
        with self._changed:
            self._loaded.add(task_id)

    def missed(self, task_id: int) -> None:
        """The engine does not hold `task_id`."""
        with self._changed:
            self._loaded.discard(task_id)

    @contextlib.contextmanager
    def claim(self, route: Route, timeout: float) -> Iterator[bool]:
        """True: the caller loads the adapter, and nobody else does before it leaves. False: somebody else just has.

        Raises AdapterUnavailable when somebody else has been loading it for `timeout` seconds.
        """
        task_id = route.entry.lora_task_id
        with self._changed:
            waited = task_id in self._loading
            if not self._changed.wait_for(lambda: task_id not in self._loading, timeout):
                raise AdapterUnavailable(
                    f"LoRA adapter {route.lora_name!r} is still being loaded for another request; "
                    f"waited {timeout:.0f} s"
                )
            mine = not (waited and task_id in self._loaded)
            if mine:
                self._loading.add(task_id)
        try:
            yield mine
        finally:
            if mine:
                with self._changed:
                    self._loading.discard(task_id)
                    self._changed.notify_all()

    def request_ended(self) -> None:
        """A request for an adapter ended, so that the engine may evict that adapter now."""
        with self._changed:
            self._ended += 1
            self._changed.notify_all()

    def requests_ended(self) -> int:
        """How many requests for adapters have ended."""
        with self._changed:
            return self._ended

    def wait_for_an_end(self, seen: int, timeout: float) -> None:
        """Return once more than `seen` requests have ended, or after `timeout` seconds."""
        with self._changed:
            self._changed.wait_for(lambda: self._ended > seen, timeout)


class Forwarder(Generic[Answer]):
    """Sends requests to the engine, with an adapter's weights when the engine needs them. Thread-safe."""

    def __init__(
        self,
        error_of: Callable[[Answer], str | None],
        *,
        warmed: Iterable[int] = (),
        cache_full_timeout: float = 30.0,
        load_timeout: float = 60.0,
        retry_interval: float = 0.25,
    ) -> None:
        """`error_of` gives the error text of an answer, or None; `warmed` are the task ids that the engine was started
        with. Times are in seconds.

        `retry_interval` is the longest wait between two tries while the engine's cache is full: other clients of the
        engine, of whom this router knows nothing, may free it.
        """
        self._error_of = error_of
        self._cache_full_timeout = cache_full_timeout
        self._load_timeout = load_timeout
        self._retry_interval = retry_interval
        self._loads = Loads(warmed)
        self._retry_turn = threading.Lock()

    def forward(
        self,
        route: Route | None,
        send: Callable[[bool], Iterable[Answer]],
        is_cancelled: Callable[[], bool] = lambda: False,
    ) -> Iterator[Answer]:
        """The engine's answers to one request, as they come.

        `send(attach)` sends the request, with the adapter's weights if `attach`, and gives the answers. It is called
        again only when the engine refused for the state of its cache, before any answer has been passed on.
        Raises AdapterUnavailable when the cache stayed full, or the adapter could not be loaded, for too long.
        """
        if route is None:
            yield from send(False)
            return
        try:
            yield from self._adapter_answers(route, send, is_cancelled)
        finally:
            self._loads.request_ended()

    def _adapter_answers(
        self, route: Route, send: Callable[[bool], Iterable[Answer]], is_cancelled: Callable[[], bool]
    ) -> Iterator[Answer]:
        deadline = time.monotonic() + self._load_timeout
        attach = not self._loads.is_loaded(route.entry.lora_task_id)
        while True:
            patience = max(0.0, deadline - time.monotonic())
            with self._loads.claim(route, patience) if attach else contextlib.nullcontext(False) as attaching:
                meaning, answers = self._first_answer(route, functools.partial(send, attaching), is_cancelled)
            if meaning is not Meaning.MISS or attaching:
                yield from answers
                return
            self._loads.missed(route.entry.lora_task_id)
            attach = True

    def _first_answer(
        self, route: Route, send: Callable[[], Iterable[Answer]], is_cancelled: Callable[[], bool]
    ) -> tuple[Meaning, Iterator[Answer]]:
        """What the first answer means, and all the answers; waits while the engine's cache is full.

        Of all the requests that wait, one tries again at a time: each try carries an adapter's weights.
        """
        deadline = time.monotonic() + self._cache_full_timeout
        my_turn = False
        try:
            while True:
                ended = self._loads.requests_ended()
                answers = iter(send())
                first = next(answers, None)
                if first is None:
                    return Meaning.ANSWER, iter(())
                meaning = meaning_of(self._error_of(first))
                if meaning is Meaning.ANSWER:
                    self._loads.answered(route.entry.lora_task_id)
                if meaning is not Meaning.FULL:
                    return meaning, chain((first,), answers)
                my_turn = my_turn or self._retry_turn.acquire(timeout=max(0.0, deadline - time.monotonic()))
                if not my_turn or time.monotonic() >= deadline:
                    raise AdapterUnavailable(
                        f"LoRA adapter {route.lora_name!r} does not fit beside the adapters in use; "
                        f"tried for {self._cache_full_timeout:g} s"
                    )
                if is_cancelled():
                    return Meaning.ANSWER, iter(())
                self._loads.wait_for_an_end(ended, min(self._retry_interval, deadline - time.monotonic()))
        finally:
            if my_turn:
                self._retry_turn.release()
