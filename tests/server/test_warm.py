# SPDX-FileCopyrightText: the tritonlora authors
# SPDX-License-Identifier: Apache-2.0
"""`tritonlora warm` and pinned adapters, on a real tritonserver before an engine whose cache has eight pages."""

from __future__ import annotations

import json
import time
from collections.abc import Callable

import psutil
import pytest

from asking import ENGINE, Question, Refusal, ways
from repositories import register_copies, set_cache_full_timeout, synthetic_repository
from synthetic import EXPLICIT, ask, await_sample, control, expected, listing, samples
from tritonlora.cli import commands
from tritonlora.launch import client
from tritonlora.launch.server import Server
from tritonlora.repository import registry
from tritonlora.repository.paths import Repository, read_table
from tritonlora.serving.listing import HELD

PAGES = 8
OTHERS = [f"n{number}" for number in range(200)]


@pytest.fixture(scope="module")
def opened(tmp_path_factory: pytest.TempPathFactory) -> Repository:
    """Adapters that nothing loads at start."""
    opened = synthetic_repository(
        tmp_path_factory.mktemp("warm") / "repo",
        cold=["pirate", "haiku"],
        pages=PAGES,
        topology="resolve",
        parameters={"synthetic_token_seconds": "0.002"},
        streams=1,
    )
    register_copies(opened, OTHERS)
    registry.alias(opened, "prod", {"pirate": 50, "haiku": 50})
    set_cache_full_timeout(opened, 1)
    return opened


@pytest.fixture(scope="module")
def server(opened: Repository, launch: Callable[..., Server]) -> Server:
    return launch(opened.root, extra=EXPLICIT)


@pytest.fixture
def warm(server: Server, capsys: pytest.CaptureFixture[str]) -> Callable[..., tuple[int, str, str]]:
    """Run the command: its exit code, stdout and stderr."""

    def run(*words: str) -> tuple[int, str, str]:
        code = commands.main(["warm", *words, "--url", server.http_url])
        return (code, *capsys.readouterr())

    return run


def is_held(server: Server, opened: Repository, name: str) -> bool:
    """Whether the engine itself has the adapter: asked by id alone, it answers only then."""
    [engine] = [way for way in ways([ENGINE], decoupled=False) if way.protocol == "grpc_stream"]
    answer = engine.ask(server, Question(lora_task_id=[read_table(opened).entries[name].lora_task_id], tokens=[1]))
    assert not isinstance(answer, Refusal) or "not found in cache" in answer.message
    return not isinstance(answer, Refusal)


def await_held(server: Server, opened: Repository, name: str) -> None:
    deadline = time.monotonic() + 30
    while not is_held(server, opened, name):
        assert time.monotonic() < deadline


def test_an_adapter_is_loaded_before_its_first_request(
    warm: Callable[..., tuple[int, str, str]], server: Server, opened: Repository
) -> None:
    """It counts as a load, and as no request. The second time it is there already."""
    assert not is_held(server, opened, "haiku")
    code, out, _ = warm("haiku")
    assert (0, "loaded") == (code, listing(server)["haiku"]["state"])
    assert out.startswith("haiku loaded (")
    assert is_held(server, opened, "haiku")
    code, out, _ = warm("haiku", "--json")

    assert (0, "held") == (code, json.loads(out)["warmed"][0]["result"])
    await_sample(server, "lora_loads_total", lambda n: n == 1, lora_name="haiku", reason="first_use")
    assert not any(value for (name, _), value in samples(server).items() if name == "lora_requests_total")
    assert expected(read_table(opened), "haiku") == ask(server, "haiku")


def test_a_name_that_cannot_be_loaded_does_not_stop_the_others(
    warm: Callable[..., tuple[int, str, str]], opened: Repository
) -> None:
    """An unknown name, an illegal one, and an adapter without its file. An alias stands for all of its adapters."""
    weights = opened.root / read_table(opened).entries["pirate"].lora_weights_file
    weights.rename(hidden := weights.with_name("hidden"))
    code, out, _ = warm("nobody", "./repo", "prod")
    hidden.rename(weights)

    assert 1 == code
    nobody, repo, *both = out.splitlines()
    haiku, pirate = sorted(both)
    assert "nobody not loaded: unknown LoRA adapter 'nobody'; available: haiku, n0" in nobody
    assert "'./repo' is not a legal adapter name" in repo
    assert haiku.startswith("haiku was there already (")
    assert "is missing on the server" in pirate


def test_time_is_bounded(warm: Callable[..., tuple[int, str, str]]) -> None:
    """For all adapters together."""
    code, out, _ = warm("haiku", "n9", "--timeout", "0")

    assert 1 == code
    assert [
        "haiku not loaded: not asked: 0 s are over; raise --timeout",
        "n9 not loaded: not asked: 0 s are over; raise --timeout",
    ] == out.splitlines()


def test_a_pinned_adapter_is_loaded_and_stays_while_200_others_are_asked_for(
    server: Server, opened: Repository, capsys: pytest.CaptureFixture[str]
) -> None:
    """Nobody asks for it. An engine that is loaded again gets it again; unpinned, it goes."""
    assert 0 == commands.main(["warm", "pirate", "--pin", "--repo", str(opened.root)])
    assert capsys.readouterr().out == "pirate pinned: 1 page of the engine's cache\n"
    await_held(server, opened, "pirate")
    for name in OTHERS:
        assert expected(read_table(opened), name, tokens=2) == ask(server, name, tokens=2)
    assert is_held(server, opened, "pirate")
    assert [True, "loaded"] == [listing(server)["pirate"][key] for key in ("pinned", "state")]
    await_sample(server, "lora_loads_total", lambda n: n == 1, lora_name="pirate", reason="first_use")

    for verb in ("unload", "load"):
        control(server, verb)
    assert not is_held(server, opened, "pirate")
    ask(server, "n0")
    await_held(server, opened, "pirate")

    assert 0 == commands.main(["warm", "pirate", "--unpin", "--repo", str(opened.root)])
    deadline = time.monotonic() + 30
    while is_held(server, opened, "pirate"):  # until the resolver has read the table again
        assert time.monotonic() < deadline
        for name in OTHERS[:10]:
            ask(server, name, tokens=2)
    assert listing(server)["pirate"]["state"] not in HELD


def test_a_killed_resolver_leaves_no_gauge_to_the_next_one(server: Server, opened: Repository) -> None:
    """Triton keeps its series, and the next resolver believes nothing yet. Counters go on."""
    asked = {"lora_name": "haiku", "outcome": "OK"}
    before = await_sample(server, "lora_requests_total", lambda _: True, **asked)
    ask(server, "haiku")
    await_sample(server, "lora_requests_total", lambda n: n == before + 1, **asked)
    rank = str(max(read_table(opened).entries["haiku"].adapter_sizes))
    await_sample(server, "lora_adapter_loaded", lambda n: n == 1, lora_name="haiku", rank=rank, pinned="false")
    [resolver] = [one for one in psutil.Process(server.pid).children() if "/lora_resolver/1/" in "".join(one.cmdline())]
    resolver.kill()
    for verb in ("unload", "load"):
        control(server, verb, "lora_resolver")
    ask(server, "haiku")
    await_sample(server, "lora_requests_total", lambda n: n == before + 2, **asked)
    found = samples(server)

    assert 1 == sum(value for (name, _), value in found.items() if name == "lora_adapter_loaded")
    assert (1, PAGES) == tuple(found[name, ()] for name in ("lora_cache_pages_used", "lora_cache_pages"))


def test_adapters_that_went_for_later_ones_are_named(
    warm: Callable[..., tuple[int, str, str]], server: Server, opened: Repository
) -> None:
    """Ten of them do not fit eight pages: some are gone, and what counts as loaded is there.

    The test asks the engine itself here, which changes what it evicts next: later tests ask for other adapters.
    """
    code, out, _ = warm(*OTHERS[:10], "--json")
    results = {one["name"]: one["result"] for one in json.loads(out)["warmed"]}
    held = {name: is_held(server, opened, name) for name in OTHERS[:10]}

    assert (1, "loaded") == (code, results["n9"])
    assert {"loaded", "evicted"} == {*results.values()}
    assert all(held[name] for name, result in results.items() if result == "loaded")


def test_where_every_page_is_in_use_it_says_so(warm: Callable[..., tuple[int, str, str]], server: Server) -> None:
    """After the time that a request would wait."""
    streams = [
        client.generate("hello", lora_name=name, max_tokens=2000, url=server.http_url)
        for name in OTHERS[20 : 20 + PAGES]
    ]
    for stream in streams:
        next(stream)
    code, out, _ = warm("haiku")

    assert 1 == code
    assert "haiku not loaded: LoRA adapter 'haiku': it does not fit beside the adapters in use; waited 1 s" in out
