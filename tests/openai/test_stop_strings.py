# SPDX-FileCopyrightText: the tritonlora authors
# SPDX-License-Identifier: Apache-2.0
"""Stop strings in text that comes in pieces. The oracle looks at the whole text."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tritonlora.openai.stop_strings import StopStrings

TEXT = st.text("ab€", max_size=12)
STOPS = st.lists(st.text("ab€", min_size=1, max_size=4), max_size=3)


@given(pieces=st.lists(TEXT, max_size=6), stops=STOPS)
def test_pieces_join_to_the_text_before_the_first_stop_string(pieces: list[str], stops: list[str]) -> None:
    """However the text is split; and what was passed on is never taken back."""
    found = StopStrings(stops)
    passed = [found.pass_on(piece) for piece in pieces]
    passed.append(found.pass_on("", ends=True))
    whole = "".join(pieces)
    # The piece in which the first stop string ends may have others, and the earliest of them counts.
    so_far = ["".join(pieces[: count + 1]) for count in range(len(pieces))]
    seen = next((text for text in so_far if any(stop in text for stop in stops)), None)
    expected = whole if seen is None else whole[: min(seen.find(stop) for stop in stops if stop in seen)]

    assert expected == "".join(passed)
    assert (seen is not None) == found.found


@pytest.mark.parametrize(
    ("text", "passed"), [("abc", "abc"), ("abs", "ab"), ("abst", "ab"), ("abstop", "ab"), ("abstx", "abstx")]
)
def test_only_what_may_begin_a_stop_string_is_held_back(text: str, passed: str) -> None:
    """The rest goes out at once."""
    assert passed == StopStrings(["stop"]).pass_on(text)
