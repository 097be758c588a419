# SPDX-FileCopyrightText: the tritonlora authors
# SPDX-License-Identifier: Apache-2.0
"""Finds out what a server serves: the model to ask, its inputs, the base model's tokenizer and its context length."""

from __future__ import annotations

import asyncio
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from tritonlora.errors import ModelConfigError, ServerError
from tritonlora.openai import chat_tokenizer
from tritonlora.openai.adapter_templates import AdapterTemplates
from tritonlora.openai.context_length import length_in
from tritonlora.openai.engine_model import EngineModel
from tritonlora.openai.llm_api_model import LlmApiModel
from tritonlora.openai.served_model import Declared, ServedModel
from tritonlora.openai.settings import Settings
from tritonlora.openai.triton_client import ServerRefused, TritonClient
from tritonlora.pbtxt.model_config import DATA_TYPES
from tritonlora.repository.paths import DEFAULT_TARGET, LISTING, ROUTER, TOKENS
from tritonlora.serving.wire import LLM_API, wire_of


@dataclass(frozen=True, slots=True)
class Served:
    """What a server serves."""

    base_name: str  # the base model's id for clients
    model: ServedModel
    context_length: int | None  # tokens of prompt and response
    templates: AdapterTemplates | None = None  # None: the repository is not on this machine


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
    target = _parameters(configs[model]).get("target", DEFAULT_TARGET)
    if target not in configs:
        raise ServerError(f"the server at {settings.url} has no model {target!r} that is ready; load it")
    served = await asyncio.to_thread(_model_of, settings, configs, model, target)
    base_name = settings.base_name or await _base_name(client, target)
    length = settings.context_length or _context_length(settings, target, configs[target])
    templates = AdapterTemplates(settings.repository) if settings.repository else None
    return Served(base_name, served, length, templates)


def _model_of(settings: Settings, configs: Mapping[str, Any], model: str, target: str) -> ServedModel:
    asked, behind = configs[model], configs[target]
    declared = Declared(target, _types(asked), asked.max_batch_size > 0)
    decoupled = behind.model_transaction_policy.decoupled
    if wire_of([*_types(behind)]) is LLM_API:
        directory = settings.tokenizer or _model_yaml(settings, target).get("model")
        if directory is None:
            raise ModelConfigError("the base model's tokenizer is not known here; give --repo REPO or --tokenizer DIR")
        text = chat_tokenizer.load(Path(directory))
        return LlmApiModel(model, target, declared, decoupled, text, has_new_text=model == ROUTER)
    directory, added, skipped = _tokenizer_of(settings, configs)
    text = chat_tokenizer.load(directory, add_special_tokens=added, skip_special_tokens=skipped)
    return EngineModel(model, target, declared, _types(behind), decoupled, text)


async def listing(client: TritonClient) -> dict[str, dict[str, Any]]:
    """The adapters of the server by name, as its model lora_adapters lists them now."""
    found: dict[str, dict[str, Any]] = await client.json_of(LISTING, {}, "adapters")
    return found


async def _base_name(client: TritonClient, target: str) -> str:
    """The base model's name on the Hugging Face hub, if all adapters agree on one, or else "base/" and the target.

    Both have a slash, which no adapter's name has.
    """
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


def _types(config: Any) -> dict[str, str]:
    return {spec.name: DATA_TYPES[spec.data_type] for spec in config.input}


def _context_length(settings: Settings, target: str, config: Any) -> int | None:
    """The context length that the engine's config.json, or model.yaml, says; None if they are not on this machine."""
    if wire_of([*_types(config)]) is not LLM_API:
        location = _parameters(config).get("gpt_model_path", "")
        return length_in((settings.repository or Path()) / target / location) if location else None
    settled = _model_yaml(settings, target)
    return settled.get("max_seq_len") or (length_in(Path(settled["model"])) if settled.get("model") else None)


def _model_yaml(settings: Settings, target: str) -> dict[str, Any]:
    """The content of the LLM API's model.yaml; {} if it is not on this machine."""
    path = (settings.repository or Path()) / target / "1" / "model.yaml"
    try:
        return dict(yaml.safe_load(path.read_text(encoding="utf-8"))) if settings.repository else {}
    except (OSError, ValueError, TypeError, yaml.YAMLError):
        return {}
