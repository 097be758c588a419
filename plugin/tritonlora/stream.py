# SPDX-FileCopyrightText: the tritonlora authors
# SPDX-License-Identifier: Apache-2.0
"""What an answer of a stream says beside what the engine says: what came before it, and what is new.

This file runs inside a plain Triton container: standard library and numpy only.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt


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
