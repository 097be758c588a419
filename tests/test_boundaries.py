# SPDX-FileCopyrightText: the tritonlora authors
# SPDX-License-Identifier: Apache-2.0
"""The rules about which module may know what, read off the sources."""

from __future__ import annotations

import ast
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PACKAGE = ROOT / "plugin" / "tritonlora"
TESTS = ROOT / "tests"
SOURCES = {path.relative_to(PACKAGE).as_posix(): ast.parse(path.read_text()) for path in PACKAGE.rglob("*.py")}
# Each part of the package imports only parts that stand before it.
LAYERS = (
    "serving", "errors", "extras", "strict_json", "exposition", "files", "interrupts", "machine", "pbtxt",
    "architectures", "peft", "sources", "engine",
    "conversion", "targets", "repository", "check", "launch", "top", "openai", "cpu_engine", "demo", "bench", "cli",
    "__main__",
)  # fmt: skip
# Modules that import torch when they are imported. The others answer at once.
WITH_TORCH = (
    "conversion/tensors.py",
    "conversion/values.py",
    "conversion/dora.py",
    "conversion/composition.py",
    "cpu_engine/causal_lm.py",
    "cpu_engine/packed.py",
    "cpu_engine/sampling.py",
    "demo/gguf_checkpoint.py",
    "demo/train.py",
)
# Modules of `serving` that translate between Triton and the rest, which is tested without Triton.
TRANSLATES = (
    "router_model.py",
    "outgoing.py",
    "reply.py",
    "resolver_model.py",
    "listing_model.py",
    "own_requests.py",
    "publishing.py",
    "resolver_client.py",
    "text_models.py",
    "triton.py",
)
# Packages that compute: values in, values out. They read where a path is the input's meaning, and write nothing.
CORE = (
    "pbtxt/", "architectures/", "peft/", "engine/",
    "conversion/layout.py", "conversion/fused_layers.py", "conversion/misfits.py", "conversion/rows.py",
)  # fmt: skip
WRITES = {"write_text", "write_bytes", "unlink", "rename", "mkdir", "rmtree", "touch", "symlink_to"}


def imports(name: str, *, top_level: bool = False) -> Iterator[str]:
    """The modules that a source of the package imports, by their full names.

    The package's own __init__ imports nothing itself: it has the public names for a type checker, and looks each up
    when somebody outside asks for it.
    """
    tree = SOURCES[name]
    parts = ["tritonlora", *Path(name).with_suffix("").parts]
    for node in tree.body if top_level or name == "__init__.py" else ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = ".".join([*parts[: len(parts) - node.level], *([node.module] if node.module else [])])
            base = base if node.level else node.module or ""
            yield base
            yield from (f"{base}.{alias.name}" for alias in node.names)


def edges() -> dict[str, set[str]]:
    """The modules of the package that each module of it imports, also inside functions."""
    modules = {f"tritonlora.{name.removesuffix('.py').replace('/', '.')}": name for name in SOURCES}
    modules |= {module.removesuffix(".__init__"): name for module, name in modules.items()}
    return {name: {modules[one] for one in imports(name) if one in modules} - {name} for name in SOURCES}


def layer(name: str) -> str:
    """The part of the package that a source belongs to."""
    return name.partition("/")[0].removesuffix(".py")


def test_imports_point_one_way() -> None:
    """From the command line down to what runs inside Triton, which knows nothing of the rest."""
    wrong = [
        f"{name} imports {other}"
        for name, others in edges().items()
        if layer(name) != "__init__"
        for other in others
        if layer(other) not in ("__init__", *LAYERS[: LAYERS.index(layer(name)) + 1])
    ]

    assert [] == wrong


def test_no_module_is_reached_from_itself() -> None:
    """Within a package too."""
    found = edges()

    def reached(name: str, seen: set[str]) -> set[str]:
        for other in found[name] - seen:
            seen.add(other)
            reached(other, seen)
        return seen

    assert [] == [name for name in SOURCES if name in reached(name, set())]


def test_serving_needs_the_standard_library_and_numpy() -> None:
    """It is copied into model repositories, and runs in a plain Triton container."""
    allowed = sys.stdlib_module_names | {"numpy", "tritonlora"}
    others = {
        (Path(name).name, one.partition(".")[0])
        for name in SOURCES
        if layer(name) == "serving"
        for one in imports(name)
        if one.partition(".")[0] not in allowed
    }

    assert {(name, "triton_python_backend_utils") for name in TRANSLATES} | {("tokenizer.py", "transformers")} == others


def test_serving_imports_itself_relatively() -> None:
    """The copy in a model repository is a package of another name."""
    absolute = [
        f"{name}: {node.module}"
        for name, tree in SOURCES.items()
        if layer(name) == "serving"
        for node in ast.walk(tree)
        if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("tritonlora")
    ]

    assert [] == absolute


def test_only_models_import_triton_s_python_backend() -> None:
    """Decisions are tested without a server."""
    allowed = {*(f"serving/{name}" for name in TRANSLATES), "cpu_engine/triton_model.py"}

    assert allowed == {name for name in SOURCES if "triton_python_backend_utils" in imports(name)}


def test_torch_is_imported_only_where_it_is_needed() -> None:
    """It takes seconds. Where `conversion.tensors` is imported at the top of a module, so is torch."""
    slow = {"torch", "transformers"} | {f"tritonlora.conversion.{name}" for name in ("tensors", "dora", "composition")}
    found = [name for name in SOURCES if slow & {*imports(name, top_level=True)} and not name.startswith(WITH_TORCH)]

    assert ["conversion/convert.py"] == found, "the command `convert`, which does nothing else"


def test_the_command_line_imports_at_the_top_of_its_modules() -> None:
    """But for torch, and what imports it: a module is imported when one of its commands is asked for."""
    inside = {
        (name, ast.unparse(node))
        for name, tree in SOURCES.items()
        if name.startswith("cli/")
        for function in ast.walk(tree)
        if isinstance(function, ast.FunctionDef)
        for node in ast.walk(function)
        if isinstance(node, ast.Import | ast.ImportFrom)
    }

    assert {
        ("cli/options.py", "import torch"),
        ("cli/convert.py", "from tritonlora.conversion import convert as conversion"),
        ("cli/bench.py", "from tritonlora.bench import convert as benchmark"),
        ("cli/bench.py", "from tritonlora.bench import openai as benchmark"),
        ("cli/openai.py", "from tritonlora.openai import server"),
        ("cli/bench.py", "from tritonlora.bench import measured, route"),
        ("cli/bench.py", "from tritonlora.bench import mix"),
    } == inside


def test_check_does_not_start_servers() -> None:
    """It looks at files."""
    assert [] == [
        name for name, others in edges().items() if layer(name) == "check" for o in others if layer(o) == "launch"
    ]


def test_the_core_writes_no_files() -> None:
    """Only files.py does, and those that call it."""
    found = {
        (name, node.func.attr)
        for name, tree in SOURCES.items()
        if name.startswith(CORE)
        for node in ast.walk(tree)
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute) and node.func.attr in WRITES
    }

    assert set() == found


@pytest.mark.parametrize("path", sorted(TESTS.rglob("*.py")), ids=lambda path: str(path.relative_to(TESTS)))
def test_no_test_imports_a_test(path: Path) -> None:
    """Shared code is in tests/support."""
    modules = [node.module or "" for node in ast.walk(ast.parse(path.read_text())) if isinstance(node, ast.ImportFrom)]

    assert [] == [name for name in modules if name.partition(".")[0].startswith(("test_", "tests", "conftest"))]


def test_every_source_says_whose_it_is_and_what_it_holds() -> None:
    """Two SPDX lines and a docstring."""
    lacking = []
    for path in [*PACKAGE.rglob("*.py"), *(ROOT / "model_repository").glob("*/1/model.py"), *TESTS.rglob("*.py")]:
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
