# SPDX-FileCopyrightText: the tritonlora authors
# SPDX-License-Identifier: Apache-2.0
"""What postprocessing remembers of streams: whose tokens continue which text, and when nobody can tell."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tritonlora.errors import InvalidRequest
from tritonlora.serving.text import begin, postprocess, word_lists
from tritonlora.serving.text_streams import MAX_ID_LENGTH, MAX_STREAMS, QUIET_SECONDS, TextStreams
from tritonlora.serving.tokenizer import byte_tokenizer

EURO = "€".encode()


class Clock:
    """A clock that is set by hand."""

    now = 1000.0

    def __call__(self) -> float:
        """Seconds."""
        return self.now


def announce(streams: TextStreams, request_id: str, lengths: list[int], **inputs: Any) -> bool:
    """A request that streams, unless `inputs` say otherwise."""
    tensors = {"REQUEST_OUTPUT_LEN": np.array([[length] for length in lengths], np.int32)}
    given = {"STREAMING": True, **inputs}
    tensors |= {
        name: value if isinstance(value, np.ndarray) else np.array([[value]] * len(lengths))
        for name, value in given.items()
    }
    outputs, is_free = begin(streams, request_id, tensors)
    assert {"OUT_REQUEST_OUTPUT_LEN": [[length] for length in lengths]} == {
        name: tensor.tolist() for name, tensor in outputs.items()
    }
    return is_free


def respond(streams: TextStreams | None, request_id: str, tokens: bytes, **indices: int) -> str:
    """The text of a response with one row and one beam."""
    inputs = {
        "TOKENS_BATCH": np.array([[[*tokens]]], np.int32),
        "SEQUENCE_LENGTH": np.array([[len(tokens)]], np.int32),
        **{name: np.array([[index]], np.int32) for name, index in indices.items()},
    }
    text: bytes = postprocess(byte_tokenizer(), inputs, streams, request_id)["OUTPUT"].item()
    return text.decode()


def alone(tokens: bytes) -> str:
    """The text of a response decoded by itself."""
    return tokens.decode(errors="replace")


@settings(max_examples=200, deadline=None)
@given(
    texts=st.lists(st.binary(min_size=1, max_size=24), min_size=1, max_size=4),
    order=st.randoms(use_true_random=False),
    early=st.booleans(),
)
def test_pieces_of_streams_side_by_side_join_to_what_python_decodes(
    texts: list[bytes], order: Any, early: bool
) -> None:
    """Any bytes, any turns; a stream ends with its last allowed token, or `early` with a response without tokens."""
    streams = TextStreams()
    joined = dict.fromkeys(map(str, range(len(texts))), "")
    for name, text in zip(joined, texts, strict=True):
        assert announce(streams, name, [len(text) + early])
    rest = dict(zip(joined, texts, strict=True))
    while rest:
        name = order.choice(sorted(rest))
        size = order.randint(1, 3)
        chunk, rest[name] = rest[name][:size], rest[name][size:]
        joined[name] += respond(streams, name, chunk)
        if not rest[name]:
            del rest[name]
            joined[name] += respond(streams, name, b"") if early else ""

    assert [alone(text) for text in texts] == list(joined.values())
    assert 0 == len(streams)


def test_rows_and_sequences_are_kept_apart() -> None:
    """By batch_index and sequence_index; the stream ends when all of them have."""
    streams = TextStreams()
    announce(streams, "a", [3, 3], NUM_RETURN_SEQUENCES=2)
    places = [(row, index) for row in (0, 1) for index in (0, 1)]

    texts = [
        respond(streams, "a", EURO[turn : turn + 1], BATCH_INDEX=row, SEQUENCE_INDEX=index)
        for turn in range(3)
        for row, index in places
    ]

    assert ["", "", "", "", "", "", "", "", "€", "€", "€", "€"] == texts
    assert 0 == len(streams)


def test_stop_word_ends_its_row() -> None:
    """However responses split it; another row has other words, and goes on."""
    streams = TextStreams()
    lists = word_lists(byte_tokenizer(), [["stop", "\n\n"], ["é"]])
    assert lists is not None
    announce(streams, "a", [30, 30], STOP_WORDS_LIST=lists)

    assert ["a st", "op\n"] == [respond(streams, "a", part, BATCH_INDEX=1) for part in (b"a st", b"op\n")]
    assert ["a st", "op"] == [respond(streams, "a", part, BATCH_INDEX=0) for part in (b"a st", b"op")]
    assert 1 == len(streams)
    assert ["\n", "é"] == [respond(streams, "a", part, BATCH_INDEX=1) for part in (b"\n\xc3", b"\xa9")]
    assert 0 == len(streams)


@pytest.mark.parametrize(
    ("lengths", "inputs", "indices"),
    [
        pytest.param([3, 3], {}, {}, id="no batch_index"),
        pytest.param([3], {"NUM_RETURN_SEQUENCES": 2}, {}, id="no sequence_index"),
        pytest.param([3, 3], {}, {"BATCH_INDEX": 2}, id="no such row"),
        pytest.param([3], {}, {"SEQUENCE_INDEX": 1}, id="no such sequence"),
        pytest.param([3], {"BEAM_WIDTH": 2}, {}, id="one of two beams"),
        pytest.param([1], {}, {}, id="more tokens than asked for"),
    ],
)
def test_response_that_does_not_fit_is_decoded_by_itself(
    lengths: list[int], inputs: dict[str, int], indices: dict[str, int]
) -> None:
    """And so are those after it, whatever they say."""
    streams = TextStreams()
    announce(streams, "a", lengths, **inputs)

    assert "\ufffd" == respond(streams, "a", EURO[:2], **indices)
    assert "\ufffd" == respond(streams, "a", EURO[2:], BATCH_INDEX=0, SEQUENCE_INDEX=0)


def test_id_of_two_requests_is_ambiguous_until_it_is_quiet() -> None:
    """Nothing held back of one gets into the other, nor into a third one."""
    clock = Clock()
    streams = TextStreams(clock)
    assert announce(streams, "a", [3])
    assert "" == respond(streams, "a", EURO[:2])

    assert not announce(streams, "a", [3])
    assert "\ufffd" == respond(streams, "a", EURO[2:])
    clock.now += QUIET_SECONDS - 1
    assert "\ufffd" == respond(streams, "a", EURO[:2])
    clock.now += QUIET_SECONDS
    assert not announce(streams, "a", [3])
    clock.now += QUIET_SECONDS + 1
    assert announce(streams, "a", [3])
    assert ["", "€"] == [respond(streams, "a", part) for part in (EURO[:2], EURO[2:])]


def test_more_tokens_after_the_end_make_an_id_ambiguous() -> None:
    """A row that has ended has no more responses; whose they are is not known."""
    streams = TextStreams()
    announce(streams, "a", [3, 3])
    assert "" == respond(streams, "a", b"", BATCH_INDEX=0)

    assert "b" == respond(streams, "a", b"b", BATCH_INDEX=0)
    assert "\ufffd" == respond(streams, "a", EURO[:2], BATCH_INDEX=1)


def test_response_that_is_not_streamed_is_whole() -> None:
    """It may be longer than request_output_len, for the prompt is in it, and it ends the request."""
    streams = TextStreams()
    announce(streams, "a", [1], STREAMING=False)

    assert "ok\ufffd" == respond(streams, "a", b"ok" + EURO[:2])
    assert announce(streams, "a", [3])


def test_each_beam_of_a_response_that_is_not_streamed_is_whole() -> None:
    """An announced request may have beams."""
    streams = TextStreams()
    announce(streams, "a", [1], STREAMING=False, BEAM_WIDTH=2)
    inputs = {"TOKENS_BATCH": np.array([[[97], [98]]], np.int32), "SEQUENCE_LENGTH": np.ones((1, 2), np.int32)}

    assert [[b"a", b"b"]] == postprocess(byte_tokenizer(), inputs, streams, "a")["OUTPUT"].tolist()
    assert 0 == len(streams)


@pytest.mark.parametrize("request_id", ["", "x" * (MAX_ID_LENGTH + 1)])
def test_requests_without_an_id_are_not_remembered(request_id: str) -> None:
    """Nor are those with an id too long to keep."""
    streams = TextStreams()

    assert announce(streams, request_id, [3])
    assert announce(streams, request_id, [3])
    assert "\ufffd" == respond(streams, request_id, EURO[:2])
    assert 0 == len(streams)


def test_streams_are_bounded_in_number() -> None:
    """The one that has been quiet for longest goes first."""
    streams = TextStreams()
    announce(streams, "old", [9])
    announce(streams, "busy", [1 << 20])
    for number in range(MAX_STREAMS):
        respond(streams, "busy", b"x")
        announce(streams, str(number), [9])

    assert MAX_STREAMS == len(streams)
    assert "\ufffd" == respond(streams, "old", EURO[:2])
    assert ["", ""] == [respond(streams, name, EURO[:2]) for name in ("busy", "1")]


def test_streams_are_bounded_in_time() -> None:
    """One that nobody ended goes when another one begins; one that goes on stays."""
    clock = Clock()
    streams = TextStreams(clock)
    for name in ("quiet", "busy"):
        announce(streams, name, [9])
    clock.now += QUIET_SECONDS
    respond(streams, "busy", EURO[:2])
    clock.now += 1
    announce(streams, "another", [9])

    assert 2 == len(streams)
    assert "€" == respond(streams, "busy", EURO[2:])


@pytest.mark.parametrize("name", ["TOKENS_BATCH", "SEQUENCE_LENGTH"])
def test_request_with_neither_tokens_nor_announcement_is_refused(name: str) -> None:
    """The tensor that is missing is named."""
    inputs = {"TOKENS_BATCH": np.zeros((1, 1, 1), np.int32), "SEQUENCE_LENGTH": np.ones((1, 1), np.int32)}
    del inputs[name]

    with pytest.raises(InvalidRequest, match=f"bad request: no {name}; lead the engine's output_ids"):
        postprocess(byte_tokenizer(), inputs)
