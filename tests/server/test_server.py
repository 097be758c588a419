# SPDX-FileCopyrightText: the tritonlora authors
# SPDX-License-Identifier: Apache-2.0
"""server.py against the real tritonserver."""

from __future__ import annotations

import contextlib
import http.client
import os
import shlex
import signal
import socket
import subprocess
import time
from pathlib import Path
from typing import Any

import psutil
import pytest

from tritonlora import machine
from tritonlora.errors import ServerError
from tritonlora.launch import server as server_module
from tritonlora.launch.server import Server
from tritonlora.launch.tritonserver import Tritonserver, find_tritonserver
from tritonlora.machine import SHARED_MEMORY, Ports, free_ports, ports_in_use

CONFIG = """
backend: "python"
max_batch_size: 0
input [ { name: "x" data_type: TYPE_INT32 dims: [ 1 ] } ]
output [ { name: "y" data_type: TYPE_INT32 dims: [ 1 ] } ]
instance_group [ { count: 1 kind: KIND_CPU } ]
"""
ECHO = """
import triton_python_backend_utils as pb_utils
class TritonPythonModel:
    def execute(self, requests):
        return [
            pb_utils.InferenceResponse([pb_utils.Tensor("y", pb_utils.get_input_tensor_by_name(r, "x").as_numpy() + 1)])
            for r in requests
        ]
"""
BROKEN = """
class TritonPythonModel:
    def initialize(self, args):
        raise RuntimeError("the flux capacitor is empty")
"""


def _model(repository: Path, name: str, code: str) -> Path:
    version = repository / name / "1"
    version.mkdir(parents=True)
    (repository / name / "config.pbtxt").write_text(CONFIG)
    (version / "model.py").write_text(code)
    return repository


def _group(pid: int) -> list[psutil.Process]:
    return [p for p in psutil.process_iter() if _in_group(p, pid)]


def _survivors(pid: int) -> list[psutil.Process]:
    """Those of the group that do not end: who was killed is there for another moment, its files closed already."""
    _, alive = psutil.wait_procs(_group(pid), timeout=0.5)
    return [process for process in alive if _in_group(process, pid)]


def _in_group(process: psutil.Process, pid: int) -> bool:
    try:
        return os.getpgid(process.pid) == pid and process.status() != psutil.STATUS_ZOMBIE
    except (ProcessLookupError, psutil.NoSuchProcess):
        return False


def test_a_ready_server_answers_on_its_ports_and_leaves_nothing_behind(tmp_path: Path) -> None:
    """The whole life of a server."""
    with Server(_model(tmp_path, "echo", ECHO)) as server:
        server.wait_until_ready(60)
        connection = http.client.HTTPConnection(server.http_url, timeout=10)
        body = '{"inputs":[{"name":"x","datatype":"INT32","shape":[1],"data":[7]}]}'
        connection.request("POST", "/v2/models/echo/infer", body)
        answer = connection.getresponse().read().decode()
        connection.close()
        regions = list(SHARED_MEMORY.glob(f"{server._regions.name}*"))
        assert len(_group(server.pid)) >= 2, "tritonserver and one stub"

    assert '"data":[8]' in answer
    assert regions
    assert [] == _survivors(server.pid)
    assert [] == list(SHARED_MEMORY.glob(f"{server._regions.name}*"))
    server.stop()  # a second time is harmless


def test_servers_have_shared_memory_of_their_own(tmp_path: Path) -> None:
    """Also in containers that share it, where each is process 1 and listens on port 8000."""
    ports = free_ports()
    commands = [Server(_model(tmp_path / name, "echo", ECHO), ports=ports).command for name in "ab"]

    assert 2 == len({word for command in commands for word in command if "shm-region-prefix-name" in word})


def test_a_server_listens_at_an_ipv6_address(tmp_path: Path) -> None:
    """All its endpoints."""
    with Server(_model(tmp_path, "echo", ECHO), address="::1") as server:
        server.wait_until_ready(60)
        urls = (server.http_url, server.grpc_url, server.metrics_url)
        for port in (server.ports.http, server.ports.grpc, server.ports.metrics):
            _connect("::1", port)

    assert [True] * 3 == [url.startswith("[::1]:") for url in urls]


def _connect(address: str, port: int) -> None:
    """tritonserver opens its endpoints one after the other, the metrics' after that which says that it is ready."""
    deadline = time.monotonic() + 10
    while True:
        try:
            socket.create_connection((address, port), timeout=10).close()
            return
        except ConnectionRefusedError:
            if time.monotonic() > deadline:
                raise


def test_a_model_that_fails_to_load_is_named_with_the_end_of_the_log(tmp_path: Path) -> None:
    """The user sees why, and no process stays."""
    with Server(_model(tmp_path, "broken", BROKEN)) as server:
        with pytest.raises(ServerError, match="(?s)exited with status 1 before it was ready.*flux capacitor"):
            server.wait_until_ready(60)

        assert [] == _survivors(server.pid)


def test_a_taken_port_is_reported(tmp_path: Path) -> None:
    """The server's own message about the port reaches the user."""
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        free = free_ports()
        ports = Ports(http=port, grpc=free.grpc, metrics=free.metrics)
        with (
            Server(_model(tmp_path, "echo", ECHO), ports=ports) as server,
            pytest.raises(ServerError, match=f"(?s)before it was ready.*{port}"),
        ):
            server.wait_until_ready(60)


@pytest.mark.parametrize("text", [None, "1024 65535", "2000 64000"], ids=["as it is", "all ports", "most ports"])
def test_free_ports_are_none_that_connections_get_where_there_are_others(
    text: str | None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """tritonserver takes them seconds later, and clients open connections all the time."""
    if text:
        (tmp_path / "range").write_text(text)
        monkeypatch.setattr(machine, "_CONNECTIONS_PORTS", tmp_path / "range")
    low, high = map(int, machine._CONNECTIONS_PORTS.read_text().split())
    ports = free_ports()
    found = {ports.http, ports.grpc, ports.metrics}

    assert 3 == len(found)
    assert [] == ports_in_use(ports, "127.0.0.1")
    assert text == "1024 65535" or not any(low <= port <= high for port in found)


def test_a_killed_server_leaves_no_stub_behind(tmp_path: Path) -> None:
    """SIGKILL on tritonserver orphans its stubs; stop() ends those too, that do not end by themselves."""
    with Server(_model(tmp_path, "echo", ECHO)) as server:
        server.wait_until_ready(60)
        stubs = [process for process in _group(server.pid) if process.pid != server.pid]
        for stub in stubs:
            stub.suspend()
        psutil.Process(server.pid).kill()
        server.wait()

    assert stubs
    assert [] == _survivors(server.pid)


@pytest.mark.parametrize("crashes", [1, 2])
def test_a_server_that_triton_s_known_crash_ends_is_launched_once_more(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, crashes: int
) -> None:
    """Each launch that crashes leaves a file, and a process in the server's group as stubs are."""
    real = find_tritonserver()
    executable = tmp_path / "bin" / "tritonserver"
    executable.parent.mkdir()
    executable.write_text(
        f"""#!/bin/bash
        if [ "$(ls {tmp_path}/bin | wc -l)" -le {crashes} ]; then
            touch {tmp_path}/bin/crash.$$
            sleep 60 &
            echo "terminate called after throwing an instance of 'boost::interprocess::lock_exception'"
            kill -ABRT $$
        fi
        export {shlex.join(f"{name}={value}" for name, value in real.environment.items())}
        exec {real.executable} {shlex.join(real.arguments)} "$@"
        """
    )
    executable.chmod(0o755)
    monkeypatch.setenv("PATH", f"{executable.parent}{os.pathsep}{os.environ['PATH']}")
    lines: list[str] = []
    with contextlib.ExitStack() as expected:
        if crashes == 2:
            expected.enter_context(pytest.raises(ServerError, match="exited with status -6 before it was ready"))
        with Server(_model(tmp_path / "models", "echo", ECHO), on_log=lines.append) as server:
            server.wait_until_ready(60)
            assert server.models() == {"echo": True}

    assert crashes == sum("terminate called" in line for line in lines)
    assert ["tritonlora starts it once more"] == [line.rpartition("; ")[2] for line in lines if "once more" in line]
    assert [] == [one for crash in executable.parent.glob("crash.*") for one in _survivors(int(crash.suffix[1:]))]


def test_a_server_that_does_not_end_in_time_is_killed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A process that is stopped hears no SIGTERM."""
    monkeypatch.setattr(server_module, "GRACE_SECONDS", 1)
    with Server(_model(tmp_path, "echo", ECHO), exit_timeout=0) as server:
        server.wait_until_ready(60)
        psutil.Process(server.pid).suspend()

    assert -signal.SIGKILL == server.wait()
    assert [] == _survivors(server.pid)


def test_ctrl_c_at_the_launch_leaves_nothing_behind(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Not even between the moment that the process is there and the one that we know its id."""
    launched: list[int] = []

    class InterruptedPopen(subprocess.Popen[str]):
        def __init__(self, *arguments: Any, **options: Any) -> None:
            super().__init__(*arguments, **options)
            launched.append(self.pid)
            signal.raise_signal(signal.SIGINT)

    monkeypatch.setattr(subprocess, "Popen", InterruptedPopen)
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        with pytest.raises(KeyboardInterrupt), Server(_model(tmp_path, "echo", ECHO)):
            pytest.fail("Ctrl-C was lost")
    finally:
        signal.signal(signal.SIGINT, before)

    assert [] == _survivors(launched[0])


def test_a_tritonserver_on_path_wins(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Inside a Triton container its own server is used, with nothing added."""
    executable = tmp_path / "tritonserver"
    executable.write_text("#!/bin/sh\n")
    executable.chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path))

    assert Tritonserver(executable) == find_tritonserver()


def test_no_tritonserver_at_all_is_an_error_with_the_remedy(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Neither PATH nor the wheel."""
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)

    with pytest.raises(ServerError, match=r"pip install 'tritonlora\[server\]'"):
        find_tritonserver()


def test_the_embedded_tritonserver_refuses_numpy_2(monkeypatch: pytest.MonkeyPatch) -> None:
    """Under numpy 2 its Python backend answers with empty tensors, so it must not even start."""
    monkeypatch.setenv("PATH", "")
    monkeypatch.setattr("importlib.metadata.version", lambda name: "2.4.6")

    with pytest.raises(ServerError, match="needs numpy 1, and numpy 2.4.6 is installed"):
        find_tritonserver()
