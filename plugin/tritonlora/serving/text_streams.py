# SPDX-FileCopyrightText: the tritonlora authors
# SPDX-License-Identifier: Apache-2.0
"""The streams of text that `postprocessing` has begun to decode, by request id.

In an ensemble without the router, a step sees one response of the engine at a time. Nothing in a response says whose it
is, whether it is the first or whether it is the last. Three facts make up for that:

- Triton gives each step of an ensemble the request's id. Requests without an id are not remembered.
- A step before the engine announces the request: its request_output_len, and whether it streams.
- A sequence ends with its last allowed token, or with a response without tokens. TensorRT-LLM sends the latter for the
  end token, which it does not count (createResult in cpp/tensorrt_llm/batch_manager/llmRequest.cpp). Other ends are not
  seen: a stop word, the engine's own maximum length, a client that left, an error.

Two requests at a time may have the same id, and then nobody can tell their responses apart. The id is ambiguous from
then on: each of its responses is decoded by itself, as upstream does, until none has come for QUIET_SECONDS.
"""

from __future__ import annotations

import time
from collections import OrderedDict
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

# A stream is some hundred bytes. More of them than any engine has in flight; the one quiet for longest is forgotten.
MAX_STREAMS = 4096
QUIET_SECONDS = 600.0
MAX_ID_LENGTH = 256  # the id is the client's; a longer one is not worth the memory


@dataclass(slots=True)
class SequenceProgress:
    """One sequence of a stream, as far as it has come."""

    tokens_left: int
    has_ended: bool = False
    context: list[int] = field(default_factory=list)  # its last tokens that have text, for `text.piece`


@dataclass(slots=True)
class _Stream:
    """A request whose responses are its own. An ambiguous id has none."""

    output_lengths: Sequence[int]  # of each row
    sequence_count: int  # of each row
    is_streamed: bool
    seen: float
    sequences: dict[tuple[int, int], SequenceProgress] = field(default_factory=dict)  # by row and sequence index
    ended_count: int = 0


class TextStreams:
    """The streams that have begun, of one process. Bounded in number and in time."""

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._streams: OrderedDict[str, _Stream | float] = OrderedDict()  # float: ambiguous, and when it was seen last

    def __len__(self) -> int:
        return len(self._streams)

    def begin(
        self, request_id: str, output_lengths: Sequence[int], *, sequence_count: int, is_streamed: bool, has_beams: bool
    ) -> bool:
        """Remember a request that goes to the engine: its request_output_len for each row. False: the id is ambiguous.

        Streamed beams need no state, because each response has all of a beam. Their end cannot be seen, so their id is
        ambiguous at once.
        """
        if not 0 < len(request_id) <= MAX_ID_LENGTH:
            return True
        now = self._clock()
        self._forget_before(now - QUIET_SECONDS)
        is_free = request_id not in self._streams
        if is_free and not (is_streamed and has_beams):
            self._streams[request_id] = _Stream(output_lengths, sequence_count, is_streamed, now)
        else:
            self._streams[request_id] = now
        self._streams.move_to_end(request_id)
        if len(self._streams) > MAX_STREAMS:
            self._streams.popitem(last=False)
        return is_free

    def advance(
        self, request_id: str, token_counts: Sequence[Sequence[int]], *, row: int | None, index: int | None
    ) -> tuple[SequenceProgress, bool] | None:
        """The sequence that a response continues, and whether the response is its last one.

        `token_counts` are the response's, by row and beam. `row` and `index` are its batch_index and sequence_index, if
        it has them. None: decode the response by itself. A response that does not fit the request that has begun makes
        the id ambiguous.
        """
        stream = self._streams.get(request_id)
        if stream is None:
            return None
        now = self._clock()
        self._streams.move_to_end(request_id)
        place = None if isinstance(stream, float) else _place(stream, row, index)
        if isinstance(stream, float) or place is None:
            self._streams[request_id] = now
            return None
        stream.seen = now
        sequence = stream.sequences.get(place)
        if sequence is None:
            sequence = stream.sequences[place] = SequenceProgress(stream.output_lengths[place[0]])
        fits = not stream.is_streamed or (
            [len(beams) for beams in token_counts] == [1] and token_counts[0][0] <= sequence.tokens_left
        )
        if sequence.has_ended or not fits:
            self._streams[request_id] = now
            return None
        if stream.is_streamed:
            sequence.tokens_left -= token_counts[0][0]
            sequence.has_ended = sequence.tokens_left == 0 or token_counts[0][0] == 0
        else:
            sequence.has_ended = True
        stream.ended_count += sequence.has_ended
        if stream.ended_count == len(stream.output_lengths) * stream.sequence_count:
            del self._streams[request_id]
        return (sequence, sequence.has_ended) if stream.is_streamed else None

    def _forget_before(self, oldest: float) -> None:
        while self._streams:
            request_id, stream = next(iter(self._streams.items()))
            if (stream if isinstance(stream, float) else stream.seen) >= oldest:
                return
            del self._streams[request_id]


def _place(stream: _Stream, row: int | None, index: int | None) -> tuple[int, int] | None:
    """Row and sequence index of a response; None when it does not say them, or names ones that the request has not."""
    rows, count = len(stream.output_lengths), stream.sequence_count
    if (row is None and rows > 1) or (index is None and count > 1):
        return None
    place = (row or 0, index or 0)
    return place if 0 <= place[0] < rows and 0 <= place[1] < count else None
