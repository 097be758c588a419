# SPDX-FileCopyrightText: the tritonlora authors
# SPDX-License-Identifier: Apache-2.0
"""Adapters and aliases that change while a real tritonserver answers requests for them.

The cache holds fewer adapters than are asked for, so that weights are sent all the time: also those of an adapter that
is replaced while requests for it are under way. A synthetic answer repeats "[<lora_task_id>]" and the prompt.
"""

from __future__ import annotations

import contextlib
import json
import queue
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import pytest
from tritonclient.grpc import InferRequestedOutput

from asking import Question, grpc_stream, tokens_in
from repositories import synthetic_adapter, synthetic_repository
from synthetic import await_sample, samples
from tritonlora.bench.processes import processes_of
from tritonlora.engine.traffic import parse_traffic
from tritonlora.errors import ServerError
from tritonlora.launch import client
from tritonlora.launch.server import Server
from tritonlora.repository import add, registry
from tritonlora.repository.paths import Repository, read_table
from tritonlora.serving.shares import choose

PROMPT = "hello"
TOKENS = 8
CLIENTS = 6
ANSWERS = 30  # to requests that begin after a change
SWITCHES = 6

OTHERS = ("pirate", "haiku")


@pytest.fixture(scope="module")
def opened(tmp_path_factory: pytest.TempPathFactory) -> Repository:
    """Two adapters, and a cache of two."""
    root = tmp_path_factory.mktemp("hot") / "repo"
    return synthetic_repository(root, cold=OTHERS, pages=2, parameters={"synthetic_token_seconds": "0.002"})


@pytest.fixture(scope="module")
def server(opened: Repository, launch: Callable[..., Server]) -> Server:
    """A server on it."""
    return launch(opened.root)


def ask(server: Server, lora_name: str, tokens: int = TOKENS, **inputs: str) -> Iterator[str]:
    """A streamed answer."""
    return client.generate(PROMPT, lora_name=lora_name, max_tokens=tokens, inputs=inputs, url=server.http_url)


def text_of(task_id: int, tokens: int = TOKENS) -> str:
    """What the adapter with this id answers."""
    return (f"[{task_id}]{PROMPT}" * tokens)[:tokens]


def task_id_of(opened: Repository, lora_name: str) -> int:
    """The id that the name has now."""
    return read_table(opened).entries[lora_name].lora_task_id


def loaded_or_not(server: Server) -> set[str]:
    """The adapters of which the metrics tell whether they are loaded."""
    return {dict(labels)["lora_name"] for name, labels in samples(server) if name == "lora_adapter_loaded"}


@dataclass(frozen=True)
class Answered:
    """One request and when it was under way."""

    lora_name: str
    text: str
    start: float
    end: float


@contextlib.contextmanager
def load(server: Server, names: Sequence[str]) -> Iterator[queue.Queue[Answered]]:
    """Clients that ask for the names in turn; an error of any of them is raised at the end."""
    answers: queue.Queue[Answered] = queue.Queue()
    stop = threading.Event()

    def keep_asking(first: int) -> None:
        number = first
        while not stop.is_set():
            name, start = names[number % len(names)], time.monotonic()
            answers.put(Answered(name, "".join(ask(server, name)), start, time.monotonic()))
            number += 1

    with ThreadPoolExecutor(CLIENTS) as pool:
        clients = [pool.submit(keep_asking, number) for number in range(CLIENTS)]
        try:
            yield answers
        finally:
            stop.set()
    for one in clients:
        one.result()


def take(answers: queue.Queue[Answered], count: int = ANSWERS) -> list[Answered]:
    """The answers up to the one with which `count` requests that began after now have been answered."""
    now, taken = time.monotonic(), list[Answered]()
    while count:
        taken.append(answers.get(timeout=60))
        count -= taken[-1].start > now
    return taken


def assert_switched(answers: Sequence[Answered], switches: Sequence[tuple[float, float, int]]) -> None:
    """Each answer is of an adapter that its name meant while it was under way.

    `switches`: (when the command began, when it had returned, the id from then on), in order.
    """
    ends = [*(returned for _, returned, _ in switches[1:]), float("inf")]
    for one in answers:
        possible = [
            text_of(task_id)
            for (began, _, task_id), end in zip(switches, ends, strict=True)
            if began <= one.end and one.start <= end
        ]
        assert one.text in possible


def test_an_adapter_is_replaced_under_load(server: Server, opened: Repository, tmp_path: Path) -> None:
    """No error; old or new while `add` runs, and only the new one to requests after it has returned."""
    add.add(opened, "swap", synthetic_adapter(tmp_path / "0", 100))
    switches = [(0.0, 0.0, task_id_of(opened, "swap"))]
    with load(server, ["swap", *OTHERS]) as answers:
        answered = take(answers)
        for seed in range(1, SWITCHES):
            adapter = synthetic_adapter(tmp_path / str(seed), 100 + seed)
            began = time.monotonic()
            add.add(opened, "swap", adapter)
            switches.append((began, time.monotonic(), task_id_of(opened, "swap")))
            answered += take(answers, ANSWERS * (seed % 2))  # two in quick succession, time and again
        answered += take(answers)

    assert_switched([one for one in answered if one.lora_name == "swap"], switches)
    assert {text_of(task_id_of(opened, name)) for name in OTHERS} == {
        one.text for one in answered if one.lora_name != "swap"
    }


def test_an_alias_is_switched_under_load(server: Server, opened: Repository) -> None:
    """Atomically, and back."""
    registry.alias(opened, "prod", "pirate")
    switches = [(0.0, 0.0, task_id_of(opened, "pirate"))]
    with load(server, ["prod", *OTHERS]) as answers:
        answered = take(answers)
        for number in range(1, SWITCHES):
            name = ("pirate", "haiku")[number % 2]
            began = time.monotonic()
            registry.alias(opened, "prod", name)
            switches.append((began, time.monotonic(), task_id_of(opened, name)))
            answered += take(answers)

    assert_switched([one for one in answered if one.lora_name == "prod"], switches)
    with pytest.raises(ServerError, match="unknown LoRA adapter 'nobody'; available: haiku, pirate, prod"):
        list(ask(server, "nobody"))


def test_an_alias_is_divided_by_the_key_and_led_back(server: Server, opened: Repository) -> None:
    """`lora_router` names the adapter that responds to who asks for its name; metrics count that adapter."""
    registry.alias(opened, "divided", {"pirate": 50, "haiku": 50})
    shares = read_table(opened).aliases["divided"]
    keys = [f"user-{number}" for number in range(6)]
    outputs = [InferRequestedOutput(name) for name in ("output_ids", "lora_name")]
    chosen = [choose(shares, key.encode()) for key in keys]
    texts = {name: text_of(task_id_of(opened, name)) for name in OTHERS}

    def named(key: str) -> set[bytes]:
        """The lora_name of each response."""
        inputs = tokens_in(Question([b"divided"], lora_split_key=[key.encode()], tokens=[2]), streams=True)
        return {
            response["lora_name"].item() for response in grpc_stream(server, "lora_router", inputs, outputs=outputs)
        }

    assert set(OTHERS) == set(chosen)
    assert [{name.encode()} for name in chosen] == [named(key) for key in keys]
    assert [texts[name] for name in chosen] == ["".join(ask(server, "divided", lora_split_key=key)) for key in keys]
    at_random: set[str] = set()
    while len(at_random) < len(OTHERS):
        at_random.add("".join(ask(server, "divided")))
    assert {*texts.values()} == at_random
    registry.alias(opened, "divided", "pirate")
    assert {texts["pirate"]} == {"".join(ask(server, "divided", lora_split_key=key)) for key in keys}
    await_sample(server, "lora_requests_total", lambda count: count > 0, lora_name="haiku", outcome="OK")
    assert not [labels for _, labels in samples(server) if ("lora_name", "divided") in labels]
    assert {*OTHERS} == parse_traffic(client.metrics(f"http://{server.metrics_url}/metrics"), OTHERS).keys()
    registry.remove(opened, "divided")


def test_adapters_come_and_go_under_load(server: Server, opened: Repository, tmp_path: Path) -> None:
    """The next request sees it; the other requests see nothing of it."""
    with load(server, OTHERS) as answers:
        for seed in range(SWITCHES):
            add.add(opened, "guest", synthetic_adapter(tmp_path / str(seed), 200 + seed))

            assert text_of(task_id_of(opened, "guest")) == "".join(ask(server, "guest"))

            registry.remove(opened, "guest")
            with pytest.raises(ServerError, match="unknown LoRA adapter 'guest'"):
                list(ask(server, "guest"))
        answered = take(answers)

    deadline = time.monotonic() + 30
    while loaded_or_not(server) != {*read_table(opened).entries}:  # nothing is told of an adapter that is gone
        assert time.monotonic() < deadline, loaded_or_not(server)
    assert all(one.text == text_of(task_id_of(opened, one.lora_name)) for one in answered)


def test_a_stream_goes_on_when_its_adapter_is_removed(server: Server, opened: Repository, tmp_path: Path) -> None:
    """It ends as it began."""
    add.add(opened, "leaver", synthetic_adapter(tmp_path / "leaver", 300))
    task_id = task_id_of(opened, "leaver")
    pieces = ask(server, "leaver", tokens=200)
    first = next(pieces)
    registry.remove(opened, "leaver")

    assert text_of(task_id, 200) == first + "".join(pieces)


def test_a_bad_entry_takes_nobody_with_it(server: Server, opened: Repository, tmp_path: Path) -> None:
    """Edited by hand while serving: that adapter is unavailable with a reason, and back when it is put right."""
    add.add(opened, "broken", synthetic_adapter(tmp_path / "broken", 400))
    before = opened.table_path.read_text()
    document = json.loads(before)
    document["adapters"]["broken"]["lora_weights_file"] = "/srv/secret.bin"
    with load(server, OTHERS) as answers:
        take(answers)
        opened.table_path.write_text(json.dumps(document))  # in place, as an editor would
        with pytest.raises(
            ServerError, match="'broken': its entry .* is malformed: 'lora_weights_file' must"
        ) as raised:
            list(ask(server, "broken"))
        answered = take(answers)
        opened.table_path.write_text(before)

        assert text_of(task_id_of(opened, "broken")) == "".join(ask(server, "broken"))
        answered += take(answers)

    assert "/srv" not in str(raised.value)
    assert all(one.text == text_of(task_id_of(opened, one.lora_name)) for one in answered)
    assert any("adapter 'broken': 'lora_weights_file' must be" in line for line in server.log())


def test_an_altered_file_is_not_served(server: Server, opened: Repository, tmp_path: Path) -> None:
    """Of the right size, with other weights in it."""
    add.add(opened, "altered", synthetic_adapter(tmp_path / "altered", 500), add.Options(warm=False))
    path = opened.root / read_table(opened).entries["altered"].lora_weights_file
    content = path.read_bytes()
    path.write_bytes(content[::-1])
    with pytest.raises(ServerError, match=r"'altered': adapter_model_\d+.bin was altered on the server"):
        list(ask(server, "altered"))
    path.write_bytes(content)

    assert text_of(task_id_of(opened, "altered")) == "".join(ask(server, "altered"))


def test_a_file_that_is_written_again_and_again_takes_nobody_down(
    server: Server, opened: Repository, tmp_path: Path
) -> None:
    """In place, as nobody should: its adapter is unavailable or right, and the router's processes live on."""
    add.add(opened, "cut", synthetic_adapter(tmp_path / "cut", 600), add.Options(warm=False))
    path = opened.root / read_table(opened).entries["cut"].lora_weights_file
    content, right, stop = path.read_bytes(), text_of(task_id_of(opened, "cut")), threading.Event()
    processes = processes_of(server.pid)["lora_router"]

    def keep_writing() -> None:
        while not stop.is_set():
            path.write_bytes(content[: len(content) // 2])
            path.write_bytes(content)
            stop.wait(0.002)

    writer = threading.Thread(target=keep_writing)
    writer.start()
    try:
        with load(server, OTHERS) as answers:
            outcomes = {_outcome(server, "cut") for _ in range(ANSWERS)}
            take(answers)
    finally:
        stop.set()
        writer.join()

    assert all(one == right or "LoRA adapter 'cut': adapter_model_" in one for one in outcomes)
    assert right == "".join(ask(server, "cut"))
    assert processes == processes_of(server.pid)["lora_router"]


def _outcome(server: Server, lora_name: str) -> str:
    try:
        return "".join(ask(server, lora_name))
    except ServerError as error:
        return str(error)
