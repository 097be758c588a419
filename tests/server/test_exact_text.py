# SPDX-FileCopyrightText: the tritonlora authors
# SPDX-License-Identifier: Apache-2.0
"""Streamed text past the router: an ensemble whose postprocessing is announced each request before the engine gets it.

Beside the shipped byte tokenizer there is an ensemble with a Hugging Face tokenizer, and the oracle is the tokenizers
library's own decoding of all tokens at once. The synthetic engine repeats the prompt after a tag.
"""

from __future__ import annotations

import http.client
import json
import re
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
from tokenizers import Tokenizer

from repositories import resolving
from test_text_models import copy_model, save_tokenizer
from tritonlora.launch.server import Server

PROMPT = "é日🎉ü"
ANNOUNCED = "_ANNOUNCED_OUTPUT_LEN"


def step(model: str, inputs: dict[str, str], outputs: dict[str, str]) -> str:
    """A step of an ensemble."""
    maps = [
        f"{kind} {{ key: \"{key}\" value: \"{tensor}\" }}"
        for kind, wires in (("input_map", inputs), ("output_map", outputs))
        for key, tensor in wires.items()
    ]
    return "{ " + f'model_name: "{model}" model_version: -1 ' + " ".join(maps) + " },"


def with_begin(text: str, postprocessing: str = "postprocessing") -> str:
    """A resolving ensemble's config.pbtxt, with the step that announces a request to `postprocessing`."""
    text, count = re.subn(r'(key: "request_output_len"\s+value: )"_REQUEST_OUTPUT_LEN"', rf'\1"{ANNOUNCED}"', text)
    assert 1 == count
    announce = step(
        postprocessing,
        {
            "REQUEST_OUTPUT_LEN": "_REQUEST_OUTPUT_LEN",
            "STREAMING": "stream",
            "BEAM_WIDTH": "beam_width",
            "NUM_RETURN_SEQUENCES": "num_return_sequences",
        },
        {"OUT_REQUEST_OUTPUT_LEN": ANNOUNCED},
    )
    indices = ("batch_index", "sequence_index")
    wires = "".join(f'\n      input_map {{ key: "{index.upper()}" value: "{index}" }}' for index in indices)
    text, count = re.subn(r'(input_map \{\s+key: "SEQUENCE_LENGTH"[^}]+\})', rf"\1{wires}", text)
    assert 1 == count
    return text.replace("step [", f"step [\n    {announce}", 1)


@pytest.fixture(scope="module")
def server(launch: Callable[..., Server], tmp_path_factory: pytest.TempPathFactory) -> Server:
    """`ensemble` with the byte tokenizer, and `chat_ensemble` with one from a directory."""
    opened = resolving(tmp_path_factory.mktemp("exact") / "repo", ("pirate",), (), pages=100)
    tokenizer_dir = tmp_path_factory.mktemp("tokenizer")
    save_tokenizer(tokenizer_dir)
    for name in ("preprocessing", "postprocessing"):
        copy_model(name, opened.root, f"chat_{name}", tokenizer_dir=str(tokenizer_dir))
    config = opened.root / "ensemble" / "config.pbtxt"
    text = with_begin(config.read_text(encoding="utf-8"))
    config.write_text(text, encoding="utf-8")
    (opened.root / "chat_ensemble" / "1").mkdir(parents=True)
    text = text.replace('"ensemble"', '"chat_ensemble"', 1)
    text = text.replace('"preprocessing"', '"chat_preprocessing"').replace('"postprocessing"', '"chat_postprocessing"')
    (opened.root / "chat_ensemble" / "config.pbtxt").write_text(text.replace('platform: "chat_ensemble"', 'platform: "ensemble"'), encoding="utf-8")
    server = launch(opened.root)
    server.tokenizer = Tokenizer.from_file(str(tokenizer_dir / "tokenizer.json"))  # type: ignore[attr-defined]
    return server


def pieces(server: Server, tokens: int, request_id: str | None = None, model: str = "ensemble", **inputs: Any) -> Iterator[str]:
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


def test_without_an_id_each_response_is_decoded_by_itself(server: Server) -> None:
    """As upstream: each byte of a character becomes U+FFFD."""
    assert "[1]\ufffd\ufffd" == "".join(pieces(server, 5))
