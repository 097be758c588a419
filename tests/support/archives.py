# SPDX-FileCopyrightText: the tritonlora authors
# SPDX-License-Identifier: Apache-2.0
"""The archives that a release consists of."""

from __future__ import annotations

import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True)
class Archives:
    """A wheel and an sdist; `sdist` is None where only the wheel was built."""

    wheel: Path
    sdist: Path | None


def build(source: Path, out: Path, *options: str) -> Archives:
    """What hatchling makes of a source tree. It asks no registry."""
    command = [sys.executable, "-m", "hatchling", "build", "--directory", str(out), *options]
    done = subprocess.run(command, cwd=source, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return Archives(next(out.glob("*.whl")), next(out.glob("*.tar.gz"), None))
