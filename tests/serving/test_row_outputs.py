# SPDX-FileCopyrightText: the tritonlora authors
# SPDX-License-Identifier: Apache-2.0
"""row_outputs.py: what a client gets of the engine's responses, and what the router adds."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest

from tritonlora.serving.errors import InvalidRequest
from tritonlora.serving.row_outputs import RowOutputs, wanted_outputs

NEEDED = ("output_ids", "sequence_length")


@dataclass(frozen=True)
class Named:
    """A name and an array, as a tensor of Triton's has them."""

    output: str
    array: npt.NDArray[Any]

    def name(self) -> str:
        return self.output

    def as_numpy(self) -> npt.NDArray[Any]:
        return self.array


def row_outputs(*names: str, row: int | None = None, stream: bool = True, **options: Any) -> RowOutputs[Named]:
    """Those of a request that names these outputs."""
    return RowOutputs(wanted_outputs(names, NEEDED, is_stream=stream), Named, row=row, **options)


def response(ids: Sequence[int], **others: object) -> list[Named]:
    """The engine's: some tokens, and other outputs."""
    arrays = {"output_ids": np.array([[ids]], np.int32), "sequence_length": np.array([[len(ids)]], np.int32)}
    return [Named(name, np.array(array)) for name, array in {**arrays, **others}.items()]


def values(tensors: Iterable[Named]) -> dict[str, Any]:
    """Name -> elements."""
    return {tensor.name(): tensor.as_numpy().reshape(-1).tolist() for tensor in tensors}


@pytest.mark.parametrize("stream", [True, False])
def test_the_engine_is_asked_for_what_it_must_and_the_client_gets_what_it_named(stream: bool) -> None:
    outputs = row_outputs("output_ids", "cum_log_probs", stream=stream)
    wanted = wanted_outputs(["output_ids", "cum_log_probs"], NEEDED, is_stream=stream)

    assert {"output_ids", "cum_log_probs", "sequence_length"} == wanted.of_engine
    assert {"output_ids": [7], "cum_log_probs": [0.5]} == values(outputs.of_response(response([7], cum_log_probs=0.5)))
    assert [] == [*outputs.of_end()]


def test_a_row_of_a_batch_says_which_one_it_is() -> None:
    """The engine has seen a batch of one, and calls it row 0."""
    outputs = row_outputs("output_ids", "batch_index", row=3)

    assert {"output_ids": [7], "batch_index": [3]} == values(outputs.of_response(response([7], batch_index=[[0]])))


def test_previous_ids_are_those_before_a_response_and_the_end_has_all() -> None:
    """Only for streams, and for who names them."""
    outputs = row_outputs("output_ids", "previous_ids")
    found = [values(outputs.of_response(response(ids))) for ids in ([1, 2], [3], [])]

    assert [[], [1, 2], None] == [one.get("previous_ids") for one in found]
    assert [{"output_ids": [], "previous_ids": [1, 2, 3]}] == [values(one) for one in outputs.of_end()]
    for unnamed in (
        row_outputs("output_ids", "previous_ids", stream=False),
        row_outputs("output_ids", "previous_ids", "all_outputs"),
    ):
        assert {"output_ids"} == values(unnamed.of_response(response([1]))).keys()
        assert [] == [*unnamed.of_end()]


def test_sequences_have_previous_ids_of_their_own() -> None:
    """sequence_index says whose tokens they are; without it nothing does."""
    outputs = row_outputs("output_ids", "previous_ids", sequence_count=2)
    spoken = [(0, [1]), (1, [2]), (0, [3])]
    found = [values(outputs.of_response(response(ids, sequence_index=[[index]]))) for index, ids in spoken]

    assert [[], [], [1]] == [one["previous_ids"] for one in found]
    assert [[1, 3], [2]] == [values(one)["previous_ids"] for one in outputs.of_end()]
    with pytest.raises(InvalidRequest, match="num_return_sequences is 2, and the engine's responses have no sequence_"):
        row_outputs("previous_ids", sequence_count=2).of_response(response([1]))


def test_the_end_of_a_sequence_repeats_how_likely_it_was() -> None:
    outputs = row_outputs("output_ids", "previous_ids", "cum_log_probs", "generation_logits")
    outputs.of_response(response([1], cum_log_probs=[0.5], generation_logits=[0.1]))

    assert [{"output_ids": [], "cum_log_probs": [0.5], "previous_ids": [1]}] == [
        values(one) for one in outputs.of_end()
    ]


@pytest.mark.parametrize(("width", "beams"), [(2, 1), (1, 2)])
def test_beams_have_no_previous_ids(width: int, beams: int) -> None:
    """Each response has all of a beam."""
    outputs = row_outputs("output_ids", "previous_ids", beam_width=width)
    ids = np.ones((1, beams, 1), np.int32)
    tensors = [Named("output_ids", ids), Named("sequence_length", np.ones((1, beams), np.int32))]

    assert {"output_ids"} == values(outputs.of_response(tensors)).keys()
    assert [] == [*outputs.of_end()]


def test_lora_name_is_for_who_names_it() -> None:
    """In each response, with a row for each of its rows; without batches, it has no batch dimension."""
    outputs = row_outputs("output_ids", "lora_name", "previous_ids", lora_name="pirate")
    of_two_rows = row_outputs("lora_name", lora_name="pirate").of_response([Named("output_ids", np.ones((2, 1, 1)))])

    assert [b"pirate"] == values(outputs.of_response(response([1])))["lora_name"]
    assert [[[b"pirate"]] * 2] == [one.as_numpy().tolist() for one in of_two_rows]
    assert {"lora_name", "output_ids", "previous_ids"} == values(next(outputs.of_end())).keys()
    flat = row_outputs("lora_name", batching=False).of_response(response([1]))
    assert [[b""]] == [one.as_numpy().tolist() for one in flat]
    for names in (["output_ids"], ["lora_name", "all_outputs", "output_ids"]):
        assert ["output_ids"] == [one.name() for one in row_outputs(*names).of_response(response([1]))]


def test_text_diff_is_what_is_new() -> None:
    """In responses that have the whole text so far."""
    outputs = row_outputs("text_diff", stream=False)
    texts = [np.array([[text]], np.object_) for text in (b"one", b"one two", b"one two")]

    assert [[b"one"], [b" two"], [b""]] == [
        values(outputs.of_response([Named("text_output", text)]))["text_diff"] for text in texts
    ]
