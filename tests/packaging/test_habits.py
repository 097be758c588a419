# SPDX-FileCopyrightText: the tritonlora authors
# SPDX-License-Identifier: Apache-2.0
"""What a release needs besides code: changelog, licence, guide, and a page that says what to install."""

from __future__ import annotations

import importlib.metadata
import re

from environments import ROOT
from tritonlora import __version__, extras

EXTRAS = {*importlib.metadata.metadata("tritonlora").get_all("Provides-Extra", [])}


def test_the_newest_part_of_the_changelog_is_of_this_version() -> None:
    """Versions go down from there, each once."""
    headings = re.findall(r"^## (\S+)$", (ROOT / "plugin/CHANGELOG.md").read_text(), re.MULTILINE)
    versions = [tuple(map(int, heading.split("."))) for heading in headings]

    assert __version__ == headings[0]
    assert sorted({*versions}, reverse=True) == versions


def test_the_guide_names_files_that_are_there() -> None:
    """Whole paths in backticks; and it tells the five things that a contributor asks."""
    text = (ROOT / "plugin/CONTRIBUTING.md").read_text()
    named = re.findall(r"`((?:plugin|scripts|tests)/[\w./-]+)`", text)

    parts = re.findall(r"^## (.+)$", text, re.MULTILINE)

    assert ["Set up", "Run one test", "Add an architecture", "Add a finding", "Release"] == parts
    assert len(named) > 5
    assert [] == [path for path in named if not (ROOT / path).exists()]


def test_the_page_on_installing_names_the_extras_there_are() -> None:
    """Every extra that a command asks for, and no other than pyproject.toml's."""
    text = (ROOT / "plugin/docs/install.md").read_text()
    named = {name for names in re.findall(r"\[([a-z,]+)\]'", text) for name in names.split(",")}

    assert named <= EXTRAS
    assert {"convert", "demo", "bench", "server"} <= named
    assert extras.MODULES.keys() <= EXTRAS
