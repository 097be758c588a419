# SPDX-FileCopyrightText: the tritonlora authors
# SPDX-License-Identifier: Apache-2.0
"""kept_weights.py, with the fake's tensors, which are checked against Triton's in tests/server."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

from fake_pb_utils import InferenceRequest, Tensor
from tritonlora import dlpack, kept_weights
from tritonlora.adapter_files import BLOCK_NBYTES, Lease, Weights, filled_ranges
from tritonlora.kept_weights import KeptWeights

ROWS, WIDTH = 3, 8


class Process:
    """Sends the weights of files in a directory."""

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        self.made = 0
        self.kept = KeptWeights(self._new)

    def _new(self, capsule: object) -> Tensor:
        self.made += 1
        return Tensor.from_dlpack("lora_weights", capsule)

    def weights(self, value: float, *, rows: int = ROWS, dtype: torch.dtype = torch.bfloat16) -> Weights:
        """A file that is full of that value."""
        return self.weights_of(torch.full((rows, WIDTH), value, dtype=dtype), str(value))

    def weights_of(self, values: torch.Tensor, label: str) -> Weights:
        """A file of these values."""
        name = str(values.dtype).removeprefix("torch.")
        path = self.directory / f"{label}-{len(values)}-{name}"
        if not path.exists():
            path.write_bytes(values.view(torch.uint8).numpy().tobytes())
        content = dlpack.mapped(path)
        return Weights(content, name, (1, *values.shape), path.name, filled_ranges(content), Lease(path))

    def send(self, weights: Weights, *, fails: bool = False) -> tuple[Tensor, torch.Tensor]:
        """The tensor that is sent, and what the engine gets."""
        tensor = self.kept.tensor(weights)
        if not fails:
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
def process(tmp_path: Path) -> Process:
    """One that has sent nothing."""
    return Process(tmp_path)


@pytest.mark.parametrize("threads", [1, 2])
def test_weights_of_one_shape_are_sent_from_one_place(
    threads: int, process: Process, monkeypatch: pytest.MonkeyPatch
) -> None:
    """And are right, however often they take turns."""
    monkeypatch.setattr(kept_weights, "PARALLEL_NBYTES", 0 if threads == 2 else 1 << 30)
    sent = [process.send(process.weights(value)) for value in (1, 2, 2, 1, 3)]

    assert 1 == process.made
    assert 1 == len({memory_of(tensor).data_ptr() for tensor, _ in sent})
    for value, (_, arrived) in zip((1, 2, 2, 1, 3), sent, strict=True):
        assert torch.equal(filled(value), arrived)


@pytest.mark.parametrize("threads", [1, 2])
def test_weights_are_right_wherever_they_are_zero(
    threads: int, process: Process, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What is zero in both is not copied: nothing of the adapter before may be left where this one is zero."""
    monkeypatch.setattr(kept_weights, "PARALLEL_NBYTES", 0 if threads == 2 else 1 << 30)
    random = torch.Generator().manual_seed(0)
    for number in range(40):
        # Rows of two and a half blocks: where one is zero is not where a block is.
        values = torch.randn((3, 5 * BLOCK_NBYTES // 4), generator=random).bfloat16()
        if number % 4:
            values[torch.rand((3, 1), generator=random).expand_as(values) < 0.5] = 0
            values[:, int(len(values[0]) * torch.rand((), generator=random)) :] = 0
        arrived = [process.send(process.weights_of(values, str(number)))[1] for _ in range(2)]

        assert torch.equal(values, arrived[0][0])
        assert torch.equal(values, arrived[1][0])

    assert 1 == process.made


def test_a_copy_over_other_padding_that_ends_half_way_is_made_anew(
    process: Process, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Nor is it known then where zeros are."""
    narrow, wide = torch.ones((1, 2 * BLOCK_NBYTES)).bfloat16(), torch.ones((1, 2 * BLOCK_NBYTES)).bfloat16()
    narrow[:, 5:] = 0
    process.send(process.weights_of(narrow, "narrow"))
    with monkeypatch.context() as patched:
        patched.setattr(np, "copyto", _almost_all_of_a_copy)
        with pytest.raises(MemoryError):
            process.send(process.weights_of(wide, "wide"))

    assert torch.equal(narrow, process.send(process.weights_of(narrow, "narrow"))[1][0])


def _almost_all_of_a_copy(target: np.ndarray, source: np.ndarray) -> None:  # type: ignore[type-arg]
    target[:-1] = source[:-1]
    raise MemoryError


@pytest.mark.parametrize("half", [0, 1])
def test_a_copy_of_which_one_thread_fails_is_made_anew(
    half: int, process: Process, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whichever it is."""
    monkeypatch.setattr(kept_weights, "PARALLEL_NBYTES", 0)
    process.send(process.weights(1))
    copyto = np.copyto
    begins = memory_of(process.send(process.weights(1))[0]).data_ptr()

    def fail(target: np.ndarray, source: np.ndarray) -> None:  # type: ignore[type-arg]
        if (target.ctypes.data > begins) == bool(half):
            raise MemoryError
        copyto(target, source)

    with monkeypatch.context() as patched:
        patched.setattr(np, "copyto", fail)
        with pytest.raises(MemoryError):
            process.send(process.weights(2))

    assert torch.equal(filled(1), process.send(process.weights(1))[1])


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


def test_what_was_not_sent_is_never_written_to(process: Process) -> None:
    """It is the file, which nobody may write to."""
    process.send(process.weights(1), fails=True)
    _, arrived = process.send(process.weights(2))

    assert 2 == process.made
    assert torch.equal(filled(2), arrived)
    assert process.weights(1).content.tobytes() == (process.directory / "1-3-bfloat16").read_bytes()


def test_a_tensor_that_stays_where_it_was_is_not_kept(process: Process, monkeypatch: pytest.MonkeyPatch) -> None:
    """As in a Triton that would copy tensors elsewhere each time."""
    monkeypatch.setattr(Tensor, "_send", lambda self: None)
    for value in (1, 2, 1):
        assert torch.equal(filled(value), process.send(process.weights(value))[1])

    assert 3 == process.made


def test_a_copy_that_ends_half_way_is_made_anew(process: Process, monkeypatch: pytest.MonkeyPatch) -> None:
    """What lies there then is neither adapter."""
    process.send(process.weights(1))
    with monkeypatch.context() as patched:
        patched.setattr(np, "copyto", _half_a_copy)
        with pytest.raises(MemoryError):
            process.send(process.weights(2))

    assert torch.equal(filled(1), process.send(process.weights(1))[1])


def _half_a_copy(target: np.ndarray, source: np.ndarray) -> None:  # type: ignore[type-arg]
    target[: len(target) // 2] = source[: len(source) // 2]
    raise MemoryError


def test_the_file_can_be_written_to_once_it_was_sent(process: Process) -> None:
    """Whoever writes waits for the lease."""
    process.send(process.weights(1))

    (process.directory / "1-3-bfloat16").write_bytes(b"")


def test_what_is_forgotten_keeps_no_file(process: Process) -> None:
    """Of one that was removed the space would stay taken."""
    process.send(process.weights(1))

    assert str(process.directory) in Path("/proc/self/maps").read_text()

    process.kept.forget()

    assert str(process.directory) not in Path("/proc/self/maps").read_text()
