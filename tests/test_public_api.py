# SPDX-FileCopyrightText: the tritonlora authors
# SPDX-License-Identifier: Apache-2.0
"""What `import tritonlora` offers: named, typed, documented, and imported when it is asked for."""

from __future__ import annotations

import ast
import importlib
import re
import subprocess
import sys
from pathlib import Path

import pytest

import tritonlora

INIT = Path(tritonlora.__file__)
PAGE = INIT.parents[1] / "docs" / "python.md"
NAMES = [name for name in tritonlora.__all__ if name != "__version__"]


def typed() -> dict[str, str]:
    """Name -> module:attribute, or module: alone, as a type checker sees it."""
    blocks = [node for node in ast.parse(INIT.read_text()).body if isinstance(node, ast.If)]
    imports = [node for node in blocks[0].body if isinstance(node, ast.ImportFrom)]
    found = {one.asname or one.name: f"{node.module}:{one.name}" for node in imports for one in node.names}
    return found | {name: f"{place.replace(':', '.')}:" for name, place in found.items() if place.endswith(":client")}


def test_a_type_checker_sees_what_is_imported() -> None:
    """The same names from the same places."""
    assert {*NAMES} == {*typed()} == {*tritonlora._PLACES}
    assert typed() == {name: f"tritonlora.{place}" for name, place in tritonlora._PLACES.items()}


@pytest.mark.parametrize("name", NAMES)
def test_a_public_name_is_what_its_module_has_and_says_what_it_does(name: str) -> None:
    """And dir() knows it."""
    module, _, attribute = typed()[name].partition(":")
    place = importlib.import_module(module)
    found = getattr(place, attribute) if attribute else place

    assert found is getattr(tritonlora, name)
    assert found.__doc__
    assert name in dir(tritonlora)


def test_no_other_name_is_there() -> None:
    """With Python's own words."""
    with pytest.raises(AttributeError, match="module 'tritonlora' has no attribute 'nothing'"):
        tritonlora.nothing  # type: ignore[attr-defined]  # noqa: B018


@pytest.mark.parametrize("name", NAMES)
def test_a_public_name_is_in_an_example(name: str) -> None:
    """tests/docs runs the examples."""
    assert re.search(rf"\btritonlora\.{name}\b", PAGE.read_text())


@pytest.mark.parametrize(
    ("code", "absent"),
    [
        ("import tritonlora", {"torch", "numpy", "typer", "tritonlora.errors"}),
        (
            "from tritonlora import add, check_repository, client, plan, serve",
            {"torch", "typer"},
        ),
    ],
)
def test_importing_it_does_not_import_torch(code: str, absent: set[str]) -> None:
    """Nor anything that nobody has asked for."""
    done = subprocess.run(
        [sys.executable, "-c", f"{code}\nimport sys; print(*sys.modules)"], capture_output=True, text=True, check=True
    )

    assert not absent & {*done.stdout.split()}
