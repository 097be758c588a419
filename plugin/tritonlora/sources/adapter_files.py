# SPDX-FileCopyrightText: the tritonlora authors
# SPDX-License-Identifier: Apache-2.0
"""Which files of a source an adapter needs, and the SHA-256 over them."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Collection, Iterator
from pathlib import Path
from typing import TypeAlias

from tritonlora.errors import InvalidAdapter, SourceError
from tritonlora.files import sha256_of
from tritonlora.peft.checkpoint import read_json_bytes

OnProgress: TypeAlias = "Callable[[str, int, int | None], None]"
"""Called with the name of a file, the bytes of it that are here, and its size in bytes, if that is known."""
CONFIG = "adapter_config.json"
CHECKPOINTS = ("adapter_model.safetensors", "adapter_model.bin")  # the first one that is there counts
TEMPLATES = ("chat_template.jinja", "tokenizer_config.json")  # of an adapter that was saved with its tokenizer
MOST_NBYTES = 64 << 30  # of an adapter's files; float32 of rank 512 for all layers of 70 billion weights takes 26 GiB
MOST_INDEX_NBYTES = 16 << 20
INDEX = ".index.json"  # after a checkpoint's name: the file that names its shards


def weights_file(names: Collection[str]) -> str | None:
    """The checkpoint among the file names of an adapter's directory, or its index; None if there is neither."""
    candidates = (name + suffix for name in CHECKPOINTS for suffix in ("", INDEX))
    return next((name for name in candidates if name in names), None)


def shards(index: bytes) -> list[str]:
    """The file names of the shards in an index, sorted. SourceError when it names none, or a path."""
    try:
        found = {*json.loads(index)["weight_map"].values()}
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError):
        found = set()
    if not found or not all(isinstance(name, str) and name not in ("", ".", "..") for name in found):
        raise SourceError("the index of its checkpoint names no shards; save the adapter again")
    if wrong := sorted(name for name in found if Path(name).name != name):
        raise SourceError(f"the index of its checkpoint names {wrong[0]!r}, which is no file beside it")
    return sorted(found)


def needed(directory: Path) -> list[Path]:
    """The files of the adapter in `directory` that are there, sorted by name. A broken index adds none."""
    names = {path.name for path in directory.iterdir() if path.is_file()}
    found = {CONFIG, *TEMPLATES} & names
    if weights := weights_file(names):
        found |= {weights, *_shards_there(directory / weights, names)}
    return [directory / name for name in sorted(found)]


def _shards_there(weights: Path, names: Collection[str]) -> Iterator[str]:
    if weights.name.endswith(INDEX):
        try:
            yield from (name for name in shards(read_json_bytes(weights)) if name in names)
        except (SourceError, InvalidAdapter):
            return  # `load_adapter` reports it


def check_size(nbytes: int) -> None:
    """Raise SourceError if an adapter's files have more bytes together than any adapter needs."""
    if nbytes > MOST_NBYTES:
        raise SourceError(f"it has {nbytes} bytes, expected at most {MOST_NBYTES}; it is no adapter")


def digest(files: Collection[Path]) -> str:
    """The SHA-256 over the names and contents of these files. It does not depend on where the files lie."""
    lines = sorted(f"{sha256_of(path)}  {path.name}\n" for path in files)
    return hashlib.sha256("".join(lines).encode()).hexdigest()
