# SPDX-FileCopyrightText: the tritonlora authors
# SPDX-License-Identifier: Apache-2.0
"""Find the linear layer at a path in a Hugging Face model, and the families it may belong to, from names only."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from typing import NamedTuple

from tritonlora.architectures.families import (
    ARCHITECTURES,
    ENGINE_NAMES,
    FAMILIES,
    NOT_THESE,
    NOT_THESE_BY_NAME,
    STORED_AS,
    Leaf,
)

# First match wins; the last line always matches.
_WHY_NOT = (
    (r"^[^0-9]+\.(0[0-9]|[1-9][0-9]{4})[0-9]*\.", "a layer's number is below 10000 and has no leading zeros"),
    (r"(^|\.)(lm_head|embed_out|proj_out)$", "TensorRT-LLM has no LoRA for the output embedding"),
    (r"(^|\.)(embed_tokens|wte|word_embeddings|shared|embed_in)$", "TensorRT-LLM has no LoRA for embeddings"),
    (r"experts?(\.|$)|block_sparse_moe|shared_mlp", "LoRA on expert layers cannot be sent to a TensorRT-LLM engine"),
    (r"\.(gate|router|shared_expert_gate)$|\.router\.", "LoRA on an expert router is not supported"),
    (
        r"(^|\.)(vision|visual|vision_tower|vision_model|multi_modal_projector|audio_tower)",
        "not a part of the text model",
    ),
    (r"^(?!transformer\.).*\bencoder\.", "an encoder's LoRA has no place in the tensors of the decoder's engine"),
    (r"(^|\.)(score|classifier|qa_outputs)$", "a classification head is not a part of a text-generation engine"),
    (r"", "not a linear layer that TensorRT-LLM has a LoRA for"),
)


class LayerPath(NamedTuple):
    """The parts of a module's path. "model.layers.3.self_attn.q_proj" has the tail "self_attn.q_proj"."""

    stem: str  # "model.layers"
    layer: int
    tail: str


# The first number in a path is the layer number. No model has ten thousand layers.
_LAYER_PATH = re.compile(r"(?P<stem>.+?)\.(?P<layer>0|[1-9][0-9]{0,3})\.(?P<tail>.+)")


def split_path(path: str) -> LayerPath | None:
    """The parts of a module's path; None if the path has no layer number."""
    match = _LAYER_PATH.fullmatch(path)
    return LayerPath(match["stem"], int(match["layer"]), match["tail"]) if match else None


def locate(path: str) -> tuple[int, Mapping[str, Leaf]] | None:
    """(layer number, {family name: leaf}) of the module `path`, with each family that has such a layer.

    None if the engine has no LoRA for the module. `path` is PEFT's: "model.layers.3.self_attn.q_proj".
    """
    found = split_path(path)
    leaves = _LEAVES.get((found.stem, found.tail)) if found else None
    return (found.layer, leaves) if found and leaves else None


def families_of(architecture: str) -> frozenset[str]:
    """The names of the families that `architecture` may belong to; all families if the architecture is not known."""
    known = ARCHITECTURES.get(architecture)
    families = ENGINE_NAMES.get(architecture, FAMILIES) if known is None else (known.family,)
    return frozenset(family.name for family in families)


def also_stored_as(families: frozenset[str]) -> frozenset[str]:
    """`families`, and the families in which checkpoints of the same models are also stored (`STORED_AS`)."""
    return families.union(*(names for names in STORED_AS if names & families))


def why_none(architecture: str) -> str | None:
    """The reason why `architecture` belongs to no family although its layers have the names of one; else None."""
    return next((why for beginning, why in NOT_THESE.items() if architecture.startswith(beginning)), None)


def why_probably_none(base_model_name: str) -> str | None:
    """The reason why a base model of this name, on a hub or a directory, belongs to no family; else None."""
    name = base_model_name.lower()
    return next((why for pattern, why in NOT_THESE_BY_NAME.items() if re.search(pattern, name)), None)


def likely_families(
    layers: Iterable[Mapping[str, Leaf]], architectures: Iterable[str], *, conv1d: bool
) -> frozenset[str]:
    """The names of the families that have all `layers` and fit `architectures`.

    If none has all layers, the families in which checkpoints of the same models are also stored count, too. `layers`
    come from `locate`. The most reliable of `architectures` comes first; "" is an unknown architecture. An architecture
    that fits none of the families left is ignored. With `conv1d`, families of Conv1D layers are preferred.
    """
    families = families_of("")
    for known in map(families_of, architectures):
        families = families & known or families
    layers = list(layers)
    families = families.intersection(*layers) or also_stored_as(families).intersection(*layers) or families
    return families & CONV1D or families if conv1d else families


def why_not(path: str) -> str:
    """The reason why `locate(path)` finds nothing, with the remedy."""
    if path.startswith("base_model.model."):  # the first such prefix was removed from `path`
        return (
            "saved through PEFT twice (base_model.model.), so there may be another adapter under this one; merge "
            "both into the base model, or train again with get_peft_model called once"
        )
    reason = next(reason for pattern, reason in _WHY_NOT if re.search(pattern, path))
    return (
        f"{reason}; merge the adapter into the base model, or train again without it "
        "(`target_modules` or `exclude_modules`)"
    )


def _by_name() -> dict[tuple[str, str], dict[str, Leaf]]:
    leaves: dict[tuple[str, str], dict[str, Leaf]] = {}
    for family in FAMILIES:
        for stem in family.stems:
            for tail, leaf in family.leaves.items():
                leaves.setdefault((stem, tail), {})[family.name] = leaf
    return leaves


CONV1D = frozenset(family.name for family in FAMILIES if family.conv1d)
_LEAVES: Mapping[tuple[str, str], Mapping[str, Leaf]] = _by_name()
