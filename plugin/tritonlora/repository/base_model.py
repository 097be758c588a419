# SPDX-FileCopyrightText: the tritonlora authors
# SPDX-License-Identifier: Apache-2.0
"""Compare base models: the checkpoint of --base with the engine, and the names that adapters were trained on."""

from __future__ import annotations

import os
import re
from dataclasses import replace
from pathlib import Path

from tritonlora.architectures.layers import also_stored_as, families_of
from tritonlora.engine.profile import EngineProfile, load_profile
from tritonlora.errors import EngineMismatch, UnknownArchitecture, one_message
from tritonlora.serving.adapter_table import AdapterTable

_CACHED = re.compile(r".*/models--[^/]*--(?P<name>[^/]+)/snapshots/[^/]+", re.DOTALL)  # huggingface_hub's cache


def with_base(profile: EngineProfile | None, base: Path | None, dtype: str | None) -> EngineProfile | None:
    """Fill the gaps of an engine's profile from the checkpoint `base`, if there is one.

    Without an engine, the checkpoint gives the whole profile. Otherwise it gives only the architecture, if the engine's
    name for it is unknown, or stands for several architectures (GPTForCausalLM).

    EngineMismatch when the engine was built from a model of other sizes, or of another architecture.
    """
    if base is None:
        return profile
    if profile is None:
        return load_profile(base, dtype=dtype)
    candidates = families_of(profile.architecture)
    try:
        of_base = load_profile(base, dtype=profile.dtype)
    except UnknownArchitecture:
        if len(candidates) == 1:  # the engine's own name is enough
            return profile
        raise
    engine, checkpoint = _sizes_of(profile), _sizes_of(of_base)
    differ = [
        f"{what}: {engine[what]} and {checkpoint[what]}"
        for what in engine.keys() & checkpoint.keys()
        if engine[what] != checkpoint[what]
    ]
    if candidates and candidates.isdisjoint(also_stored_as(families_of(of_base.architecture))):
        differ.append(f"architecture: {profile.architecture} and {of_base.architecture}")
    if differ:
        heading = f"--base {base} is not the model that {profile.source} was built from; in the engine, and in --base"
        raise EngineMismatch(one_message(heading, sorted(differ)))
    if len(candidates) == 1 or not families_of(of_base.architecture) <= candidates:
        return profile
    return replace(profile, architecture=of_base.architecture)


def _sizes_of(profile: EngineProfile) -> dict[str, int]:
    """The sizes of a profile's model that building an engine does not change, by their names in error messages."""
    after_hidden = [profile.modules[name] for name in ("attn_q", "attn_qkv", "mlp_h_to_4h") if name in profile.modules]
    numbers = {
        "layers": profile.num_layers,
        "attention heads": profile.num_heads,
        "key-value heads": profile.num_kv_heads,
        "head size": profile.head_size,
        "hidden size": after_hidden[0].in_features if after_hidden else 0,
    }
    return {what: number for what, number in numbers.items() if number}  # 0: the profile does not have it


def remarks(table: AdapterTable, name: str, base: str) -> tuple[str, ...]:
    """A remark if the other adapters were trained on another base model, according to PEFT's adapter_config.json.

    An engine is built from one base model.
    """
    known = {other: entry.base_model_name_or_path for other, entry in table.entries.items() if other != name}
    others = {name_of(noted): other for other, noted in known.items() if name_of(noted)}
    if not others or name_of(base) in {"", *others}:
        return ()
    other = next(iter(others.values()))
    return (f"it was trained on {base!r}, and adapter {other!r} on {known[other]!r}: are both of the engine's model?",)


def noted(name_or_path: str) -> str:
    """`name_or_path`, made absolute if it is an existing path that looks like a name on the hub ("models/llama")."""
    path = Path(name_or_path)
    looks_like_a_name = not path.is_absolute() and len(path.parts) == 2
    return os.path.abspath(path) if looks_like_a_name and os.path.exists(path) else name_or_path  # noqa: PTH100, PTH110


def name_of(name_or_path: str) -> str:
    """The base model's name without its place: the last part of a hub name or a path, in lower case. "" for "."."""
    path = name_or_path.rstrip("/")
    cached = _CACHED.fullmatch(path)
    return (cached["name"] if cached else path.rpartition("/")[2]).casefold().strip(".")
