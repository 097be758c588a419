# SPDX-FileCopyrightText: the tritonlora authors
# SPDX-License-Identifier: Apache-2.0
"""The command convert."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated

import typer

from tritonlora.cli.options import AllowNonfinite, Base, command_group, import_torch
from tritonlora.cli.output import AsJson, print_json, print_note, stderr

app = command_group()


@app.command()
def convert(
    adapter_dir: Annotated[Path, typer.Argument(help="The PEFT adapter's directory.")],
    out_dir: Annotated[Path, typer.Argument(help="The directory for the two files; made if need be.")],
    dtype: Annotated[
        str | None,
        typer.Option(
            "--dtype", help="bfloat16, float16 or float32; by default the dtype of --base, else the adapter's."
        ),
    ] = None,
    base: Base = None,
    file_format: Annotated[str, typer.Option("--format", help="bin (raw) or npy.")] = "bin",
    allow_nonfinite: AllowNonfinite = False,
    as_json: AsJson = False,
) -> None:
    """Convert an adapter to adapter_model.bin and adapter_config.bin, without a repository.

    With --format npy the files are model.lora_weights.npy and model.lora_config.npy.
    """
    with stderr.status(f"converting {adapter_dir}"):
        import_torch()
        from tritonlora.conversion import convert as conversion  # with torch

        converted = conversion.convert(
            adapter_dir, out_dir, dtype=dtype, base=base, file_format=file_format, allow_nonfinite=allow_nonfinite
        )
    for remark in converted.remarks:
        print_note(remark)
    if base is None:
        print_note("layers were taken for what their names say; --base checks them against the base model")
    if as_json:
        print_json(converted)
    else:
        sys.stdout.write(f"{converted.weights_path}: {converted.dtype} {list(converted.weights_shape)}\n")
        sys.stdout.write(f"{converted.config_path}: int32 {list(converted.config_shape)}\n")
