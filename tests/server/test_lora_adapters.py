# SPDX-FileCopyrightText: the tritonlora authors
# SPDX-License-Identifier: Apache-2.0
"""lora_adapters on a real tritonserver: the listing, and the metrics as Prometheus reads them."""

from __future__ import annotations

import json
import shutil
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

import pytest
from tritonclient.utils import InferenceServerException

from asking import ENGINE, Question, Refusal, ways
from monitoring import metric_names
from repositories import forget_cache_pages, synthetic_repository
from synthetic import await_sample, listing, samples
from tritonlora import exposition
from tritonlora.cli import commands
from tritonlora.errors import ServerError
from tritonlora.files import write_text
from tritonlora.launch import client
from tritonlora.launch.server import Server
from tritonlora.repository.paths import Repository, read_table
from tritonlora.serving.adapter_table_json import render
from tritonlora.serving.counters import RESULTS

Launch = Callable[..., Server]


@pytest.fixture(scope="module")
def opened(tmp_path_factory: pytest.TempPathFactory) -> Repository:
    """A warm adapter and three cold ones, and a slow engine whose cache holds one."""
    root = tmp_path_factory.mktemp("listing") / "repo"
    return synthetic_repository(
        root,
        warm=["pirate"],
        cold=["haiku", "gone", "counted"],
        pages=1,
        parameters={"synthetic_token_seconds": "0.01"},
    )


@pytest.fixture(scope="module")
def server(opened: Repository, launch: Launch) -> Server:
    """A server on it, of whose adapters one has lost its weights."""
    (opened.root / read_table(opened).entries["gone"].lora_weights_file).unlink()
    return launch(opened.root)


def is_held(server: Server, task_id: int) -> bool:
    """Whether the engine itself has the adapter: asked by id alone, it answers only then."""
    [engine] = [way for way in ways([ENGINE], decoupled=False) if way.protocol == "grpc_stream"]
    answer = engine.ask(server, Question(lora_task_id=[task_id], tokens=[1]))
    assert not isinstance(answer, Refusal) or "not found in cache" in answer.message
    return not isinstance(answer, Refusal)


def ask(server: Server, lora_name: str | None, tokens: int = 4) -> Iterator[str]:
    """A streamed answer."""
    return client.generate("hello", lora_name=lora_name, max_tokens=tokens, url=server.http_url)


def test_the_listing_says_in_which_state_each_adapter_is(server: Server) -> None:
    """Loaded once somebody has asked for it, and cold again when it was evicted for another."""
    assert {"pirate": "warm", "haiku": "cold", "gone": "unavailable", "counted": "cold"} == {
        name: about["state"] for name, about in listing(server).items()
    }

    "".join(ask(server, "haiku"))
    with pytest.raises(ServerError, match="is missing on the server"):
        "".join(ask(server, "gone"))
    found = listing(server)

    assert "loaded" == found["haiku"]["state"]
    assert "is missing on the server" in found["gone"]["reason"]

    "".join(ask(server, "pirate"))  # a miss, which tells the router that it was evicted

    assert "warm" == listing(server)["pirate"]["state"]


@pytest.mark.parametrize("is_told", [True, False])
def test_what_is_listed_as_held_is_held(tmp_path: Path, launch: Launch, is_told: bool) -> None:
    """Four warm adapters and four cold ones in a cache of three, right after the start and later.

    Who knows how large the cache is lists all that the engine holds; who does not, the one that was used last.
    """
    names = [f"n{number}" for number in range(8)]
    opened = synthetic_repository(tmp_path / "repo", warm=names[:4], cold=names[4:], pages=3)
    if not is_told:
        forget_cache_pages(opened)
    table = read_table(opened)
    for asked in ([], [*names, *names[2:5], names[6]]):
        server = launch(opened.root)
        for name in asked:
            "".join(ask(server, name))
        states = {name: about["state"] for name, about in listing(server).items()}
        listed = {name for name, state in states.items() if state in ("warm", "loaded")}
        held = {name for name in names if is_held(server, table.entries[name].lora_task_id)}
        server.stop(0)

        assert 3 == len(held)
        assert (held if is_told else {asked[-1] if asked else names[3]}) == listed
        assert is_told != ("unknown" in states.values())
        assert {"warm", "loaded", "unknown", "cold"} >= {*states.values()}


def test_the_listing_has_shapes_and_ids(server: Server, opened: Repository) -> None:
    """What a client may want to know, and no path of the server."""
    entry = read_table(opened).entries["pirate"]
    found = listing(server, "pirate")

    assert ["pirate"] == list(found)
    assert (entry.lora_task_id, list(entry.lora_weights_shape), list(entry.adapter_sizes), entry.dtype) == (
        found["pirate"]["lora_task_id"],
        found["pirate"]["lora_weights_shape"],
        found["pirate"]["adapter_sizes"],
        found["pirate"]["dtype"],
    )
    assert str(opened.root) not in json.dumps(listing(server))


def test_clients_are_told_a_base_model_by_name_alone(server: Server, opened: Repository) -> None:
    """No path of the server, nor of whoever trained the adapter."""
    table = read_table(opened)
    noted = {"pirate": "meta-llama/Llama-3.1-8B", "haiku": "/home/alice/secret/llama", "counted": "../secret/llama"}
    entries = {name: replace(table.entries[name], base_model_name_or_path=base) for name, base in noted.items()}
    write_text(opened.table_path, render(replace(table, entries={**table.entries, **entries})))
    found = listing(server)
    write_text(opened.table_path, render(table))

    assert ["meta-llama/Llama-3.1-8B", None, None] == [found[name]["base_model_name_or_path"] for name in noted]
    assert "secret" not in json.dumps(found)


def test_an_unknown_name_is_not_found(server: Server) -> None:
    """As the router would say."""
    with pytest.raises(
        InferenceServerException, match="unknown LoRA adapter 'nobody'; available: counted, gone"
    ) as raised:
        listing(server, "nobody")

    assert "StatusCode.NOT_FOUND" == raised.value.status()


def test_the_list_command_prints_what_the_server_says(
    capsys: pytest.CaptureFixture[str], server: Server, opened: Repository
) -> None:
    """As a table and as JSON, with the state of each adapter and why one is unavailable."""
    url = f"http://{server.http_url}"
    printed = [(commands.main(["list", "--url", url, *words]), capsys.readouterr().out) for words in ((), ("--json",))]
    columns, *rows = (line.split("\t") for line in printed[0][1].splitlines())
    table = [dict(zip(columns, row, strict=True)) for row in rows]
    found = listing(server)

    assert [(0, found)] == [(code, json.loads(out)) for code, out in printed[1:]]
    assert sorted(found) == [row["lora_name"] for row in table]
    assert [found[row["lora_name"]]["state"] for row in table] == [row["state"].split(":")[0] for row in table]
    assert next(row["state"] for row in table if row["lora_name"] == "gone").startswith("unavailable: LoRA adapter 'g")
    entry = read_table(opened).entries["pirate"]
    assert {
        "lora_name": "pirate",
        "lora_task_id": str(entry.lora_task_id),
        "rank": "8",
        "modules": "attn_q,attn_v",
        "lora_weights": f"bfloat16 {list(entry.lora_weights_shape)}",
        "aliases": "",
    }.items() <= table[-1].items()


def test_the_list_command_says_what_a_server_without_the_listing_lacks(
    capsys: pytest.CaptureFixture[str], server: Server, tmp_path: Path, launch: Launch
) -> None:
    """With the remedy."""
    opened = synthetic_repository(tmp_path / "repo", streams=1)
    shutil.rmtree(opened.root / "lora_adapters")
    url = launch(opened.root).http_url
    code = commands.main(["list", "--url", url])
    captured = capsys.readouterr()

    assert (1, "") == (code, captured.out)
    assert f"the server at {url} has no model 'lora_adapters'" in captured.err
    assert "run tritonlora init" in captured.err


def test_metrics_count_what_was_asked_and_loaded(server: Server) -> None:
    """As Prometheus' own client reads them."""
    for name in ("counted", "counted", None):
        "".join(ask(server, name))
    with pytest.raises(ServerError, match="unknown LoRA adapter"):
        "".join(ask(server, "nobody"))
    await_sample(server, "lora_requests_total", lambda n: n == 2, lora_name="counted", outcome="OK")
    await_sample(server, "lora_requests_total", lambda n: n == 1, lora_name="", outcome="OK")
    await_sample(server, "lora_requests_total", lambda n: n == 1, lora_name="(unknown)", outcome="NOT_FOUND")

    assert await_sample(server, "lora_load_seconds_total", lambda n: n > 0, lora_name="counted") < 60
    assert await_sample(server, "lora_loads_total", lambda n: n > 0, lora_name="counted", reason="first_use") == 1


def test_metrics_tell_what_the_cache_holds_and_how_long_requests_took(server: Server) -> None:
    """It has one page. Each stream that has had a response has had a first token, and each load took some time."""
    for name in ("haiku", "pirate", "pirate"):
        "".join(ask(server, name))

    def found() -> dict[str, object]:
        known = samples(server)

        def total(metric: str, **labels: str) -> float:
            return sum(n for (name, of), n in known.items() if name == metric and labels.items() <= dict(of).items())

        return {
            "loaded": {dict(of)["lora_name"]: n for (name, of), n in known.items() if name == "lora_adapter_loaded"},
            "pages": (total("lora_cache_pages"), total("lora_cache_pages_used")),
            "more waits": total("lora_wait_seconds_count") - total("lora_cache_requests_total"),
            "more loads": total("lora_load_seconds_count") - total("lora_loads_total"),
            "more tokens": total("lora_time_to_first_token_seconds_count") - total("lora_requests_total", outcome="OK"),
            "results of pirate": {
                result: total("lora_cache_requests_total", lora_name="pirate", result=result) > 0 for result in RESULTS
            },
            "loads took": 0 < total("lora_load_seconds_sum") < 60,
            "failures": [n for (name, _), n in known.items() if name == "lora_table_failures_total"],
        }

    expected = {
        "loaded": {"pirate": 1, "haiku": 0, "gone": 0, "counted": 0},
        "pages": (1, 1),
        **dict.fromkeys(("more waits", "more loads", "more tokens"), 0),
        "results of pirate": {"hit": True, "miss": False, "wait": True},
        "loads took": True,
        "failures": [0],
    }
    deadline = time.monotonic() + 30
    while found() != expected:
        assert time.monotonic() < deadline, found()


def test_the_metrics_of_alerts_and_dashboard_are_there(server: Server) -> None:
    """All that a scrape of the server must have. Those of the door are its own."""
    "".join(ask(server, "pirate"))
    await_sample(server, "lora_requests_total", lambda n: n > 0, lora_name="pirate", outcome="OK")
    scraped = {name for name, _ in exposition.parse(client.metrics(f"http://{server.metrics_url}/metrics"))}

    assert set() == {name for name in metric_names() if not name.startswith("tritonlora_")} - scraped


def test_the_gateway_sees_what_runs_and_what_waits(server: Server) -> None:
    """One series at a time, whose value is the time of the change."""
    running, waiting = ask(server, "pirate", tokens=400), ask(server, "haiku")
    next(running)  # has the only page of the cache
    await_sample(server, "lora_requests_running", lambda n: n == 1, lora_name="pirate")
    labels = {"max_lora": "4", "running_lora_adapters": "pirate", "waiting_lora_adapters": ""}
    began = await_sample(server, "lora_requests_info", lambda n: n > 0, **labels)

    assert abs(began - time.time()) < 60
    assert [began] == [value for (name, _), value in samples(server).items() if name == "lora_requests_info"]

    "".join(running)
    "".join(waiting)
    await_sample(server, "lora_requests_running", lambda n: n == 0, lora_name="pirate")
    await_sample(server, "lora_requests_info", lambda n: n > began, **{**labels, "running_lora_adapters": ""})
