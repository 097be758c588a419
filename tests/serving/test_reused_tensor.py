# SPDX-FileCopyrightText: the tritonlora authors
# SPDX-License-Identifier: Apache-2.0
"""kept_weights.py, with the fake's tensors, which are checked against Triton's in tests/server."""

from __future__ import annotations

import hashlib
from pathlib import Path

import numpy as np
import pytest
import torch

from fake_pb_utils import InferenceRequest, Tensor
from tritonlora.errors import AdapterUnavailable
from tritonlora.serving.adapter_tensors import Memory, Ranges, Weights
from tritonlora.serving.reused_tensor import BLOCK_NBYTES, KeptWeights, filled_ranges

ROWS, WIDTH = 3, 8


class Process:
    """Sends weights."""

    def __init__(self) -> None:
        self.made = 0
        self.nbytes_read = 0
        self.kept = KeptWeights(self._new)

    def _new(self, capsule: object) -> Tensor:
        self.made += 1
        return Tensor.from_dlpack("lora_weights", capsule)

    def weights(self, value: float, *, rows: int = ROWS, dtype: torch.dtype = torch.bfloat16) -> Weights:
        """Those that are full of that value."""
        return self.weights_of(torch.full((rows, WIDTH), value, dtype=dtype))

    def weights_of(self, values: torch.Tensor, most: int = 1 << 30) -> Weights:
        """Those of these values; after so many bytes, reading them fails."""
        content = values.view(-1).view(torch.uint8).numpy()

        def read(memory: Memory, ranges: Ranges) -> None:
            for start, stop in ranges.tolist():
                memory[start : min(stop, most)] = content[start : min(stop, most)]
                self.nbytes_read += stop - start
                if stop > most:
                    raise AdapterUnavailable("it is being written; ask again")

        dtype, sha256 = str(values.dtype).removeprefix("torch."), hashlib.sha256(content.data).hexdigest()
        return Weights(dtype, (1, *values.shape), len(content), sha256, read)

    def send(self, weights: Weights) -> tuple[Tensor, torch.Tensor]:
        """The tensor that is sent, and what the engine gets."""
        tensor = self.kept.tensor(weights)
        InferenceRequest(model_name="nope", inputs=[tensor], requested_output_names=[]).exec()
        self.kept.sent()
        return tensor, memory_of(tensor).clone()


def memory_of(tensor: Tensor) -> torch.Tensor:
    """Where it lies."""
    return torch.utils.dlpack.from_dlpack(tensor.to_dlpack())


def filled(value: float, rows: int = ROWS, dtype: torch.dtype = torch.bfloat16) -> torch.Tensor:
    """What is to arrive."""
    return torch.full((1, rows, WIDTH), value, dtype=dtype)


@pytest.fixture
def process() -> Process:
    """One that has sent nothing."""
    return Process()


def test_weights_of_one_shape_are_sent_from_one_place(process: Process) -> None:
    """And are right, however often they take turns; the same are not read again."""
    sent = [process.send(process.weights(value)) for value in (1, 2, 2, 1, 3)]

    assert 1 == process.made
    assert 4 * 2 * ROWS * WIDTH == process.nbytes_read
    assert 1 == len({memory_of(tensor).data_ptr() for tensor, _ in sent})
    for value, (_, arrived) in zip((1, 2, 2, 1, 3), sent, strict=True):
        assert torch.equal(filled(value), arrived)


def test_weights_are_right_wherever_they_are_zero(process: Process) -> None:
    """What is zero in both is not read: nothing of the adapter before may be left where this one is zero."""
    random = torch.Generator().manual_seed(0)
    for number in range(40):
        # Rows of two and a half blocks: where one is zero is not where a block is.
        values = torch.randn((3, 5 * BLOCK_NBYTES // 4), generator=random).bfloat16()
        if number % 4:
            values[torch.rand((3, 1), generator=random).expand_as(values) < 0.5] = 0
            values[:, int(len(values[0]) * torch.rand((), generator=random)) :] = 0
        for same in (values, torch.where(values == 0, 0, torch.rand((), generator=random).bfloat16()), values):
            assert torch.equal(same, process.send(process.weights_of(same))[1][0])

    assert 1 == process.made


def test_padding_that_two_have_alike_is_read_once(process: Process) -> None:
    """It is a third of an adapter of all layers."""
    ones = torch.zeros((2, 4 * BLOCK_NBYTES // 2)).bfloat16()
    ones[:, : BLOCK_NBYTES // 2 + 1] = 1
    adapters = [process.weights_of(ones), process.weights_of(2 * ones)]
    for adapter in adapters:
        process.send(adapter)
    process.nbytes_read = 0
    for adapter in adapters:
        process.send(adapter)

    assert 2 * 2 * 2 * BLOCK_NBYTES == process.nbytes_read  # two adapters, two rows, two blocks


@pytest.mark.parametrize(
    ("blocks", "found"), [([0, 1, 1, 0], [[1, 3]]), ([1, 0, 0, 1], [[0, 1], [3, 4]]), ([0, 0, 0, 0], [])]
)
def test_the_zeros_are_found(blocks: list[int], found: list[list[int]]) -> None:
    """Blocks that are nothing else; the last one is not whole."""
    memory = np.zeros(3 * BLOCK_NBYTES + 100, np.uint8)
    memory[[BLOCK_NBYTES * number + 99 for number, is_filled in enumerate(blocks) if is_filled]] = 1

    expected = [[start * BLOCK_NBYTES, min(stop * BLOCK_NBYTES, len(memory))] for start, stop in found]
    assert expected == filled_ranges(memory).tolist()


def test_what_a_tensor_was_made_of_is_given_back(process: Process) -> None:
    """Triton keeps it as long as the tensor, which is kept here: it would be as much memory again."""
    weights = process.weights_of(torch.ones((1, 32 << 20), dtype=torch.bfloat16))
    before = _resident_nbytes()
    tensor, arrived = process.send(weights)
    del arrived

    # What the fake shares with its server is this process' own.
    assert _resident_nbytes() - before < 1.5 * weights.nbytes
    assert memory_of(tensor).min() == 1


def _resident_nbytes() -> int:
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("RssAnon:"))


@pytest.mark.parametrize("most", [0, BLOCK_NBYTES, 3 * BLOCK_NBYTES])
def test_what_fails_half_way_is_read_anew(most: int, process: Process) -> None:
    """What lies there then is neither adapter, nor is it known where it is zero."""
    wide = torch.ones((1, 2 * BLOCK_NBYTES)).bfloat16()
    narrow = wide.clone()
    narrow[:, 5:] = 0
    for value in (narrow, wide, narrow, 2 * narrow):
        process.send(process.weights_of(value))
    for other in (wide, 3 * wide, 3 * narrow, narrow):
        with pytest.raises(AdapterUnavailable):
            process.kept.tensor(process.weights_of(other, most=min(most, 9)))
        with pytest.raises(AdapterUnavailable):
            process.kept.tensor(process.weights_of(3 * wide, most=most))

        assert torch.equal(other, process.send(process.weights_of(other))[1][0])


@pytest.mark.parametrize("other", [{"rows": 2}, {"dtype": torch.float16}])
def test_weights_of_another_shape_or_dtype_have_a_tensor_of_their_own(
    other: dict[str, object], process: Process
) -> None:
    """The memory has the shape that it was allocated with."""
    process.send(process.weights(1))
    weights = process.weights(2, **other)  # type: ignore[arg-type]
    _, arrived = process.send(weights)

    assert 2 == process.made
    assert torch.equal(filled(2, **other), arrived)  # type: ignore[arg-type]


@pytest.mark.parametrize("before", [[], [1]])
def test_what_was_not_sent_is_never_written_to(before: list[int], process: Process) -> None:
    """It may be on its way: in the same call of Triton's, or in a request that failed."""
    for value in before:
        process.send(process.weights(value))
    first = process.kept.tensor(process.weights(2))
    second = process.kept.tensor(process.weights(3))
    process.kept.sent()

    assert torch.equal(filled(2), memory_of(first))
    assert torch.equal(filled(3), memory_of(second))


def test_a_tensor_that_stays_where_it_was_is_not_kept(process: Process, monkeypatch: pytest.MonkeyPatch) -> None:
    """As in a Triton that would copy tensors elsewhere each time."""
    monkeypatch.setattr(Tensor, "_send", lambda self: None)
    for value in (1, 2, 1):
        assert torch.equal(filled(value), process.send(process.weights(value))[1])

    assert 3 == process.made
