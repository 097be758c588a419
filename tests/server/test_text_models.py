# SPDX-FileCopyrightText: the tritonlora authors
# SPDX-License-Identifier: Apache-2.0
"""preprocessing and postprocessing, each by itself on a real tritonserver."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
import pytest
import tritonclient.grpc
import tritonclient.http
from tritonclient.utils import InferenceServerException, np_to_triton_dtype

from text_tokenizer import ALPHABET, END, MODEL, USER, copy_model, save_tokenizer
from tritonlora.launch.server import Server


@pytest.fixture(scope="module")
def server(launch: Callable[..., Server], tmp_path_factory: pytest.TempPathFactory) -> Server:
    """The models as they ship, and once more as `chat_…` with a tokenizer from a directory."""
    repository = tmp_path_factory.mktemp("repository")
    tokenizer_dir = tmp_path_factory.mktemp("tokenizer")
    save_tokenizer(tokenizer_dir)
    for name in ("preprocessing", "postprocessing"):
        copy_model(name, repository, name)
    copy_model(
        "preprocessing", repository, "chat_preprocessing", tokenizer_dir=str(tokenizer_dir), chat_template="true"
    )
    copy_model("postprocessing", repository, "chat_postprocessing", tokenizer_dir=str(tokenizer_dir))
    return launch(repository)


@pytest.fixture(params=["grpc", "http"])
def infer(request: pytest.FixtureRequest, server: Server) -> Callable[..., dict[str, Any]]:
    """`infer(model, **inputs)`: the outputs as lists, over either protocol."""
    return lambda model, **inputs: answer(server, model, inputs, protocol=request.param)


def answer(server: Server, model: str, inputs: dict[str, Any], *, protocol: str = "grpc") -> dict[str, Any]:
    """Ask a model; its outputs as nested lists. A list of bytes is a STRING tensor, of floats FP32, of ints INT32."""
    module: Any = {"grpc": tritonclient.grpc, "http": tritonclient.http}[protocol]
    tensors = []
    for name, values in inputs.items():
        array = values if isinstance(values, np.ndarray) else np.array(values)
        array = array.astype({"i": np.int32, "f": np.float32}.get(array.dtype.kind, np.object_))
        tensors.append(module.InferInput(name, list(array.shape), np_to_triton_dtype(array.dtype)))
        tensors[-1].set_data_from_numpy(array)
    with module.InferenceServerClient(server.grpc_url if protocol == "grpc" else server.http_url) as client:
        result = client.infer(model, tensors)
    response = result.get_response()
    names = [
        output["name"] if protocol == "http" else output.name
        for output in getattr(response, "outputs", None) or response["outputs"]
    ]
    return {name: result.as_numpy(name).tolist() for name in names}


def test_preprocessing_encodes_text_and_words(infer: Callable[..., dict[str, Any]]) -> None:
    """As shipped a token is a byte; outputs there is nothing to say about are absent."""
    outputs = infer("preprocessing", QUERY=[["hé"]], REQUEST_OUTPUT_LEN=[[5]], STOP_WORDS_DICT=[["\n", "st"]])

    assert {
        "INPUT_ID": [[104, 195, 169]],
        "REQUEST_INPUT_LEN": [[3]],
        "REQUEST_OUTPUT_LEN": [[5]],
        "STOP_WORDS_IDS": [[[10, 115, 116], [1, 3, -1]]],
        "OUT_END_ID": [[256]],
        "OUT_PAD_ID": [[256]],
    } == outputs


def test_preprocessing_encodes_a_batch(infer: Callable[..., dict[str, Any]]) -> None:
    """Shorter rows are padded, with the client's pad_id."""
    outputs = infer("preprocessing", QUERY=[["abc"], ["d"]], REQUEST_OUTPUT_LEN=[[5], [6]], PAD_ID=[[7], [8]])

    assert ([[97, 98, 99], [100, 8, 8]], [[3], [1]]) == (outputs["INPUT_ID"], outputs["REQUEST_INPUT_LEN"])


@pytest.mark.parametrize(
    ("query", "message"),
    [
        pytest.param(b"ab\xff", "QUERY, row 0: not UTF-8: invalid start byte at byte 2", id="utf-8"),
        pytest.param(b"", "QUERY, row 0: the text '' has no tokens; send some text", id="empty"),
        pytest.param(b"x" * 5_000_000, "QUERY, row 0: 5000000 bytes of text, at most 4194304 are accepted", id="huge"),
    ],
)
def test_preprocessing_names_what_is_wrong(server: Server, query: bytes, message: str) -> None:
    """INVALID_ARG with the reason and nothing else: no traceback."""
    with pytest.raises(InferenceServerException) as caught:
        answer(server, "preprocessing", {"QUERY": np.array([[query]], np.object_), "REQUEST_OUTPUT_LEN": [[1]]})

    assert ("StatusCode.INVALID_ARGUMENT", f"bad request: {message}") == (caught.value.status(), caught.value.message())


def test_preprocessing_applies_the_chat_template(infer: Callable[..., dict[str, Any]]) -> None:
    """The tokenizer comes from tokenizer_dir, and so does its end."""
    outputs = infer("chat_preprocessing", QUERY=[["hi"]], REQUEST_OUTPUT_LEN=[[5]])

    assert [[USER, ALPHABET.index("h"), ALPHABET.index("i"), MODEL]] == outputs["INPUT_ID"]
    assert [[END]] == outputs["OUT_END_ID"]


def test_postprocessing_decodes_every_beam(infer: Callable[..., dict[str, Any]]) -> None:
    """A whole answer: up to SEQUENCE_LENGTH, what follows is padding."""
    outputs = infer("postprocessing", TOKENS_BATCH=[[[*b"abc"], [*b"d", -1, -1]]], SEQUENCE_LENGTH=[[3, 1]])

    assert {"OUTPUT": [[b"abc", b"d"]]} == outputs


def test_postprocessing_skips_special_tokens(infer: Callable[..., dict[str, Any]]) -> None:
    """The end of an answer has no text."""
    tokens = [*(ALPHABET.index(letter) for letter in "hi"), MODEL]

    outputs = infer("chat_postprocessing", TOKENS_BATCH=[[tokens]], SEQUENCE_LENGTH=[[3]])

    assert {"OUTPUT": [[b"hi"]]} == outputs


def stream_of(server: Server, chunks: Sequence[Sequence[int]]) -> str:
    """What postprocessing makes of a stream, each response with all tokens before it, as the router sends them."""
    pieces = b""
    sent: list[int] = []
    for chunk in [*chunks, []]:
        inputs = {
            "TOKENS_BATCH": np.array([[chunk]], np.int32),
            "SEQUENCE_LENGTH": [[len(chunk)]],
            "PREVIOUS_TOKENS": np.array([sent], np.int32),
        }
        pieces += answer(server, "postprocessing", inputs)["OUTPUT"][0][0]
        sent += chunk
    return pieces.decode()


def test_postprocessing_streams_characters_whole(server: Server) -> None:
    """Bytes one by one, an unfinished character at the end: tensors of length 0 at the start and at the end pass."""
    assert "é👋\ufffd" == stream_of(server, [[byte] for byte in [*"é👋".encode(), 0xE2, 0x82]])


def test_streams_side_by_side_do_not_mix(server: Server) -> None:
    """Requests of different lengths may share a batch inside the server."""
    texts = [f"{'日本語' * length} №{length}" for length in range(1, 9)]
    cut = [[[*text.encode()][start : start + 2] for start in range(0, len(text.encode()), 2)] for text in texts]

    with ThreadPoolExecutor(len(texts)) as pool:
        assert texts == list(pool.map(lambda chunks: stream_of(server, chunks), cut))


def test_postprocessing_names_what_is_wrong(server: Server) -> None:
    """INVALID_ARG, and the next request is answered."""
    with pytest.raises(
        InferenceServerException,
        match=r"^\[StatusCode.INVALID_ARGUMENT\] bad request: SEQUENCE_LENGTH must be from 0 to 1, got \[\[2\]\]$",
    ):
        answer(server, "postprocessing", {"TOKENS_BATCH": [[[97]]], "SEQUENCE_LENGTH": [[2]]})

    assert {"OUTPUT": [[b"a"]]} == answer(
        server, "postprocessing", {"TOKENS_BATCH": [[[97]]], "SEQUENCE_LENGTH": [[1]]}
    )
