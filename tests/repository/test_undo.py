# SPDX-FileCopyrightText: the tritonlora authors
# SPDX-License-Identifier: Apache-2.0
"""undo.py: a model repository as it was before tritonlora, byte for byte."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import threading
from pathlib import Path
from typing import Any

import pytest

import faults
from repositories import added, files, synthetic_adapter, synthetic_repository
from tritonlora import files as written
from tritonlora.cli import commands
from tritonlora.errors import RepositoryError
from tritonlora.pbtxt.model_config import parse_config
from tritonlora.repository import add, init, paths, registry, undo, upkeep
from tritonlora.repository.paths import read_text
from tritonlora.serving.adapter_table import AdapterTable
from tritonlora.serving.adapter_table_json import render
from upstream_configs import upstream_repository


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
            init.init(root, topology=topology)
        assert before != files(root)
        changes = undo.undo(root)

        assert before == files(root)
    assert ["changed"] == [one.kind for one in changes if one.path.parent.name == "ensemble"]


def test_everything_that_tritonlora_has_done_is_undone(root: Path) -> None:
    """The dtype of lora_weights, the warmup files, and parameters, too, of which some were written twice."""
    (root / "tensorrt_llm" / "warmup").mkdir()
    (root / "tensorrt_llm" / "warmup" / "input_ids").write_bytes(b"mine")
    before = files(root)
    init.init(root)
    opened = added(root, "pirate")
    upkeep.set_parameters(opened, {"lora_cache_host_memory_bytes": "1"})
    added(root, "bard", 1)
    for name in ("pirate", "bard"):
        registry.remove(opened, name)
    assert before["tensorrt_llm/config.pbtxt"] != files(root)["tensorrt_llm/config.pbtxt"]
    undo.undo(root)

    assert before == files(root)


def test_files_that_say_already_what_tritonlora_would_write_stay(root: Path) -> None:
    """The engine's config as it is wanted, and a file of a warmup sample of the user's own."""
    config = root / "tensorrt_llm" / "config.pbtxt"
    warmup = root / "tensorrt_llm" / "warmup"
    before_init = files(root)
    init.init(root)
    opened = added(root, "pirate")
    config_with_bf16 = read_text(config).partition("# tritonlora: model_warmup")[0]
    input_lengths = (warmup / "input_lengths").read_bytes()
    registry.remove(opened, "pirate")
    undo.undo(root)
    assert before_init == files(root)

    config.write_text(config_with_bf16)
    warmup.mkdir()
    (warmup / "input_lengths").write_bytes(input_lengths)
    before = files(root)
    init.init(root)
    opened = paths.open_repository(root)
    for options in (add.Options(dtype="bfloat16", warm=False), add.Options(dtype="bfloat16")):
        add.add(opened, "pirate", synthetic_adapter(root.parent / "again"), options)
        registry.remove(opened, "pirate")
    undo.undo(root)

    assert before == files(root)


def test_a_config_that_is_a_link_stays_one(root: Path) -> None:
    """What it leads to in the repository is edited, and put back."""
    config, elsewhere = root / "ensemble" / "config.pbtxt", root / "tensorrt_llm" / "1" / "ensemble.pbtxt"
    config.rename(elsewhere)
    config.symlink_to(elsewhere)
    before = elsewhere.read_bytes()
    init.init(root)
    assert before != elsewhere.read_bytes()
    undo.undo(root)

    assert elsewhere == config.readlink()
    assert before == elsewhere.read_bytes()


@pytest.mark.parametrize("place", ["ensemble/config.pbtxt", "ensemble", "tensorrt_llm"])
def test_a_link_out_of_the_repository_is_not_followed(root: Path, place: str) -> None:
    """Be it of a file or of a model: nothing tells whose link it is. It is named, and can be put back by hand."""
    path, elsewhere = root / place, root.parent / "elsewhere"
    path.rename(elsewhere)
    path.symlink_to(elsewhere)
    name = "tensorrt_llm/config.pbtxt" if place == "tensorrt_llm" else "ensemble/config.pbtxt"
    original = (root / name).read_bytes()
    init.init(root)
    registry.remove(added(root, "pirate"), "pirate")
    before = files(root), read_text(root / name)
    with pytest.raises(RepositoryError, match=f"{name}: a link leads to it, out of the repository: .*elsewhere.*copy"):
        undo.undo(root)

    assert before == (files(root), read_text(root / name))
    for problem in str(_refusal(root)).splitlines():
        if ": a link leads to it" in problem:
            file = problem.removeprefix(undo.NOTHING_CHANGED).strip(" :").partition(":")[0]
            if problem.endswith("delete it yourself"):
                (root / file).unlink()
            else:
                (root / file).write_bytes((root / undo.ORIGINALS / file).read_bytes())
    undo.undo(root)

    assert path.is_symlink()
    assert original == (root / name).read_bytes()
    assert {"ensemble", "preprocessing", "postprocessing", "tensorrt_llm", "tensorrt_llm_bls"} == {
        one.name for one in root.iterdir()
    }


def _refusal(root: Path) -> RepositoryError:
    with pytest.raises(RepositoryError) as caught:
        undo.undo(root)
    return caught.value


def test_an_adapter_that_is_added_while_init_is_at_work_is_undone(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """In each moment: `add` waits, or comes first. Neither takes what the other has put on record."""
    before = files(root)
    init.init(root, topology="forward")
    adapter = synthetic_adapter(root.parent / "adapter")
    opened = paths.open_repository(root)
    adding = threading.Thread(target=add.add, args=(opened, "pirate", adapter, add.Options(dtype="bfloat16")))
    write = undo.write

    def add_meanwhile(*arguments: Any) -> None:
        if not adding.ident:
            adding.start()
            adding.join(0.5)  # it waits, if it can
        write(*arguments)

    monkeypatch.setattr("tritonlora.repository.undo.write", add_meanwhile)
    init.init(root, topology="resolve")
    adding.join()
    assert ["pirate"] == list(paths.read_table(opened).entries)
    registry.remove(opened, "pirate")
    undo.undo(root)

    assert before == files(root)


@pytest.mark.parametrize("topology", ["forward", "resolve"])
def test_the_ensemble_loads_all_the_while(root: Path, monkeypatch: pytest.MonkeyPatch, topology: str) -> None:
    """Triton loads none that leads from one type to another: the engine has float16 again before it leads there."""
    init.init(root, topology=topology)
    registry.remove(added(root, "pirate"), "pirate")
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

    monkeypatch.setattr("tritonlora.repository.undo.write_bytes", look)
    undo.undo(root)

    assert {"TYPE_FP16"} in seen
    assert all(len(types) == 1 for types in seen)


@pytest.mark.parametrize("topology", ["forward", "resolve"])
def test_a_dry_run_shows_what_undo_does(root: Path, topology: str) -> None:
    """The same list, and nothing is changed."""
    init.init(root, topology=topology)
    before = files(root)
    planned = undo.undo(root, dry_run=True)

    assert before.items() <= files(root).items()
    assert planned == undo.undo(root)


@pytest.mark.parametrize(
    ("file", "remedy"),
    [
        ("ensemble/config.pbtxt", "it was edited since; copy lora_router/1/originals/ensemble/config.pbtxt there"),
        ("lora_router/config.pbtxt", "it was edited since; put your changes elsewhere and delete it"),
        ("lora_router/notes.txt", "tritonlora did not write it; move it elsewhere"),
    ],
)
def test_what_was_edited_since_is_named_and_nothing_is_changed(root: Path, file: str, remedy: str) -> None:
    """Whoever edited it decides, also after another init."""
    init.init(root)
    with (root / file).open("a") as edited:
        edited.write("\n# mine")
    init.init(root)
    with (root / file).open("a") as edited:
        edited.write("\n# mine")
    before = files(root)
    with pytest.raises(RepositoryError, match=f"nothing was changed: {file}: {remedy}"):
        undo.undo(root)

    assert before == files(root)


def test_the_remedies_work(root: Path) -> None:
    """An original that was put back by hand, and a file of the router that was deleted."""
    before = files(root)
    init.init(root)
    ensemble, router = root / "ensemble" / "config.pbtxt", root / "lora_router" / "config.pbtxt"
    ensemble.write_text("# mine")
    router.write_text("# mine")
    ensemble.write_bytes((root / undo.ORIGINALS / "ensemble" / "config.pbtxt").read_bytes())
    router.unlink()
    undo.undo(root)

    assert before == files(root)


def test_an_edit_before_the_last_write_is_not_lost(root: Path) -> None:
    """A file that somebody edited between two commands is one that was edited."""
    init.init(root)
    opened = added(root, "pirate")
    opened.config_path.write_text(read_text(opened.config_path) + "# mine\n")
    registry.remove(opened, "pirate")
    assert read_text(opened.config_path).endswith("# mine\n")

    with pytest.raises(RepositoryError, match="tensorrt_llm/config.pbtxt: it was edited since; copy"):
        undo.undo(root)


def test_a_command_that_was_stopped_can_be_undone(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Between the record and the file: the file is the older one."""
    before = files(root)
    init.init(root)
    opened = added(root, "pirate")
    registry.remove(opened, "pirate")

    def stop(*_: object) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patched:
        patched.setattr("tritonlora.repository.undo.write_bytes", stop)
        with pytest.raises(KeyboardInterrupt):
            upkeep.set_parameters(opened, {"max_beam_width": "2"})
    undo.undo(root)

    assert before == files(root)


def test_a_broken_config_of_another_model_is_named(root: Path) -> None:
    """It may be one that leads to the resolver."""
    init.init(root)
    (root / "other").mkdir()
    (root / "other" / "config.pbtxt").write_text('name: "')

    with pytest.raises(RepositoryError, match=r"other/config\.pbtxt: line 1, column 7"):
        undo.undo(root)


def test_registered_adapters_are_not_thrown_away(root: Path) -> None:
    """They are named, with the command that takes them out."""
    init.init(root)
    added(root, "pirate")

    with pytest.raises(RepositoryError, match="adapters are registered; .*tritonlora remove pirate"):
        undo.undo(root)


def test_a_router_that_init_did_not_put_there_is_not_taken_out(tmp_path: Path) -> None:
    """That of the shipped repository: there is nothing before it."""
    opened = synthetic_repository(tmp_path / "repo")
    init.init(opened.root)
    opened.table_path.write_text(render(AdapterTable()))

    with pytest.raises(
        RepositoryError, match="nothing to undo: .*written.json, which is there after `tritonlora init`"
    ):
        undo.undo(opened.root)
    with pytest.raises(RepositoryError, match="there is nothing to undo"):
        undo.undo(tmp_path)


def test_an_init_that_was_killed_before_the_router_was_there_is_undone(root: Path) -> None:
    """All that it has left is a directory in the making."""
    before = files(root)
    outcome = faults.run(["init", str(root)], root, 12)
    assert outcome.faulted
    assert not (root / "lora_router").exists()
    assert before != files(root)

    assert 0 == commands.main(["init", "--undo", str(root)])
    assert before == files(root)
    assert 1 == commands.main(["init", "--undo", str(root)]), "there is nothing to undo any more"


# A record that somebody else wrote

_DIGEST = "0" * 64


def _record(root: Path) -> Path:
    return root / undo.WRITTEN


def _become_a_fifo(path: Path) -> None:
    path.unlink()
    os.mkfifo(path)


def _become_a_directory(path: Path) -> None:
    path.unlink()
    path.mkdir()


def _become_a_link(path: Path) -> None:
    path.rename(path.with_name("x"))
    path.symlink_to("x")


def _lead_nowhere(path: Path) -> None:
    path.unlink()
    path.symlink_to("nowhere")


def _deep(depth: int) -> str:
    return "[" * depth + "]" * depth


@pytest.mark.parametrize(
    ("content", "problem"),
    [
        ("", "it is not JSON"),
        ("{", "it is not JSON"),
        (b"\xff{}", "it is not JSON"),
        (_deep(100_000), "it is not JSON"),
        (_deep(3), "expected an object, from files to digests, got list"),
        ("null", "expected an object, from files to digests, got NoneType"),
        ('"ensemble/config.pbtxt"', "expected an object, from files to digests, got str"),
        ({"/etc/passwd": [_DIGEST]}, "'/etc/passwd': expected the path of a file in a model"),
        ({"/etc/x/y": [_DIGEST]}, "'/etc/x/y': expected the path"),
        ({"../outside/file": [_DIGEST]}, "'../outside/file': expected the path"),
        ({"ensemble/../../outside/file": [_DIGEST]}, "'ensemble/../../outside/file': expected the path"),
        ({"ensemble/..": [_DIGEST]}, "'ensemble/..': expected the path"),
        ({"./ensemble/x": [_DIGEST]}, "'./ensemble/x': expected the path"),
        ({"ensemble//x": [_DIGEST]}, "'ensemble//x': expected the path"),
        ({"ensemble/": [_DIGEST]}, "'ensemble/': expected the path"),
        ({"file": [_DIGEST]}, "'file': expected the path"),
        ({"": [_DIGEST]}, "'': expected the path"),
        ({"ensemble/\0": [_DIGEST]}, "expected the path"),
        ({"lora_router/adapters.json": [_DIGEST]}, "'lora_router/adapters.json': it is no file that"),
        ({"lora_router/1/originals/a/b": [_DIGEST]}, "'lora_router/1/originals/a/b': it is no file that"),
        ({"ensemble/x": _DIGEST}, "'ensemble/x': expected one or two SHA-256 digests"),
        ({"ensemble/x": []}, "'ensemble/x': expected one or two SHA-256 digests"),
        ({"ensemble/x": [_DIGEST] * 3}, "'ensemble/x': expected one or two SHA-256 digests"),
        ({"ensemble/x": [_DIGEST[1:]]}, "'ensemble/x': expected one or two SHA-256 digests"),
        ({"ensemble/x": ["G" * 64]}, "'ensemble/x': expected one or two SHA-256 digests"),
        ({"ensemble/x": [0]}, "'ensemble/x': expected one or two SHA-256 digests"),
        ({"ensemble/x": {"a": 1}}, "'ensemble/x': expected one or two SHA-256 digests"),
        ({"ensemble/x": None}, "'ensemble/x': expected one or two SHA-256 digests"),
        (f'{{"ensemble/x": ["{_DIGEST}"], "ensemble/x": ["{_DIGEST}"]}}', "a file stands in it twice"),
        (lambda path: os.truncate(path, 1 << 40), "it has 1099511627776 bytes, expected at most 67108864"),
        (_become_a_fifo, "not a file"),
        (_become_a_directory, "not a file"),
        (_become_a_link, "not a file"),
        (_lead_nowhere, "not a file"),
    ],
    ids=lambda value: value if isinstance(value, str) and len(value) < 60 else "",
)
def test_a_record_that_tritonlora_never_wrote_is_refused(
    root: Path, content: Any, problem: str, capsys: pytest.CaptureFixture[str]
) -> None:
    """It is named, with what is wrong in it, at once, and nothing is changed.

    Neither does a dry run, nor a command that adds to the record.
    """
    init.init(root)
    path = _record(root)
    if callable(content):
        content(path)
    elif isinstance(content, (str, bytes)):
        path.write_bytes(content.encode() if isinstance(content, str) else content)
    else:
        path.write_text(json.dumps({**json.loads(path.read_text()), **content}))
    before = snapshot(root)
    for arguments in (["--undo"], ["--undo", "--dry-run"], ["--topology", "resolve"]):
        assert 1 == commands.main(["init", str(root), *arguments])
        message = capsys.readouterr().err
        assert str(path) in " ".join(message.split())
        assert problem in " ".join(message.split())
        assert len(message) < 2000
        assert before == snapshot(root)


def snapshot(root: Path) -> dict[str, object]:
    """Every file, directory and link with its kind and time of change, but for the lock's."""
    return {
        path.as_posix(): (found.st_mode, found.st_ino, found.st_size, found.st_ctime_ns)
        for path in sorted(root.rglob("*"))
        if path.is_dir() is False and path.name != ".lock" and (found := path.lstat())
    }


@pytest.mark.parametrize("name", ["../victim", "ensemble/../../victim", "ABSOLUTE"])
def test_a_record_makes_undo_touch_nothing_outside(root: Path, name: str) -> None:
    """Also where the digest is right: the file would be deleted, or become what lies in originals."""
    init.init(root)
    victim = root.parent / "victim"
    victim.write_text("precious")
    digests = json.loads(_record(root).read_text())
    digests[str(victim) if name == "ABSOLUTE" else name] = [hashlib.sha256(b"precious").hexdigest()]
    _record(root).write_text(json.dumps(digests))

    with pytest.raises(RepositoryError, match="expected the path of a file in a model of this repository"):
        undo.undo(root)
    assert "precious" == victim.read_text()


@pytest.mark.parametrize("link", ["ensemble/mine", "ensemble/deep"])
def test_a_record_and_a_link_make_undo_touch_nothing_outside(root: Path, link: str) -> None:
    """A file, and a directory: the link leads to what the record says that tritonlora wrote."""
    init.init(root)
    outside = root.parent / "outside"
    outside.mkdir()
    victim = outside / "victim"
    victim.write_text("precious")
    (root / link).symlink_to(outside if link.endswith("deep") else victim)
    name = f"{link}/victim" if link.endswith("deep") else link
    digests = json.loads(_record(root).read_text())
    digests[name] = [hashlib.sha256(b"precious").hexdigest()]
    _record(root).write_text(json.dumps(digests))

    with pytest.raises(RepositoryError, match=f"{name}: a link leads to it, out of the repository: {victim}; delete"):
        undo.undo(root)
    assert "precious" == victim.read_text()


@pytest.mark.parametrize("link", ["originals/ensemble/config.pbtxt", "originals/ensemble"])
def test_what_a_link_among_the_originals_leads_to_is_not_copied_into_the_repository(root: Path, link: str) -> None:
    """It may be a file that only root can read."""
    init.init(root)
    outside = root.parent / "outside"
    outside.mkdir()
    (outside / "config.pbtxt").write_text("secret")
    path = root / "lora_router" / "1" / link
    if link.endswith("config.pbtxt"):
        path.unlink()
        path.symlink_to(outside / "config.pbtxt")
    else:
        shutil.rmtree(path)
        path.symlink_to(outside)
    before = read_text(root / "ensemble" / "config.pbtxt")

    with pytest.raises(RepositoryError, match="config.pbtxt is a link, or in a directory that is one"):
        undo.undo(root)
    assert before == read_text(root / "ensemble" / "config.pbtxt")


def test_a_model_of_ours_that_is_a_link_is_not_taken_out(root: Path) -> None:
    """Only the link would go."""
    init.init(root)
    (root / "lora_adapters").rename(root.parent / "elsewhere")
    (root / "lora_adapters").symlink_to(root.parent / "elsewhere")

    with pytest.raises(RepositoryError, match="lora_adapters: it is a link; put the directory there"):
        undo.undo(root)


@pytest.mark.parametrize("kind", ["a FIFO", "a link", "a link to a directory"])
def test_whatever_the_user_put_into_a_model_of_ours_is_not_thrown_away(root: Path, kind: str) -> None:
    """Not files alone."""
    init.init(root)
    path = root / "lora_router" / "mine"
    if kind == "a FIFO":
        os.mkfifo(path)
    else:
        path.symlink_to("nowhere" if kind == "a link" else root / "ensemble")

    with pytest.raises(RepositoryError, match="lora_router/mine: tritonlora did not write it; move it elsewhere"):
        undo.undo(root)
    assert path.is_symlink() or path.is_fifo()


def test_a_config_whose_original_is_lost_is_not_deleted(root: Path) -> None:
    """Undo would take it for a file that tritonlora made."""
    init.init(root)
    (root / undo.ORIGINALS / "ensemble" / "config.pbtxt").unlink()
    (root / "ensemble" / "1" / "keep").write_text("")

    with pytest.raises(RepositoryError, match="ensemble/config.pbtxt would go, and ensemble/1/keep stay: .* a backup"):
        undo.undo(root)
    assert (root / "ensemble" / "config.pbtxt").is_file()


def test_a_file_that_a_sample_of_the_user_s_own_names_is_not_deleted(root: Path) -> None:
    """The repository would not load without it; all the rest is as it was."""
    config = root / "tensorrt_llm" / "config.pbtxt"
    sample = 'model_warmup { name: "mine" inputs { key: "x" value { input_data_file: "lora_id_1" } } }\n'
    config.write_text(read_text(config) + sample)
    before = files(root)
    init.init(root)
    opened = paths.open_repository(root)
    opened.warmup_directory.mkdir()
    undo.write(root, {opened.warmup_directory / "lora_id_1": b"named", opened.warmup_directory / "lora_id_2": b"not"})
    undo.undo(root)

    assert {**before, "tensorrt_llm/warmup": None, "tensorrt_llm/warmup/lora_id_1": b"named"} == files(root)
