# SPDX-FileCopyrightText: the tritonlora authors
# SPDX-License-Identifier: Apache-2.0
"""Compose adapters of a model repository, and PEFT directories, into a new adapter of the repository.

The composition is written as a PEFT directory in a temporary place, and `add` takes it from there, as it takes any
adapter. So the repository holds of a composition what it holds of every adapter, and `remove`, `init --undo` and the
server need to know nothing of compositions. The source in the table says what an adapter was composed of.
"""

from __future__ import annotations

import contextlib
import math
import os
import shlex
import shutil
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from urllib.parse import quote, unquote

from tritonlora.engine.profile import EngineProfile
from tritonlora.errors import (
    EngineMismatch,
    InvalidAdapter,
    Problems,
    RepositoryError,
    TritonLoraError,
    UnsupportedAdapter,
    collected,
    error_of,
    one_message,
)
from tritonlora.files import make_directory, sha256_of, sync_directory, temporary_directory, writing
from tritonlora.peft.adapter import Adapter, load_adapter
from tritonlora.repository import add as adding
from tritonlora.repository import base_model
from tritonlora.repository.add import DEFAULTS, Added, Options
from tritonlora.repository.paths import Repository
from tritonlora.repository.state import State, read_state
from tritonlora.serving.adapter_table import AdapterEntry, AdapterTable, available, check_name
from tritonlora.serving.shares import WHOLE
from tritonlora.sources.fetch import pinned

SCHEME = "compose:"


@dataclass(frozen=True, slots=True)
class Composed:
    """The result of `compose`."""

    added: Added
    weights: Mapping[str, float]  # the name or the directory of each adapter -> its weight
    ranks: tuple[int, ...]  # the distinct ranks of the composition's modules, ascending
    errors: Mapping[str, float]  # path of each compressed module -> relative error of its delta; {}: the sum is exact
    error: float  # of all deltas together
    output: Path | None  # the PEFT directory that was kept


def compose(
    repository: Repository,
    name: str,
    weights: Mapping[str, float],
    options: Options = DEFAULTS,
    *,
    rank: int | None = None,
    any_base: bool = False,
    output: Path | None = None,
    dry_run: bool = False,
) -> Composed:
    """Register under `name` the adapter whose delta is the sum of other adapters' deltas, each times its weight.

    `weights` is by the name or alias of a registered adapter, or by the directory of a PEFT adapter. With `rank`,
    modules of a larger rank are compressed to it. `any_base` takes adapters whose base models have different names.
    `output` is a new directory, in which the PEFT adapter is kept.

    TritonLoraError when the adapters cannot be composed, or the composition cannot be added; nothing is changed then.
    """
    from tritonlora.conversion import composition  # with torch, which takes seconds to import

    check_name(name)
    if output is not None and os.path.lexists(output):
        raise RepositoryError(f"{str(output)!r} is there already; give a new directory")
    state = read_state(repository)
    given = _resolved(state.table, name, weights)
    profile = base_model.with_base(state.profile, options.base, options.dtype)
    parts = [
        composition.Part(repr(one.word), adapter, one.weight)
        for one, adapter in zip(given, _loaded(state, given, profile, options), strict=True)
    ]
    if not any_base:
        _check_bases({part.label: part.adapter for part in parts})
    ranks = composition.composed_ranks(parts)
    _check_rank(profile, max(ranks.values()), rank)
    with _place(repository, dry_run=dry_run) as directory:
        compression = composition.write_composition(parts, directory, rank=rank)
        revision = ",".join(_revision(one, part.adapter) for one, part in zip(given, parts, strict=True))
        fetched = pinned(directory, render_recipe({one.word: one.weight for one in given}, rank), revision)
        with contextlib.nullcontext() if output is None or dry_run else _kept(directory, output):
            added = adding.add(repository, name, fetched, options, dry_run=dry_run)
    return Composed(
        added,
        {one.word: one.weight for one in given},
        tuple(sorted({min(one, rank or one) for one in ranks.values()})),
        compression.errors if compression else {},
        compression.overall if compression else 0.0,
        None if dry_run else output,
    )


@dataclass(frozen=True, slots=True)
class _Given:
    """One of the adapters to compose."""

    word: str  # the registered name, or the absolute path of the directory
    weight: float
    entry: AdapterEntry | None  # None for a directory


def _resolved(table: AdapterTable, name: str, weights: Mapping[str, float]) -> list[_Given]:
    """The adapters to compose; RepositoryError with everything that is wrong with the words and weights."""
    given: dict[str, _Given] = {}
    problems = [] if weights else ["no adapter is given; give NAME=WEIGHT"]
    for text, weight in weights.items():
        registered, *others = table.aliases.get(text, {text: WHOLE})
        if others:
            between = ", ".join(map(repr, [registered, *others]))
            problems.append(f"{text!r} is divided between {between}; name one of them")
        entry = table.entries.get(registered)
        word = registered if entry else os.path.abspath(text)  # noqa: PTH100  links stay as they are
        if entry is None and not Path(text).is_dir():
            problems.append(f"no adapter {text!r} is registered, and there is no such directory; {available(table)}")
        if not math.isfinite(weight) or not weight:
            problems.append(f"the weight of {text!r} is {weight:g}, expected a finite number other than 0")
        if word == name:
            problems.append(f"{name!r} would be composed of itself; give the composition another name")
        if word in given:
            problems.append(f"{text!r} is {word!r}, which is given twice; give it once, with the sum of the weights")
        given[word] = _Given(word, weight, entry)
    if problems:
        raise RepositoryError(one_message("cannot compose", problems))
    return [*given.values()]


def _loaded(state: State, given: Sequence[_Given], profile: EngineProfile | None, options: Options) -> list[Adapter]:
    """The adapters, in this order. AdapterError or RepositoryError with the problems of all of them."""
    problems: Problems = {RepositoryError: [], InvalidAdapter: [], UnsupportedAdapter: [], EngineMismatch: []}
    adapters = []
    for one in given:
        with collected(problems):
            if one.entry is None:
                adapters.append(load_adapter(Path(one.word), options.base))
                continue
            try:
                _check_files(state.repository, one.entry)
                adapters.append(state.kind.stored_adapter(state.repository.root, one.entry, profile))
            except TritonLoraError as error:
                raise type(error)(f"adapter {one.word!r}: {error}") from None
    if any(problems.values()):
        raise error_of("cannot compose", problems)
    return adapters


def _check_files(repository: Repository, entry: AdapterEntry) -> None:
    for file, sha256 in entry.sha256_by_file.items():
        try:
            found = sha256_of(repository.root / file)
        except OSError as error:
            raise RepositoryError(f"cannot read {file}: {error.strerror}; add the adapter again") from None
        if found != sha256:
            raise RepositoryError(f"{file} was altered: its SHA-256 is not the registered one; add the adapter again")


def _check_bases(adapters: Mapping[str, Adapter]) -> None:
    """Raise EngineMismatch if the adapters' configs name different base models, or classes of base models."""
    names = {label: adapter.config.base_model_name_or_path for label, adapter in adapters.items()}
    classes = {label: adapter.config.base_model_class for label, adapter in adapters.items()}
    problems = []
    if len({*map(base_model.name_of, names.values())} - {""}) > 1:
        problems.append(f"base model: {_each({label: one for label, one in names.items() if base_model.name_of(one)})}")
    if len({*classes.values()} - {""}) > 1:
        problems.append(f"its class: {_each({label: one for label, one in classes.items() if one})}")
    if problems:
        heading = "deltas add up only on one base model; if these are names of one model, give --any-base"
        raise EngineMismatch(one_message(heading, problems))


def _each(values: Mapping[str, str]) -> str:
    return ", ".join(f"{value!r} of {label}" for label, value in values.items())


def _check_rank(profile: EngineProfile | None, exact: int, rank: int | None) -> None:
    if rank is not None and rank < 1:
        raise RepositoryError(f"the rank is {rank}, expected at least 1")
    most = profile.rank_limit if profile else exact
    if rank is not None and rank > most:
        raise EngineMismatch(f"rank {rank} is larger than the engine's max_lora_rank; give --rank {most}")
    if rank is None and exact > most:
        raise EngineMismatch(
            f"the exact composition has rank {exact}, the sum of the ranks, and the engine's max_lora_rank is {most}; "
            f"compress it with --rank {most}, or build the engine with --max_lora_rank {exact}"
        )


def _revision(one: _Given, adapter: Adapter) -> str:
    """The lora_task_id of a registered adapter, which names its content; of a directory, the start of its SHA-256."""
    return str(one.entry.lora_task_id) if one.entry else pinned(adapter.directory).source.sha256[:12]


@contextlib.contextmanager
def _place(repository: Repository, *, dry_run: bool) -> Iterator[Path]:
    """A temporary directory for the composition. A repository has the space, and its commands sweep up after others."""
    with contextlib.ExitStack() as stack:
        if dry_run:
            yield Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="tritonlora-")))
            return
        stack.enter_context(writing(repository.root))
        make_directory(repository.warmup_directory)
        yield stack.enter_context(temporary_directory(repository.warmup_directory / "composition"))


@contextlib.contextmanager
def _kept(directory: Path, output: Path) -> Iterator[None]:
    """Copy `directory` to the new directory `output`, which appears whole when the block has ended without an error."""
    with writing(output), temporary_directory(output) as temporary:
        for path in directory.iterdir():
            shutil.copyfile(path, temporary / path.name)
        yield
        temporary.rename(output)
        sync_directory(output.parent)


# The source in the table


def render_recipe(weights: Mapping[str, float], rank: int | None) -> str:
    """The location of a composition: "compose:pirate=0.7,haiku=0.3", and "?rank=16" if it was compressed."""
    terms = ",".join(f"{quote(word)}={weight!r}" for word, weight in weights.items())
    return f"{SCHEME}{terms}{f'?rank={rank}' if rank else ''}"


def parse_recipe(location: str) -> tuple[dict[str, float], int | None] | None:
    """The weights and the rank in the location of a composition; None for any other location."""
    if not location.startswith(SCHEME):
        return None
    terms, _, rank = location.removeprefix(SCHEME).partition("?rank=")
    try:
        pairs = [term.rpartition("=") for term in terms.split(",")]
        return {unquote(word): float(weight) for word, _, weight in pairs}, int(rank) if rank else None
    except ValueError:
        return None


def replaced_since(table: AdapterTable, entry: AdapterEntry) -> dict[str, tuple[int, int]]:
    """The adapters of a composition whose content was replaced since: name -> lora_task_id then, and now."""
    source = entry.source
    recipe = parse_recipe(source.location) if source else None
    if source is None or recipe is None:
        return {}
    found = {}
    for word, revision in zip(recipe[0], (source.revision or "").split(","), strict=False):
        now = table.entries.get(word)
        if now is not None and revision.isdecimal() and int(revision) != now.lora_task_id:
            found[word] = (int(revision), now.lora_task_id)
    return found


def command_again(name: str, entry: AdapterEntry) -> str:
    """The command that makes an adapter again from its source. It has a placeholder if the source is not known."""
    source = entry.source
    recipe = parse_recipe(source.location) if source else None
    if source is None or recipe is None:
        return f"tritonlora add {name} {shlex.quote(source.location) if source else 'ADAPTER_DIR'}"
    weights, rank = recipe
    terms = [shlex.quote(f"{word}={weight!r}") for word, weight in weights.items()]
    return " ".join(["tritonlora compose", name, *terms, *([f"--rank {rank}"] if rank else [])])
