# SPDX-FileCopyrightText: the tritonlora authors
# SPDX-License-Identifier: Apache-2.0
"""Open checkpoints, whole or in shards: safetensors, or pickles of plain tensors.

Tensors are read when they are used, if the format allows it. No code of a pickle runs.

A link out of the directory is refused, except into the blobs of a Hugging Face download cache. A link inside the
directory is followed: a Kubernetes volume has its files in `..data`.
"""

from __future__ import annotations

import json
import os
import re
import warnings
import zipfile
from collections.abc import Callable
from pathlib import Path

from tritonlora.errors import InvalidAdapter, one_message
from tritonlora.peft.safetensors_file import load_tensors
from tritonlora.peft.stored_tensor import StoredTensor, in_memory
from tritonlora.serving.file_version import open_file, read_file

MAX_JSON_BYTES = 16 << 20
_MAX_UNMAPPED_BYTES = 16 << 30
_LFS_POINTER = b"version https://git-lfs"


def load_checkpoint(directory: Path, safetensors_name: str, pickle_name: str) -> dict[str, StoredTensor]:
    """Name -> tensor of the checkpoint in `directory`. Safetensors are preferred to pickles. Raises InvalidAdapter."""
    for name, load in ((safetensors_name, load_tensors), (pickle_name, load_pickle)):
        if os.path.lexists(directory / name):
            return load(file_inside(directory, name))
        if os.path.lexists(directory / f"{name}.index.json"):
            return _load_shards(directory, file_inside(directory, f"{name}.index.json"), load)
    raise InvalidAdapter(
        f"there is neither a file {safetensors_name} nor {pickle_name} in {str(directory)!r}; fetch or save it again"
    )


def load_pickle(path: Path) -> dict[str, StoredTensor]:
    """The state dict in `path`, read with `weights_only`. Raises InvalidAdapter."""
    import torch

    try:
        with open(open_file(path), "rb") as file:  # noqa: PTH123  a descriptor
            is_zip = file.read(2) == b"PK"  # a file of the format before torch 1.6 is no zip, and cannot be mapped
            nbytes = os.fstat(file.fileno()).st_size
            if not is_zip and nbytes > _MAX_UNMAPPED_BYTES:
                raise InvalidAdapter(
                    f"{str(path)!r} has {nbytes} bytes in the format before torch 1.6, expected at most "
                    f"{_MAX_UNMAPPED_BYTES}; save it as safetensors"
                )
            # torch.load maps the bytes of a compressed entry as if they were not compressed.
            if is_zip and any(entry.compress_type != zipfile.ZIP_STORED for entry in zipfile.ZipFile(file).infolist()):
                raise InvalidAdapter(
                    f"{str(path)!r} is compressed, which torch.save never does; save the adapter as safetensors"
                )
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # the errors below report a malformed file
            loaded = torch.load(path, map_location="cpu", weights_only=True, mmap=is_zip)
    except InvalidAdapter:
        raise
    except Exception as error:
        # A hostile pickle can raise anything; none of its code has run. torch's own message advises to run it.
        asked = re.search(r"GLOBAL (\S+)", str(error))
        reason = f"it asks for {asked[1]!r}" if asked else "it is cut short, or of another format"
        raise InvalidAdapter(
            f"{str(path)!r} is not a checkpoint of plain tensors: {reason}; save the adapter as safetensors"
        ) from error
    if not isinstance(loaded, dict):
        raise InvalidAdapter(f"{str(path)!r} holds a {type(loaded).__name__}, expected a state dict")
    problems = [f"{key!r}: {reason}" for key, value in loaded.items() if (reason := _not_a_plain_tensor(key, value))]
    if problems:
        raise InvalidAdapter(one_message(f"{str(path)!r} is malformed", problems))
    return {key: in_memory(tensor) for key, tensor in loaded.items()}


def file_inside(directory: Path, name: str) -> Path:
    """The path of the file `name` in `directory`. Raises InvalidAdapter if it is missing, or a link out of it."""
    path = directory / name
    if Path(name).name != name or name in ("", ".", ".."):
        raise InvalidAdapter(f"{name!r} is not the name of a file in {str(directory)!r}")
    if not path.is_file():
        broken = "a link to nothing" if path.is_symlink() and not path.exists() else "not a file"
        raise InvalidAdapter(f"{str(path)!r} is {broken}; fetch or save it again")
    target, home = path.resolve(), directory.resolve()
    if not target.is_relative_to(home) and not _is_blob(target, home):
        raise InvalidAdapter(f"{str(path)!r} is a link out of its directory, to {str(target)!r}; copy the file")
    if _is_lfs_pointer(path):
        raise InvalidAdapter(f"{str(path)!r} is a pointer to a file in Git LFS; fetch the file with `git lfs pull`")
    return path


def _is_blob(target: Path, home: Path) -> bool:
    """Whether `target` is a blob in Hugging Face's download cache that the revision around `home` may link to.

    The cache has links in models--ORG--NAME/snapshots/REVISION, and files in models--ORG--NAME/blobs. Files that
    several repositories share are in blobs/XX beside these (huggingface_hub utils/_shared_blobs.py).
    """
    snapshots = next((parent for parent in home.parents if parent.name == "snapshots"), None)
    if snapshots is None:
        return False
    repository = snapshots.parent
    shared = repository.name.startswith("models--") and target.parent.parent == repository.parent / "blobs"
    return target.parent == repository / "blobs" or shared


def read_json_bytes(path: Path) -> bytes:
    """The bytes of a JSON file of at most MAX_JSON_BYTES. Raises InvalidAdapter."""
    try:
        nbytes = path.stat().st_size
        if nbytes > MAX_JSON_BYTES:
            raise InvalidAdapter(f"{str(path)!r} has {nbytes} bytes, expected at most {MAX_JSON_BYTES}; save it again")
        return read_file(path)
    except OSError as error:
        raise InvalidAdapter(f"cannot read {str(path)!r}: {error.strerror}") from error


def _load_shards(
    directory: Path, index: Path, load: Callable[[Path], dict[str, StoredTensor]]
) -> dict[str, StoredTensor]:
    """The tensors of all shards. Raises InvalidAdapter unless the shards hold exactly the tensors in the index."""
    weight_map = _weight_map(index)
    tensors: dict[str, StoredTensor] = {}
    problems = []
    for shard in sorted(set(weight_map.values())):
        try:
            loaded = load(file_inside(directory, shard))
        except InvalidAdapter as error:
            problems.append(str(error))
            continue
        stated = {key for key, name in weight_map.items() if name == shard}
        problems += [f"{key!r} is not in {shard!r}" for key in sorted(stated - loaded.keys())]
        problems += [
            f"{key!r} is in {shard!r}, but the index says {weight_map.get(key, 'nothing of it')!r}"
            for key in sorted(loaded.keys() - stated)
        ]
        tensors.update(loaded)
    if problems:
        raise InvalidAdapter(
            one_message(f"{str(index)!r} and its shards disagree; fetch the checkpoint again", problems)
        )
    return tensors


def _weight_map(index: Path) -> dict[str, str]:
    """Tensor name -> file name of its shard, from the index. Raises InvalidAdapter."""
    try:
        weight_map = json.loads(read_json_bytes(index))["weight_map"]
    except (ValueError, KeyError, TypeError, RecursionError) as error:
        raise InvalidAdapter(f"{str(index)!r} is not the index of a sharded checkpoint: {error!r}") from error
    if not isinstance(weight_map, dict) or not weight_map or not all(isinstance(v, str) for v in weight_map.values()):
        raise InvalidAdapter(f"{str(index)!r} names no shards; expected `weight_map`, from tensors to files")
    return weight_map


def _is_lfs_pointer(path: Path) -> bool:
    try:
        with open(open_file(path), "rb") as file:  # noqa: PTH123  a descriptor
            return file.read(len(_LFS_POINTER)) == _LFS_POINTER
    except OSError:
        return False  # the caller that reads the file reports the error


def _not_a_plain_tensor(key: object, value: object) -> str:
    import torch

    if not isinstance(key, str) or not isinstance(value, torch.Tensor):
        return f"expected a tensor under a name, got {type(value).__name__}"
    if value.layout is not torch.strided or value.device.type != "cpu" or value.is_quantized:
        return f"expected a plain tensor, got {value.layout} on {value.device}"
    # Strides of 0 make a small file claim any shape.
    if value.numel() * value.element_size() > value.untyped_storage().nbytes():
        return f"{tuple(value.shape)} has more elements than the file holds"
    return ""
