# SPDX-FileCopyrightText: the tritonlora authors
# SPDX-License-Identifier: Apache-2.0
"""Checks of the engine's model: its engine, its config.pbtxt with the warmup block, and its cache."""

from __future__ import annotations

import shlex
from collections.abc import Iterator

from tritonlora.check.findings import REPAIR, Finding, Subject, error, warning
from tritonlora.engine.cache_plan import CachePlan, loadable_remedy
from tritonlora.engine.profile import ENCODER_DECODER
from tritonlora.errors import ConfigError
from tritonlora.pbtxt.model_config import has_template
from tritonlora.repository import warmup
from tritonlora.repository.model_configs import may_pause
from tritonlora.repository.paths import RESOLVER, read_bytes
from tritonlora.repository.registry import pin_problem
from tritonlora.serving.adapter_table import AdapterTable
from tritonlora.serving.dtypes import DTYPES
from tritonlora.serving.file_version import has_content


def takes_adapters(subject: Subject) -> Iterator[Finding]:
    """The engine was built with LoRA, and its backend reads the adapters' dtype."""
    config, profile = subject.config, subject.profile
    where = f"{subject.repository.target}/config.pbtxt"
    location = subject.kind.model_location(config, subject.repository.target_directory)
    if profile is None and not has_template(location):
        yield warning(where, f"no config.json at {location}", "run check where the engine is")
    if profile is not None and not profile.modules:
        yield error(
            "engine",
            "it was built without LoRA: it ignores adapters and answers from the base model",
            subject.kind.ENABLE_LORA,
        )
    if profile is not None and profile.modules and subject.kind.WIRE.sends_weights:
        for problem, remedy in profile.faults():
            yield error("engine", problem, remedy)
    for dtype in sorted({entry.dtype for entry in subject.table.entries.values()}):
        if fault := subject.kind.backend_fault(config, dtype):
            yield error(where, *fault)


def reported(subject: Subject) -> Iterator[Finding]:
    """A warning for each report that LoRA does not work in this kind of engine."""
    if not subject.table.entries:
        return
    reports = [] if subject.profile is None else [*subject.profile.reports]
    encoder = subject.config.parameters.get("encoder_model_path", "")
    if encoder and not has_template(encoder):
        reports.append(ENCODER_DECODER)
    for problem, remedy in dict.fromkeys(reports):
        yield warning("engine", problem, remedy)


def beam_width(subject: Subject) -> Iterator[Finding]:
    """Neither max_beam_width nor a warmup sample asks for more beams than the engine was built for."""
    if subject.profile is None:
        return
    where, most = f"{subject.repository.target}/config.pbtxt", subject.profile.max_beam_width
    rebuild = f"set it to at most {most}, or build the engine with a larger --max_beam_width"
    asked = subject.config.parameters.get("max_beam_width", "")
    if asked.isdecimal() and int(asked) > most:
        yield error(where, f"max_beam_width is {asked}, and the engine was built for {most}", rebuild)
    asking = (file for file, inputs in subject.state.foreign_files.items() if "beam_width" in inputs)
    for file in asking:
        path = subject.repository.warmup_directory / file
        width = int.from_bytes(read_bytes(path)[:4], "little") if path.exists() else 0
        if width > most:
            problem = f"a model_warmup sample of your own asks for {width} beams, and the engine was built for {most}"
            yield error(f"warmup/{file}", problem, rebuild)


def declarations(subject: Subject) -> Iterator[Finding]:
    """The engine's model declares its LoRA inputs with the dtype and dims of the adapters."""
    where = f"{subject.repository.target}/config.pbtxt"
    for name in subject.kind.WIRE.missing([spec.name for spec in subject.config.inputs]):
        yield error(where, f"it declares no input {name}", subject.kind.ORIGIN)
    weights, rows = subject.config.input("lora_weights"), subject.config.input("lora_config")
    for name, entry in subject.table.entries.items():
        if weights and weights.data_type != DTYPES[entry.dtype].triton:
            yield error(where, f"lora_weights is {weights.data_type}, and adapter {name} is {entry.dtype}", REPAIR)
        if rows and isinstance(rows.dims, tuple) and rows.dims[-1] not in (-1, entry.lora_config_shape[1]):
            columns = entry.lora_config_shape[1]
            yield error(where, f"lora_config has dims {list(rows.dims)}, and adapter {name} has {columns}", REPAIR)


def warmup_block(subject: Subject) -> Iterator[Finding]:
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
        return  # `declarations` reports the reason
    for task_id, name in names.items():
        if task_id not in found:
            yield warning(where, f"adapter {name} has no warmup sample: it is loaded on its first request", REPAIR)
        elif found[task_id] != expected[task_id]:
            yield error(where, f"the warmup sample of adapter {name} has other dims than its files", REPAIR)
    for task_id in found.keys() - names.keys():
        yield error(where, f"it warms up lora_task_id {task_id}, which no warm adapter has", REPAIR)
    for file, content in files.items():
        if not has_content(subject.repository.warmup_directory / file, content):
            yield error(f"warmup/{file}", "it is missing or altered, and warmup samples need it", REPAIR)


def cache(subject: Subject) -> Iterator[Finding]:
    """The engine's LoRA cache in host memory has the capacity for the warm adapters, and each adapter fits."""
    where, found = f"{subject.repository.target}/config.pbtxt", subject.plan
    room = subject.kind.kept_adapters(subject.repository.target_directory)
    warm = sum(entry.warm for entry in subject.table.entries.values())
    if room is not None and 0 < room.host < warm:
        yield warning(
            "model.yaml",
            f"{warm} adapters are warm, and max_cpu_loras is {room.host}: the first ones leave while the server starts",
            f"set max_cpu_loras to {len(subject.table.entries)}, or add some with --no-warmup",
        )
    if found is None:
        return
    if RESOLVER in subject.configs:
        believed = subject.configs[RESOLVER].parameters.get("cache_pages", "0")
        if believed not in ("0", str(found.tightest.host_pages)):
            yield warning(
                f"{RESOLVER}/config.pbtxt",
                f"cache_pages is {believed}, and the engine's cache has {found.tightest.host_pages}",
                "tritonlora plan --apply",
            )
    planned = {adapter.name: adapter.pages for adapter in found.adapters}
    for name, entry in subject.table.entries.items():
        if entry.pages not in (None, planned[name]):
            yield warning(
                f"adapter {name}",
                f"it is registered with {entry.pages} pages of the engine's cache, and takes {planned[name]} now",
                "tritonlora plan --apply",
            )
    for remark in found.remarks:
        yield warning(where, remark, "tritonlora plan --apply")
    for refusal in dict.fromkeys(rank.refusal for rank in found.ranks if rank.refusal):
        yield error(where, f"the engine will not load: {refusal}", "tritonlora plan --apply")
    for adapter in found.unloadable:
        remedy = loadable_remedy(found, adapter, registered=True)
        yield error(
            f"adapter {adapter.name}", str(adapter.unloadable), f"{remedy}, or tritonlora remove {adapter.name}"
        )
    for name in found.diverging:
        yield warning(
            f"adapter {name}",
            "it takes different numbers of pages on different pipeline-parallel ranks, and not all adapters fit: one "
            "rank may evict an adapter that another rank still has",
            "tritonlora plan --apply",
        )
    yield from _device_cache(where, found)
    if not found.warm_fits:
        yield warning(
            where,
            f"the warm adapters take {found.tightest.warm_pages} pages, the cache has {found.tightest.host_pages}: "
            "the first ones are evicted while the server starts",
            "tritonlora plan --apply, or add some with --no-warmup",
        )


def pauses(subject: Subject) -> Iterator[Finding]:
    """The resolver knows whether the engine may pause requests; otherwise it is certain of what is not certain."""
    known = subject.configs[RESOLVER].parameters.get("target_may_pause") if RESOLVER in subject.configs else "true"
    if may_pause(subject.config) and known != "true":
        yield error(
            f"{RESOLVER}/config.pbtxt",
            f"batch_scheduler_policy of {subject.repository.target} is max_utilization, which the resolver does not "
            "know: requests may get errors of the engine's cache",
            f"tritonlora init {shlex.quote(str(subject.repository.root))}",
        )


def _device_cache(where: str, plan: CachePlan) -> Iterator[Finding]:
    """The engine's LoRA cache in GPU memory, if its size is known, has the capacity for each adapter."""
    if plan.device is None:
        return
    apply = f"tritonlora plan --apply --gpu-memory {plan.device.free_bytes}, or give the GPU more free memory"
    if plan.device.refusal:
        yield error(where, f"the engine will not load: {plan.device.refusal}", apply)
    for name in plan.device.never_scheduled:
        problem = "it is larger than the engine's LoRA cache in GPU memory: its requests would wait for ever"
        yield error(f"adapter {name}", problem, apply)


def pins(subject: Subject) -> Iterator[Finding]:
    """The resolver can keep all pinned adapters in the engine."""
    if problem := pin_problem(subject.state, subject.table):
        yield error("pinned adapters", *problem)
