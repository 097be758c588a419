# SPDX-FileCopyrightText: the tritonlora authors
# SPDX-License-Identifier: Apache-2.0
"""What somebody else has put into /dev/shm before our models load, on a real tritonserver."""

from __future__ import annotations

import http.client
import stat
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from repositories import synthetic_repository
from synthetic import ask, expected
from tritonlora.launch.server import Server
from tritonlora.machine import SHARED_MEMORY
from tritonlora.repository import init
from tritonlora.repository.paths import Repository, read_table
from tritonlora.repository.undo import OURS
from tritonlora.serving import residency, server_process
from tritonlora.serving.residency import open_residency

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
    """Where the models will share what they learn; the name can be guessed from outside once the server runs."""
    namespace = Path("/proc/self/ns/pid").stat().st_ino
    name = f"{residency.PREFIX}{namespace}-{server_process.start_ticks(server.pid)}-{server.pid}-lora_router"
    path = SHARED_MEMORY / name
    yield path
    if path.is_symlink():
        path.unlink()
    elif path.stat().st_mode & stat.S_IWOTH:
        path.rmdir()


def load(server: Server, model: str) -> tuple[int, str]:
    """Status and answer of loading a model."""
    connection = http.client.HTTPConnection(server.http_url, timeout=60)
    connection.request("POST", f"/v2/repository/models/{model}/load", "{}")
    response = connection.getresponse()
    answer = response.status, response.read().decode()
    connection.close()
    return answer


@pytest.mark.parametrize("model", OURS)
def test_a_directory_that_others_can_write_to_keeps_a_model_from_loading(
    server: Server, shared: Path, model: str
) -> None:
    """Its links would be followed, and what the other instances believe would be his to choose."""
    shared.mkdir()
    shared.chmod(0o777)
    status, error = load(server, model)

    assert 400 == status
    assert f"SharedMemoryError: {shared} belongs to user" in error
    assert "with mode 777; expected user" in error
    assert [] == list(shared.iterdir())


@pytest.mark.parametrize("model", OURS)
def test_a_link_keeps_a_model_from_loading(server: Server, shared: Path, tmp_path: Path, model: str) -> None:
    """Wherever it leads."""
    open_residency(tmp_path / "victim", {3: 1}).abandon()  # it stays
    before = sorted(path.name for path in (tmp_path / "victim").rglob("*"))
    shared.symlink_to(tmp_path / "victim")
    status, error = load(server, model)

    assert 400 == status
    assert f"SharedMemoryError: {shared} is no directory that can be read" in error
    assert before == sorted(path.name for path in (tmp_path / "victim").rglob("*"))


def test_what_a_server_of_the_same_process_id_has_left_is_not_joined(
    server: Server, opened: Repository, shared: Path
) -> None:
    """It believes in what that one's engine was given, and would make the adapter unavailable. It goes."""
    [entry] = read_table(opened).entries.values()
    _, namespace, _, pid, router = shared.name.split("-")
    left = [
        SHARED_MEMORY / name
        for name in (f"tritonlora-{namespace}-1-{pid}-{router}", f"tritonlora-{namespace}-{pid}-{router}")
    ]
    for directory in left:
        open_residency(directory, {}, given={entry.lora_task_id: "another content"}).abandon()
    for model in (*OURS, "ensemble"):
        assert (200, "") == load(server, model)

    assert expected(read_table(opened), "pirate") == ask(server, "pirate")
    assert [False, False, True] == [directory.exists() for directory in (*left, shared)]
