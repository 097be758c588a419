# SPDX-FileCopyrightText: the tritonlora authors
# SPDX-License-Identifier: Apache-2.0
"""What the router adds to the responses of a stream: the tokens before each response, or the text that is new in it.

A stream has a state for each of its sequences. TensorRT-LLM gives num_return_sequences of them, one sequence in each
response, in any order; the output sequence_index says which one (cpp/tensorrt_llm/batch_manager/llmRequest.cpp,
createResult). Beams need no state: with beam_width above 1 each response has all that was generated so far.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Generic, TypeVar

import numpy as np
import numpy.typing as npt

T = TypeVar("T")


class PreviousIds:
    """The last tokens of a stream: what a stateless detokeniser must know to continue a text."""

    # A character is at most a handful of tokens, and decoders look back over one word at most.
    COUNT = 32

    _NONE: npt.NDArray[np.int32] = np.zeros((1, 0), np.int32)

    def __init__(self) -> None:
        self._ids = self._NONE

    def ids(self) -> npt.NDArray[np.int32]:
        """The tokens sent before now, the oldest first: (1, n) int32."""
        return self._ids

    def add(self, ids: npt.NDArray[np.int32]) -> None:
        """These, (n,) int32, have been sent. What `ids` gave before stays as it is."""
        self._ids = np.concatenate((self._ids, ids[None]), axis=1)[:, -self.COUNT :]


@dataclass(slots=True)
class SequenceState(Generic[T]):
    """One sequence of a stream, as far as it has come. `T` is a tensor."""

    previous_ids: PreviousIds = field(default_factory=PreviousIds)
    # Outputs of its last response that its end repeats. TensorRT-LLM's log probabilities are of all tokens so far.
    repeated: Sequence[T] = ()


class WholeTexts:
    """What is new in each answer of a stream whose answers have the whole text so far, one text for each output."""

    def __init__(self) -> None:
        self._sent: dict[int, int] = {}  # output -> bytes of it that have been sent

    def new(self, texts: Sequence[bytes]) -> list[bytes]:
        """The ends of `texts` that were not in the answers before. A text that got shorter has nothing new."""
        new = [text[self._sent.get(number, 0) :] for number, text in enumerate(texts)]
        for number, text in enumerate(new):
            self._sent[number] = self._sent.get(number, 0) + len(text)
        return new
