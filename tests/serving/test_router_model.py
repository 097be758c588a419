# SPDX-FileCopyrightText: the tritonlora authors
# SPDX-License-Identifier: Apache-2.0
"""router_model.py, with the fake in the place of Triton, for what the Triton that can be run here cannot do."""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
import pytest

import fake_pb_utils
from fake_pb_utils import Client, InferenceRequest, InferenceResponse, Tensor, TritonError, import_model
from scripted_resolver import ScriptedResolver

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


@pytest.fixture
def resolver() -> ScriptedResolver:
    """It knows one adapter."""
    return ScriptedResolver(pirate=1)


@pytest.fixture
def router(resolver: ScriptedResolver, monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    """An instance that looks after its client before every answer."""
    module = import_model(monkeypatch, "tritonlora.serving.router_model")
    monkeypatch.setattr(sys.modules["tritonlora.serving.reply"], "LOOK_SECONDS", 0.0)
    config = {
        "max_batch_size": 8,
        "model_transaction_policy": {"decoupled": True},
        "input": [{"name": "input_ids"}, {"name": "lora_task_id"}, {"name": "lora_name"}],
        "output": [{"name": name} for name in OUTPUTS],
        "parameters": {"target": {"string_value": "tensorrt_llm"}},
    }
    fake_pb_utils.serve("lora_resolver", resolver)
    model = module.TritonPythonModel()
    model.initialize({"model_config": json.dumps(config)})
    yield model
    model.finalize()
    fake_pb_utils.clear()


def ask(router: Any, client: Client, name: str | None, served: Any, *, streaming: bool = False) -> list[Any]:
    """The tokens that the client got, and the codes of its errors."""
    fake_pb_utils.serve("tensorrt_llm", served)
    arrays: dict[str, np.ndarray[Any, Any]] = {"input_ids": np.array([[1]], np.int32)}
    if streaming:
        arrays["streaming"] = np.array([[True]])
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


def test_the_resolver_is_told_the_outcome_of_each_request(router: Any, resolver: ScriptedResolver) -> None:
    """Of clients that stay and leave, and of requests for the base model."""
    for patience in (TOKENS + 1, 1):
        client = Client()
        ask(router, client, "pirate", lambda request, client=client, patience=patience: Answers(client, patience))
    ask(router, Client(), None, lambda request: Answers(Client(), TOKENS + 1))

    assert [("OK", True), ("CANCELLED", True), ("OK", True)] == resolver.outcomes


def test_the_resolver_is_told_when_a_stream_has_had_its_first_response(router: Any, resolver: ScriptedResolver) -> None:
    """From the arrival until it was sent. Nothing is told of a whole answer, or of a stream without any."""
    asked_for: list[float] = []  # when the engine was asked for each response of the stream

    class Stream(Answers):
        def __next__(self) -> InferenceResponse:
            asked_for.append(time.monotonic())
            return super().__next__()

    began = time.monotonic()
    ask(router, Client(), "pirate", lambda request: Stream(Client(), TOKENS + 1), streaming=True)
    ask(router, Client(), "pirate", lambda request: Answers(Client(), TOKENS + 1))
    ask(router, Client(), "pirate", lambda _: [InferenceResponse(error=TritonError("broken"))], streaming=True)
    stream, *others = [message["first_token_seconds"] for message in resolver.messages if message["do"] == "end"]

    assert 0 < stream < asked_for[1] - began
    assert [None, None] == others


def test_the_engine_is_asked_by_the_id_that_the_resolver_gives(router: Any) -> None:
    """And not by name."""
    sent: list[dict[str, Any]] = []

    def served(request: InferenceRequest) -> Answers:
        sent.append({tensor.name(): tensor.as_numpy().tolist() for tensor in request.inputs()})
        return Answers(Client(), TOKENS + 1)

    ask(router, Client(), "pirate", served)
    ask(router, Client(), None, served)

    assert [{"input_ids": [[1]], "lora_task_id": [[1]]}, {"input_ids": [[1]]}] == sent


def test_a_client_that_leaves_while_it_waits_is_gone_at_once(router: Any, resolver: ScriptedResolver) -> None:
    """The resolver is told, and the engine never asked. The resolver counts what it refuses itself."""
    client, sent = Client(), list[InferenceRequest]()
    resolver.holds_up = True

    def served(request: InferenceRequest) -> list[InferenceResponse]:
        sent.append(request)
        return []

    with ThreadPoolExecutor(1) as pool:
        answers = pool.submit(ask, router, client, "pirate", served)
        assert resolver.waits.wait(30)
        client.cancelled.set()

        assert [TritonError.CANCELLED] == answers.result()
    assert (["enter", "leave"], []) == (resolver.done, sent)


def test_a_request_whose_adapter_the_engine_lacks_is_sent_again(router: Any, resolver: ScriptedResolver) -> None:
    """Once the resolver has had it loaded."""
    missed = InferenceResponse(
        error=TritonError("LoRA task 1 not found in cache. Please send LoRA weights with request")
    )
    streams: list[Any] = [[missed], Answers(Client(), TOKENS + 1)]

    assert [1, 2, 3, 4, 5, 6] == ask(router, Client(), "pirate", lambda request: streams.pop(0))
    assert ["enter", "lost", "end"] == resolver.done


def test_who_has_left_is_sent_for_no_more(router: Any, resolver: ScriptedResolver) -> None:
    """Nor is the adapter loaded for it."""
    client = Client()

    def full(_: InferenceRequest) -> list[InferenceResponse]:
        client.cancelled.set()
        return [InferenceResponse(error=TritonError("There are no done tasks to evict"))]

    assert [TritonError.CANCELLED] == ask(router, client, "pirate", full)
    assert (["enter", "end"], [("CANCELLED", True)]) == (resolver.done, resolver.outcomes)


def test_what_the_resolver_refuses_is_the_client_s_with_its_code(router: Any, resolver: ScriptedResolver) -> None:
    """Also in the midst of a request."""
    resolver.on_lost = lambda: {"refused": ["the engine lost it", "UNAVAILABLE"]}
    full = [InferenceResponse(error=TritonError("There are no done tasks to evict"))]

    assert [TritonError.NOT_FOUND] == ask(router, Client(), "nobody", lambda request: [])
    assert [TritonError.UNAVAILABLE] == ask(router, Client(), "pirate", lambda request: full)
    assert [("UNAVAILABLE", True)] == resolver.outcomes


def test_without_a_resolver_a_request_is_unavailable(router: Any, resolver: ScriptedResolver) -> None:
    """Whoever it is for: the router does not know. The next one is served as ever."""
    fake_pb_utils._MODELS.clear()
    answers = [ask(router, Client(), name, lambda request: Answers(Client(), TOKENS + 1)) for name in ("pirate", None)]
    fake_pb_utils.serve("lora_resolver", resolver)

    assert [[TritonError.UNAVAILABLE]] * 2 == answers
    assert "'lora_resolver', which this model asks for adapters, is not loaded" in fake_pb_utils.LOG[0][1]
    assert [1, 2, 3, 4, 5, 6] == ask(router, Client(), "pirate", lambda request: Answers(Client(), TOKENS + 1))


def test_a_request_whose_error_cannot_be_told_is_an_error(
    router: Any, resolver: ScriptedResolver, monkeypatch: pytest.MonkeyPatch
) -> None:
    """And the next one is answered as ever."""
    with monkeypatch.context() as broken:
        broken.setattr(router.execute.__globals__["Reply"], "fail", lambda *_: 1 // 0)

        assert [TritonError.INTERNAL] == ask(router, Client(), "nobody", lambda request: Answers(Client(), TOKENS + 1))

        client = Client()
        assert [1, 2, TritonError.INTERNAL] == ask(router, client, None, lambda request: Failing(client))

    assert [("INTERNAL", True)] == resolver.outcomes
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
