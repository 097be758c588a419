# SPDX-FileCopyrightText: the tritonlora authors
# SPDX-License-Identifier: Apache-2.0
"""`tritonlora serve` and `generate`, as processes, on a real tritonserver."""

from __future__ import annotations

import contextlib
import re
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import psutil
import pytest

from repositories import synthetic_repository
from tritonlora import register
from tritonlora.server import SHARED_MEMORY, Ports, free_ports, ports_in_use

TRITONLORA = (sys.executable, "-m", "tritonlora")


def start(repo: Path, ports: Ports, *extra: str) -> subprocess.Popen[str]:
    """`tritonlora serve` in the background."""
    options = ["--http-port", ports.http, "--grpc-port", ports.grpc, "--metrics-port", ports.metrics]
    command = [*TRITONLORA, "serve", "--repo", str(repo), "--address", "127.0.0.1", *map(str, options), *extra]
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


@pytest.fixture(scope="module")
def repo(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A repository with a warm and a cold adapter."""
    return synthetic_repository(tmp_path_factory.mktemp("serve") / "repo", warm=["pirate"], cold=["haiku"]).root


@pytest.fixture
def processes() -> Iterator[list[subprocess.Popen[str]]]:
    """Processes to end, whatever the test did."""
    started: list[subprocess.Popen[str]] = []
    yield started
    for process in started:
        process.kill()
        process.communicate()


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

    assert f"ready on http://127.0.0.1:{ports.http}; adapters loaded at start: pirate\n" == ready
    assert "verified: each of them answers, and an unregistered lora_task_id is refused\n" == verified
    assert (0, "[2]hello\n") == (asked.returncode, asked.stdout)
    assert len(family) >= 5, "tritonserver and the stubs of four models"
    assert (0 if number == signal.SIGTERM else 130) == serving.returncode
    assert "Started HTTPService" in log
    assert [] == psutil.wait_procs(family, timeout=10)[1]


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
            "'tensorrt_llm' answered lora_task_id 2147483647, which nobody registered: it ignores adapters",
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
    register.set_parameters(opened, parameters)
    processes.append(start(opened.root, free_ports(), "--verify"))
    out, err = processes[0].communicate(timeout=60)

    assert (1, "") == (processes[0].returncode, out)
    assert re.search(problem, err, re.DOTALL)


def test_serve_names_the_port_that_is_taken(repo: Path, processes: list[subprocess.Popen[str]]) -> None:
    """Before anything is started."""
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        ports = replace(free_ports(), grpc=taken.getsockname()[1])
        processes.append(start(repo, ports))
        out, err = processes[0].communicate(timeout=60)

    assert (1, "") == (processes[0].returncode, out)
    assert f"error: in use already: port {ports.grpc}; choose others with --http-port and so on\n" == err
