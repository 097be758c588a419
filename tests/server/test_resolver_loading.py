# SPDX-FileCopyrightText: the tritonlora authors
# SPDX-License-Identifier: Apache-2.0
"""What somebody else has put into /dev/shm before the resolver loads, and how it is loaded, on a real tritonserver."""

from __future__ import annotations

import http.client
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from asking import ROUTER, Question, Way
from repositories import synthetic_repository
from synthetic import ask, control, expected
from tritonlora.launch.server import Server
from tritonlora.machine import SHARED_MEMORY
from tritonlora.repository import init
from tritonlora.repository.paths import Repository, read_table
from tritonlora.repository.undo import OURS
from tritonlora.serving import server_process

OTHERS = ("tensorrt_llm", "preprocessing", "postprocessing")
EXPLICIT = ("--model-control-mode=explicit", *(f"--load-model={model}" for model in OTHERS))


@pytest.fixture(scope="module")
def opened(tmp_path_factory: pytest.TempPathFactory) -> Repository:
    """One adapter."""
    opened = synthetic_repository(tmp_path_factory.mktemp("shared") / "repo", cold=["pirate"], streams=1)
    init.init(opened.root, topology="resolve")
    return opened


@pytest.fixture(scope="module")
def server(opened: Repository, launch: Callable[..., Server]) -> Server:
    """A server that has loaded none of our models yet."""
    return launch(opened.root, extra=EXPLICIT)


@pytest.fixture
def shared(server: Server) -> Iterator[Path]:
    """The resolver's file; the name can be guessed from outside once the server runs."""
    namespace = Path("/proc/self/ns/pid").stat().st_ino
    name = f"tritonlora-{namespace}-{server_process.start_ticks(server.pid)}-{server.pid}-lora_resolver"
    path = SHARED_MEMORY / name
    yield path
    path.unlink()


def load(server: Server, model: str) -> tuple[int, str]:
    """Status and answer of loading a model."""
    connection = http.client.HTTPConnection(server.http_url, timeout=60)
    connection.request("POST", f"/v2/repository/models/{model}/load", "{}")
    response = connection.getresponse()
    answer = response.status, response.read().decode()
    connection.close()
    return answer


def test_a_file_that_others_can_write_to_keeps_the_resolver_from_loading(server: Server, shared: Path) -> None:
    """What the engine holds would be theirs to say."""
    shared.write_text("")
    shared.chmod(0o666)
    status, error = load(server, "lora_resolver")

    assert 400 == status
    assert f"SharedMemoryError: {shared} belongs to user" in error
    assert "with mode 666; expected a file of user" in error


def test_a_link_keeps_the_resolver_from_loading(server: Server, shared: Path, tmp_path: Path) -> None:
    """Wherever it leads."""
    (tmp_path / "victim").write_text("as it was")
    shared.symlink_to(tmp_path / "victim")
    status, error = load(server, "lora_resolver")

    assert 400 == status
    assert f"SharedMemoryError: {shared} cannot be read and written" in error
    assert "as it was" == (tmp_path / "victim").read_text()


def test_what_a_server_of_the_same_process_id_has_left_is_not_read(
    server: Server, opened: Repository, shared: Path
) -> None:
    """It says what that one's engine was given, and would make the adapter unavailable. It goes."""
    [entry] = read_table(opened).entries.values()
    _, namespace, _, pid, model = shared.name.split("-")
    left = SHARED_MEMORY / f"tritonlora-{namespace}-1-{pid}-{model}"
    left.write_text(f"{entry.lora_task_id} another\n")
    left.chmod(0o600)
    for one in (*OURS, "ensemble"):
        assert (200, "") == load(server, one)

    assert expected(read_table(opened), "pirate") == ask(server, "pirate")
    assert [False, True] == [left.exists(), shared.exists()]


def test_the_router_brings_the_resolver_along(server: Server, opened: Repository, shared: Path) -> None:
    """Where models are loaded when they are asked to be; also when the resolver has been unloaded since."""
    way = Way("grpc_stream", ROUTER, streams=True)
    answers = []
    for _ in range(2):
        for verb, model in (("load", "lora_router"), ("unload", "ensemble"), ("unload", "lora_resolver")):
            control(server, verb, model)
        await_unloaded(server, "lora_resolver")
        answers.append(way.ask(server, Question([b"pirate"])))

    assert [(expected(read_table(opened), "pirate", tokens=12),)] * 2 == answers
    assert shared.exists()


def await_unloaded(server: Server, model: str) -> None:
    """Until Triton, which unloads in the background, has done so."""
    deadline = time.monotonic() + 60
    while is_ready(server, model):
        assert time.monotonic() < deadline


def is_ready(server: Server, model: str) -> bool:
    """As Triton says."""
    connection = http.client.HTTPConnection(server.http_url, timeout=60)
    connection.request("GET", f"/v2/models/{model}/ready")
    status = connection.getresponse().status
    connection.close()
    return status == 200
