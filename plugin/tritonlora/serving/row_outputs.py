# SPDX-FileCopyrightText: the tritonlora authors
# SPDX-License-Identifier: Apache-2.0
"""Decides which tensors of the engine's responses the router passes on, and adds tensors of the router's own.

| tensor that the router adds | content |
|---|---|
| batch_index | the row, if the router sends each row of a batch to the engine by itself |
| previous_ids | the last tokens of the stream before this response, for a detokeniser without a state |
| text_diff | the new part of a response that has the whole text so far |
| lora_name | the own name of the adapter that responds, if the request named an alias; "" for the base model |

This module does not use Triton. A tensor has a name and an array, and a function that is passed in makes one.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Generic, Protocol, TypeVar

import numpy as np
import numpy.typing as npt

from .errors import InvalidRequest
from .stream_state import SequenceState, WholeTexts

OWN_OUTPUTS = {"previous_ids", "all_outputs", "text_diff", "lora_name"}
_TOKENS = ("output_ids", "sequence_length")
_NO_TOKENS = (np.zeros((1, 1, 0), np.int32), np.zeros((1, 1), np.int32))
# Outputs that tell which row and sequence the tokens belong to, and how likely they were. The response that ends a
# sequence repeats them.
_REPEATED = ("batch_index", "sequence_index", "cum_log_probs", "output_log_probs")


class Tensor(Protocol):
    """A tensor of Triton's Python backend."""

    def name(self) -> str:
        """The name of the output."""

    def as_numpy(self) -> npt.NDArray[Any]:
        """The elements."""


T = TypeVar("T", bound=Tensor)


@dataclass(frozen=True, slots=True)
class Wanted:
    """The outputs that a client asked for."""

    names: frozenset[str]
    of_engine: frozenset[str]  # the outputs that the engine is asked for, which may be more
    previous_ids: bool
    text_diff: bool
    lora_name: bool


def wanted_outputs(requested: Collection[str], needed: Collection[str], *, is_stream: bool) -> Wanted:
    """The outputs that a request wants. `requested` are those that it names; the engine must be asked for `needed`.

    Triton fills in all outputs if a client names none. `all_outputs` is never sent. If a request asks for it, the
    client named no outputs.
    """
    names = frozenset(requested)
    # A third tensor in each response costs a fifth of the tokens per second. So a client gets the router's own outputs
    # only if it names them.
    named = frozenset() if "all_outputs" in names else names
    previous_ids = is_stream and "previous_ids" in named
    of_engine = names.union(needed, ["sequence_index"] if previous_ids else [])
    return Wanted(names, of_engine, previous_ids, "text_diff" in named, "lora_name" in named)


class RowOutputs(Generic[T]):
    """The outputs of one row: of a batch that is split, or of a whole request."""

    def __init__(
        self,
        wanted: Wanted,
        make: Callable[[str, npt.NDArray[Any]], T],
        *,
        row: int | None,
        lora_name: str = "",
        batching: bool = True,
        beam_width: int = 1,
        sequence_count: int = 1,
    ) -> None:
        """`row` is None if the engine gets the whole batch. `beam_width` and `sequence_count` are the request's.

        `lora_name` is the adapter's own name, "" for the base model. `batching` says whether tensors have a batch
        dimension.
        """
        self._wanted = wanted
        self._make = make
        self._row = row
        self._lora_name = np.array([lora_name.encode()], np.object_)
        self._batching = batching
        self._beam_width = beam_width
        self._sequence_count = sequence_count
        # The client may not have asked for batch_index, which `of_response` adds to a row of a batch.
        self._has_unwanted = row is not None or not wanted.names.issuperset(wanted.of_engine)
        self._sequences: dict[int, SequenceState[T]] = {}  # by sequence_index
        self._texts = WholeTexts()

    def of_response(self, tensors: Sequence[T]) -> Sequence[T]:
        """The tensors that the client gets for one response. InvalidRequest when its sequence cannot be told."""
        if self._row is not None:  # the engine got a batch of one row
            tensors = [tensor for tensor in tensors if tensor.name() != "batch_index"]
            tensors.append(self._make("batch_index", np.array([[self._row]], np.int32)))
        if self._wanted.previous_ids:
            tensors = [*tensors, *self._previous_ids({tensor.name(): tensor for tensor in tensors})]
        if self._wanted.text_diff:
            texts = next(tensor for tensor in tensors if tensor.name() == "text_output").as_numpy()
            new = np.array(self._texts.new(texts.reshape(-1).tolist()), np.object_)
            tensors = [*tensors, self._make("text_diff", new.reshape(texts.shape))]
        return self._wanted_of(self._with_name(tensors))

    def of_end(self) -> Iterator[Sequence[T]]:
        """The tensors of one more response for each sequence, which tells the detokeniser that no more tokens come.

        The detokeniser may have held back a character that is not complete.
        """
        for _, sequence in sorted(self._sequences.items()):
            tensors = [self._make(name, array) for name, array in zip(_TOKENS, _NO_TOKENS, strict=True)]
            previous_ids = self._make("previous_ids", sequence.previous_ids.ids())
            yield self._wanted_of(self._with_name([*tensors, *sequence.repeated, previous_ids]))

    def _with_name(self, tensors: Sequence[T]) -> Sequence[T]:
        """`tensors`, with lora_name (rows, 1), or (1,) without batches, if the client asked for it."""
        if not self._wanted.lora_name:
            return tensors
        name = self._lora_name
        if self._batching:
            name = np.repeat(name[None], tensors[0].as_numpy().shape[0], axis=0)
        return [*tensors, self._make("lora_name", name)]

    def _previous_ids(self, tensors: Mapping[str, T]) -> list[T]:
        """The tensor previous_ids (1, n) int32 for a response, in a list; [] with beams, and without new tokens.

        With previous_ids and no new tokens, a response would mean the end of a sequence. `of_end` sends that response.
        """
        output_ids, sequence_length = (tensors[name].as_numpy() for name in _TOKENS)
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
