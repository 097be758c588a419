# SPDX-FileCopyrightText: the tritonlora authors
# SPDX-License-Identifier: Apache-2.0
"""router_model.py, with the fake in the place of Triton, for what the Triton that can be run here cannot do."""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import fake_pb_utils
from fake_pb_utils import Client, InferenceRequest, InferenceResponse, Tensor, TritonError, load_model
from repositories import synthetic_adapter, synthetic_repository
from tritonlora.repository import add
from tritonlora.repository.paths import Repository, read_table
from tritonlora.serving.counters import BASE, STATISTICS, read_statistics
from tritonlora.serving.residency import open_inside

OUTPUTS = ("output_ids", "sequence_length")
TOKENS = 6


class Answers:
    """A stream of TOKENS answers; its client leaves after `patience` of them."""

    def __init__(self, client: Client, patience: int) -> None:
        self.client = client
        self.patience = patience
        self.read = 0
        self.ended = False

    def __iter__(self) -> Iterator[InferenceResponse]:
        return self

    def __next__(self) -> InferenceResponse:
        if self.read == self.patience:
            self.client.cancelled.set()
        if self.is_over():
            self.ended = True
            raise StopIteration
        self.read += 1
        arrays = (np.array([[[self.read]]], np.int32), np.array([[1]], np.int32))
        return InferenceResponse([Tensor(name, array) for name, array in zip(OUTPUTS, arrays, strict=True)])

    def is_over(self) -> bool:
        """Whether the last answer has been given."""
        return self.read == TOKENS


class CancellableAnswers(Answers):
    """As of Triton 25.04: one that is cancelled ends."""

    cancelled = 0

    def cancel(self) -> None:
        self.cancelled += 1

    def is_over(self) -> bool:
        return bool(self.cancelled) or super().is_over()


@pytest.fixture(scope="module")
def opened(tmp_path_factory: pytest.TempPathFactory) -> Repository:
    """One adapter."""
    return synthetic_repository(tmp_path_factory.mktemp("model") / "repo", cold=["pirate"])


@pytest.fixture
def router(opened: Repository, monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    """An instance that looks after its client before every answer."""
    module = load_model(monkeypatch, "tritonlora.serving.router_model")
    monkeypatch.setattr(sys.modules["tritonlora.serving.reply"], "LOOK_SECONDS", 0.0)
    config = {
        "max_batch_size": 8,
        "model_transaction_policy": {"decoupled": True},
        "input": [{"name": "input_ids"}, {"name": "lora_task_id"}, {"name": "lora_name"}],
        "output": [{"name": name} for name in OUTPUTS],
        "parameters": {
            name: {"string_value": value}
            for name, value in {
                "target": "tensorrt_llm",
                "cache_full_timeout_seconds": "30",
                "load_timeout_seconds": "30",
            }.items()
        },
    }
    model = module.TritonPythonModel()
    model.initialize(
        {
            "model_name": "router-without-triton",
            "model_repository": str(opened.root / "lora_router"),
            "model_config": json.dumps(config),
        }
    )
    yield model
    model.finalize()
    fake_pb_utils.clear()


def ask(router: Any, client: Client, name: str | None, served: Any) -> list[Any]:
    """The tokens that the client got, and the codes of its errors."""
    fake_pb_utils.serve("tensorrt_llm", served)
    arrays = {"input_ids": np.array([[1]], np.int32)}
    if name is not None:
        arrays["lora_name"] = np.array([[name.encode()]], np.object_)
    inputs = [Tensor(key, array) for key, array in arrays.items()]
    router.execute([client.send(InferenceRequest(model_name="", inputs=inputs, requested_output_names=list(OUTPUTS)))])
    assert client.finished.is_set()
    errors = [one.error() for one in client.responses]
    tokens = [one.output_tensors()[0].as_numpy().item() if one.output_tensors() else None for one in client.responses]
    return [token if error is None else error.code() for token, error in zip(tokens, errors, strict=True)]


@pytest.mark.parametrize("name", [None, "pirate"])
def test_a_stream_whose_client_has_left_is_cancelled_where_triton_can(router: Any, name: str | None) -> None:
    """Once; what the engine answers after that is read, and not sent."""
    client = Client()
    answers = CancellableAnswers(client, patience=2)

    assert [1, 2, TritonError.CANCELLED] == ask(router, client, name, lambda request: answers)
    assert (1, True) == (answers.cancelled, answers.ended)


@pytest.mark.parametrize("name", [None, "pirate"])
def test_a_stream_that_cannot_be_cancelled_is_read_to_its_end(router: Any, name: str | None) -> None:
    """And nothing more is sent."""
    client = Client()
    answers = Answers(client, patience=2)

    assert [1, 2, TritonError.CANCELLED] == ask(router, client, name, lambda request: answers)
    assert (TOKENS, True) == (answers.read, answers.ended)


def test_the_requests_of_clients_that_stay_and_leave_are_counted_apart(router: Any) -> None:
    """By outcome."""
    for patience in (TOKENS + 1, 1, 2):
        client = Client()
        ask(router, client, "pirate", lambda request, client=client, patience=patience: Answers(client, patience))
    counts = read_statistics(open_inside(router._residency.descriptor, STATISTICS))["pirate"]

    assert (1, 2, 0) == (counts["OK"], counts["CANCELLED"], counts["running"])


def test_a_request_that_waits_for_room_is_not_sent_when_its_client_has_left(router: Any) -> None:
    """It leaves the line."""
    client, sent = Client(), []

    def full(request: InferenceRequest) -> list[InferenceResponse]:
        sent.append(request)
        client.cancelled.set()
        return [InferenceResponse(error=TritonError("There are no done tasks to evict"))]

    assert [TritonError.CANCELLED] == ask(router, client, "pirate", full)
    assert len(sent) == 1
    assert [] == router._residency.waiting()


def test_a_request_whose_error_cannot_be_told_is_an_error(router: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """And the next one is answered as ever."""
    with monkeypatch.context() as broken:
        broken.setattr(router.execute.__globals__["Reply"], "fail", lambda *_: 1 // 0)

        assert [TritonError.INTERNAL] == ask(router, Client(), "nobody", lambda request: Answers(Client(), TOKENS + 1))

        client = Client()
        assert [1, 2, TritonError.INTERNAL] == ask(router, client, None, lambda request: Failing(client))

    counts = read_statistics(open_inside(router._residency.descriptor, STATISTICS))[BASE]
    assert (0, 2) == (counts["OK"], counts["INTERNAL"])
    assert [TritonError.NOT_FOUND] == ask(router, Client(), "nobody", lambda request: Answers(Client(), TOKENS + 1))


class Failing(Answers):
    """The third answer is an error, and there are more."""

    def __init__(self, client: Client) -> None:
        super().__init__(client, TOKENS + 1)
        self.told: list[bool] = []  # whether the client had been told, when what follows was asked for

    def __next__(self) -> InferenceResponse:
        self.told.append(any(one.has_error() for one in self.client.responses))
        answer = super().__next__()
        return InferenceResponse(error=TritonError("out of pages")) if self.read == 3 else answer


@pytest.mark.parametrize("name", [None, "pirate"])
def test_a_stream_with_an_error_is_read_to_its_end(router: Any, name: str | None) -> None:
    """Else Triton hangs. The client need not wait for that."""
    client = Client()
    answers = Failing(client)

    assert [1, 2, TritonError.INTERNAL] == ask(router, client, name, lambda request: answers)
    assert (TOKENS, True) == (answers.read, answers.ended)
    assert [False] * 3 + [True] * 4 == answers.told


def test_a_stream_has_a_state_for_each_sequence_of_each_row(router: Any) -> None:
    """previous_ids are the sequence's own, and its end repeats what says whose it is and how likely it was."""
    spoken = [(0, [1, 2]), (1, [3]), (1, [4]), (0, [5]), (0, [])]

    def served(_: InferenceRequest) -> Iterator[InferenceResponse]:
        for said, (index, new) in enumerate(spoken):
            arrays = {
                "output_ids": np.array([[new]], np.int32),
                "sequence_length": np.array([[len(new)]], np.int32),
                "sequence_index": np.array([[index]], np.int32),
                "cum_log_probs": np.array([[-said]], np.float32),
                "generation_logits": np.zeros((1, 1, len(new), 4), np.float32),
            }
            yield InferenceResponse([Tensor(name, array) for name, array in arrays.items()])

    fake_pb_utils.serve("tensorrt_llm", served)
    client = Client()
    names = ["output_ids", "previous_ids", "batch_index", "sequence_index", "cum_log_probs"]
    inputs = {"input_ids": np.ones((2, 1), np.int32), "streaming": np.array([[True], [True]])}
    tensors = [Tensor(name, array) for name, array in inputs.items()]
    router.execute([client.send(InferenceRequest(model_name="", inputs=tensors, requested_output_names=names))])
    found = [
        {tensor.name(): tensor.as_numpy().reshape(-1).tolist() for tensor in response.output_tensors()}
        for response in client.responses
    ]
    of_a_row = [
        ([1, 2], [0], [0], []),
        ([3], [1], [-1], []),
        ([4], [1], [-2], [3]),
        ([5], [0], [-3], [1, 2]),
        ([], [0], [-4], None),
        ([], [0], [-4], [1, 2, 5]),
        ([], [1], [-2], [3, 4]),
    ]
    wanted = [
        {"output_ids": new, "sequence_index": index, "cum_log_probs": likely, "batch_index": [row]}
        | ({} if before is None else {"previous_ids": before})
        for row in range(2)
        for new, index, likely, before in of_a_row
    ]

    assert wanted == found


def test_no_file_of_an_adapter_stays_in_use(router: Any, opened: Repository) -> None:
    """Of one that was removed, the space would stay taken."""
    weights = opened.root / read_table(opened).entries["pirate"].lora_weights_file
    ask(router, Client(), "pirate", lambda request: Answers(Client(), TOKENS + 1))

    assert str(weights) not in Path("/proc/self/maps").read_text()
    assert str(weights) not in [os.path.realpath(link) for link in Path("/proc/self/fd").iterdir()]


def test_weights_that_cannot_be_sent_are_given_to_no_id(router: Any, opened: Repository, tmp_path: Path) -> None:
    """A digest that was mistyped in the table, and is put right, is no other content."""
    add.add(opened, "mistyped", synthetic_adapter(tmp_path / "mistyped", 8))
    text = opened.table_path.read_text()
    digest = read_table(opened).entries["mistyped"].lora_weights_sha256
    opened.table_path.write_text(text.replace(digest, digest[::-1]))
    wrong = ask(router, Client(), "mistyped", lambda request: Answers(Client(), TOKENS + 1))
    opened.table_path.write_text(text)

    assert [TritonError.UNAVAILABLE] == wrong
    assert [1, 2, 3, 4, 5, 6] == ask(router, Client(), "mistyped", lambda request: Answers(Client(), TOKENS + 1))
