# SPDX-FileCopyrightText: the tritonlora authors
# SPDX-License-Identifier: Apache-2.0
"""Finds out what a server serves: the model to ask, its inputs, the base model's tokenizer and its context length."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tritonlora.errors import ModelConfigError, ServerError
from tritonlora.openai import chat_tokenizer
from tritonlora.openai.engine_model import EngineModel
from tritonlora.openai.settings import Settings
from tritonlora.openai.triton_client import ServerRefused, TritonClient
from tritonlora.pbtxt.model_config import DATA_TYPES
from tritonlora.repository.paths import LISTING, ROUTER, TOKENS

_STOP = ("input_ids", "input_lengths", "request_output_len", "stop")


@dataclass(frozen=True, slots=True)
class Served:
    """What a server serves."""

    base_name: str  # the base model's id for clients
    model: EngineModel
    context_length: int | None  # tokens of prompt and response


async def discover(client: TritonClient, settings: Settings) -> Served:
    """What the server serves.

    ServerGone when it does not answer; ServerError when one of its models is missing; ModelConfigError when the
    tokenizer is.
    """
    names = await client.models()
    model = next((name for name in (TOKENS, ROUTER) if name in names), None)
    if model is None or LISTING not in names:
        missing = LISTING if model else f"{TOKENS!r} or {ROUTER}"
        raise ServerError(
            f"the server at {settings.url} has no model {missing!r} that is ready; run tritonlora init on its model "
            "repository, and start it again (in explicit mode: load that model, too)"
        )
    configs = {name: await client.config(name) for name in names}
    asked = configs[model]
    target = _parameters(asked).get("target", "tensorrt_llm")
    if target not in configs:
        raise ServerError(f"the server at {settings.url} has no model {target!r} that is ready; load it")
    directory, added, skipped = _tokenizer_of(settings, configs)
    text = await asyncio.to_thread(
        chat_tokenizer.load, directory, add_special_tokens=added, skip_special_tokens=skipped
    )
    inputs = {spec.name: DATA_TYPES[spec.data_type] for spec in asked.input}
    of_target = {spec.name: DATA_TYPES[spec.data_type] for spec in configs[target].input}
    return Served(
        await _base_name(client, settings, target),
        EngineModel(
            model,
            target,
            inputs,
            {name: of_target[name] for name in _STOP if name in of_target},
            configs[target].model_transaction_policy.decoupled,
            text,
        ),
        settings.context_length or _context_length(settings, target, _parameters(configs[target])),
    )


async def listing(client: TritonClient) -> dict[str, dict[str, Any]]:
    """The adapters of the server by name, as its model lora_adapters lists them now."""
    found: dict[str, dict[str, Any]] = await client.json_of(LISTING, {}, "adapters")
    return found


async def _base_name(client: TritonClient, settings: Settings, target: str) -> str:
    """The base model's id: as the settings say, or its name on the Hugging Face hub, if all adapters agree on one.

    The default has a slash, which no adapter's name has.
    """
    if settings.base_name:
        return settings.base_name
    try:
        found = {one.get("base_model_name_or_path") for one in (await listing(client)).values()} - {None}
    except ServerRefused:
        found = set()
    return str(found.pop()) if len(found) == 1 else f"base/{target}"


def _tokenizer_of(settings: Settings, configs: Mapping[str, Any]) -> tuple[Path | None, bool, bool]:
    """The tokenizer's directory, and whether special tokens are added to prompts and left out of responses.

    The models of the server that have a tokenizer say it: the parameters of preprocessing and postprocessing.
    """
    told = [found for config in configs.values() if "tokenizer_dir" in (found := _parameters(config))]
    directories = {found["tokenizer_dir"] for found in told}
    if settings.tokenizer is None and len(directories) != 1:
        said = f"they name {', '.join(map(repr, sorted(directories)))}" if directories else "none names a tokenizer_dir"
        raise ModelConfigError(f"which tokenizer the server's models use is not clear: {said}; give --tokenizer DIR")
    directory = settings.tokenizer or (Path(text) if (text := directories.pop()) else None)
    added, skipped = (
        all(found.get(key, "true").lower() not in ("false", "0", "f", "n", "no") for found in told)
        for key in ("add_special_tokens", "skip_special_tokens")
    )
    return directory, added, skipped


def _parameters(config: Any) -> dict[str, str]:
    return {key: value.string_value for key, value in config.parameters.items()}


def _context_length(settings: Settings, target: str, parameters: Mapping[str, str]) -> int | None:
    """As the config.json of the engine says, if it is on this machine; None if nothing says it."""
    location = parameters.get("gpt_model_path", "")
    path = (settings.repository or Path()) / target / location / "config.json"
    try:
        document = json.loads(path.read_text(encoding="utf-8")) if location else {}
    except (OSError, ValueError):
        return None
    build = document.get("build_config") or document.get("builder_config") or {}
    found = build.get("max_seq_len") or document.get("max_position_embeddings")
    if found is None and "max_input_len" in build and "max_output_len" in build:
        found = build["max_input_len"] + build["max_output_len"]
    return found if isinstance(found, int) and found > 0 else None
