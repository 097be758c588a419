# SPDX-FileCopyrightText: the tritonlora authors
# SPDX-License-Identifier: Apache-2.0
"""The command demo."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from tritonlora.cli.options import Base, command_group
from tritonlora.cli.output import AsJson
from tritonlora.demo import flow

app = command_group()


@app.command()
def demo(
    base: Base = None,
    keep: Annotated[Path | None, typer.Option("--keep", help="Leave the model repository in this directory.")] = None,
    as_json: AsJson = False,
) -> None:
    """Serve example adapters on this machine and ask each one the same questions. It needs no GPU and no account."""
    flow.run(base=base, keep=keep, as_json=as_json)
