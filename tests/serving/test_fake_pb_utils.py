# SPDX-FileCopyrightText: the tritonlora authors
# SPDX-License-Identifier: Apache-2.0
"""The other side of the fake: its client and its models. What models see is compared with the real module elsewhere."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest

import fake_pb_utils
from fake_pb_utils import Client, InferenceRequest, InferenceResponse, Tensor, TritonError, import_model

TEXT_MODELS = "tritonlora.serving.text_models"
FINAL = fake_pb_utils.TRITONSERVER_RESPONSE_COMPLETE_FINAL


@pytest.fixture(autouse=True)
def clean() -> Iterator[None]:
    """Nothing is left over from other tests."""
    fake_pb_utils.clear()
    yield
    fake_pb_utils.clear()


def bls_request(model_name: str) -> InferenceRequest:
    """A request as a model makes it."""
    return InferenceRequest(model_name=model_name, inputs=[], requested_output_names=["y"])


def answer(*values: int) -> list[InferenceResponse]:
    """A response for each value."""
    return [InferenceResponse([Tensor("y", np.array([value]))]) for value in values]


def values(responses: Iterator[InferenceResponse]) -> list[int]:
    """The values in these responses."""
    return [int(response.output_tensors()[0].as_numpy()[0]) for response in responses]


def test_client_gets_what_the_sender_sends() -> None:
    """Responses in order, then the final flag."""
    client = Client()
    sender = client.request(x=np.zeros(1)).get_response_sender()

    first, last = answer(1, 2)
    sender.send(first)
    sender.send(last, flags=FINAL)

    assert [first, last] == client.responses
    assert client.finished.is_set()


def test_response_after_the_final_flag_is_an_error() -> None:
    """The real server would lose it."""
    sender = Client().request().get_response_sender()
    sender.send(flags=FINAL)

    with pytest.raises(AssertionError, match="after the final flag"):
        sender.send(InferenceResponse())


def test_cancellation_reaches_request_and_sender() -> None:
    """The client goes away."""
    client = Client()
    request = client.request()
    client.cancelled.set()

    assert (True, True) == (request.is_cancelled(), request.get_response_sender().is_cancelled())


def test_cancellation_of_a_request_that_no_client_sent_is_an_error() -> None:
    """The real one ends the whole server: C++ calls terminate."""
    with pytest.raises(AssertionError, match="no client sent this request"):
        bls_request("m").is_cancelled()


def test_numpy_array_in_from_dlpack_is_an_error() -> None:
    """The real one ends the model's process."""
    with pytest.raises(AssertionError, match="ends the process"):
        Tensor.from_dlpack("a", np.zeros(1))


def test_bls_request_reaches_the_model_of_its_name() -> None:
    """One response, or all of them as an iterator; the iterator of async_exec is synchronous as well."""
    fake_pb_utils.serve("twice", lambda request: answer(len(request.requested_output_names()), 2))
    one, several = bls_request("twice").exec(), bls_request("twice").exec(decoupled=True)
    awaited = asyncio.run(resolved(bls_request("twice")))

    assert isinstance(one, InferenceResponse)
    assert not isinstance(several, InferenceResponse)
    assert ([1], [1, 2], [1, 2]) == (values(iter([one])), values(several), values(awaited))


async def resolved(request: InferenceRequest) -> Iterator[InferenceResponse]:
    """What async_exec of a decoupled model gives."""
    responses = await request.async_exec(decoupled=True)
    assert not isinstance(responses, InferenceResponse)
    return responses


def arguments(**parameters: str) -> dict[str, str]:
    """What a model's `initialize` gets."""
    values = {name: {"string_value": value} for name, value in parameters.items()}
    return {"model_name": "text", "model_config": json.dumps({"parameters": values})}


def test_text_model_says_that_it_has_no_tokenizer(monkeypatch: pytest.MonkeyPatch) -> None:
    """Answers in bytes where words were meant would be hard to explain otherwise."""
    import_model(monkeypatch, TEXT_MODELS).Preprocessing().initialize(arguments())

    assert [("warn", "text: no tokenizer_dir is set, so each UTF-8 byte is a token")] == fake_pb_utils.LOG


def test_text_model_with_bad_parameters_does_not_load(monkeypatch: pytest.MonkeyPatch) -> None:
    """The server prints the exception's text."""
    model = import_model(monkeypatch, TEXT_MODELS).Postprocessing()

    with pytest.raises(
        fake_pb_utils.TritonModelException, match="skip_special_tokens must be 'true' or 'false', got '7'"
    ):
        model.initialize(arguments(skip_special_tokens="7"))


@pytest.mark.parametrize("name", ["preprocessing", "postprocessing"])
def test_text_model_keeps_its_tracebacks_to_the_log(monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    """A request that breaks it is answered with INTERNAL, and those beside it with what they asked for."""
    model = getattr(import_model(monkeypatch, TEXT_MODELS), name.capitalize())()
    model.initialize(arguments())
    one = np.array([[1]], np.int32)
    inputs: dict[str, dict[str, Any]] = {
        "preprocessing": {"QUERY": np.array([[b"a"]], np.object_), "REQUEST_OUTPUT_LEN": one},
        "postprocessing": {"TOKENS_BATCH": np.array([[[97]]], np.int32), "SEQUENCE_LENGTH": one},
    }

    wrong: dict[str, dict[str, Any]] = {
        "preprocessing": {},
        "postprocessing": {"TOKENS_BATCH": one[None], "SEQUENCE_LENGTH": np.array([["a"]], np.object_)},
    }
    broken, answered = model.execute([Client().request(**wrong[name]), Client().request(**inputs[name])])

    assert "text failed on this request; the server's log says why" == broken.error().message()
    assert TritonError.INTERNAL == broken.error().code()
    assert not answered.has_error()
    assert "Traceback" in fake_pb_utils.LOG[-1][1]


def test_an_error_of_the_engine_in_mid_stream_ends_it_apart(monkeypatch: pytest.MonkeyPatch) -> None:
    """Triton 2.51 loses an error that is not the first answer to a BLS request, and a flag that comes with it."""
    received: list[tuple[bool | None, bool]] = []

    class Watched(Client):
        def receive(self, response: InferenceResponse | None, *, final: bool) -> None:
            received.append((None if response is None else response.has_error(), final))

    module = import_model(monkeypatch, "tritonlora.cpu_engine.triton_model")
    for pieces in (0, 1):
        row = module.RowSender(module.Reply(Watched().request()), 0, 1)
        for _ in range(pieces):
            row.send([7], last=False)
        row.fail("broken")

    assert [(True, True), (False, False), (True, False), (None, True)] == received
