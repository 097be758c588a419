# SPDX-FileCopyrightText: the tritonlora authors
# SPDX-License-Identifier: Apache-2.0
"""Which tensors of the engine's responses the router passes on, and which it adds to them.

| output | what it is |
|---|---|
| batch_index | the row, where the router sends each row of a batch to the engine by itself |
| previous_ids | the tokens of the stream before this response, for a detokeniser without a state |
| text_diff | what is new in a response that has the whole text so far |

Values in, values out: a tensor has a name and an array, and a function that is passed in makes one.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Generic, Protocol, TypeVar

import numpy as np
import numpy.typing as npt

from .errors import InvalidRequest
from .stream_state import SequenceState, WholeTexts

OWN_OUTPUTS = {"previous_ids", "all_outputs", "text_diff"}
TOKENS = ("output_ids", "sequence_length")
_NO_TOKENS = (np.zeros((1, 1, 0), np.int32), np.zeros((1, 1), np.int32))
# Outputs that say whose the tokens are and how likely they were. The end of a sequence repeats them.
_REPEATED = ("batch_index", "sequence_index", "cum_log_probs", "output_log_probs")


class Tensor(Protocol):
    """A tensor of Triton's Python backend."""

    def name(self) -> str:
        """Of the output."""

    def as_numpy(self) -> npt.NDArray[Any]:
        """Its elements."""


T = TypeVar("T", bound=Tensor)


@dataclass(frozen=True, slots=True)
class Wanted:
    """The outputs that a client asked for."""

    names: frozenset[str]
    of_engine: frozenset[str]  # what the engine is asked for, which may be more
    previous_ids: bool
    text_diff: bool


def wanted_outputs(requested: Collection[str], needed: Collection[str], *, is_stream: bool) -> Wanted:
    """What a request wants that names the outputs `requested`. The engine must be asked for those that are `needed`."""
    names = frozenset(requested)
    # A third tensor in each response takes a fifth of the tokens per second: the router's own are for who names them.
    named = frozenset() if "all_outputs" in names else names
    previous_ids = is_stream and "previous_ids" in named
    of_engine = names.union(needed, ["sequence_index"] if previous_ids else [])
    return Wanted(names, of_engine, previous_ids, "text_diff" in named)


class RowOutputs(Generic[T]):
    """The outputs of one row: of a batch that is split, or of a whole request."""

    def __init__(
        self,
        wanted: Wanted,
        make: Callable[[str, npt.NDArray[Any]], T],
        *,
        row: int | None,
        beam_width: int = 1,
        sequence_count: int = 1,
    ) -> None:
        """`row` is None where the engine sees the whole batch. `beam_width` and `sequence_count` are the request's."""
        self._wanted = wanted
        self._make = make
        self._row = row
        self._beam_width = beam_width
        self._sequence_count = sequence_count
        self._has_unwanted = row is not None or not wanted.names.issuperset(wanted.of_engine)  # batch_index is one
        self._sequences: dict[int, SequenceState[T]] = {}  # by sequence_index
        self._texts = WholeTexts()

    def of_response(self, tensors: Sequence[T]) -> Sequence[T]:
        """What the client gets of one response. InvalidRequest when nothing says which sequence it continues."""
        if self._row is not None:  # the engine has seen a batch of one
            tensors = [tensor for tensor in tensors if tensor.name() != "batch_index"]
            tensors.append(self._make("batch_index", np.array([[self._row]], np.int32)))
        by_name = {tensor.name(): tensor for tensor in tensors}
        if self._wanted.previous_ids:
            tensors = [*tensors, *self._previous_ids(by_name)]
        if self._wanted.text_diff:
            texts = by_name["text_output"].as_numpy()
            new = np.array(self._texts.new(texts.reshape(-1).tolist()), np.object_)
            tensors = [*tensors, self._make("text_diff", new.reshape(texts.shape))]
        return self._wanted_of(tensors)

    def of_end(self) -> Iterator[Sequence[T]]:
        """A response for each sequence, which tells the detokeniser that no more tokens come.

        It has held back a character that is not complete.
        """
        for _, sequence in sorted(self._sequences.items()):
            tensors = [self._make(name, array) for name, array in zip(TOKENS, _NO_TOKENS, strict=True)]
            previous_ids = self._make("previous_ids", sequence.previous_ids.ids())
            yield self._wanted_of([*tensors, *sequence.repeated, previous_ids])

    def _previous_ids(self, tensors: Mapping[str, T]) -> list[T]:
        """One tensor, or none with beams.

        Without new tokens previous_ids mean the end of a sequence, which no response of the engine means.
        """
        output_ids, sequence_length = (tensors[name].as_numpy() for name in TOKENS)
        if max(self._beam_width, output_ids.shape[1]) > 1:
            return []
        index = 0
        if "sequence_index" in tensors:
            index = tensors["sequence_index"].as_numpy().item()
        elif self._sequence_count > 1:
            raise InvalidRequest(
                f"num_return_sequences is {self._sequence_count}, and the engine's responses have no sequence_index, "
                "which says whose tokens they are; do not stream, or ask for one sequence"
            )
        sequence = self._sequences.setdefault(index, SequenceState())
        sequence.repeated = [tensors[name] for name in _REPEATED if name in tensors]
        before, new = sequence.previous_ids.ids(), output_ids[0, 0, : sequence_length[0, 0]]
        sequence.previous_ids.add(new)
        return [self._make("previous_ids", before)] if new.size else []

    def _wanted_of(self, tensors: Sequence[T]) -> Sequence[T]:
        return [one for one in tensors if one.name() in self._wanted.names] if self._has_unwanted else tensors
