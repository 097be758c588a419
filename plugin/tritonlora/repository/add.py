# SPDX-FileCopyrightText: the tritonlora authors
# SPDX-License-Identifier: Apache-2.0
"""Put adapters into a model repository.

Strategy. Everything is decided and converted first. Then the files are written: an adapter's tensors, then
adapters.json, then config.pbtxt. A removal writes config.pbtxt before adapters.json. If the command is stopped between
two of these files, the repository still loads and no adapter is lost. Files that nothing refers to are harmless, and an
adapter without a warmup sample is loaded on its first request. `check` reports both, and the same command, run again,
completes the change.
"""

from __future__ import annotations

import contextlib
import datetime
import itertools
from collections.abc import Callable, Mapping
from concurrent.futures import Future, ThreadPoolExecutor, as_completed
from dataclasses import dataclass, replace
from pathlib import Path

from tritonlora.architectures.lora_modules import MODULES
from tritonlora.conversion.layout import plan_layout
from tritonlora.conversion.rows import Layout
from tritonlora.engine import cache_plan
from tritonlora.engine.profile import EngineProfile
from tritonlora.errors import EngineMismatch, RepositoryError, TritonLoraError
from tritonlora.files import locked, make_directory, publish, sha256_of, temporary_name
from tritonlora.interrupts import held
from tritonlora.pbtxt.model_config import ModelConfig
from tritonlora.peft.adapter import Adapter, load_adapter
from tritonlora.repository import base_model, chat_templates, generated
from tritonlora.repository.paths import Repository
from tritonlora.repository.state import State, read_state
from tritonlora.serving.adapter_table import (
    AdapterEntry,
    AdapterTable,
    Source,
    check_name,
    with_adapter,
    with_entry,
)
from tritonlora.sources.fetch import Fetched, pinned
from tritonlora.targets import AdapterPlaces, Target


@dataclass(frozen=True, slots=True)
class Options:
    """How an adapter is converted and registered."""

    warm: bool = True
    dtype: str | None = None  # None: the engine's
    base: Path | None = None  # the base model's checkpoint, for DoRA and in place of an absent engine
    allow_nonfinite: bool = False


DEFAULTS = Options()
_NOT_YET = "0" * 64  # the SHA-256 of a file that is not written yet
CONVERSIONS_AT_A_TIME = 2  # memory bandwidth limits conversion, so more threads are no faster


@dataclass(frozen=True, slots=True)
class Added:
    """The result of `add`, or of its dry run."""

    name: str
    entry: AdapterEntry
    remarks: tuple[str, ...]  # for the user
    known: bool = False  # whether the same content was registered under this name already
    restored: tuple[str, ...] = ()  # its files that were missing or altered, and were written again
    unchanged: bool = False  # whether it is as it was: its content, its files, and when it is loaded
    was: int | None = None  # the lora_task_id of the adapter that had the name before
    settings: tuple[str, ...] = ()  # of config.pbtxt, old -> new; a running server has to be started again for them
    source_before: Source | None = None  # of the adapter that had the name before


@dataclass(frozen=True, slots=True)
class Refused:
    """An adapter that `add_all` could not add, and the reason."""

    name: str
    error: str


def add(
    repository: Repository,
    name: str,
    source: Path | Fetched,
    options: Options = DEFAULTS,
    *,
    task_id: int | None = None,
    dry_run: bool = False,
) -> Added:
    """Convert a PEFT adapter and register it under `name`. The same content under the same name changes nothing.

    `source` is the adapter's directory, or what `sources.fetch.fetched` brought. The table notes it. The same content
    from another source changes only that note.

    Other content under a known name replaces the adapter, under a new lora_task_id. `task_id` is the lora_task_id to
    use; None means the next free one.

    TritonLoraError when the adapter is refused; the repository is unchanged then. If a write fails, or the command is
    stopped, the same command completes the change.
    """
    adapter, fetched = _read(name, source, options)  # before the lock, so that other commands need not wait
    with contextlib.nullcontext() if dry_run else locked(repository.table_path.parent):
        state = read_state(repository)
        planned = _plan(state, state.table, name, adapter, fetched, options, task_id=task_id)
        # Everything that can be refused is refused before a byte is written.
        files = generated.rendered(state, with_adapter(state.table, name, planned.entry))
        if dry_run:
            return _after(state.table, Added(name, planned.entry, planned.remarks), files)
        generated.sweep(state)
        added = _write_tensors(repository, planned, state.table.entries.get(name) if task_id is None else None)
        table = _with(state.table, added)
        files = generated.rendered(state, table, files)
        generated.write(state, table, files)
        return _after(state.table, added, files)


def add_all(
    repository: Repository,
    adapters: Mapping[str, Path | Fetched],
    options: Options = DEFAULTS,
    on_done: Callable[[Added | Refused], None] = lambda _: None,
    *,
    dry_run: bool = False,
) -> list[Added | Refused]:
    """`add` for many adapters by name. A refused adapter does not stop the others.

    `on_done` is called for each adapter. The table and config.pbtxt are written once, at the end. If the command is
    interrupted, the adapters that were converted by then are registered.
    """
    incoming = {name: Incoming(source, options) for name, source in adapters.items()}
    return change(repository, incoming, on_done=on_done, dry_run=dry_run)


@dataclass(frozen=True, slots=True)
class Incoming:
    """An adapter that `change` converts and registers."""

    source: Path | Fetched
    options: Options = DEFAULTS


def change(
    repository: Repository,
    incoming: Mapping[str, Incoming],
    then: Callable[[AdapterTable], AdapterTable] = lambda table: table,
    on_done: Callable[[Added | Refused], None] = lambda _: None,
    *,
    dry_run: bool = False,
) -> list[Added | Refused]:
    """Add adapters as `add_all` does, CONVERSIONS_AT_A_TIME at a time, each with its own options.

    `then` makes further changes to the table with the added adapters, before that table is written. If the command is
    interrupted, `then` is not called. It must not raise.
    """
    results: list[Added | Refused] = []

    def refuse(name: str, error: TritonLoraError) -> None:
        results.append(Refused(name, str(error)))
        on_done(results[-1])

    read = {}
    for name, one in incoming.items():
        try:
            read[name] = _read(name, one.source, one.options)
        except TritonLoraError as error:
            refuse(name, error)
    with contextlib.nullcontext() if dry_run else locked(repository.table_path.parent):
        state = read_state(repository)
        planned, after = [], (before := state.table)
        for name in list(read):
            try:
                to_write = _plan(state, after, name, *read.pop(name), incoming[name].options)
                after = with_adapter(after, name, to_write.entry)  # so that the next adapter gets another id
            except TritonLoraError as error:
                refuse(name, error)
            else:
                planned.append(to_write)
        files = generated.rendered(state, after)  # raises before any adapter is converted
        if dry_run:
            for to_write in planned:
                results.append(_after(before, Added(to_write.name, to_write.entry, to_write.remarks), files))
                on_done(results[-1])
            return results
        generated.sweep(state)
        pool = ThreadPoolExecutor(CONVERSIONS_AT_A_TIME)
        futures = {
            pool.submit(_write_tensors, repository, to_write, before.entries.get(to_write.name)): to_write.name
            for to_write in planned
        }
        planned.clear()  # so that each adapter is freed, and its file closed, when it was converted
        is_complete = False
        try:
            for future in as_completed(futures):
                on_done(_result_of(future, futures[future], before, files))
            is_complete = True
        finally:
            with held():
                pool.shutdown(cancel_futures=True)
                for future, name in futures.items():
                    if not future.cancelled() and isinstance(future.exception(), TritonLoraError | None):
                        results.append(_result_of(future, name, before, files))
                table = before
                for result in results:
                    table = _with(table, result) if isinstance(result, Added) else table
                table = then(table) if is_complete else table
                generated.write(state, table, generated.rendered(state, table, files))
    return results


def _result_of(future: Future[Added], name: str, before: AdapterTable, files: generated.Rendered) -> Added | Refused:
    try:
        return _after(before, future.result(), files)
    except TritonLoraError as error:
        return Refused(name, str(error))


@dataclass(frozen=True, slots=True)
class _Planned:
    """An adapter that was checked, and can be converted."""

    name: str
    adapter: Adapter
    fetched: Fetched
    layout: Layout
    entry: AdapterEntry  # complete but for the digests
    kind: Target
    options: Options
    remarks: tuple[str, ...]


def _read(name: str, source: Path | Fetched, options: Options) -> tuple[Adapter, Fetched]:
    """The adapter at `source`; AdapterTableError for an illegal name, AdapterError for a bad adapter."""
    check_name(name)
    fetched = source if isinstance(source, Fetched) else pinned(source)
    adapter = load_adapter(fetched.directory, options.base)
    chat_templates.template_in(adapter.directory)  # which may refuse it
    return adapter, fetched


def _plan(
    state: State,
    table: AdapterTable,
    name: str,
    adapter: Adapter,
    fetched: Fetched,
    options: Options,
    *,
    task_id: int | None = None,
) -> _Planned:
    """Decide how to convert and register an adapter, without its values. `table` has the other adapters.

    AdapterError or EngineMismatch when the engine cannot serve the adapter.
    """
    kind, profile = state.kind, base_model.with_base(state.profile, options.base, options.dtype)
    dtype, remarks = _choose_dtype(table, name, profile, options.dtype, kind.ASSUMED_DTYPE)
    kind.check_adapter(adapter)
    layout = plan_layout(
        adapter, dtype=dtype, profile=profile, base=options.base, engine_reads=not kind.WIRE.sends_weights
    )
    task_id = _task_id(state, table, task_id)
    places = _places(state.repository, kind, task_id)
    entry = AdapterEntry(
        lora_task_id=task_id,
        lora_weights_file=places.weights_file,
        lora_config_file=places.config_file,
        lora_path=places.directory,
        dtype=dtype,
        lora_weights_shape=layout.weights_shape,
        lora_config_shape=layout.config_shape,
        lora_weights_sha256=_NOT_YET,
        lora_config_sha256=_NOT_YET,
        adapter_sizes=tuple(sorted({row.adapter_size for row in layout.rows})),
        modules=tuple(module.name for module in MODULES if any(row.module is module for row in layout.rows)),
        base_model_name_or_path=base_model.noted(adapter.config.base_model_name_or_path or ""),
        pages=_pages(name, layout, profile, state.config) if kind.WIRE.sends_weights else None,
        remarks=layout.without_tensors,
        source=fetched.source,
        warm=options.warm,
        pinned=name in table.entries and table.entries[name].pinned,
        added_at=datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
    )
    fault = kind.backend_fault(state.config, dtype)
    remarks = (*remarks, *layout.remarks, *base_model.remarks(table, name, entry.base_model_name_or_path))
    if fault:
        problem, remedy = fault
        remarks = (*remarks, f"{problem}: requests for the adapter will fail; {remedy}")
    return _Planned(name, adapter, fetched, layout, entry, kind, options, remarks)


def _write_tensors(repository: Repository, planned: _Planned, known: AdapterEntry | None) -> Added:
    """Write an adapter's two files, converted or copied. If `known` has the same content, write only missing files."""
    options, entry = planned.options, planned.entry
    weights_path, config_path = (repository.root / file for file in (entry.lora_weights_file, entry.lora_config_file))
    make_directory(repository.warmup_directory)
    # In the warmup directory, and not beside the files: their own directory is made below, and only if it is needed.
    temporary = repository.warmup_directory / f"adapter_{entry.lora_task_id}"
    with temporary_name(temporary) as weights, temporary_name(temporary) as rows:
        of_values = planned.kind.store(
            planned.adapter, planned.layout, weights, rows, options.base, options.allow_nonfinite
        )
        planned.fetched.check_unchanged()
        remarks = (*planned.remarks, *of_values)
        entry = replace(entry, lora_weights_sha256=sha256_of(weights), lora_config_sha256=sha256_of(rows))
        if known is not None and _content(known) == _content(entry) and _owns_its_files(repository, planned, known):
            entry = replace(known, warm=options.warm, remarks=entry.remarks, source=entry.source)
            restored = _restore(repository, known, weights, rows)
            chat_templates.keep(repository, entry.lora_task_id, planned.adapter.directory)
            remarks = (*remarks, *(f"{file} was missing or altered, and is there again" for file in restored))
            unchanged = known == entry and not restored
            return Added(planned.name, entry, remarks, known=True, restored=restored, unchanged=unchanged)
        make_directory(weights_path.parent)
        publish(weights, weights_path)
        publish(rows, config_path)
    chat_templates.keep(repository, entry.lora_task_id, planned.adapter.directory)
    return Added(planned.name, entry, remarks)


def _owns_its_files(repository: Repository, planned: _Planned, entry: AdapterEntry) -> bool:
    """Whether an entry names the files of its own id. An entry that was edited by hand may name other files."""
    own = _places(repository, planned.kind, entry.lora_task_id)
    return (own.weights_file, own.config_file) == (entry.lora_weights_file, entry.lora_config_file)


def _restore(repository: Repository, entry: AdapterEntry, weights: Path, rows: Path) -> tuple[str, ...]:
    """Put these new files in the place of the files of `entry` that are missing or altered, and return their names."""
    restored = []
    for fresh, (file, sha256) in zip((weights, rows), entry.sha256_by_file.items(), strict=True):
        path = repository.root / file
        if not path.is_file() or sha256_of(path) != sha256:
            make_directory(path.parent)
            publish(fresh, path)
            restored.append(file)
    return tuple(restored)


def _after(before: AdapterTable, added: Added, files: generated.Rendered) -> Added:
    """`added`, with the lora_task_id and the source that its name had in the table `before`, and changed settings."""
    known = before.entries.get(added.name)
    was = None if known is None or known.lora_task_id == added.entry.lora_task_id else known.lora_task_id
    return replace(added, was=was, settings=files.settings, source_before=known.source if known else None)


def _with(table: AdapterTable, added: Added) -> AdapterTable:
    """`table` with the added adapter. If its content was registered already, it keeps its lora_task_id."""
    known = table.entries.get(added.name)
    if known is not None and known.lora_task_id == added.entry.lora_task_id:
        return with_entry(table, added.name, added.entry)
    return with_adapter(table, added.name, added.entry)


def _task_id(state: State, table: AdapterTable, asked: int | None) -> int:
    """The id for a new adapter. Ids that the user's own warmup samples load, or name a file after, are not used."""
    taken = state.foreign_task_ids
    if asked is not None:
        if asked in taken:
            raise RepositoryError(f"lora_task_id {asked} is loaded by a model_warmup sample of your own; take another")
        return asked
    return next(number for number in itertools.count(table.next_lora_task_id) if number not in taken)


def _places(repository: Repository, kind: Target, task_id: int) -> AdapterPlaces:
    """The files of the adapter with this id, relative to the repository."""

    def relative(name: str) -> str:
        return repository.relative(repository.warmup_directory / name)

    places = kind.PLACES.of(task_id)
    directory = relative(places.directory) if places.directory else None
    return AdapterPlaces(relative(places.weights_file), relative(places.config_file), directory)


def _content(entry: AdapterEntry) -> tuple[object, ...]:
    """The fields that are equal if two entries are the same adapter to the engine."""
    return (entry.lora_weights_sha256, entry.lora_config_sha256, entry.lora_weights_shape, entry.dtype)


def _choose_dtype(
    table: AdapterTable, name: str, profile: EngineProfile | None, asked: str | None, assumed: str | None
) -> tuple[str, tuple[str, ...]]:
    """The dtype to convert to, and remarks. It is the engine's dtype.

    Without an engine, it is `asked`, that of the other adapters, or `assumed`. EngineMismatch if none of them is known,
    or if `asked` differs from the engine's or the other adapters' dtype.
    """
    others = {entry.dtype: other for other, entry in table.entries.items() if other != name}
    known = profile.dtype if profile else next(iter(others), assumed)
    chosen = asked or known
    if chosen is None:
        raise EngineMismatch(
            "the engine's dtype is not known, because its config.json is not at the model's gpt_model_path; "
            "give --dtype, or --base with the base model's directory"
        )
    if profile and chosen != profile.dtype:
        raise EngineMismatch(f"{profile.source} has dtype {profile.dtype}, not {chosen}; leave out --dtype")
    if others and chosen not in others:
        dtype, other = next(iter(others.items()))
        raise EngineMismatch(
            f"adapter {other!r} is registered as {dtype}, and all adapters of an engine share one dtype"
        )
    if profile is None:
        return chosen, ("the engine's config.json is not here: modules, ranks and dims were not checked against it",)
    return chosen, ()


def _pages(name: str, layout: Layout, profile: EngineProfile | None, config: ModelConfig) -> int | None:
    """Pages of the engine's LoRA cache that the adapter takes; None when the engine is not known.

    EngineMismatch when the engine would accept the adapter, but could not load it.
    """
    if profile is None:
        return None
    rows = tuple((row.module.id, row.layer, row.adapter_size, int(row.dora)) for row in layout.rows)
    planned = cache_plan.plan_cache([cache_plan.Entry(name, rows, layout.weights_nbytes)], profile, config.parameters)
    adapter = planned.adapters[0]
    if adapter.unloadable:
        remedy = cache_plan.loadable_remedy(planned, adapter, registered=False)
        raise EngineMismatch(f"the engine cannot load {name!r}: {adapter.unloadable}; {remedy}")
    return adapter.pages
