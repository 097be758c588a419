# SPDX-FileCopyrightText: the tritonlora authors
# SPDX-License-Identifier: Apache-2.0
"""The wheel in empty environments outside the checkout: each command runs, or says which extra it needs."""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from archives import Archives
from environments import Environment, new_environment, outside_the_checkout
from repositories import put_many_outputs_engine, synthetic_adapter, synthetic_repository
from tritonlora import __version__
from tritonlora.machine import free_ports
from tritonlora.repository.paths import Repository
from upstream_configs import upstream_repository

THIS = f"{sys.version_info.major}.{sys.version_info.minor}"
MOST_BYTES = 150 << 20  # of an environment without extras, Python itself not counted


@pytest.fixture
def opened(tmp_path: Path) -> Repository:
    """A repository with one adapter."""
    return synthetic_repository(tmp_path / "models", warm=["joker"], topology="resolve")


@pytest.fixture
def directory() -> Iterator[Path]:
    """A directory for an environment. It is where uv can link packages from its cache: `tmp_path` may be in memory."""
    with tempfile.TemporaryDirectory() as name:
        yield Path(name)


def without_extras(directory: Path, version: str, archives: Archives) -> Environment:
    environment = new_environment(directory / "environment", version)
    environment.install(str(archives.wheel))
    return environment


def nbytes(directory: Path) -> int:
    return sum(path.stat().st_size for path in directory.rglob("*") if path.is_file() and not path.is_symlink())


def check_commands_without_extras(environment: Environment, opened: Repository) -> None:
    """All that look at files only; the others name their extra."""
    repository, upstream = ["--repo", str(opened.root)], opened.root.with_name("upstream")
    upstream_repository(upstream, "v0.18.0")
    environment.run("python", "-c", "import importlib.util as u; assert u.find_spec('torch') is None")

    assert f"tritonlora {__version__}\n" == environment.run("tritonlora", "--version").stdout
    assert ["joker"] == [*json.loads(environment.run("tritonlora", "list", *repository, "--json").stdout)]
    for words in (
        ["init", str(upstream)],
        ["plan", *repository],
        ["check", *repository],
        ["alias", "jester", "joker", *repository],
        ["remove", "jester", *repository],
    ):
        environment.run("tritonlora", *words)
    assert (upstream / "lora_router" / "1" / "serving" / "router_model.py").is_file()
    command = environment.run("tritonlora", "serve", *repository, "--print-command").stdout
    assert f"tritonserver --model-repository={opened.root} " in command
    adapter = str(synthetic_adapter(opened.root.with_name("adapter")))
    for extra, words in (
        ("convert", ["add", "more", adapter, *repository]),
        ("convert", ["convert", adapter, str(opened.root.with_name("out"))]),
        ("demo", ["demo"]),
        ("bench", ["bench", "route"]),
        ("server", ["serve", *repository]),
    ):
        refused = environment.run("tritonlora", *words, status=1).stderr
        assert f"pip install 'tritonlora[{extra}]'\n" == refused[refused.index("pip install") :]


def check_served(environment: Environment, opened: Repository) -> None:
    """`serve` starts the embedded server, which answers by name, and ends in order."""
    ports, log = free_ports(), opened.root.with_name("serve.log")
    words = [f"--http-port={ports.http}", f"--grpc-port={ports.grpc}", f"--metrics-port={ports.metrics}"]
    command = environment.command("tritonlora", "serve", f"--repo={opened.root}", *words)
    place, variables = environment.directory, outside_the_checkout()
    with (
        log.open("w") as errors,
        subprocess.Popen(command, cwd=place, env=variables, stdout=subprocess.PIPE, stderr=errors, text=True) as serve,
    ):
        try:
            assert serve.stdout
            assert serve.stdout.readline().startswith("ready on http"), log.read_text()
            url = f"--url=127.0.0.1:{ports.http}"
            listed = json.loads(environment.run("tritonlora", "list", url, "--json").stdout)
            environment.run("tritonlora", "generate", "Hi", "--lora-name=joker", url)
            environment.run("tritonlora", "generate", "Hi", "--lora-name=nobody", url, status=1)
        finally:
            serve.terminate()
    assert ["joker"] == [*listed]
    assert serve.returncode == 0


@pytest.mark.parametrize("version", ["3.13", "3.12", "3.10"])
def test_the_wheel_without_torch(version: str, archives: Archives, directory: Path, opened: Repository) -> None:
    """The commands that need no extra, and, up to 3.12, the embedded server in front of an engine without torch."""
    environment = without_extras(directory, version, archives)
    assert nbytes(environment.directory) < MOST_BYTES
    check_commands_without_extras(environment, opened)
    if version != "3.13":
        environment.install(f"{archives.wheel}[server]")
        put_many_outputs_engine(opened)
        check_served(environment, opened)


def test_the_wheel_with_its_extras(archives: Archives, directory: Path, tmp_path: Path, opened: Repository) -> None:
    """`convert` brings add and convert; `demo` and `server` bring the demo, and serve in front of the CPU engine."""
    environment = without_extras(directory, THIS, archives)
    environment.install(f"{archives.wheel}[convert]")
    adapter = str(synthetic_adapter(tmp_path / "adapter", seed=1))
    environment.run("tritonlora", "convert", adapter, str(tmp_path / "converted"))
    environment.run("tritonlora", "add", "jester", adapter, f"--repo={opened.root}")
    environment.run("tritonlora", "remove", "jester", f"--repo={opened.root}")
    assert {"adapter_model.bin", "adapter_config.bin"} <= {path.name for path in (tmp_path / "converted").iterdir()}

    environment.install(f"{archives.wheel}[demo,server]")
    check_served(environment, opened)
    said = json.loads(environment.run("tritonlora", "demo", "--json").stdout)
    assert {None, "bard", "json", "pirate"} == {answer["lora_name"] for answer in said["answers"]}
