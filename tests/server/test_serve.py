# SPDX-FileCopyrightText: the tritonlora authors
# SPDX-License-Identifier: Apache-2.0
"""`tritonlora serve` and `generate`, as processes, on a real tritonserver."""

from __future__ import annotations

import contextlib
import http.client
import re
import signal
import socket
import subprocess
import time
from pathlib import Path

import psutil
import pytest
import tritonclient.grpc
import tritonclient.utils

from repositories import synthetic_repository
from serving_process import TRITONLORA, start
from tritonlora.launch import client
from tritonlora.machine import SHARED_MEMORY, free_ports, ports_in_use
from tritonlora.repository import upkeep


@pytest.fixture(scope="module")
def repo(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A repository with a warm and a cold adapter."""
    return synthetic_repository(tmp_path_factory.mktemp("serve") / "repo", warm=["pirate"], cold=["haiku"]).root


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_serve_says_what_is_ready_and_leaves_no_process_behind(
    repo: Path, processes: list[subprocess.Popen[str]], number: signal.Signals
) -> None:
    """Ready and verified on stdout, the server's log on stderr, and an end in order."""
    ports = free_ports()
    processes.append(start(repo, ports, "--verify"))
    serving = processes[0]
    assert serving.stdout is not None
    ready, verified = serving.stdout.readline(), serving.stdout.readline()
    family = psutil.Process(serving.pid).children(recursive=True)
    asked = subprocess.run(
        [
            *TRITONLORA,
            "generate",
            "hello",
            "--lora-name",
            "haiku",
            "--max-tokens",
            "8",
            "--url",
            f"127.0.0.1:{ports.http}",
        ],
        capture_output=True,
        text=True,
        check=False,
    )
    serving.send_signal(number)
    _, log = serving.communicate(timeout=60)

    listening = f"listening at 127.0.0.1: http {ports.http}, grpc {ports.grpc}, metrics {ports.metrics}"
    assert f"ready on http://127.0.0.1:{ports.http} ({listening}); adapters loaded at start: pirate\n" == ready
    assert "verified: each of them answers, and an unregistered lora_task_id is refused\n" == verified
    assert (0, "[2]hello\n") == (asked.returncode, asked.stdout)
    assert len(family) >= 5, "tritonserver and the stubs of four models"
    assert (0 if number == signal.SIGTERM else 130) == serving.returncode
    assert "Started HTTPService" in log
    assert [] == psutil.wait_procs(family, timeout=10)[1]


@pytest.mark.parametrize("address", [None, "localhost", "0.0.0.0", "127.0.0.2"])  # noqa: S104
def test_serve_listens_where_it_says_and_nowhere_else(
    repo: Path, processes: list[subprocess.Popen[str]], address: str | None
) -> None:
    """With all of its endpoints; at this machine alone unless it is told otherwise."""
    ports = free_ports()
    processes.append(start(repo, ports, *(["--address", address] if address else [])))
    serving = processes[0]
    assert serving.stdout is not None
    ready = serving.stdout.readline()
    everything, nothing = {ports.http, ports.grpc, ports.metrics}, set[int]()
    where = {None: "127.0.0.1", "localhost": "127.0.0.1"}.get(address, address)
    deadline = time.monotonic() + 30
    while not _takes_connections(str(where), ports.metrics):  # which Triton opens last, when it is ready
        assert time.monotonic() < deadline
    open_at = {
        place: {number for number in everything if _takes_connections(place, number)}
        for place in ("127.0.0.1", "127.0.0.2", "127.0.0.3")
    }
    serving.send_signal(signal.SIGTERM)
    serving.communicate(timeout=60)

    assert f"(listening at {where}: http {ports.http}, grpc {ports.grpc}, metrics {ports.metrics})" in ready
    assert {
        place: everything if where in (place, "0.0.0.0") else nothing  # noqa: S104
        for place in ("127.0.0.1", "127.0.0.2", "127.0.0.3")
    } == open_at


@pytest.mark.parametrize(
    ("loads", "said"),
    [
        (["--load-model=ensemble"], "adapters loaded at start: pirate"),
        ([], "no adapter is loaded, as model 'tensorrt_llm' is not"),
    ],
)
def test_what_serve_says_in_explicit_mode_is_true(
    repo: Path, processes: list[subprocess.Popen[str]], loads: list[str], said: str
) -> None:
    """The ensemble forwards, so that it does not name the engine's model."""
    processes.append(start(repo, free_ports(), "--", "--model-control-mode=explicit", *loads))
    assert processes[0].stdout is not None

    assert processes[0].stdout.readline().endswith(f"; {said}\n")


def test_verify_says_what_to_load(repo: Path, processes: list[subprocess.Popen[str]]) -> None:
    """In explicit mode, where nothing is."""
    processes.append(start(repo, free_ports(), "--verify", "--", "--model-control-mode=explicit"))
    _, log = processes[0].communicate(timeout=120)

    assert 1 == processes[0].returncode
    assert "model 'tensorrt_llm' is not loaded, so no adapter answers; load it with: tritonlora serve --" in log


RESTRICTED = ("systemsharedmemory/status", "repository/index", "trace/setting", "logging", "models/lora_router/config")


def test_what_the_docs_say_closes_the_endpoints_that_are_not_for_clients(
    repo: Path, processes: list[subprocess.Popen[str]]
) -> None:
    """Without the header they are forbidden, and models can be asked."""
    page = (Path(__file__).parents[2] / "plugin" / "docs" / "operations.md").read_text()
    options = re.findall(r"--(?:http|grpc)-restricted-\S+=SECRET", page)
    assert 2 == len(options)
    ports = free_ports()
    processes.append(start(repo, ports, "--", *options))
    assert processes[0].stdout is not None
    processes[0].stdout.readline()

    def status(path: str, **headers: str) -> int:
        connection = http.client.HTTPConnection("127.0.0.1", ports.http, timeout=10)
        with contextlib.closing(connection):
            connection.request("POST" if path == "repository/index" else "GET", f"/v2/{path}", headers=headers)
            return connection.getresponse().status

    with tritonclient.grpc.InferenceServerClient(f"127.0.0.1:{ports.grpc}") as grpc:
        for ask in (grpc.get_system_shared_memory_status, grpc.get_model_repository_index):
            with pytest.raises(tritonclient.utils.InferenceServerException, match="restricted"):
                ask()
    assert dict.fromkeys(RESTRICTED, 403) == {path: status(path) for path in RESTRICTED}
    assert dict.fromkeys(RESTRICTED, 200) == {path: status(path, **{"admin-key": "SECRET"}) for path in RESTRICTED}
    asked = client.generate("hello", lora_name="haiku", max_tokens=8, url=f"127.0.0.1:{ports.http}")
    assert "[2]hello" == "".join(asked)


def _takes_connections(address: str, port: int) -> bool:
    with contextlib.suppress(ConnectionRefusedError), socket.create_connection((address, port), timeout=10):
        return True
    return False


def is_stub(process: psutil.Process) -> bool:
    """Of the Python backend; others that are started while models load end at once."""
    with contextlib.suppress(psutil.Error):
        return bool(process.name().startswith("triton_python"))
    return False


@pytest.mark.parametrize("ready", [True, False])
def test_serve_that_is_killed_leaves_nothing_behind(
    repo: Path, processes: list[subprocess.Popen[str]], ready: bool
) -> None:
    """By the kernel, say, when memory is short: tritonserver and its stubs end, also those that are still loading."""
    ports = free_ports()
    processes.append(start(repo, ports))
    serving = processes[0]
    assert serving.stdout is not None
    if ready:
        assert "ready on" in serving.stdout.readline()
    deadline, family = time.monotonic() + 60, list[psutil.Process]()
    while not any(is_stub(one) for one in family):
        assert time.monotonic() < deadline
        family = psutil.Process(serving.pid).children(recursive=True)
    words = [word for one in psutil.Process(serving.pid).children() for word in one.cmdline()]
    [prefix] = re.findall(r"shm-region-prefix-name=(\w+)", " ".join(words))
    assert any(SHARED_MEMORY.glob(f"{prefix}*"))
    serving.kill()
    _, left = psutil.wait_procs(family, timeout=60)
    for one in left:
        one.kill()

    assert [] == left
    assert [] == ports_in_use(ports)
    assert [] == list(SHARED_MEMORY.glob(f"{prefix}*"))


def test_serve_names_the_reason_when_the_server_does_not_start(
    repo: Path, processes: list[subprocess.Popen[str]]
) -> None:
    """An argument that tritonserver does not know, passed on after --."""
    processes.append(start(repo, free_ports(), "--", "--no-such-option"))
    out, err = processes[0].communicate(timeout=60)

    assert (1, "") == (processes[0].returncode, out)
    assert "before it was ready" in err
    assert 1 == err.count("'--no-such-option'"), "said twice"


@pytest.mark.parametrize(
    ("parameters", "problem"),
    [
        (
            {"lora_target_modules": "none"},
            "'tensorrt_llm' answered lora_task_id 2147483647, which is not registered: it ignores adapters",
        ),
        (
            {"lora_cache_host_memory_bytes": "36864"},
            "adapter 'bard' does not answer: .* task 1 not found in cache.*; its cache is too small: tritonlora plan",
        ),
        (
            {"max_lora_rank": "4"},
            # In the engine's words, or, where Triton 2.51 crashes before it has logged them, in those of `check`.
            "adapter 'bard' could not be loaded: .*Invalid low_rank .8.*remedy: build the engine with a larger"
            "|adapter bard: it has rank 8, and the engine's max_lora_rank is 4\n +remedy: convert it for this engine",
        ),
    ],
    ids=["an engine without LoRA", "a cache that is too small", "an engine that refuses an adapter"],
)
def test_serve_ends_when_an_adapter_does_not_answer(
    tmp_path: Path, processes: list[subprocess.Popen[str]], parameters: dict[str, str], problem: str
) -> None:
    """Exit code 1, the adapter named with the remedy, and no process behind."""
    opened = synthetic_repository(tmp_path / "repo", warm=["bard", "pirate"])
    upkeep.set_parameters(opened, parameters)
    processes.append(start(opened.root, free_ports(), "--verify"))
    out, err = processes[0].communicate(timeout=60)

    assert (1, "") == (processes[0].returncode, out)
    assert re.search(problem, err, re.DOTALL)


@pytest.mark.parametrize("is_batched", [True, False])
def test_serve_says_what_its_triton_does_wrong(
    tmp_path: Path, processes: list[subprocess.Popen[str]], is_batched: bool
) -> None:
    """Once, with the server's own version: 2.51 keeps what clients have left, where streams meet dynamic_batching."""
    root = synthetic_repository(tmp_path / "repo").root
    config = root / "postprocessing" / "config.pbtxt"
    if is_batched:
        config.write_text(config.read_text() + "dynamic_batching { }\n")
    processes.append(start(root, free_ports()))
    assert processes[0].stdout is not None
    assert "ready on" in processes[0].stdout.readline()
    processes[0].terminate()
    _, err = processes[0].communicate(timeout=60)

    notes = re.findall("^note: .*$", err, re.MULTILINE)
    assert [True] * is_batched == [
        note.startswith(
            "note: postprocessing/config.pbtxt: it has dynamic_batching: before 26.02, Triton never lets go"
        )
        and "this server is Triton 2.51.0; take dynamic_batching out of it" in note
        for note in notes
    ]
