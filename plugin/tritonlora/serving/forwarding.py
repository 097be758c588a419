# SPDX-FileCopyrightText: the tritonlora authors
# SPDX-License-Identifier: Apache-2.0
"""Sends a request to the engine again when the engine lacks its adapter, so that the client sees nothing of a miss.

A request carries its adapter's id alone. The engine refuses a request whose adapter it lacks before it has produced a
token. Then the resolver loads the adapter, and the same request is sent again. After the first response of a stream
nothing is sent again, since that would repeat text.

All responses to every request are read, even after an error: Triton hangs on a BLS request that is abandoned. This
module does not use Triton: requests and responses are opaque.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable, Iterator
from typing import TypeVar

from .engine_errors import Meaning, meaning_of

Answer = TypeVar("Answer")


def forward(
    send: Callable[[], Iterable[Answer]], lost: Callable[[], None], error_of: Callable[[Answer], str | None]
) -> Iterator[Answer]:
    """The engine's responses to one request, as they come. Read all of them.

    `send` sends the request and returns the responses. `lost` has the adapter loaded, and returns when the request may
    be sent again; an error that it raises ends the request. `error_of` returns the error text of a response, or None.
    """
    while True:
        answers = iter(send())
        for answer in answers:
            if meaning_of(error_of(answer)) in (Meaning.MISS, Meaning.FULL):
                break
            yield answer
            yield from answers
            return
        else:
            return
        deque(answers, maxlen=0)
        lost()
