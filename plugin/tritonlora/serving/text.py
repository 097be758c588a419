# SPDX-FileCopyrightText: the tritonlora authors
# SPDX-License-Identifier: Apache-2.0
"""Turns text into the engine's tensors, and the engine's tokens into text: what `text_models` does for Triton.

Tensor names, types and shapes are those of tensorrtllm_backend v0.18
(all_models/inflight_batcher_llm/{preprocessing,postprocessing}/config.pbtxt), for text alone.

Streaming, strategy. The pieces of a streamed response join to exactly the text of the whole response. A piece is the
text that the new tokens add to the text of the previous tokens. The router sends the previous tokens as
PREVIOUS_TOKENS; without the router, `text_streams` remembers them. U+FFFD at the end of a text may be the beginning of
a character, so it is held back. The end of the stream sends the text that is still held back.

A few previous tokens are enough, because decoding is local (see `tokenizer`). A character has at most four bytes, and a
token with text has at least one of them. Some tokenizers drop a space at the start of a text. They drop it from both
texts of which a piece is the difference.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import accumulate, pairwise
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from .errors import InvalidRequest, ModelConfigError, one_message
from .text_streams import SequenceProgress, TextStreams, Words
from .tokenizer import REPLACEMENT, Tokenizer, byte_tokenizer, load_tokenizer

Tensors = dict[str, npt.NDArray[Any]]

# The previous tokens with text that a piece needs. PREVIOUS_TOKENS must have at least as many tokens, and should have
# some more, since tokens without text may be among them.
CONTEXT_TOKENS = 4

_BOOLEANS = {
    **dict.fromkeys(("true", "1", "t", "y", "yes"), True),
    **dict.fromkeys(("false", "0", "f", "n", "no"), False),
}


@dataclass(frozen=True, slots=True)
class TextOptions:
    """The parameters of both models in their config.pbtxt."""

    tokenizer_dir: Path | None = None  # None: a token is a UTF-8 byte
    add_special_tokens: bool = True  # preprocessing adds them to QUERY
    skip_special_tokens: bool = True  # postprocessing leaves them out of the text
    chat_template: bool = False  # preprocessing puts QUERY into the tokenizer's chat template, as one user message
    max_query_bytes: int = 4 << 20  # a longer QUERY would delay the requests of other clients


def parse_options(parameters: Mapping[str, str]) -> TextOptions:
    """The options in the parameters of a config.pbtxt. Absent and empty parameters mean the defaults.

    ModelConfigError names all parameters that cannot be understood.
    """
    problems = []
    given: dict[str, Any] = {}
    for name, value in parameters.items():
        if name not in TextOptions.__dataclass_fields__ or not value:
            continue
        if value.startswith("${"):
            problems.append(f"{name} still holds the template's {value!r}; fill it in, or leave it empty")
        elif name == "tokenizer_dir":
            given[name] = Path(value)
        elif name == "max_query_bytes":
            if value.isascii() and value.isdigit() and int(value) > 0:
                given[name] = int(value)
            else:
                problems.append(f"{name} must be a number of bytes above 0, got {value!r}")
        elif value.lower() in _BOOLEANS:
            given[name] = _BOOLEANS[value.lower()]
        else:
            problems.append(f"{name} must be 'true' or 'false', got {value!r}")
    if problems:
        raise ModelConfigError(one_message("bad parameters", problems))
    return TextOptions(**given)


def open_tokenizer(options: TextOptions) -> Tokenizer:
    """The tokenizer that `options` name. ModelConfigError when it cannot be loaded, or has no chat template to use."""
    if options.tokenizer_dir is None:
        tokenizer = byte_tokenizer()
    else:
        tokenizer = load_tokenizer(options.tokenizer_dir, skip_special_tokens=options.skip_special_tokens)
    if options.chat_template and tokenizer.chat is None:
        raise ModelConfigError(
            f"chat_template is 'true', but the tokenizer in {str(options.tokenizer_dir or '')!r} has no chat template"
        )
    return tokenizer


def preprocess(tokenizer: Tokenizer, options: TextOptions, inputs: Tensors) -> Tensors:
    """The engine's tensors for a batch of b texts.

    | input | shape | dtype |
    |---|---|---|
    | QUERY | [b, 1] | UTF-8 |
    | REQUEST_OUTPUT_LEN | [b, 1] | int32 |
    | BAD_WORDS_DICT, STOP_WORDS_DICT (optional) | [b, n] | UTF-8 |
    | EMBEDDING_BIAS_WORDS, EMBEDDING_BIAS_WEIGHTS (optional) | [b, n] | UTF-8, float32 |
    | END_ID, PAD_ID (optional) | [b, 1] | int32 |

    | output | shape | dtype |
    |---|---|---|
    | INPUT_ID | [b, longest] | int32 |
    | REQUEST_INPUT_LEN, REQUEST_OUTPUT_LEN | [b, 1] | int32 |
    | BAD_WORDS_IDS, STOP_WORDS_IDS (if there are words) | [b, 2, len] | int32 |
    | EMBEDDING_BIAS (if there are weights) | [b, vocabulary] | float32 |
    | OUT_END_ID, OUT_PAD_ID (if the request or the tokenizer has them) | [b, 1] | int32 |

    InvalidRequest names every tensor and row that is wrong.
    """
    problems: list[str] = []
    prompts = _prompts(tokenizer, options, inputs["QUERY"], problems)
    words = {
        name: _words(inputs[name], name, problems)
        for name in ("BAD_WORDS_DICT", "STOP_WORDS_DICT", "EMBEDDING_BIAS_WORDS")
        if name in inputs
    }
    weights = inputs.get("EMBEDDING_BIAS_WEIGHTS")
    biased = inputs.get("EMBEDDING_BIAS_WORDS")
    if (weights is None) != (biased is None) or (
        weights is not None and biased is not None and weights.shape != biased.shape
    ):
        problems.append(
            "EMBEDDING_BIAS_WORDS and EMBEDDING_BIAS_WEIGHTS must have one weight for each word, got shapes "
            f"{_shape(biased)} and {_shape(weights)}"
        )
    if problems:
        raise InvalidRequest(one_message("bad request", problems))

    batch = len(prompts)
    end_id = _given_or(inputs.get("END_ID"), tokenizer.end_id, batch)
    pad_id = _given_or(inputs.get("PAD_ID"), tokenizer.pad_id, batch)
    outputs = {
        "INPUT_ID": _padded(prompts, pad_id),
        "REQUEST_INPUT_LEN": np.array([[len(ids)] for ids in prompts], np.int32),
        "REQUEST_OUTPUT_LEN": inputs["REQUEST_OUTPUT_LEN"],
        "BAD_WORDS_IDS": word_lists(tokenizer, words.get("BAD_WORDS_DICT", [])),
        "STOP_WORDS_IDS": word_lists(tokenizer, words.get("STOP_WORDS_DICT", [])),
        "OUT_END_ID": end_id,
        "OUT_PAD_ID": pad_id,
    }
    if weights is not None:
        outputs["EMBEDDING_BIAS"] = _embedding_bias(tokenizer, words["EMBEDDING_BIAS_WORDS"], weights)
    return {name: tensor for name, tensor in outputs.items() if tensor is not None}


def postprocess(
    tokenizer: Tokenizer, inputs: Tensors, streams: TextStreams | None = None, request_id: str = ""
) -> Tensors:
    """OUTPUT [b, beams], UTF-8, from TOKENS_BATCH [b, beams, len] and SEQUENCE_LENGTH [b, beams].

    - With PREVIOUS_TOKENS [b, n], the tokens are the next ones of a stream. A response without tokens ends the stream.
      Negative ids in PREVIOUS_TOKENS are padding.
    - Otherwise the tokens continue the sequence that `streams` remembers for the request id, the row BATCH_INDEX [1, 1]
      and the sequence SEQUENCE_INDEX [1, 1].
    - If `streams` remembers no such sequence, the tokens are a whole response.

    InvalidRequest when a tensor is missing, or when the shapes do not agree.
    """
    rows = _tokens_of(inputs)
    previous = inputs.get("PREVIOUS_TOKENS")
    if previous is not None:
        if inputs["TOKENS_BATCH"].shape[1] != 1:
            raise InvalidRequest(f"bad request: PREVIOUS_TOKENS goes with one beam, got {len(rows[0])}")
        texts = [piece(tokenizer, before, ids) for before, (ids,) in zip(previous.tolist(), rows, strict=True)]
    elif progress := _progress(streams, request_id, inputs, rows):
        sequence, ends = progress
        texts = [piece(tokenizer, sequence.context, rows[0][0], ends=ends)]
        sequence.context = _context(tokenizer, [*sequence.context, *rows[0][0]])
    else:
        texts = [tokenizer.text(ids) for row in rows for ids in row]
    output = np.empty(len(texts), np.object_)
    output[:] = [text.encode() for text in texts]
    return {"OUTPUT": output.reshape(inputs["SEQUENCE_LENGTH"].shape)}


def begin(streams: TextStreams | None, request_id: str, inputs: Tensors) -> tuple[Tensors, bool]:
    """Remember a request in `streams` before the engine gets it.

    Returns the output OUT_REQUEST_OUTPUT_LEN [b, 1], which is the input REQUEST_OUTPUT_LEN, and whether the request id
    is free. An id is not free while the end of another request with the same id was not seen. STREAMING, BEAM_WIDTH and
    NUM_RETURN_SEQUENCES [b, 1] and STOP_WORDS_LIST [b, 2, len] are the engine's inputs, if there are any.
    """
    lengths = inputs["REQUEST_OUTPUT_LEN"]
    given = {name: inputs[name].max() for name in ("STREAMING", "BEAM_WIDTH", "NUM_RETURN_SEQUENCES") if name in inputs}
    is_free = streams is None or streams.begin(
        request_id,
        lengths.reshape(-1).tolist(),
        _stop_words(inputs.get("STOP_WORDS_LIST"), len(lengths)),
        sequence_count=max(1, int(given.get("NUM_RETURN_SEQUENCES", 1))),
        is_streamed=bool(given.get("STREAMING", False)),
        has_beams=given.get("BEAM_WIDTH", 1) > 1,
    )
    return {"OUT_REQUEST_OUTPUT_LEN": lengths}, is_free


def _tokens_of(inputs: Tensors) -> list[list[list[int]]]:
    """The tokens of each row and beam, without their padding."""
    if missing := [name for name in ("TOKENS_BATCH", "SEQUENCE_LENGTH") if name not in inputs]:
        raise InvalidRequest(
            f"bad request: no {' and no '.join(missing)}; lead the engine's output_ids and sequence_length to them"
        )
    tokens, lengths = inputs["TOKENS_BATCH"], inputs["SEQUENCE_LENGTH"]
    width = tokens.shape[2]
    if lengths.shape != tokens.shape[:2]:
        raise InvalidRequest(
            f"bad request: SEQUENCE_LENGTH must have shape {list(tokens.shape[:2])}, got {_shape(lengths)}"
        )
    rows = []
    for row, row_lengths in zip(tokens.tolist(), lengths.tolist(), strict=True):
        beams = []
        for ids, length in zip(row, row_lengths, strict=True):
            if not 0 <= length <= width:
                raise InvalidRequest(f"bad request: SEQUENCE_LENGTH must be from 0 to {width}, got {lengths.tolist()}")
            beams.append(ids if length == width else ids[:length])
        rows.append(beams)
    return rows


def _progress(
    streams: TextStreams | None, request_id: str, inputs: Tensors, rows: Sequence[Sequence[Sequence[int]]]
) -> tuple[SequenceProgress, bool] | None:
    if streams is None or not streams:
        return None
    row, index = (inputs[name].item() if name in inputs else None for name in ("BATCH_INDEX", "SEQUENCE_INDEX"))
    return streams.advance(request_id, rows, row=row, index=index)


def _context(tokenizer: Tokenizer, tokens: Sequence[int]) -> list[int]:
    """The last CONTEXT_TOKENS tokens with text, which are all that `piece` needs."""
    return [token for token in tokens if token in tokenizer.audible][-CONTEXT_TOKENS:]


def piece(tokenizer: Tokenizer, previous: Sequence[int], new: Sequence[int], *, ends: bool = False) -> str:
    """The text that the tokens `new` add to a stream whose last tokens were `previous`.

    If `new` is empty, or with `ends`, the stream ends here. The pieces of a stream, its end included, join to
    `tokenizer.text` of all its tokens, however they were split.
    """
    context = _context(tokenizer, previous)
    text = tokenizer.text([*context, *new])
    if context:
        sent = _without_unfinished(tokenizer.text(context))
        text = text[len(sent) :]
    return text if ends or not new else _without_unfinished(text)


def _without_unfinished(text: str) -> str:
    """`text` without a U+FFFD at its end, which may be an unfinished character."""
    return text.removesuffix(REPLACEMENT)


def word_lists(tokenizer: Tokenizer, words: Sequence[Sequence[str]]) -> npt.NDArray[np.int32] | None:
    """[b, 2, len] int32: for each of b rows the tokens of all its words, and the ends of the words among the tokens.

    Rows are padded to the same length, the tokens with 0 and the ends with -1. Clients fill up shorter rows with empty
    words, which are left out. None if there are no words at all.
    """
    rows = [[ids for word in row if (ids := tokenizer.encode(word, False))] for row in words]
    lengths = [sum(map(len, row)) for row in rows]
    if not any(lengths):
        return None
    lists = np.zeros((len(rows), 2, max(lengths)), np.int32)
    lists[:, 1] = -1
    for into, row in zip(lists, rows, strict=True):
        ends = list(accumulate(map(len, row)))
        into[0, : sum(map(len, row))] = [token for ids in row for token in ids]
        into[1, : len(ends)] = ends
    return lists


def _stop_words(lists: npt.NDArray[np.int32] | None, batch: int) -> Sequence[Words]:
    """The words of each row of `word_lists`."""
    if lists is None:
        return [()] * batch
    found = []
    for tokens, ends in lists.tolist():
        stops = [end for end in ends if end > 0]
        found.append([tuple(tokens[start:end]) for start, end in pairwise([0, *stops]) if start < end])
    return found


def _prompts(
    tokenizer: Tokenizer, options: TextOptions, queries: npt.NDArray[Any], problems: list[str]
) -> list[list[int]]:
    """The tokens of each row's text."""
    prompts = []
    for row, encoded in enumerate(queries[:, 0]):
        where = f"QUERY, row {row}"
        if len(encoded) > options.max_query_bytes:
            problems.append(f"{where}: {len(encoded)} bytes of text, at most {options.max_query_bytes} are accepted")
            continue
        text = _decoded(encoded, where, problems)
        if text is None:
            continue
        if options.chat_template and tokenizer.chat is not None:
            ids = tokenizer.chat(text)
        else:
            ids = tokenizer.encode(text, options.add_special_tokens)
        if not ids:
            problems.append(f"{where}: the text {text!r} has no tokens; send some text")
        prompts.append(ids)
    return prompts


def _words(words: npt.NDArray[Any], name: str, problems: list[str]) -> list[list[str]]:
    """The words of each row, including the empty ones."""
    return [
        [_decoded(encoded, f"{name}, row {index}", problems) or "" for encoded in row]
        for index, row in enumerate(words)
    ]


def _decoded(encoded: bytes, where: str, problems: list[str]) -> str | None:
    try:
        return encoded.decode()
    except UnicodeDecodeError as error:
        problems.append(f"{where}: not UTF-8: {error.reason} at byte {error.start}")
        return None


def _given_or(given: npt.NDArray[Any] | None, default: int | None, batch: int) -> npt.NDArray[Any] | None:
    if given is not None or default is None:
        return given
    return np.full((batch, 1), default, np.int32)


def _padded(prompts: Sequence[Sequence[int]], pad_id: npt.NDArray[Any] | None) -> npt.NDArray[np.int32]:
    """[b, longest] int32: the rows, padded on the right. REQUEST_INPUT_LEN tells the engine to ignore the padding."""
    padded = np.zeros((len(prompts), max(map(len, prompts))), np.int32)
    if pad_id is not None:
        padded[:] = pad_id
    for row, ids in zip(padded, prompts, strict=True):
        row[: len(ids)] = ids
    return padded


def _embedding_bias(
    tokenizer: Tokenizer, words: Sequence[Sequence[str]], weights: npt.NDArray[Any]
) -> npt.NDArray[np.float32]:
    """[b, vocabulary] float32: each token has the sum of the weights of the words that contain the token."""
    bias = np.zeros((len(words), tokenizer.vocab_size), np.float32)
    for row, row_words, row_weights in zip(bias, words, weights, strict=True):
        for word, weight in zip(row_words, row_weights, strict=True):
            row[tokenizer.encode(word, False)] += weight
    return bias


def _shape(tensor: npt.NDArray[Any] | None) -> str:
    return "none" if tensor is None else str(list(tensor.shape))
