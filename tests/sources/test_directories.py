# SPDX-FileCopyrightText: the tritonlora authors
# SPDX-License-Identifier: Apache-2.0
"""sources: a directory as a source, and what adapters.json keeps of it."""

from __future__ import annotations

import hashlib
import json
import shutil
from dataclasses import replace
from pathlib import Path

import pytest

from repositories import synthetic_adapter
from tritonlora.errors import InvalidAdapter
from tritonlora.repository import add, init, paths
from tritonlora.repository.paths import Repository, read_table
from tritonlora.serving.adapter_table import Source
from tritonlora.sources.fetch import fetched


@pytest.fixture(scope="module")
def adapter(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An adapter's directory, with a file that the adapter does not need."""
    directory = synthetic_adapter(tmp_path_factory.mktemp("sources") / "pirate")
    (directory / "README.md").write_text("a page")
    return directory


@pytest.fixture(scope="module")
def empty(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The shipped repository."""
    root = tmp_path_factory.mktemp("empty") / "repo"
    init.create_repository(root)
    return root


@pytest.fixture
def opened(empty: Path, tmp_path: Path) -> Repository:
    """A fresh copy of it."""
    shutil.copytree(empty, tmp_path / "repo")
    return paths.open_repository(tmp_path / "repo")


def expected_digest(directory: Path) -> str:
    """As sha256sum would print the two files, and the SHA-256 of that."""
    names = ("adapter_config.json", "adapter_model.safetensors")
    lines = [f"{hashlib.sha256((directory / name).read_bytes()).hexdigest()}  {name}\n" for name in names]
    return hashlib.sha256("".join(sorted(lines)).encode()).hexdigest()


def test_a_directory_is_pinned_by_the_sha256_of_the_files_that_the_adapter_needs(adapter: Path) -> None:
    """And has no revision."""
    with fetched(str(adapter)) as found:
        assert Source(str(adapter), None, expected_digest(adapter)) == found.source
        assert adapter == found.directory


def test_the_same_content_from_another_place_keeps_its_id(opened: Repository, adapter: Path, tmp_path: Path) -> None:
    """Only the note in the table changes."""
    shutil.copytree(adapter, tmp_path / "elsewhere")
    with fetched(str(adapter)) as found:
        first = add.add(opened, "pirate", found)
        again = add.add(opened, "pirate", found)
    with fetched(str(tmp_path / "elsewhere")) as found:
        moved = add.add(opened, "pirate", found)
        stays = add.add(opened, "pirate", tmp_path / "elsewhere")
    entry = read_table(opened).entries["pirate"]

    assert json.loads(opened.table_path.read_text())["adapters"]["pirate"]["source"] == {
        "location": str(tmp_path / "elsewhere"),
        "revision": None,
        "sha256": expected_digest(adapter),
    }
    assert [False, True, False, True] == [one.unchanged for one in (first, again, moved, stays)]
    assert replace(first.entry, source=entry.source) == moved.entry == entry


def test_a_directory_that_changes_while_it_is_added_is_refused(
    opened: Repository, adapter: Path, tmp_path: Path
) -> None:
    """Or the SHA-256 in the table would be of other weights than those that are served."""
    copy = Path(shutil.copytree(adapter, tmp_path / "changing"))
    with fetched(str(copy)) as found:
        synthetic_adapter(copy, 1)

        with pytest.raises(InvalidAdapter, match="was changed while the adapter was read; try again"):
            add.add(opened, "pirate", found)
    assert {} == read_table(opened).entries


def test_a_directory_that_holds_no_adapter_is_refused(tmp_path: Path) -> None:
    """As `load_adapter` refuses it."""
    with pytest.raises(InvalidAdapter, match="is empty; fetch the adapter again"), fetched(str(tmp_path)):
        pass
