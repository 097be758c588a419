# SPDX-FileCopyrightText: the tritonlora authors
# SPDX-License-Identifier: Apache-2.0
"""Every command, option, file, field and message that README and docs name exists."""

from __future__ import annotations

import ast
import re
import shlex
import subprocess
from collections.abc import Iterator
from functools import cache
from itertools import takewhile
from pathlib import Path
from typing import Any

import pytest
import typer

from documentation import DOCS, PAGES, ROOT, Page
from tritonlora.cli import commands

SOURCES = ("plugin/tritonlora", "model_repository", "scripts", "tests/support/upstream", "tests/support/llm_api")
PATHS = ("plugin/", "scripts/", "tests/", "model_repository/")
# The names of other programs: theirs are not in our source.
FOREIGN_OPTIONS = {
    *(
        "--lora_plugin",
        "--lora_target_modules",
        "--max_lora_rank",
        "--max_beam_width",
        "--kv_cache_type",
    ),  # trtllm-build
    *(
        "--allow-client-shm",
        "--disable-auto-complete-config",
        "--exit-timeout-secs",
        "--model-control-mode",
        "--load-model",
        "--model-repository",
    ),  # tritonserver
    *("--http-restricted-api", "--grpc-restricted-protocol"),
    "--from",  # uvx
}
FOREIGN_NAMES = {
    *("enable_empty_final_response", "triton_final_response", "triton_grpc_error"),  # Triton's gRPC
    *("lock_exception", "save_pretrained"),  # boost, transformers
}
FOREIGN_MESSAGES = {
    "unexpected shape for input 'lora_name' for model 'ensemble'. Expected [-1,1], got [1]",  # Triton core
    "malloc_consolidate(): unaligned fastbin chunk detected",  # glibc, in tritonserver
}
_COMMAND_WORDS = {
    "tritonlora",
    "scripts/demo",
    "scripts/test",
    "pip",
    "uvx",
    "pipx",
    "docker",
    "kubectl",
    "cp",
    "export",
    "curl",
}


def option_names(words: list[str]) -> set[str]:
    """The options of the tritonlora command that `words` begin with. KeyError when there is no such command."""
    command: Any = typer.main.get_command(commands.app)
    rest = list(words)
    while hasattr(command, "commands") and rest and not rest[0].startswith("-"):
        command = command.commands[rest.pop(0)]
    return {"--help", *(name for param in command.params for name in [*param.opts, *param.secondary_opts])}


@cache
def every_option() -> frozenset[str]:
    """The options of all commands."""
    group: Any = typer.main.get_command(commands.app)
    benches = [["bench", name] for name in group.commands["bench"].commands]
    return frozenset().union(*(option_names(words) for words in [*([name] for name in group.commands), *benches]))


def command_problems(text: str) -> list[str]:
    """What is wrong with the tritonlora commands in a shell script: unknown commands, unknown options."""
    problems = []
    for line in text.replace("\\\n", " ").splitlines():
        words = shlex.split(line, comments=True)
        if "tritonlora" not in words:
            continue
        words = words[words.index("tritonlora") + 1 :]
        words = words[: words.index("--")] if "--" in words else words
        try:
            known = option_names(words)
        except KeyError as error:
            problems.append(f"{line!r}: no command {error}")
            continue
        options = {word.partition("=")[0] for word in words if word.startswith("--")}
        problems += [f"{line!r}: no option {option}" for option in sorted(options - known)]
    return problems


@cache
def source() -> str:
    """All the text in which a name may stand."""
    files = [
        path for top in SOURCES for path in (ROOT / top).rglob("*") if path.is_file() and "__pycache__" not in str(path)
    ]
    return "\n".join(path.read_text(errors="replace") for path in [*files, ROOT / "pyproject.toml"])


@cache
def messages() -> str:
    """Every text of the Python source, a line each, with … for what is filled in."""
    found = []
    for path in [*(ROOT / "plugin/tritonlora").rglob("*.py"), *(ROOT / "tests/support/llm_api").rglob("*.py")]:
        found += [text for node in ast.walk(ast.parse(path.read_text())) for text in _texts(node)]
    return "\n".join(found)


def _texts(node: ast.AST) -> Iterator[str]:
    if isinstance(node, ast.Constant) and isinstance(node.value, str):
        yield node.value
    elif isinstance(node, ast.JoinedStr):
        yield "".join(part.value if isinstance(part, ast.Constant) else "…" for part in node.values)  # type: ignore[misc]


def span_problem(span: str) -> str | None:
    """What is wrong with a code span, if anything."""
    words = span.split()
    if words[0] in _COMMAND_WORDS:
        problems = command_problems(span) if "…" not in span and "=" not in words[0] else []
        return problems[0] if problems else None
    if span.startswith(PATHS) and len(words) == 1:
        return None if list(ROOT.glob(span.rstrip("/"))) else "no such file"
    if span.startswith("--"):
        return None if words[0].partition("=")[0] in FOREIGN_OPTIONS | every_option() else "no such option"
    if len(words) >= 4:
        return None if span in messages() or span in FOREIGN_MESSAGES else "no such message"
    unknown = [name for name in re.findall(r"\b[a-z]\w*_\w*[a-z0-9]\b", span) if name not in source()]
    return f"no such name: {unknown[0]}" if unknown and unknown[0] not in FOREIGN_NAMES else None


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_what_the_page_names_exists(page: Page) -> None:
    """In code spans: commands, options, files, names with an underscore, and messages of four words or more."""
    assert {} == {span: problem for span in page.spans if (problem := span_problem(span))}


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_commands_in_code_blocks_parse(page: Page) -> None:
    """Those that are not run, too: as shell scripts, and as commands of ours."""
    for block in page.blocks:
        if block.language == "bash":
            parsed = subprocess.run(["bash", "-n"], input=block.text, text=True, capture_output=True, check=False)

            assert "" == parsed.stderr
            assert [] == command_problems(block.text)
        elif block.language == "python":
            ast.parse(block.text)


@pytest.mark.parametrize(
    ("span", "problem"),
    [
        ("tritonlora add --no-warmup", None),
        ("tritonlora add --no-warm", "no option --no-warm"),
        ("tritonlora ad", "no command 'ad'"),
        ("--no-warmup", None),
        ("--no-warm", "no such option"),
        ("plugin/tritonlora/errors.py", None),
        ("plugin/tritonlora/error.py", "no such file"),
        ("lora_task_id", None),
        ("lora_task_idea", "no such name"),
        ("unknown LoRA adapter …; …", None),
        ("unknown LoRA adaptor …; …", "no such message"),
    ],
)
def test_a_name_that_does_not_exist_is_found(span: str, problem: str | None) -> None:
    """Each kind of name, right and misspelt."""
    found = span_problem(span)

    assert (problem is None) == (found is None)
    assert problem is None or problem in str(found)


def test_no_source_cites_a_page_that_is_not_here() -> None:
    """A page without a directory before its name is one of ours; with one, it is another project's."""
    ours = {page.path.name for page in PAGES}

    assert set(re.findall(r"(?<![\w/-])[\w-]+\.md\b", source())) <= ours


def test_every_path_of_the_package_tree_exists() -> None:
    """README's tree: each path at the beginning of a line, in the directory above it."""
    [tree] = [block.text for block in PAGES[0].blocks if block.text.startswith("plugin/tritonlora/")]
    parents: list[tuple[int, Path]] = []
    for line in tree.splitlines():
        indent = len(line) - len(line.lstrip())
        parents = [(depth, path) for depth, path in parents if depth < indent]
        above = parents[-1][1] if parents else ROOT
        names = [*takewhile(lambda word: word.endswith("/"), line.split())]
        for name in names:
            assert (above / name).exists(), above / name
        parents.append((indent, above / names[0]))


def test_the_page_on_the_architecture_knows_the_tree() -> None:
    """Every package once, in the table of packages; and modules of `serving` that there are."""
    text = (DOCS / "architecture.md").read_text()
    table = text.partition("\n## Packages\n")[2].partition("\n\n`init` copies")[0]
    rows = [line.split("|")[1] for line in table.splitlines() if line.startswith("| `")]
    package = ROOT / "plugin/tritonlora"

    assert sorted(path.parent.name for path in package.glob("*/__init__.py")) == sorted(
        re.findall(r"`(\w+)`", "".join(rows))
    )
    assert set() == {*re.findall(r"`(\w+\.py)`", text)} - {path.name for path in (package / "serving").glob("*.py")}
