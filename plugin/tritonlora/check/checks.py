# SPDX-FileCopyrightText: the tritonlora authors
# SPDX-License-Identifier: Apache-2.0
"""Find everything that would keep the server from loading the repository or make its responses wrong.

A check is a function from a `Subject` to findings, listed in `CHECKS`. A check that fails does not stop the others.
Checks only read. `repository.add.repair` repairs what can be repaired.
"""

from __future__ import annotations

import contextlib
import shlex
from collections.abc import Callable, Collection, Iterator

from tritonlora.architectures.lora_modules import BY_ID, row_elements
from tritonlora.check import around
from tritonlora.check.findings import Finding, Subject
from tritonlora.check.findings import error as _error
from tritonlora.check.findings import warning as _warning
from tritonlora.engine.cache_plan import CachePlan, loadable_remedy, pipeline_problems
from tritonlora.engine.lora_cache import Rows
from tritonlora.engine.profile import ENCODER_DECODER
from tritonlora.errors import ConfigError, EngineMismatch, TritonLoraError
from tritonlora.files import reading, sha256_of
from tritonlora.machine import Ports
from tritonlora.pbtxt.model_config import has_template
from tritonlora.repository import generated, warmup
from tritonlora.repository.compose import command_again, replaced_since
from tritonlora.repository.paths import (
    RESOLVER,
    ROUTER,
    Repository,
    half_written,
    read_bytes,
    read_table,
)
from tritonlora.repository.registry import pin_problem
from tritonlora.repository.state import read_state
from tritonlora.serving.adapter_table import AdapterEntry, AdapterTable
from tritonlora.serving.dtypes import DTYPES
from tritonlora.serving.file_version import has_content

REPAIR = "tritonlora check --fix"


def check(
    repository: Repository, *, deep: bool = False, ports: Ports | None = None, gpu_memory: int | None = None
) -> list[Finding]:
    """All findings of the repository, errors first.

    `deep`: also compare the files' SHA-256 with adapters.json, and look for layers in which an adapter changes nothing.
    `ports`: warn where one of them is in use. `gpu_memory`: the free memory of each GPU when the engine makes its
    caches, in bytes; None: the cache in GPU memory is not checked.

    The files are read under the repository's lock, so a command that is just writing causes no finding. The files are
    hashed after that without the lock, since that may take minutes. Raises TritonLoraError only where nothing can be
    checked: adapters.json, or the config.pbtxt of the engine's model, cannot be read.
    """
    with reading(repository.table_path.parent) as is_steady:
        findings = _findings(repository, ports, gpu_memory)
    if findings and not is_steady:  # there was no lock file to take; a first command may have begun to write
        with reading(repository.table_path.parent):
            findings = _findings(repository, ports, gpu_memory)
    if deep:
        altered = [*_altered(repository)]
        findings += [*altered, *_remarks(repository, {finding.where for finding in altered})]
    return sorted(dict.fromkeys(findings), key=lambda finding: finding.severity)


def _findings(repository: Repository, ports: Ports | None, gpu_memory: int | None) -> list[Finding]:
    state = read_state(repository)
    config = state.models.served_config(repository.target)
    findings: list[Finding] = []
    configs = {repository.target: config}
    for name in state.models.names():
        try:
            configs.setdefault(name, state.models.config(name))
        except TritonLoraError as error:
            findings.append(_error(f"{name}/config.pbtxt", str(error), "put the file right"))
    profile, plan = None, None
    try:
        profile = state.profile
    except TritonLoraError as error:
        findings.append(_error("gpt_model_path", str(error), "give the parameter the engine's own directory"))
    else:
        with contextlib.suppress(TritonLoraError):  # _files or _rows reports the reason
            plan = state.plan(gpu_memory=gpu_memory)
    subject = Subject(state, config, configs, profile, plan, ports)
    for one in CHECKS:
        try:
            findings += one(subject)
        except TritonLoraError as error:
            findings.append(_error(f"{repository.target}/config.pbtxt", str(error), REPAIR))
    return findings


# The engine's model


def _engine(subject: Subject) -> Iterator[Finding]:
    """The engine was built with LoRA, and its backend reads the adapters' dtype."""
    config, profile = subject.config, subject.profile
    where = f"{subject.repository.target}/config.pbtxt"
    location = subject.kind.model_location(config, subject.repository.target_directory)
    if profile is None and not has_template(location):
        yield _warning(where, f"no config.json at {location}", "run check where the engine is")
    if profile is not None and not profile.modules:
        yield _error(
            "engine",
            "it was built without LoRA: it ignores adapters and answers from the base model",
            subject.kind.ENABLE_LORA,
        )
    if profile is not None and profile.modules and subject.kind.WIRE.sends_weights:
        for problem, remedy in profile.faults():
            yield _error("engine", problem, remedy)
    for dtype in sorted({entry.dtype for entry in subject.table.entries.values()}):
        if fault := subject.kind.backend_fault(config, dtype):
            yield _error(where, *fault)


def _reported(subject: Subject) -> Iterator[Finding]:
    """A warning for each report that LoRA does not work in this kind of engine."""
    if not subject.table.entries:
        return
    reports = [] if subject.profile is None else [*subject.profile.reports]
    encoder = subject.config.parameters.get("encoder_model_path", "")
    if encoder and not has_template(encoder):
        reports.append(ENCODER_DECODER)
    for problem, remedy in dict.fromkeys(reports):
        yield _warning("engine", problem, remedy)


def _beam_width(subject: Subject) -> Iterator[Finding]:
    """Neither max_beam_width nor a warmup sample asks for more beams than the engine was built for."""
    if subject.profile is None:
        return
    where, most = f"{subject.repository.target}/config.pbtxt", subject.profile.max_beam_width
    rebuild = f"set it to at most {most}, or build the engine with a larger --max_beam_width"
    asked = subject.config.parameters.get("max_beam_width", "")
    if asked.isdecimal() and int(asked) > most:
        yield _error(where, f"max_beam_width is {asked}, and the engine was built for {most}", rebuild)
    asking = (file for file, inputs in subject.state.foreign_files.items() if "beam_width" in inputs)
    for file in asking:
        path = subject.repository.warmup_directory / file
        width = int.from_bytes(read_bytes(path)[:4], "little") if path.exists() else 0
        if width > most:
            problem = f"a model_warmup sample of your own asks for {width} beams, and the engine was built for {most}"
            yield _error(f"warmup/{file}", problem, rebuild)


# The adapters


def _files(subject: Subject) -> Iterator[Finding]:
    """Each adapter's files exist, are whole, and belong to no other adapter."""
    root = subject.repository.root
    registered: dict[str, set[str]] = {}
    for entry in subject.table.entries.values():
        for file, digest in entry.sha256_by_file.items():
            registered.setdefault(file, set()).add(digest)
    for name, entry in subject.table.entries.items():
        files = entry.sha256_by_file
        missing = [
            f"{file} is {'not a file' if (root / file).exists() else 'missing'}"
            for file in files
            if not (root / file).is_file()
        ]
        twice = [
            f"{file} is another adapter's, too, with another SHA-256" for file in files if len(registered[file]) > 1
        ]
        for problem in missing or twice or subject.kind.stored_problems(root, entry):
            yield _error(f"adapter {name}", problem, _add_again(name, entry))


def _altered(repository: Repository) -> Iterator[Finding]:
    """Each adapter's files have the registered SHA-256. Files that do not are hashed again under the lock."""
    entries = read_table(repository).entries
    suspects = {name for name, entry in entries.items() if any(_alterations(repository, entry))}
    if suspects:
        with reading(repository.table_path.parent):
            entries = read_table(repository).entries
            for name in sorted(suspects & entries.keys()):
                for problem in _alterations(repository, entries[name]):
                    yield _error(f"adapter {name}", problem, _add_again(name, entries[name]))


def _alterations(repository: Repository, entry: AdapterEntry) -> Iterator[str]:
    for file, digest in entry.sha256_by_file.items():
        path = repository.root / file
        try:
            if path.is_file() and sha256_of(path) != digest:
                yield f"{file} was altered: its SHA-256 is not the registered one"
        except FileNotFoundError:
            continue  # it was removed meanwhile
        except OSError as error:
            yield f"{file} cannot be read: {error.strerror}"


def _remarks(repository: Repository, altered: Collection[str]) -> Iterator[Finding]:
    """Layers in which an unaltered adapter changes nothing. Faults of files or the engine are left to other checks.

    The table has the remark of `add` on layers without tensors: lora_config does not say which layers were targeted.
    """
    state = read_state(repository)
    profile = None
    with contextlib.suppress(TritonLoraError):
        profile = state.profile
    for name, entry in state.table.entries.items():
        remarks = [*entry.remarks]
        if f"adapter {name}" in altered:
            continue
        with contextlib.suppress(TritonLoraError, OSError, KeyError):
            remarks += state.kind.stored_remarks(repository.root, entry, profile)
        for remark in remarks:
            yield _warning(
                f"adapter {name}",
                remark,
                f"if that is not meant, take another checkpoint of the adapter, or {_add_again(name, entry)}",
            )


def _add_again(name: str, entry: AdapterEntry) -> str:
    return f"add it again: {command_again(name, entry)}"


def _compositions(subject: Subject) -> Iterator[Finding]:
    """Each composition was made of the adapters that are registered now."""
    for name, entry in subject.table.entries.items():
        for part, (then, now) in replaced_since(subject.table, entry).items():
            yield _warning(
                f"adapter {name}",
                f"it was composed of {part} as it was under lora_task_id {then}, and {part} has {now} now",
                f"if it is to follow, compose it again: {command_again(name, entry)}",
            )


def _rows(subject: Subject) -> Iterator[Finding]:
    """This engine accepts the rows of each adapter."""
    for name, entry in subject.table.entries.items():
        try:
            rows = subject.kind.rows(subject.repository.root, entry, subject.profile)
            problems = list(dict.fromkeys(_row_problems(entry, rows, subject)))
        except TritonLoraError as error:
            # _files reports broken files. Without the engine's profile nothing can be compared.
            problems = [str(error)] if subject.profile and isinstance(error, EngineMismatch) else []
        for problem in problems:
            remedy = f"convert it for this engine: {command_again(name, entry)}; or tritonlora remove {name}"
            yield _error(f"adapter {name}", problem, remedy)


def _row_problems(entry: AdapterEntry, rows: Rows, subject: Subject) -> Iterator[str]:
    """Reasons why TensorRT-LLM's loraValidateRequestTensors (runtime/loraUtils.cpp) would refuse the adapter."""
    profile = subject.profile
    if profile and subject.kind.WIRE.sends_weights and entry.dtype != profile.dtype:
        yield f"it is {entry.dtype}, and the engine takes {profile.dtype}"
    for module_id, layer, size, *dora in rows:
        module = BY_ID.get(module_id)
        if module is None or size < 1:
            yield f"lora_config has the row ({module_id}, {layer}, {size}), which no engine takes"
        elif profile is not None:
            dims, width = profile.modules.get(module.name), entry.lora_weights_shape[1]
            if dims is None:
                yield f"the engine has no LoRA for {module.name}"
            elif row_elements(size, dims.in_features, dims.out_features, dora=any(dora)) > width:
                yield f"its rows are too short for {module.name} ({dims.in_features} to {dims.out_features})"
            if not 0 <= layer < profile.num_layers:
                yield f"it has layer {layer}, and the engine has {profile.num_layers}"
            if size > profile.rank_limit:
                yield f"it has rank {size}, and the engine's max_lora_rank is {profile.max_lora_rank}"
    if profile and subject.kind.WIRE.sends_weights:
        yield from pipeline_problems(rows, profile)


def _declarations(subject: Subject) -> Iterator[Finding]:
    """The engine's model declares its LoRA inputs with the dtype and dims of the adapters."""
    where = f"{subject.repository.target}/config.pbtxt"
    for name in subject.kind.WIRE.missing([spec.name for spec in subject.config.inputs]):
        yield _error(where, f"it declares no input {name}", subject.kind.ORIGIN)
    weights, rows = subject.config.input("lora_weights"), subject.config.input("lora_config")
    for name, entry in subject.table.entries.items():
        if weights and weights.data_type != DTYPES[entry.dtype].triton:
            yield _error(where, f"lora_weights is {weights.data_type}, and adapter {name} is {entry.dtype}", REPAIR)
        if rows and isinstance(rows.dims, tuple) and rows.dims[-1] not in (-1, entry.lora_config_shape[1]):
            columns = entry.lora_config_shape[1]
            yield _error(where, f"lora_config has dims {list(rows.dims)}, and adapter {name} has {columns}", REPAIR)


def _warmup_block(subject: Subject) -> Iterator[Finding]:
    """The generated model_warmup block agrees with adapters.json, and its files exist."""
    where = f"{subject.repository.target}/config.pbtxt"
    names = {entry.lora_task_id: name for name, entry in subject.table.entries.items() if entry.warm}
    found = {sample.task_id: sample for sample in warmup.read_block(subject.state.document.text)}
    loaded = {name: entry for name, entry in subject.table.entries.items() if entry.lora_task_id in found}
    files = warmup.files(subject.config, AdapterTable(loaded), subject.repository.served_root) if found else {}
    try:
        block = warmup.render_block(subject.config, warmup.samples(subject.config, subject.table))
        expected = {sample.task_id: sample for sample in warmup.read_block(warmup.replace_block("", block))}
    except ConfigError:
        return  # _declarations reports the reason
    for task_id, name in names.items():
        if task_id not in found:
            yield _warning(where, f"adapter {name} has no warmup sample: it is loaded on its first request", REPAIR)
        elif found[task_id] != expected[task_id]:
            yield _error(where, f"the warmup sample of adapter {name} has other dims than its files", REPAIR)
    for task_id in found.keys() - names.keys():
        yield _error(where, f"it warms up lora_task_id {task_id}, which no warm adapter has", REPAIR)
    for file, content in files.items():
        if not has_content(subject.repository.warmup_directory / file, content):
            yield _error(f"warmup/{file}", "it is missing or altered, and warmup samples need it", REPAIR)


def _cache(subject: Subject) -> Iterator[Finding]:
    """The engine's LoRA cache in host memory has the capacity for the warm adapters, and each adapter fits."""
    where, found = f"{subject.repository.target}/config.pbtxt", subject.plan
    room = subject.kind.kept_adapters(subject.repository.target_directory)
    warm = sum(entry.warm for entry in subject.table.entries.values())
    if room is not None and 0 < room.host < warm:
        yield _warning(
            "model.yaml",
            f"{warm} adapters are warm, and max_cpu_loras is {room.host}: the first ones leave while the server starts",
            f"set max_cpu_loras to {len(subject.table.entries)}, or add some with --no-warmup",
        )
    if found is None:
        return
    if RESOLVER in subject.configs:
        believed = subject.configs[RESOLVER].parameters.get("cache_pages", "0")
        if believed not in ("0", str(found.tightest.host_pages)):
            yield _warning(
                f"{RESOLVER}/config.pbtxt",
                f"cache_pages is {believed}, and the engine's cache has {found.tightest.host_pages}",
                "tritonlora plan --apply",
            )
    planned = {adapter.name: adapter.pages for adapter in found.adapters}
    for name, entry in subject.table.entries.items():
        if entry.pages not in (None, planned[name]):
            yield _warning(
                f"adapter {name}",
                f"it is registered with {entry.pages} pages of the engine's cache, and takes {planned[name]} now",
                "tritonlora plan --apply",
            )
    for remark in found.remarks:
        yield _warning(where, remark, "tritonlora plan --apply")
    for refusal in dict.fromkeys(rank.refusal for rank in found.ranks if rank.refusal):
        yield _error(where, f"the engine will not load: {refusal}", "tritonlora plan --apply")
    for adapter in found.unloadable:
        remedy = loadable_remedy(found, adapter, registered=True)
        yield _error(
            f"adapter {adapter.name}", str(adapter.unloadable), f"{remedy}, or tritonlora remove {adapter.name}"
        )
    for name in found.diverging:
        yield _warning(
            f"adapter {name}",
            "it takes different numbers of pages on different pipeline-parallel ranks, and not all adapters fit: one "
            "rank may evict an adapter that another rank still has",
            "tritonlora plan --apply",
        )
    yield from _device_cache(where, found)
    if not found.warm_fits:
        yield _warning(
            where,
            f"the warm adapters take {found.tightest.warm_pages} pages, the cache has {found.tightest.host_pages}: "
            "the first ones are evicted while the server starts",
            "tritonlora plan --apply, or add some with --no-warmup",
        )


def _pins(subject: Subject) -> Iterator[Finding]:
    """The resolver can keep all pinned adapters in the engine."""
    if problem := pin_problem(subject.state, subject.table):
        yield _error("pinned adapters", *problem)


def _device_cache(where: str, plan: CachePlan) -> Iterator[Finding]:
    """The engine's LoRA cache in GPU memory, if its size is known, has the capacity for each adapter."""
    if plan.device is None:
        return
    apply = f"tritonlora plan --apply --gpu-memory {plan.device.free_bytes}, or give the GPU more free memory"
    if plan.device.refusal:
        yield _error(where, f"the engine will not load: {plan.device.refusal}", apply)
    for name in plan.device.never_scheduled:
        problem = "it is larger than the engine's LoRA cache in GPU memory: its requests would wait for ever"
        yield _error(f"adapter {name}", problem, apply)


# What leads to them


def _router(subject: Subject) -> Iterator[Finding]:
    """The router declares what the engine's model declares, and no ensemble goes past the router."""
    root, target = subject.repository.root, subject.repository.target
    init = f"tritonlora init {shlex.quote(str(root))}"
    router = subject.configs[ROUTER]
    mine = {spec.name: spec for spec in (*router.inputs, *router.outputs)}
    for spec in (*subject.config.inputs, *subject.config.outputs):
        here = mine.get(spec.name)
        if spec.name in subject.kind.WIRE.router_only:
            continue
        if here is None or (here.data_type, here.dims) != (spec.data_type, spec.dims):
            yield _error(f"{ROUTER}/config.pbtxt", f"{spec.name} is not declared as {target} declares it", init)
    if router.decoupled != subject.config.decoupled:
        yield _error(f"{ROUTER}/config.pbtxt", f"its transaction policy is not that of {target}", init)
    for name, config in subject.configs.items():
        if config.leads_to(target) and not config.leads_to(ROUTER) and not config.leads_to(RESOLVER):
            yield _error(f"{name}/config.pbtxt", f"it leads to {target} past the router: names have no effect", init)


def _leftovers(subject: Subject) -> Iterator[Finding]:
    """Files that a stopped command or a replaced adapter left behind."""
    for path in half_written(subject.repository.root):
        yield _warning(subject.repository.relative(path), "a command that was stopped left it half-written", REPAIR)
    outlived = {*generated.left_over(subject.state)}
    mine = subject.state.foreign_files
    for path in sorted(subject.repository.warmup_directory.glob("*")):
        task_id = warmup.task_id_of(path.name)
        if path in outlived:
            yield _warning(f"warmup/{path.name}", "it belongs to an adapter that was removed or replaced", REPAIR)
        elif path.name not in mine and (task_id or 0) >= subject.table.next_lora_task_id:
            yield _warning(
                f"warmup/{path.name}",
                "no adapter has it: an `add` that was stopped left it, or it is a file of your own",
                "add that adapter again, or delete the file",
            )


CHECKS: tuple[Callable[[Subject], Iterator[Finding]], ...] = (
    around.placeholders,
    around.steps,
    _engine,
    _reported,
    _beam_width,
    _router,
    _files,
    _rows,
    _compositions,
    _declarations,
    _warmup_block,
    _cache,
    _pins,
    _leftovers,
    around.response_caches,
    around.resolver,
    around.models_past_the_router,
    around.left_streams,
    around.torn_streams,
    around.forwarded_streams,
    around.serving_code,
    around.shared_memory,
    around.ports,
)
