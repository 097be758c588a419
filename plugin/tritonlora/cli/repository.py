# SPDX-FileCopyrightText: the tritonlora authors
# SPDX-License-Identifier: Apache-2.0
"""The commands init, plan and check, for a repository as a whole."""

from __future__ import annotations

import dataclasses
import functools
import re
import shlex
import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Annotated

import typer

from tritonlora.check import checks
from tritonlora.cli.options import (
    REPO_VARIABLE,
    Base,
    GpuMemory,
    GrpcPort,
    HttpPort,
    MetricsPort,
    Repo,
    RepoOption,
    command_group,
    from_environment,
    repository_of,
    text_of,
)
from tritonlora.cli.output import (
    GPU_NOT_CHECKED,
    RESTART,
    AsJson,
    print_diff,
    print_json,
    print_note,
    print_plan,
    print_room,
)
from tritonlora.engine import cache_plan
from tritonlora.engine.profile import load_profile
from tritonlora.engine.traffic import parse_traffic
from tritonlora.errors import RepositoryError, TritonLoraError
from tritonlora.launch import client
from tritonlora.machine import Ports
from tritonlora.repository import init as init_module
from tritonlora.repository import registry, upkeep
from tritonlora.repository import undo as undoing
from tritonlora.repository.paths import Repository, has_gpu_cache, open_repository, plan_entries, read_config
from tritonlora.repository.state import read_state
from tritonlora.repository.undo import OURS, FileChange

app = command_group()


@app.command()
def init(
    repo: Repo = None,
    repo_option: RepoOption = None,
    target: Annotated[
        str | None, typer.Option("--target", help="The engine's model; by default tensorrt_llm.", show_default=False)
    ] = None,
    served_at: Annotated[
        str | None, typer.Option("--served-at", metavar="PATH", help="The path of REPO on the server, if it differs.")
    ] = None,
    topology: Annotated[
        str | None,
        typer.Option(
            "--topology",
            metavar="forward|resolve",
            help="forward: tokens go through the router; resolve: past it. Default: as it is now, else resolve.",
        ),
    ] = None,
    output: Annotated[
        Path | None,
        typer.Option("--output", metavar="DIR", help="Leave REPO as it is, and do this to a copy of it in DIR."),
    ] = None,
    undo: Annotated[bool, typer.Option("--undo", help="Restore every file as it was before init.")] = False,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Show the changes as a diff; write nothing.")] = False,
    verbose: Annotated[bool, typer.Option("-v", "--verbose", help="Name every file.")] = False,
    as_json: AsJson = False,
) -> None:
    """Make the ensembles of a model repository take an adapter's name. Never touches an engine."""
    root = repository_of(repo, repo_option)
    if undo and (target, served_at, topology, output) != (None, None, None, None):
        raise typer.BadParameter("--undo goes without --target, --served-at, --topology and --output")
    if dry_run and output:
        raise typer.BadParameter("--dry-run goes without --output")
    if topology not in (None, *init_module.TOPOLOGIES):
        raise typer.BadParameter(f"no topology {topology!r}; there are {', '.join(init_module.TOPOLOGIES)}")
    if undo:
        changes = undoing.undo(root, dry_run=dry_run)
    elif output:
        changes = init_module.init_copy(root, output, target, served_at=served_at, topology=topology)
        root = output
    else:
        changes = init_module.init(root, target, served_at=served_at, topology=topology, dry_run=dry_run)
    notes = [] if undo or dry_run else init_module.notes(root, changes)
    if as_json:
        print_json([{"path": str(one.path), "change": one.kind} for one in changes])
    elif dry_run:
        for change in changes:
            print_diff(change)
    else:
        sys.stdout.write("".join(f"{line}\n" for line in _summary(root, changes, verbose=verbose)))
        led = None if undo or all(_model_of(root, one) in OURS for one in changes) else init_module.topology_of(root)
        if led:
            sys.stdout.write(f"ensembles {_TOPOLOGIES[led]}\n")
    if not changes and not as_json:
        sys.stdout.write("nothing to do: names lead to the engine already\n")
    for note in notes:
        print_note(note)
    if changes and not dry_run and not output:
        print_note(RESTART)


_TOPOLOGIES = {
    init_module.RESOLVE: "resolve: tokens go from the engine straight on (--topology forward: through lora_router)",
    init_module.FORWARD: "forward: tokens go through lora_router (--topology resolve: from the engine straight on)",
}


def _summary(root: Path, changes: Sequence[FileChange], *, verbose: bool) -> Iterator[str]:
    """A line for each file, and one for each setting of a config.pbtxt that is another now, old -> new.

    Without `verbose`, the files of a model of tritonlora's share one line.
    """
    versions = init_module.versions(changes)
    groups: dict[tuple[str, str], list[FileChange]] = {}
    for change in changes:
        groups.setdefault((change.kind, _model_of(root, change)), []).append(change)
    for (kind, model), of_model in groups.items():
        if verbose or model not in OURS or len(of_model) == 1:
            for change in of_model:
                yield f"{kind} {change.path}"
                yield from (f"  {line}" for line in change.settings())
        else:
            code = f": the code of tritonlora {' -> '.join(versions[model])}" if model in versions else ""
            yield f"{kind} {root / model} ({len(of_model)} files){code}"
            yield from (f"  {line}" for change in of_model for line in change.settings())


def _model_of(root: Path, change: FileChange) -> str:
    return change.path.relative_to(root).parts[0]


MOST_WHAT_IF = 100_000


@app.command()
def plan(
    repo: Repo = None,
    repo_option: RepoOption = None,
    apply: Annotated[bool, typer.Option("--apply", help="Set the recommended parameters.")] = False,
    what_if: Annotated[
        str | None, typer.Option("--what-if", metavar="rank=R,count=N", help="Plan for N more adapters of rank R.")
    ] = None,
    weights: Annotated[
        str | None,
        typer.Option(
            "--weights",
            metavar="FILE|URL",
            help="Choose the adapters to keep warm by traffic: lines `name: weight`, or the text of the server's "
            "metrics; '-' reads standard input, http://HOST:8002/metrics asks the server. --apply keeps them warm.",
        ),
    ] = None,
    gpu_memory: GpuMemory = None,
    base: Base = None,
    as_json: AsJson = False,
) -> None:
    """Show how many pages of the engine's LoRA cache each adapter takes, and whether all adapters fit."""
    opened = open_repository(repository_of(repo, repo_option))
    state = read_state(opened)
    config, table, kind = state.config, state.table, state.kind
    room = kind.kept_adapters(opened.target_directory)
    if room is not None:
        if apply or what_if or weights or gpu_memory:
            raise RepositoryError(
                f"{opened.target!r} reads adapters from disk itself, and has no cache in pages: give plan no options"
            )
        if as_json:
            print_json(room)
        else:
            print_room(room, table)
        return
    profile = state.profile
    if profile is None and base is not None:
        profile = load_profile(base, dtype=next((one.dtype for one in table.entries.values()), None))
    if profile is None:
        location = kind.model_location(config, opened.target_directory)
        raise RepositoryError(
            f"no config.json at {location}; run plan where the engine is, "
            "or give the base model's directory with --base"
        )
    make_plan = functools.partial(cache_plan.plan_cache, plan_entries(opened, table, config), profile)
    if what_if is not None:
        rank, count = _rank_and_count(what_if)
        make_plan = functools.partial(cache_plan.what_if, *make_plan.args, rank=rank, count=count)
    found = make_plan(config.parameters, gpu_memory=gpu_memory)
    traffic = None if weights is None else parse_traffic(_weights_text(weights), table.entries)
    applied = None
    if apply:
        applied = upkeep.apply_plan(opened, found.recommendations, profile)
        after = make_plan({**config.parameters, **applied}, gpu_memory=gpu_memory)
        found = dataclasses.replace(after, recommendations=found.recommendations, remarks=found.remarks)
    choice = None if traffic is None else cache_plan.choose_warm(found, traffic)
    changed = registry.keep_warm(opened, choice.warm) if apply and choice else {}
    if as_json:
        said = {"fits": found.fits, "warm_choice": choice, "applied": applied or {}, "warm_changed": changed}
        print_json({**dataclasses.asdict(found), **said})
        return
    for remark in found.remarks:
        print_note(remark)
    print_plan(found, table.entries, choice, applied, has_gpu=has_gpu_cache(config))
    for name, is_warm in changed.items():
        start = "at start" if is_warm else "on its first request"
        sys.stdout.write(f"{name} is loaded {start} from the server's next start on\n")
    if applied:
        print_note(RESTART)


def _weights_text(weights: str) -> str:
    """The text of a file, of standard input or of a server's metrics."""
    if weights.startswith(("http://", "https://")):
        return client.metrics(weights)
    if weights == "-":
        return text_of(sys.stdin)
    if re.fullmatch(r"[^/]+:\d+(/metrics)?", weights) and not Path(weights).exists():
        raise typer.BadParameter(f"there is no file {weights!r}; to ask a server, give http://HOST:8002/metrics")
    with Path(weights).open() as file:
        return text_of(file)


def _rank_and_count(text: str) -> tuple[int, int]:
    """(rank, count) of a text like "rank=16,count=200". Raises typer.BadParameter."""
    given = dict(part.strip().split("=", 1) for part in text.split(",") if "=" in part)
    numbers = [int(given.get(key, "")) if given.get(key, "").isdecimal() else 0 for key in ("rank", "count")]
    if len(given) != 2 or min(numbers) < 1 or max(numbers) > MOST_WHAT_IF:
        raise typer.BadParameter(f"{text!r} is not rank=R,count=N with whole numbers from 1 to {MOST_WHAT_IF}")
    return numbers[0], numbers[1]


def _fix(opened: Repository) -> bool:
    """Repair the repository, and print what was changed. Returns whether everything could be repaired."""
    changes: list[FileChange] = []
    repaired = True
    repairs: tuple[Callable[[], list[FileChange]], ...] = (
        lambda: init_module.init(opened.root),
        lambda: upkeep.repair(opened),
    )
    for put_right in repairs:
        try:
            changes += put_right()
        except TritonLoraError as error:
            repaired = False
            print_note(f"not everything could be repaired: {error}")
    for line in _summary(opened.root, changes, verbose=False):
        print_note(line)
    if any(change.path.suffix in (".pbtxt", ".py") for change in changes):
        print_note(RESTART)
    return repaired


@app.command()
def check(
    repo: Repo = None,
    repo_option: RepoOption = None,
    deep: Annotated[
        bool,
        typer.Option(
            "--deep", help="Also compare the files' SHA-256, and look for layers in which an adapter changes nothing."
        ),
    ] = False,
    fix: Annotated[bool, typer.Option("--fix", help="Write the generated files again, then check.")] = False,
    http_port: HttpPort = 8000,
    grpc_port: GrpcPort = 8001,
    metrics_port: MetricsPort = 8002,
    gpu_memory: GpuMemory = None,
    as_json: AsJson = False,
) -> None:
    """Find everything that would keep the server from loading or make its responses wrong.

    The exit code is 1 on any error, and when --fix could not repair everything.
    """
    opened = open_repository(repository_of(repo, repo_option))
    failed = fix and not _fix(opened)
    ports = Ports(http_port, grpc_port, metrics_port)
    findings = checks.check(opened, deep=deep, ports=ports, gpu_memory=gpu_memory)
    if gpu_memory is None and has_gpu_cache(read_config(opened.config_path)):
        print_note(GPU_NOT_CHECKED)
    if as_json:
        print_json(findings)
    else:
        for one in findings:
            sys.stdout.write(f"{one.severity}: {one.where}: {one.problem}\n  remedy: {one.remedy}\n")
        sys.stdout.write("" if findings else "no problem found\n")
        if from_environment() is None and any("tritonlora " in one.remedy for one in findings):
            print_note(f"for these commands: export {REPO_VARIABLE}={shlex.quote(str(opened.root.resolve()))}")
    if failed or any(one.severity == "error" for one in findings):
        raise typer.Exit(1)
