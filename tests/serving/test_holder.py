# SPDX-FileCopyrightText: the tritonlora authors
# SPDX-License-Identifier: Apache-2.0
"""holder.py: who can prove that a message is tritonlora's own."""

from __future__ import annotations

import subprocess
import sys
from contextlib import closing

import pytest

from tritonlora.serving.holder import Holder, is_held


def test_a_holder_is_known_until_it_is_closed() -> None:
    """By its token."""
    with closing(Holder()) as holder:
        assert is_held(holder.token)

    assert not is_held(holder.token)


@pytest.mark.parametrize(
    "forge",
    [
        lambda token: token[:-1] + ("0" if token[-1] != "0" else "1"),
        lambda token: "1:" + token.split(":", 1)[1],
        lambda token: token.replace(":", ":9", 1),
        lambda token: token + " ",
        lambda token: "",
        lambda token: None,
        lambda token: 7,
        lambda token: "../../" + token,
    ],
)
def test_a_token_that_nobody_holds_is_none(forge: object) -> None:
    """A client cannot know the name, which is random."""
    with closing(Holder()) as holder:
        assert callable(forge)
        assert not is_held(forge(holder.token))


def test_the_holder_of_a_process_that_was_killed_is_gone() -> None:
    """Nothing is left of it."""
    program = "from tritonlora.serving.holder import Holder; h = Holder(); print(h.token, flush=True); input()"
    with subprocess.Popen([sys.executable, "-c", program], stdin=-1, stdout=-1, text=True) as process:
        assert process.stdout is not None
        token = process.stdout.readline().strip()
        assert is_held(token)
        process.kill()

    assert not is_held(token)
