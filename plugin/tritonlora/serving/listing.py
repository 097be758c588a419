# SPDX-FileCopyrightText: the tritonlora authors
# SPDX-License-Identifier: Apache-2.0
"""Which adapters there are, and in which state: what `lora_adapters` tells clients.

| state | meaning |
|---|---|
| warm | the engine holds it; its warmup loads it at every start |
| loaded | the engine holds it since it was asked for |
| unknown | the engine had it, and may have evicted it since: nobody has told the router how large the cache is |
| cold | the engine does not hold it; the next request brings its weights |
| unavailable | requests for it are refused; `reason` says why |
"""

from __future__ import annotations

import os
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from .adapter_table import AdapterEntry, AdapterTable
from .adapter_tensors import check_files
from .errors import AdapterUnavailable
from .residency import Residency
from .routing import Route, check_id, malformed


def describe(
    table: AdapterTable, repository: Path, residency: Residency, only: str | None = None
) -> dict[str, dict[str, Any]]:
    """What is known of each adapter, or of one of them, by lora_name. `residency` is what the router believes.

    Of an entry that is malformed, and of an alias of nothing, that is the state and the reason.
    """
    names = table.entries if only is None else (only,)
    aliases, held = table.aliases_by_name(), residency.certainty()
    found = {}
    for name in names:
        route = Route(name, table.entries[name])
        state = _state(repository, route, residency, held)
        found[name] = {**state, **_describe(route.entry), "aliases": aliases.get(name, [])}
    if only is None:
        for name in table.unavailable:
            found[name] = {"state": "unavailable", "reason": str(malformed(table, name))}
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
    }


_PART = r"[A-Za-z0-9](?:[\w.-]{0,94}[A-Za-z0-9])?"
_HUB_NAME = re.compile(rf"(?!.*(?:--|\.\.)){_PART}/{_PART}", re.ASCII)  # huggingface_hub, validate_repo_id


def public_base(name_or_path: str) -> str | None:
    """What clients are told of an adapter's base model: its name on the Hugging Face hub, else None.

    No path leaves the server. A name has the form organisation/name, and leads nowhere on this machine. A relative path
    can have that form, too: where it leads somewhere, `tritonlora add` notes the absolute path in its place.
    """
    is_path = not _HUB_NAME.fullmatch(name_or_path) or os.path.exists(name_or_path)  # noqa: PTH110  it may be no path
    return None if is_path else name_or_path


def _state(repository: Path, route: Route, residency: Residency, held: Mapping[int, bool]) -> Mapping[str, str]:
    entry = route.entry
    try:
        check_files(repository, route)
        check_id(route, residency.may_give)
    except AdapterUnavailable as error:
        return {"state": "unavailable", "reason": str(error)}
    if entry.lora_task_id not in held:
        return {"state": "cold"}
    if not held[entry.lora_task_id]:
        return {"state": "unknown"}
    return {"state": "warm" if entry.warm else "loaded"}
