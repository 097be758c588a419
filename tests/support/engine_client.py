# SPDX-FileCopyrightText: the tritonlora authors
# SPDX-License-Identifier: Apache-2.0
"""The CPU engine without Triton: build the tensors of requests, and wait for their answers."""

from __future__ import annotations

import threading
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch

from tritonlora.cpu_engine.engine import CpuEngine

TIMEOUT = 60.0

_DTYPES = {
    "lora_task_id": np.uint64,
    "random_seed": np.uint64,
    "streaming": np.bool_,
    "stop": np.bool_,
    "exclude_input_in_output": np.bool_,
    "return_log_probs": np.bool_,
    "temperature": np.float32,
    "runtime_top_p": np.float32,
    "repetition_penalty": np.float32,
    "embedding_bias": np.float32,
}


@dataclass(slots=True)
class Received:
    """The answers to one row of a request."""

    pieces: list[list[int]] = field(default_factory=list)
    error: str | None = None
    ended: bool = False
    cancelled: bool = False  # by the client
    saw_cancel: bool = False
    asked: int = 0  # how often the engine looked whether the client has gone
    changed: threading.Condition = field(default_factory=threading.Condition)

    def send(self, tokens: Sequence[int], *, last: bool) -> None:
        self._note(piece=list(tokens), ended=last)

    def fail(self, message: str) -> None:
        self._note(error=message, ended=True)

    def cancel(self) -> None:
        self.saw_cancel = True
        self._note(ended=True)

    def is_cancelled(self) -> bool:
        self.asked += 1
        return self.cancelled

    def _note(self, *, ended: bool, piece: list[int] | None = None, error: str | None = None) -> None:
        with self.changed:
            assert not self.ended, "an answer after the last one"
            if piece is not None:
                self.pieces.append(piece)
            self.error = error
            self.ended = ended
            self.changed.notify_all()

    def wait_for_pieces(self, count: int) -> Received:
        """Until that many answers have come."""
        with self.changed:
            assert self.changed.wait_for(lambda: self.ended or len(self.pieces) >= count, TIMEOUT)
        return self

    def tokens(self) -> list[int]:
        """All tokens, when the last has come. Fails the test on an error."""
        assert self.failure() is None
        return [token for piece in self.pieces for token in piece]

    def failure(self) -> str | None:
        """The error, or None, when the last answer has come."""
        with self.changed:
            assert self.changed.wait_for(lambda: self.ended, TIMEOUT)
        return self.error


def tensors_of(prompt: Sequence[int], max_tokens: int, **inputs: Any) -> dict[str, Any]:
    """The inputs of a batch of one; `inputs` are scalars, or whole tensors as they are."""
    tensors: dict[str, Any] = {
        "input_ids": np.array([prompt], np.int32),
        "input_lengths": np.array([len(prompt)], np.int32),
        "request_output_len": np.array([max_tokens], np.int32),
    }
    for name, value in inputs.items():
        whole = isinstance(value, np.ndarray | torch.Tensor)
        tensors[name] = value if whole else np.array([value], _DTYPES.get(name, np.int32))
    return tensors


def ask(engine: CpuEngine, tensors: Mapping[str, Any], *, label: str = "") -> Received:
    """Send a batch of one."""
    received = Received()
    engine.submit(tensors, lambda row, rows: received, label=label)
    return received


def ask_batch(engine: CpuEngine, tensors: Mapping[str, Any]) -> list[Received]:
    """Send a batch; the answers of its rows."""
    received: dict[int, Received] = {}
    engine.submit(tensors, lambda row, rows: received.setdefault(row, Received()))
    return [received[row] for row in sorted(received)]


def config_directory(directory: Path, **changes: Any) -> Path:
    """A checkpoint without weights, as the synthetic model needs it: hidden 16, two layers, bfloat16."""
    import json

    config = {
        "architectures": ["LlamaForCausalLM"],
        "dtype": "bfloat16",
        "hidden_size": 16,
        "intermediate_size": 32,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "num_hidden_layers": 2,
        "vocab_size": 256,
        **changes,
    }
    directory.mkdir(parents=True, exist_ok=True)
    (directory / "config.json").write_text(json.dumps(config))
    return directory
