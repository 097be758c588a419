# SPDX-FileCopyrightText: the tritonlora authors
# SPDX-License-Identifier: Apache-2.0
"""Find the directory of the adapter that a path stands for."""

from __future__ import annotations

import os
from pathlib import Path

from tritonlora.errors import InvalidAdapter
from tritonlora.peft.formats import format_of_directory, refuse

CONFIG_FILE = "adapter_config.json"
WEIGHTS_FILES = frozenset(
    {
        *("adapter_model.safetensors", "adapter_model.bin"),
        *("adapter_model.safetensors.index.json", "adapter_model.bin.index.json"),
    }
)


def adapter_directory(path: Path) -> Path:
    """The directory of the adapter that `path` stands for. Raises InvalidAdapter if there is none, or several.

    `path` is the adapter's directory, a file of the adapter, a directory that holds one adapter, or a model's directory
    in the cache of Hugging Face.
    """
    if path.name in {CONFIG_FILE, *WEIGHTS_FILES} and path.is_file():
        path = path.parent
    if not path.is_dir():
        what = "is not a directory" if path.exists() else "does not exist"
        raise InvalidAdapter(f"{str(path)!r} {what}; give the directory that holds adapter_config.json")
    path = _snapshot(path)
    if os.path.lexists(path / CONFIG_FILE):
        return path
    # save_pretrained puts an adapter that is not called "default" into a directory with the adapter's name.
    inner = _inner_adapters(path)
    if len(inner) == 1:
        return inner[0]
    if not inner:
        refuse(path, format_of_directory(path))
        if not any(path.iterdir()):
            raise InvalidAdapter(f"{str(path)!r} is empty; fetch the adapter again, or remove the directory")
    hint = (
        f"; it holds several adapters, give one: {', '.join(map(str, inner))}"
        if inner
        else "; give the directory that PEFT's save_pretrained wrote"
    )
    raise InvalidAdapter(f"there is no adapter_config.json in {str(path)!r}{hint}")


def _inner_adapters(path: Path) -> list[Path]:
    """The directories in `path` that hold an adapter, sorted. Links out of `path` are left out."""
    home = path.resolve()
    return sorted(
        one
        for one in path.iterdir()
        if not one.name.startswith(".")  # a Kubernetes volume has each file a second time, below `..data`
        and (one / CONFIG_FILE).is_file()
        and one.resolve().is_relative_to(home)
    )


def _snapshot(path: Path) -> Path:
    """The fetched revision, for `models--OWNER--NAME` of a Hugging Face cache; any other path unchanged."""
    snapshots = path / "snapshots"
    if not path.name.startswith("models--") or not snapshots.is_dir():
        return path
    main = path / "refs" / "main"
    revisions = sorted(one for one in snapshots.iterdir() if one.is_dir())
    if main.is_file():
        named = snapshots / main.read_text(errors="replace").strip()
        revisions = [named] if named in revisions else revisions
    if len(revisions) == 1:
        return revisions[0]
    raise InvalidAdapter(
        f"{str(path)!r} is a download cache with {len(revisions)} revisions"
        + (f", give one: {', '.join(map(str, revisions))}" if revisions else "; download the adapter again")
    )
