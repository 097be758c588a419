# SPDX-FileCopyrightText: the tritonlora authors
# SPDX-License-Identifier: Apache-2.0
"""The commands sync and export, for the desired state of a repository."""

from __future__ import annotations

import signal
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.progress import Progress

from tritonlora.cli.adapters import led_to, what_was_done
from tritonlora.cli.options import (
    AllowNonfinite,
    AllowSource,
    Base,
    Dtype,
    Interrupted,
    Offline,
    Repo,
    RepoOption,
    command_group,
    import_torch,
    repository_and,
    repository_of,
)
from tritonlora.cli.output import NO_RESTART, RESTART, AsJson, print_json, print_note, stderr
from tritonlora.errors import DesiredStateError, TritonLoraError
from tritonlora.repository import desired_state
from tritonlora.repository import sync as syncing
from tritonlora.repository.add import Options, Refused
from tritonlora.repository.desired_state import DesiredState
from tritonlora.repository.paths import Repository, open_repository, read_table
from tritonlora.repository.sync import Change, SyncPlan
from tritonlora.serving.file_version import read_file
from tritonlora.sources.policy import Policy, policy

app = command_group()

LOOK_SECONDS = 2.0  # between two looks at a watched file
RETRY_SECONDS = 60.0  # after a sync that refused something
_SIGNS = {"add": "+", "change": "~", "remove": "-"}


@app.command()
def sync(
    words: Annotated[
        list[str],
        typer.Argument(metavar="[REPO] FILE", help="The model repository, and a YAML file; '-' reads standard input."),
    ],
    repo: RepoOption = None,
    prune: Annotated[bool, typer.Option("--prune", help="Remove what FILE does not have.")] = False,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Print the plan; write nothing.")] = False,
    watch: Annotated[bool, typer.Option("--watch", help="Go on, and follow FILE until a signal ends it.")] = False,
    offline: Offline = False,
    allow_source: AllowSource = None,
    dtype: Dtype = None,
    base: Base = None,
    allow_nonfinite: AllowNonfinite = False,
    as_json: AsJson = False,
) -> None:
    """Make a repository what FILE says: add, replace and remove adapters, and lead aliases, in one step.

    The plan is printed first. A refused adapter does not stop the others, and makes exit code 1.
    """
    root, (file,) = repository_and(words, repo, 1)
    if watch and (dry_run or as_json or file == "-"):
        raise typer.BadParameter("--watch goes without --dry-run and --json, and needs a FILE")
    opened, path = open_repository(root), Path(file)
    options = Options(dtype=dtype, base=base, allow_nonfinite=allow_nonfinite)

    rules = policy(offline=offline, allowed=allow_source or ())
    directory, called = (Path.cwd(), "standard input") if file == "-" else (path.absolute().parent, file)

    def once(content: bytes) -> bool:
        desired = syncing.located(_parsed(content, called), directory)
        return _sync(opened, desired, called, options, rules, prune=prune, dry_run=dry_run, as_json=as_json)

    if watch:
        try:
            follow(lambda: _read(file), once, time.sleep)
        except Interrupted as interrupt:
            if interrupt.args[0] != signal.SIGTERM:
                raise
    elif not once(_read(file)):
        raise typer.Exit(1)


def follow(read: Callable[[], bytes], act: Callable[[bytes], bool], wait: Callable[[float], object]) -> None:
    """Call `act` with what `read` gives, again whenever that has changed, and again after RETRY_SECONDS if it failed.

    An error of `read` or `act` is printed once, and ends nothing. The content is compared, and not the file's times: in
    Kubernetes the path stays while a symbolic link on it is replaced.
    """
    done: bytes | None = None
    said, has_failed, idle = "", False, 0.0
    while True:
        try:
            content = read()
            if content != done or (has_failed and idle >= RETRY_SECONDS):
                done, has_failed, idle = content, True, 0.0
                has_failed = not act(content)
                said = ""
        except TritonLoraError as error:
            if str(error) != said:
                stderr.print(f"error: {error}", markup=False, highlight=False, soft_wrap=True)
            said = str(error)
        wait(LOOK_SECONDS)
        idle += LOOK_SECONDS


def _read(file: str) -> bytes:
    if file == "-":
        return sys.stdin.buffer.read(desired_state.MOST_BYTES + 1)
    try:
        return read_file(Path(file), desired_state.MOST_BYTES)
    except OSError as error:
        raise DesiredStateError(f"cannot read {file}: {error.strerror or error}") from None


def _parsed(content: bytes, file: str) -> DesiredState:
    try:
        return desired_state.parse(content)
    except DesiredStateError as error:
        raise DesiredStateError(f"{file}: {error}") from None


def _sync(
    opened: Repository,
    desired: DesiredState,
    file: str,
    options: Options,
    rules: Policy,
    *,
    prune: bool,
    dry_run: bool,
    as_json: bool,
) -> bool:
    """Sync once, and say whether nothing was refused."""
    plan = syncing.plan_sync(opened, desired, rules, prune=prune)
    changes = [*plan.changes()]
    if not as_json:
        sys.stdout.write("".join(f"{line}\n" for line in _plan_lines(plan, changes, file)))
        sys.stdout.flush()
    for one in plan.refused:
        _print_refused(one)
    # Without changes, too: a command that was stopped may have left files to complete.
    results = list[Any](plan.refused) if dry_run else _apply(opened, plan, options, rules)
    refused = [one for one in results if isinstance(one, Refused)]
    added = [one for one in results if not isinstance(one, Refused)]
    if as_json:
        print_json({"changes": changes, "unmanaged": plan.unmanaged, "added": added, "refused": refused})
    else:
        sys.stdout.write("".join(map(what_was_done, added)))
        if changes and not refused and not dry_run:
            sys.stdout.write(f"done: the repository is as {file} says\n")
    sys.stdout.flush()
    settings = dict.fromkeys(setting for one in added for setting in one.settings)
    unchanged = {one.name for one in added if one.unchanged} | {one.name for one in refused}
    if not dry_run and {one.name for one in changes} - unchanged:
        for note in (*settings, RESTART if settings else NO_RESTART):
            print_note(note)
    return not refused


def _apply(opened: Repository, plan: SyncPlan, options: Options, rules: Policy) -> list[Any]:
    """Make the changes of a plan, with a progress bar for the adapters and one for the file that is fetched."""
    if plan.to_convert:
        import_torch()
    total = len(plan.to_convert)
    with Progress(console=stderr, transient=True, disable=not stderr.is_terminal or not total) as progress:
        download = progress.add_task("fetching", visible=False)
        task = progress.add_task(f"converting {total} adapters", total=total)

        def fetched(file: str, done: int, size: int | None) -> None:
            what = f"fetching {file or 'an archive'}"
            progress.update(download, description=what, completed=done, total=size, visible=done != size)

        results = syncing.apply(opened, plan, options, rules, lambda _: progress.advance(task), fetched)
    for one in results:
        if not isinstance(one, Refused):
            for remark in one.remarks:
                print_note(f"{one.name}: {remark}")
        elif one not in plan.refused:
            _print_refused(one)
    return results


def _print_refused(one: Refused) -> None:
    stderr.print(f"{one.name} refused: {one.error}", markup=False, highlight=False, soft_wrap=True)


def _plan_lines(plan: SyncPlan, changes: list[Change], file: str) -> Iterator[str]:
    """The plan for people: a line for each change, and a sum."""
    for one in changes:
        words = _alias_words(one) if one.kind == "alias" else _adapter_words(one)
        yield f"{_SIGNS[one.action]} {one.kind} {one.name}: {words}"
    stay = f"; {len(plan.unmanaged)} not in {file} stay (--prune removes them)" if plan.unmanaged else ""
    count = Counter(one.action for one in changes)
    if changes:
        yield f"plan: {count['add']} to add, {count['change']} to change, {count['remove']} to remove{stay}"
    elif not plan.refused:
        yield f"nothing to do: the repository is as {file} says{stay}"


def _alias_words(one: Change) -> str:
    if one.after is None:
        return f"was {led_to(one.before)}"
    return led_to(one.after) if one.before is None else f"{led_to(one.before)} -> {led_to(one.after)}"


def _adapter_words(one: Change) -> str:
    before, after = one.before, one.after
    if after is None:
        return f"lora_task_id {before['lora_task_id']} is retired" if before else ""
    start = {True: "loaded at start", False: "loaded on its first request"}
    place = f"{after['source']} ({after['revision'][:12]})" if after["revision"] else after["source"]
    if before is None:
        return f"from {place}, {start[after['warm']]}{', pinned' if after['pinned'] else ''}"
    words = []
    if "lora_task_id" not in after:
        words.append(f"from {place}, with a new lora_task_id if its content has changed")
    elif before["source"] != after["source"]:
        words.append(f"the same content from {after['source']}")
    if before["warm"] != after["warm"]:
        words.append(f"{start[before['warm']]} -> {start[after['warm']]}")
    if before["pinned"] != after["pinned"]:
        words.append("pinned" if after["pinned"] else "no longer pinned")
    return "; ".join(words)


@app.command()
def export(repo: Repo = None, repo_option: RepoOption = None, as_json: AsJson = False) -> None:
    """Print the adapters and aliases of a repository as a file for `sync`."""
    table = read_table(open_repository(repository_of(repo, repo_option)))
    if as_json:
        print_json(desired_state.document_of(table))
    else:
        sys.stdout.write(desired_state.render(table))
