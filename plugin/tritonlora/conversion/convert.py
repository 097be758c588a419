# SPDX-FileCopyrightText: the tritonlora authors
# SPDX-License-Identifier: Apache-2.0
"""Convert a PEFT adapter's directory to two files, lora_weights and lora_config, without a model repository.

The raw files have the format of a model_warmup sample's files. The .npy files have the names that TensorRT-LLM's
lora_prefetch_dir and Triton's OpenAI frontend read.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from tritonlora.conversion import tensors
from tritonlora.conversion.layout import plan_layout
from tritonlora.engine.profile import load_profile
from tritonlora.errors import EngineMismatch, RepositoryError, UnsupportedAdapter
from tritonlora.files import abandoned_beside, delete, publish, temporary_name
from tritonlora.interrupts import held
from tritonlora.peft import adapter as peft
from tritonlora.serving.dtypes import DTYPES

NAMES = {
    "bin": ("adapter_model.bin", "adapter_config.bin"),
    "npy": ("model.lora_weights.npy", "model.lora_config.npy"),
}
"""Format -> the files of lora_weights and lora_config."""


@dataclass(frozen=True, slots=True)
class Converted:
    """The two files that a conversion wrote: paths, dtype of lora_weights, and shapes."""

    weights_path: Path
    config_path: Path
    dtype: str
    weights_shape: tuple[int, ...]  # (n, W) raw; (1, n, W) in .npy
    config_shape: tuple[int, ...]
    remarks: tuple[str, ...] = ()  # what the user should know


def convert(
    adapter_directory: Path,
    out_directory: Path,
    *,
    dtype: str | None = None,
    base: Path | None = None,
    file_format: str = "bin",
    allow_nonfinite: bool = False,
) -> Converted:
    """Write lora_weights and lora_config of the adapter into `out_directory`: both files whole, or neither.

    `dtype` defaults to the dtype of the base model in `base`. Without `base` it defaults to the adapter's own dtype, if
    all the adapter's tensors share one. With `base` the adapter is checked against the base model. Temporary files that
    a killed conversion left in `out_directory` are deleted.

    Raises AdapterError where the adapter cannot be converted, and RepositoryError where the files cannot be written.
    """
    if file_format not in NAMES:
        raise UnsupportedAdapter(f"format {file_format!r} is not one of {', '.join(NAMES)}")
    weights_path, config_path = (out_directory / name for name in NAMES[file_format])
    profile = load_profile(base, dtype=dtype) if base else None
    adapter = peft.load_adapter(adapter_directory, base)
    for path in (weights_path, config_path):
        if path.is_dir():
            raise RepositoryError(f"{str(path)!r} is a directory; choose another output directory")
    if file_format == "bin" and (out_directory / "adapter_config.json").exists():
        raise RepositoryError(
            f"{str(out_directory)!r} holds a PEFT adapter (adapter_config.json), whose own weights may be called "
            f"{weights_path.name}; choose another output directory"
        )
    if dtype is None:
        dtypes = {tensor.dtype.name for module in adapter.modules.values() for tensor in (module.lora_A, module.lora_B)}
        dtype = profile.dtype if profile else dtypes.pop() if len(dtypes) == 1 else None
    if dtype is None:
        raise EngineMismatch("the adapter's tensors have different dtypes; give the engine's with --dtype")
    layout = plan_layout(adapter, dtype=dtype, profile=profile, base=base)
    lora_config = tensors.lora_config(layout).numpy().astype("<i4")
    weights_shape: tuple[int, ...] = layout.weights_shape
    config_shape: tuple[int, ...] = layout.config_shape
    weights_header = config_header = b""
    if file_format == "npy":
        weights_shape, config_shape = (1, *weights_shape), (1, *config_shape)
        weights_header, config_header = npy_header(weights_shape, dtype), npy_header(config_shape, "int32")
    try:
        with _directory(out_directory):
            for left in abandoned_beside([out_directory / name for names in NAMES.values() for name in names]):
                with contextlib.suppress(OSError):
                    delete(left)
            with temporary_name(weights_path) as weights, temporary_name(config_path) as rows:
                remarks = tensors.convert_file(
                    adapter, layout, weights, header=weights_header, base=base, allow_nonfinite=allow_nonfinite
                )
                rows.write_bytes(config_header + lora_config.tobytes())
                with held():  # stopped at any instant, both files are of one conversion
                    config_path.unlink(missing_ok=True)
                    publish(weights, weights_path, for_all=False)
                    publish(rows, config_path, for_all=False)
    except OSError as error:
        raise RepositoryError(f"cannot write to {str(out_directory)!r}: {error.strerror or error}") from error
    return Converted(weights_path, config_path, dtype, weights_shape, config_shape, (*layout.remarks, *remarks))


def npy_header(shape: Sequence[int], dtype: str) -> bytes:
    """The header of a .npy file (version 1.0, C order) of `shape` and `dtype`; the raw bytes follow it.

    Raises UnsupportedAdapter for bfloat16, which .npy cannot express.
    """
    if not DTYPES[dtype].numpy:
        raise UnsupportedAdapter(
            f".npy has no {dtype}, and TensorRT-LLM's loadNpy (lora_prefetch_dir) does not read the raw type that "
            "numpy writes instead; convert to float16 for an engine of float16, or use the raw format"
        )
    sizes = ", ".join(str(size) for size in shape) + ("," if len(shape) == 1 else "")
    text = f"{{'descr': '{DTYPES[dtype].numpy}', 'fortran_order': False, 'shape': ({sizes}), }}"
    start = len(b"\x93NUMPY\x01\x00") + 2
    padded = text + " " * (-(start + len(text) + 1) % 64) + "\n"
    return b"\x93NUMPY\x01\x00" + len(padded).to_bytes(2, "little") + padded.encode("ascii")


@contextlib.contextmanager
def _directory(path: Path) -> Iterator[None]:
    """Make the directory `path`. If the body raises, remove the directories that were made and are empty."""
    missing = [directory for directory in (path, *path.parents) if not directory.exists()]
    path.mkdir(parents=True, exist_ok=True)
    try:
        yield
    except BaseException:
        with contextlib.suppress(OSError):
            for directory in missing:
                directory.rmdir()
        raise
