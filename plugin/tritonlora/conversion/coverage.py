# SPDX-FileCopyrightText: the tritonlora authors
# SPDX-License-Identifier: Apache-2.0
"""Layers in which an adapter changes nothing: those that have no tensors, and those whose LoRA is zero.

PEFT allows both, and it may be meant. It may also be a file that was cut down, or saved by one of several processes, or
training that went wrong. In these layers the responses are the base model's, so the user is told.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Iterable, Iterator

from tritonlora.architectures.families import FAMILIES, LAYERS_DIFFER
from tritonlora.engine.profile import EngineProfile
from tritonlora.errors import InvalidAdapter, layer_names
from tritonlora.peft.adapter import Adapter, matches_name
from tritonlora.peft.adapter_config import AdapterConfig
from tritonlora.peft.patterns import matches

_LAYER = re.compile(r"(?P<stem>.+?)\.(?P<layer>[0-9]+)\.(?P<tail>.+)")


def coverage_remarks(adapter: Adapter, families: Collection[str], profile: EngineProfile | None) -> Iterator[str]:
    """Remarks on layers of the base model that the config targets and that have no tensors.

    `families` are those that the base model may belong to. Without a profile only gaps between the adapter's own layers
    are seen.
    """
    if LAYERS_DIFFER.issuperset(families) or (profile is not None and profile.architecture in LAYERS_DIFFER):
        return
    found = [match for path in adapter.modules if (match := _LAYER.fullmatch(path))]
    stems = {match["stem"] for match in found}
    tails = {match["tail"] for match in found}
    if len(families) == 1:  # so that a name means one layer
        family = next(family for family in FAMILIES if family.name in families)
        known = family.rare.union(*(family.leaves[tail].modules for tail in tails if tail in family.leaves))
        tails |= {tail for tail, leaf in family.leaves.items() if known.isdisjoint(leaf.modules)}
    count = profile.num_layers if profile is not None else 1 + max(int(match["layer"]) for match in found)
    config = adapter.config
    wanted = config.layers_to_transform or range(count)
    candidates = {
        f"{stem}.{layer}.{tail}": (tail.rpartition(".")[2], layer)
        for stem in sorted(stems)
        for tail in tails
        for layer in wanted
        if layer < count
    }
    missing = targeted(config, candidates) - adapter.modules.keys()
    # Names that have no tensor at all are named by the adapter's own remarks.
    missing = {path for path in missing if _seen(path, adapter, config)}
    if missing:
        yield (
            f"there are no tensors of {layer_names(candidates[path] for path in missing)}, which adapter_config.json "
            "targets: in these layers its responses are the base model's"
        )


def _seen(path: str, adapter: Adapter, config: AdapterConfig) -> bool:
    if isinstance(config.target_modules, str):
        return True
    return any(matches_name([path], name) and matches_name(adapter.modules, name) for name in config.target_modules)


def targeted(config: AdapterConfig, paths: Iterable[str]) -> set[str]:
    """The `paths` that target_modules names and exclude_modules does not, by PEFT's rule
    (`check_target_module_exists` in src/peft/tuners/tuners_utils.py). None for a pattern that is not supported here.
    """
    paths = list(paths)
    return _matching(config.target_modules, paths) - _matching(config.exclude_modules, paths)


def _matching(names: str | tuple[str, ...], paths: list[str]) -> set[str]:
    if not isinstance(names, str):
        return {path for path in paths if any(matches_name([path], name) for name in names)}
    try:
        return set(matches({f"^({names})": True}, paths)) if names else set()
    except (ValueError, InvalidAdapter):
        return set()


def zero_remarks(zero: Collection[tuple[str, int]], *, others: bool, dora: bool) -> tuple[str, ...]:
    """A remark on the layers, pairs of a name and a number, of which lora_A or lora_B is zero.

    `others`: whether there are layers in which neither is. `dora`: whether one of the layers has a magnitude.
    """
    if not zero:
        return ()
    where = layer_names(zero)
    if others:
        return (f"lora_A or lora_B is zero in {where}: in these layers it changes nothing",)
    if dora:
        return (f"lora_A or lora_B is zero in all layers ({where}): it changes the magnitudes at most",)
    return (
        f"lora_A or lora_B is zero in all layers ({where}): its responses are the base model's; it was not trained, or "
        "its trained values were not saved",
    )


def row_remarks(rows: Iterable[tuple[str, int]], profile: EngineProfile) -> tuple[str, ...]:
    """A remark on the layers in which a module has no row, where it has one in other layers; from stored rows, which
    do not say what the adapter's config targets.
    """
    present = set(rows)
    modules = {module for module, _ in present}
    missing = {(module, layer) for module in modules for layer in range(profile.num_layers)} - present
    if not missing or profile.architecture in LAYERS_DIFFER:
        return ()
    return (f"it has no rows of {layer_names(missing)}: in these layers its responses are the base model's",)


def is_zero(values: bytes, itemsize: int) -> bool:
    """Whether all of these floats, little-endian, of `itemsize` bytes each, are zero."""
    import numpy

    return not (numpy.frombuffer(values, f"<u{itemsize}") << 1).any()  # without the sign
