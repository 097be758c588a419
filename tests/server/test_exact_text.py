# SPDX-FileCopyrightText: the tritonlora authors
# SPDX-License-Identifier: Apache-2.0
"""Streamed text past the router, where an ensemble announces each request to postprocessing before the engine gets it.

Beside the shipped byte tokenizer there is an ensemble with a Hugging Face tokenizer, and the oracle is the tokenizers
library's own decoding of all tokens at once. The synthetic engine repeats the prompt after a tag.
"""

from __future__ import annotations

import http.client
import json
import queue
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tritonclient.grpc as grpc
from tokenizers import Tokenizer

from repositories import put_many_outputs_engine, resolving
from text_tokenizer import copy_model, save_tokenizer
from tritonlora.launch import client
from tritonlora.launch.server import Server
from tritonlora.repository import upkeep
from tritonlora.repository.paths import Repository

PROMPT = "é日🎉ü"
LOG: list[str] = []


@pytest.fixture(scope="module")
def tokenizer_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A Hugging Face tokenizer."""
    directory = tmp_path_factory.mktemp("tokenizer")
    save_tokenizer(directory)
    return directory


@pytest.fixture(scope="module")
def server(launch: Callable[..., Server], tmp_path_factory: pytest.TempPathFactory, tokenizer_dir: Path) -> Server:
    """`ensemble` with bytes, `chat_ensemble` with a Hugging Face tokenizer, `two_ensemble` with two instances."""
    opened = resolving(tmp_path_factory.mktemp("exact") / "repo", ("pirate",), (), pages=100)
    upkeep.set_parameters(opened, {"synthetic_token_seconds": "0.005"})
    for name in ("preprocessing", "postprocessing"):
        copy_model(name, opened.root, f"chat_{name}", tokenizer_dir=str(tokenizer_dir))
        copy_model(name, opened.root, f"two_{name}")
    config = opened.root / "two_postprocessing" / "config.pbtxt"
    config.write_text(config.read_text(encoding="utf-8").replace("count: 1", "count: 2"), encoding="utf-8")
    for copy in ("chat", "two"):
        copy_ensemble(opened, copy)
    return launch(opened.root, on_log=LOG.append)


@pytest.fixture(scope="module")
def many_outputs(launch: Callable[..., Server], tmp_path_factory: pytest.TempPathFactory) -> Server:
    """An engine that gives several sequences and beams."""
    opened = resolving(tmp_path_factory.mktemp("many") / "repo", ("pirate",), (), pages=100)
    put_many_outputs_engine(opened)
    return launch(opened.root)


def copy_ensemble(opened: Repository, prefix: str) -> None:
    """The ensemble once more, with the text models of that prefix."""
    text = (opened.root / "ensemble" / "config.pbtxt").read_text(encoding="utf-8")
    for name in ("preprocessing", "postprocessing"):
        text = text.replace(f'"{name}"', f'"{prefix}_{name}"')
    copy = opened.root / f"{prefix}_ensemble"
    (copy / "1").mkdir(parents=True)
    (copy / "config.pbtxt").write_text(text.replace('name: "ensemble"', f'name: "{copy.name}"', 1), encoding="utf-8")


def pieces(
    server: Server, tokens: int, request_id: str | None = None, model: str = "ensemble", **inputs: Any
) -> Iterator[str]:
    """The pieces of a streamed response over HTTP, one for each token."""
    body: dict[str, Any] = {"text_input": PROMPT, "max_tokens": tokens, "stream": True, "lora_name": "pirate", **inputs}
    if request_id is not None:
        body["id"] = request_id
    connection = http.client.HTTPConnection(server.http_url, timeout=60)
    try:
        connection.request("POST", f"/v2/models/{model}/generate_stream", json.dumps(body))
        for line in connection.getresponse():
            if line.startswith(b"data:"):
                event = json.loads(line[len(b"data:") :])
                yield event.get("text_output", event.get("error"))
    finally:
        connection.close()


def expected(tokens: int) -> str:
    """What Python decodes of the engine's bytes."""
    return (f"[1]{PROMPT}".encode() * tokens)[:tokens].decode(errors="replace")


@pytest.mark.parametrize("tokens", range(1, 20))
def test_pieces_join_to_the_unstreamed_text(server: Server, tokens: int) -> None:
    """With an id, wherever max_tokens cuts a character: its U+FFFD comes with the last piece."""
    streamed = list(pieces(server, tokens, f"one-{tokens}"))

    assert (tokens, expected(tokens)) == (len(streamed), "".join(streamed))
    assert [expected(tokens)] == list(pieces(server, tokens, stream=False, exclude_input_in_output=True))


def test_our_own_client_sends_an_id(server: Server) -> None:
    """One of its own with each request."""
    texts = ["".join(client.generate(PROMPT, lora_name="pirate", max_tokens=18, url=server.http_url)) for _ in range(2)]

    assert [expected(18)] * 2 == texts


def test_without_an_id_each_response_is_decoded_by_itself(server: Server) -> None:
    """As upstream: each byte of a character becomes U+FFFD."""
    assert "[1]\ufffd\ufffd" == "".join(pieces(server, 5))


def alone(tokens: bytes) -> str:
    """Each byte decoded by itself."""
    return "".join(bytes([token]).decode(errors="replace") for token in tokens)


def test_end_token_in_the_middle_of_a_character_ends_the_text(server: Server) -> None:
    """The engine's response to it has no tokens, and brings the U+FFFD of what was held back."""
    end = "日".encode()[-1]

    assert "[1]é\ufffd" == "".join(pieces(server, 30, "end token", end_id=end))


def test_id_may_be_used_again_when_its_stream_was_seen_to_end(server: Server) -> None:
    """By max_tokens in a character, by the end token, by a stop word, and by a response that is not streamed."""
    asked: list[tuple[int, dict[str, Any]]] = [
        (4, {}),
        (30, {"end_id": "日".encode()[-1]}),
        (30, {"stop_words": ["🎉ü", "日🎉"]}),
        (9, {"stream": False, "exclude_input_in_output": True}),
        (18, {}),
    ]
    texts = ["".join(pieces(server, tokens, "again", **inputs)) for tokens, inputs in asked]

    assert [expected(4), "[1]é\ufffd", "[1]é日🎉", expected(9), expected(18)] == texts


def test_streams_with_ids_of_their_own_do_not_mix(server: Server) -> None:
    """Side by side, of different lengths."""
    lengths = range(10, 42)

    with ThreadPoolExecutor(len(lengths)) as pool:
        texts = [*pool.map(lambda tokens: "".join(pieces(server, tokens, f"side by side {tokens}")), lengths)]

    assert [expected(tokens) for tokens in lengths] == texts


def test_streams_with_one_id_at_a_time_fall_back_to_each_response_by_itself(server: Server) -> None:
    """No byte of one stream gets into a character of the other one, and the log names the id."""
    tokens = 200
    whole = (f"[1]{PROMPT}".encode() * tokens)[:tokens]
    first = pieces(server, tokens, "twice")
    begun = next(first)
    second = "".join(pieces(server, tokens, "twice"))
    text = begun + "".join(first)

    assert alone(whole) == second
    exact = [whole[:count].decode(errors="replace").removesuffix("\ufffd") for count in range(tokens)]
    assert text in {exact[count] + alone(whole[count:]) for count in range(tokens)}
    assert 1 == sum("request id 'twice' came again before the end of its stream was seen" in line for line in LOG)


def test_several_instances_decode_each_response_by_itself(server: Server) -> None:
    """An instance does not see all of a stream, and says so in the log."""
    assert {"\ufffd", *"[1]"} == set("".join(pieces(server, 13, "instances", "two_ensemble")))
    assert any("two_postprocessing: with several instances" in line for line in LOG)


@pytest.mark.parametrize("tokens", [5, 16, 17, 18, 40])
def test_pieces_join_with_a_tokenizer_of_hugging_face(server: Server, tokenizer_dir: Path, tokens: int) -> None:
    """The tokenizers library decodes all tokens at once: the oracle. The engine's tag is the ids of its bytes."""
    tokenizer = Tokenizer.from_file(str(tokenizer_dir / "tokenizer.json"))
    prompt = tokenizer.encode(PROMPT).ids
    ids = ([*b"[1]", *prompt] * tokens)[:tokens]

    streamed = "".join(pieces(server, tokens, f"hugging face {tokens}", "chat_ensemble"))

    assert tokenizer.decode(ids, skip_special_tokens=True) == streamed


def responses(server: Server, prompts: list[str], request_id: str, **inputs: int) -> Iterator[dict[str, Any]]:
    """The outputs of each response to a streamed batch, over gRPC."""
    arrays: dict[str, tuple[str, Any]] = {
        "text_input": ("BYTES", np.array([[prompt.encode()] for prompt in prompts], np.object_)),
        "max_tokens": ("INT32", np.full((len(prompts), 1), 100, np.int32)),
        "stream": ("BOOL", np.full((len(prompts), 1), True)),
        **{name: ("INT32", np.full((len(prompts), 1), value, np.int32)) for name, value in inputs.items()},
    }
    tensors = []
    for name, (datatype, array) in arrays.items():
        tensors.append(grpc.InferInput(name, list(array.shape), datatype))
        tensors[-1].set_data_from_numpy(array)
    received: queue.Queue[Any] = queue.Queue()
    with grpc.InferenceServerClient(server.grpc_url) as connection:
        connection.start_stream(lambda result, error: received.put(error or result))
        connection.async_stream_infer("ensemble", tensors, request_id=request_id, enable_empty_final_response=True)
        while True:
            result = received.get(timeout=60)
            assert not isinstance(result, Exception), result
            response = result.get_response()
            if response.outputs:
                yield {output.name: result.as_numpy(output.name) for output in response.outputs}
            if response.parameters["triton_final_response"].bool_param:
                return


def engine_text(prompt: str, number: int) -> bytes:
    """What the engine with many outputs gives as sequence or beam `number`, without an adapter."""
    return (f"[0.{number}]{prompt}" + " é日🎉" * (number + 1)).encode()


@pytest.mark.parametrize(
    ("prompts", "inputs", "key"),
    [
        pytest.param(["é", "日🎉"], {}, "batch_index", id="rows"),
        pytest.param(["é"], {"num_return_sequences": 3}, "sequence_index", id="sequences"),
    ],
)
def test_rows_and_sequences_have_texts_of_their_own(
    many_outputs: Server, prompts: list[str], inputs: dict[str, int], key: str
) -> None:
    """The engine says which row and which sequence a response continues."""
    texts: dict[int, bytes] = {}
    for outputs in responses(many_outputs, prompts, key, **inputs):
        place = outputs[key].item()
        texts[place] = texts.get(place, b"") + outputs["text_output"].item()

    wanted = [
        engine_text(prompt, number) for prompt in prompts for number in range(inputs.get("num_return_sequences", 1))
    ]
    assert dict(enumerate(wanted)) == texts


def test_beams_are_whole_in_each_response(many_outputs: Server) -> None:
    """Nothing is remembered of them, also when the engine returns one beam of several."""
    inputs = {"beam_width": 2, "num_return_sequences": 1}
    *_, last = responses(many_outputs, ["é"], "beams", **inputs)

    assert engine_text("é", 0) == last["text_output"].item()
