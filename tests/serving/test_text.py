# SPDX-FileCopyrightText: the tritonlora authors
# SPDX-License-Identifier: Apache-2.0
# ruff: noqa: S106  the tokens here are no passwords
"""Text to tensors and tokens to text; above all: the pieces of a stream join to the text of the whole answer."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from tokenizers import AddedToken, decoders, models, pre_tokenizers, trainers
from tokenizers import Tokenizer as HuggingFaceTokenizer
from transformers import PreTrainedTokenizerFast as TypelessTokenizerFast

from tritonlora.errors import InvalidRequest, ModelConfigError
from tritonlora.serving.text import (
    CONTEXT_TOKENS,
    TextOptions,
    open_tokenizer,
    parse_options,
    piece,
    postprocess,
    preprocess,
    word_lists,
)
from tritonlora.serving.tokenizer import Tokenizer, byte_tokenizer, from_transformers, load_tokenizer

PreTrainedTokenizerFast: Any = TypelessTokenizerFast  # its constructor is not typed

CORPUS = (
    "Hello, world! The quick brown fox; 1,234.50 € and no more .\n\n  Indented   text\twith tabs. ",
    "Grüße aus Köln 👋🏽, 👩‍👩‍👧‍👦 und 🏴‍☠️! naïve e\u0301 n\u0303 ﷽ \ufffd",
    "日本語のテキスト、中文文本。한국어 텍스트 မြန်မာ བོད་ཡིག",
)
OPTIONS = TextOptions()


# Tokenizers


def wrapped(tokenizer: HuggingFaceTokenizer, **options: Any) -> Tokenizer:
    """`tokenizer` as transformers would load it, with <s> and </s>."""
    tokenizer.add_special_tokens([AddedToken(token, special=True) for token in ("<s>", "</s>")])
    tokenizer.add_tokens([AddedToken("<plain>")])
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>")
    return from_transformers(fast, **options)


@cache
def byte_level(**options: Any) -> Tokenizer:
    """A byte-level BPE like that of GPT-2, Llama 3 and Qwen."""
    tokenizer = HuggingFaceTokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=400, initial_alphabet=alphabet, show_progress=False)
    tokenizer.train_from_iterator(CORPUS, trainer)
    return wrapped(tokenizer, **options)


def sentencepiece_vocabulary() -> list[str]:
    byte_tokens = [f"<0x{byte:02X}>" for byte in range(256)]
    pieces = [
        "▁",
        "▁▁",
        "▁Hello",
        "Hello",
        ",",
        "▁world",
        "!",
        ".",
        "▁.",
        "ü",
        "▁Gr",
        "ße",
        "日",
        "本",
        "\ufffd",
        "e",
        "\u0301",
    ]
    return ["<unk>", *byte_tokens, *pieces]


@cache
def llama_2() -> Tokenizer:
    """Byte fallback, and one leading space dropped: the decoder of Llama 2 and Mistral."""
    vocabulary = {token: index for index, token in enumerate(sentencepiece_vocabulary())}
    tokenizer = HuggingFaceTokenizer(models.BPE(vocabulary, [], unk_token="<unk>", byte_fallback=True))
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(split=False)
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    return wrapped(tokenizer)


@cache
def metaspace() -> Tokenizer:
    """Byte fallback, and all leading spaces of the first token dropped: the decoder of newer conversions."""
    vocabulary = {token: index for index, token in enumerate(sentencepiece_vocabulary())}
    tokenizer = HuggingFaceTokenizer(models.BPE(vocabulary, [], unk_token="<unk>", byte_fallback=True))
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(split=False)
    tokenizer.decoder = decoders.Sequence([decoders.ByteFallback(), decoders.Metaspace(prepend_scheme="always")])
    return wrapped(tokenizer)


@cache
def word_pieces() -> Tokenizer:
    """Words that end in </w>: the last one loses its space, until there is a next one."""
    tokens = ["hello</w>", "wor", "ld</w>", "é</w>", "日", "</w>", "<unk>"]
    tokenizer = HuggingFaceTokenizer(models.BPE({token: i for i, token in enumerate(tokens)}, [], unk_token="<unk>"))
    tokenizer.decoder = decoders.BPEDecoder("</w>")
    return wrapped(tokenizer)


TOKENIZERS: dict[str, Callable[[], Tokenizer]] = {
    "bytes": byte_tokenizer,
    "byte_level": byte_level,
    "byte_level_specials_shown": lambda: byte_level(skip_special_tokens=False),
    "llama_2": llama_2,
    "metaspace": metaspace,
    "word_pieces": word_pieces,
}
every_tokenizer = pytest.mark.parametrize("name", TOKENIZERS)


def streamed(tokenizer: Tokenizer, chunks: Sequence[Sequence[int]], window: int | None) -> list[str]:
    """The pieces of a stream when each response comes with the last `window` tokens before it (None: all of them)."""
    pieces = []
    sent: list[int] = []
    for chunk in [*chunks, []]:
        pieces.append(piece(tokenizer, sent if window is None else sent[len(sent) - min(window, len(sent)) :], chunk))
        sent += chunk
    return pieces


@st.composite
def cut_up(draw: st.DrawFn, tokenizer: Tokenizer) -> list[list[int]]:
    """The tokens of a stream, response by response: real text, its bytes in pieces, and plain noise."""
    text = st.text(st.sampled_from(sorted(set("".join(CORPUS)))), max_size=8)
    known = st.integers(0, tokenizer.vocab_size - 1).filter(lambda token: token in tokenizer.audible)
    part = st.one_of(text.map(lambda text: tokenizer.encode(text, False)), st.lists(known, max_size=6))
    ids = [token for ids in draw(st.lists(part, max_size=6)) for token in ids]
    chunks: list[list[int]] = []
    while ids:
        size = draw(st.integers(1, 4))
        chunks.append(ids[:size])
        ids = ids[size:]
    return chunks


# Streaming


@every_tokenizer
@settings(max_examples=100, deadline=None)
@given(data=st.data(), window=st.sampled_from([None, CONTEXT_TOKENS, CONTEXT_TOKENS + 1, 32]))
def test_pieces_join_to_the_text_of_the_whole_answer(name: str, data: st.DataObject, window: int | None) -> None:
    """However the tokens are cut into responses, and however many previous tokens come along."""
    tokenizer = TOKENIZERS[name]()
    chunks = data.draw(cut_up(tokenizer))

    pieces = streamed(tokenizer, chunks, window)

    assert tokenizer.text([token for chunk in chunks for token in chunk]) == "".join(pieces)


@every_tokenizer
@settings(max_examples=50, deadline=None)
@given(data=st.data())
def test_pieces_join_when_tokens_without_text_are_among_them(name: str, data: st.DataObject) -> None:
    """Special, unknown and negative ids, anywhere and in any number, as long as all previous tokens are sent."""
    tokenizer = TOKENIZERS[name]()
    silent = st.lists(st.sampled_from([-1, tokenizer.vocab_size + 7, tokenizer.end_id or 0]), max_size=6)
    chunks = [[*chunk, *data.draw(silent)] for chunk in data.draw(cut_up(tokenizer))]

    pieces = streamed(tokenizer, chunks, None)

    assert tokenizer.text([token for chunk in chunks for token in chunk]) == "".join(pieces)


@settings(max_examples=300, deadline=None)
@given(ids=st.lists(st.integers(0, 255), max_size=40), window=st.sampled_from([None, CONTEXT_TOKENS, 7]))
@example(ids=list("👩‍👩‍👧‍👦".encode()), window=CONTEXT_TOKENS)
@example(ids=list(b"\x98\x80\x80\x80\x80"), window=CONTEXT_TOKENS)
@example(ids=list(b"\xf0\x9f\x98"), window=CONTEXT_TOKENS)
def test_bytes_one_by_one_stream_what_python_decodes(ids: list[int], window: int | None) -> None:
    """Python's own UTF-8 decoder is the oracle, over any bytes at all."""
    pieces = streamed(byte_tokenizer(), [[token] for token in ids], window)

    assert bytes(ids).decode("utf-8", "replace") == "".join(pieces)


def test_fewer_previous_tokens_than_the_context_are_not_enough() -> None:
    """With three previous bytes a character of four cannot be told from malformed ones: CONTEXT_TOKENS is minimal."""
    chunks = [[byte] for byte in "👋!".encode()]

    assert "👋!" != "".join(streamed(byte_tokenizer(), chunks, CONTEXT_TOKENS - 1))


def test_character_is_sent_with_its_last_byte() -> None:
    """An unfinished character is held back, and nothing else is."""
    pieces = streamed(byte_tokenizer(), [[byte] for byte in "a€b".encode()], 32)

    assert ["a", "", "", "€", "b", ""] == pieces


def test_replacement_character_of_the_model_is_sent_with_the_next_token() -> None:
    """U+FFFD as the model's own token looks like an unfinished character, so it waits, and is not lost."""
    tokenizer = llama_2()
    unknown, bang = tokenizer.encode("\ufffd", False)[-1], tokenizer.encode("!", False)[-1]

    assert ["", "\ufffd!", "", "\ufffd"] == streamed(tokenizer, [[unknown], [bang], [unknown]], 32)


def test_end_of_a_stream_sends_what_was_held_back() -> None:
    """An answer cut in the middle of a character ends in U+FFFD, as the whole answer does."""
    assert ["ok", "", "\ufffd"] == streamed(byte_tokenizer(), [list(b"ok"), [0xE2, 0x82]], 32)


def test_leading_space_is_dropped_at_the_start_only() -> None:
    """Llama 2 writes words with the space before them; the first of a text loses it, those that follow do not."""
    tokenizer = llama_2()
    ids = {token: index for index, token in enumerate(sentencepiece_vocabulary())}

    assert ["Hello", " world", " Hello", ""] == streamed(
        tokenizer, [[ids["▁Hello"]], [ids["▁world"]], [ids["▁Hello"]]], CONTEXT_TOKENS
    )


def test_malformed_byte_leaves_the_characters_around_it_alone() -> None:
    """Hugging Face's byte fallback would turn the whole run into U+FFFD, what was streamed included."""
    tokenizer = llama_2()
    byte_ids = [1 + byte for byte in [*"€".encode(), 0xFF, *"ü".encode()]]

    assert "€\ufffdü" == tokenizer.text(byte_ids)


def test_text_of_a_well_formed_run_is_hugging_faces() -> None:
    """Mending touches malformed runs only."""
    tokenizer = llama_2()

    assert "Hello 日本 မြန် Hello" == tokenizer.text(tokenizer.encode("Hello 日本 မြန် Hello", False))


def test_space_before_a_full_stop_stays() -> None:
    """Clean-up of spaces would take back a space that was already sent."""
    tokenizer = byte_level()

    assert "no more ." == tokenizer.text(tokenizer.encode("no more .", False))


# Postprocessing


def test_postprocess_decodes_each_beam_up_to_its_length() -> None:
    """Tokens beyond SEQUENCE_LENGTH are padding."""
    tokens = np.array([[[*b"abc", -1], [*b"de", 9, 9]]], np.int32)

    output = postprocess(byte_tokenizer(), {"TOKENS_BATCH": tokens, "SEQUENCE_LENGTH": np.array([[3, 2]], np.int32)})

    assert [[b"abc", b"de"]] == output["OUTPUT"].tolist()


@every_tokenizer
@settings(max_examples=50, deadline=None)
@given(data=st.data())
def test_postprocess_of_a_batch_is_that_of_each_row_and_beam(name: str, data: st.DataObject) -> None:
    """The path of one row, one beam and few tokens is the path of all: each text is the tokenizer's own."""
    tokenizer = TOKENIZERS[name]()
    batch, beams, width = (data.draw(st.integers(1, 3)) for _ in range(3))
    ids = st.integers(-1, tokenizer.vocab_size)
    shape = (batch, beams)
    tokens = np.array([data.draw(ids) for _ in range(batch * beams * width)], np.int32).reshape(*shape, width)
    lengths = np.array([data.draw(st.integers(0, width)) for _ in range(batch * beams)], np.int32).reshape(shape)

    output = postprocess(tokenizer, {"TOKENS_BATCH": tokens, "SEQUENCE_LENGTH": lengths})["OUTPUT"]

    assert shape == output.shape
    for place in np.ndindex(shape):
        assert tokenizer.text(tokens[place][: lengths[place]].tolist()).encode() == output[place]


def test_postprocess_streams_each_row_of_a_batch() -> None:
    """Previous tokens are padded with negative ids where rows have a different past."""
    inputs = {
        "TOKENS_BATCH": np.array([[[0x82, 0xAC]], [[*b"ok"]]], np.int32),
        "SEQUENCE_LENGTH": np.array([[2], [2]], np.int32),
        "PREVIOUS_TOKENS": np.array([[0xE2], [-1]], np.int32),
    }

    assert [["€".encode()], [b"ok"]] == postprocess(byte_tokenizer(), inputs)["OUTPUT"].tolist()


def test_postprocess_ends_a_stream_when_no_tokens_come() -> None:
    """The router's last response has output_ids of length 0."""
    inputs = {
        "TOKENS_BATCH": np.zeros((1, 1, 0), np.int32),
        "SEQUENCE_LENGTH": np.zeros((1, 1), np.int32),
        "PREVIOUS_TOKENS": np.array([[0xE2, 0x82]], np.int32),
    }

    assert [["\ufffd".encode()]] == postprocess(byte_tokenizer(), inputs)["OUTPUT"].tolist()


@pytest.mark.parametrize(
    ("lengths", "previous", "message"),
    [
        pytest.param([[1]], None, r"SEQUENCE_LENGTH must have shape \[1, 2\], got \[1, 1\]", id="shape"),
        pytest.param([[1, 4]], None, r"SEQUENCE_LENGTH must be from 0 to 3, got \[\[1, 4\]\]", id="too long"),
        pytest.param([[1, -1]], None, r"SEQUENCE_LENGTH must be from 0 to 3, got \[\[1, -1\]\]", id="negative"),
        pytest.param([[1, 1]], [[1]], r"PREVIOUS_TOKENS goes with one beam, got 2", id="beams"),
    ],
)
def test_postprocess_refuses_tensors_that_disagree(lengths: Any, previous: Any, message: str) -> None:
    """Each contradiction is named."""
    inputs = {"TOKENS_BATCH": np.zeros((1, 2, 3), np.int32), "SEQUENCE_LENGTH": np.array(lengths, np.int32)}
    if previous is not None:
        inputs["PREVIOUS_TOKENS"] = np.array(previous, np.int32)

    with pytest.raises(InvalidRequest, match=message):
        postprocess(byte_tokenizer(), inputs)


# Preprocessing


def query(*texts: str | bytes) -> dict[str, Any]:
    """The required inputs for these texts."""
    encoded = [[text.encode() if isinstance(text, str) else text] for text in texts]
    return {
        "QUERY": np.array(encoded, np.object_),
        "REQUEST_OUTPUT_LEN": np.full((len(texts), 1), 16, np.int32),
    }


def test_preprocess_gives_tokens_lengths_and_end() -> None:
    """Shorter rows are padded; nothing is said about words that were not given."""
    outputs = preprocess(byte_tokenizer(), OPTIONS, query("abc", "ü"))

    assert {
        "INPUT_ID": [[97, 98, 99], [195, 188, 256]],
        "REQUEST_INPUT_LEN": [[3], [2]],
        "REQUEST_OUTPUT_LEN": [[16], [16]],
        "OUT_END_ID": [[256], [256]],
        "OUT_PAD_ID": [[256], [256]],
    } == {name: tensor.tolist() for name, tensor in outputs.items()}
    assert {np.dtype(np.int32)} == {tensor.dtype for tensor in outputs.values()}


def test_preprocess_keeps_the_ids_that_the_client_gives() -> None:
    """END_ID and PAD_ID win over the tokenizer's."""
    ids = {"END_ID": np.array([[7]], np.int32), "PAD_ID": np.array([[8]], np.int32)}

    outputs = preprocess(byte_tokenizer(), OPTIONS, {**query("a"), **ids})

    assert ([[7]], [[8]]) == (outputs["OUT_END_ID"].tolist(), outputs["OUT_PAD_ID"].tolist())


def test_preprocess_leaves_out_ids_that_nobody_knows() -> None:
    """A tokenizer without an end leaves the end to the engine."""
    outputs = preprocess(
        from_transformers(
            PreTrainedTokenizerFast(tokenizer_object=HuggingFaceTokenizer(models.WordLevel({"a": 5}, "a")))
        ),
        OPTIONS,
        query("a"),
    )

    assert ["INPUT_ID", "REQUEST_INPUT_LEN", "REQUEST_OUTPUT_LEN"] == list(outputs)
    assert [[5]] == outputs["INPUT_ID"].tolist()


def test_word_lists_hold_all_tokens_and_where_each_word_ends() -> None:
    """Rows are padded to the longest, tokens with 0 and ends with -1 (TensorRT-LLM's stop_words_list)."""
    lists = word_lists(byte_tokenizer(), [["ab", "", "c"], ["d"]])

    assert lists is not None
    assert [[[97, 98, 99], [2, 3, -1]], [[100, 0, 0], [1, -1, -1]]] == lists.tolist()


def test_word_lists_of_no_words_are_left_out() -> None:
    """Empty strings are what clients send for no words."""
    assert word_lists(byte_tokenizer(), [[""], [""]]) is None


def test_preprocess_encodes_stop_and_bad_words() -> None:
    """Each list goes to its own tensor."""
    words = {
        "STOP_WORDS_DICT": np.array([[b"\n", b"st"]], np.object_),
        "BAD_WORDS_DICT": np.array([[b"x"]], np.object_),
    }

    outputs = preprocess(byte_tokenizer(), OPTIONS, {**query("a"), **words})

    assert [[[10, 115, 116], [1, 3, -1]]] == outputs["STOP_WORDS_IDS"].tolist()
    assert [[[120], [1]]] == outputs["BAD_WORDS_IDS"].tolist()


def test_preprocess_adds_up_embedding_bias() -> None:
    """A word's weight goes to each of its tokens, once; empty words take none."""
    words = {
        "EMBEDDING_BIAS_WORDS": np.array([[b"aab", b"", b"b"]], np.object_),
        "EMBEDDING_BIAS_WEIGHTS": np.array([[1.0, 9.0, -3.0]], np.float32),
    }

    bias = preprocess(byte_tokenizer(), OPTIONS, {**query("a"), **words})["EMBEDDING_BIAS"]

    assert (1, 257) == bias.shape
    assert {97: 1.0, 98: -2.0} == {int(token): float(bias[0, token]) for token in bias[0].nonzero()[0]}


@pytest.mark.parametrize(
    ("inputs", "message"),
    [
        pytest.param(query(b"ab\xff"), "QUERY, row 0: not UTF-8: invalid start byte at byte 2", id="utf-8"),
        pytest.param(query("ok", ""), "QUERY, row 1: the text '' has no tokens; send some text", id="empty"),
        pytest.param(query("x" * 101), "QUERY, row 0: 101 bytes of text, at most 100 are accepted", id="huge"),
        pytest.param(
            {**query("a"), "STOP_WORDS_DICT": np.array([[b"a", b"\x80"]], np.object_)},
            "STOP_WORDS_DICT, row 0: not UTF-8: invalid start byte at byte 0",
            id="stop words",
        ),
        pytest.param(
            {**query("a"), "EMBEDDING_BIAS_WORDS": np.array([[b"a", b"b"]], np.object_)},
            r"one weight for each word, got shapes \[1, 2\] and none",
            id="no weights",
        ),
        pytest.param(
            {**query("a"), "EMBEDDING_BIAS_WEIGHTS": np.array([[1.0]], np.float32)},
            r"one weight for each word, got shapes none and \[1, 1\]",
            id="no words",
        ),
        pytest.param(
            {
                **query("a"),
                "EMBEDDING_BIAS_WORDS": np.array([[b"a", b"b"]], np.object_),
                "EMBEDDING_BIAS_WEIGHTS": np.array([[1.0]], np.float32),
            },
            r"one weight for each word, got shapes \[1, 2\] and \[1, 1\]",
            id="fewer weights",
        ),
    ],
)
def test_preprocess_refuses_what_it_cannot_encode(inputs: dict[str, Any], message: str) -> None:
    """Each is named by tensor and row."""
    with pytest.raises(InvalidRequest, match=message):
        preprocess(byte_tokenizer(), TextOptions(max_query_bytes=100), inputs)


def test_preprocess_names_all_bad_rows_at_once() -> None:
    """One answer, a line each."""
    with pytest.raises(InvalidRequest, match=r"(?s)bad request:\n  QUERY, row 0: .*\n  QUERY, row 2: "):
        preprocess(byte_tokenizer(), OPTIONS, query("", "fine", b"\xc3"))


# Tokenizers from a directory


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A directory with a byte-level tokenizer that has a chat template and puts <s> first."""
    directory = tmp_path_factory.mktemp("tokenizer")
    tokenizer = HuggingFaceTokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.train_from_iterator(
        CORPUS,
        trainers.BpeTrainer(
            vocab_size=300,
            initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
            show_progress=False,
            special_tokens=["<s>", "</s>", "<user>", "<model>"],
        ),
    )
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>")
    fast.chat_template = (
        "{% for m in messages %}<{{ m.role }}>{{ m.content }}</s>{% endfor %}"
        "{% if add_generation_prompt %}<model>{% endif %}"
    )
    fast.save_pretrained(directory)
    return directory


def test_load_tokenizer_round_trips_text(saved: Path) -> None:
    """What was saved is what is loaded."""
    tokenizer = load_tokenizer(saved)

    assert CORPUS[1] == tokenizer.text(tokenizer.encode(CORPUS[1], True))
    assert (1, 1) == (tokenizer.end_id, tokenizer.pad_id)


def test_chat_template_wraps_the_query(saved: Path) -> None:
    """QUERY becomes one user message, up to where the model's answer starts."""
    options = TextOptions(tokenizer_dir=saved, chat_template=True, skip_special_tokens=False)
    tokenizer = open_tokenizer(options)

    ids = preprocess(tokenizer, options, query("Hi!"))["INPUT_ID"][0].tolist()

    assert "<user>Hi!</s><model>" == tokenizer.text(ids)


def test_special_tokens_are_skipped_unless_shown(saved: Path) -> None:
    """skip_special_tokens decides what </s> looks like in the answer."""
    shown = [load_tokenizer(saved, skip_special_tokens=skip).text([1]) for skip in (True, False)]

    assert ["", "</s>"] == shown


def test_tokenizer_directory_that_is_none_is_refused(tmp_path: Path) -> None:
    """A missing directory is not looked up anywhere else."""
    with pytest.raises(ModelConfigError, match=r"tokenizer_dir '.*/none' is not a directory"):
        load_tokenizer(tmp_path / "none")


def test_directory_without_a_tokenizer_is_refused(tmp_path: Path) -> None:
    """The directory is named, with what transformers says about it."""
    with pytest.raises(ModelConfigError, match=r"tokenizer_dir '.*' holds no usable tokenizer: "):
        load_tokenizer(tmp_path)


def test_chat_template_without_one_is_refused() -> None:
    """The byte tokenizer cannot chat: said when the model loads, not at each request."""
    with pytest.raises(ModelConfigError, match="chat_template is 'true', but the tokenizer in '' has no chat template"):
        open_tokenizer(TextOptions(chat_template=True))


# Parameters


def test_parse_options_reads_upstreams_spellings() -> None:
    """Booleans in any of upstream's spellings; what is empty or another model's is left alone."""
    options = parse_options(
        {
            "tokenizer_dir": "/models/t",
            "add_special_tokens": "False",
            "skip_special_tokens": "y",
            "max_num_images": "1",
            "chat_template": "",
            "max_query_bytes": "10",
        }
    )

    assert TextOptions(Path("/models/t"), add_special_tokens=False, max_query_bytes=10) == options


def test_parse_options_of_nothing_are_the_defaults() -> None:
    """The shipped models load without a tokenizer."""
    assert TextOptions() == parse_options({"tokenizer_dir": ""})


def test_parse_options_names_every_bad_parameter() -> None:
    """One message for all of them."""
    bad = {"tokenizer_dir": "${tokenizer_dir}", "chat_template": "maybe", "max_query_bytes": "0"}

    with pytest.raises(ModelConfigError) as caught:
        parse_options(bad)

    assert [
        "bad parameters:",
        "  tokenizer_dir still holds the template's '${tokenizer_dir}'; fill it in, or leave it empty",
        "  chat_template must be 'true' or 'false', got 'maybe'",
        "  max_query_bytes must be a number of bytes above 0, got '0'",
    ] == str(caught.value).splitlines()
