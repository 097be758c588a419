# SPDX-FileCopyrightText: the tritonlora authors
# SPDX-License-Identifier: Apache-2.0
"""undo.py: a model repository as it was before tritonlora, byte for byte."""

from __future__ import annotations

import threading
from pathlib import Path
from typing import Any

import pytest

from repositories import synthetic_adapter, synthetic_repository
from tritonlora import files as written
from tritonlora import install, register, repository, undo
from tritonlora.adapters import AdapterTable
from tritonlora.adapters_json import render
from tritonlora.errors import RepositoryError
from tritonlora.model_config import parse_config
from tritonlora.repository import Repository, read_text
from upstream_configs import upstream_repository


def files(root: Path) -> dict[str, bytes | None]:
    """Every file and directory in a repository."""
    return {
        path.relative_to(root).as_posix(): path.read_bytes() if path.is_file() else None for path in root.rglob("*")
    }


def added(root: Path, name: str, seed: int = 0) -> Repository:
    """The repository with one more adapter."""
    opened = repository.open_repository(root)
    adapter = synthetic_adapter(root.parent / "adapters" / name, seed)
    register.add(opened, name, adapter, register.Options(dtype="bfloat16"))
    return opened


@pytest.fixture
def root(tmp_path: Path) -> Path:
    """Upstream's repository, with Windows line ends in the ensemble and no newline at its end."""
    root = upstream_repository(tmp_path / "repo", "v0.18.0")
    ensemble = root / "ensemble" / "config.pbtxt"
    ensemble.write_bytes(ensemble.read_bytes().rstrip().replace(b"\n", b"\r\n"))
    return root


@pytest.mark.parametrize("version", ["v0.10.0", "v0.15.0", "v0.18.0"])
@pytest.mark.parametrize("topologies", [("forward",), ("resolve",), ("forward", "resolve"), ("resolve", "forward")])
def test_init_is_undone_byte_for_byte(tmp_path: Path, version: str, topologies: tuple[str, ...]) -> None:
    """Nothing more and nothing less than before, and it can all be done again."""
    root = upstream_repository(tmp_path / "repo", version)
    before = files(root)
    for _ in range(2):
        for topology in topologies:
            install.init(root, topology=topology)
        assert before != files(root)
        changes = undo.undo(root)

        assert before == files(root)
    assert ["changed"] == [one.kind for one in changes if one.path.parent.name == "ensemble"]


def test_everything_that_tritonlora_has_done_is_undone(root: Path) -> None:
    """The dtype of lora_weights, the warmup files, and parameters, too, of which some were written twice."""
    (root / "tensorrt_llm" / "warmup").mkdir()
    (root / "tensorrt_llm" / "warmup" / "input_ids").write_bytes(b"mine")
    before = files(root)
    install.init(root)
    opened = added(root, "pirate")
    register.set_parameters(opened, {"lora_cache_host_memory_bytes": "1"})
    added(root, "bard", 1)
    for name in ("pirate", "bard"):
        register.remove(opened, name)
    assert before["tensorrt_llm/config.pbtxt"] != files(root)["tensorrt_llm/config.pbtxt"]
    undo.undo(root)

    assert before == files(root)


def test_files_that_say_already_what_tritonlora_would_write_stay(root: Path) -> None:
    """The engine's config as it is wanted, and a file of a warmup sample of the user's own."""
    config = root / "tensorrt_llm" / "config.pbtxt"
    warmup = root / "tensorrt_llm" / "warmup"
    before_init = files(root)
    install.init(root)
    opened = added(root, "pirate")
    config_with_bf16 = read_text(config).partition("# tritonlora: model_warmup")[0]
    input_lengths = (warmup / "input_lengths").read_bytes()
    register.remove(opened, "pirate")
    undo.undo(root)
    assert before_init == files(root)

    config.write_text(config_with_bf16)
    warmup.mkdir()
    (warmup / "input_lengths").write_bytes(input_lengths)
    before = files(root)
    install.init(root)
    opened = repository.open_repository(root)
    for options in (register.Options(dtype="bfloat16", warm=False), register.Options(dtype="bfloat16")):
        register.add(opened, "pirate", synthetic_adapter(root.parent / "again"), options)
        register.remove(opened, "pirate")
    undo.undo(root)

    assert before == files(root)


def test_a_config_that_is_a_link_stays_one(root: Path) -> None:
    """What it leads to is edited, and put back."""
    config, elsewhere = root / "ensemble" / "config.pbtxt", root.parent / "elsewhere.pbtxt"
    config.rename(elsewhere)
    config.symlink_to(elsewhere)
    before = elsewhere.read_bytes()
    install.init(root)
    assert before != elsewhere.read_bytes()
    undo.undo(root)

    assert elsewhere == config.readlink()
    assert before == elsewhere.read_bytes()


def test_an_adapter_that_is_added_while_init_is_at_work_is_undone(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """In each moment: `add` waits, or comes first. Neither takes what the other has put on record."""
    before = files(root)
    install.init(root)
    adapter = synthetic_adapter(root.parent / "adapter")
    opened = repository.open_repository(root)
    adding = threading.Thread(target=register.add, args=(opened, "pirate", adapter, register.Options(dtype="bfloat16")))
    record = undo.record

    def add_meanwhile(*arguments: Any) -> None:
        if not adding.ident:
            adding.start()
            adding.join(0.5)  # it waits, if it can
        record(*arguments)

    monkeypatch.setattr("tritonlora.undo.record", add_meanwhile)
    install.init(root, topology="resolve")
    adding.join()
    assert ["pirate"] == list(repository.read_table(opened).entries)
    register.remove(opened, "pirate")
    undo.undo(root)

    assert before == files(root)


@pytest.mark.parametrize("topology", ["forward", "resolve"])
def test_the_ensemble_loads_all_the_while(root: Path, monkeypatch: pytest.MonkeyPatch, topology: str) -> None:
    """Triton loads none that leads from one type to another: the engine has float16 again before it leads there."""
    install.init(root, topology=topology)
    register.remove(added(root, "pirate"), "pirate")
    seen = []

    def look(path: Path, content: bytes) -> None:
        written.write_bytes(path, content)
        configs = {
            model: parse_config(read_text(root / model / "config.pbtxt"))
            for model in ("ensemble", "lora_resolver", "tensorrt_llm")
            if (root / model).exists()
        }
        ensemble, engine = configs["ensemble"], configs["tensorrt_llm"].input("lora_weights")
        given = configs["lora_resolver"].output("lora_weights") if ensemble.leads_to("lora_resolver") else None
        given = ensemble.input("lora_weights") if ensemble.leads_to("tensorrt_llm") and given is None else given
        seen.append({str(spec.data_type) for spec in (given, engine) if spec})

    monkeypatch.setattr("tritonlora.undo.write_bytes", look)
    undo.undo(root)

    assert {"TYPE_FP16"} in seen
    assert all(len(types) == 1 for types in seen)


def test_a_dry_run_shows_what_undo_does(root: Path) -> None:
    """The same list, and nothing is changed."""
    install.init(root)
    before = files(root)
    planned = undo.undo(root, dry_run=True)

    assert before.items() <= files(root).items()
    assert planned == undo.undo(root)


@pytest.mark.parametrize(
    ("file", "remedy"),
    [
        ("ensemble/config.pbtxt", "it was edited since; copy lora_router/1/originals/ensemble/config.pbtxt there"),
        ("lora_router/config.pbtxt", "it was edited since; put your changes elsewhere and delete it"),
        ("lora_router/notes.txt", "it is not of tritonlora's; move it elsewhere"),
    ],
)
def test_what_was_edited_since_is_named_and_nothing_is_changed(root: Path, file: str, remedy: str) -> None:
    """Whoever edited it decides, also after another init."""
    install.init(root)
    with (root / file).open("a") as edited:
        edited.write("\n# mine")
    install.init(root)
    with (root / file).open("a") as edited:
        edited.write("\n# mine")
    before = files(root)
    with pytest.raises(RepositoryError, match=f"nothing was changed: {file}: {remedy}"):
        undo.undo(root)

    assert before == files(root)


def test_the_remedies_work(root: Path) -> None:
    """An original that was put back by hand, and a file of the router that was deleted."""
    before = files(root)
    install.init(root)
    ensemble, router = root / "ensemble" / "config.pbtxt", root / "lora_router" / "config.pbtxt"
    ensemble.write_text("# mine")
    router.write_text("# mine")
    ensemble.write_bytes((root / undo.ORIGINALS / "ensemble" / "config.pbtxt").read_bytes())
    router.unlink()
    undo.undo(root)

    assert before == files(root)


def test_an_edit_before_the_last_write_is_not_lost(root: Path) -> None:
    """A file that somebody edited between two commands is one that was edited."""
    install.init(root)
    opened = added(root, "pirate")
    opened.config_path.write_text(read_text(opened.config_path) + "# mine\n")
    register.remove(opened, "pirate")
    assert read_text(opened.config_path).endswith("# mine\n")

    with pytest.raises(RepositoryError, match="tensorrt_llm/config.pbtxt: it was edited since; copy"):
        undo.undo(root)


def test_a_command_that_was_stopped_can_be_undone(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Between the record and the file: the file is the older one."""
    before = files(root)
    install.init(root)
    opened = added(root, "pirate")
    register.remove(opened, "pirate")

    def stop(*_: object) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patched:
        patched.setattr("tritonlora.undo.write_bytes", stop)
        with pytest.raises(KeyboardInterrupt):
            register.set_parameters(opened, {"max_beam_width": "2"})
    undo.undo(root)

    assert before == files(root)


def test_a_broken_config_of_another_model_is_named(root: Path) -> None:
    """It may be one that leads to the resolver."""
    install.init(root)
    (root / "other").mkdir()
    (root / "other" / "config.pbtxt").write_text('name: "')

    with pytest.raises(RepositoryError, match=r"other/config\.pbtxt: line 1, column 7"):
        undo.undo(root)


def test_registered_adapters_are_not_thrown_away(root: Path) -> None:
    """They are named, with the command that takes them out."""
    install.init(root)
    added(root, "pirate")

    with pytest.raises(RepositoryError, match="adapters are registered; .*tritonlora remove pirate"):
        undo.undo(root)


def test_a_router_that_init_did_not_put_there_is_not_taken_out(tmp_path: Path) -> None:
    """That of the shipped repository: there is nothing before it."""
    opened = synthetic_repository(tmp_path / "repo")
    install.init(opened.root)
    opened.table_path.write_text(render(AdapterTable()))

    with pytest.raises(
        RepositoryError, match="nothing to undo: .*written.json, which is there after `tritonlora init`"
    ):
        undo.undo(opened.root)
    with pytest.raises(RepositoryError, match="there is nothing to undo"):
        undo.undo(tmp_path)
