# SPDX-FileCopyrightText: the tritonlora authors
# SPDX-License-Identifier: Apache-2.0
"""The router on a real tritonserver, in front of the CPU engine in synthetic mode.

A synthetic answer repeats "[<lora_task_id>]" (or "[base]") and the prompt, so that it says which adapter gave it.
"""

from __future__ import annotations

import http.client
import json
import queue
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tritonclient.grpc as grpc
import tritonclient.http as triton_http
from tritonclient.utils import InferenceServerException

from repositories import synthetic_adapter, synthetic_repository
from tritonlora import client, register
from tritonlora.adapters import AdapterTable
from tritonlora.errors import ServerError
from tritonlora.repository import Repository, read_table
from tritonlora.server import Server

WARM = ("pirate", "haiku")
COLD = tuple(f"cold{number}" for number in range(6))
PAGES = 3
PROMPT = "hello"

Launch = Callable[..., Server]


@pytest.fixture(scope="module")
def opened(tmp_path_factory: pytest.TempPathFactory) -> Repository:
    """Two warm adapters and six cold ones, with a cache for three."""
    return synthetic_repository(tmp_path_factory.mktemp("router") / "repo", warm=WARM, cold=COLD, pages=PAGES)


@pytest.fixture(scope="module")
def server(opened: Repository, launch: Launch) -> Server:
    """A server on it."""
    return launch(opened.root)


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory, launch: Launch) -> tuple[Repository, Server]:
    """The same with a model that is not decoupled."""
    root = tmp_path_factory.mktemp("whole") / "repo"
    opened = synthetic_repository(root, warm=WARM, cold=COLD, pages=PAGES, decoupled=False)
    return opened, launch(opened.root)


def expected(table: AdapterTable, lora_name: str | None, prompt: str = PROMPT, tokens: int = 24) -> str:
    """What the synthetic engine answers."""
    task = "base" if lora_name is None else str(table.entries[lora_name].lora_task_id)
    unit = f"[{task}]{prompt}".encode()
    return (unit * tokens)[:tokens].decode()


def ask(server: Server, lora_name: str | None, tokens: int = 24, **inputs: Any) -> str:
    """A streamed answer over HTTP."""
    return "".join(client.generate(PROMPT, lora_name=lora_name, max_tokens=tokens, url=server.http_url, inputs=inputs))


def post(server: Server, path: str, body: dict[str, Any]) -> tuple[int, Any]:
    """Status and JSON of a POST."""
    connection = http.client.HTTPConnection(server.http_url, timeout=60)
    try:
        connection.request("POST", path, json.dumps(body))
        response = connection.getresponse()
        return response.status, json.loads(response.read())
    finally:
        connection.close()


def engine_inputs(
    lora_names: list[bytes] | None = None,
    task_ids: list[int] | None = None,
    rows: int = 1,
    tokens: Sequence[int] = (12,),
) -> list[Any]:
    """gRPC inputs of the router itself. `tokens` are how many each row asks for, or all of them."""
    prompt = [list(PROMPT.encode())] * rows
    arrays: dict[str, np.ndarray[Any, Any]] = {
        "input_ids": np.array(prompt, np.int32),
        "input_lengths": np.full((rows, 1), len(PROMPT), np.int32),
        "request_output_len": np.full((rows, 1), np.array(tokens)[:, None], np.int32),
    }
    if lora_names is not None:
        arrays["lora_name"] = np.array([[name] for name in lora_names], np.object_)
    if task_ids is not None:
        arrays["lora_task_id"] = np.array([[task_id] for task_id in task_ids], np.uint64)
    return [_grpc_input(name, array) for name, array in arrays.items()]


def _grpc_input(name: str, array: np.ndarray[Any, Any]) -> grpc.InferInput:
    datatype = {"int32": "INT32", "uint64": "UINT64", "object": "BYTES"}[array.dtype.name]
    tensor = grpc.InferInput(name, list(array.shape), datatype)
    tensor.set_data_from_numpy(array)
    return tensor


def stream(server: Server, model: str, inputs: list[Any], **options: Any) -> Iterator[Any]:
    """Results of one request over gRPC streaming; raises what the server answers as an error."""
    results: queue.Queue[tuple[Any, Any]] = queue.Queue()
    with grpc.InferenceServerClient(server.grpc_url) as connection:
        connection.start_stream(callback=lambda result, error: results.put((result, error)))
        connection.async_stream_infer(model, inputs, enable_empty_final_response=True, **options)
        while True:
            result, error = results.get(timeout=60)
            if error is not None:
                raise error
            if result.as_numpy("output_ids") is not None or result.as_numpy("text_output") is not None:
                yield result
            if result.get_response().parameters["triton_final_response"].bool_param:
                return


def router_text(server: Server, lora_name: bytes | None = None, task_id: int | None = None) -> str:
    """The router's own answer, as text."""
    inputs = engine_inputs(None if lora_name is None else [lora_name], None if task_id is None else [task_id])
    tokens = [result.as_numpy("output_ids").reshape(-1).tolist() for result in stream(server, "lora_router", inputs)]
    return bytes(token for piece in tokens for token in piece).decode()


# The right adapter


@pytest.mark.parametrize("lora_name", [None, *WARM, *COLD])
def test_each_name_is_answered_by_its_own_adapter(server: Server, opened: Repository, lora_name: str | None) -> None:
    """Through the ensemble, streamed over HTTP; warm, cold and base."""
    assert expected(read_table(opened), lora_name) == ask(server, lora_name)


@pytest.mark.parametrize("lora_name", [None, "pirate", "cold1"])
def test_generate_without_streaming_gives_the_same_text(
    server: Server, opened: Repository, lora_name: str | None
) -> None:
    """One answer, whole."""
    body = {"text_input": PROMPT, "max_tokens": 24, **({"lora_name": lora_name} if lora_name else {})}
    status, answer = post(server, "/v2/models/ensemble/generate", body)

    assert (200, expected(read_table(opened), lora_name)) == (status, answer["text_output"])


@pytest.mark.parametrize("lora_name", [None, "pirate", "cold1"])
def test_the_router_answers_by_name_over_grpc(server: Server, opened: Repository, lora_name: str | None) -> None:
    """Asked directly, with the engine's own tensors."""
    name = None if lora_name is None else lora_name.encode()

    assert expected(read_table(opened), lora_name, tokens=12) == router_text(server, name)


def test_a_registered_task_id_is_as_good_as_its_name(server: Server, opened: Repository) -> None:
    """For clients of the engine's own interface."""
    table = read_table(opened)

    assert expected(table, "haiku", tokens=12) == router_text(server, task_id=table.entries["haiku"].lora_task_id)
    assert expected(table, "haiku") == ask(server, "haiku", lora_task_id=table.entries["haiku"].lora_task_id)


def test_each_row_of_a_batch_is_answered_by_its_own_adapter(server: Server, opened: Repository) -> None:
    """With batch_index saying which row."""
    names = ["pirate", "cold2", "haiku", "cold3"]
    rows: dict[int, list[int]] = {}
    for result in stream(server, "lora_router", engine_inputs([name.encode() for name in names], rows=4)):
        row = int(result.as_numpy("batch_index").item())
        rows.setdefault(row, []).extend(result.as_numpy("output_ids").reshape(-1).tolist())
    table = read_table(opened)

    assert {row: expected(table, name, tokens=12) for row, name in enumerate(names)} == {
        row: bytes(tokens).decode() for row, tokens in rows.items()
    }


def test_multi_byte_characters_are_streamed_whole(server: Server) -> None:
    """Pieces join to the text of the whole answer, and no piece has half a character."""
    prompt = "naïve 日本 🎉"
    pieces = list(client.generate(prompt, max_tokens=60, url=server.http_url))
    _, answer = post(server, "/v2/models/ensemble/generate", {"text_input": prompt, "max_tokens": 60})

    assert answer["text_output"] == "".join(pieces)
    assert len(pieces) > 10
    assert not any("\ufffd" in piece for piece in pieces[:-1])


# Never a wrong answer


@pytest.mark.parametrize(
    ("inputs", "message"),
    [
        ({"lora_name": "nobody"}, "unknown LoRA adapter 'nobody'; available: cold0, cold1"),
        ({"lora_name": ""}, "lora_name is empty; to ask the base model, leave it out"),
        ({"lora_name": "../pirate"}, "is not a legal adapter name"),
        ({"lora_task_id": 99}, "unknown lora_task_id 99; available"),
        ({"lora_name": "pirate", "lora_task_id": 2}, "lora_name 'pirate' has lora_task_id 1, but the request says 2"),
    ],
)
@pytest.mark.parametrize("verb", ["generate", "generate_stream"])
def test_a_name_that_is_not_an_adapter_is_an_error(
    server: Server, verb: str, inputs: dict[str, Any], message: str
) -> None:
    """Streaming or not; the base model does not answer."""
    body = {"text_input": PROMPT, "max_tokens": 5, "stream": verb == "generate_stream", **inputs}
    connection = http.client.HTTPConnection(server.http_url, timeout=60)
    connection.request("POST", f"/v2/models/ensemble/{verb}", json.dumps(body))
    response = connection.getresponse()
    text = response.read().decode()
    connection.close()

    assert 400 <= response.status < 500
    assert message in json.loads(text.removeprefix("data: "))["error"]
    assert "Traceback" not in text


@pytest.mark.parametrize(
    ("lora_name", "status", "message"),
    [
        (b"nobody", "StatusCode.NOT_FOUND", "unknown LoRA adapter 'nobody'"),
        (b"\xff\xfe", "StatusCode.INVALID_ARGUMENT", "not UTF-8"),
        (b"", "StatusCode.INVALID_ARGUMENT", "lora_name is empty"),
    ],
)
def test_grpc_clients_get_the_status_code(
    whole: tuple[Repository, Server], lora_name: bytes, status: str, message: str
) -> None:
    """NOT_FOUND and INVALID_ARGUMENT, as unary calls report them."""
    with (
        grpc.InferenceServerClient(whole[1].grpc_url) as connection,
        pytest.raises(InferenceServerException, match=message) as raised,
    ):
        connection.infer("lora_router", engine_inputs([lora_name]))

    assert status == raised.value.status()


def test_a_batch_that_mixes_base_and_adapter_rows_is_an_error(server: Server) -> None:
    """The engine's inputs cannot say it."""
    with pytest.raises(InferenceServerException, match="mixes rows for the base model and for adapters"):
        list(stream(server, "lora_router", engine_inputs([b"pirate", b""], rows=2)))


def test_an_error_of_the_engine_is_passed_on_with_the_adapters_name(server: Server) -> None:
    """In its own words, without its paths."""
    inputs = engine_inputs([b"pirate"], tokens=[-1])

    with pytest.raises(InferenceServerException, match="LoRA adapter 'pirate': ") as raised:
        list(stream(server, "lora_router", inputs))

    assert "Traceback" not in str(raised.value)


# Warm, cold, evicted


def test_warm_adapters_answer_right_after_ready_without_their_files(tmp_path: Path, launch: Launch) -> None:
    """Triton's warmup has loaded them, so that no request needs their weights: the files can be gone."""
    opened = synthetic_repository(tmp_path / "repo", warm=WARM)
    server = launch(opened.root)
    for file in opened.warmup_directory.glob("adapter_*.bin"):
        file.unlink()

    assert [expected(read_table(opened), name) for name in WARM] == [ask(server, name) for name in WARM]


def test_a_cold_adapter_whose_file_is_gone_is_unavailable(tmp_path: Path, launch: Launch) -> None:
    """Named, without a path of the server; and the others serve on."""
    opened = synthetic_repository(tmp_path / "repo", warm=["pirate"], cold=["cold"])
    server = launch(opened.root)
    file = opened.root / read_table(opened).entries["cold"].lora_weights_file
    file.unlink()

    with pytest.raises(ServerError, match="LoRA adapter 'cold': .*is missing on the server") as raised:
        ask(server, "cold")

    assert str(opened.root) not in str(raised.value)
    assert expected(read_table(opened), "pirate") == ask(server, "pirate")


def test_more_adapters_than_the_cache_holds_are_served_without_an_error(server: Server, opened: Repository) -> None:
    """Eight adapters through a cache of three, 32 requests at a time, in an order that misses all the time."""
    table = read_table(opened)
    names = [None, *WARM, *COLD]
    wanted = [names[number * 5 % len(names)] for number in range(400)]
    with ThreadPoolExecutor(32) as pool:
        answers = list(pool.map(lambda name: ask(server, name), wanted))

    assert [expected(table, name) for name in wanted] == answers


def test_requests_wait_while_every_cached_adapter_is_in_use(tmp_path: Path, launch: Launch) -> None:
    """A cache of one adapter and four slow streams for four adapters: one after the other, and no error."""
    opened = synthetic_repository(
        tmp_path / "repo", cold=COLD[:4], pages=1, parameters={"synthetic_token_seconds": "0.005"}
    )
    server = launch(opened.root)
    with ThreadPoolExecutor(4) as pool:
        answers = list(pool.map(lambda name: ask(server, name), COLD[:4]))

    assert [expected(read_table(opened), name) for name in COLD[:4]] == answers


def test_a_slow_stream_does_not_hold_up_other_requests(tmp_path: Path, launch: Launch) -> None:
    """Sixteen requests that take half a second each are answered side by side."""
    opened = synthetic_repository(tmp_path / "repo", warm=WARM, parameters={"synthetic_token_seconds": "0.02"})
    server = launch(opened.root)
    streams = [client.generate(PROMPT, lora_name=WARM[n % 2], max_tokens=24, url=server.http_url) for n in range(16)]
    first_pieces = [next(pieces) for pieces in streams]  # all sixteen are under way before any is read to its end
    texts = [first + "".join(rest) for first, rest in zip(first_pieces, streams, strict=True)]
    table = read_table(opened)

    assert [expected(table, WARM[n % 2]) for n in range(16)] == texts


# Not decoupled


@pytest.mark.parametrize("lora_name", [None, "pirate", "cold4"])
def test_an_engine_that_is_not_decoupled_is_served_alike(
    whole: tuple[Repository, Server], lora_name: str | None
) -> None:
    """HTTP generate on the ensemble, and gRPC on the router."""
    opened, server = whole
    body = {"text_input": PROMPT, "max_tokens": 24, **({"lora_name": lora_name} if lora_name else {})}
    status, answer = post(server, "/v2/models/ensemble/generate", body)
    with grpc.InferenceServerClient(server.grpc_url) as connection:
        names = None if lora_name is None else [lora_name.encode()]
        result = connection.infer("lora_router", engine_inputs(names))
    tokens = result.as_numpy("output_ids").reshape(-1).tolist()
    table = read_table(opened)

    assert (200, expected(table, lora_name)) == (status, answer["text_output"])
    assert expected(table, lora_name, tokens=12) == bytes(tokens).decode()


def test_eviction_is_recovered_from_without_decoupling_too(whole: tuple[Repository, Server]) -> None:
    """Eight adapters through a cache of three, 16 at a time."""
    opened, server = whole
    table = read_table(opened)
    names = [None, *WARM, *COLD]
    wanted = [names[number * 5 % len(names)] for number in range(200)]

    def one(name: str | None) -> tuple[int, str]:
        body = {"text_input": PROMPT, "max_tokens": 24, **({"lora_name": name} if name else {})}
        status, answer = post(server, "/v2/models/ensemble/generate", body)
        return status, answer.get("text_output", answer)

    with ThreadPoolExecutor(16) as pool:
        answers = list(pool.map(one, wanted))

    assert [(200, expected(table, name)) for name in wanted] == answers


def test_http_infer_works_too(whole: tuple[Repository, Server]) -> None:
    """The binary protocol of tritonclient over HTTP."""
    opened, server = whole
    inputs = []
    for name, array in (
        ("text_input", np.array([[PROMPT]], np.object_)),
        ("max_tokens", np.array([[24]], np.int32)),
        ("lora_name", np.array([["haiku"]], np.object_)),
    ):
        tensor = triton_http.InferInput(name, array.shape, "INT32" if array.dtype == np.int32 else "BYTES")
        tensor.set_data_from_numpy(array)
        inputs.append(tensor)
    with triton_http.InferenceServerClient(server.http_url) as connection:
        text = connection.infer("ensemble", inputs).as_numpy("text_output").reshape(-1)[0].decode()

    assert expected(read_table(opened), "haiku") == text


# Changes while serving


def test_adapters_come_and_go_without_a_restart(tmp_path: Path, launch: Launch) -> None:
    """The next request sees the table as it is on disk."""
    opened = synthetic_repository(tmp_path / "repo", warm=WARM)
    server = launch(opened.root)
    register.add(opened, "new", synthetic_adapter(tmp_path / "new", 9))

    assert expected(read_table(opened), "new") == ask(server, "new")

    before = read_table(opened).entries["new"].lora_task_id
    register.add(opened, "new", synthetic_adapter(tmp_path / "newer", 10))

    assert before != read_table(opened).entries["new"].lora_task_id
    assert expected(read_table(opened), "new") == ask(server, "new")

    register.remove(opened, "new")

    with pytest.raises(ServerError, match="unknown LoRA adapter 'new'; available: haiku, pirate"):
        ask(server, "new")


def test_a_damaged_table_leaves_the_last_good_one(tmp_path: Path, launch: Launch) -> None:
    """And says so in the server's log."""
    opened = synthetic_repository(tmp_path / "repo", warm=WARM)
    server = launch(opened.root)
    opened.table_path.write_text("{")

    assert [4, 4] == [len(ask(server, name, tokens=4)) for name in WARM]
    assert any("keeping the last good adapters.json" in line for line in server.log())
