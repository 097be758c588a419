# SPDX-FileCopyrightText: the tritonlora authors
# SPDX-License-Identifier: Apache-2.0
"""The streams of text that `postprocessing` has begun to decode, by request id.

In an ensemble without the router, a step sees one response of the engine at a time. A response does not tell which
request it belongs to, and whether it is the first or the last one. Three facts make up for that:

- Triton gives each step of an ensemble the request's id. Requests without an id are not remembered.
- A step before the engine announces the request: its request_output_len, its stop words, and whether it streams.
- A sequence ends with its last allowed token, with a stop word, or with a response without tokens. TensorRT-LLM sends
  such a response for the end token, which it does not count (createResult in
  cpp/tensorrt_llm/batch_manager/llmRequest.cpp). Other ends are not seen: a stop word that begins in the prompt, the
  engine's own maximum length, an error.

If two requests at a time have the same id, their responses cannot be told apart. Then the id is ambiguous: each of its
responses is decoded by itself, as upstream's postprocessing does, until no response has come for QUIET_SECONDS.
"""

from __future__ import annotations

import time
from collections import OrderedDict
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

Words = Sequence[tuple[int, ...]]  # the tokens of each stop word

# A stream takes some hundred bytes. The limit is more than any engine has in flight. Beyond it, the stream that was
# quiet for longest is forgotten.
MAX_STREAMS = 4096
QUIET_SECONDS = 600.0
MAX_ID_LENGTH = 256  # a client may send a longer id, which is not remembered


@dataclass(slots=True)
class SequenceProgress:
    """The state of one sequence of a stream."""

    tokens_left: int
    has_ended: bool = False
    context: list[int] = field(default_factory=list)  # its last tokens that have text, for `text.piece`
    tail: list[int] = field(default_factory=list)  # its last tokens, as many as the longest stop word has

    def add(self, tokens: Sequence[int], stop_words: Words) -> None:
        """Note the sequence's next tokens."""
        self.tokens_left -= len(tokens)
        if stop_words:
            self.tail = [*self.tail, *tokens][-max(map(len, stop_words)) :]
        stopped = any(tuple(self.tail[-len(word) :]) == word for word in stop_words)
        self.has_ended = not tokens or self.tokens_left == 0 or stopped


@dataclass(slots=True)
class _Stream:
    """A request that was announced, and whose id is not ambiguous."""

    output_lengths: Sequence[int]  # of each row
    stop_words: Sequence[Words]  # of each row
    sequence_count: int  # of each row
    is_streamed: bool
    seen: float  # when it was announced, or its last response came
    sequences: dict[tuple[int, int], SequenceProgress] = field(default_factory=dict)  # by row and sequence index
    ended_count: int = 0


class TextStreams:
    """The announced streams of one process. They are bounded in number and in time."""

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._streams: OrderedDict[str, _Stream | float] = OrderedDict()  # float: an ambiguous id, last seen then

    def __len__(self) -> int:
        return len(self._streams)

    def begin(
        self,
        request_id: str,
        output_lengths: Sequence[int],
        stop_words: Sequence[Words],
        *,
        sequence_count: int,
        is_streamed: bool,
        has_beams: bool,
    ) -> bool:
        """Remember a request that goes to the engine. False: the id is ambiguous.

        `output_lengths` is request_output_len for each row, and `stop_words` has the stop words of each row. Streamed
        beams need no state, because each response has all tokens of a beam. Their end cannot be seen, so their id is
        ambiguous at once.
        """
        if not 0 < len(request_id) <= MAX_ID_LENGTH:
            return True
        now = self._clock()
        self._forget_before(now - QUIET_SECONDS)
        is_free = request_id not in self._streams
        if is_free and not (is_streamed and has_beams):
            self._streams[request_id] = _Stream(output_lengths, stop_words, sequence_count, is_streamed, now)
        else:
            self._streams[request_id] = now
        self._streams.move_to_end(request_id)
        if len(self._streams) > MAX_STREAMS:
            self._streams.popitem(last=False)
        return is_free

    def advance(
        self, request_id: str, tokens: Sequence[Sequence[Sequence[int]]], *, row: int | None, index: int | None
    ) -> tuple[SequenceProgress, bool] | None:
        """The sequence that a response continues, and whether it is the sequence's last response.

        None: decode the response by itself. `tokens` are the response's tokens by row and beam. `row` and `index` are
        its batch_index and sequence_index, if it has them. A response that does not fit the announced request makes the
        id ambiguous.
        """
        stream = self._streams.get(request_id)
        if stream is None:
            return None
        now = self._clock()
        self._streams.move_to_end(request_id)
        key = None if isinstance(stream, float) else _sequence_key(stream, row, index)
        if isinstance(stream, float) or key is None:
            self._streams[request_id] = now
            return None
        stream.seen = now
        sequence = stream.sequences.get(key)
        if sequence is None:
            sequence = stream.sequences[key] = SequenceProgress(stream.output_lengths[key[0]])
        fits = not stream.is_streamed or (
            [len(beams) for beams in tokens] == [1] and len(tokens[0][0]) <= sequence.tokens_left
        )
        if sequence.has_ended or not fits:
            self._streams[request_id] = now
            return None
        if stream.is_streamed:
            sequence.add(tokens[0][0], stream.stop_words[key[0]])
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


def _sequence_key(stream: _Stream, row: int | None, index: int | None) -> tuple[int, int] | None:
    """Row and sequence index of a response; None when it lacks one, or when the request has no such sequence."""
    rows, count = len(stream.output_lengths), stream.sequence_count
    if (row is None and rows > 1) or (index is None and count > 1):
        return None
    key = (row or 0, index or 0)
    return key if 0 <= key[0] < rows and 0 <= key[1] < count else None
