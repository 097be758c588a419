# SPDX-FileCopyrightText: the tritonlora authors
# SPDX-License-Identifier: Apache-2.0
"""resolver_model.py, with the fake in the place of Triton."""

from __future__ import annotations

import json
import os
import sys
import time
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import fake_pb_utils
from fake_pb_utils import Client, InferenceRequest, InferenceResponse, Tensor, TritonError, import_model
from repositories import synthetic_adapter, synthetic_repository
from tritonlora.repository import add
from tritonlora.repository.paths import Repository, read_config, read_table
from tritonlora.serving.counters import OUTCOMES, RESULTS
from tritonlora.serving.holder import Holder
from tritonlora.serving.server_process import name_for

WAIT_SECONDS = 30


@pytest.fixture(scope="module")
def opened(tmp_path_factory: pytest.TempPathFactory) -> Repository:
    """One adapter."""
    return synthetic_repository(tmp_path_factory.mktemp("model") / "repo", cold=["pirate"])


@pytest.fixture
def resolver(opened: Repository, monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    """Before an engine that takes every load, in a server that has just started."""
    module = import_model(monkeypatch, "tritonlora.serving.resolver_model")
    monkeypatch.setattr(module, "is_starting", lambda _: True)
    fake_pb_utils.serve("tensorrt_llm", lambda _: [InferenceResponse([Tensor("output_ids", np.array([[[1]]]))])])
    config = read_config(opened.root / "lora_resolver" / "config.pbtxt")
    parameters = {**config.parameters, "refresh_seconds": "3600", "cache_pages": "100"}
    model = module.TritonPythonModel()
    model.initialize(
        {
            "model_name": "resolver-without-triton",
            "model_repository": str(opened.root / "lora_resolver"),
            "model_config": json.dumps(
                {
                    "max_batch_size": 8,
                    "output": [{"name": spec.name} for spec in config.outputs],
                    "parameters": {key: {"string_value": value} for key, value in parameters.items()},
                }
            ),
        }
    )
    yield model
    model.finalize()
    Path("/dev/shm", name_for("resolver-without-triton")).unlink()  # noqa: S108
    fake_pb_utils.clear()


def ask(resolver: Any, **inputs: Any) -> dict[str, Any]:
    """The names and values of the outputs, or the error's code."""
    client = Client()
    tensors = [Tensor("request_output_len", np.array([[4]], np.int32))]
    tensors += [Tensor(name, np.array([[value]], np.object_)) for name, value in inputs.items()]
    asked = ["request_output_len", "lora_task_id", "lora_state"]
    request = InferenceRequest(model_name="", inputs=tensors, requested_output_names=asked)
    resolver.execute([client.send(request)])
    assert client.finished.wait(WAIT_SECONDS)
    [response] = client.responses
    if error := response.error():
        return {"error": error.code(), "message": error.message()}
    return {one.name(): one.as_numpy().reshape(-1)[0] for one in response.output_tensors() if one.name() in asked}


def send(resolver: Any, holder: Holder, do: str, number: int = 1, lora_name: str = "", **more: Any) -> Any:
    """Send a message as the router does; its lora_state."""
    message = {"holder": holder.token, "number": number, "do": do, **more}
    names = {"lora_name": lora_name.encode()} if lora_name else {}
    return json.loads(ask(resolver, lora_control=json.dumps(message).encode(), **names)["lora_state"])


def test_a_request_goes_on_with_its_adapter_s_id(resolver: Any, opened: Repository) -> None:
    """Or without one, for the base model."""
    task_id = read_table(opened).entries["pirate"].lora_task_id

    assert {"request_output_len": 4, "lora_task_id": task_id} == ask(resolver, lora_name=b"pirate")
    assert {"request_output_len": 4} == ask(resolver)


def snapshot_after(resolver: Any, requests: int) -> Any:
    """What is published after so many requests for pirate. A request counts after its response."""
    deadline, last = time.monotonic() + WAIT_SECONDS, resolver._snapshot()
    while sum(last.counts.get("pirate", {}).get(result, 0) for result in RESULTS) < requests:
        assert time.monotonic() < deadline
        last = resolver._snapshot()
    return last


@pytest.mark.parametrize(("most_nbytes", "result"), [(1 << 24, "miss"), (0, "wait")])
def test_large_weights_are_sent_by_a_load_before_the_request(
    resolver: Any, opened: Repository, monkeypatch: pytest.MonkeyPatch, most_nbytes: int, result: str
) -> None:
    """Smaller ones go along with the request."""
    monkeypatch.setattr(sys.modules[type(resolver).__module__], "MOST_CARRIED_NBYTES", most_nbytes)
    task_id = read_table(opened).entries["pirate"].lora_task_id

    assert task_id == ask(resolver, lora_name=b"pirate")["lora_task_id"]
    assert 1 == snapshot_after(resolver, 1).counts["pirate"][result]


@pytest.mark.parametrize(
    "control",
    [
        b"", b"{}", b"[]", b"null", b"\xff", b"x" * 1000, b'{"holder": "1:1:x", "number": 1, "do": "tell"}',
        b'{"holder": null, "number": 1, "do": "end"}', b'{"holder": "1:1:x", "number": 1, "do": "nothing"}',
        b'{"holder": "1:0:tritonlora-%s", "number": 1, "do": "tell"}' % (32 * b"0"),
    ],
)  # fmt: skip
def test_clients_cannot_speak_as_the_router(resolver: Any, control: bytes) -> None:
    """Whatever they know of its messages."""
    found = ask(resolver, lora_control=control)

    assert (TritonError.INVALID_ARG, "lora_control is no input for clients; leave it out") == (
        found["error"],
        found["message"],
    )


def test_the_requests_of_the_router_count_when_they_end(resolver: Any) -> None:
    """With the outcome that it tells. What it was refused counts at once."""
    with closing(Holder()) as holder:
        assert {"lora_names": ["pirate"]} == send(resolver, holder, "enter", lora_name="pirate", parameters={})
        assert 1 == resolver._statistics.counts()["pirate"]["running"]
        send(resolver, holder, "end", outcome="CANCELLED", is_over=True)
        refused = send(resolver, holder, "enter", number=2, lora_name="nobody", parameters={})
        assert "NOT_FOUND" == refused["refused"][1]
    counts = resolver._statistics.counts()

    assert (0, 1, 0) == tuple(counts["pirate"][column] for column in ("running", "CANCELLED", "OK"))
    assert 1 == counts["(unknown)"]["NOT_FOUND"]


def test_what_is_published_is_what_was_asked_and_what_is_held(resolver: Any, opened: Repository) -> None:
    """The router's first tokens count, and a request that waits for a load until it goes on."""
    task_id = read_table(opened).entries["pirate"].lora_task_id
    ask(resolver, lora_name=b"pirate")
    with closing(Holder()) as holder:
        send(resolver, holder, "enter", lora_name="pirate", parameters={})
        send(resolver, holder, "end", outcome="OK", is_over=True, first_token_seconds=0.3)
        send(resolver, holder, "enter", number=2, parameters={})
        send(resolver, holder, "end", number=2, outcome="OK", is_over=True, first_token_seconds=None)
    last = snapshot_after(resolver, 2)
    row = last.counts["pirate"]

    assert (1, 1) == (row["miss"], row["first_use"])
    assert {"load": row["evicted"], "wait": 2, "first_token": 1} == {
        what: sum(number for number, _ in histogram) for what, histogram in last.times.items()
    }
    assert ({task_id: read_table(opened).entries["pirate"].pages}, 100) == (last.held, last.pages)
    assert ["pirate"] == [*last.adapters]


def test_a_load_is_no_request_of_a_client(resolver: Any, opened: Repository) -> None:
    """The engine has the adapter when the response comes. No request is counted, not even one that is refused."""
    with closing(Holder()) as holder:
        assert {"lora_names": ["pirate"]} == send(resolver, holder, "load", name="pirate")
        assert "NOT_FOUND" == send(resolver, holder, "load", name="nobody")["refused"][1]
        told = send(resolver, holder, "tell")
    counts = resolver._statistics.counts()

    assert {str(read_table(opened).entries["pirate"].lora_task_id): True} == told["states"]
    assert [("pirate", 1)] == [(name, row["first_use"]) for name, row in counts.items()]
    assert 0 == sum(counts["pirate"][outcome] for outcome in OUTCOMES)


def test_a_miss_of_an_adapter_that_nobody_has_asked_for_counts(resolver: Any, opened: Repository) -> None:
    """Of a warm one, which the engine had before any request."""
    resolver._dispatcher._on_miss(read_table(opened).entries["pirate"].lora_task_id)

    assert 1 == resolver._statistics.counts()["pirate"]["unexpected_misses"]


def test_what_is_refused_counts_for_the_adapter_that_was_asked_for(resolver: Any, opened: Repository) -> None:
    """By an ensemble or by the router. Nothing is under way after that."""
    resolver._bindings._bind(read_table(opened).entries["pirate"].lora_task_id, "another")
    assert TritonError.UNAVAILABLE == ask(resolver, lora_name=b"pirate")["error"]
    with closing(Holder()) as holder:
        refused = send(resolver, holder, "enter", lora_name="pirate", parameters={})
    counts = resolver._statistics.counts()

    assert "UNAVAILABLE" == refused["refused"][1]
    assert ["pirate"] == list(counts)
    assert (2, 0) == (counts["pirate"]["UNAVAILABLE"], counts["pirate"]["running"])


def test_what_is_refused_before_its_adapter_is_known_is_not_counted_as_the_base_model(resolver: Any) -> None:
    """All such requests share one label, whatever the client sent."""
    assert TritonError.NOT_FOUND == ask(resolver, lora_name=b"nobody")["error"]
    assert TritonError.INVALID_ARG == ask(resolver, lora_name=b"../no name")["error"]
    with closing(Holder()) as holder:
        send(resolver, holder, "enter", lora_name="nobody", parameters={})
    counts = resolver._statistics.counts()

    assert ["(unknown)"] == list(counts)
    assert (2, 1) == (counts["(unknown)"]["NOT_FOUND"], counts["(unknown)"]["INVALID_ARG"])


def test_a_router_that_ends_lets_go_of_its_adapters(resolver: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """And no request of it is under way any more."""
    monkeypatch.setattr("tritonlora.serving.leases.SWEEP_SECONDS", 0.0)
    holder = Holder()
    send(resolver, holder, "enter", lora_name="pirate", parameters={})
    [lease] = resolver._leases._leases.values()
    holder.close()
    deadline = time.monotonic() + WAIT_SECONDS  # the keeper's thread looks again and again
    while resolver._statistics.counts()["pirate"]["running"]:
        assert time.monotonic() < deadline

    assert lease.ticket is None
    assert 1 == resolver._statistics.counts()["pirate"]["INTERNAL"]


def test_no_file_of_an_adapter_stays_in_use(resolver: Any, opened: Repository) -> None:
    """Of one that was removed, the space would stay taken."""
    weights = opened.root / read_table(opened).entries["pirate"].lora_weights_file
    ask(resolver, lora_name=b"pirate")

    assert str(weights) not in Path("/proc/self/maps").read_text()
    assert str(weights) not in [os.path.realpath(link) for link in Path("/proc/self/fd").iterdir()]


def test_weights_that_cannot_be_sent_are_given_to_no_id(resolver: Any, opened: Repository, tmp_path: Path) -> None:
    """A digest that was mistyped in the table, and is put right, is no other content."""
    add.add(opened, "mistyped", synthetic_adapter(tmp_path / "mistyped", 8))
    text = opened.table_path.read_text()
    digest = read_table(opened).entries["mistyped"].lora_weights_sha256
    opened.table_path.write_text(text.replace(digest, digest[::-1]))
    wrong = ask(resolver, lora_name=b"mistyped")
    opened.table_path.write_text(text)

    assert TritonError.UNAVAILABLE == wrong["error"]
    assert "error" not in ask(resolver, lora_name=b"mistyped")
