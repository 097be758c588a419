# SPDX-FileCopyrightText: the tritonlora authors
# SPDX-License-Identifier: Apache-2.0
"""Virtual environments outside the checkout, made by uv, with what scripts/constraints.txt pins."""

from __future__ import annotations

import os
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).parents[2]
_UV = Path(sys.executable).with_name("uv")
_OF_THE_CALLER = ("PYTHON", "TRITONLORA", "VIRTUAL_ENV")


def outside_the_checkout() -> dict[str, str]:
    """The environment variables of somebody who knows nothing of the checkout and of the tests' own environment."""
    own = str(Path(sys.executable).parent)
    path = os.pathsep.join(part for part in os.environ["PATH"].split(os.pathsep) if part != own)
    kept = {name: value for name, value in os.environ.items() if not name.startswith(_OF_THE_CALLER)}
    return kept | {"PATH": path, "COLUMNS": "200"}


def interpreter(version: str) -> str:
    """What uv takes for Python `version`: the tests' own, one of pyenv's, else what uv finds or fetches itself."""
    if version == f"{sys.version_info.major}.{sys.version_info.minor}":
        return sys.executable
    pyenv = Path(os.environ.get("PYENV_ROOT", Path.home() / ".pyenv"))
    return next(map(str, pyenv.glob(f"versions/{version}.*/bin/python{version}")), version)


@dataclass(frozen=True)
class Environment:
    """A virtual environment."""

    directory: Path

    def install(self, *requirements: str) -> None:
        """Install them, no other version of anything than the pinned one, and check that all fits together."""
        constraints = f"--constraint={ROOT / 'scripts' / 'constraints.txt'}"
        _uv("pip", "install", f"--python={self.directory}", constraints, *requirements)
        _uv("pip", "check", f"--python={self.directory}")

    def command(self, *words: str) -> list[str]:
        """The command line of one of the environment's programs."""
        return [str(self.directory / "bin" / words[0]), *words[1:]]

    def run(self, *words: str, status: int = 0) -> subprocess.CompletedProcess[str]:
        """Run one of the environment's programs in its directory; it has to end with `status`."""
        done = subprocess.run(
            self.command(*words),
            cwd=self.directory,
            env=outside_the_checkout(),
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
        )
        assert done.returncode == status, f"{words} ended with {done.returncode}:\n{done.stdout}\n{done.stderr}"
        return done


def new_environment(directory: Path, version: str) -> Environment:
    """An empty one with Python `version`."""
    _uv("venv", f"--python={interpreter(version)}", str(directory))
    return Environment(directory)


def _uv(*words: str) -> None:
    # uv looks where pip is told to: for the CPU build of torch, say.
    links = os.environ.get("PIP_FIND_LINKS")
    environment = outside_the_checkout() | ({"UV_FIND_LINKS": links} if links else {})
    done = subprocess.run([_UV, *words], env=environment, capture_output=True, text=True)
    assert done.returncode == 0, f"uv {' '.join(words)}:\n{done.stderr}"
