# SPDX-FileCopyrightText: the tritonlora authors
# SPDX-License-Identifier: Apache-2.0
"""The router on a real tritonserver, in front of the CPU engine in synthetic mode; test_protocols.py has its table.

A synthetic answer repeats "[<lora_task_id>]" (or "[base]") and the prompt, so that it says which adapter gave it.
"""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
from tritonclient.grpc import InferRequestedOutput

from asking import Question, grpc_stream, tokens_in
from repositories import synthetic_adapter, synthetic_repository
from synthetic import PROMPT, ask, expected, post
from tritonlora.errors import ServerError
from tritonlora.launch import client
from tritonlora.launch.server import Server
from tritonlora.repository import add, registry
from tritonlora.repository.paths import Repository, read_table

WARM = ("pirate", "haiku")
COLD = tuple(f"cold{number}" for number in range(6))
PAGES = 3
QUESTION = tokens_in(Question(tokens=[3]), streams=True)

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


def test_multi_byte_characters_are_streamed_whole(server: Server) -> None:
    """Pieces join to the text of the whole answer, and no piece has half a character."""
    prompt = "naïve 日本 🎉"
    pieces = list(client.generate(prompt, max_tokens=60, url=server.http_url))
    _, answer = post(server, "/v2/models/ensemble/generate", {"text_input": prompt, "max_tokens": 60})

    assert answer["text_output"] == "".join(pieces)
    assert len(pieces) > 10
    assert not any("\ufffd" in piece for piece in pieces[:-1])


def test_who_names_no_outputs_gets_what_the_engine_gives(server: Server) -> None:
    """Nothing of the router's own, which would cost each token a tensor."""
    direct, routed = (list(grpc_stream(server, model, QUESTION)) for model in ("tensorrt_llm", "lora_router"))

    assert 3 == len(direct)
    np.testing.assert_equal(routed, direct)


def test_who_names_previous_ids_gets_them(server: Server) -> None:
    """The tokens that came before, and at the end once more, without new ones."""
    outputs = [InferRequestedOutput(name) for name in ("output_ids", "previous_ids")]
    answers = list(grpc_stream(server, "lora_router", QUESTION, outputs=outputs))
    tokens = [answer["output_ids"].reshape(-1).tolist() for answer in answers]
    first, second, third, _ = tokens

    assert [1, 1, 1, 0] == [len(new) for new in tokens]
    assert [[], first, first + second, first + second + third] == [
        answer["previous_ids"][0].tolist() for answer in answers
    ]


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


# Changes while serving


def test_adapters_come_and_go_without_a_restart(tmp_path: Path, launch: Launch) -> None:
    """The next request sees the table as it is on disk."""
    opened = synthetic_repository(tmp_path / "repo", warm=WARM)
    server = launch(opened.root)
    add.add(opened, "new", synthetic_adapter(tmp_path / "new", 9))

    assert expected(read_table(opened), "new") == ask(server, "new")

    before = read_table(opened).entries["new"].lora_task_id
    add.add(opened, "new", synthetic_adapter(tmp_path / "newer", 10))

    assert before != read_table(opened).entries["new"].lora_task_id
    assert expected(read_table(opened), "new") == ask(server, "new")

    registry.remove(opened, "new")

    with pytest.raises(ServerError, match="unknown LoRA adapter 'new'; available: haiku, pirate"):
        ask(server, "new")


def test_a_damaged_table_leaves_the_last_good_one(tmp_path: Path, launch: Launch) -> None:
    """And says so in the server's log."""
    opened = synthetic_repository(tmp_path / "repo", warm=WARM)
    server = launch(opened.root)
    opened.table_path.write_text("{")

    assert [4, 4] == [len(ask(server, name, tokens=4)) for name in WARM]
    assert any("keeping the last good adapters.json" in line for line in server.log())
