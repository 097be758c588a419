# SPDX-FileCopyrightText: the tritonlora authors
# SPDX-License-Identifier: Apache-2.0
"""Benchmark a mix of load: many adapters through a small cache, clients of three kinds, adapters that change meanwhile.

The server is a real tritonserver with the synthetic engine, whose responses tell their adapter. Every response is
checked against the adapters that its name had while the request was under way. Every error needs a reason. The memory
and the open files of every process of the server are sampled once a second.
"""

from __future__ import annotations

import math
import re
import statistics
import threading
import time
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path

from tritonlora.bench import scratch
from tritonlora.bench.measured import MILLI, Part, at_most, series
from tritonlora.bench.mix_clients import GARBLED, LEFT, Mix, Record, ask
from tritonlora.bench.openai import opened_door
from tritonlora.bench.processes import open_files, processes_of, pss_nbytes
from tritonlora.errors import ServerError
from tritonlora.repository import registry
from tritonlora.repository.paths import Repository

SAMPLE_SECONDS = 1.0
# Names of an adapter, of an alias, and of an adapter that comes and goes.
REPLACED, MOVED, PASSING = "replaced", "moved", "passing"
MIB = 1 << 20
SHOWN = 10  # examples of what is wrong
# A process whose memory grows by more than this from the middle to the end is not flat. 5 % and 4 MiB are noise.
GROWTH, GROWTH_MIB, GROWTH_FILES = 0.05, 4.0, 10
# Errors that a server may respond with -> the reason. The first two are reasons only if the table was so, or changed.
_UNKNOWN = re.compile(r"unknown LoRA adapter|does not exist")
_CHANGED = re.compile(r"LoRA adapter '")
_REASONS = (
    (re.compile(r"does not fit beside the adapters in use"), "it waited for capacity in the engine's cache, too long"),
    (re.compile(r"requests wait for LoRA adapters to be loaded"), "too many requests waited for capacity"),
)


@dataclass(frozen=True, slots=True)
class Options:
    """The load."""

    adapters: int = 100
    pages: int = 16  # of the engine's cache; an adapter takes one
    clients: int = 200
    seconds: float = 300.0
    tokens: int = 32  # of a response on average
    think: float = 0.5  # seconds between two requests of a client
    token_seconds: float = 0.04  # of the engine
    leavers: float = 0.05  # the share of requests whose client leaves
    change_seconds: float = 2.0  # between two changes of adapters
    door: bool = True  # whether a part of the clients asks the OpenAI API


# What a name led to, and when


@dataclass(frozen=True, slots=True)
class Held:
    """What a name led to for a time: an adapter, or None while it was not registered."""

    task_id: int | None
    start: float  # before the change that led to it was begun
    stop: float = math.inf  # after the change that ended it was done


class History:
    """What each name led to."""

    def __init__(self, held: Mapping[str, int | None]) -> None:
        self._held = {name: [Held(task_id, -math.inf)] for name, task_id in held.items()}

    def change(self, name: str, task_id: int | None, start: float, stop: float) -> None:
        """Note a change that was begun at `start` and done at `stop`."""
        last = self._held[name][-1]
        self._held[name][-1:] = [Held(last.task_id, last.start, stop), Held(task_id, start)]

    def during(self, name: str, start: float, stop: float) -> list[int | None]:
        """What the name may have led to for a request from `start` to `stop`."""
        return [held.task_id for held in self._held[name] if held.start <= stop and start <= held.stop]


@dataclass(slots=True)
class Verdict:
    """What is to be said of all requests."""

    wrong: list[str] = field(default_factory=list)  # responses of another adapter, or of none
    unexplained: list[str] = field(default_factory=list)  # errors
    explained: Counter[str] = field(default_factory=Counter)  # reason -> errors


def judge(records: Sequence[Record], history: History) -> Verdict:
    """Check each request against what its name led to while it was under way."""
    verdict = Verdict()
    for one in records:
        held = history.during(one.name, one.began, one.ended)
        if one.failure is None or one.failure == LEFT:
            if one.task_id is not None and one.task_id not in held:
                verdict.wrong.append(f"{one.way}, {one.name}: adapter {one.task_id} responded, expected {held}")
        elif one.failure.startswith(GARBLED):
            verdict.wrong.append(f"{one.way}, {one.name}: {one.failure}")
        elif reason := _reason(one.failure, held):
            verdict.explained[reason] += 1
        else:
            verdict.unexplained.append(f"{one.way}, {one.name}: {one.failure[:300]}")
    return verdict


def _reason(failure: str, held: Sequence[int | None]) -> str | None:
    if _UNKNOWN.search(failure):
        return "its name was not registered at that time" if None in held else None
    if _CHANGED.search(failure) and len(held) > 1:
        return "its adapter was changed while it was under way"
    return next((reason for pattern, reason in _REASONS if pattern.search(failure)), None)


# Memory and open files


@dataclass(frozen=True, slots=True)
class Sizes:
    """The processes of a group at one time."""

    nbytes: float  # proportional set size, without the pages of files
    files: float  # open file descriptors


def spread(samples: Sequence[Sizes]) -> tuple[Sizes, Sizes, Sizes]:
    """Sizes at the start, in the middle and at the end: medians of a tenth each. The start is the second tenth."""
    tenth = max(1, len(samples) // 10)
    parts = (samples[tenth : 2 * tenth], samples[len(samples) // 2 :][:tenth], samples[-tenth:])
    start, middle, end = (
        Sizes(statistics.median(one.nbytes for one in part), statistics.median(one.files for one in part))
        for part in (one or samples[-1:] for one in parts)
    )
    return start, middle, end


def run(options: Options, on_progress: Callable[[str], None] = lambda _: None) -> tuple[Part, bool]:
    """Put the load on a server. Returns the results, and whether no response was wrong and no error unexplained."""
    with scratch.directory() as directory, ExitStack() as stack:
        on_progress("starting a server")
        opened, history = _repository(directory / "repo", options)
        server = stack.enter_context(scratch.serving(opened))
        groups = processes_of(server.pid)
        url = None
        if options.door:
            pid, url = stack.enter_context(opened_door(server.grpc_url))
            groups["openai"] = [pid]
        mix = Mix(
            http=server.http_url,
            grpc=server.grpc_url,
            door=url,
            model=scratch.PAST_ROUTER,
            names=[*scratch.task_ids(options.adapters)],
            moving=[REPLACED, MOVED, PASSING],
            clients=options.clients,
            seconds=options.seconds,
            tokens=options.tokens,
            think=options.think,
            leavers=options.leavers,
        )
        on_progress(f"{options.clients} clients for {options.seconds:g} s")
        samples: list[tuple[float, dict[str, Sizes]]] = []
        stop = threading.Event()
        with ThreadPoolExecutor(2) as pool:
            changing = pool.submit(_change, opened, history, options.change_seconds, stop)
            asking = pool.submit(ask, mix)
            try:
                while not asking.done() and not changing.done():
                    samples.append((time.monotonic(), {name: _sizes(name, pids) for name, pids in groups.items()}))
                    stop.wait(SAMPLE_SECONDS)
            finally:
                stop.set()
            changes, records = changing.result(), asking.result()
    verdict = judge(records, history)
    return _part(options, records, verdict, samples, changes), not verdict.wrong and not verdict.unexplained


def under_load(
    samples: Sequence[tuple[float, Mapping[str, Sizes]]], records: Sequence[Record]
) -> dict[str, list[Sizes]]:
    """Group -> its sizes while clients began requests: not before the first one, and not after the last one."""
    first, last = min(one.began for one in records), max(one.began for one in records)
    found: dict[str, list[Sizes]] = {}
    for _, sizes in [one for one in samples if first <= one[0] <= last] or samples:
        for name, size in sizes.items():
            found.setdefault(name, []).append(size)
    return found


def _repository(root: Path, options: Options) -> tuple[Repository, History]:
    opened = scratch.paced(root, options.adapters, pages=options.pages, token_seconds=options.token_seconds)
    replaced = scratch.put_small(opened, REPLACED, seed=0)
    registry.alias(opened, MOVED, "n1")
    stable = scratch.task_ids(options.adapters)
    return opened, History({**stable, REPLACED: replaced, MOVED: stable["n1"], PASSING: None})


def _change(opened: Repository, history: History, seconds: float, stop: threading.Event) -> int:
    """Change adapters until `stop`. Returns the number of changes."""
    changes = 0
    while not stop.wait(seconds):
        start = time.monotonic()
        name, task_id = _changed(opened, changes)
        history.change(name, task_id, start, time.monotonic())
        changes += 1
    return changes


def _changed(opened: Repository, number: int) -> tuple[str, int | None]:
    """Make a change, and return the name that it is of and what that name leads to now."""
    turn, seed = number % 4, number + 1
    if turn == 0:
        return PASSING, scratch.put_small(opened, PASSING, seed=seed)
    if turn == 1:
        return REPLACED, scratch.put_small(opened, REPLACED, seed=seed)
    if turn == 2:
        other = 1 + (number // 4 + 1) % 2
        registry.alias(opened, MOVED, f"n{other}")
        return MOVED, other
    registry.remove(opened, PASSING)
    return PASSING, None


def _sizes(name: str, pids: Sequence[int]) -> Sizes:
    try:
        return Sizes(pss_nbytes(pids, "Pss_Anon", "Pss_Shmem"), open_files(pids))
    except OSError:
        raise ServerError(f"a process of {name} ended while the clients asked") from None


def _part(
    options: Options,
    records: Sequence[Record],
    verdict: Verdict,
    samples: Sequence[tuple[float, Mapping[str, Sizes]]],
    changes: int,
) -> Part:
    first: dict[str, list[float]] = {}
    for one in records:
        if one.first is not None:
            first.setdefault(one.way, []).append(one.first - one.began)
    sizes = {name: spread(found) for name, found in under_load(samples, records).items()}
    left = sum(one.failure == LEFT for one in records)
    notes = [
        f"{len(records)} requests, of which {left} were left by their clients; {changes} changes of adapters",
        *(f"{count} errors: {reason}" for reason, count in verdict.explained.most_common()),
        *(f"WRONG {text}" for text in verdict.wrong[:SHOWN]),
        *(f"UNEXPLAINED {text}" for text in verdict.unexplained[:SHOWN]),
        *(
            f"{name}: {_at(found, lambda one: one.nbytes / MIB)} MiB, {_at(found, lambda one: one.files)} open files "
            "at the start, in the middle and at the end"
            for name, found in sizes.items()
        ),
    ]
    growth = [
        ratio
        for name, (_, middle, end) in sizes.items()
        for ratio in (
            at_most(
                f"MiB that {name} gained in the second half",
                (end.nbytes - middle.nbytes) / MIB,
                round(max(GROWTH_MIB, GROWTH * middle.nbytes / MIB), 1),
            ),
            at_most(f"open files that {name} gained", end.files - middle.files, GROWTH_FILES),
        )
    ]
    return Part(
        "mix",
        f"{options.clients} clients, {options.adapters} adapters, a cache of {options.pages}, {options.seconds:g} s",
        tuple(series(f"first token, {way}", "ms", found, scale=MILLI) for way, found in sorted(first.items())),
        (
            at_most("wrong responses", len(verdict.wrong), 0),
            at_most("errors without a reason", len(verdict.unexplained), 0),
            *growth,
        ),
        tuple(notes),
    )


def _at(found: Sequence[Sizes], of: Callable[[Sizes], float]) -> str:
    return ", ".join(f"{of(one):.0f}" for one in found)
