# SPDX-FileCopyrightText: the tritonlora authors
# SPDX-License-Identifier: Apache-2.0
"""The route benchmark on a real tritonserver, as small as it gets: what it measures is what it says."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import psutil
import pytest

from tritonlora.bench import clients, load, mix, openai, scratch
from tritonlora.bench.clients import Clients
from tritonlora.bench.load import Way
from tritonlora.bench.route import Options, run
from tritonlora.bench.route.processes import taken
from tritonlora.errors import ServerError
from tritonlora.launch.server import Server
from tritonlora.repository.init import ENSEMBLE
from tritonlora.repository.paths import ROUTER

SMALL = Options(rounds=1, instances=1, streams=2, tokens=4, requests=100, token_seconds=0.005, seconds=1.0)
BODY = {"input_ids": [104, 105], "input_lengths": 2, "request_output_len": 5, "streaming": True}


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory, launch: Callable[..., Server]) -> Server:
    """Two adapters, two instances of the router and of the pass-through model."""
    return launch(scratch.small_adapters(tmp_path_factory.mktemp("bench") / "repo", 2, streams=2).root)


def test_every_way_streams_the_same_answers(server: Server) -> None:
    """Each of two streams at a time gets a token at a time, and its first before its last."""
    ways = {
        "direct": Way("tensorrt_llm", [BODY | {"lora_task_id": 1}], 5),
        "pass-through": Way(scratch.PASS_THROUGH, [BODY | {"lora_task_id": 1}], 5),
        "forward": Way(ROUTER, [BODY | {"lora_name": "n1"}], 5),
        "resolve": Way(scratch.PAST_ROUTER, [BODY | {"lora_name": "n1"}], 5),
    }
    times = load.ask(server.http_url, ways, rounds=3, streams=2, discarded=1)

    assert [(6, 6, 3)] * 4 == [(len(one.first), len(one.whole), len(one.rounds)) for one in times.values()]
    assert all(0 < min(one.first) < max(one.whole) <= max(one.rounds) for one in times.values())


@pytest.mark.parametrize(
    ("body", "answers", "message"),
    [
        (BODY | {"lora_name": "n3"}, 1, "unknown LoRA adapter 'n3'"),
        (BODY | {"lora_name": "n2"}, 9, "lora_router answered"),
    ],
    ids=["an error", "too few tokens"],
)
def test_a_stream_that_is_not_what_it_should_be_is_not_measured(
    server: Server, body: dict[str, object], answers: int, message: str
) -> None:
    """An error is quick to stream, and would look like a good time."""
    with pytest.raises(ServerError, match=message):
        load.ask(server.http_url, {"forward": Way(ROUTER, [body], answers)}, rounds=1)


@pytest.mark.parametrize(("lora_name", "message"), [("n1", None), ("nobody", "unknown LoRA adapter 'nobody'")])
def test_clients_in_closed_loops_end_whatever_they_are_answered(
    server: Server, lora_name: str, message: str | None
) -> None:
    """With the time that they have, or with the answer after it. An error is counted, and is no answer."""
    asked = Clients(scratch.PAST_ROUTER, {lora_name: 1}, streams=4, tokens=3, think=0.0005, seconds=0.6, discarded=0.0)
    for _ in range(5):
        outcome = clients.ask(server.http_url, asked)

        assert (0, message is None) == (outcome.wrong, outcome.failed == 0)
        assert (message is None) == (outcome.requests > 0) == (outcome.errors == [])
        assert all(message in error for error in outcome.errors if message)


@pytest.mark.parametrize(
    ("mix", "options"),
    [("uniform", {}), ("cyclic", {"allowed": 64}), ("zipf", {"is_text": True, "model": ENSEMBLE}), ("sticky", {})],
)
def test_clients_send_so_many_requests_and_check_every_byte(server: Server, mix: str, options: dict[str, Any]) -> None:
    """A response that does not tell its adapter with every token would be wrong."""
    asked = Clients(scratch.PAST_ROUTER, {"n1": 1, "n2": 2}, streams=3, tokens=5, mix=mix, requests=20, discarded=0.0)
    outcome = clients.ask(server.http_url, replace(asked, **options))

    assert (20, 20, 0, []) == (outcome.requests, len(outcome.first), outcome.faults, outcome.errors)


def test_a_response_of_another_adapter_is_counted_and_told(server: Server) -> None:
    """It is no request that was served."""
    asked = Clients(scratch.PAST_ROUTER, {"n1": 2}, streams=1, tokens=8, requests=3, discarded=0.0)
    outcome = clients.ask(server.http_url, asked)

    assert (0, 3, 0) == (outcome.requests, outcome.wrong, outcome.failed)
    assert all("expected b'[2]" in error and "is b'[1]" in error for error in outcome.errors)


def test_processes_of_all_models_are_measured_after_load_through_them(server: Server) -> None:
    """One resolver; memory of each model but the engine's; shared memory of at least one region for each process."""
    found = taken(server, 2, streams=6)
    ours = {"lora_adapters", "lora_resolver", "lora_router", "postprocessing", "preprocessing"}
    compared = {scratch.PASS_THROUGH, scratch.TAKER}

    assert ours | compared == {*found.few} == {*found.many}
    assert (1, 0) == (found.resolvers, found.faults)
    assert min(*found.few.values(), *found.many.values()) > 1 << 20
    assert found.shared > found.engine_shared > 0


@pytest.mark.parametrize("name", ["ttft", "tokens", "memory", "streams"])
def test_each_part_gives_values_and_ratios(name: str) -> None:
    """Whatever they are at this size."""
    (part,) = run([name], SMALL)

    assert name == part.name
    assert all(one.p50 > 0 for one in part.series if not one.name.startswith("added"))
    assert {"ttft": 2, "tokens": 2, "memory": 2, "streams": 5}[name] == len(part.ratios)


def test_the_door_is_measured_beside_the_server() -> None:
    """Whatever the values are at this size: each part has its series."""
    parts = openai.run(openai.Options(streams=2, tokens=4, rounds=1, requests=3, token_seconds=0.005))
    ratios = [ratio.name for part in parts for ratio in part.ratios]

    assert [("streams", 2), ("first", 3), ("burst", 3), ("client", 2), ("profile", 0)] == [
        (part.name, len(part.series)) for part in parts
    ]
    assert all(one.p50 > 0 for part in parts for one in part.series if one.name != "added")
    assert ["tokens per second of door / direct", "ms that the door adds"] == ratios
    assert all("µs" in note for note in parts[-1].notes)
    assert parts[-1].notes


def test_a_mix_of_load_is_judged_and_its_processes_are_sampled() -> None:
    """In three ways, while adapters come and go: no wrong response, and no error without a reason."""
    part, is_sound = mix.run(
        mix.Options(
            adapters=12,
            pages=4,
            clients=15,
            seconds=3.0,
            tokens=8,
            think=0.05,
            token_seconds=0.005,
            leavers=0.2,
            change_seconds=0.3,
        )
    )
    sizes = {note.partition(":")[0] for note in part.notes[1:] if "open files" in note}

    assert is_sound, part.notes
    assert ["first token, grpc", "first token, http", "first token, openai"] == [one.name for one in part.series]
    assert {"tritonserver", "lora_resolver", "tensorrt_llm", "openai"} <= sizes
    assert int(part.notes[0].split()[0]) > 15


def test_an_evicted_adapter_takes_longer_than_a_resident_one() -> None:
    """Otherwise nothing was evicted; 66 MB are enough to see it."""
    (part,) = run(["recovery"], Options(rounds=1, rank=8))
    evicted, resident, copy, _ = part.series

    assert evicted.p50 > resident.p50 + copy.p50 / 2 > 0


def test_ctrl_c_leaves_nothing_behind(tmp_path: Path) -> None:
    """No process, and no scratch directory."""
    command = [sys.executable, "-m", "tritonlora", "bench", "route", "--part", "ttft"]
    bench = subprocess.Popen(command, env=os.environ | {"TMPDIR": str(tmp_path)}, stderr=subprocess.PIPE)
    try:
        deadline = time.monotonic() + 60
        while not (found := psutil.Process(bench.pid).children(recursive=True)):
            assert time.monotonic() < deadline
            time.sleep(0.05)
        bench.send_signal(signal.SIGINT)
        _, errors = bench.communicate(timeout=60)
    finally:
        bench.kill()

    assert (130, []) == (bench.returncode, list(tmp_path.glob("tritonlora-bench-*")))
    assert b"interrupted" in errors
    assert [] == [process for process in found if _is_alive(process)]


def _is_alive(process: psutil.Process) -> bool:
    """A zombie has ended: whoever reaps orphans here may take its time."""
    try:
        return process.status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False
