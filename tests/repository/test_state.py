# SPDX-FileCopyrightText: the tritonlora authors
# SPDX-License-Identifier: Apache-2.0
"""A command reads a repository once, renders what follows once, and writes each file once."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest

from repositories import synthetic_adapter
from tritonlora.pbtxt import text_format
from tritonlora.repository import add, generated, init, paths, registry, state, warmup
from tritonlora.repository.paths import Repository
from tritonlora.repository.state import read_state
from tritonlora.serving.adapter_table import AdapterTable, with_entry
from upstream_configs import upstream_repository

BFLOAT16 = add.Options(dtype="bfloat16")
Parser, rename, render_block = text_format._Parser, Path.replace, warmup.render_block
read_text, table_of = paths.read_text, paths.read_table


class Counts:
    """How often each text was parsed, each file read to decide on, the block rendered, and each file given its name.

    `undo.write` reads a file once more to keep what it replaces.
    """

    def __init__(self, patch: pytest.MonkeyPatch) -> None:
        self.parsed, self.read, self.written = Counter[str](), Counter[Path](), Counter[Path]()
        self.rendered = 0

        def parse(text: str) -> text_format._Parser:
            self.parsed[text] += 1
            return Parser(text)

        def read(path: Path) -> str:
            self.read[path] += 1
            return read_text(path)

        def read_table(repository: Repository) -> AdapterTable:
            self.read[repository.table_path] += 1
            return table_of(repository)

        def render(*arguments: object) -> str:
            self.rendered += 1
            return render_block(*arguments)  # type: ignore[arg-type]

        def name(temporary: Path, path: Path) -> Path:
            self.written[path] += 1
            return rename(temporary, path)

        patch.setattr(text_format, "_Parser", parse)
        patch.setattr(state, "read_text", read)
        patch.setattr(paths, "read_table", read_table)
        patch.setattr(warmup, "render_block", render)
        patch.setattr(Path, "replace", name)

    def written_more_than_once(self, root: Path) -> dict[str, int]:
        """File, relative to the repository -> how often it was written, if more than once."""
        return {path.relative_to(root).as_posix(): count for path, count in self.written.items() if count != 1}


# The first adapter changes the type of the resolver's lora_weights. Meanwhile the ensemble leads to the router.
DETOUR: dict[str | None, dict[str, int]] = {
    "forward": {"lora_tokens/config.pbtxt": 2, "lora_router/1/originals/written.json": 3},
    "resolve": {"ensemble/config.pbtxt": 2, "lora_tokens/config.pbtxt": 2, "lora_router/1/originals/written.json": 3},
}
# The config.pbtxt of the engine's model, and of the resolver.
PARSED = 2


@pytest.fixture(params=["forward", "resolve"])
def opened(tmp_path: Path, request: pytest.FixtureRequest) -> Repository:
    """Upstream's repository with the router. Its user has a warmup sample as well."""
    root = upstream_repository(tmp_path / "repo", "v0.18.0")
    init.init(root, topology=request.param)
    found = paths.open_repository(root)
    with found.config_path.open("a") as file:
        file.write('model_warmup { name: "own" batch_size: 1 }\n')
    return found


@pytest.fixture
def counts(opened: Repository, monkeypatch: pytest.MonkeyPatch) -> Iterator[Counts]:
    """Counts from when the repository is there."""
    with monkeypatch.context() as patch:
        yield Counts(patch)


@pytest.mark.parametrize("others", [0, 2])
def test_one_add_parses_once_renders_once_and_writes_each_file_once(
    opened: Repository, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, others: int
) -> None:
    """The engine model's config.pbtxt, adapters.json, and all that the adapter brings; with other adapters, too."""
    for number in range(others):
        add.add(opened, f"other{number}", synthetic_adapter(tmp_path / f"other{number}", number), BFLOAT16)
    adapter = synthetic_adapter(tmp_path / "adapter", 7)
    with monkeypatch.context() as patch:
        counts = Counts(patch)
        entry = add.add(opened, "pirate", adapter, BFLOAT16).entry
    adapter_files = {opened.root / entry.lora_weights_file, opened.root / entry.lora_config_file}

    assert {1} == {*counts.parsed.values()}
    topology = init.topology_of(opened.root)
    assert PARSED == len(counts.parsed) or others == 0, "the first adapter changes what the models declare"
    assert (1, 1) == (counts.read[opened.config_path], counts.read[opened.table_path])
    assert 1 == counts.rendered
    assert (DETOUR[topology] if others == 0 else {}) == counts.written_more_than_once(opened.root)
    assert {opened.config_path, opened.table_path, *adapter_files} <= counts.written.keys()


def test_add_all_parses_and_renders_once_for_all(opened: Repository, tmp_path: Path, counts: Counts) -> None:
    """Not once an adapter."""
    directories = {f"n{number}": synthetic_adapter(tmp_path / str(number), number) for number in range(3)}
    add.add_all(opened, directories, BFLOAT16)

    assert {1} == {*counts.parsed.values()}
    assert (1, 1) == (counts.read[opened.config_path], counts.rendered)
    assert DETOUR[init.topology_of(opened.root)] == counts.written_more_than_once(opened.root)


def test_remove_and_alias_read_once_and_write_once(
    opened: Repository, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """An alias touches adapters.json alone."""
    add.add(opened, "pirate", synthetic_adapter(tmp_path / "adapter"), BFLOAT16)
    with monkeypatch.context() as patch:
        aliasing = Counts(patch)
        registry.alias(opened, "corsair", "pirate")
    with monkeypatch.context() as patch:
        removing = Counts(patch)
        registry.remove(opened, "corsair", "pirate")

    assert {opened.table_path: 1} == aliasing.written
    assert not aliasing.parsed
    assert (1, 1) == (removing.read[opened.config_path], removing.read[opened.table_path])
    assert {1} == {*removing.parsed.values()} == {*removing.written.values()}


def test_a_decision_is_a_table(opened: Repository, tmp_path: Path) -> None:
    """A command decides on the state that it has read. What follows from its table is one call, and writing another."""
    add.add(opened, "pirate", synthetic_adapter(tmp_path / "adapter"), BFLOAT16)
    found = read_state(opened)
    table = with_entry(found.table, "pirate", replace(found.table.entries["pirate"], warm=False))
    after = generated.write(found, table, generated.rendered(found, table))

    assert () == warmup.read_block(after.document.text)
    assert table == after.table == read_state(opened).table
    assert after.document == read_state(opened).document
