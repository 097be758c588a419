# SPDX-FileCopyrightText: the tritonlora authors
# SPDX-License-Identifier: Apache-2.0
"""Compare embeddings that PEFT saved whole beside the LoRA with the base model's embeddings.

PEFT saves embeddings by itself when the vocabulary was resized, for example for a pad token
(`save_embedding_layers="auto"` in src/peft/utils/save_and_load.py). If no row of the base model was changed, the engine
does not need the saved embeddings.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path

from tritonlora.errors import InvalidAdapter
from tritonlora.peft.checkpoint import load_checkpoint
from tritonlora.peft.stored_tensor import StoredTensor
from tritonlora.serving.dtypes import LORA_DTYPES

EMBEDDING = re.compile(r"(?:.*\.)?(?P<leaf>embed_tokens|wte|word_embeddings|embed_in|lm_head|embed_out)\.weight")
_OUTPUT = frozenset({"lm_head", "embed_out"})  # may share the input embedding's weight, and is then not stored
_NBYTES_AT_A_TIME = 64 << 20
_WITHOUT_BASE = (
    "an embedding, saved whole; --base with the base model's checkpoint shows whether its rows are the base model's: "
    "then it is not needed; or load the adapter with PEFT, which takes the base model's memory, and save it with "
    "save_embedding_layers=False"
)


def compare_embeddings(saved: Mapping[str, StoredTensor], base: Path | None) -> tuple[list[str], list[str]]:
    """(problems, remarks) of the embeddings `saved`, by the name of the tensor. `base` is the base model's checkpoint.

    There is one remark if no row of the base model is changed, and otherwise there are problems.
    """
    if not saved:
        return [], []
    if base is None:
        return [f"{key!r}: {_WITHOUT_BASE}" for key in saved], []
    try:
        of_base = _load_embeddings(base)
    except InvalidAdapter as error:
        return [f"{key!r}: {_WITHOUT_BASE}; {error}" for key in saved], []
    problems, added = [], 0
    for key, tensor in saved.items():
        try:
            added = max(added, _new_rows(key, tensor, of_base))
        except InvalidAdapter as error:
            problems.append(f"{key!r}: {error}")
    if problems:
        return problems, []
    unknown = (
        f"; the engine has no embeddings for its new tokens ({added}): requests must not hold them" if added else ""
    )
    names = ", ".join(map(repr, saved))
    return [], [f"{names}: saved whole, and left out, since no row of the base model is changed{unknown}"]


def _load_embeddings(base: Path) -> dict[str, StoredTensor]:
    """Last part of the name -> embedding, for the text model's embeddings in the checkpoint `base`.

    Raises InvalidAdapter if `base` holds no checkpoint.
    """
    found: dict[str, StoredTensor] = {}
    for key, tensor in load_checkpoint(base, "model.safetensors", "pytorch_model.bin").items():
        match = EMBEDDING.fullmatch(key)
        if match and not re.search("vision|visual|audio|encoder", key):
            found[match["leaf"]] = tensor
    return found


def _new_rows(key: str, saved: StoredTensor, base: Mapping[str, StoredTensor]) -> int:
    """The number of rows that the embedding `saved` has beyond the base model's rows.

    `base` comes from `_load_embeddings`. Raises InvalidAdapter with the reason if a row of the base model is changed in
    `saved`, or if `base` has no embedding to compare with.
    """
    match = EMBEDDING.fullmatch(key)
    leaf = match["leaf"] if match else ""
    before = base.get(leaf)
    if before is None and leaf in _OUTPUT:
        inputs = [tensor for name, tensor in base.items() if name not in _OUTPUT]
        before = inputs[0] if len(inputs) == 1 else None
    if before is None or {saved.dtype.name, before.dtype.name} - {*LORA_DTYPES}:
        raise InvalidAdapter("an embedding, saved whole, and the checkpoint of --base has none to compare it with")
    if len(saved.shape) != 2 or len(before.shape) != 2 or saved.shape[1] != before.shape[1]:
        raise InvalidAdapter(
            f"an embedding of {saved.shape}, and the base model's is {before.shape}; give the base model that the "
            "adapter was trained on"
        )
    common = min(saved.shape[0], before.shape[0])
    changed = _changed_rows(saved, before, common)
    if changed:
        raise InvalidAdapter(
            f"an embedding in which {changed} of the base model's {before.shape[0]} rows are changed: it was trained, "
            "and cannot be sent to an engine; merge the adapter into the base model"
        )
    return saved.shape[0] - common


def _changed_rows(saved: StoredTensor, before: StoredTensor, rows: int) -> int:
    """How many of the first `rows` rows differ. The base model's values are first rounded to the saved dtype."""
    import torch

    width = saved.shape[1]
    step = max(1, _NBYTES_AT_A_TIME // (4 * width))
    changed = 0
    for first in range(0, rows, step):
        count = min(step, rows - first)
        parts = []
        for tensor in (saved, before):
            content = bytearray(count * width * tensor.dtype.itemsize)
            tensor.read_at(first * width * tensor.dtype.itemsize, memoryview(content))
            parts.append(torch.frombuffer(content, dtype=getattr(torch, tensor.dtype.name)).view(count, width))
        changed += int((parts[0] != parts[1].to(parts[0].dtype)).any(dim=1).sum())
    return changed
