# SPDX-FileCopyrightText: the tritonlora authors
# SPDX-License-Identifier: Apache-2.0
"""Requests whose parameters or ids are no text, which only HTTP lets through, on a real tritonserver."""

from __future__ import annotations

import http.client
import json
from collections.abc import Callable

import pytest

from repositories import synthetic_repository
from tritonlora.launch.server import Server
from tritonlora.repository import init

INFER = (
    b'{%s, "inputs": [{"name": "text_input", "datatype": "BYTES", "shape": [1, 1], "data": ["hello"]},'
    b' {"name": "max_tokens", "datatype": "INT32", "shape": [1, 1], "data": [4]}]}'
)
GENERATE = b'{"text_input": "hello", "max_tokens": 4, %s}'


@pytest.fixture(scope="module", params=init.TOPOLOGIES)
def server(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory, launch: Callable[..., Server]
) -> Server:
    """A server whose engine's model is not decoupled, so that infer can ask it."""
    opened = synthetic_repository(tmp_path_factory.mktemp("text") / "repo", decoupled=False, streams=1)
    init.init(opened.root, topology=request.param)
    return launch(opened.root)


def post(server: Server, path: str, body: bytes) -> tuple[int, dict[str, str]]:
    """Status and JSON of what the ensemble answers."""
    connection = http.client.HTTPConnection(server.http_url, timeout=60)
    connection.request("POST", f"/v2/models/ensemble/{path}", body)
    response = connection.getresponse()
    answer = response.status, json.loads(response.read())
    connection.close()
    return answer


@pytest.mark.parametrize(
    ("path", "body", "what"),
    [
        ("generate", GENERATE % b'"note": "\xff\xfe"', "parameters are"),
        ("generate", GENERATE % b'"\xff": "a"', "parameters are"),
        ("infer", INFER % b'"parameters": {"note": "\xff"}', "parameters are"),
        ("infer", INFER % b'"parameters": {"sequence_id": "\xff"}', "correlation id is"),
        ("infer", INFER % b'"id": "\xff"', "id is"),
    ],
)
def test_what_is_no_text_is_refused_without_a_word_in_the_log(
    server: Server, path: str, body: bytes, what: str
) -> None:
    """INVALID_ARG: any client can send as many of these as it likes."""
    for _ in range(3):
        status, answer = post(server, path, body)

        assert 400 == status
        assert f"the request's {what} not UTF-8" in answer["error"]

    assert not [line for line in server.log() if "Traceback" in line]
    assert 200 == post(server, path, body.replace(b"\xff", b"y").replace(b"\xfe", b"z"))[0]
