# SPDX-FileCopyrightText: the tritonlora authors
# SPDX-License-Identifier: Apache-2.0
"""The command line. It adds no logic: each command parses its words, calls one module and prints what that returns.

Data goes to stdout, everything else to stderr. Exit codes: 0 done, 1 refused with one message, 2 usage, 130 Ctrl-C.
Modules that import torch are imported inside the commands that need them.
"""

from __future__ import annotations

import dataclasses
import io
import os
import re
import shlex
import signal
import sys
from pathlib import Path
from types import FrameType
from typing import TYPE_CHECKING, Annotated, TextIO

import typer
from rich.progress import Progress

from tritonlora import __version__, extras, interrupts, machine
from tritonlora.cli.bench import bench
from tritonlora.cli.output import (
    GPU_NOT_CHECKED,
    AsJson,
    print_diff,
    print_json,
    print_listing,
    print_note,
    print_plan,
    print_room,
    print_table,
    size,
    stderr,
)
from tritonlora.errors import RepositoryError, ServerError, TritonLoraError, one_message
from tritonlora.machine import Ports

if TYPE_CHECKING:
    from tritonlora.repository.add import Added, Options
    from tritonlora.repository.paths import Repository

app = typer.Typer(
    name="tritonlora",
    help="Serve LoRA adapters by name with NVIDIA Triton and TensorRT-LLM.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)

REPO_VARIABLE = "TRITONLORA_REPO"
REPO_HELP = "The model repository."


def _some_path(text: str) -> Path:
    """An empty one, as of a shell variable that is not set, would be the current directory."""
    if not text:
        raise typer.BadParameter("it is empty; give a directory")
    return Path(text)


Repo = Annotated[Path, typer.Option("--repo", envvar=REPO_VARIABLE, metavar="REPO", help=REPO_HELP, parser=_some_path)]
DryRun = Annotated[bool, typer.Option("--dry-run", help="Say what would be done; write nothing.")]
Dtype = Annotated[str | None, typer.Option("--dtype", help="bfloat16, float16 or float32; by default the engine's.")]
AllowNonfinite = Annotated[bool, typer.Option("--allow-nonfinite", help="Take NaN and infinite weights as they are.")]
Base = Annotated[
    Path | None, typer.Option("--base", help="Directory of the base model's checkpoint.", exists=True, file_okay=False)
]
HttpPort = Annotated[int, typer.Option("--http-port", min=1, max=65535)]
GrpcPort = Annotated[int, typer.Option("--grpc-port", min=1, max=65535)]
MetricsPort = Annotated[int, typer.Option("--metrics-port", min=1, max=65535)]
MOST_WHAT_IF = 100_000


def _nbytes(text: str) -> int:
    """The bytes that "85899345920", "80GB" or "80GiB" says."""
    match = re.fullmatch(r"(?P<number>\d+(?:\.\d+)?) ?(?P<unit>[kKMGT]?i?)B?", text.strip(), re.ASCII)
    unit = match["unit"].upper() if match else ""
    nbytes = (
        int(float(match["number"]) * (1024 if "I" in unit else 1000) ** " KMGT".index(unit[:1] or " ")) if match else 0
    )
    if not 0 < nbytes < 1 << 50:
        raise typer.BadParameter(f"{text!r} is not a number of bytes; give for example 85899345920 or 80GiB")
    return nbytes


GpuMemory = Annotated[
    int | None,
    typer.Option(
        "--gpu-memory",
        metavar="BYTES",
        help="What is free of each GPU's memory once the engine's weights are loaded; also as 80GiB.",
        parser=_nbytes,
        show_default=False,
    ),
]
Url = Annotated[str, typer.Option("--url", metavar="HOST:PORT", help="The server's HTTP endpoint.")]


class _Interrupted(BaseException):
    """A signal asked for the end. Everything on the way out cleans up after itself."""


def main(arguments: list[str] | None = None) -> int:
    """Run one command; its exit code."""
    _prepare_streams()
    try:
        with interrupts.handled(_interrupt):
            app(arguments)
    except SystemExit as end:
        return end.code if isinstance(end.code, int) else 0
    except TritonLoraError as error:
        _print_error(str(error))
        return 1
    except _Interrupted:
        stderr.print("interrupted")
        return 130
    except BrokenPipeError:  # whoever read our output has seen enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1
    except OSError as error:  # a name that is too long, a directory that may not be read
        _print_error(f"{error.strerror}: {error.filename!r}" if error.filename else str(error))
        return 1
    return 0


def _prepare_streams() -> None:
    """A stream that was closed is /dev/null, and a name that is no text is written with escapes."""
    for name, mode in (("stdin", "r"), ("stdout", "w"), ("stderr", "w")):
        if getattr(sys, name) is None:
            setattr(sys, name, Path(os.devnull).open(mode))  # noqa: SIM115  until the end
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper) and stream.errors == "strict":
            stream.reconfigure(errors="backslashreplace")


def _print_error(message: str) -> None:
    stderr.print("[bold red]error:[/] ", end="")
    stderr.print(message, markup=False, highlight=False, soft_wrap=True)


def _interrupt(number: int, _frame: FrameType | None) -> None:
    # Not KeyboardInterrupt: typer would take that for itself, and make it exit code 1.
    raise _Interrupted(number)


def _import_torch() -> None:
    """All of it: an interrupt in its midst is lost in some of its modules, and leaves others half there."""
    extras.require("convert")
    with interrupts.held():
        import torch  # noqa: F401


def _version(value: bool) -> None:
    if value:
        sys.stdout.write(f"tritonlora {__version__}\n")
        raise typer.Exit


@app.callback()
def _options(
    _version_flag: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Print the version.")
    ] = False,
) -> None:
    pass


@app.command()
def demo(
    base: Base = None,
    keep: Annotated[Path | None, typer.Option("--keep", help="Leave the model repository in this directory.")] = None,
    as_json: AsJson = False,
) -> None:
    """Do the whole job on this machine: no GPU, no account."""
    from tritonlora.demo import flow

    flow.run(base=base, keep=keep, as_json=as_json)


@app.command()
def init(
    repo: Annotated[
        Path, typer.Argument(help="An existing model repository.", envvar=REPO_VARIABLE, parser=_some_path)
    ],
    target: Annotated[
        str | None, typer.Option("--target", help="The engine's model; by default tensorrt_llm.", show_default=False)
    ] = None,
    served_at: Annotated[
        str | None, typer.Option("--served-at", metavar="PATH", help="Where the server sees REPO, if not here.")
    ] = None,
    topology: Annotated[
        str | None,
        typer.Option(
            "--topology",
            metavar="forward|resolve",
            help="Whether tokens go through the router, which recovers from evictions, or past it; by default as now.",
        ),
    ] = None,
    undo: Annotated[bool, typer.Option("--undo", help="Take the router out; every file as it was before.")] = False,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Show the changes as a diff; write nothing.")] = False,
    as_json: AsJson = False,
) -> None:
    """Put the router into a model repository and lead its ensembles to it. Never touches an engine."""
    from tritonlora.repository import init as install
    from tritonlora.repository import undo as undoing

    if undo and (target, served_at, topology) != (None, None, None):
        raise typer.BadParameter("--undo goes without --target, --served-at and --topology")
    if topology not in (None, *install.TOPOLOGIES):
        raise typer.BadParameter(f"no topology {topology!r}; there are {', '.join(install.TOPOLOGIES)}")
    changes = (
        undoing.undo(repo, dry_run=dry_run)
        if undo
        else install.init(repo, target, served_at=served_at, topology=topology, dry_run=dry_run)
    )
    notes = [] if undo or dry_run else install.notes(repo)
    if as_json:
        print_json([{"path": str(one.path), "change": one.kind} for one in changes])
    elif dry_run:
        for change in changes:
            print_diff(change)
    else:
        sys.stdout.write("".join(f"{change.kind} {change.path}\n" for change in changes))
    if not changes and not as_json:
        sys.stdout.write("nothing to do: the router is in place\n")
    for note in notes:
        print_note(note)


@app.command()
def add(
    repo: Repo,
    name: Annotated[str | None, typer.Argument(help="The name that clients will send.")] = None,
    adapter_dir: Annotated[Path | None, typer.Argument(help="The PEFT adapter's directory.")] = None,
    every: Annotated[
        Path | None,
        typer.Option(
            "--all",
            metavar="DIR",
            help="Add every adapter in DIR, named as its directory.",
            exists=True,
            file_okay=False,
        ),
    ] = None,
    warmup: Annotated[bool, typer.Option("--warmup/--no-warmup", help="Load it at start, or on first use.")] = True,
    task_id: Annotated[int | None, typer.Option("--task-id", min=1, help="Its lora_task_id, never used yet.")] = None,
    dtype: Dtype = None,
    base: Base = None,
    allow_nonfinite: AllowNonfinite = False,
    dry_run: DryRun = False,
    as_json: AsJson = False,
) -> None:
    """Convert an adapter, write its warmup files and register its name: NAME ADAPTER_DIR, or --all DIR."""
    from tritonlora.repository import add as register
    from tritonlora.repository import paths

    options = register.Options(warm=warmup, dtype=dtype, base=base, allow_nonfinite=allow_nonfinite)
    if every is not None:
        if name is not None or task_id is not None or dry_run:
            raise typer.BadParameter("--all goes without NAME, --task-id and --dry-run")
        _add_all(paths.open_repository(repo), every, options, as_json=as_json)
        return
    if name is None or adapter_dir is None:
        raise typer.BadParameter("give NAME and ADAPTER_DIR, or --all DIR")
    with stderr.status(f"converting {name}"):
        _import_torch()
        added = register.add(paths.open_repository(repo), name, adapter_dir, options, task_id=task_id, dry_run=dry_run)
    for remark in added.remarks:
        print_note(remark)
    if as_json:
        print_json(added)
        return
    sys.stdout.write(_what_was_done(added, dry_run=dry_run))


def _add_all(opened: Repository, directory: Path, options: Options, *, as_json: bool) -> None:
    from tritonlora.repository import add as register
    from tritonlora.repository.paths import read_table

    adapters = {path.parent.name: path.parent for path in sorted(directory.glob("*/adapter_config.json"))}
    if (directory / "adapter_config.json").exists():
        raise RepositoryError(f"{str(directory)!r} is an adapter itself: give the directory that it is in, or NAME")
    if not adapters:
        raise RepositoryError(f"{str(directory)!r} has no directory with an adapter_config.json in it")
    _import_torch()
    with Progress(console=stderr, transient=True, disable=not stderr.is_terminal) as progress:
        task = progress.add_task(f"converting {len(adapters)} adapters", total=len(adapters))
        try:
            results = register.add_all(opened, adapters, options, on_done=lambda _: progress.advance(task))
        except _Interrupted:
            registered = adapters.keys() & read_table(opened).entries.keys()
            print_note(f"{len(registered)} of {len(adapters)} are registered; the same command adds the others")
            raise
    results.sort(key=lambda one: one.name)
    if as_json:
        print_json(results)
    for one in results:
        if isinstance(one, register.Refused):
            stderr.print(f"{one.name} refused: {one.error}", markup=False, highlight=False, soft_wrap=True)
            continue
        for remark in one.remarks:
            print_note(f"{one.name}: {remark}")
        if not as_json:
            sys.stdout.write(_what_was_done(one))
    if any(isinstance(one, register.Refused) for one in results):
        raise typer.Exit(1)


def _what_was_done(added: Added, *, dry_run: bool = False) -> str:
    if added.unchanged:
        did = "is unchanged"
    elif added.restored:
        did = "is complete again"
    elif added.known:
        did = "is loaded at start" if added.entry.warm else "is loaded on its first request"
    else:
        did = "would be added" if dry_run else "added"
    stays = ", and stays if its content is the same" if dry_run else ""
    was = "" if added.was is None else f" (was: lora_task_id {added.was}{stays})"
    task_id, nbytes = added.entry.lora_task_id, added.entry.lora_weights_nbytes
    return f"{added.name} {did}: lora_task_id {task_id}, {size(nbytes)}{was}\n"


@app.command()
def remove(
    names: Annotated[list[str], typer.Argument(metavar="NAME...", help="Adapters' names, or aliases.")],
    repo: Repo,
    as_json: AsJson = False,
) -> None:
    """Take adapters out of the repository, whose lora_task_ids are never used again; or aliases."""
    from tritonlora.repository import add as register
    from tritonlora.repository import paths

    removed = register.remove(paths.open_repository(repo), *names)
    if as_json:
        print_json(removed)
        return
    for one in removed:
        what = (
            f"adapter {one.alias_of} stays"
            if one.entry is None
            else f"lora_task_id {one.entry.lora_task_id} is retired"
        )
        sys.stdout.write(f"{one.name} removed: {what}\n")


@app.command()
def alias(
    new: Annotated[str, typer.Argument(help="The name that clients will send, too.")],
    old: Annotated[str, typer.Argument(help="The adapter's name.")],
    repo: Repo,
    as_json: AsJson = False,
) -> None:
    """Give an adapter a second name, or lead one to another adapter; `remove` takes it away."""
    from tritonlora.repository import add as register
    from tritonlora.repository import paths

    aliased = register.alias(paths.open_repository(repo), new, old)
    if as_json:
        print_json(aliased)
        return
    before = f" (was: {aliased.before})" if aliased.before not in (None, aliased.name) else ""
    sys.stdout.write(f"{new} is adapter {aliased.name}{before}\n")


@app.command("list")
def list_adapters(
    context: typer.Context,
    repo: Annotated[
        Path | None,
        typer.Option("--repo", envvar=REPO_VARIABLE, metavar="REPO", help=REPO_HELP, parser=_some_path),
    ] = None,
    url: Annotated[
        str | None, typer.Option("--url", metavar="HOST:PORT", help="Ask a running server instead: its HTTP endpoint.")
    ] = None,
    as_json: AsJson = False,
) -> None:
    """List the registered adapters; with --url, what a running server says of its own, and in which state each is."""
    from tritonlora.launch import client
    from tritonlora.repository import paths

    if url is not None:
        source = context.get_parameter_source("repo")
        if source is not None and source.name == "COMMANDLINE":  # the environment's gives way
            raise typer.BadParameter("give --repo or --url, not both")
        found = client.adapters(url)
        if as_json:
            print_json(found)
        else:
            print_listing(found)
        return
    if repo is None:
        raise typer.BadParameter(f"give --repo (or set {REPO_VARIABLE}), or --url")
    table = paths.read_table(paths.open_repository(repo))
    aliases = table.aliases_by_name()
    if as_json:
        entries = sorted(table.entries.items())
        print_json({name: {**dataclasses.asdict(entry), "aliases": aliases.get(name, [])} for name, entry in entries})
        return
    columns = ("lora_name", "lora_task_id", "rank", "modules", "size", "pages", "start", "aliases")
    rows = [
        (
            name,
            str(entry.lora_task_id),
            ",".join(map(str, entry.adapter_sizes)),
            ",".join(entry.modules),
            size(entry.lora_weights_nbytes),
            str(entry.pages or "?"),
            "warm" if entry.warm else "on first use",
            ",".join(aliases.get(name, [])),
        )
        for name, entry in sorted(table.entries.items())
    ]
    print_table(columns, rows)


@app.command()
def plan(
    repo: Repo,
    apply: Annotated[bool, typer.Option("--apply", help="Set the recommended parameters.")] = False,
    what_if: Annotated[
        str | None, typer.Option("--what-if", metavar="rank=R,count=N", help="Plan for N more adapters of rank R.")
    ] = None,
    weights: Annotated[
        typer.FileText | None,
        typer.Option(
            "--weights",
            metavar="FILE",
            help="Say which adapters to keep warm: lines `name: weight`, or the "
            "text of the server's /metrics; '-' reads standard input.",
        ),
    ] = None,
    gpu_memory: GpuMemory = None,
    base: Base = None,
    as_json: AsJson = False,
) -> None:
    """Say which pages of the engine's LoRA cache each adapter takes, and whether all fit."""
    from tritonlora.engine import cache_plan as planning
    from tritonlora.engine import profile as engine
    from tritonlora.engine.traffic import parse_traffic
    from tritonlora.repository import add as register
    from tritonlora.repository import paths
    from tritonlora.targets import target_of

    opened = paths.open_repository(repo)
    config = paths.read_config(opened.config_path)
    table = paths.read_table(opened)
    kind = target_of(config)
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
    profile = paths.engine_profile(opened, config)
    if profile is None and base is not None:
        profile = engine.load_profile(base, dtype=next((one.dtype for one in table.entries.values()), None))
    if profile is None:
        location = kind.model_location(config, opened.target_directory)
        raise RepositoryError(
            f"no config.json at {location}; run plan where the engine is, "
            "or give the base model's directory with --base"
        )
    entries = paths.plan_entries(opened, table, config)
    if what_if is None:
        found = planning.plan_cache(entries, profile, config.parameters, gpu_memory=gpu_memory)
    else:
        rank, count = _rank_and_count(what_if)
        found = planning.what_if(entries, profile, config.parameters, rank=rank, count=count, gpu_memory=gpu_memory)
    traffic = None if weights is None else parse_traffic(_text(weights), table.entries)
    choice = None if traffic is None else planning.choose_warm(found, traffic)
    applied = None
    if apply:
        applied = register.apply_plan(opened, found.recommendations, profile)
    if as_json:
        print_json({**dataclasses.asdict(found), "fits": found.fits, "warm_choice": choice, "applied": applied or {}})
        return
    for remark in found.remarks:
        print_note(remark)
    print_plan(found, table.entries, choice, applied, has_gpu=paths.has_gpu_cache(config))


def _text(file: TextIO) -> str:
    try:
        return file.read()
    except UnicodeDecodeError as error:
        raise TritonLoraError(f"{file.name!r} is not text: {error}") from None


def _rank_and_count(text: str) -> tuple[int, int]:
    """The numbers of "rank=16,count=200"."""
    given = dict(part.strip().split("=", 1) for part in text.split(",") if "=" in part)
    numbers = [int(given.get(key, "")) if given.get(key, "").isdecimal() else 0 for key in ("rank", "count")]
    if len(given) != 2 or min(numbers) < 1 or max(numbers) > MOST_WHAT_IF:
        raise typer.BadParameter(f"{text!r} is not rank=R,count=N with whole numbers from 1 to {MOST_WHAT_IF}")
    return numbers[0], numbers[1]


@app.command()
def check(
    repo: Repo,
    deep: Annotated[bool, typer.Option("--deep", help="Compare the files' SHA-256, too.")] = False,
    fix: Annotated[bool, typer.Option("--fix", help="Put right what is generated, then check.")] = False,
    http_port: HttpPort = 8000,
    grpc_port: GrpcPort = 8001,
    metrics_port: MetricsPort = 8002,
    gpu_memory: GpuMemory = None,
    as_json: AsJson = False,
) -> None:
    """Find everything that would make the server fail to load, or answer wrongly.

    Exit code 1 on any error, and when --fix could not put everything right.
    """
    from tritonlora.check import checks as checks
    from tritonlora.repository import add as register
    from tritonlora.repository import init as install
    from tritonlora.repository import paths

    opened = paths.open_repository(repo)
    failed = False
    if fix:
        for put_right in (lambda: install.init(opened.root), lambda: register.repair(opened)):
            try:
                put_right()
            except TritonLoraError as error:
                failed = True
                print_note(f"not everything could be put right: {error}")
    ports = Ports(http_port, grpc_port, metrics_port)
    findings = checks.check(opened, deep=deep, ports=ports, gpu_memory=gpu_memory)
    if gpu_memory is None and paths.has_gpu_cache(paths.read_config(opened.config_path)):
        print_note(GPU_NOT_CHECKED)
    if as_json:
        print_json(findings)
    else:
        for one in findings:
            sys.stdout.write(f"{one.severity}: {one.where}: {one.problem}\n  remedy: {one.remedy}\n")
        sys.stdout.write("" if findings else "no problem found\n")
    if failed or any(one.severity == "error" for one in findings):
        raise typer.Exit(1)


@app.command()
def convert(
    adapter_dir: Annotated[Path, typer.Argument(help="The PEFT adapter's directory.")],
    out_dir: Annotated[Path, typer.Argument(help="Where the two files go; made if need be.")],
    dtype: Annotated[
        str | None,
        typer.Option("--dtype", help="bfloat16, float16 or float32; by default that of --base, else the adapter's."),
    ] = None,
    base: Base = None,
    file_format: Annotated[str, typer.Option("--format", help="bin (raw) or npy.")] = "bin",
    allow_nonfinite: AllowNonfinite = False,
    as_json: AsJson = False,
) -> None:
    """Only convert: adapter_model.bin and adapter_config.bin, or model.lora_weights.npy and model.lora_config.npy."""
    with stderr.status(f"converting {adapter_dir}"):
        _import_torch()
        from tritonlora.conversion import convert as conversion

        converted = conversion.convert(
            adapter_dir, out_dir, dtype=dtype, base=base, file_format=file_format, allow_nonfinite=allow_nonfinite
        )
    if base is None:
        print_note("layers were taken for what their names say; --base checks them against the base model")
    if as_json:
        print_json(converted)
    else:
        sys.stdout.write(f"{converted.weights_path}: {converted.dtype} {list(converted.weights_shape)}\n")
        sys.stdout.write(f"{converted.config_path}: int32 {list(converted.config_shape)}\n")


@app.command(context_settings={"allow_extra_args": True, "ignore_unknown_options": True})
def serve(
    context: typer.Context,
    repo: Repo,
    http_port: HttpPort = 8000,
    grpc_port: GrpcPort = 8001,
    metrics_port: MetricsPort = 8002,
    address: Annotated[
        str, typer.Option("--address", help="Listen here, with all endpoints; 0.0.0.0: on every interface.")
    ] = "127.0.0.1",
    timeout: Annotated[float, typer.Option("--ready-timeout", help="Seconds to wait until it is ready.")] = 3600.0,
    world_size: Annotated[
        int | None, typer.Option("--world-size", min=1, help="Processes of the engine; by default what it says.")
    ] = None,
    verify: Annotated[
        bool, typer.Option("--verify", help="When ready, ask every warm adapter once, and one that nobody registered.")
    ] = False,
    print_command: Annotated[
        bool, typer.Option("--print-command", help="Print what would be run; run nothing.")
    ] = False,
) -> None:
    """Start tritonserver on the repository and say which adapters are ready. What follows -- goes to tritonserver."""
    from tritonlora.check import checks as checking
    from tritonlora.launch import diagnosis, tritonserver
    from tritonlora.launch.server import Server
    from tritonlora.repository import paths
    from tritonlora.repository.state import Models
    from tritonlora.targets import target_of

    tritonserver.check_extra(context.args)
    address = machine.numeric_address(address)
    opened = paths.open_repository(repo)
    config = Models(repo).served_config(opened.target)
    diagnosis.refuse_cached_responses(opened)
    kind = target_of(config)
    table = paths.read_table(opened)
    ports = Ports(http_port, grpc_port, metrics_port)
    world = diagnosis.world_of(opened, config, world_size)
    if print_command:
        try:
            found = tritonserver.find_tritonserver()
        except ServerError as error:  # the command may be for another machine
            print_note(str(error))
            found = tritonserver.Tritonserver(Path("tritonserver"))
        words = [f"{key}={shlex.quote(value)}" for key, value in found.environment.items()]
        command = tritonserver.server_command(
            found,
            repo,
            ports,
            address=address,
            complete_configs=kind.COMPLETES_CONFIGS,
            extra=context.args,
            world=world,
        )
        sys.stdout.write(" ".join([*words, *map(shlex.quote, command)]) + "\n")
        return
    machine.check_ports(ports, address)
    warm = sorted(name for name, entry in table.entries.items() if entry.warm)
    with Server(
        repo,
        ports=ports,
        address=address,
        complete_configs=kind.COMPLETES_CONFIGS,
        extra=context.args,
        world=world,
        on_log=lambda line: stderr.print(line, markup=False, highlight=False, soft_wrap=True),
        # Triton 2.51 may crash before it says which warmup sample failed, and why.
        explain=lambda log: diagnosis.explain(log, table) or diagnosis.first_error(checking.check(opened)),
    ) as running:
        with stderr.status("starting tritonserver") as status:
            running.wait_until_ready(timeout, on_progress=lambda what, *_: status.update(what))
        if verify and (problems := diagnosis.verify(running.http_url, opened, config, table)):
            raise ServerError(one_message("the server is ready, but not right", problems))
        listening = f"listening at {address}: http {ports.http}, grpc {ports.grpc}, metrics {ports.metrics}"
        loaded = f"adapters loaded at start: {', '.join(warm) or 'none yet'}"
        sys.stdout.write(f"ready on http://{running.http_url} ({listening}); {loaded}\n")
        if verify:
            sys.stdout.write("verified: each of them answers, and an unregistered lora_task_id is refused\n")
        sys.stdout.flush()
        try:
            exit_status = running.wait()
        except _Interrupted as end:
            if end.args != (signal.SIGTERM,):
                raise
            exit_status = 0  # this is how systemd, Docker and Kubernetes end a service
    if exit_status:
        raise ServerError(f"tritonserver ended by itself, with status {exit_status}")


@app.command()
def generate(
    prompt: Annotated[str, typer.Argument(help="The text to send; '-' reads standard input.")],
    lora_name: Annotated[str | None, typer.Option("--lora-name", help="The adapter; none: the base model.")] = None,
    url: Url = "localhost:8000",
    max_tokens: Annotated[int, typer.Option("--max-tokens", min=1)] = 64,
    model: Annotated[str, typer.Option("--model", help="The model to ask.")] = "ensemble",
    as_json: AsJson = False,
) -> None:
    """Ask a running server, streaming the answer to the terminal."""
    from tritonlora.launch import client

    text = _text(sys.stdin) if prompt == "-" else prompt
    pieces = client.generate(text, lora_name=lora_name, max_tokens=max_tokens, url=url, model=model)
    if as_json:
        print_json({"lora_name": lora_name, "text_output": "".join(pieces)})
        return
    for piece in pieces:
        sys.stdout.write(piece)
        sys.stdout.flush()
    sys.stdout.write("\n")


app.add_typer(bench, name="bench")
