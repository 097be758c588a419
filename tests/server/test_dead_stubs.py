# SPDX-FileCopyrightText: the tritonlora authors
# SPDX-License-Identifier: Apache-2.0
"""`tritonlora serve` when a process of one of its models dies, and when it ends because a client unloads the model."""

from __future__ import annotations

import contextlib
import http.client
import os
import re
import signal
import subprocess
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import psutil
import pytest

import tritonlora
from repositories import resolving, synthetic_repository
from serving_process import start
from tritonlora.errors import ServerError
from tritonlora.launch import client
from tritonlora.machine import Ports, free_ports
from tritonlora.repository.paths import Repository

END_SECONDS = 60
EXPLICIT = ("--", "--model-control-mode=explicit", "--load-model=*")


class Serving:
    """A `tritonlora serve`, and its stderr."""

    def __init__(self, repo: Path, processes: list[subprocess.Popen[str]], *extra: str) -> None:
        """Start it, and wait until it is ready or has ended."""
        self.ports: Ports = free_ports()
        self.process = start(repo, self.ports, *extra)
        processes.append(self.process)
        self._lines: list[str] = []
        self._more = threading.Condition()
        reader = threading.Thread(target=self._read, daemon=True)
        reader.start()
        assert self.process.stdout is not None
        self.is_ready = "ready on" in self.process.stdout.readline()
        if not self.is_ready:
            reader.join(END_SECONDS)
            return
        [self.server] = (one for one in psutil.Process(self.process.pid).children() if one.name() == "tritonserver")

    def _read(self) -> None:
        assert self.process.stderr is not None
        for line in self.process.stderr:
            with self._more:
                self._lines.append(line)
                self._more.notify_all()

    def wait_for(self, pattern: str) -> str:
        """The line of stderr that matches."""
        with self._more:
            assert self._more.wait_for(lambda: self.lines(pattern), END_SECONDS), "".join(self._lines)
            return self.lines(pattern)[0]

    def lines(self, pattern: str) -> list[str]:
        """The lines of stderr that match."""
        return [line for line in self._lines if re.search(pattern, line)]

    def stubs(self, model: str) -> list[psutil.Process]:
        """The processes that run a model, by their command lines."""
        found = []
        for one in self.server.children():
            with contextlib.suppress(psutil.Error):
                if f"/{model}/1/model.py" in " ".join(one.cmdline()):
                    found.append(one)
        return found

    def post(self, path: str) -> int:
        """The status of the response to an empty POST."""
        connection = http.client.HTTPConnection("127.0.0.1", self.ports.http, timeout=END_SECONDS)
        with contextlib.closing(connection):
            connection.request("POST", path, b"{}")
            return connection.getresponse().status

    def ask(self) -> str:
        """The text that adapter pirate gives."""
        url = f"127.0.0.1:{self.ports.http}"
        return "".join(client.generate("hello", lora_name="pirate", max_tokens=8, url=url, timeout=END_SECONDS))


def serve(repo: Path, processes: list[subprocess.Popen[str]], *extra: str) -> Serving:
    """A `tritonlora serve` that is ready."""
    serving = Serving(repo, processes, *extra)
    assert serving.is_ready, serving.lines("")
    return serving


@contextlib.contextmanager
def a_waiting_request(serving: Serving, stub: psutil.Process) -> Iterator[None]:
    """A request that has come to a stub which does nothing with it. It ends in an error, or with the server."""
    stub.suspend()
    was_asked = threading.Event()

    def ask() -> None:
        connection = http.client.HTTPConnection("127.0.0.1", serving.ports.http, timeout=END_SECONDS)
        with contextlib.closing(connection), contextlib.suppress(OSError, http.client.HTTPException):
            body = client.request_body("hello", "pirate", 8, {"stream": True})
            connection.request("POST", "/v2/models/ensemble/generate_stream", body)
            was_asked.set()
            connection.getresponse().read()

    asking = threading.Thread(target=ask, daemon=True)
    asking.start()
    assert was_asked.wait(END_SECONDS)
    yield
    asking.join(END_SECONDS)
    assert not asking.is_alive()


@pytest.fixture(scope="module")
def opened(tmp_path_factory: pytest.TempPathFactory) -> Repository:
    """A repository whose tokens go through the router, which has four instances."""
    return synthetic_repository(tmp_path_factory.mktemp("dead-stubs") / "repo", warm=["pirate"])


@pytest.fixture(scope="module")
def resolved(tmp_path_factory: pytest.TempPathFactory) -> Repository:
    """A repository whose tokens go past the router."""
    return resolving(tmp_path_factory.mktemp("dead-stubs-resolve") / "repo", ["pirate"], [], pages=100)


@pytest.mark.parametrize(
    ("topology", "model", "number"),
    [
        ("resolve", "lora_resolver", signal.SIGKILL),
        ("forward", "postprocessing", signal.SIGSEGV),
        ("forward", "lora_router", signal.SIGKILL),
    ],
)
def test_serve_ends_when_a_model_s_process_was_killed(
    opened: Repository,
    resolved: Repository,
    processes: list[subprocess.Popen[str]],
    topology: str,
    model: str,
    number: signal.Signals,
) -> None:
    """Under a request that waits in it, also when it is one of several; the message says which, how, and what to do."""
    serving = serve({"forward": opened, "resolve": resolved}[topology].root, processes)
    stub = serving.stubs(model)[0]
    with a_waiting_request(serving, stub):
        stub.send_signal(number)
        stub.send_signal(signal.SIGCONT)
        assert 1 == serving.process.wait(END_SECONDS)

    assert serving.wait_for(
        rf"^error: the process of model '{model}' \({model}_0_\d, pid {stub.pid}\) was killed by {number.name}\b.*"
        "; the server was ended: start it again with tritonlora serve\n$"
    )
    assert not serving.server.is_running()


def test_a_python_user_is_told_of_a_dead_process(opened: Repository) -> None:
    """`tritonlora.serve` stops the server; `wait` and the end of the `with` block give the reason."""
    with contextlib.ExitStack() as stack:
        server = stack.enter_context(tritonlora.serve(opened))
        server.wait_until_ready(END_SECONDS)
        stubs = [one for one in psutil.Process(server.pid).children() if "/lora_adapters/" in " ".join(one.cmdline())]
        stubs[0].kill()
        assert server.ends(END_SECONDS)

        death = (
            rf"'lora_adapters' \(lora_adapters_0_0, pid {stubs[0].pid}\) was killed by SIGKILL.*; the server was ended"
        )
        with pytest.raises(ServerError, match=death):
            server.wait()
        with pytest.raises(ServerError, match=death):
            stack.close()
    assert not psutil.pid_exists(server.pid)


def test_serve_keeps_the_server_if_it_is_told_to(opened: Repository, processes: list[subprocess.Popen[str]]) -> None:
    """It says so once for each process, and what the other processes can do is done."""
    serving = serve(opened.root, processes, "--keep-going")
    for model in ("lora_adapters", "lora_router"):
        stub = serving.stubs(model)[-1]
        stub.kill()
        serving.wait_for(rf"^note: the process of model '{model}' .*pid {stub.pid}\) was killed by SIGKILL")
        if model == "lora_adapters":
            assert "[1]hello" == serving.ask()

    assert serving.process.poll() is None
    assert 2 == len(serving.lines("^note: the process of model"))


def _wait_until(is_so: Callable[[], bool]) -> None:
    deadline = time.monotonic() + END_SECONDS
    while not is_so():
        assert time.monotonic() < deadline


@pytest.mark.parametrize("model", ["lora_adapters", "lora_router"])
def test_serve_loads_a_model_again_where_the_server_lets_it(
    opened: Repository, processes: list[subprocess.Popen[str]], model: str
) -> None:
    """Explicit model-control mode: all its instances are there, and requests are answered, as often as it dies."""
    serving = serve(opened.root, processes, *EXPLICIT)
    count = len(serving.stubs(model))
    for _ in range(2):
        stub = serving.stubs(model)[0]
        stub.kill()
        serving.wait_for(
            rf"^note: the process of model '{model}' .*pid {stub.pid}\) was .*; the model was loaded again"
        )

        _wait_until(lambda: count == len(serving.stubs(model)))  # the others of before end, too
        assert "[1]hello" == serving.ask()
        assert {"pirate"} == set(client.adapters(f"127.0.0.1:{serving.ports.http}"))
    assert serving.process.poll() is None


def test_serve_ends_when_a_model_cannot_be_loaded_again(tmp_path: Path, processes: list[subprocess.Popen[str]]) -> None:
    """Its code was damaged meanwhile."""
    root = synthetic_repository(tmp_path / "repo", warm=["pirate"]).root
    serving = serve(root, processes, *EXPLICIT)
    (root / "lora_adapters" / "1" / "model.py").write_text("raise RuntimeError('the flux capacitor is empty')\n")
    serving.stubs("lora_adapters")[0].kill()

    assert 1 == serving.process.wait(END_SECONDS)
    assert serving.wait_for(r"^error: the process of model 'lora_adapters' .* the server was ended")


def test_what_a_client_unloads_on_purpose_is_no_death(
    opened: Repository, processes: list[subprocess.Popen[str]]
) -> None:
    """Nor what it loads again: with the same instances, with fewer, which ends two, and after it was unloaded."""
    serving = serve(opened.root, processes, *EXPLICIT)
    router = "/v2/repository/models/lora_router"
    config = opened.root / "lora_router" / "config.pbtxt"
    text = config.read_text()

    try:
        before = serving.stubs("lora_router")
        assert 200 == serving.post(f"{router}/load")
        config.write_text(text.replace("count: 4", "count: 2"))
        assert 200 == serving.post(f"{router}/load")
        _wait_until(lambda: 2 == len(serving.stubs("lora_router")))
        assert "[1]hello" == serving.ask()
        assert 200 == serving.post(f"{router}/unload")
        assert [] == psutil.wait_procs(before, timeout=END_SECONDS)[1]
        with pytest.raises(ServerError):
            serving.ask()
        assert 200 == serving.post(f"{router}/load")
        assert "[1]hello" == serving.ask()
    finally:
        config.write_text(text)
    # A death after all this is noticed: so all this was looked at.
    stub = serving.stubs("lora_adapters")[0]
    os.kill(stub.pid, signal.SIGKILL)
    serving.wait_for(r"^note: the process of model 'lora_adapters' .*; the model was loaded again")

    assert [] == serving.lines("model 'lora_router'")
    assert serving.process.poll() is None
