# SPDX-FileCopyrightText: the tritonlora authors
# SPDX-License-Identifier: Apache-2.0
"""The shipped repository, led through the router, on a real tritonserver: text in, text out, whole or streamed.

The engine is the CPU engine in synthetic mode, whose answer to "hello" is the bytes of "[base]hello[base]hello…".
"""

from __future__ import annotations

import contextlib
import http.client
import json
import shutil
from collections import deque
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from tritonclient.utils import InferenceServerException

from asking import grpc_stream
from repositories import synthetic_repository
from tritonlora.errors import ServerError
from tritonlora.launch import client
from tritonlora.launch.server import Server
from tritonlora.repository import init

MODEL_REPOSITORY = Path(__file__).parents[2] / "model_repository"
TEXTS = ["Grüße", "日本語のテキスト", "👩‍👩‍👧‍👦 family", "e\u0301 n\u0303 ﷽", "\ufffd stays", "plain"]


@pytest.fixture(scope="module")
def server(launch: Callable[..., Server], tmp_path_factory: pytest.TempPathFactory) -> Server:
    """A copy of the shipped repository, so that nothing is written into the checkout."""
    repository = tmp_path_factory.mktemp("shipped") / "model_repository"
    shutil.copytree(MODEL_REPOSITORY, repository, ignore=shutil.ignore_patterns("__pycache__"))
    init.init(repository, topology="forward")
    return launch(repository)


def generate(server: Server, **body: Any) -> str:
    """The text that POST …/generate answers with."""
    status, answer = post(server, "generate", body)
    assert http.client.OK == status, answer
    text: str = json.loads(answer)["text_output"]
    return text


def generate_stream(server: Server, **body: Any) -> list[str]:
    """The pieces that POST …/generate_stream answers with, one for each event."""
    status, answer = post(server, "generate_stream", {**body, "stream": True})
    assert http.client.OK == status, answer
    events = [line.removeprefix("data: ") for line in answer.splitlines() if line.startswith("data: ")]
    return [json.loads(event)["text_output"] for event in events]


def post(server: Server, endpoint: str, body: dict[str, Any]) -> tuple[int, str]:
    """Status and body of the answer."""
    connection = http.client.HTTPConnection(server.http_url, timeout=60)
    try:
        connection.request("POST", f"/v2/models/ensemble/{endpoint}", json.dumps(body))
        response = connection.getresponse()
        return response.status, response.read().decode()
    finally:
        connection.close()


def inputs_of(texts: list[str], **inputs: int) -> dict[str, np.ndarray[Any, Any]]:
    """A batch of texts, to be streamed."""
    return {
        "text_input": np.array([[text.encode()] for text in texts], np.object_),
        "stream": np.full((len(texts), 1), fill_value=True),
        **{name: np.full((len(texts), 1), value, np.int32) for name, value in inputs.items()},
    }


@pytest.mark.parametrize("text", TEXTS)
def test_streamed_pieces_join_to_the_answer(server: Server, text: str) -> None:
    """Whatever the characters, and wherever max_tokens cuts the last one."""
    for max_tokens in range(6 + len(text.encode()) - 4, 6 + len(text.encode()) + 1):
        pieces = generate_stream(server, text_input=text, max_tokens=max_tokens)

        assert generate(server, text_input=text, max_tokens=max_tokens) == "".join(pieces)


def test_stream_comes_in_pieces(server: Server) -> None:
    """One for each token, and one for the end."""
    pieces = generate_stream(server, text_input="é!", max_tokens=9)

    assert ["[", "b", "a", "s", "e", "]", "", "é", "!", ""] == pieces


def test_answer_cut_within_a_character_ends_in_a_replacement(server: Server) -> None:
    """The end of the stream sends it, once."""
    assert "[base]\ufffd" == "".join(generate_stream(server, text_input="€", max_tokens=8))


def test_end_id_within_a_character_ends_it_once(server: Server) -> None:
    """The engine's own last answer, which has no tokens, is not taken for the end of the stream."""
    text = {"text_input": "€", "max_tokens": 20, "end_id": "€".encode()[2]}

    assert "[base]\ufffd" == generate(server, **text) == "".join(generate_stream(server, **text))


def test_streams_side_by_side_stay_apart(server: Server) -> None:
    """Each gets the characters of its own text."""
    texts = [f"{index}: {text}" for index, text in enumerate(TEXTS * 3)]

    def answer(text: str) -> str:
        return "".join(generate_stream(server, text_input=text, max_tokens=6 + len(text.encode())))

    with ThreadPoolExecutor(len(texts)) as pool:
        assert [f"[base]{text}" for text in texts] == list(pool.map(answer, texts))


def test_rows_of_a_batch_stream_side_by_side(server: Server) -> None:
    """Each answer says by batch_index which text it belongs to."""
    texts = ["é日本", "x👋z", "ascii!"]
    rows = [b""] * len(texts)

    for outputs in grpc_stream(server, "ensemble", inputs_of(texts, max_tokens=14)):
        rows[outputs["batch_index"].item()] += outputs["text_output"].item()

    assert [generate(server, text_input=text, max_tokens=14) for text in texts] == [row.decode() for row in rows]


def test_stop_words_end_the_answer(server: Server) -> None:
    """They are text for the client, tokens for the engine; "" is no word."""
    text = generate(server, text_input="one, two", max_tokens=50, stop_words=["", "two"], bad_words=["zzz"])

    assert "[base]one, two" == text


@pytest.mark.parametrize(
    ("body", "message"),
    [
        pytest.param({"text_input": ""}, "QUERY, row 0: the text '' has no tokens; send some text", id="no text"),
        pytest.param(
            {"lora_name": "pirate"}, "unknown LoRA adapter 'pirate'; no adapter is registered", id="lora_name"
        ),
        pytest.param({"beam_width": 3}, "inputs that the CPU engine does not implement: 'beam_width'", id="beams"),
        pytest.param({"max_tokens": 0}, "request_output_len is 0, expected at least 1", id="max_tokens"),
    ],
)
@pytest.mark.parametrize("endpoint", ["generate", "generate_stream"])
def test_client_learns_what_was_wrong(server: Server, endpoint: str, body: dict[str, Any], message: str) -> None:
    """One named error, without a traceback."""
    status, answer = post(server, endpoint, {"text_input": "x", "max_tokens": 4, "stream": True, **body})

    assert http.client.BAD_REQUEST == status or endpoint == "generate_stream"
    assert message in answer
    assert "Traceback" not in answer


def test_text_that_is_not_utf_8_is_refused(server: Server) -> None:
    """Over gRPC a text can hold any bytes."""
    tensors = {"text_input": np.array([[b"\xff"]], np.object_), "max_tokens": np.array([[4]], np.int32)}

    with pytest.raises(InferenceServerException, match="QUERY, row 0: not UTF-8: invalid start byte at byte 0"):
        next(grpc_stream(server, "ensemble", tensors))


@pytest.mark.parametrize("topology", ["forward", "resolve"])
def test_nothing_is_under_way_for_ever(topology: str, tmp_path: Path) -> None:
    """Neither an error nor a stream whose client has left.

    A server that is stopped would wait for it, until its time is up, and its memory would stay taken.
    """
    slow = {"synthetic_token_seconds": "0.01"}
    opened = synthetic_repository(tmp_path / "repo", warm=["pirate"], streams=1, parameters=slow)
    init.init(opened.root, topology=topology)
    with Server(opened.root) as server:
        server.wait_until_ready()
        leaves = client.generate("hello", lora_name="pirate", max_tokens=30, url=server.http_url)
        assert "[" == next(leaves)
        leaves.close()  # type: ignore[attr-defined]
        for name in ("nobody", "", "pirate", "nobody"):  # more tokens: the engine is done with the other before
            with contextlib.suppress(ServerError):
                deque(client.generate("hello", lora_name=name, max_tokens=60, url=server.http_url), maxlen=0)

    log = "\n".join(server.log())
    assert "Found 0 model versions that have in-flight inferences" in log
    assert "failed to stop server" not in log
