# SPDX-FileCopyrightText: the tritonlora authors
# SPDX-License-Identifier: Apache-2.0
"""Parse the tensors of one Triton request into a `GenerationRequest` for each row of the batch.

Rule: an input that would change the response and is not implemented here is refused by name, never ignored.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt

from tritonlora.cpu_engine.backend import Backend
from tritonlora.cpu_engine.wire_arrays import WireArray, dtype_name
from tritonlora.errors import InvalidRequest, one_message

if TYPE_CHECKING:
    import torch

Tensors = Mapping[str, "WireArray | torch.Tensor"]
Words = tuple[tuple[int, ...], ...]


@dataclass(frozen=True, slots=True)
class LoraInputs:
    """The three LoRA tensors of one request; each may be absent."""

    task_id: int | None = None
    weights: WireArray | torch.Tensor | None = None  # (1, n, W), a view of the request
    config: WireArray | torch.Tensor | None = None  # (1, n, 3 or 4) int32


@dataclass(frozen=True, slots=True)
class Sampling:
    """How to choose the next token. The defaults choose the likeliest one."""

    temperature: float = 1.0
    top_k: int = 0  # 0: no limit
    top_p: float = 0.0  # 0: no limit
    repetition_penalty: float = 1.0
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    min_length: int = 0
    seed: int = 0
    bad_words: Words = ()

    @property
    def greedy(self) -> bool:
        """Whether the likeliest token is taken: without top_k and top_p the temperature has no effect."""
        return self.top_k == 1 or self.temperature <= 0 or (self.top_k == 0 and self.top_p == 0)


@dataclass(frozen=True, slots=True)
class GenerationRequest:
    """One row of a request, parsed."""

    prompt: tuple[int, ...]
    max_tokens: int
    end_id: int | None = None
    stop_words: Words = ()
    sampling: Sampling = Sampling()
    streaming: bool = False
    exclude_input: bool = False
    lora: LoraInputs = LoraInputs()


# fmt: off
_READ = frozenset({
    "input_ids", "input_lengths", "request_output_len", "end_id", "stop_words_list", "bad_words_list",
    "temperature", "runtime_top_k", "runtime_top_p", "repetition_penalty", "presence_penalty", "frequency_penalty",
    "min_length", "min_tokens", "random_seed", "seed", "exclude_input_in_output", "streaming", "stop",
    "lora_task_id", "lora_weights", "lora_config"
})
# Inputs that do not change the response of a decoder-only engine with one beam, here and upstream: hints about the KV
# cache, settings of beam search, and the decoder's prompt of an encoder-decoder model.
_WITHOUT_EFFECT = frozenset({
    "pad_id", "len_penalty", "early_stopping", "beam_search_diversity_rate", "decoder_input_ids",
    "decoder_input_lengths", "retention_token_range_starts", "retention_token_range_ends",
    "retention_token_range_priorities", "retention_token_range_durations_ms", "retention_decode_priority",
    "retention_decode_duration_ms"
})
# fmt: on
# Every other input is accepted only with its neutral value. That is 0, false or no elements, except for these inputs.
_ASKS_FOR_NOTHING = {"beam_width": 1, "num_return_sequences": 1, "runtime_top_p_decay": 1}


def parse_requests(
    tensors: Tensors,
    *,
    backend: Backend,
    decoupled: bool,
    exclude_input: bool,
    requested_outputs: Collection[str] = ("output_ids", "sequence_length"),
) -> list[GenerationRequest]:
    """The requests in a batch, one for each row.

    `tensors` have the batch dimension first. `exclude_input` is the model's default for requests that do not set it.
    Raises InvalidRequest with upstream's text, or with our own for inputs that this engine does not implement.
    """
    _check_outputs(requested_outputs, backend)
    if "request_output_len" not in tensors:
        raise InvalidRequest(backend.no_output_len)
    if "input_ids" not in tensors:
        raise InvalidRequest("A value is required for input_ids")
    _check_supported(tensors)
    weights = tensors.get("lora_weights")
    if not backend.reads_bfloat16 and weights is not None and dtype_name(weights) == "bfloat16":
        raise InvalidRequest(
            "Tensor dtype is BF16 and cannot be converted to NumPy. Use to_dlpack() and from_dlpack() instead."
        )
    batch = len(tensors["input_ids"])
    if batch > 1 and not decoupled:
        raise InvalidRequest(
            "Batch size > 1 requires the tensorrt_llm backend to be using decoupled transaction policy"
        )
    requests = [_parse_row(_Row(tensors, batch, index), backend, exclude_input=exclude_input) for index in range(batch)]
    if not decoupled and any(request.streaming for request in requests):
        raise InvalidRequest(backend.needs_decoupled_to_stream)
    return requests


def asks_to_stop(tensors: Tensors) -> bool:
    """Whether the tensors ask to end an earlier request with the same request id."""
    return bool(np.any(np.asarray(tensors.get("stop", False))))


def _check_outputs(requested: Collection[str], backend: Backend) -> None:
    if not backend.insists_on_both_outputs:
        return
    for name in ("output_ids", "sequence_length"):
        if name not in requested:
            raise InvalidRequest(
                f"Error encountered while populating response: {name} tensor must be present in list of output tensors"
            )


def _check_supported(tensors: Tensors) -> None:
    problems = [
        repr(name)
        for name in sorted(set(tensors) - _READ - _WITHOUT_EFFECT)
        if not np.all(np.asarray(tensors[name]) == _ASKS_FOR_NOTHING.get(name, 0))
    ]
    if problems:
        raise InvalidRequest(one_message("inputs that the CPU engine does not implement", problems))


@dataclass(frozen=True, slots=True)
class _Row:
    """One row of a batch of tensors."""

    tensors: Tensors
    batch: int
    index: int

    def array(self, name: str) -> npt.NDArray[np.generic] | None:
        """The row's part of an input, without the batch dimension."""
        tensor = self.tensors.get(name)
        return None if tensor is None else np.asarray(tensor)[self.index]

    def scalar(self, name: str) -> bool | int | float | None:
        """The row's value of an input that has one value for each row; shape [batch] or [batch, 1]."""
        tensor = self.tensors.get(name)
        if tensor is None:
            return None
        values = np.asarray(tensor).reshape(-1)
        if len(values) != self.batch:
            raise InvalidRequest(
                f"Expected batch size doesn't match batch size for tensor {name}. "
                f"Expected {self.batch} got {len(values)}"
            )
        value: bool | int | float = values[self.index].item()
        return value

    def integer(self, name: str) -> int | None:
        value = self.scalar(name)
        return None if value is None else int(value)

    def tensor(self, name: str) -> WireArray | torch.Tensor | None:
        """The row's part of an input as a batch of one."""
        tensor = self.tensors.get(name)
        return None if tensor is None else tensor[self.index : self.index + 1]

    def words(self, name: str) -> Words:
        """A list of words, shape [2, len]: the tokens of all words, and where each word ends, padded with -1."""
        array = self.array(name)
        if array is None:
            return ()
        tokens, ends = array.tolist()
        ends = [end for end in ends if end > 0]
        return tuple(tuple(tokens[start:end]) for start, end in zip([0, *ends], ends, strict=False) if end > start)


def _parse_row(row: _Row, backend: Backend, *, exclude_input: bool) -> GenerationRequest:
    max_tokens = row.integer("request_output_len") or 0
    if max_tokens <= 0:
        raise InvalidRequest(f"request_output_len is {max_tokens}, expected at least 1")
    end_id = row.integer("end_id")
    excluded = row.scalar("exclude_input_in_output")
    return GenerationRequest(
        prompt=_prompt(row),
        max_tokens=max_tokens,
        end_id=end_id if end_id is not None and end_id >= 0 else None,
        stop_words=row.words("stop_words_list"),
        sampling=_sampling(row),
        streaming=bool(row.scalar("streaming")),
        exclude_input=exclude_input if excluded is None else bool(excluded),
        lora=_lora(row, backend),
    )


def _prompt(row: _Row) -> tuple[int, ...]:
    array = row.array("input_ids")
    tokens = [] if array is None else array.tolist()
    length = row.integer("input_lengths")
    tokens = tokens if length is None else tokens[:length]
    if not tokens:
        raise InvalidRequest("input_ids is empty, expected at least one token")
    return tuple(tokens)


def _sampling(row: _Row) -> Sampling:
    given = {
        "temperature": row.scalar("temperature"),
        "top_k": row.integer("runtime_top_k"),
        "top_p": row.scalar("runtime_top_p"),
        "repetition_penalty": row.scalar("repetition_penalty"),
        "presence_penalty": row.scalar("presence_penalty"),
        "frequency_penalty": row.scalar("frequency_penalty"),
        "min_length": row.integer("min_length") or row.integer("min_tokens"),
        "seed": row.integer("random_seed") or row.integer("seed"),
    }
    return Sampling(
        **{name: value for name, value in given.items() if value is not None},  # type: ignore[arg-type]
        bad_words=row.words("bad_words_list"),
    )


def _lora(row: _Row, backend: Backend) -> LoraInputs:
    task_id = row.integer("lora_task_id")
    weights, config = row.tensor("lora_weights"), row.tensor("lora_config")
    if task_id is None:
        if (weights is not None or config is not None) and not backend.ignores_weights_without_task:
            raise InvalidRequest("LoraConfig() is missing the argument task_id")
        return LoraInputs()
    return LoraInputs(task_id, weights, config)
