# SPDX-FileCopyrightText: the tritonlora authors
# SPDX-License-Identifier: Apache-2.0
"""The models that come with tritonlora, and the code that they run."""

from __future__ import annotations

from pathlib import Path

import tritonlora
from tritonlora.errors import RepositoryError
from tritonlora.repository.paths import ROUTER, SERVING, read_text

PACKAGE = Path(tritonlora.__file__).resolve().parent


def shipped_models() -> Path:
    """The model repository that comes with tritonlora, in the installed package or in the checkout around it.

    RepositoryError when this installation has none.
    """
    places = (PACKAGE / "model_repository", PACKAGE.parents[1] / "model_repository")
    for path in places:
        if (path / ROUTER / "1" / "model.py").is_file():
            return path
    raise RepositoryError(
        f"this installation of tritonlora has no model_repository (looked at {' and '.join(map(str, places))}); "
        "install it again"
    )


def code_of(model: str) -> dict[str, str]:
    """The code of one of tritonlora's models: path in the repository -> content, in the order of writing."""
    modules = {f"{model}/1/{SERVING}/{path.name}": path for path in sorted((PACKAGE / SERVING).glob("*.py"))}
    last = {f"{model}/1/model.py": shipped_models() / model / "1" / "model.py"}  # it imports the modules
    return {name: read_text(path) for name, path in (modules | last).items()}
