# SPDX-FileCopyrightText: the tritonlora authors
# SPDX-License-Identifier: Apache-2.0
"""The wheel and the sdist: what is in them, and what they say of themselves."""

from __future__ import annotations

import importlib.metadata
import re
import subprocess
import tarfile
import zipfile
from email.message import Message
from email.parser import Parser
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

from archives import Archives, build
from environments import ROOT
from tritonlora import __version__, extras

DIST_INFO = f"tritonlora-{__version__}.dist-info"
MODULE_OF = {
    "opentelemetry-sdk": "opentelemetry",
    "grpcio": "grpc",
    "pyyaml": "yaml",
}  # where a module is not called as its package


def members(wheel: Path) -> dict[str, bytes]:
    """Path -> content, without the list of hashes."""
    with zipfile.ZipFile(wheel) as archive:
        return {name: archive.read(name) for name in archive.namelist() if not name.endswith("RECORD")}


def committed(*directories: str) -> dict[str, bytes]:
    """Path -> content of the regular files that git knows of in these directories."""
    listed = subprocess.run(["git", "ls-files", "-z", *directories], cwd=ROOT, capture_output=True, check=True).stdout
    paths = [Path(name) for name in listed.decode().split("\0") if name]
    return {str(path): (ROOT / path).read_bytes() for path in paths if not (ROOT / path).is_symlink()}


def metadata(wheel: Path) -> Message:
    return Parser().parsestr(members(wheel)[f"{DIST_INFO}/METADATA"].decode())


def test_the_wheel_holds_the_package_and_the_model_repository(archives: Archives) -> None:
    """Every file that git knows of, and none else; the code that models link to is there once."""
    package = {name.removeprefix("plugin/"): text for name, text in committed("plugin/tritonlora").items()}
    models = {f"tritonlora/{name}": text for name, text in committed("model_repository").items()}
    found = members(archives.wheel)
    ours = {name: text for name, text in found.items() if not name.startswith(DIST_INFO)}

    assert (package | models).keys() == ours.keys()
    assert package | models == ours
    assert (ROOT / "plugin/LICENSE").read_bytes() == found[f"{DIST_INFO}/licenses/plugin/LICENSE"]


def test_the_sdist_builds_the_same_wheel(archives: Archives, tmp_path: Path) -> None:
    """Byte for byte."""
    assert archives.sdist
    with tarfile.open(archives.sdist) as archive:
        archive.extractall(tmp_path, filter="data")
    [source] = tmp_path.iterdir()
    rebuilt = build(source, tmp_path / "dist", "--target", "wheel").wheel

    assert members(archives.wheel) == members(rebuilt)


def test_the_sdist_holds_no_tests(archives: Archives) -> None:
    """What the wheel is made of, the documentation and the licence."""
    assert archives.sdist
    with tarfile.open(archives.sdist) as archive:
        parts = {name.split("/")[1] for name in archive.getnames() if "/" in name}

    assert parts == {"PKG-INFO", "README.md", "model_repository", "plugin", "pyproject.toml"} | (parts & {".gitignore"})


def test_the_metadata_are_those_of_the_code(archives: Archives) -> None:
    """The version of `tritonlora --version`, and every extra whose modules extras.py knows."""
    said = metadata(archives.wheel)

    assert __version__ == said["Version"]
    assert extras.MODULES.keys() <= set(said.get_all("Provides-Extra", []))
    assert "Apache-2.0" == said["License-Expression"]


def test_every_extra_brings_the_modules_that_are_asked_for(archives: Archives) -> None:
    """Extras hold other extras; a module that is missing is blamed on the smallest one that brings it."""
    requirements = [Requirement(text) for text in metadata(archives.wheel).get_all("Requires-Dist", [])]

    def brought(extra: str) -> set[str]:
        direct = {one.name: one.extras for one in requirements if one.marker and one.marker.evaluate({"extra": extra})}
        nested = direct.pop("tritonlora", set())
        return {MODULE_OF.get(name, name.replace("-", "_")) for name in direct}.union(*map(brought, nested))

    for extra, modules in extras.MODULES.items():
        assert {*modules} <= brought(extra), extra
    for module in {module for modules in extras.MODULES.values() for module in modules}:
        found = extras.extra_of(module)
        assert found is not None
        assert module in brought(found)
        smaller = [other for other in extras.MODULES if brought(other) < brought(found)]
        assert not any(module in brought(other) for other in smaller), module


def pins() -> list[Requirement]:
    """The lines of scripts/constraints.txt."""
    lines = (ROOT / "scripts" / "constraints.txt").read_text().splitlines()
    return [Requirement(line) for line in lines if not line.startswith("#")]


def test_every_installed_package_is_pinned() -> None:
    """The tests' own environment, which scripts/setup made, has the pinned version of each package and no other."""
    here = {one.name: one for one in pins() if one.marker is None or one.marker.evaluate()}
    installed = {canonicalize_name(one.name): one.version for one in importlib.metadata.distributions()}
    del installed[canonicalize_name("tritonlora")]

    assert {} == {name: version for name, version in installed.items() if name not in here}
    assert [] == [f"{name} {one}" for name, one in installed.items() if not here[name].specifier.contains(one)]


@pytest.mark.parametrize("version", ["3.10", "3.11", "3.12", "3.13"])
def test_a_dependency_is_pinned_once_for_each_python(archives: Archives, version: str) -> None:
    """To one version exactly."""
    python = {"python_version": version, "python_full_version": f"{version}.0"}
    here = [one for one in pins() if one.marker is None or one.marker.evaluate(python)]
    wanted = [Requirement(text) for text in metadata(archives.wheel).get_all("Requires-Dist", [])]
    extras_of_all = metadata(archives.wheel).get_all("Provides-Extra", [])
    direct = {
        canonicalize_name(one.name)
        for one in wanted
        if one.marker is None or any(one.marker.evaluate(python | {"extra": extra}) for extra in ("", *extras_of_all))
    }

    assert direct - {"tritonlora"} <= {one.name for one in here}
    assert len({one.name for one in here}) == len(here)
    assert all(re.fullmatch(r"==[^*,]+", str(one.specifier)) for one in here)
