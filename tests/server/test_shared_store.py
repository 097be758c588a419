# SPDX-FileCopyrightText: the tritonlora authors
# SPDX-License-Identifier: Apache-2.0
"""Several tritonservers on one model repository: what a command does there, every one of them follows.

The second server reaches the repository under another path, as another machine's mount of the same file system would
be. A synthetic answer repeats "[<lora_task_id>]" and the prompt, so that it says which adapter gave it.
"""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from itertools import product
from pathlib import Path
from threading import Event

import pytest

from repositories import synthetic_adapter, synthetic_repository
from tritonlora.errors import ServerError
from tritonlora.launch import client
from tritonlora.launch.server import Server
from tritonlora.repository import add as register
from tritonlora.repository import registry
from tritonlora.repository.paths import Repository, read_table
from tritonlora.serving.shares import choose

PROMPT = "hello"
TOKENS = 24


@pytest.fixture(scope="module")
def opened(tmp_path_factory: pytest.TempPathFactory) -> Repository:
    """One warm adapter, and answers that take a quarter of a second."""
    root = tmp_path_factory.mktemp("store") / "repo"
    return synthetic_repository(root, warm=["pirate"], parameters={"synthetic_token_seconds": "0.01"})


@pytest.fixture(scope="module")
def servers(opened: Repository, launch: Callable[..., Server]) -> list[Server]:
    """Two servers on it, each by a path of its own."""
    mount = opened.root.parent / "mount"
    mount.symlink_to(opened.root)
    return [launch(opened.root), launch(mount)]


def ask(server: Server, lora_name: str, **inputs: str) -> str:
    """A streamed answer."""
    url = server.http_url
    return "".join(client.generate(PROMPT, lora_name=lora_name, max_tokens=TOKENS, inputs=inputs, url=url))


def expected(opened: Repository, lora_name: str) -> str:
    """What the synthetic engine answers for the adapter that has the name now."""
    return (f"[{read_table(opened).entries[lora_name].lora_task_id}]{PROMPT}" * TOKENS)[:TOKENS]


def run(opened: Repository, *words: object) -> None:
    """A command of tritonlora, in a process of its own."""
    command = [sys.executable, "-m", "tritonlora", *map(str, words), "--repo", str(opened.root)]
    subprocess.run(command, check=True, capture_output=True)


def test_every_server_answers_by_the_name_of_an_adapter_that_was_added_once(
    opened: Repository, servers: list[Server], tmp_path: Path
) -> None:
    """With requests under way on both while it is added, none of which is disturbed."""
    added = Event()

    def keep_asking(server: Server) -> set[str]:
        answers = set()
        while not added.is_set():
            answers.add(ask(server, "pirate"))
        return answers

    with ThreadPoolExecutor(len(servers)) as pool:
        meanwhile = [pool.submit(keep_asking, server) for server in servers]
        try:
            for server in servers:
                with pytest.raises(ServerError, match="unknown LoRA adapter 'haiku'; available: pirate"):
                    ask(server, "haiku")
            run(opened, "add", "haiku", synthetic_adapter(tmp_path / "haiku", 1))
        finally:
            added.set()

    assert [expected(opened, "haiku")] * 2 == [ask(server, "haiku") for server in servers]
    assert [{expected(opened, "pirate")}] * 2 == [answers.result() for answers in meanwhile]


def test_every_server_follows_a_replacement_and_a_removal(
    opened: Repository, servers: list[Server], tmp_path: Path
) -> None:
    """New content under a known name has a new id; a name that is gone is an error everywhere."""
    register.add(opened, "poet", synthetic_adapter(tmp_path / "first", 2))
    before = expected(opened, "poet")
    first = [ask(server, "poet") for server in servers]
    register.add(opened, "poet", synthetic_adapter(tmp_path / "second", 3))
    after = expected(opened, "poet")
    second = [ask(server, "poet") for server in servers]
    registry.remove(opened, "poet")

    assert [before] * 2 == first
    assert [after] * 2 == second
    assert before != after
    for server in servers:
        with pytest.raises(ServerError, match="unknown LoRA adapter 'poet'"):
            ask(server, "poet")


def test_adapters_that_two_commands_add_at_once_are_both_there(
    opened: Repository, servers: list[Server], tmp_path: Path
) -> None:
    """The repository's lock makes one wait for the other, so that each has an id of its own."""
    adapters = {name: synthetic_adapter(tmp_path / name, seed) for name, seed in (("bard", 4), ("json", 5))}
    with ThreadPoolExecutor(len(adapters)) as pool:
        list(pool.map(lambda name: run(opened, "add", name, adapters[name]), adapters))
    asked = list(product(servers, adapters))

    assert len({read_table(opened).entries[name].lora_task_id for name in adapters}) == 2
    assert [expected(opened, name) for _, name in asked] == [ask(server, name) for server, name in asked]


def test_every_server_follows_a_sync_and_an_alias_and_so_does_one_that_starts_anew(
    opened: Repository, servers: list[Server], launch: Callable[..., Server], tmp_path: Path
) -> None:
    """A user gets the same adapter from each of them, until an alias leads all users back."""
    keys = [f"user-{number}" for number in range(6)]

    def ask_all(server: Server) -> list[str]:
        with ThreadPoolExecutor(len(keys)) as pool:
            return [*pool.map(lambda key: ask(server, "prod", lora_split_key=key), keys)]

    for name, seed in (("v3", 6), ("v4", 7)):
        synthetic_adapter(tmp_path / name, seed)
    file = tmp_path / "desired.yaml"
    file.write_text("adapters:\n  v3: v3\n  v4: {source: v4, warm: false}\naliases:\n  prod: {v3: 50, v4: 50}\n")
    run(opened, "sync", file)
    shares = read_table(opened).aliases["prod"]
    wanted = [expected(opened, choose(shares, key.encode())) for key in keys]

    assert 2 == len({*wanted})
    for server in servers:
        assert wanted == ask_all(server)
    servers[0].stop()
    servers[0] = launch(opened.root)
    assert wanted == ask_all(servers[0])
    run(opened, "alias", "prod", "v3")
    for server in servers:
        assert [expected(opened, "v3")] * len(keys) == ask_all(server)
