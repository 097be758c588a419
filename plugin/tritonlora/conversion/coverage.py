# SPDX-FileCopyrightText: the tritonlora authors
# SPDX-License-Identifier: Apache-2.0
"""Find layers in which an adapter changes nothing: layers without tensors, and layers whose LoRA is zero.

PEFT allows both, and the user may want them. Other causes are a file that was cut down, a file that only one of several
processes saved, or training that went wrong. These layers compute what the base model computes, so a remark tells the
user.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Iterator

from tritonlora.architectures.families import FAMILIES, LAYERS_DIFFER
from tritonlora.architectures.layers import split_path
from tritonlora.engine.profile import EngineProfile
from tritonlora.errors import InvalidAdapter, layer_names
from tritonlora.peft.adapter import Adapter
from tritonlora.peft.adapter_config import AdapterConfig
from tritonlora.peft.patterns import matches


def coverage_remarks(adapter: Adapter, families: Collection[str], profile: EngineProfile | None) -> Iterator[str]:
    """Remarks on layers of the base model that adapter_config.json targets and that have no tensors.

    `families` are the families that the base model may belong to. Without a profile the number of layers is not known:
    only gaps between the adapter's own layers are found.
    """
    config = adapter.config
    if unused := _unused(adapter.modules, config):
        yield (
            f"target_modules lists {', '.join(sorted(unused))}, of which there are no tensors: the adapter changes "
            "nothing in these layers"
        )
    if LAYERS_DIFFER.issuperset(families) or (profile is not None and profile.architecture in LAYERS_DIFFER):
        return
    found = [place for path in adapter.modules if (place := split_path(path))]
    stems = {place.stem for place in found}
    tails = {place.tail for place in found}
    if len(families) == 1:  # a layer's name means one thing only within one family
        family = next(family for family in FAMILIES if family.name in families)
        known = family.rare.union(*(family.leaves[tail].modules for tail in tails if tail in family.leaves))
        tails |= {tail for tail, leaf in family.leaves.items() if known.isdisjoint(leaf.modules)}
    count = profile.num_layers if profile is not None else 1 + max(place.layer for place in found)
    wanted = config.layers_to_transform or range(count)
    candidates = {
        f"{stem}.{layer}.{tail}": (tail.rpartition(".")[2], layer)
        for stem in sorted(stems)
        for tail in tails
        for layer in wanted
        if layer < count
    }
    missing = _targeted(config, candidates) - adapter.modules.keys()
    # A name that has no tensor in any layer is in the remark above.
    missing = {path for path in missing if _seen(path, adapter, config)}
    if missing:
        yield (
            f"there are no tensors of {layer_names(candidates[path] for path in missing)}, which adapter_config.json "
            "targets: the adapter changes nothing in these layers"
        )


def _unused(modules: Collection[str], config: AdapterConfig) -> list[str]:
    """The names in target_modules that name none of `modules`, the paths of the layers with tensors."""
    if isinstance(config.target_modules, str):
        return []
    names = (name for name in config.target_modules if name not in config.exclude_modules)
    return [name for name in names if not _names_one(name, modules)]


def _seen(path: str, adapter: Adapter, config: AdapterConfig) -> bool:
    if isinstance(config.target_modules, str):
        return True
    return any(_names_one(name, [path]) and _names_one(name, adapter.modules) for name in config.target_modules)


def _targeted(config: AdapterConfig, paths: Iterable[str]) -> set[str]:
    """The `paths` that target_modules names and exclude_modules does not name.

    Source: PEFT's `check_target_module_exists` in src/peft/tuners/tuners_utils.py. A pattern that tritonlora does not
    support matches no path.
    """
    paths = list(paths)
    return _matching(config.target_modules, paths) - _matching(config.exclude_modules, paths)


def _matching(names: str | tuple[str, ...], paths: list[str]) -> set[str]:
    if not isinstance(names, str):
        return {path for path in paths if any(_names_one(name, [path]) for name in names)}
    try:
        return set(matches({f"^({names})": True}, paths)) if names else set()
    except (ValueError, InvalidAdapter):
        return set()


def _names_one(name: str, paths: Iterable[str]) -> bool:
    """Whether `name`, one of target_modules, names the layer at one of the `paths`, by PEFT's rule."""
    return any(path == name or path.endswith(f".{name}") for path in paths)


def zero_remarks(zero: Collection[tuple[str, int]], *, others: bool, dora: bool) -> tuple[str, ...]:
    """A remark on the layers `zero`, (name, layer number), whose lora_A or lora_B is zero; () if there are none.

    `others`: whether the adapter has further layers, in which neither is zero. `dora`: whether one of the layers `zero`
    has a magnitude.
    """
    if not zero:
        return ()
    where = layer_names(zero)
    if others:
        return (f"lora_A or lora_B is zero in {where}: the adapter changes nothing in these layers",)
    if dora:
        return (f"lora_A or lora_B is zero in all layers ({where}): it changes the magnitudes at most",)
    return (
        f"lora_A or lora_B is zero in all layers ({where}): its responses are the base model's; it was not trained, or "
        "its trained values were not saved",
    )


def is_zero(values: bytes, itemsize: int) -> bool:
    """Whether all floats in `values` are zero, of either sign. They are little-endian, `itemsize` bytes each."""
    import numpy

    return not (numpy.frombuffer(values, f"<u{itemsize}") << 1).any()  # shifts the sign bit out
