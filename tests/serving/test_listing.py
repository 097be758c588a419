# SPDX-FileCopyrightText: the tritonlora authors
# SPDX-License-Identifier: Apache-2.0
"""listing.py: what clients are told of the adapters."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from table import TABLE, entry
from tritonlora.serving.adapter_table import AdapterTable, Problem, with_adapter, with_alias
from tritonlora.serving.bindings import content_of
from tritonlora.serving.listing import Engine, describe

NOTHING = Engine({}, {})


def test_an_adapter_is_listed_with_its_aliases(tmp_path: Path) -> None:
    """An alias has no line of its own: it is the same adapter."""
    table = with_alias(with_alias(TABLE, "prod", "pirate"), "canary", "pirate")
    found = describe(table, tmp_path, NOTHING)

    assert {"pirate": ["canary", "prod"], "haiku": []} == {name: about["aliases"] for name, about in found.items()}


def test_the_adapters_of_a_divided_alias_are_listed_with_their_shares(tmp_path: Path) -> None:
    """`only` is what a name leads to. A malformed adapter among them has its reason."""
    table = with_alias(with_alias(TABLE, "prod", {"pirate": 90, "haiku": 10}), "one", "pirate")
    broken = replace(table, unavailable={"haiku": (Problem("'dtype' must be one of …"),)})
    found = describe(table, tmp_path, NOTHING, only=table.aliases["prod"])

    assert {"pirate": {"prod": 90}, "haiku": {"prod": 10}} == {name: about["shares"] for name, about in found.items()}
    assert ["one", "prod"] == found["pirate"]["aliases"]
    assert "unavailable" == describe(broken, tmp_path, NOTHING, only=["haiku"])["haiku"]["state"]


def test_a_malformed_entry_is_listed_with_the_reason(tmp_path: Path) -> None:
    """And without what was got, which may be a path."""
    table = replace(TABLE, unavailable={"broken": (Problem("'dtype' must be one of …", "'/etc'"),)})
    about = describe(table, tmp_path, NOTHING)["broken"]

    assert "unavailable" == about["state"]
    assert about["reason"].endswith("is malformed: 'dtype' must be one of …")


@pytest.mark.parametrize("name", ["meta-llama/Llama-3.1-8B", "google/gemma_2", "a/b", "01-ai/Yi-34B"])
def test_a_base_model_is_listed_by_its_name_on_the_hub(tmp_path: Path, name: str) -> None:
    """As PEFT noted it."""
    assert name == listed_base(tmp_path, name)


@pytest.mark.parametrize(
    "path",
    [
        "", "/", "/home/alice/models/llama", "/models/llama", "./llama", "../llama", "~/llama", "~alice/llama", "llama",
        "llama/", "models/llama/7b", "models//llama", ".cache/llama", "models/.llama", "models/..", "a/b\n", "a\nb/c",
        "models/llama ", "C:/llama", "C:\\models\\llama", "\\\\host\\share", "file:///llama", "s3://bucket/llama",
        "models--meta-llama--Llama-3/snapshots", "x" * 97 + "/y", "a/-b", "$HOME/llama", "base", "a/é",
    ],
)  # fmt: skip
def test_no_path_of_a_base_model_is_listed(tmp_path: Path, path: str) -> None:
    """Nor anything else that may be one."""
    assert listed_base(tmp_path, path) is None


def test_a_path_that_looks_like_a_name_is_not_listed_where_it_leads_somewhere(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """From where the server was started."""
    (tmp_path / "models" / "llama").mkdir(parents=True)
    monkeypatch.chdir(tmp_path)

    assert listed_base(tmp_path, "models/llama") is None
    assert "models/mistral" == listed_base(tmp_path, "models/mistral")


def listed_base(root: Path, noted: str) -> object:
    """What the listing says of an adapter whose base model PEFT noted so."""
    table = with_adapter(AdapterTable(), "pirate", entry(base_model_name_or_path=noted))
    return describe(table, root, NOTHING)["pirate"]["base_model_name_or_path"]


def write_files(root: Path) -> None:
    """The adapters' files, as large as they must be."""
    for one in TABLE.entries.values():
        for file, nbytes in (
            (one.lora_weights_file, one.lora_weights_nbytes),
            (one.lora_config_file, one.lora_config_nbytes),
        ):
            (root / file).parent.mkdir(parents=True, exist_ok=True)
            (root / file).write_bytes(bytes(nbytes))


@pytest.mark.parametrize(
    ("states", "listed"),
    [
        ({1: True, 2: True}, {"pirate": "warm", "haiku": "loaded"}),
        ({2: True}, {"pirate": "cold", "haiku": "loaded"}),
        ({1: False, 2: True}, {"pirate": "unknown", "haiku": "loaded"}),
    ],
)
def test_the_state_is_what_the_resolver_knows(tmp_path: Path, states: dict[int, bool], listed: dict[str, str]) -> None:
    """Warm is who is loaded at the start; what is not certain is said to be unknown."""
    write_files(tmp_path)
    found = describe(TABLE, tmp_path, Engine(states, {}))

    assert listed == {name: about["state"] for name, about in found.items()}


def test_an_adapter_whose_id_was_given_to_another_is_listed_as_unavailable(tmp_path: Path) -> None:
    """As requests for it are refused, whatever the engine holds under its id."""
    write_files(tmp_path)
    contents = {1: content_of(TABLE.entries["pirate"]), 2: "another"}
    found = describe(TABLE, tmp_path, Engine({1: True, 2: True}, contents))

    assert {"pirate": "warm", "haiku": "unavailable"} == {name: about["state"] for name, about in found.items()}
    assert "lora_task_id 2 was given to other weights" in found["haiku"]["reason"]
