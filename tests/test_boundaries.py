# SPDX-FileCopyrightText: the tritonlora authors
# SPDX-License-Identifier: Apache-2.0
"""The rules about which module may know what, read off the sources."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PACKAGE = ROOT / "plugin" / "tritonlora"
SOURCES = {path.relative_to(PACKAGE).as_posix(): ast.parse(path.read_text()) for path in PACKAGE.rglob("*.py")}
# Values in, values out: they read only where a path is the input's very meaning, and write nothing.
CORE = (
    "modules.py", "families.py", "locate.py", "engine.py", "cache.py", "plan.py", "traffic.py", "textformat.py",
    "model_config.py", "pbtxt.py", "wiring.py", "warmup.py", "adapters.py", "adapters_json.py", "routing.py",
    "layout.py", "stream.py", "text.py", "tokenizer.py",
)  # fmt: skip
WITHOUT_TORCH = (
    *CORE, "cli.py", "terminal.py", "repository.py", "register.py", "install.py", "undo.py", "check.py",
    "findings.py", "surroundings.py", "server.py", "serving.py", "client.py",
)  # fmt: skip
WRITES = {"write_text", "write_bytes", "unlink", "rename", "mkdir", "rmtree", "touch", "symlink_to"}


def imports(tree: ast.AST, *, top_level: bool = False) -> set[str]:
    """The modules that a source imports."""
    found: set[str] = set()
    for node in tree.body if top_level and isinstance(tree, ast.Module) else ast.walk(tree):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            found |= {node.module, *(f"{node.module}.{alias.name}" for alias in node.names)}
    return found


def test_only_the_models_import_triton_s_python_backend() -> None:
    """What decides can be tested without a server."""
    assert [name for name, tree in SOURCES.items() if "triton_python_backend_utils" in imports(tree)] == []


def test_imports_point_one_way() -> None:
    """No module is reached from itself, imports inside functions included."""
    names = {f"tritonlora.{name.removesuffix('.py').replace('/', '.')}": name for name in SOURCES}
    edges = {name: {names[one] for one in imports(tree) if one in names} - {name} for name, tree in SOURCES.items()}

    def reached(name: str, seen: set[str]) -> set[str]:
        for other in edges[name] - seen:
            seen.add(other)
            reached(other, seen)
        return seen

    assert [name for name in SOURCES if name in reached(name, set())] == []


@pytest.mark.parametrize("name", WITHOUT_TORCH)
def test_torch_is_imported_only_where_it_is_needed(name: str) -> None:
    """At module level it would cost every command seconds."""
    assert [
        one for one in imports(SOURCES[name], top_level=True) if one.split(".")[0] in ("torch", "transformers")
    ] == []


@pytest.mark.parametrize("name", CORE)
def test_the_core_writes_no_files(name: str) -> None:
    """Only files.py, and those that call it, do."""
    called = {
        node.func.attr
        for node in ast.walk(SOURCES[name])
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute)
    }

    assert called & WRITES == set()


def test_every_source_says_whose_it_is_and_what_it_holds() -> None:
    """Two SPDX lines and a docstring."""
    lacking = []
    for path in [
        *PACKAGE.rglob("*.py"),
        *(ROOT / "model_repository").glob("*/1/model.py"),
        *(ROOT / "tests").rglob("*.py"),
    ]:
        text = path.read_text()
        if not text.startswith("# SPDX-FileCopyrightText") or not (
            ast.get_docstring(ast.parse(text)) or not text.strip()
        ):
            lacking.append(str(path))

    assert lacking == []


def test_no_file_has_a_name_that_says_nothing() -> None:
    """No utils, helpers, common, manager or handler."""
    empty_names = {"utils", "util", "helpers", "common", "misc", "manager", "handler"}

    assert [name for name in SOURCES if Path(name).stem in empty_names] == []
