# SPDX-FileCopyrightText: the tritonlora authors
# SPDX-License-Identifier: Apache-2.0
"""A model for the place of `tensorrt_llm` that gives every kind of output that TensorRT-LLM's model gives.

`repositories.put_many_outputs_engine` copies this file there. Nothing is computed: a response follows from the request
alone. Outputs, their shapes, and which response has which are those of TensorRT-LLM's Triton model and executor
(triton_backend/inflight_batcher_llm/src/model_instance_state.cc, fillTritonResponse, and
cpp/tensorrt_llm/batch_manager/llmRequest.cpp, createResult):

- With num_return_sequences above 1 each response is of one sequence, and sequence_index says of which.
- With beam_width above 1 each response has the beams, or the first num_return_sequences of them, from their beginning.
- Else a streamed response has the tokens that are new, and their logits. Log probabilities are of all tokens so far.

A token is a byte.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
import triton_python_backend_utils as pb_utils

FINAL = pb_utils.TRITONSERVER_RESPONSE_COMPLETE_FINAL
VOCABULARY = np.arange(4, dtype=np.float32)
MISS = "LoRA task {} not found in cache. Please send LoRA weights with request"
OPTIONAL = {
    "cum_log_probs": "return_log_probs",
    "output_log_probs": "return_log_probs",
    "context_logits": "return_context_logits",
    "generation_logits": "return_generation_logits",
}

Arrays = dict[str, npt.NDArray[Any]]


class TritonPythonModel:
    """The one instance."""

    def initialize(self, _args: dict[str, str]) -> None:
        """No adapter has been given yet."""
        self._task_ids: set[int] = set()

    def execute(self, requests: list[pb_utils.InferenceRequest]) -> None:
        """Answer one request after the other; the rows of a batch take turns."""
        for request in requests:
            sender, wanted = request.get_response_sender(), request.requested_output_names()
            inputs = {tensor.name(): tensor for tensor in request.inputs()}
            has_weights = inputs.pop("lora_weights", None) is not None
            arrays = {name: tensor.as_numpy() for name, tensor in inputs.items()}
            task_ids = {*arrays.get("lora_task_id", np.zeros(0, np.uint64)).reshape(-1).tolist()}
            self._task_ids |= task_ids if has_weights else set()
            if missing := task_ids - self._task_ids:
                error = pb_utils.TritonError(MISS.format(min(missing)))
                sender.send(pb_utils.InferenceResponse(error=error), flags=FINAL)
                continue
            responses = responses_of_batch(arrays)
            for number, outputs in enumerate(responses, 1):
                tensors = [pb_utils.Tensor(name, array) for name, array in outputs.items() if name in wanted]
                sender.send(pb_utils.InferenceResponse(tensors), flags=FINAL if number == len(responses) else 0)


def responses_of_batch(inputs: Arrays) -> list[Arrays]:
    """Those of all rows, in turns."""
    batch = len(inputs["input_lengths"])
    rows = [list(responses_of({name: array[row] for name, array in inputs.items()})) for row in range(batch)]
    if batch == 1:
        return rows[0]
    for row, responses in enumerate(rows):
        for outputs in responses:
            outputs["batch_index"] = np.array([[row]], np.int32)
    return [outputs for turn in itertools.zip_longest(*rows) for outputs in turn if outputs is not None]


def responses_of(row: Arrays) -> Iterator[Arrays]:
    """Those of one row: its sequences take turns, and one of them may come twice in a row."""
    given = {name: array.reshape(-1)[0] for name, array in row.items() if array.size}
    prompt = bytes(row["input_ids"][: given["input_lengths"]].tolist())
    width, count = int(given.get("beam_width", 1)), int(given.get("num_return_sequences", 0))
    texts = [text_of(int(given.get("lora_task_id", 0)), prompt, number) for number in range(max(width, count, 1))]
    # A sequence is a list of beams.
    sequences = [texts[: min(count or width, width)]] if width > 1 else [[text] for text in texts]
    lengths = [max(map(len, beams)) for beams in sequences]
    for index, start, stop in turns(lengths, streams=bool(given.get("streaming"))):
        beams, is_last = sequences[index], stop == lengths[index]
        if width > 1:
            start = 0
            beams = beams if is_last else beams[::-1]  # which beam is the best changes until the end
        outputs = {**outputs_of(beams, start, stop), "context_logits": logits_of([prompt])[0]}
        if count > 1:
            outputs["sequence_index"] = np.array([[index]], np.int32)
        yield {name: array for name, array in outputs.items() if name not in OPTIONAL or given.get(OPTIONAL[name])}


def turns(lengths: Sequence[int], *, streams: bool) -> Iterator[tuple[int, int, int]]:
    """(sequence, its first new token, the one after its last) of each response: one to three tokens, or all."""
    sent = [0] * len(lengths)
    for step in itertools.count():
        for turn in range(len(lengths)):
            index = (turn + step) % len(lengths)
            if sent[index] < lengths[index]:
                start = sent[index]
                sent[index] = min(start + 1 + (step + index) % 3, lengths[index]) if streams else lengths[index]
                yield index, start, sent[index]
        if sent == [*lengths]:
            return


def text_of(task_id: int, prompt: bytes, number: int) -> bytes:
    """The text of a sequence or a beam: it says whose it is, and has characters of one to four bytes."""
    return b"[%d.%d]%s" % (task_id, number, prompt) + " é日🎉".encode() * (number + 1)


def outputs_of(beams: Sequence[bytes], start: int, stop: int) -> Arrays:
    """The tokens of each beam from `start` to `stop`, their logits, and the log probabilities up to there."""
    new = [beam[start:stop] for beam in beams]
    log_probs = [[-(token + place) / 256 for place, token in enumerate(beam[:stop])] for beam in beams]
    return {
        "output_ids": padded(new, np.int32)[None],
        "sequence_length": np.array([[len(tokens) for tokens in new]], np.int32),
        "cum_log_probs": np.array([[sum(beam) for beam in log_probs]], np.float32),
        "output_log_probs": padded(log_probs, np.float32)[None],
        "generation_logits": logits_of(new)[None],
    }


def logits_of(beams: Sequence[bytes]) -> npt.NDArray[Any]:
    """(beams, tokens, vocabulary)."""
    logits: npt.NDArray[Any] = padded(beams, np.float32)[..., None] + VOCABULARY
    return logits


def padded(rows: Sequence[Sequence[float] | bytes], dtype: type) -> npt.NDArray[Any]:
    """As one array, shorter rows ending in -1."""
    array: npt.NDArray[Any] = np.full((len(rows), max(map(len, rows))), -1, dtype)
    for into, row in zip(array, rows, strict=True):
        into[: len(row)] = list(row)
    return array
