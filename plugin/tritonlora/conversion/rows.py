# SPDX-FileCopyrightText: the tritonlora authors
# SPDX-License-Identifier: Apache-2.0
"""The rows that an adapter becomes, and where each row takes its values from. No values are here."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from tritonlora.architectures.lora_modules import LoraModule
from tritonlora.serving.dtypes import DTYPES


@dataclass(frozen=True, slots=True)
class Row:
    """One row of lora_config: module, layer, rank, and whether the row carries DoRA."""

    module: LoraModule
    layer: int
    adapter_size: int  # r
    dora: bool = False


@dataclass(frozen=True, slots=True)
class Piece:
    """Some outputs of a linear layer: `out.view(groups, -1)[first:last, start:stop]`, in that order."""

    groups: int
    first: int
    last: int
    start: int
    stop: int

    @property
    def size(self) -> int:
        """The number of outputs."""
        return (self.last - self.first) * (self.stop - self.start)

    def ranges(self, outputs: int) -> Iterator[tuple[int, int]]:
        """(start, stop) of each range that the piece takes, in order, from a layer with `outputs` outputs."""
        width = outputs // self.groups
        return ((group * width + self.start, group * width + self.stop) for group in range(self.first, self.last))

    def share(self, rank: int, ranks: int) -> Piece:
        """Share number `rank`, from 0, of `ranks` equal shares. The piece has to span all groups."""
        if self.groups > 1:
            groups = self.groups // ranks
            return Piece(self.groups, rank * groups, (rank + 1) * groups, self.start, self.stop)
        width = (self.stop - self.start) // ranks
        start = self.start + rank * width
        return Piece(1, 0, 1, start, start + width)


@dataclass(frozen=True, slots=True)
class RowSource:
    """The module, and the outputs of it, that a row takes its values from."""

    path: str  # of the AdapterModule
    pieces: tuple[Piece, ...] = ()  # the outputs taken, in order; empty: all outputs, in the module's own order
    in_features: int = 0  # the engine's number of inputs, if larger than the module's: zeros follow A; 0: the module's

    def ranges(self, outputs: int) -> list[tuple[int, int]]:
        """(start, stop) of each range of outputs taken, in order, from a module with `outputs` outputs."""
        return [taken for piece in self.pieces for taken in piece.ranges(outputs)] or [(0, outputs)]


@dataclass(frozen=True, slots=True)
class JoinedSource:
    """The modules that a fused row joins: their A one below the other, and their B on the diagonal."""

    parts: tuple[tuple[str, tuple[tuple[int, int], ...]], ...]  # (path, (start, stop) of its outputs in the row's B)
    out_features: int  # of the row's B

    @property
    def path(self) -> str:
        """The paths of all parts, separated by commas, for messages."""
        return ", ".join(path for path, _ in self.parts)


@dataclass(frozen=True, slots=True)
class Layout:
    """The rows, shapes and dtype of an adapter's lora_weights and lora_config, known before any weights are read."""

    rows: tuple[Row, ...]
    width: int  # W: elements in a row
    dtype: str  # "bfloat16", "float16", "float32"
    sources: tuple[RowSource | JoinedSource, ...] = ()  # one for each row
    conv1d: frozenset[str] = frozenset()  # paths of modules whose weight is (in, out) in the base model
    remarks: tuple[str, ...] = ()  # for the user; remarks on the adapter's values are not among them
    without_tensors: tuple[str, ...] = ()  # those of the remarks that name layers without tensors

    @property
    def weights_shape(self) -> tuple[int, int]:
        """The shape of lora_weights, (n, W)."""
        return (len(self.rows), self.width)

    @property
    def config_shape(self) -> tuple[int, int]:
        """The shape of lora_config: (n, 3), or (n, 4) where a row carries DoRA."""
        return (len(self.rows), 4 if any(row.dora for row in self.rows) else 3)

    @property
    def weights_nbytes(self) -> int:
        """The size of lora_weights in bytes."""
        return len(self.rows) * self.width * DTYPES[self.dtype].itemsize
