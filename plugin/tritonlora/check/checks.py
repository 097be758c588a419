# SPDX-FileCopyrightText: the tritonlora authors
# SPDX-License-Identifier: Apache-2.0
"""Find everything that would keep the server from loading the repository or make its responses wrong.

A check is a function from a `Subject` to findings, listed in `CHECKS`. A check that fails does not stop the others.
Checks only read. `repository.upkeep.repair` repairs what can be repaired.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator

from tritonlora.check import adapters, engine, files, machine, routes
from tritonlora.check.findings import REPAIR, Finding, Subject, error
from tritonlora.errors import TritonLoraError
from tritonlora.files import reading
from tritonlora.machine import Ports
from tritonlora.repository.paths import Repository
from tritonlora.repository.state import read_state

CHECKS: tuple[Callable[[Subject], Iterator[Finding]], ...] = (
    files.placeholders,
    routes.steps,
    routes.batch_sizes,
    engine.takes_adapters,
    engine.reported,
    engine.beam_width,
    routes.router,
    adapters.files,
    adapters.rows,
    adapters.compositions,
    engine.declarations,
    engine.warmup_block,
    engine.cache,
    engine.pauses,
    engine.pins,
    files.leftovers,
    routes.response_caches,
    routes.resolver,
    routes.models_past_the_router,
    routes.left_streams,
    routes.torn_streams,
    routes.forwarded_streams,
    files.serving_code,
    machine.shared_memory,
    machine.ports,
)


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
        altered = [*adapters.altered(repository)]
        findings += [*altered, *adapters.remarks(repository, {finding.where for finding in altered})]
    return sorted(dict.fromkeys(findings), key=lambda finding: finding.severity)


def _findings(repository: Repository, ports: Ports | None, gpu_memory: int | None) -> list[Finding]:
    state = read_state(repository)
    config = state.models.served_config(repository.target)
    findings: list[Finding] = []
    configs = {repository.target: config}
    for name in state.models.names():
        try:
            configs.setdefault(name, state.models.config(name))
        except TritonLoraError as problem:
            findings.append(error(f"{name}/config.pbtxt", str(problem), "put the file right"))
    profile, plan = None, None
    try:
        profile = state.profile
    except TritonLoraError as problem:
        findings.append(error("gpt_model_path", str(problem), "give the parameter the engine's own directory"))
    else:
        with contextlib.suppress(TritonLoraError):  # `adapters.files` or `adapters.rows` reports the reason
            plan = state.plan(gpu_memory=gpu_memory)
    subject = Subject(state, config, configs, profile, plan, ports)
    for one in CHECKS:
        try:
            findings += one(subject)
        except TritonLoraError as problem:
            findings.append(error(f"{repository.target}/config.pbtxt", str(problem), REPAIR))
    return findings
