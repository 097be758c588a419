# SPDX-FileCopyrightText: the tritonlora authors
# SPDX-License-Identifier: Apache-2.0
"""The state of a stream, from which the router makes previous_ids and text_diff.

A stream has a state for each of its sequences. TensorRT-LLM generates num_return_sequences of them. Each response has
tokens of one sequence, in any order, and the output sequence_index tells which one
(cpp/tensorrt_llm/batch_manager/llmRequest.cpp, createResult). Beams need no state: with beam_width above 1, each
response has all tokens so far.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Generic, TypeVar

import numpy as np
import numpy.typing as npt

T = TypeVar("T")


class PreviousIds:
    """The last tokens of a sequence, which a stateless detokeniser needs to continue the text."""

    # At most so many tokens are kept. A character is at most a handful of tokens, and decoders look back over one word
    # at most.
    COUNT = 32

    _NONE: npt.NDArray[np.int32] = np.zeros((1, 0), np.int32)

    def __init__(self) -> None:
        self._ids = self._NONE

    def ids(self) -> npt.NDArray[np.int32]:
        """The last tokens that were sent, the oldest first: (1, n) int32, n at most COUNT."""
        return self._ids

    def add(self, ids: npt.NDArray[np.int32]) -> None:
        """Note that `ids` (n,) int32 were sent. Arrays that `ids()` returned before are not changed."""
        self._ids = np.concatenate((self._ids, ids[None]), axis=1)[:, -self.COUNT :]


@dataclass(slots=True)
class SequenceState(Generic[T]):
    """The state of one sequence of a stream. `T` is a tensor."""

    previous_ids: PreviousIds = field(default_factory=PreviousIds)
    # Outputs of its last response, which the response that ends the sequence repeats. TensorRT-LLM's log probabilities
    # are of all tokens so far.
    repeated: Sequence[T] = ()


class WholeTexts:
    """Finds the new part of each response, for a model whose responses have the whole text so far.

    A response has one text for each of the request's outputs.
    """

    def __init__(self) -> None:
        self._sent: dict[int, int] = {}  # output number -> bytes of its text that were sent

    def new(self, texts: Sequence[bytes]) -> list[bytes]:
        """The part of each text, UTF-8, that was not sent before. A text that got shorter has no new part."""
        new = [text[self._sent.get(number, 0) :] for number, text in enumerate(texts)]
        for number, text in enumerate(new):
            self._sent[number] = self._sent.get(number, 0) + len(text)
        return new
