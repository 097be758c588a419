# SPDX-FileCopyrightText: the tritonlora authors
# SPDX-License-Identifier: Apache-2.0
"""forwarding.py: when a request is sent again."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import pytest

from tritonlora.errors import AdapterUnavailable
from tritonlora.serving.forwarding import forward

MISS = "!LoRA task 1 not found in cache. Please send LoRA weights with request"
FULL = "!Error storing task=4 in PEFT cache -- Cache is full. There are no done tasks to evict"
OTHER = "!Assertion failed: lora module attn_q not enabled for this model"
ANSWER = ["1", "2", "3"]


class Engine:
    """Gives one of `streams` after the other, and notes how far each was read."""

    def __init__(self, *streams: list[str]) -> None:
        self._streams = iter(streams)
        self.unread: list[int] = []  # responses of each stream that nobody has read
        self.lost = 0

    def send(self) -> Iterator[str]:
        stream = next(self._streams)
        number = len(self.unread)
        self.unread.append(len(stream))
        for one in stream:
            self.unread[number] -= 1
            yield one

    def load(self) -> None:
        self.lost += 1


def forwarded(engine: Engine, lost: Callable[[], None] | None = None) -> list[str]:
    """What the client gets. An error begins with "!"."""
    return list(forward(engine.send, lost or engine.load, lambda one: one[1:] if one.startswith("!") else None))


def test_what_the_engine_says_goes_through() -> None:
    """Sent once."""
    engine = Engine(ANSWER)

    assert ANSWER == forwarded(engine)
    assert ([0], 0) == (engine.unread, engine.lost)


@pytest.mark.parametrize("refusal", [MISS, FULL])
def test_a_request_whose_adapter_the_engine_lacks_is_sent_again(refusal: str) -> None:
    """As often as need be. The client sees nothing of it, and every stream is read to its end."""
    engine = Engine([refusal, "the final flag"], [refusal], ANSWER)

    assert ANSWER == forwarded(engine)
    assert ([0, 0, 0], 2) == (engine.unread, engine.lost)


def test_an_error_is_passed_on_and_not_sent_again() -> None:
    """With what follows it."""
    engine = Engine([OTHER, "the final flag"])

    assert [OTHER, "the final flag"] == forwarded(engine)
    assert 0 == engine.lost


def test_a_miss_after_the_first_response_is_an_error_and_never_a_repeat() -> None:
    """It would repeat text."""
    engine = Engine(["1", MISS])

    assert ["1", MISS] == forwarded(engine)
    assert 0 == engine.lost


def test_a_stream_without_a_response_ends() -> None:
    """The caller makes an error of it."""
    assert [] == forwarded(Engine([]))


def test_an_adapter_that_cannot_be_loaded_ends_the_request() -> None:
    """After the refused stream was read to its end."""
    engine = Engine([MISS, "the final flag"])

    def refuse() -> None:
        raise AdapterUnavailable("no")

    with pytest.raises(AdapterUnavailable):
        forwarded(engine, refuse)
    assert [0] == engine.unread
