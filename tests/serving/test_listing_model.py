# SPDX-FileCopyrightText: the tritonlora authors
# SPDX-License-Identifier: Apache-2.0
"""listing_model.py, with the fake in the place of Triton, for what no client can make Triton pass on."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import fake_pb_utils
from fake_pb_utils import Client, InferenceResponse, TritonError, import_model
from repositories import synthetic_repository
from scripted_resolver import ScriptedResolver
from tritonlora.repository import registry

WAIT_SECONDS = 30


@pytest.fixture
def resolver() -> Iterator[ScriptedResolver]:
    resolver = ScriptedResolver(pirate=1)
    fake_pb_utils.serve("lora_resolver", resolver)
    yield resolver
    fake_pb_utils.clear()


@pytest.fixture
def model(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, resolver: ScriptedResolver) -> Iterator[Any]:
    """Two adapters and an alias of both."""
    opened = synthetic_repository(tmp_path / "repo", cold=["pirate", "haiku"])
    registry.alias(opened, "prod", {"pirate": 90, "haiku": 10})
    model = import_model(monkeypatch, "tritonlora.serving.listing_model").TritonPythonModel()
    parameters = {"router": {"string_value": "lora_router"}}
    model.initialize(
        {
            "model_repository": str(opened.root / "lora_adapters"),
            "model_config": json.dumps({"parameters": parameters}),
        }
    )
    yield model
    model.finalize()


def send(model: Any, *requests: dict[str, Any]) -> list[InferenceResponse]:
    """The responses to requests of one batch."""
    clients = [Client() for _ in requests]
    model.execute([client.request(**inputs) for client, inputs in zip(clients, requests, strict=True)])
    assert all(client.finished.wait(WAIT_SECONDS) for client in clients)
    return [client.responses[0] for client in clients]


def names(*lora_names: bytes) -> Any:
    return np.array(lora_names, np.object_)


def listed(response: InferenceResponse) -> dict[str, Any]:
    found: dict[str, Any] = json.loads(response.output_tensors()[0].as_numpy().reshape(-1)[0])
    return found


def test_an_error_that_nobody_foresaw_is_that_request_s_alone(model: Any) -> None:
    """INTERNAL, and an entry in the log; the other requests of the batch are answered."""
    broken, sound = send(model, {"lora_name": names()}, {"lora_name": names(b"pirate")})

    assert TritonError.INTERNAL == broken.error().code()  # type: ignore[union-attr]
    assert "IndexError" in fake_pb_utils.LOG[-1][-1]
    assert ["pirate"] == list(listed(sound))


def test_a_name_loads_all_adapters_that_it_leads_to(model: Any, resolver: ScriptedResolver) -> None:
    """Each with what became of it: the resolver knows no haiku."""
    resolver.told = {"states": {"1": True}, "contents": {}}
    [response] = send(model, {"lora_name": names(b"prod"), "load": np.array([True])})
    loads = {name: about["load"] for name, about in listed(response).items()}

    assert {"pirate": {"result": "held"}, "haiku": {"result": "refused", "reason": "unknown LoRA adapter 'haiku'"}} == (
        loads
    )
    assert ["tell", "load", "load", "tell"] == resolver.done


def test_a_load_needs_a_name_and_false_is_none(model: Any, resolver: ScriptedResolver) -> None:
    """Nothing is loaded."""
    nameless, listing = send(
        model, {"load": np.array([True])}, {"lora_name": names(b"prod"), "load": np.array([False])}
    )

    assert TritonError.INVALID_ARG == nameless.error().code()  # type: ignore[union-attr]
    assert {"pirate", "haiku"} == {*listed(listing)}
    assert "load" not in resolver.done


def test_a_listing_does_not_wait_for_loads(model: Any, resolver: ScriptedResolver) -> None:
    """However many of them wait at the resolver."""
    resolver.holds_up = True
    loads = [Client() for _ in range(8)]
    model.execute([client.request(lora_name=names(b"pirate"), load=np.array([True])) for client in loads])
    assert resolver.waits.wait(WAIT_SECONDS)
    [listing] = send(model, {})
    assert {"pirate", "haiku"} == {*listed(listing)}
    resolver.go_on()

    assert all(client.finished.wait(WAIT_SECONDS) for client in loads)
