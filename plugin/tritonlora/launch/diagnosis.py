# SPDX-FileCopyrightText: the tritonlora authors
# SPDX-License-Identifier: Apache-2.0
"""Tell what a repository's adapters mean for its server: the processes, causes of a failed start, missing responses.

The module `server` runs a tritonserver and has no code for adapters.
"""

from __future__ import annotations

import contextlib
import re
from collections.abc import Sequence

from tritonlora import extras
from tritonlora.check.findings import Finding
from tritonlora.check.routes import LETS_GO_VERSION, batched_streams, cached_responses
from tritonlora.errors import ServerError, TritonLoraError, one_message
from tritonlora.launch import client
from tritonlora.launch.tritonserver import World
from tritonlora.pbtxt.model_config import ModelConfig
from tritonlora.repository.paths import ROUTER, Repository, engine_profile, read_config
from tritonlora.repository.warmup import task_id_of_sample
from tritonlora.serving.adapter_table import MAX_TASK_ID, AdapterTable
from tritonlora.serving.engine_errors import Meaning, meaning_of
from tritonlora.serving.response_cache import CACHED
from tritonlora.targets import target_of

VERIFY_TIMEOUT_SECONDS = 120.0

# Messages in the log. core, src/backend_model_instance.cc: a sample that the model refused, and a sample with wrong
# files. The LLM API's helpers.py: a path that does not exist.
_FAILED_SAMPLE = re.compile(r"failed to run warmup sample '(?P<sample>[^']+)': (?P<error>.*)")
_BAD_FILE = re.compile(
    r"(?P<error>(?:warmup setting expects|failed to open)"
    r".*\b(?:adapter_(?:model|config)|lora_(?:id|name|path))_(?P<id>\d+)(?:\.bin)?(?!\d).*)"
)
_BAD_PATH = re.compile(r"(?P<error>lora_path does not exist on .*/adapter_(?P<id>\d+)\b.*)")
_NO_MODULE = re.compile(r"No module named '(?P<module>\w+)")
_REMEDIES = {
    "same data type as base model": "tritonlora check says which dtype the engine takes",
    "not enabled for this model": "build the engine with that module, or convert the adapter without it",
    "low_rank": "build the engine with a larger --max_lora_rank",
    "has to few values": "convert the adapter for this engine: tritonlora add {name} ADAPTER_DIR",
    "layerId": "convert the adapter for this engine: tritonlora add {name} ADAPTER_DIR",
    "bytes, but the data provided": "its file was cut; write it again: tritonlora add {name} ADAPTER_DIR",
    "lora_path does not exist": "tritonlora check --fix; if the server sees it elsewhere, first init --served-at PATH",
    "failed to open": "its file is missing; write it again: tritonlora add {name} ADAPTER_DIR",
}
_FULL = "make the engine's LoRA cache larger: tritonlora plan --apply"
_ELSE = "tritonlora check may say why; without it the server starts: tritonlora remove {name}"


def world_of(repository: Repository, config: ModelConfig, size: int | None = None) -> World:
    """The processes that serve the engine: `size`, else the number that the engine was built for, else one."""
    if size is None and target_of(config).SERVER_FOR_EACH_PROCESS:
        try:
            profile = engine_profile(repository, config)
        except TritonLoraError:  # `check` reports the error; a server may start without the profile
            profile = None
        size = profile.tp_size * profile.pp_size if profile else 1
    return World(size or 1, repository.target)


def refuse_cached_responses(repository: Repository) -> None:
    """Raise ServerError, which names each file, if the response cache is on for a model that adapters depend on.

    A config.pbtxt that cannot be read is left out: Triton reports what is wrong with it.
    """
    configs = _readable_configs(repository)
    if found := [f"{one.where}: {one.remedy}" for one in cached_responses(configs, repository.target)]:
        raise ServerError(one_message(f"response_cache is on. {CACHED}", sorted(found)))


def version_notes(repository: Repository, config: ModelConfig, version: str | None) -> list[str]:
    """Notes on what a server of `version`, such as "2.51.0", does wrong with the repository's models. None: unknown."""
    numbers = re.match(r"(\d+)\.(\d+)", version or "")
    if numbers and (int(numbers[1]), int(numbers[2])) >= LETS_GO_VERSION:
        return []
    configs = {**_readable_configs(repository), repository.target: config}
    this = f"this server is Triton {version}; " if version else ""
    return [f"{one.where}: {one.problem}; {this}{one.remedy}" for one in batched_streams(configs, repository.target)]


def _readable_configs(repository: Repository) -> dict[str, ModelConfig]:
    configs = {}
    for path in repository.root.glob("*/config.pbtxt"):
        with contextlib.suppress(TritonLoraError):
            configs[path.parent.name] = read_config(path)
    return configs


def explain(log: Sequence[str], table: AdapterTable) -> str | None:
    """The adapter or the missing package that kept the server from starting, with the remedy, from its log; or None."""
    for line in log:
        lacking = _NO_MODULE.search(line)
        if lacking and (extra := extras.extra_of(lacking["module"])):
            return f"{lacking['module']} is not installed in the server's Python\n  remedy: {extras.install(extra)}"
        failed = _FAILED_SAMPLE.search(line)
        if failed:
            task_id = task_id_of_sample(failed["sample"])
        else:
            failed = _BAD_FILE.search(line) or _BAD_PATH.search(line)
            task_id = int(failed["id"]) if failed else None
        name = table.name_of(task_id) if task_id is not None else None
        if failed is None or name is None:
            continue
        known = [text for mark, text in _REMEDIES.items() if mark in failed["error"]]
        remedy = _FULL if meaning_of(failed["error"]) is Meaning.FULL else known[0] if known else _ELSE
        error = failed["error"].rstrip(' ;"|')
        return f"adapter {name!r} could not be loaded: {error}\n  remedy: {remedy.format(name=name)}"
    return None


def first_error(findings: Sequence[Finding]) -> str | None:
    """The first error among the findings, with its remedy; None if there is no error."""
    errors = (one for one in findings if one.severity == "error")
    return next((f"{one.where}: {one.problem}\n  remedy: {one.remedy}" for one in errors), None)


def verify(url: str, repository: Repository, config: ModelConfig, table: AdapterTable) -> list[str]:
    """Send a request for every warm adapter, and one for an unregistered task id; return the problems found.

    An engine that gets adapters as tensors gets these requests directly, with a task id and no weights. It can then
    only respond with an adapter that its warmup loaded.
    """
    kind = target_of(config)
    model = repository.target if kind.WIRE.sends_weights else ROUTER
    shared = {name: one.value for name, one in kind.SHARED_INPUTS.items() if config.input(name) is not None}
    problems = []
    for name, entry in sorted(table.entries.items()):
        if not entry.warm:
            continue
        adapter = {kind.WIRE.task_id: entry.lora_task_id}
        try:
            client.ask(model, {**shared, **adapter}, url=url, timeout=VERIFY_TIMEOUT_SECONDS)
        except ServerError as error:
            is_evicted = meaning_of(str(error)) is Meaning.MISS
            remedy = "; its cache is too small: tritonlora plan --apply" if is_evicted else ""
            problems.append(f"adapter {name!r} does not answer: {error}{remedy}")
    unregistered = next(number for number in range(MAX_TASK_ID, 0, -1) if table.name_of(number) is None)
    try:
        client.ask(model, {**shared, kind.WIRE.task_id: unregistered}, url=url, timeout=VERIFY_TIMEOUT_SECONDS)
    except ServerError as error:
        if kind.WIRE.sends_weights and meaning_of(str(error)) is not Meaning.MISS:
            problems.append(
                f"{kind.WIRE.task_id} {unregistered}, which is not registered, was refused with another error than a "
                f"cache miss: {error}"
            )
    else:
        problems.append(
            f"{model!r} answered {kind.WIRE.task_id} {unregistered}, which is not registered: it ignores adapters, and "
            f"answers from the base model; {kind.ENABLE_LORA}"
        )
    return problems
