# SPDX-FileCopyrightText: the tritonlora authors
# SPDX-License-Identifier: Apache-2.0
"""The registered adapters and their states, as the model `lora_adapters` lists them for clients.

| state | meaning |
|---|---|
| warm | the engine holds the adapter; its warmup loads it at every start |
| loaded | the engine holds the adapter, since a request has loaded it |
| unknown | the engine was sent the adapter, and may have evicted it |
| cold | the engine does not hold the adapter; it is loaded for the next request |
| unavailable | requests for the adapter are refused; `reason` says why |
"""

from __future__ import annotations

import os
import re
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from .adapter_table import AdapterEntry, AdapterTable, described_aliases
from .adapter_tensors import check_files
from .bindings import check_content
from .errors import AdapterUnavailable
from .routing import Route, malformed

HELD = ("warm", "loaded")


@dataclass(frozen=True, slots=True)
class Engine:
    """What the resolver knows of the engine."""

    states: Mapping[int, bool]  # lora_task_id -> whether the engine certainly has the adapter; False: it may have it
    contents: Mapping[int, str]  # lora_task_id -> the content that the engine was started with or sent, see `bindings`


def describe(
    table: AdapterTable, repository: Path, engine: Engine, only: Collection[str] | None = None
) -> dict[str, dict[str, Any]]:
    """lora_name -> the JSON fields of each adapter, or of the adapters `only`.

    A malformed entry, and an alias of an unregistered adapter, have a state and a reason alone.
    """
    aliases = table.aliases_by_name()
    found: dict[str, dict[str, Any]] = {}
    for name in [*table.entries, *table.unavailable] if only is None else only:
        if name in table.unavailable:
            found[name] = {"state": "unavailable", "reason": str(malformed(table, name))}
            continue
        route = Route(name, table.entries[name])
        state = _state(repository, route, engine)
        found[name] = {**state, **_describe(route.entry), **described_aliases(aliases.get(name, {}))}
    return found


def _describe(entry: AdapterEntry) -> dict[str, Any]:
    return {
        "lora_task_id": entry.lora_task_id,
        "dtype": entry.dtype,
        "lora_weights_shape": list(entry.lora_weights_shape),
        "lora_config_shape": list(entry.lora_config_shape),
        "adapter_sizes": list(entry.adapter_sizes),
        "modules": list(entry.modules),
        "base_model_name_or_path": public_base(entry.base_model_name_or_path),
        "added_at": entry.added_at,
        "pinned": entry.pinned,
    }


_PART = r"[A-Za-z0-9](?:[\w.-]{0,94}[A-Za-z0-9])?"
_HUB_NAME = re.compile(rf"(?!.*(?:--|\.\.)){_PART}/{_PART}", re.ASCII)  # huggingface_hub, validate_repo_id


def public_base(name_or_path: str) -> str | None:
    """The base model's name on the Hugging Face hub, which clients may see; None for a path.

    A name has the form organisation/name, and is no existing path on this machine. A relative path can have that form,
    too. If it exists, `tritonlora add` registers the absolute path in its place.
    """
    is_path = not _HUB_NAME.fullmatch(name_or_path) or os.path.exists(name_or_path)  # noqa: PTH110  it may be no path
    return None if is_path else name_or_path


def _state(repository: Path, route: Route, engine: Engine) -> Mapping[str, str]:
    entry = route.entry
    try:
        check_files(repository, route)
        check_content(route, engine.contents)
    except AdapterUnavailable as error:
        return {"state": "unavailable", "reason": str(error)}
    if entry.lora_task_id not in engine.states:
        return {"state": "cold"}
    if not engine.states[entry.lora_task_id]:
        return {"state": "unknown"}
    return {"state": "warm" if entry.warm else "loaded"}
