# SPDX-FileCopyrightText: the tritonlora authors
# SPDX-License-Identifier: Apache-2.0
"""Compose adapters: write the PEFT adapter whose delta is a weighted sum of the deltas of others.

    w1 * s1 * B1 @ A1 + w2 * s2 * B2 @ A2 = [w1 * s1 * B1, w2 * s2 * B2] @ [A1; A2]

So the A are put one below the other, and the B side by side with the weight w and the scaling s folded in. The rank is
the sum of the ranks. A is carried bit for bit. B is computed in float64 and stored in float32, which rounds each value
by at most one part in 2**24. Conversion rounds B once more, to the engine's dtype.

With a smaller rank, the nearest product of that rank takes the place of the exact one. It comes from thin QR factors of
both matrices, and the singular values of a matrix as small as the sum of the ranks. No delta is ever computed.

Source of the sum: PEFT src/peft/tuners/lora/model.py, `add_weighted_adapter` with "cat" and "svd".
"""

from __future__ import annotations

import functools
import json
import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple, TypeAlias

import torch

from tritonlora.architectures.layers import locate, split_path
from tritonlora.conversion.peft_directory import save_safetensors
from tritonlora.errors import InvalidAdapter, UnsupportedAdapter, merge_layers, one_message
from tritonlora.peft.adapter import Adapter, AdapterModule
from tritonlora.serving.dtypes import DTYPES


@dataclass(frozen=True, slots=True)
class Part:
    """One of the adapters of a composition."""

    label: str  # for messages: the adapter's name, or its directory
    adapter: Adapter
    weight: float  # finite


@dataclass(frozen=True, slots=True)
class Compression:
    """The relative errors of a compression, in the Frobenius norm."""

    errors: Mapping[str, float]  # path -> error of its delta, for each compressed module
    overall: float  # of all deltas together


class _Share(NamedTuple):
    """A module of one part."""

    part: Part
    module: AdapterModule


_Shares: TypeAlias = "Mapping[str, Sequence[_Share]]"  # path -> the modules whose deltas are added


def composed_ranks(parts: Sequence[Part]) -> dict[str, int]:
    """Path -> rank of each module of the exact composition.

    Raises UnsupportedAdapter, with every reason, when the deltas cannot be added: DoRA, or modules of different sizes.
    """
    problems = [
        f"{part.label} uses DoRA, whose delta is not a product of two matrices; merge it into the base model"
        for part in parts
        if any(module.magnitude is not None for module in part.adapter.modules.values())
    ]
    shares = _shares(parts)
    for path, found in shares.items():
        sizes = [(share.module.lora_A.shape[1], share.module.lora_B.shape[0]) for share in found]
        if len({*sizes}) > 1:
            each = " and ".join(
                f"{inputs} -> {outputs} in {share.part.label}"
                for share, (inputs, outputs) in zip(found, sizes, strict=True)
            )
            problems.append(f"{path!r}: it is {each}; compose adapters of one base model")
    if problems:
        raise UnsupportedAdapter(one_message("cannot compose these adapters", merge_layers(problems)))
    return {path: sum(share.module.r for share in found) for path, found in shares.items()}


def write_composition(parts: Sequence[Part], directory: Path, *, rank: int | None = None) -> Compression | None:
    """Write adapter_model.safetensors and adapter_config.json of the composition into `directory`.

    Modules of a rank above `rank` are compressed to it. Returns None if no module was.

    Raises UnsupportedAdapter as `composed_ranks` does. Raises InvalidAdapter, which names each tensor that has NaN or
    infinite values, or becomes infinite with its weight.
    """
    exact = composed_ranks(parts)
    shares = dict(sorted(_shares(parts).items()))
    ranks = {path: min(exact[path], rank or exact[path]) for path in shares}
    header = {}
    for path, found in shares.items():
        inputs, outputs = found[0].module.lora_A.shape[1], found[0].module.lora_B.shape[0]
        joint = "float32" if ranks[path] < exact[path] else _joint_dtype(found)
        header[f"base_model.model.{path}.lora_A.weight"] = (DTYPES[joint], (ranks[path], inputs))
        header[f"base_model.model.{path}.lora_B.weight"] = (DTYPES["float32"], (outputs, ranks[path]))
    problems: list[str] = []
    squares: dict[str, _Squares] = {}
    save_safetensors(
        directory / "adapter_model.safetensors", header, _matrices(shares, ranks, exact != ranks, problems, squares)
    )
    if problems:
        raise InvalidAdapter(one_message("cannot compose the weights of these adapters", merge_layers(problems)))
    (directory / "adapter_config.json").write_text(json.dumps(_config(parts, ranks), indent=2) + "\n")
    if exact == ranks:
        return None
    errors = {path: _relative([squares[path]]) for path in shares if ranks[path] < exact[path]}
    return Compression(errors, _relative(squares.values()))


# Layers


def _shares(parts: Sequence[Part]) -> _Shares:
    """The modules of all parts, by path. Paths begin as those of one adapter, since adapters of one model may differ.

    "model.layers.0.mlp.up_proj" and "layers.0.mlp.up_proj" are the same layer. An adapter that was rebuilt from its
    rows has no target_modules, and paths that only may be the model's.
    """
    whole = next((part for part in parts if part.adapter.config.target_modules), parts[0])
    stems = [place.stem for path in whole.adapter.modules if (place := split_path(path))]
    found: dict[str, list[_Share]] = {}
    for part in parts:
        for path, module in part.adapter.modules.items():
            place = split_path(path)
            renamed = f"{stems[0]}.{place.layer}.{place.tail}" if place and place.stem not in stems else path
            found.setdefault(renamed if locate(renamed) else path, []).append(_Share(part, module))
    return found


def _config(parts: Sequence[Part], ranks: Mapping[str, int]) -> dict[str, object]:
    """adapter_config.json. lora_alpha is the largest rank, so that the scaling of most modules is 1.

    There is no alpha_pattern, which the LLM API does not read.
    """
    configs = [part.adapter.config for part in parts]
    places = {path: place for path in ranks if (place := split_path(path))}
    by_tail: dict[str, dict[int, int]] = {}  # tail -> layer -> rank
    for path, place in places.items():
        by_tail.setdefault(place.tail, {})[place.layer] = ranks[path]
    most = max(ranks.values())
    pattern: dict[str, int] = {}
    for path, place in places.items():
        of_tail = {*by_tail[place.tail].values()}
        if of_tail != {most}:
            pattern[place.tail if len(of_tail) == 1 else path] = ranks[path]
    layers = {tuple(of_layers) for of_layers in by_tail.values()}
    some = any(config.layers_to_transform for config in configs) and len(layers) == 1
    model_class = _agreed([config.base_model_class for config in configs])
    return {
        "peft_type": "LORA",
        "task_type": _agreed([config.task_type for config in configs]) or "CAUSAL_LM",
        "auto_mapping": {"base_model_class": model_class} if model_class else None,
        "base_model_name_or_path": next(filter(None, (config.base_model_name_or_path for config in configs)), ""),
        "r": most,
        "lora_alpha": most,
        "lora_dropout": 0.0,
        "bias": "none",
        "use_rslora": False,
        "use_dora": False,
        "fan_in_fan_out": any(config.fan_in_fan_out for config in configs),
        "rank_pattern": pattern,
        "alpha_pattern": {},
        "target_modules": sorted({tail.rpartition(".")[2] for tail in by_tail}),
        "layers_to_transform": sorted(*layers) if some else None,
        "modules_to_save": None,
        "inference_mode": True,
    }


def _agreed(values: Sequence[str]) -> str:
    """The one value that all adapters with a value have; "" if there are several."""
    found = {value for value in values if value}
    return found.pop() if len(found) == 1 else ""


# Values


class _Squares(NamedTuple):
    """Squared Frobenius norms."""

    error: float
    delta: float


def _relative(squares: Iterable[_Squares]) -> float:
    """The error of several deltas together, relative to them."""
    squares = list(squares)
    delta = math.fsum(one.delta for one in squares)
    return math.sqrt(math.fsum(one.error for one in squares) / delta) if delta else 0.0


def _joint_dtype(found: Sequence[_Share]) -> str:
    """The smallest dtype that holds the values of all A exactly."""
    dtypes = (getattr(torch, share.module.lora_A.dtype.name) for share in found)
    return str(functools.reduce(torch.promote_types, dtypes)).removeprefix("torch.")


def _matrices(
    shares: _Shares, ranks: Mapping[str, int], compresses: bool, problems: list[str], squares: dict[str, _Squares]
) -> Iterator[torch.Tensor]:
    """A (r, in) and B (out, r) of each module in turn. Adds to `problems`; adds to `squares` if it `compresses`."""
    alpha = max(ranks.values())
    for path, found in shares.items():
        a = torch.cat([share.module.lora_A.load() for share in found])
        b = torch.cat(
            [share.module.lora_B.load().double() * (share.part.weight * share.module.scaling) for share in found], dim=1
        )
        nonfinite = [*_nonfinite(path, found)]
        problems += nonfinite
        if compresses and not nonfinite:
            if ranks[path] < len(a):
                a, b, squares[path] = _nearest(a.double(), b, ranks[path])
            else:
                squares[path] = _Squares(0.0, ((b.T @ b) * (a.double() @ a.double().T)).sum().item())
        stored = (b * (ranks[path] / alpha)).float()
        if not nonfinite and not stored.isfinite().all():
            problems.append(f"lora_B of {path!r} has values too large for float32; give smaller weights")
        if b.any() and not stored.any():
            problems.append(f"lora_B of {path!r} vanishes in float32; give larger weights")
        yield a
        yield stored


def _nonfinite(path: str, found: Sequence[_Share]) -> Iterator[str]:
    for part, module in found:
        for matrix, tensor in (("A", module.lora_A), ("B", module.lora_B)):
            if not tensor.load().isfinite().all():
                yield f"lora_{matrix} of {path!r} has NaN or infinite values in {part.label}; take another adapter"


def _nearest(a: torch.Tensor, b: torch.Tensor, rank: int) -> tuple[torch.Tensor, torch.Tensor, _Squares]:
    """A (rank, in) in float32 and B (out, rank) in float64, whose product is the nearest one to `b` @ `a`."""
    q_a, r_a = torch.linalg.qr(a.T)  # (in, m), (m, k)
    q_b, r_b = torch.linalg.qr(b)  # (out, n), (n, k)
    u, values, v = torch.linalg.svd(r_b @ r_a.T, full_matrices=False)  # (n, l), (l,), (l, m)
    kept = min(rank, len(values))
    root = values[:kept].sqrt()
    near_a, near_b = torch.zeros(rank, len(q_a)), torch.zeros(len(q_b), rank, dtype=torch.float64)
    near_a[:kept] = root[:, None] * (v[:kept] @ q_a.T)
    near_b[:, :kept] = q_b @ (u[:, :kept] * root)
    squared = values.square()
    return near_a, near_b, _Squares(squared[kept:].sum().item(), squared.sum().item())
