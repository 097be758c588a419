# SPDX-FileCopyrightText: the tritonlora authors
# SPDX-License-Identifier: Apache-2.0
"""Run a tritonserver on a repository with a router, with the options that its engine needs."""

from __future__ import annotations

import functools
import logging
import shlex
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from tritonlora.check.checks import check
from tritonlora.errors import ServerError
from tritonlora.launch import diagnosis, supervision
from tritonlora.launch.server import Server
from tritonlora.launch.tritonserver import (
    REGIONS,
    Tritonserver,
    check_extra,
    control_mode,
    find_tritonserver,
    server_command,
    values_of,
)
from tritonlora.machine import LOCAL, Ports
from tritonlora.repository.paths import RESOLVER, ROUTER, Repository
from tritonlora.repository.state import State, read_state
from tritonlora.targets import target_of

_LOGGER = logging.getLogger(__name__)


def serve(
    repository: Repository,
    *,
    ports: Ports | None = None,
    address: str = LOCAL,
    extra: Sequence[str] = (),
    world_size: int | None = None,
    on_log: Callable[[str], None] | None = None,
    keep_going: bool = False,
    on_note: Callable[[str], None] = _LOGGER.warning,
) -> Server:
    """The server of a repository. It runs while its `with` block does; call `wait_until_ready` inside.

    `ports` default to free ports, and `address`, a numeric address, to this machine only. `world_size`, the number of
    the engine's processes, defaults to the number that the engine was built for. `extra` are further options of
    tritonserver. `on_log` is called with each line of the server's log, in a thread of its own.

    Triton does not notice when a model's process dies. Once the server is ready, a thread looks for such a death. It
    loads the model again if it can. Otherwise it stops the server, and `Server.wait` and the end of the `with` block
    raise ServerError with the reason. With `keep_going` the server runs on. `on_note` gets a sentence of each death
    after which the server runs on; by default it is logged.

    Raises ServerError when the server cannot start. `wait_until_ready` raises ServerError when an adapter cannot be
    loaded, and names the adapter and a remedy.
    """
    state = read_state(repository)
    settings, table = _settings(state, extra, world_size), state.table

    def explain(log: Sequence[str]) -> str | None:
        # Triton 2.51 may crash before it says which warmup sample failed, and why.
        return diagnosis.explain(log, table) or diagnosis.first_error(check(repository))

    watch = functools.partial(supervision.watch, keep_going=keep_going, say=on_note)
    return Server(
        repository.root, ports=ports, address=address, on_log=on_log, explain=explain, watch=watch, **settings
    )


def command_line(
    repository: Repository, ports: Ports, *, address: str = LOCAL, extra: Sequence[str] = (), world_size: int | None
) -> str:
    """The command that `serve` would run, as a line for a shell.

    If no tritonserver is installed here, the line is for a machine that has tritonserver on PATH. `serve` itself adds
    digits to the prefix of the server's regions in /dev/shm, so that it can delete these regions.
    """
    settings = _settings(read_state(repository), extra, world_size)
    try:
        found = find_tritonserver()
    except ServerError:
        found = Tritonserver(Path("tritonserver"))
    environment = [f"{key}={shlex.quote(value)}" for key, value in found.environment.items()]
    command = server_command(found, repository.root, ports, address=address, shm_prefix=REGIONS, **settings)
    return " ".join([*environment, *map(shlex.quote, command)])


def _settings(state: State, extra: Sequence[str], world_size: int | None) -> dict[str, Any]:
    """Arguments of `Server` and of `server_command` that the repository and its engine decide."""
    check_extra(extra)
    repository = state.repository
    config = state.models.served_config(repository.target)
    diagnosis.refuse_cached_responses(repository)
    return {
        "complete_configs": target_of(config).COMPLETES_CONFIGS,
        "extra": [*extra, *needed_models(state, extra)],
        "world": diagnosis.world_of(repository, config, world_size),
    }


def needed_models(state: State, extra: Sequence[str]) -> list[str]:
    """Options that load the engine's model in explicit model-control mode, if `extra` loads a model that needs it.

    Triton loads the models of an ensemble's steps by itself. It does not load a model that another one calls by BLS.
    """
    named = {*values_of(extra, "--load-model")}
    if control_mode(extra) != "explicit" or "*" in named:
        return []
    for _ in state.models.names():  # an ensemble may be a step of another one
        configs = [config for name in named if (config := state.models.present(name))]
        named |= {step.model_name for config in configs for step in config.steps}
    target = state.repository.target
    return [f"--load-model={target}"] if named & {ROUTER, RESOLVER} and target not in named else []
