# SPDX-FileCopyrightText: the tritonlora authors
# SPDX-License-Identifier: Apache-2.0
"""The resolve topology on a real tritonserver, with the CPU engine in synthetic mode."""

from __future__ import annotations

import json
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tritonclient.grpc as grpc
from tritonclient.utils import InferenceServerException

from asking import ENSEMBLE, TOKENS, Question, Refusal, ways
from repositories import resolving, synthetic_adapter
from synthetic import PROMPT, ask, expected, listing, post
from tritonlora.cli import commands
from tritonlora.errors import ServerError
from tritonlora.launch.server import Server
from tritonlora.repository import add, registry
from tritonlora.repository.paths import Repository, read_table
from tritonlora.serving.shares import choose

WARM = ("pirate", "haiku")
COLD = tuple(f"cold{number}" for number in range(6))

Launch = Callable[..., Server]


@pytest.fixture(scope="module")
def roomy(tmp_path_factory: pytest.TempPathFactory, launch: Launch) -> tuple[Repository, Server]:
    """A cache for all."""
    opened = resolving(tmp_path_factory.mktemp("roomy") / "repo", WARM, COLD, pages=100)
    return opened, launch(opened.root)


@pytest.fixture(scope="module")
def narrow(tmp_path_factory: pytest.TempPathFactory, launch: Launch) -> tuple[Repository, Server]:
    """A cache for three, and an engine model that is not decoupled."""
    opened = resolving(tmp_path_factory.mktemp("narrow") / "repo", WARM, COLD, pages=3, decoupled=False)
    return opened, launch(opened.root)


def resolve(
    server: Server,
    lora_names: list[bytes] | None = None,
    task_ids: list[int] | None = None,
    split_keys: list[bytes] | None = None,
) -> dict[str, Any]:
    """What the resolver gives beside request_output_len, which goes through it: the tensors' shapes and bytes."""
    rows = len(lora_names or task_ids or [0])
    required = np.arange(rows, dtype=np.int32).reshape(rows, 1)
    arrays: dict[str, np.ndarray[Any, Any]] = {"request_output_len": required}
    if lora_names is not None:
        arrays["lora_name"] = np.array([[name] for name in lora_names], np.object_)
    if task_ids is not None:
        arrays["lora_task_id"] = np.array([[task_id] for task_id in task_ids], np.uint64)
    if split_keys is not None:
        arrays["lora_split_key"] = np.array([[key] for key in split_keys], np.object_)
    inputs = []
    for name, array in arrays.items():
        kind = {"lora_task_id": "UINT64", "request_output_len": "INT32"}.get(name, "BYTES")
        inputs.append(grpc.InferInput(name, list(array.shape), kind))
        inputs[-1].set_data_from_numpy(array)
    with grpc.InferenceServerClient(server.grpc_url) as client:
        response = client.infer("lora_resolver", inputs).get_response()
    contents = zip(response.outputs, response.raw_output_contents, strict=True)
    found = {output.name: (list(output.shape), content) for output, content in contents}
    assert ([rows, 1], required.tobytes()) == found.pop("request_output_len")
    return found


WAYS = {
    f"{way.interface.model}-{policy}-{way.protocol}": (fixture, way)
    for fixture, policy, decoupled in (("roomy", "decoupled", True), ("narrow", "whole", False))
    for way in ways([ENSEMBLE, TOKENS], decoupled=decoupled)
    if not (decoupled and way.protocol.endswith("_infer"))  # which Triton refuses
    and not (way.interface is TOKENS and "generate" in way.protocol)  # whose JSON has no batches of tokens
}


@pytest.mark.parametrize("way", WAYS)
def test_a_request_is_answered_by_the_adapter_that_it_means(request: pytest.FixtureRequest, way: str) -> None:
    """By name or id, warm or cold, in every protocol; without one, by the base model."""
    fixture, asked = WAYS[way]
    opened, server = request.getfixturevalue(fixture)
    table = read_table(opened)
    answers = {
        None: Question(),
        "pirate": Question([b"pirate"]),
        "haiku": Question(lora_task_id=[table.entries["haiku"].lora_task_id]),
        "cold0": Question([b"cold0"]),
    }

    for name, question in answers.items():
        assert (expected(table, name, tokens=12),) == asked.ask(server, question)
    if asked.protocol == "grpc_stream" and asked.streams:  # the others take no batch
        rows = expected(table, "pirate", tokens=12), expected(table, "cold0", tokens=7)
        assert rows == asked.ask(server, Question([b"pirate", b"cold0"], tokens=(12, 7)))


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize(
    ("question", "code", "message"),
    [
        (Question([b"nobody"]), "NOT_FOUND", "unknown LoRA adapter 'nobody'; available: cold0, cold1, cold2"),
        (Question(lora_task_id=[999]), "NOT_FOUND", "unknown lora_task_id 999; available: cold0, cold1, cold2"),
        (Question([b""]), "INVALID_ARG", "lora_name is empty; to ask the base model, leave it out"),
        (Question([b"\xff\xfe"]), "INVALID_ARG", r"lora_name is not UTF-8: b'\xff\xfe'"),
        (Question([b"../pirate"]), "INVALID_ARG", "lora_name '../pirate' is not a legal adapter name"),
        (Question([b"pirate"], [2]), "INVALID_ARG", "lora_name 'pirate' has lora_task_id 1, but the request says 2"),
        (Question([b"pirate", b""], tokens=[4, 4]), "INVALID_ARG", "the batch mixes rows for the base model and for"),
    ],
    ids=["unknown", "unknown id", "empty", "not UTF-8", "illegal", "disagreeing", "mixed"],
)
def test_the_base_model_never_answers_for_an_adapter(
    request: pytest.FixtureRequest, way: str, question: Question, code: str, message: str
) -> None:
    """What is not one adapter of the table is an error, in every protocol."""
    fixture, asked = WAYS[way]
    wanted, found = asked.refusal(code, message), asked.ask(request.getfixturevalue(fixture)[1], question)

    assert isinstance(found, Refusal)
    assert (wanted.status, True) == (found.status, found.message.startswith(wanted.message))


def test_where_all_adapters_fit_those_of_the_start_go_by_id_alone(roomy: tuple[Repository, Server]) -> None:
    """In batches, too; the base model gets nothing."""
    opened, server = roomy
    ids = [read_table(opened).entries[name].lora_task_id for name in WARM]
    found = resolve(server, [name.encode() for name in WARM])

    assert {"lora_task_id": ([2, 1], np.array(ids, np.uint64).tobytes())} == found
    assert found == resolve(server, task_ids=ids)
    assert {} == resolve(server)


def test_an_alias_is_divided_by_the_key(roomy: tuple[Repository, Server], capsys: pytest.CaptureFixture[str]) -> None:
    """Per row of a batch, as through the ensemble; the listing has the shares. Without keys, both adapters respond."""
    opened, server = roomy
    registry.alias(opened, "prod", {"pirate": 50, "haiku": 50})
    table, keys = read_table(opened), [f"user-{number}".encode() for number in range(8)]
    chosen = [choose(table.aliases["prod"], key) for key in keys]
    ids = [table.entries[name].lora_task_id for name in chosen]

    assert set(WARM) == set(chosen)
    assert np.array(ids, np.uint64).tobytes() == resolve(server, [b"prod"] * 8, None, keys)["lora_task_id"][1]
    assert [expected(table, name) for name in chosen] == [ask(server, "prod", lora_split_key=key) for key in keys]
    command = ["generate", PROMPT, "--lora-name", "prod", "--max-tokens", "24", "--url", server.http_url, "--split-key"]
    assert [0] * 8 == [commands.main([*command, key.decode()]) for key in keys]
    assert [expected(table, name) for name in chosen] == capsys.readouterr().out.splitlines()
    assert {name: {"prod": 50} for name in WARM} == {
        name: about["shares"] for name, about in listing(server, "prod").items()
    }
    at_random = resolve(server, [b"prod"] * 64)["lora_task_id"][1]
    assert {table.entries[name].lora_task_id for name in WARM} == set(np.frombuffer(at_random, np.uint64).tolist())
    with pytest.raises(
        ServerError, match="lora_split_key is empty; to get one of the adapters at random, leave it out"
    ):
        ask(server, "prod", lora_split_key=b"")
    registry.remove(opened, "prod")


def test_an_adapter_that_the_engine_does_not_have_comes_with_its_weights(roomy: tuple[Repository, Server]) -> None:
    """Bit for bit those of its files."""
    opened, server = roomy
    entry = read_table(opened).entries["cold5"]
    found = resolve(server, [b"cold5"])
    shape, weights = found["lora_weights"]

    assert [1, *entry.lora_weights_shape] == shape
    assert (opened.root / entry.lora_weights_file).read_bytes() == weights
    assert (opened.root / entry.lora_config_file).read_bytes() == found["lora_config"][1]


def test_a_batch_is_loaded_before_it_goes_on(roomy: tuple[Repository, Server]) -> None:
    """The engine takes weights in a batch of one, so these go by id; and then it has them."""
    opened, server = roomy
    table, names = read_table(opened), ("cold3", "cold4")
    found = resolve(server, [name.encode() for name in names])
    ids = [table.entries[name].lora_task_id for name in names]

    assert {"lora_task_id": ([2, 1], np.array(ids, np.uint64).tobytes())} == found
    for name in names:
        assert {"lora_task_id"} == resolve(server, [name.encode()]).keys()
        assert expected(table, name) == ask(server, name)


@pytest.mark.parametrize("name", ["lora_weights", "sampling_parameters"])
def test_clients_choose_adapters_and_weights_in_no_other_way(roomy: tuple[Repository, Server], name: str) -> None:
    """What Triton's generate extension knows no input for comes as a parameter."""
    body = {"text_input": PROMPT, "max_tokens": 4, name: json.dumps({"lora_name": "pirate"})}
    status, answer = post(roomy[1], "/v2/models/ensemble/generate", body)

    assert 400 == status
    assert f"{name}: not taken as a parameter" in answer["error"]


@pytest.mark.parametrize("rows", [1, 2])
def test_no_client_gives_what_only_the_resolver_gives_itself(roomy: tuple[Repository, Server], rows: int) -> None:
    """It is no request for the base model."""
    control = grpc.InferInput("lora_control", [rows, 1], "BYTES")
    control.set_data_from_numpy(np.array([[b"x"]] * rows, np.object_))
    with (
        grpc.InferenceServerClient(roomy[1].grpc_url) as client,
        pytest.raises(InferenceServerException, match="lora_control is no input for clients; leave it out"),
    ):
        client.infer("lora_resolver", [control])


def test_a_cache_that_is_too_small_is_no_client_s_business(narrow: tuple[Repository, Server]) -> None:
    """Eight adapters by turns, two at a time, through a cache for three."""
    opened, server = narrow
    table = read_table(opened)
    names = [*WARM, *COLD] * 5
    with ThreadPoolExecutor(2) as pool:
        answers = list(pool.map(lambda name: ask(server, name), names))

    assert [expected(table, name) for name in names] == answers


def test_an_adapter_that_is_added_while_the_server_runs_is_served(
    roomy: tuple[Repository, Server], tmp_path: Path
) -> None:
    """And one whose files are gone is an error by name, with or without a request that went well before."""
    opened, server = roomy
    add.add(opened, "late", synthetic_adapter(tmp_path / "late", 77))
    first = ask(server, "late")
    add.add(opened, "broken", synthetic_adapter(tmp_path / "broken", 78))
    (opened.root / read_table(opened).entries["broken"].lora_weights_file).unlink()

    assert expected(read_table(opened), "late") == first == ask(server, "late")
    for _ in range(2):
        status, answer = post(
            server, "/v2/models/ensemble/generate", {"text_input": PROMPT, "max_tokens": 4, "lora_name": "broken"}
        )
        assert 400 == status
        assert "LoRA adapter 'broken': adapter_model_10.bin is missing on the server" in answer["error"]
