# SPDX-FileCopyrightText: the tritonlora authors
# SPDX-License-Identifier: Apache-2.0
"""The bash and python blocks of README and docs run, each page from top to bottom, and print what the page says.

A page runs in a directory that holds what the pages assume: `REPO`, a model repository made from upstream's templates
(with the CPU engine behind them), and `adapters/pirate` and `adapters/haiku`, two PEFT adapters. Ports are free ones.
A page that asks a server and starts none finds one running, with both adapters.

A text block after another block is its expected output; … stands for anything in a line, alone for any lines.
"""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import psutil
import pytest

import preloaded
from adapters import as_mlx
from documentation import PAGES, ROOT, Block, Page
from repositories import synthetic_adapter
from tritonlora.machine import free_ports
from tritonlora.repository import add, init, paths
from upstream_configs import upstream_repository_on_the_cpu

# "```bash docker": what is needed to run the block, and is not here.
MARKS = {"", "docker", "cluster", "gpu", "minutes", "client"}
BETWEEN = "\x1e"  # printed before each block
SCRIPT_SECONDS = 600


@dataclass(frozen=True)
class Workplace:
    """Where the blocks of one page run."""

    directory: Path
    environment: dict[str, str]
    ports: tuple[int, int, int]

    def run(self, scripts: list[str]) -> list[str]:
        """What each of these bash scripts printed, run in turn in one shell. AssertionError if one fails."""
        text = "".join(f"printf '{BETWEEN}'\n{script}\n" for script in scripts)
        for port, free in zip((8000, 8001, 8002), self.ports, strict=True):
            text = text.replace(f"localhost:{port}", f"localhost:{free}")
        done = subprocess.run(
            ["bash", "-euo", "pipefail", "-c", text],
            cwd=self.directory,
            env=self.environment,
            text=True,
            capture_output=True,
            timeout=SCRIPT_SECONDS,
            check=False,
        )
        outputs = done.stdout.split(BETWEEN)[1:]

        assert (0, len(scripts)) == (done.returncode, len(outputs)), f"{scripts[len(outputs) - 1]}\n{done.stderr}"
        return outputs


@pytest.fixture(scope="module")
def program(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """The program `tritonlora` of the docs."""
    with preloaded.commands(tmp_path_factory.mktemp("bin")) as program:
        yield program


@pytest.fixture
def workplace(tmp_path: Path, program: Path) -> Iterator[Workplace]:
    """A fresh one. The server that was started in it is stopped, and waited for, by its process id."""
    upstream_repository_on_the_cpu(tmp_path / "REPO", "v0.18.0", decoupled="True")
    for seed, name in enumerate(("pirate", "haiku")):
        synthetic_adapter(tmp_path / "adapters" / name, seed)
    as_mlx(tmp_path / "adapters" / "haiku", tmp_path / "mlx-adapter")
    ports = free_ports()
    pid = tmp_path / "pid"
    environment = {
        **{name: value for name, value in os.environ.items() if name != "TRITONLORA_REPO"},
        "PATH": os.pathsep.join([str(program.parent), str(Path(sys.executable).parent), os.environ["PATH"]]),
        "DOCUMENTED_PORTS": f"{ports.http},{ports.grpc},{ports.metrics}",
        "DOCUMENTED_PID": str(pid),
    }
    try:
        yield Workplace(tmp_path, environment, (ports.http, ports.grpc, ports.metrics))
    finally:
        if pid.exists() and psutil.pid_exists(int(pid.read_text())):
            server = psutil.Process(int(pid.read_text()))
            server.terminate()
            server.wait(timeout=60)


def runnable(page: Page) -> list[Block]:
    """The blocks that are run."""
    return [block for block in page.blocks if block.language in ("bash", "python") and not block.mark]


def script(block: Block) -> str:
    """The block as a bash script."""
    return block.text if block.language == "bash" else f"python - <<'END OF BLOCK'\n{block.text}END OF BLOCK\n"


def expected_output(page: Page, block: Block) -> str | None:
    """What the page says that `block` prints; None when it says nothing."""
    following = page.blocks[page.blocks.index(block) + 1 :][:1]
    return next((one.text for one in following if one.language == "text" and one.follows), None)


def is_as_told(told: str, printed: str) -> bool:
    """Whether `printed` is what the page tells."""
    lines = [re.escape(line).replace("…", ".*") + r" *\n" for line in told.splitlines()]
    pattern = "".join(r"(?:.*\n)*?" if line == r".* *\n" else line for line in lines)
    return re.fullmatch(pattern, printed.strip("\n") + "\n") is not None


WITH_BLOCKS = [page for page in PAGES if runnable(page)]


@pytest.mark.parametrize("page", WITH_BLOCKS, ids=lambda page: page.name)
def test_the_blocks_of_the_page_run(page: Page, workplace: Workplace) -> None:
    """And print what the page says that they print."""
    blocks = runnable(page)
    texts = "".join(block.text for block in blocks)
    if re.search(r"localhost:800\d|tritonlora generate", texts) and "tritonlora serve" not in texts:
        init.init(workplace.directory / "REPO")
        opened = paths.open_repository(workplace.directory / "REPO")
        for name in ("haiku", "pirate"):
            add.add(opened, name, workplace.directory / "adapters" / name)
        workplace.run(["tritonlora serve --repo REPO >/dev/null"])
    outputs = workplace.run([script(block) for block in blocks])

    for block, printed in zip(blocks, outputs, strict=True):
        told = expected_output(page, block)
        assert told is None or is_as_told(told, printed), f"{page.name}, line {block.line}:\n{printed}"


def test_the_demo_prints_what_readme_says(workplace: Workplace) -> None:
    """scripts/demo is scripts/setup and this command."""
    [told] = [block.text for block in PAGES[0].blocks if "capital of Germany" in block.text]
    [printed] = workplace.run(["tritonlora demo"])

    assert "tritonlora demo" in (ROOT / "scripts" / "demo").read_text()
    assert is_as_told(told, printed), printed


def test_a_block_that_fails_is_found(workplace: Workplace) -> None:
    """And named: the third one does not run then."""
    with pytest.raises(AssertionError, match="tritonlora nonsense"):
        workplace.run(["true", "tritonlora nonsense", "true"])


@pytest.mark.parametrize(
    ("told", "printed", "same"),
    [
        ("a\n", "a\n", True),
        ("a\n", "b\n", False),
        ("a … c\n", "a b c\n", True),
        ("a …\n", "a b\nc\n", False),
        ("a\n…\nd\n", "a\nb\nc\nd\n", True),
        ("…\nd\n", "a\nb\n", False),
    ],
)
def test_output_that_differs_from_the_page_is_found(told: str, printed: str, same: bool) -> None:
    """… stands for something in a line, or for lines."""
    assert same == is_as_told(told, printed)


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_every_block_says_what_it_is(page: Page) -> None:
    """A language, and a mark only where it cannot run here."""
    known = {"bash", "python", "text", "json", "promql", "protobuf", "yaml"}

    assert [] == [block.line for block in page.blocks if block.language not in known or block.mark not in MARKS]


def test_there_are_blocks_to_run() -> None:
    """README's and those of the pages for users."""
    assert {"README.md", "plugin/docs/clients.md", "plugin/docs/quickstart.md"} <= {page.name for page in WITH_BLOCKS}
    assert shutil.which("curl") is not None
    assert ROOT / "README.md" == PAGES[0].path
