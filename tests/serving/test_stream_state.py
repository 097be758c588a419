# SPDX-FileCopyrightText: the tritonlora authors
# SPDX-License-Identifier: Apache-2.0
"""stream.py: what came before an answer, and what is new in it."""

from __future__ import annotations

import numpy as np

from tritonlora.serving.stream_state import PreviousIds, WholeTexts


def test_previous_ids_are_the_last_tokens_of_the_stream() -> None:
    """In order, and bounded."""
    previous_ids = PreviousIds()
    previous_ids.add(np.array([1, 2], np.int32))
    previous_ids.add(np.array([], np.int32))
    two = previous_ids.ids()
    previous_ids.add(np.arange(100, dtype=np.int32))

    assert [[1, 2]] == two.tolist()
    assert [list(range(100 - PreviousIds.COUNT, 100))] == previous_ids.ids().tolist()


def test_what_is_new_in_whole_texts_joins_to_the_last_one() -> None:
    """For each output by itself."""
    texts = WholeTexts()
    answers = [[b"a"], [b"ab", b"x"], [b"ab", b"xyz"], [b"abc", b"xyz"]]

    assert [[b"a"], [b"b", b"x"], [b"", b"yz"], [b"c", b""]] == [texts.new(one) for one in answers]


def test_a_text_that_got_shorter_has_nothing_new() -> None:
    """A stop word is cut off again; and what follows is not repeated."""
    texts = WholeTexts()

    assert [[b"one tw"], [b""], [b"o"]] == [texts.new([one]) for one in (b"one tw", b"one ", b"one two")]
