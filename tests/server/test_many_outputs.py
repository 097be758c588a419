# SPDX-FileCopyrightText: the tritonlora authors
# SPDX-License-Identifier: Apache-2.0
"""Everything that an engine can give goes through the router: sequences in turns, beams, log probabilities, logits.

On a real tritonserver, with many_outputs_engine.py as the engine. The engine's own unstreamed response, which does not
come through the router, is the oracle for what a stream must join to.
"""

from __future__ import annotations

import http.client
import json
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
from tritonclient.grpc import InferRequestedOutput
from tritonclient.utils import InferenceServerException

from asking import Tensors, grpc_stream
from repositories import put_many_outputs_engine, synthetic_repository
from tritonlora.launch.server import Server
from tritonlora.repository.paths import Repository, read_table, read_text

PROMPT = "naïve"
NAMES = ("pirate", "haiku")
ALL = {"return_log_probs": True, "return_context_logits": True, "return_generation_logits": True}
LOG_PROBS = ("cum_log_probs", "output_log_probs")
# What is asked for beside the prompt. With beams the engine gives num_return_sequences of them, in one response.
SEVERAL = {
    "sequences": {"num_return_sequences": 3},
    "beams": {"beam_width": 3},
    "the best of three beams": {"beam_width": 3, "num_return_sequences": 1},
    "two of three beams": {"beam_width": 3, "num_return_sequences": 2},
}

Key = tuple[int, int]  # batch_index, sequence_index


@pytest.fixture(scope="module")
def opened(tmp_path_factory: pytest.TempPathFactory) -> Repository:
    """Two adapters."""
    opened = synthetic_repository(tmp_path_factory.mktemp("outputs") / "repo", cold=NAMES, streams=2)
    put_many_outputs_engine(opened)
    return opened


@pytest.fixture(scope="module")
def server(opened: Repository, launch: Callable[..., Server]) -> Server:
    """A server whose engine has been given the adapters."""
    server = launch(opened.root)
    list(grpc_stream(server, "lora_router", tokens_in(NAMES, streaming=True)))
    return server


def tokens_in(names: Sequence[str | None], **more: Any) -> Tensors:
    """For the engine's model and the router, a row for each adapter's name."""
    prompt = PROMPT.encode()
    scalars = {"input_lengths": len(prompt), "request_output_len": 1, **more}
    return {"input_ids": np.array([list(prompt)] * len(names), np.int32), **_columns(scalars, names)}


def text_in(names: Sequence[str | None], *, streaming: bool, **more: Any) -> Tensors:
    """For the ensemble."""
    texts = np.array([[PROMPT.encode()]] * len(names), np.object_)
    return {"text_input": texts, **_columns({"max_tokens": 1, "stream": streaming, **more}, names)}


def _columns(scalars: dict[str, int | bool], names: Sequence[str | None]) -> Tensors:
    dtypes = {int: np.int32, bool: np.bool_}
    columns: dict[str, npt.NDArray[Any]] = {
        name: np.full((len(names), 1), value, dtypes[type(value)]) for name, value in scalars.items()
    }
    if None not in names:
        columns["lora_name"] = np.array([[str(name).encode()] for name in names], np.object_)
    return columns


def by_id(inputs: Tensors, opened: Repository) -> Tensors:
    """The same for the engine itself, which knows no names."""
    entries = read_table(opened).entries
    names = [name.decode() for name in inputs.get("lora_name", np.zeros(0)).reshape(-1)]
    ids = np.array([[entries[name].lora_task_id] for name in names], np.uint64)
    return {name: array for name, array in inputs.items() if name != "lora_name"} | (
        {"lora_task_id": ids} if names else {}
    )


def key_of(outputs: Tensors) -> Key:
    """Whose tokens a response has."""
    row, index = (int(outputs[name].item()) if name in outputs else 0 for name in ("batch_index", "sequence_index"))
    return row, index


def grouped(responses: list[Tensors]) -> dict[Key, list[Tensors]]:
    """The responses for each row and sequence, in order."""
    found: dict[Key, list[Tensors]] = {}
    for outputs in responses:
        found.setdefault(key_of(outputs), []).append(outputs)
    return found


def whole(server: Server, opened: Repository, names: Sequence[str | None], **more: Any) -> dict[Key, Tensors]:
    """The engine's own responses without streaming."""
    inputs = by_id(tokens_in(names, streaming=False, **ALL, **more), opened)
    return {key_of(outputs): outputs for outputs in grpc_stream(server, "tensorrt_llm", inputs)}


def texts_of(outputs: Tensors) -> list[str]:
    """The texts of an engine's response, one for each beam."""
    ids, lengths = outputs["output_ids"][0], outputs["sequence_length"][0]
    return [bytes(beam[:length].tolist()).decode() for beam, length in zip(ids, lengths, strict=True)]


@pytest.mark.parametrize("several", SEVERAL)
@pytest.mark.parametrize("streaming", [True, False])
@pytest.mark.parametrize("names", [[None], ["pirate"], [None, None], ["haiku", "pirate"]], ids=str)
def test_who_names_no_outputs_gets_what_the_engine_gives(
    server: Server, opened: Repository, several: str, streaming: bool, names: list[str | None]
) -> None:
    """Every output of every response, for each row and sequence in the engine's order."""
    inputs = tokens_in(names, streaming=streaming, **ALL, **SEVERAL[several])
    direct = grouped(list(grpc_stream(server, "tensorrt_llm", by_id(inputs, opened))))
    routed = grouped(list(grpc_stream(server, "lora_router", inputs)))

    assert {*LOG_PROBS, "context_logits", "generation_logits"} <= direct[0, 0][0].keys()
    np.testing.assert_equal(routed, direct)


@pytest.mark.parametrize("names", [[None], ["pirate"], ["haiku", "pirate"]], ids=str)
@pytest.mark.parametrize("count", [1, 3])
def test_the_pieces_of_each_sequence_join_to_its_own_text(
    server: Server, opened: Repository, names: list[str | None], count: int
) -> None:
    """However the sequences take turns, and wherever their characters are cut; each sequence has an end of its own."""
    several = {"num_return_sequences": count}
    wanted = whole(server, opened, names, **several)
    streamed = grouped(list(grpc_stream(server, "ensemble", text_in(names, streaming=True, **ALL, **several))))

    assert len(names) * count == len(wanted)
    assert wanted.keys() == streamed.keys()
    for key, outputs in wanted.items():
        pieces = [one["text_output"].item().decode() for one in streamed[key]]
        end = streamed[key][-1]

        assert texts_of(outputs) == ["".join(pieces)]
        assert len(pieces) > 3
        assert not [piece for piece in pieces if "\ufffd" in piece]
        for name in LOG_PROBS:
            np.testing.assert_equal(end[name], outputs[name])


@pytest.mark.parametrize("several", [name for name in SEVERAL if "beams" in name])
@pytest.mark.parametrize("names", [[None], ["pirate"]], ids=str)
def test_each_streamed_response_with_beams_has_the_whole_texts_so_far(
    server: Server, opened: Repository, several: str, names: list[str | None]
) -> None:
    """As many responses as the engine gives, and the last one has all of the texts."""
    more = SEVERAL[several]
    inputs = by_id(tokens_in(names, streaming=True, **ALL, **more), opened)
    direct = list(grpc_stream(server, "tensorrt_llm", inputs))
    streamed = list(grpc_stream(server, "ensemble", text_in(names, streaming=True, **ALL, **more)))
    decoded = [
        [
            bytes(beam[:length].tolist()).decode(errors="replace").encode()
            for beam, length in zip(ids, lengths, strict=True)
        ]
        for ids, lengths in ((one["output_ids"][0], one["sequence_length"][0]) for one in direct)
    ]
    [outputs] = whole(server, opened, names, **more).values()

    assert decoded == [one["text_output"].reshape(-1).tolist() for one in streamed]
    assert texts_of(outputs) == [text.decode() for text in streamed[-1]["text_output"].reshape(-1)]
    for name in LOG_PROBS:
        np.testing.assert_equal(streamed[-1][name], outputs[name])


def test_sequences_are_told_apart_by_http_too(server: Server, opened: Repository) -> None:
    """By generate_stream, whose events say sequence_index."""
    body = {"text_input": PROMPT, "max_tokens": 1, "stream": True, "num_return_sequences": 3, "lora_name": "haiku"}
    connection = http.client.HTTPConnection(server.http_url, timeout=60)
    connection.request("POST", "/v2/models/ensemble/generate_stream", json.dumps(body))
    events = [json.loads(line[5:]) for line in connection.getresponse().read().splitlines() if line]
    connection.close()
    pieces: dict[Key, str] = {}
    for event in events:
        key = (0, event["sequence_index"])
        pieces[key] = pieces.get(key, "") + event["text_output"]

    assert {key: texts_of(one)[0] for key, one in whole(server, opened, ["haiku"], num_return_sequences=3).items()} == (
        pieces
    )


def test_sequences_are_told_apart_for_who_does_not_ask_which_they_are(server: Server) -> None:
    """previous_ids are those of the response's own sequence, and no other output comes with them."""
    inputs = tokens_in(["pirate"], streaming=True, num_return_sequences=3)
    outputs = [InferRequestedOutput(name) for name in ("output_ids", "sequence_index", "previous_ids")]
    responses = list(grpc_stream(server, "lora_router", inputs, outputs=outputs))
    unnamed = list(grpc_stream(server, "lora_router", inputs, outputs=[outputs[0], outputs[2]]))
    sent: dict[Key, list[int]] = {}
    for one in responses:
        tokens = sent.setdefault(key_of(one), [])

        assert tokens[-32:] == one["previous_ids"][0].tolist()
        tokens += one["output_ids"].reshape(-1).tolist()

    assert 3 == len(sent)
    np.testing.assert_equal(
        unnamed, [{name: one[name] for name in ("output_ids", "previous_ids")} for one in responses]
    )


def test_a_stream_whose_sequences_cannot_be_told_apart_is_refused(
    tmp_path_factory: pytest.TempPathFactory, launch: Callable[..., Server]
) -> None:
    """An engine's model without the output sequence_index; one sequence of it streams."""
    other = synthetic_repository(tmp_path_factory.mktemp("unnumbered") / "repo", streams=1)
    put_many_outputs_engine(other)
    engine = other.target_directory / "1" / "model.py"
    engine.write_text(read_text(engine).replace('outputs["sequence_index"]', 'outputs["unknown"]'))
    server = launch(other.root)
    with pytest.raises(InferenceServerException, match="num_return_sequences is 2, and the engine's responses have no"):
        list(grpc_stream(server, "ensemble", text_in([None], streaming=True, num_return_sequences=2)))

    assert list(grpc_stream(server, "ensemble", text_in([None], streaming=True, num_return_sequences=1)))
    assert 2 == len(list(grpc_stream(server, "ensemble", text_in([None], streaming=False, num_return_sequences=2))))
