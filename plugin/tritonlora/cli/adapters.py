# SPDX-FileCopyrightText: the tritonlora authors
# SPDX-License-Identifier: Apache-2.0
"""The commands add, compose, remove, alias and list, for the adapters of a repository."""

from __future__ import annotations

import contextlib
import dataclasses
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Annotated

import typer
from rich.progress import Progress, TaskID

from tritonlora import extras
from tritonlora.cli.options import (
    AllowNonfinite,
    AllowSource,
    Base,
    DryRun,
    Dtype,
    Interrupted,
    Offline,
    Repo,
    RepoOption,
    Warmup,
    command_group,
    import_torch,
    repository_and,
    repository_of,
)
from tritonlora.cli.output import (
    NO_RESTART,
    RESTART,
    AsJson,
    aliases_text,
    print_json,
    print_listing,
    print_note,
    print_table,
    size,
    source_text,
    stderr,
    yes,
)
from tritonlora.errors import RepositoryError
from tritonlora.launch import client
from tritonlora.repository import add as adding
from tritonlora.repository import compose as composing
from tritonlora.repository import registry
from tritonlora.repository.add import Added, Options
from tritonlora.repository.compose import SCHEME
from tritonlora.repository.paths import Repository, open_repository, read_table
from tritonlora.repository.registry import Aliased, Removed
from tritonlora.serving.adapter_table import check_name, described_aliases
from tritonlora.sources.fetch import Fetched, fetched
from tritonlora.sources.policy import Policy, policy

app = command_group()


@app.command()
def add(
    words: Annotated[
        list[str] | None,
        typer.Argument(
            metavar="[REPO] [NAME SOURCE]",
            help="The model repository, the name that clients will send, and the PEFT adapter: a directory, a .zip or "
            ".tar of one, hf://ORG/NAME, s3://… or https://…",
        ),
    ] = None,
    repo: RepoOption = None,
    every: Annotated[
        Path | None,
        typer.Option(
            "--all",
            metavar="DIR",
            help="Add the adapter in each directory of DIR, named as that directory.",
            exists=True,
            file_okay=False,
        ),
    ] = None,
    warmup: Warmup = True,
    task_id: Annotated[int | None, typer.Option("--task-id", min=1, help="A lora_task_id never used before.")] = None,
    offline: Offline = False,
    allow_source: AllowSource = None,
    dtype: Dtype = None,
    base: Base = None,
    allow_nonfinite: AllowNonfinite = False,
    dry_run: DryRun = False,
    as_json: AsJson = False,
) -> None:
    """Fetch and convert an adapter, write its warmup files and register its name: NAME SOURCE, or --all DIR."""
    options = adding.Options(warm=warmup, dtype=dtype, base=base, allow_nonfinite=allow_nonfinite)
    if every is not None:
        if task_id is not None:
            raise typer.BadParameter("--all goes without NAME and --task-id")
        root, _ = repository_and(words or [], repo, 0)
        _add_all(open_repository(root), every, options, dry_run=dry_run, as_json=as_json)
        return
    root, (name, source) = repository_and(words or [], repo, 2)
    opened = open_repository(root)
    check_name(name)  # before a download, as is the next line
    extras.require("convert")
    rules = policy(offline=offline, allowed=allow_source or ())
    with fetching(source, rules) as found, stderr.status(f"converting {name}"):
        import_torch()
        added = adding.add(opened, name, found, options, task_id=task_id, dry_run=dry_run)
    for remark in added.remarks:
        print_note(remark)
    if as_json:
        print_json(added)
        return
    sys.stdout.write(what_was_done(added, dry_run=dry_run))
    _print_restart([added], dry_run=dry_run)


@contextlib.contextmanager
def fetching(source: str, rules: Policy) -> Iterator[Fetched]:
    """`fetched`, with a progress bar for each file on a terminal."""
    progress = Progress(console=stderr, transient=True, disable=not stderr.is_terminal)
    tasks: dict[str, TaskID] = {}

    def show(file: str, done: int, total: int | None) -> None:
        if file not in tasks:
            tasks[file] = progress.add_task(f"fetching {file or 'the archive'}", total=total)
        progress.update(tasks[file], completed=done)

    with contextlib.ExitStack() as stack:
        with progress:
            found = stack.enter_context(fetched(source, rules, show))
        yield found


def _add_all(opened: Repository, directory: Path, options: Options, *, dry_run: bool, as_json: bool) -> None:
    """Add the adapter in each directory of `directory`. A refused adapter is printed and makes exit code 1."""
    adapters = {
        path.name: path for path in sorted(directory.iterdir()) if path.is_dir() and not path.name.startswith(".")
    }
    if (directory / "adapter_config.json").exists():
        raise RepositoryError(f"{str(directory)!r} is an adapter itself: give the directory that it is in, or NAME")
    if not adapters:
        raise RepositoryError(f"{str(directory)!r} has no directory in it; give one that has a directory per adapter")
    import_torch()
    with Progress(console=stderr, transient=True, disable=not stderr.is_terminal) as progress:
        task = progress.add_task(f"converting {len(adapters)} adapters", total=len(adapters))
        try:
            results = adding.add_all(
                opened, adapters, options, on_done=lambda _: progress.advance(task), dry_run=dry_run
            )
        except Interrupted:
            registered = adapters.keys() & read_table(opened).entries.keys()
            print_note(f"{len(registered)} of {len(adapters)} are registered; the same command adds the others")
            raise
    results.sort(key=lambda one: one.name)
    if as_json:
        print_json(results)
    for one in results:
        if isinstance(one, adding.Refused):
            stderr.print(f"{one.name} refused: {one.error}", markup=False, highlight=False, soft_wrap=True)
            continue
        for remark in one.remarks:
            print_note(f"{one.name}: {remark}")
        if not as_json:
            sys.stdout.write(what_was_done(one, dry_run=dry_run))
    if not as_json:
        _print_restart([one for one in results if isinstance(one, adding.Added)], dry_run=dry_run)
    if any(isinstance(one, adding.Refused) for one in results):
        raise typer.Exit(1)


def what_was_done(added: Added, *, dry_run: bool = False) -> str:
    """A line that says what became of an adapter."""
    if added.unchanged:
        did = "is unchanged"
    elif added.restored:
        did = "is complete again"
    elif added.known:
        did = f"is loaded {_STARTS[not added.entry.warm]} -> {_STARTS[added.entry.warm]}"
    else:
        did = "would be added" if dry_run else "added" if added.was is None else "replaced"
    was = "" if added.was is None else f"{added.was} -> "
    stays = f" (or {added.was} stays, if its content is the same)" if dry_run and added.was is not None else ""
    task_id, nbytes = added.entry.lora_task_id, added.entry.lora_weights_nbytes
    return f"{added.name} {did}: lora_task_id {was}{task_id}{stays}, {size(nbytes)}{_about_source(added)}\n"


_STARTS = {True: "at start", False: "on its first request"}  # whether an adapter is warm


def _print_restart(results: list[Added], *, dry_run: bool) -> None:
    """Print the settings that changed, and whether a running server has to be started again."""
    settings = list(dict.fromkeys(setting for one in results for setting in one.settings))
    for setting in settings:
        print_note(setting)
    if not dry_run and not all(one.unchanged for one in results):
        print_note(RESTART if settings else NO_RESTART)


def _about_source(added: Added) -> str:
    """Where the adapter is from, and whether the source has another revision than when it was added last."""
    before, now = added.source_before, added.entry.source
    if now is None or now.revision is None or now.location.startswith(SCHEME):
        return ""
    if before is None or before.location != now.location or before.revision is None:
        return f"; from {source_text(now)}"
    if before.revision == now.revision:
        return f"; {now.location} is still at {now.revision[:12]}"
    return f"; {now.location} has moved from {before.revision[:12]} to {now.revision[:12]}"


WORST_LAYERS = 3  # of a compression, that are printed


@app.command()
def compose(
    words: Annotated[
        list[str],
        typer.Argument(
            metavar="[REPO] NAME ADAPTER=WEIGHT...",
            help="The model repository, the new adapter's name, and the adapters to add up with their weights. ADAPTER "
            "is a registered name, or the directory of a PEFT adapter.",
        ),
    ],
    repo: RepoOption = None,
    rank: Annotated[
        int | None,
        typer.Option("--rank", min=1, help="Compress layers of a larger rank to this one, and print the error."),
    ] = None,
    any_base: Annotated[
        bool, typer.Option("--any-base", help="Take adapters whose base models have different names.")
    ] = False,
    output: Annotated[
        Path | None, typer.Option("--output", metavar="DIR", help="Also keep the PEFT adapter, in this new directory.")
    ] = None,
    warmup: Warmup = True,
    dtype: Dtype = None,
    base: Base = None,
    dry_run: DryRun = False,
    as_json: AsJson = False,
) -> None:
    """Add a new adapter that is a weighted sum of others: NAME a=0.7 b=0.3.

    What the new adapter adds to each layer's weights is the sum of what the others add, each times its weight. The sum
    is exact, and its rank is the sum of their ranks, unless --rank is given.
    """
    root, (name, *terms) = repository_and(words, repo, None)
    options = adding.Options(warm=warmup, dtype=dtype, base=base)
    weights = _weights(terms)
    with stderr.status(f"composing {name}"):
        import_torch()
        composed = composing.compose(
            open_repository(root), name, weights, options, rank=rank, any_base=any_base, output=output, dry_run=dry_run
        )
    for remark in composed.added.remarks:
        print_note(remark)
    if composed.errors:
        worst = sorted(composed.errors.items(), key=lambda item: -item[1])[:WORST_LAYERS]
        layers = ", ".join(f"{path} {error:.2g}" for path, error in worst)
        print_note(
            f"compressed to rank {rank}: the relative error is {composed.error:.2g} over all layers; the worst layers: "
            f"{layers}"
        )
    _print_restart([composed.added], dry_run=dry_run)
    if as_json:
        print_json(composed)
        return
    total = "".join(
        f" {'-' if weight < 0 else '+'} {abs(weight):g} {word}" for word, weight in composed.weights.items()
    )
    sys.stdout.write(f"{name} = {total.removeprefix(' + ').strip()}, rank {', '.join(map(str, composed.ranks))}\n")
    sys.stdout.write(what_was_done(composed.added, dry_run=dry_run))


def _weights(terms: list[str]) -> dict[str, float]:
    """The weights in words like "pirate=0.7". Raises typer.BadParameter."""
    weights: dict[str, float] = {}
    for term in terms:
        word, _, number = term.rpartition("=")
        try:
            weight = float(number)
        except ValueError:
            word = ""
        if not word:
            raise typer.BadParameter(f"{term!r} is not ADAPTER=WEIGHT; give for example pirate=0.7")
        if word in weights:
            raise typer.BadParameter(f"{word!r} is given twice; give it once, with the sum of the weights")
        weights[word] = weight
    if not weights:
        raise typer.BadParameter("no adapter is given; give ADAPTER=WEIGHT after NAME, for example pirate=0.7")
    return weights


@app.command()
def remove(
    words: Annotated[
        list[str],
        typer.Argument(metavar="[REPO] NAME...", help="The model repository, and names of adapters or aliases."),
    ],
    repo: RepoOption = None,
    as_json: AsJson = False,
) -> None:
    """Take adapters or aliases out of the repository. Requests for them are refused from then on.

    An alias goes alone: its adapters stay. An adapter that has aliases goes together with them, or after them.
    """
    root, names = repository_and(words, repo, None)
    removed = registry.remove(open_repository(root), *names)
    if as_json:
        print_json(removed)
        return
    for one in removed:
        sys.stdout.write(f"{_removal(one)}\n")
    print_note(NO_RESTART)


def _removal(removed: Removed) -> str:
    if removed.entry is not None:
        return f"adapter {removed.name} removed: its lora_task_id {removed.entry.lora_task_id} is never used again"
    led = removed.alias_of
    stay = f"{', '.join(led)} stay" if isinstance(led, Mapping) else f"{led} stays"
    return f"alias {removed.name} removed: requests for it are refused now; {stay}"


@app.command()
def alias(
    words: Annotated[
        list[str],
        typer.Argument(
            metavar="[REPO] ALIAS NAME|NAME=PERCENT...",
            help="The model repository, the alias for clients to send, and an adapter, or several adapters with the "
            "percentage of the requests that each one gets.",
        ),
    ],
    repo: RepoOption = None,
    as_json: AsJson = False,
) -> None:
    """Send the requests for a second name, an alias, to an adapter. `remove` takes an alias away.

    `alias prod v3` sends the requests for prod to v3, and `alias prod v4` then switches them to v4 in one step. `alias
    prod v3=90 v4=10` divides them between both.
    """
    names = [word for word in words if "=" not in word or word == words[0]]
    if names == words:
        root, (new, to) = repository_and(words, repo, 2)
        aliased = registry.alias(open_repository(root), new, to)
    else:
        shares = _shares(words[len(names) :])
        root, (new,) = repository_and(names, repo, 1)
        aliased = registry.alias(open_repository(root), new, shares)
    if as_json:
        print_json(aliased)
        return
    sys.stdout.write(f"alias {new} {_leading(aliased)}\n")
    if aliased.before != aliased.name:
        print_note(NO_RESTART)


def _leading(aliased: Aliased) -> str:
    now = led_to(aliased.name)
    if aliased.before == aliased.name:
        return f"is unchanged: its requests go to {now}"
    if aliased.before is None:
        return f"added: its requests go to {now}"
    return f"changed: its requests went to {led_to(aliased.before)}, and go to {now} now"


def _shares(words: list[str]) -> dict[str, int]:
    """Shares from words like "pirate-v3=90". Raises typer.BadParameter."""
    shares: dict[str, int] = {}
    for word in words:
        name, _, share = word.partition("=")
        if not share.isdecimal() or not share.isascii() or len(share) > 3:
            raise typer.BadParameter(f"{word!r} has no share; give each adapter a whole percentage, such as {name}=10")
        if name in shares:
            raise typer.BadParameter(f"{name!r} is given twice; give each adapter once")
        shares[name] = int(share)
    return shares


def led_to(to: str | Mapping[str, int] | None) -> str:
    """Where an alias leads, for people: "pirate", or "pirate-v3 90 %, pirate-v4 10 %"."""
    return ", ".join(f"{name} {share} %" for name, share in to.items()) if isinstance(to, Mapping) else to or ""


@app.command("list")
def list_adapters(
    repo: Repo = None,
    repo_option: RepoOption = None,
    url: Annotated[
        str | None, typer.Option("--url", metavar="HOST:PORT", help="List a running server's, by its HTTP endpoint.")
    ] = None,
    as_json: AsJson = False,
) -> None:
    """List the registered adapters. With --url, list the adapters of a running server, each with its state."""
    if url is not None:
        if repo is not None or repo_option is not None:  # --url takes precedence over TRITONLORA_REPO
            raise typer.BadParameter("give REPO or --url, not both")
        found = client.adapters(url)
        if as_json:
            print_json(found)
        else:
            print_listing(found)
        return
    table = read_table(open_repository(repository_of(repo, repo_option)))
    aliases = table.aliases_by_name()
    if as_json:
        entries = sorted(table.entries.items())
        print_json(
            {name: {**dataclasses.asdict(entry), **described_aliases(aliases.get(name, {}))} for name, entry in entries}
        )
        return
    columns = ("lora_name", "lora_task_id", "rank", "modules", "size", "pages", "start", "aliases", "source", "pinned")
    rows = [
        (
            name,
            str(entry.lora_task_id),
            ",".join(map(str, entry.adapter_sizes)),
            ",".join(entry.modules),
            size(entry.lora_weights_nbytes),
            str(entry.pages or "?"),
            "warm" if entry.warm else "on first use",
            aliases_text(described_aliases(aliases.get(name, {}))),
            source_text(entry.source),
            yes(entry.pinned),
        )
        for name, entry in sorted(table.entries.items())
    ]
    print_table(columns, rows)
