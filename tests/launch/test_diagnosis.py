# SPDX-FileCopyrightText: the tritonlora authors
# SPDX-License-Identifier: Apache-2.0
"""serving.py and the command line of server.py, without a server; tests/server/test_serve.py has one."""

from __future__ import annotations

import json
import os
import signal
import socket
from collections.abc import Callable
from pathlib import Path

import pytest

from engine_configs import ENGINE
from repositories import synthetic_repository
from table import TABLE
from tritonlora.check.findings import Finding
from tritonlora.errors import ServerError
from tritonlora.launch import diagnosis
from tritonlora.launch.server import Server
from tritonlora.launch.tritonserver import Tritonserver, World, server_command
from tritonlora.machine import Ports, ports_in_use
from tritonlora.repository import init, paths, upkeep
from tritonlora.repository.paths import read_config
from tritonlora.serving.adapter_table import AdapterTable
from upstream_configs import upstream_repository


def test_an_engine_of_several_processes_is_started_as_upstream_starts_it() -> None:
    """TensorRT-LLM scripts/launch_triton_server.py --world_size 2: all but the first load the engine's model only.

    But for the addresses: upstream's listen on every interface.
    """
    server = [
        "/opt/tritonserver/bin/tritonserver",
        "--model-repository=/repo",
    ]
    ports = ["--grpc-port=8001", "--http-port=8000", "--metrics-port=8002", "--exit-timeout-secs=30"]
    end = ["--disable-auto-complete-config", *(f"--{kind}-address=127.0.0.1" for kind in ("http", "grpc", "metrics"))]
    end += ["--backend-config=python,shm-region-prefix-name={}", "--log-info=1", ":"]
    expected = [
        *("mpirun", "--allow-run-as-root"),
        *("-n", "1", *server, *ports, *(word.format("prefix0_") for word in end)),
        *("-n", "1", *server, "--model-control-mode=explicit", "--load-model=llama"),
        *(*ports, *(word.format("prefix1_") for word in end)),
    ]

    assert expected == server_command(
        Tritonserver(Path(server[0])), Path("/repo"), Ports(), extra=["--log-info=1"], world=World(2, "llama")
    )


@pytest.mark.parametrize(
    ("line", "extra"),
    [
        ("UNAVAILABLE: Internal: ModuleNotFoundError: No module named 'torch'", "convert"),
        ("tokenizer_dir needs the Python package transformers: No module named 'transformers'", "cpu"),
    ],
)
def test_a_server_that_lacks_an_extra_says_what_to_install(line: str, extra: str) -> None:
    """Of modules that no extra brings nothing is said."""
    said = diagnosis.explain(["I1130 loading", "No module named 'somebody_elses'", line], AdapterTable()) or ""

    assert said.endswith(f"remedy: pip install 'tritonlora[{extra}]'")
    assert diagnosis.explain(["No module named 'somebody_elses'"], AdapterTable()) is None


def test_an_engine_of_several_processes_needs_mpirun(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Refused before anything is started, with the place where it is."""
    monkeypatch.setattr("tritonlora.launch.tritonserver.MPIRUN", "no-such-mpirun")

    with pytest.raises(ServerError, match="has 4 processes, and there is no no-such-mpirun on PATH.*trtllm-python-py3"):
        Server(tmp_path, world=World(4))


def test_the_number_of_processes_is_the_engine_s(tmp_path: Path) -> None:
    """Tensor times pipeline parallel, of the engine at gpt_model_path; one where that is not known."""
    opened_root = upstream_repository(tmp_path / "repo", "v0.18.0")
    init.init(opened_root)
    opened = paths.open_repository(opened_root)

    def world(size: int | None = None) -> World:
        return diagnosis.world_of(opened, read_config(opened.config_path), size)

    assert World(1, "tensorrt_llm") == world()
    engine = tmp_path / "engine"
    engine.mkdir()
    pretrained = {**ENGINE["pretrained_config"], "mapping": {"world_size": 4, "tp_size": 2, "pp_size": 2}}
    (engine / "config.json").write_text(json.dumps({**ENGINE, "pretrained_config": pretrained}))
    upkeep.set_parameters(opened, {"gpt_model_path": str(engine)})
    assert World(4, "tensorrt_llm") == world()
    assert World(2, "tensorrt_llm") == world(2)
    (engine / "config.json").write_text("{")
    assert World(1, "tensorrt_llm") == world()


@pytest.mark.parametrize("family", [socket.AF_INET, socket.AF_INET6])
def test_ports_that_somebody_listens_on_are_found(family: socket.AddressFamily) -> None:
    """By number, and no others."""
    address = "::1" if family is socket.AF_INET6 else "127.0.0.1"
    with socket.socket(family) as taken, socket.socket(family) as free, socket.socket(family) as other:
        for one in (taken, free, other):
            one.bind((address, 0))
        for one in (taken, other):
            one.listen()
        ports = Ports(*(one.getsockname()[1] for one in (taken, free, other)))
        free.close()

        assert [ports.http, ports.metrics] == ports_in_use(ports, address)


def test_two_endpoints_with_one_port_are_refused() -> None:
    """tritonserver would load every model before it says so."""
    with pytest.raises(ServerError, match="a port of its own, got --http-port 1, --grpc-port 2, --metrics-port 1$"):
        Ports(1, 2, 1)
    with pytest.raises(ServerError, match="a port of its own, got .*, --metrics-port 3, --openai-port 3$"):
        Ports(1, 2, 3, 3)


def test_an_ipv6_address_is_spelt_as_each_endpoint_takes_it() -> None:
    """libevhtp, which answers HTTP and metrics, and gRPC."""
    command = server_command(Tritonserver(Path("tritonserver")), Path("/repo"), Ports(), address="::1")

    assert {"--http-address=ipv6:::1", "--grpc-address=[::1]", "--metrics-address=ipv6:::1"} <= set(command)


@pytest.fixture
def stand_in(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[[str], None]:
    """`stand_in(script)`: what is run in the place of tritonserver."""

    def put(script: str) -> None:
        executable = tmp_path / "bin" / "tritonserver"
        executable.parent.mkdir()
        executable.write_text(f"#!/bin/sh\n{script}\n")
        executable.chmod(0o755)
        monkeypatch.setenv("PATH", f"{executable.parent}:{os.environ['PATH']}")

    return put


@pytest.mark.parametrize("error", [BrokenPipeError(), OSError("no space left"), SystemExit(1)], ids=repr)
def test_who_listens_to_the_log_does_not_stop_the_server(
    stand_in: Callable[[str], None], tmp_path: Path, error: BaseException
) -> None:
    """It would die of SIGPIPE where nobody reads what it says."""
    stand_in("for line in a b c; do echo $line; sleep 0.1; done")
    heard = []

    def listen(line: str) -> None:
        heard.append(line)
        raise error

    with Server(tmp_path, on_log=listen) as server:
        assert 0 == server.wait()

    assert ["a", "b", "c"] == heard == server.log()


def test_a_failed_start_tells_who_listened_the_errors_alone(stand_in: Callable[[str], None], tmp_path: Path) -> None:
    """And who did not listen the end of the log."""
    stand_in("echo 'I1127 fine'; echo 'E1127 bad'; echo 'I1127 bye'; echo \"terminate called after throwing\"; exit 3")
    errors = []
    for listener in (print, None):
        with Server(tmp_path, on_log=listener) as server, pytest.raises(ServerError) as caught:
            server.wait_until_ready()
        errors.append(str(caught.value).partition("exited with status 3 before it was ready; ")[2])

    bad, end = "  | E1127 bad\n", "  | terminate called after throwing"
    assert [
        f"the errors in its log:\n{bad}{end}",
        f"the end of its log:\n  | I1127 fine\n{bad}  | I1127 bye\n{end}",
    ] == errors


def test_a_server_that_was_stopped_is_not_killed_again(
    stand_in: Callable[[str], None], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Once it has been reaped, its id may be that of another process group."""
    stand_in("exec sleep 60")
    killed: list[tuple[int, int]] = []
    monkeypatch.setattr("os.killpg", lambda *arguments: killed.append(arguments))
    with Server(tmp_path) as server:
        server.stop()

    assert [(server.pid, signal.SIGKILL)] == killed


FAILURES = {
    "a sample that the engine refused": (
        'backend_model.cc:692] "ERROR: Failed to create instance: failed to run warmup sample '
        "'lora_1_warmup': Executor failed process requestId 1 due to the following error: Invalid low_rank (8); "
        '"',
        "adapter 'pirate' could not be loaded: Executor failed process requestId 1 due to the following error: Invalid "
        "low_rank (8)\n"
        "  remedy: build the engine with a larger --max_lora_rank",
    ),
    "a sample whose adapter does not fit": (
        "| llm | 1 | UNAVAILABLE: Invalid argument: failed to run warmup sample 'lora_2_warmup': Error storing "
        "task=2 in PEFT cache -- Cache is full. There are no done tasks to evict;  |",
        "adapter 'haiku' could not be loaded: Error storing task=2 in PEFT cache -- Cache is full. There are no done "
        "tasks to evict\n  remedy: make the engine's LoRA cache larger: tritonlora plan --apply",
    ),
    "a file that is too short": (
        '"warmup setting expects 8192 bytes, but the data provided from adapter_model_2.binonly has 8187 bytes"',
        "adapter 'haiku' could not be loaded: warmup setting expects 8192 bytes, but the data provided from "
        "adapter_model_2.binonly has 8187 bytes\n"
        "  remedy: its file was cut; write it again: tritonlora add haiku ADAPTER_DIR",
    ),
    "a file in a directory with numbers": (
        "failed to open binary file for read /data/llama_2/v_12/tensorrt_llm/warmup/adapter_model_1.bin: No such file",
        "adapter 'pirate' could not be loaded: failed to open binary file for read "
        "/data/llama_2/v_12/tensorrt_llm/warmup/adapter_model_1.bin: No such file\n"
        "  remedy: its file is missing; write it again: tritonlora add pirate ADAPTER_DIR",
    ),
    "a file that is missing": (
        "ERROR: failed to open text file for read /repo/tensorrt_llm/warmup/lora_id_1: No such file or directory",
        "adapter 'pirate' could not be loaded: failed to open text file for read "
        "/repo/tensorrt_llm/warmup/lora_id_1: No such file or directory\n"
        "  remedy: its file is missing; write it again: tritonlora add pirate ADAPTER_DIR",
    ),
    "an error that nobody has seen before": (
        "failed to run warmup sample 'lora_1_warmup': the flux capacitor is empty;",
        "adapter 'pirate' could not be loaded: the flux capacitor is empty\n"
        "  remedy: tritonlora check may say why; without it the server starts: tritonlora remove pirate",
    ),
    "a path that the server does not see": (
        "[trtllm] Error generating request: lora_path does not exist on the Triton server's filesystem: "
        "/a_12/tensorrt_llm/warmup/adapter_1",
        "adapter 'pirate' could not be loaded: lora_path does not exist on the Triton server's filesystem: "
        "/a_12/tensorrt_llm/warmup/adapter_1\n"
        "  remedy: tritonlora check --fix; if the server sees it elsewhere, first init --served-at PATH",
    ),
    "an id that begins with that of another": (
        "failed to open text file for read /repo/tensorrt_llm/warmup/lora_id_12: No such file or directory",
        None,
    ),
    "a sample of the user's own": ("failed to run warmup sample 'mine': no;", None),
    "something else": ("error: creating server: Internal - failed to load all models", None),
}


@pytest.mark.parametrize("name", FAILURES)
def test_the_adapter_that_kept_the_server_from_starting_is_named(name: str) -> None:
    """With the engine's words and the remedy."""
    line, expected = FAILURES[name]

    assert expected == diagnosis.explain(["something before", line, "something after"], TABLE)


def test_a_server_that_is_not_there_verifies_nothing(tmp_path: Path) -> None:
    """Neither an adapter's answer nor a refusal."""
    opened = synthetic_repository(tmp_path / "repo", warm=["pirate"])
    table = paths.read_table(opened)
    problems = diagnosis.verify("127.0.0.1:9", opened, read_config(opened.config_path), table)

    assert "adapter 'pirate' does not answer: no answer from 127.0.0.1:9" in problems[0]
    assert (
        "lora_task_id 2147483647, which is not registered, was refused with another error than a cache miss: no answer"
        in problems[1]
    )


def test_what_check_calls_an_error_comes_with_its_remedy() -> None:
    """The first one; a warning keeps no server from starting."""
    warning = Finding("warning", "/dev/shm", "too small", "docker run --shm-size …")  # noqa: S108
    errors = [Finding("error", "adapter bard", f"it has {what}", "convert it for this engine") for what in ("a", "b")]

    assert diagnosis.first_error([warning]) is None
    assert "adapter bard: it has a\n  remedy: convert it for this engine" == diagnosis.first_error([warning, *errors])


@pytest.mark.parametrize(
    ("version", "notes"),
    [("2.51.0", 1), ("2.65.0", 1), ("2.66.0", 0), ("3.0.0", 0), ("2.100.1dev", 0), ("unheard of", 1), (None, 1)],
)
def test_what_a_version_does_wrong_is_said_of_that_version(tmp_path: Path, version: str | None, notes: int) -> None:
    """And of one that is not known, which may be older."""
    opened = synthetic_repository(tmp_path / "repo")
    config = opened.root / "postprocessing" / "config.pbtxt"
    config.write_text(config.read_text() + "dynamic_batching { }\n")
    (opened.root / "broken").mkdir()
    (opened.root / "broken" / "config.pbtxt").write_text('name: "')
    found = diagnosis.version_notes(opened, read_config(opened.config_path), version)

    assert [True] * notes == [
        "postprocessing/config.pbtxt: it has dynamic_batching: before 26.02" in one for one in found
    ]
    assert all(version is None or version in one for one in found)
