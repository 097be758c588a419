# SPDX-FileCopyrightText: the tritonlora authors
# SPDX-License-Identifier: Apache-2.0
"""Rebuild an adapter from the lora_weights and lora_config that a model repository has of it.

The rows do not name the layers of the Hugging Face model. Strategy: guess the layers from the engine's architecture,
let `plan_layout` plan the rows of such an adapter, and compare them with the stored rows. If the rows are equal, each
stored row is put where the plan takes it from. So the rebuilt adapter converts to exactly these rows again.

B has the scaling in it already, so the scaling of each module is 1.
"""

from __future__ import annotations

import functools
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from tritonlora.architectures.families import FAMILIES, Family
from tritonlora.architectures.layers import also_stored_as, families_of, locate
from tritonlora.architectures.lora_modules import BY_ID
from tritonlora.conversion.layout import plan_layout
from tritonlora.conversion.rows import RowSource
from tritonlora.engine.profile import EngineProfile
from tritonlora.errors import AdapterError, InvalidAdapter, UnsupportedAdapter
from tritonlora.peft.adapter import Adapter, AdapterModule
from tritonlora.peft.adapter_config import AdapterConfig
from tritonlora.peft.stored_tensor import StoredFile, StoredTensor, computed
from tritonlora.serving.dtypes import DTYPES

if TYPE_CHECKING:
    import torch


@dataclass(frozen=True, slots=True)
class StoredRows:
    """The rows of one adapter: lora_config, and the file of lora_weights."""

    rows: tuple[tuple[int, ...], ...]  # (module id, layer, adapter_size), and whether the row carries DoRA
    weights: Path
    width: int  # W
    dtype: str


def rebuild_adapter(stored: StoredRows, profile: EngineProfile, base_model_name_or_path: str) -> Adapter:
    """The adapter that converts to these rows, in an engine of `profile`. Its values are read when they are used.

    Raises UnsupportedAdapter when the rows carry DoRA, or when they are not those of layers with names of their own:
    rows that were joined from several layers, and rows of an architecture that is not known.
    """
    if any(any(columns) for _, _, _, *columns in stored.rows):
        raise UnsupportedAdapter("it uses DoRA, of which the rows have only normalised magnitudes")
    if any(BY_ID[module].name not in profile.modules for module, *_ in stored.rows):
        raise UnsupportedAdapter(f"it has rows of modules that {profile.what} has no LoRA for; run `tritonlora check`")
    names = families_of(profile.architecture)
    candidates = [family for family in FAMILIES if family.name in also_stored_as(names)]
    for family in sorted(candidates, key=lambda family: family.name not in names):  # the architecture's own first
        if adapter := _of_family(family, stored, profile, base_model_name_or_path):
            return adapter
    raise UnsupportedAdapter(
        f"its rows do not tell which layers of {profile.architecture} they are of; give the PEFT directory that it was "
        "added from in the place of its name"
    )


def _of_family(family: Family, stored: StoredRows, profile: EngineProfile, base: str) -> Adapter | None:
    """The adapter, if the rows are those of layers of `family`; else None."""
    tensors = _Tensors(stored, profile)
    modules = {}
    for layer in sorted({layer for _, layer, *_ in stored.rows}):
        of_layer = {BY_ID[row[0]].name: index for index, row in enumerate(stored.rows) if row[1] == layer}
        for tail, parts in _layers_of(family, of_layer, tensors):
            path = f"{family.stems[0]}.{layer}.{tail}"
            located = locate(path)
            rank = stored.rows[of_layer[parts[0]]][2]
            inputs = profile.layer_dims(parts[0])[0]
            outputs = sum(profile.layer_dims(part)[1] for part in parts)
            if located is None:
                return None
            modules[path] = AdapterModule(
                path, layer, located[1], tensors.planned(rank, inputs), tensors.planned(outputs, rank), scaling=1.0
            )
            of_layer = {name: index for name, index in of_layer.items() if name not in parts}
        if of_layer:
            return None
    rank = max(row[2] for row in stored.rows)
    config = AdapterConfig(base, rank, rank, fan_in_fan_out=family.conv1d)
    template = Adapter(stored.weights.parent, config, modules)
    try:
        layout = plan_layout(template, dtype=stored.dtype, profile=profile)
    except AdapterError:
        return None
    sources: dict[str, list[tuple[int, RowSource]]] = {path: [] for path in modules}
    for index, (row, source) in enumerate(zip(layout.rows, layout.sources, strict=True)):
        same = (row.module.id, row.layer, row.adapter_size) == stored.rows[index][:3]
        if not same or not isinstance(source, RowSource):
            return None
        sources[source.path].append((index, source))
    return Adapter(template.directory, config, {path: tensors.module(modules[path], sources[path]) for path in modules})


def _layers_of(family: Family, found: Mapping[str, int], tensors: _Tensors) -> Iterator[tuple[str, Sequence[str]]]:
    """(tail of its path, the rows' modules) of each layer that has rows in `found`: module -> number of its row."""
    left = set(found)
    for tail, leaf in family.leaves.items():
        parts: Sequence[str] = (leaf.fused,) if leaf.fused in left else leaf.modules
        if left.issuperset(parts) and tensors.share_a([found[part] for part in parts]):
            left -= set(parts)
            yield tail, parts


class _Tensors:
    """Reads the matrices of stored rows."""

    def __init__(self, stored: StoredRows, profile: EngineProfile) -> None:
        self._stored, self._profile = stored, profile
        self._dtype = DTYPES[stored.dtype]
        self._file = StoredFile(stored.weights, stored.weights.stat())

    def planned(self, *shape: int) -> StoredTensor:
        """A tensor of this shape whose values are not known yet."""
        return StoredTensor(self._dtype, shape, _not_read)

    def share_a(self, indices: Collection[int]) -> bool:
        """Whether these rows have the same rank and the same A, as those of a fused layer have."""
        if len(indices) == 1:
            return True
        shapes = {(self._stored.rows[index][2], self._inputs(index)) for index in indices}
        return len(shapes) == 1 and len({self._a(index, *min(shapes)).load_bytes() for index in indices}) == 1

    def module(self, planned: AdapterModule, sources: Sequence[tuple[int, RowSource]]) -> AdapterModule:
        """`planned`, with the matrices of the rows that are taken from it."""
        rank, inputs = planned.lora_A.shape
        outputs = planned.lora_B.shape[0]
        parts = []
        for index, source in sources:
            ranges = source.ranges(outputs)
            shape = (sum(stop - start for start, stop in ranges), rank)
            parts.append((self._at(index, rank * (source.in_features or inputs), shape), ranges))
        lora_b = parts[0][0]
        if parts[0][1] != [(0, outputs)]:
            lora_b = computed(self._dtype, planned.lora_B.shape, functools.partial(_put_together, outputs, parts))
        lora_a = self._a(sources[0][0], rank, inputs)
        return AdapterModule(planned.path, planned.layer, planned.leaves, lora_a, lora_b, planned.scaling)

    def _inputs(self, index: int) -> int:
        return self._profile.layer_dims(BY_ID[self._stored.rows[index][0]].name)[0]

    def _a(self, index: int, rank: int, inputs: int) -> StoredTensor:
        return self._at(index, 0, (rank, inputs))

    def _at(self, index: int, element: int, shape: tuple[int, ...]) -> StoredTensor:
        start = (index * self._stored.width + element) * self._dtype.itemsize
        return self._file.tensor(self._dtype, shape, start)


def _put_together(outputs: int, parts: Sequence[tuple[StoredTensor, Sequence[tuple[int, int]]]]) -> torch.Tensor:
    """B (out, r), each part of it at the ranges of outputs that the part was taken from."""
    import torch

    matrices = [(part.load(), ranges) for part, ranges in parts]
    whole = torch.empty((outputs, matrices[0][0].shape[1]), dtype=matrices[0][0].dtype)
    for matrix, ranges in matrices:
        taken = 0
        for start, stop in ranges:
            whole[start:stop] = matrix[taken : taken + stop - start]
            taken += stop - start
    return whole


def _not_read(_start: int, _memory: memoryview) -> None:
    raise InvalidAdapter("the values of a planned tensor are not known")
