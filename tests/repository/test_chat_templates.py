# SPDX-FileCopyrightText: the tritonlora authors
# SPDX-License-Identifier: Apache-2.0
"""The chat templates that adapters bring."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from repositories import let_time_pass, synthetic_adapter, synthetic_repository
from tritonlora.errors import InvalidAdapter
from tritonlora.repository import add, chat_templates, registry
from tritonlora.repository.paths import Repository, read_table

NAMED = [{"name": "tool_use", "template": "tools"}, {"name": "default", "template": "named"}]


@pytest.fixture
def opened(tmp_path: Path) -> Repository:
    """A repository without adapters."""
    return synthetic_repository(tmp_path / "repo")


@pytest.fixture
def adapter(tmp_path: Path) -> Path:
    """An adapter without a template."""
    return synthetic_adapter(tmp_path / "adapter")


def kept(opened: Repository, name: str = "pirate") -> str | None:
    """The template that the repository has for an adapter."""
    path = chat_templates.path_of(opened, read_table(opened).entries[name].lora_task_id)
    return path.read_text() if path.exists() else None


@pytest.mark.parametrize(
    ("file", "content", "expected"),
    [
        ("chat_template.jinja", "own ü", "own ü"),
        ("tokenizer_config.json", json.dumps({"chat_template": "in json"}), "in json"),
        ("tokenizer_config.json", json.dumps({"chat_template": NAMED}), "named"),
        ("tokenizer_config.json", json.dumps({"chat_template": NAMED[:1]}), None),
        ("tokenizer_config.json", json.dumps({}), None),
        ("tokenizer_config.json", "[]", None),
        ("README.md", "x", None),
    ],
)
def test_the_template_in_the_directory_is_kept(
    opened: Repository, adapter: Path, file: str, content: str, expected: str | None
) -> None:
    """From the places where transformers writes it."""
    (adapter / file).write_text(content)
    add.add(opened, "pirate", adapter)

    assert expected == kept(opened)


def test_the_template_of_an_adapter_that_is_added_again_is_the_new_one(opened: Repository, adapter: Path) -> None:
    """Also if its weights are the same, and also if there is none any more."""
    own = adapter / "chat_template.jinja"
    seen = []
    for template in ("first", "second", None):
        own.unlink(missing_ok=True)
        if template:
            own.write_text(template)
        add.add(opened, "pirate", adapter)
        seen.append(kept(opened))

    assert ["first", "second", None] == seen


def test_the_template_of_a_removed_adapter_goes_with_its_files(opened: Repository, adapter: Path) -> None:
    """Once no request can need them."""
    (adapter / "chat_template.jinja").write_text("own")
    add.add(opened, "pirate", adapter)
    registry.remove(opened, "pirate")
    let_time_pass(opened)
    add.add(opened, "haiku", synthetic_adapter(adapter.parent / "other", 1))

    assert [] == list(opened.warmup_directory.glob("chat_template_*"))


@pytest.mark.parametrize(
    ("file", "content"),
    [("chat_template.jinja", b"\xff"), ("tokenizer_config.json", b"{"), ("tokenizer_config.json", b"\xff")],
)
def test_a_template_that_cannot_be_read_refuses_the_adapter(
    opened: Repository, adapter: Path, file: str, content: bytes
) -> None:
    """Before anything is written: the base model's template may be another one."""
    (adapter / file).write_bytes(content)
    with pytest.raises(InvalidAdapter, match="the chat template in .* cannot be read"):
        add.add(opened, "pirate", adapter)

    assert {} == read_table(opened).entries
