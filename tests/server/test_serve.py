# SPDX-FileCopyrightText: the tritonlora authors
# SPDX-License-Identifier: Apache-2.0
"""`tritonlora serve` and `generate`, as processes, on a real tritonserver."""

from __future__ import annotations

import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest

from repositories import synthetic_repository
from tritonlora.server import Ports, free_ports

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
    """Ready on stdout, the server's log on stderr, and an end in order."""
    ports = free_ports()
    processes.append(start(repo, ports))
    serving = processes[0]
    assert serving.stdout is not None
    ready = serving.stdout.readline()
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
    assert (0, "[2]hello\n") == (asked.returncode, asked.stdout)
    assert len(family) >= 5, "tritonserver and the stubs of four models"
    assert 130 == serving.returncode
    assert "Started HTTPService" in log
    assert [] == psutil.wait_procs(family, timeout=10)[1]


def test_serve_names_the_reason_when_the_server_does_not_start(
    repo: Path, processes: list[subprocess.Popen[str]]
) -> None:
    """An argument that tritonserver does not know, passed on after --."""
    processes.append(start(repo, free_ports(), "--", "--no-such-option"))
    out, err = processes[0].communicate(timeout=60)

    assert (1, "") == (processes[0].returncode, out)
    assert "before it was ready" in err
    assert "no-such-option" in err
