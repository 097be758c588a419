# SPDX-FileCopyrightText: the tritonlora authors
# SPDX-License-Identifier: Apache-2.0
"""init.py: the router in a model repository."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import pytest

from repositories import lead_as_before, synthetic_adapter
from tritonlora import files
from tritonlora.errors import RepositoryError
from tritonlora.files import TEMPORARY_SUFFIX
from tritonlora.pbtxt.model_config import parse_config
from tritonlora.pbtxt.text_format import parse
from tritonlora.repository import add, init, model_configs, paths, undo
from tritonlora.repository.add import Options
from tritonlora.repository.paths import half_written, read_text
from tritonlora.repository.shipped import code_of, shipped_models
from upstream_configs import protobuf, upstream_repository

VERSIONS = ("v0.10.0", "v0.15.0", "v0.18.0")


def with_parameter(config: Path, key: str, value: str) -> str:
    """The text of a config.pbtxt with one parameter set."""
    return model_configs.set_parameters(parse(read_text(config)), {key: value}).text


def contents(root: Path) -> dict[str, str]:
    """Every text in a repository."""
    return {
        str(path.relative_to(root)): path.read_text()
        for path in root.rglob("*")
        if path.is_file() and path.name != ".lock" and "__pycache__" not in path.parts
    }


OURS = ("lora_router", "lora_adapters", "lora_resolver", "lora_tokens")
STEPS = {
    "forward": ["preprocessing", "lora_router", "postprocessing"],
    "resolve": ["preprocessing", "tensorrt_llm", "postprocessing", "lora_resolver"],
}


@pytest.mark.parametrize("version", VERSIONS)
@pytest.mark.parametrize(("asked", "topology"), [(None, "resolve"), ("resolve", "resolve"), ("forward", "forward")])
def test_init_puts_its_models_between_the_ensemble_and_the_engine(
    tmp_path: Path, version: str, asked: str | None, topology: str
) -> None:
    """On upstream's templates, as protobuf reads the result. Ensembles resolve unless somebody asks."""
    root = upstream_repository(tmp_path / "repo", version)
    before = contents(root)
    init.init(root, topology=asked)
    after = contents(root)
    ensemble, router, engine = (
        protobuf(after[f"{model}/config.pbtxt"]) for model in ("ensemble", "lora_router", "tensorrt_llm")
    )

    assert STEPS[topology] == [step.model_name for step in ensemble.ensemble_scheduling.step]
    assert "lora_name" in [one.name for one in ensemble.input]
    assert "tensorrt_llm" == router.parameters["target"].string_value
    assert engine.max_batch_size == router.max_batch_size
    assert engine.model_transaction_policy.decoupled == router.model_transaction_policy.decoupled
    changed = {name for name in after if before.get(name) != after[name]}
    assert {"ensemble/config.pbtxt"} == {name for name in changed if not name.startswith(OURS)}
    for model in {*OURS} - {"lora_tokens"}:
        assert code_of(model).keys() <= changed


@pytest.mark.parametrize("version", VERSIONS)
def test_init_a_second_time_does_nothing(tmp_path: Path, version: str) -> None:
    """Idempotent."""
    root = upstream_repository(tmp_path / "repo", version)
    init.init(root)
    before = contents(root)

    assert [] == init.init(root)
    assert before == contents(root)


def test_a_dry_run_shows_the_changes_and_makes_none(tmp_path: Path) -> None:
    """The same list that init then works off."""
    root = upstream_repository(tmp_path / "repo", "v0.18.0")
    before = contents(root)
    planned = init.init(root, dry_run=True)

    assert before == contents(root)
    assert planned == init.init(root)


def test_init_keeps_what_somebody_has_tuned(tmp_path: Path) -> None:
    """The router's parameters, and the adapters that are registered."""
    root = upstream_repository(tmp_path / "repo", "v0.18.0")
    init.init(root)
    config = root / "lora_router" / "config.pbtxt"
    tuned = with_parameter(config, "stall_timeout_seconds", "7")
    config.write_text(tuned.replace("count: 3", "count: 5"))
    (root / "lora_router" / "adapters.json").write_text("mine")
    init.init(root)

    found = parse_config(config.read_text())
    assert ("7", 5) == (found.parameters["stall_timeout_seconds"], found.instance_count)
    assert "mine" == (root / "lora_router" / "adapters.json").read_text()


def test_init_renews_a_router_that_is_out_of_step(tmp_path: Path) -> None:
    """The engine's model was changed, or tritonlora is newer."""
    root = upstream_repository(tmp_path / "repo", "v0.18.0")
    init.init(root)
    before = contents(root)
    (root / "lora_router" / "1" / "model.py").write_text("old")
    engine = root / "tensorrt_llm" / "config.pbtxt"
    engine.write_text(engine.read_text().replace('name: "random_seed"', 'name: "seed"'))
    init.init(root)
    after = contents(root)

    assert before["lora_router/1/model.py"] == after["lora_router/1/model.py"]
    assert "seed" in [one.name for one in protobuf(after["lora_router/config.pbtxt"]).input]


def test_an_unfilled_template_is_refused_and_nothing_is_written(tmp_path: Path) -> None:
    """The message names the placeholder and the remedy."""
    root = upstream_repository(tmp_path / "repo", "v0.18.0", filled=False)
    before = contents(root)

    with pytest.raises(RepositoryError, match=r"(?s)config.pbtxt: .*\$\{triton_max_batch_size\}: set it"):
        init.init(root)

    assert before == contents(root)


def test_what_is_no_such_repository_is_refused(tmp_path: Path) -> None:
    """No directory, no engine, no ensemble that leads to it, somebody else's router: each with what to do."""
    with pytest.raises(RepositoryError, match="there is no model repository"):
        init.init(tmp_path / "nowhere")
    root = upstream_repository(tmp_path / "repo", "v0.18.0")
    before = contents(root)
    with pytest.raises(
        RepositoryError, match="no model 'llama'.*name the engine's model with --target: 'tensorrt_llm'"
    ):
        init.init(root, "llama")
    with pytest.raises(RepositoryError, match="no ensemble of 'ensemble' has a step for 'tensorrt_llm_bls'"):
        init.init(root, "tensorrt_llm_bls")
    assert before == contents(root)
    (root / "lora_router").mkdir()
    (root / "lora_router" / "config.pbtxt").write_text('backend: "python"')
    with pytest.raises(
        RepositoryError, match="has a model 'lora_router' that tritonlora did not write; rename that model"
    ):
        init.init(root)


def rename_target(root: Path, name: str) -> None:
    """Give the engine's model another name, as people do who serve several."""
    (root / "tensorrt_llm").rename(root / name)
    config = root / name / "config.pbtxt"
    config.write_text(config.read_text().replace('name: "tensorrt_llm"', f'name: "{name}"'))
    for ensemble in root.glob("ensemble*/config.pbtxt"):
        ensemble.write_text(ensemble.read_text().replace('model_name: "tensorrt_llm"', f'model_name: "{name}"'))


def steps(root: Path, ensemble: str) -> list[str]:
    """The models of an ensemble, in order."""
    return [step.model_name for step in parse_config(read_text(root / ensemble / "config.pbtxt")).steps]


def test_every_ensemble_of_the_engine_is_led_by_names(tmp_path: Path) -> None:
    """With another name than tensorrt_llm, and an ensemble beside them that has nothing to do with it."""
    root = upstream_repository(tmp_path / "repo", "v0.18.0")
    rename_target(root, "llama")
    for other in ("ensemble_chat", "vision"):
        shutil.copytree(root / "ensemble", root / other)
    config = root / "vision" / "config.pbtxt"
    config.write_text(config.read_text().replace('model_name: "llama"', 'model_name: "vit"'))
    vision = read_text(config)
    init.init(root, "llama")

    assert [["preprocessing", "llama", "postprocessing", "lora_resolver"]] * 2 == [
        steps(root, "ensemble"), steps(root, "ensemble_chat"),
    ]  # fmt: skip
    assert vision == read_text(config)
    assert "llama" == paths.open_repository(root).target
    assert [] == init.init(root), "the target is known from now on"
    with pytest.raises(RepositoryError, match="the router of .* stands before 'llama', and one repository has one"):
        init.init(root, "vision")


def test_without_an_ensemble_clients_are_told_to_ask_the_router(tmp_path: Path) -> None:
    """It takes what the engine's model takes, and lora_name."""
    root = upstream_repository(tmp_path / "repo", "v0.18.0")
    shutil.rmtree(root / "ensemble")
    init.init(root)

    assert [
        "no ensemble has a step for 'tensorrt_llm': clients send their tokens to 'lora_router'",
        "'tensorrt_llm_bls' calls 'tensorrt_llm' itself and takes no lora_name: clients that want adapters ask "
        "'lora_router'",
    ] == init.notes(root)


def test_the_bls_model_is_not_led_through_the_router_and_init_says_so(tmp_path: Path) -> None:
    """It calls the engine by itself. One that calls another model is left out of it."""
    root = upstream_repository(tmp_path / "repo", "v0.18.0")
    init.init(root, topology="forward")
    note = "'tensorrt_llm_bls' calls 'tensorrt_llm' itself and takes no lora_name: clients that want adapters ask "
    bls = root / "tensorrt_llm_bls" / "config.pbtxt"
    texts = [read_text(bls), with_parameter(bls, "tensorrt_llm_model_name", "other")]

    assert [f"{note}'ensemble'"] == init.notes(root)
    bls.write_text(texts[1])
    assert [] == init.notes(root)


def test_init_says_which_inputs_of_an_ensemble_it_takes_away(tmp_path: Path) -> None:
    """Upstream's ensembles take an adapter's tensors from v0.16 on; the note comes with that change alone."""
    root = upstream_repository(tmp_path / "repo", "v0.18.0")
    (note,) = [note for note in init.notes(root, init.init(root)) if "no longer takes" in note]

    assert note.startswith("'ensemble' no longer takes lora_weights, lora_config: Triton refuses a request that sends")
    assert "lora_name" in note
    assert [] == [note for note in init.notes(root, init.init(root)) if "no longer takes" in note]


def test_the_note_on_whisper_s_template_names_its_models(tmp_path: Path) -> None:
    """whisper_bls asks tensorrt_llm by a name in its code, and no ensemble does."""
    root = upstream_repository(tmp_path / "repo", "v0.18.0")
    for model in ("ensemble", "preprocessing", "postprocessing", "tensorrt_llm_bls"):
        shutil.rmtree(root / model)
    (root / "whisper_bls").mkdir()
    (root / "whisper_bls" / "config.pbtxt").write_text('name: "whisper_bls"\nbackend: "python"\n')
    init.init(root)

    assert [
        "no ensemble has a step for 'tensorrt_llm': clients send their tokens to 'lora_router'",
        "'whisper_bls' calls 'tensorrt_llm' itself and takes no lora_name: clients that want adapters ask "
        "'lora_router'",
    ] == init.notes(root)


def test_stopped_while_it_makes_the_router_nothing_is_changed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The router's directory comes into its place whole; half-made, it stands where tritonserver sees no model."""
    root = upstream_repository(tmp_path / "repo", "v0.18.0")
    before = contents(root)

    def stop(*_: object) -> None:
        assert before.keys() == {name for name in contents(root) if "/.lora_router" not in name}
        raise KeyboardInterrupt

    monkeypatch.setattr("tritonlora.repository.undo.begin", stop)
    with pytest.raises(KeyboardInterrupt):
        init.init(root)

    assert before == contents(root)


def test_a_power_cut_finds_what_was_put_there_whole(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Every file of a model is on disk before its directory gets its name, and so is the name in the end."""
    root = upstream_repository(tmp_path / "repo", "v0.18.0")
    synced = []
    monkeypatch.setattr("os.fsync", lambda descriptor: synced.append(os.fstat(descriptor).st_ino))
    init.init(root)
    put = {path.stat().st_ino for path in (root / "lora_adapters").rglob("*.*")}

    assert len(put) > 10
    assert put <= {*synced[: len(synced) - synced[::-1].index(root.stat().st_ino)]}


def test_a_checkout_s_repository_that_was_copied_alone_is_refused(tmp_path: Path) -> None:
    """Its models' code is links into the checkout; with what these lead to, it is one like others."""
    shutil.copytree(shipped_models(), tmp_path / "alone", symlinks=True)
    with pytest.raises(RepositoryError, match=r"(?s)lead nowhere; .*: cp -rL.*alone/postprocessing/1/serving"):
        init.init(tmp_path / "alone")

    shutil.copytree(shipped_models(), tmp_path / "whole", ignore=shutil.ignore_patterns("__pycache__"))
    init.init(tmp_path / "whole")

    assert [] == init.plan_init(tmp_path / "whole")


def test_an_engine_on_another_file_system(tmp_path: Path) -> None:
    """Mounted into the repository, or a link that leads there: what is made is moved from elsewhere."""
    root = upstream_repository(tmp_path / "repo", "v0.18.0")
    others = (Path(place) for place in ("/dev/shm", "/tmp", Path(__file__).parent))  # noqa: S108
    other = next(place for place in others if place.stat().st_dev != root.stat().st_dev)
    with tempfile.TemporaryDirectory(dir=other) as elsewhere:
        shutil.move(root / "tensorrt_llm", elsewhere)
        (root / "tensorrt_llm").symlink_to(Path(elsewhere, "tensorrt_llm"))
        before = contents(root)
        for topology in ("resolve", "forward"):
            init.init(root, topology=topology)
        undo.undo(root)

        assert before == contents(root)

        for model in ("ensemble", "postprocessing", "preprocessing", "tensorrt_llm_bls"):
            shutil.rmtree(root / model)
        with pytest.raises(RepositoryError, match="every model of .* is on another file system than the repository"):
            init.init(root)


def test_what_a_killed_command_left_goes_with_the_next_one(tmp_path: Path) -> None:
    """Half-made models and half-written files, wherever they are."""
    root = upstream_repository(tmp_path / "repo", "v0.18.0")
    before = contents(root)

    def litter() -> None:
        for name in ("ensemble/.lora_router.a1", "tensorrt_llm/warmup/.adapter_1.a1", "preprocessing/.config.pbtxt.a1"):
            path = root / f"{name}{TEMPORARY_SUFFIX}"
            path.mkdir(parents=True)
            (path / "half").touch()

    litter()
    init.init(root)
    assert [] == half_written(root)
    litter()
    (root / "lora_adapters" / f".config.pbtxt.a1{TEMPORARY_SUFFIX}").touch()
    undo.undo(root)
    (root / "tensorrt_llm" / "warmup").rmdir()

    assert before == contents(root)


# The other topology


@pytest.mark.parametrize("version", VERSIONS)
def test_init_leads_the_ensemble_past_the_router_when_asked_to(tmp_path: Path, version: str) -> None:
    """And stays with that; the resolver's tensors are those of the engine."""
    root = upstream_repository(tmp_path / "repo", version)
    init.init(root, topology="resolve")
    after = contents(root)
    ensemble, resolver, engine = (
        protobuf(after[f"{model}/config.pbtxt"]) for model in ("ensemble", "lora_resolver", "tensorrt_llm")
    )
    types = {one.name: one.data_type for one in engine.input}

    assert ["preprocessing", "tensorrt_llm", "postprocessing", "lora_resolver"] == [
        step.model_name for step in ensemble.ensemble_scheduling.step
    ]
    assert engine.max_batch_size == resolver.max_batch_size
    assert types["request_output_len"] == resolver.input[0].data_type
    given = ("request_output_len", "lora_task_id", "lora_weights", "lora_config")
    outputs = {one.name: one.data_type for one in resolver.output}
    assert outputs.pop("lora_state")
    assert {name: types[name] for name in given} == outputs
    assert code_of("lora_resolver").keys() <= after.keys()
    assert [] == init.init(root)


@pytest.mark.parametrize("version", VERSIONS)
def test_the_topology_can_be_changed_there_and_back(tmp_path: Path, version: str) -> None:
    """The router and the resolver stay: one asks the other, which reads the table of the first."""
    root = upstream_repository(tmp_path / "repo", version)
    init.init(root, topology="forward")
    forward = contents(root)
    assert [] == init.init(root), "what forwards stays so until somebody asks"
    init.init(root, topology="resolve")
    planned = init.init(root, topology="forward", dry_run=True)
    assert "resolve" == init.topology_of(root)
    done = init.init(root, topology="forward")
    after = contents(root)

    assert planned == done
    assert {"changed"} == {change.kind for change in done}
    written = "lora_router/1/originals/written.json"
    assert {"ensemble/config.pbtxt", written} >= {name for name in after if after[name] != forward.get(name)}
    assert protobuf(forward["ensemble/config.pbtxt"]) == protobuf(after["ensemble/config.pbtxt"])


@pytest.mark.parametrize("version", VERSIONS)
def test_init_gives_an_earlier_resolver_what_it_lacks(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, version: str
) -> None:
    """After each file, every tensor that an ensemble maps is declared: Triton loads no ensemble that maps another.

    And undo finds the way back all the same.
    """
    root = upstream_repository(tmp_path / "repo", version)
    original = contents(root)
    init.init(root, topology="resolve")
    now = contents(root)
    lead_as_before(paths.open_repository(root))
    assert now != contents(root)
    write_bytes, seen = files.write_bytes, []

    def watch(path: Path, content: bytes, **options: Any) -> None:
        write_bytes(path, content, **options)
        if path.name != "config.pbtxt":
            return
        resolver, *steps = (
            parse_config(read_text(root / model / "config.pbtxt")) for model in ("lora_resolver", "ensemble")
        )
        step = next(one for one in steps[0].steps if one.model_name == "lora_resolver")
        mapped = {*step.input_map, *step.output_map}
        seen.append(mapped - {spec.name for spec in (*resolver.inputs, *resolver.outputs)})

    with monkeypatch.context() as watched:
        watched.setattr("tritonlora.repository.undo.write_bytes", watch)
        init.init(root)
    written = "lora_router/1/originals/written.json"

    assert [set()] * 2 == seen
    assert {name: protobuf(text) for name, text in configs(now).items()} == {
        name: protobuf(text) for name, text in configs(contents(root)).items()
    }
    assert {written, "ensemble/config.pbtxt"} >= {name for name, text in contents(root).items() if text != now[name]}
    undo.undo(root)
    assert original == contents(root)


def configs(files: dict[str, str]) -> dict[str, str]:
    """The config.pbtxt files."""
    return {name: text for name, text in files.items() if name.endswith("/config.pbtxt")}


def test_init_keeps_what_somebody_has_tuned_in_the_resolver(tmp_path: Path) -> None:
    """And asks for the size of the cache where it is not known."""
    root = upstream_repository(tmp_path / "repo", "v0.18.0")
    init.init(root, topology="resolve")
    assert any("run tritonlora plan --apply" in note for note in init.notes(root))
    for model, key, value in (
        ("lora_resolver", "cache_full_timeout_seconds", "7"),
        ("lora_resolver", "cache_pages", "12"),
    ):
        config = root / model / "config.pbtxt"
        config.write_text(with_parameter(config, key, value))
    init.init(root)

    parameters = parse_config((root / "lora_resolver" / "config.pbtxt").read_text()).parameters
    assert ("7", "12") == (parameters["cache_full_timeout_seconds"], parameters["cache_pages"])
    assert [] == [note for note in init.notes(root) if "cache" in note]


def test_the_resolve_topology_is_refused_where_it_cannot_be(tmp_path: Path) -> None:
    """Nothing is written."""
    root = upstream_repository(tmp_path / "repo", "v0.18.0")
    shutil.rmtree(root / "ensemble")
    before = contents(root)
    with pytest.raises(RepositoryError, match="the resolve topology needs an ensemble with a step for 'tensorrt_llm'"):
        init.init(root, topology="resolve")
    assert before == contents(root)

    optional = upstream_repository(tmp_path / "optional", "v0.18.0")
    engine = optional / "tensorrt_llm" / "config.pbtxt"
    declared = 'name: "request_output_len"'
    engine.write_text(engine.read_text().replace(declared, f"{declared} optional: true"))
    init.init(optional)
    assert "forward" == init.topology_of(optional)
    with pytest.raises(RepositoryError, match="the input request_output_len, which must not be optional"):
        init.init(optional, topology="resolve")


def test_the_ensemble_loads_while_the_type_of_the_weights_changes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Triton refuses one that leads from one type to another. Upstream declares float16; the adapter is bfloat16."""
    root = upstream_repository(tmp_path / "repo", "v0.18.0")
    init.init(root, topology="resolve")
    mixed: list[Path] = []
    write_bytes = files.write_bytes

    def watch(path: Path, content: bytes, **options: Any) -> None:
        write_bytes(path, content, **options)
        ensemble, resolver, engine = (
            parse_config((root / model / "config.pbtxt").read_text())
            for model in ("ensemble", "lora_resolver", "tensorrt_llm")
        )
        weights = (resolver.output("lora_weights"), engine.input("lora_weights"))
        types = {spec.data_type for spec in weights if spec}
        mixed.extend([path] if ensemble.leads_to("lora_resolver") and len(types) > 1 else [])

    monkeypatch.setattr("tritonlora.repository.undo.write_bytes", watch)
    adapter = synthetic_adapter(tmp_path / "adapter")
    add.add(paths.open_repository(root), "pirate", adapter, Options(dtype="bfloat16"))
    resolver = protobuf((root / "lora_resolver" / "config.pbtxt").read_text())

    assert [] == mixed
    assert "resolve" == init.topology_of(root)
    assert {"lora_weights": 14} == {one.name: one.data_type for one in resolver.output if one.name == "lora_weights"}


# What ships


def test_the_shipped_router_is_the_one_that_init_would_write() -> None:
    """In step with the shipped engine's declarations. So are the resolver, and the ensemble that leads to it."""
    root = shipped_models()
    changes = [*init.plan_init(root), *init.plan_init(root, topology="resolve")]

    assert [] == [one.path for one in changes if one.path.name == "config.pbtxt"]


def test_a_created_repository_stands_alone(tmp_path: Path) -> None:
    """No link into the checkout; and the modules that each model got are all that it imports."""
    root = tmp_path / "repo"
    init.create_repository(root, {"tensorrt_llm": {"max_num_requests": "3"}})

    assert not [path for path in root.rglob("*") if path.is_symlink()]
    assert "3" == parse_config(read_text(root / "tensorrt_llm" / "config.pbtxt")).parameters["max_num_requests"]
    assert "tensorrt_llm" == paths.open_repository(root).target
    with pytest.raises(RepositoryError, match="is not empty"):
        init.create_repository(root)


def test_the_serving_package_needs_nothing_but_numpy(tmp_path: Path) -> None:
    """It runs in a plain Triton container: every import is blocked but the standard library's and numpy.

    The modules that translate for Triton get an empty module in the place of Triton's own.
    """
    root = tmp_path / "repo"
    init.create_repository(root)
    init.init(root, topology="resolve")
    code = f"""
import importlib, importlib.abc, sys, types
from pathlib import Path
version = Path({str(root)!r}) / "lora_router"
sys.path[:] = [str(version)] + [p for p in sys.path if "/plugin" not in p]
sys.modules["triton_python_backend_utils"] = types.SimpleNamespace(TRITONSERVER_RESPONSE_COMPLETE_FINAL=1)
class Finder(importlib.abc.MetaPathFinder):
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] not in sys.stdlib_module_names | {{"1", "numpy"}}:
            raise ImportError("not in a plain Triton container: " + name)
sys.meta_path.insert(0, Finder())
names = sorted(path.stem for path in (version / "1" / "serving").glob("*.py"))
assert len(names) > 20, names
for name in names:
    module = importlib.import_module("1.serving." + name)
    assert module.__file__.startswith({str(root)!r}), module.__file__
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)

    assert (0, "") == (done.returncode, done.stderr)


def test_a_router_without_adapters_can_be_given_some(tmp_path: Path) -> None:
    """init, then add: the two commands of an existing deployment (here with the dtype given, as there is no engine)."""
    root = upstream_repository(tmp_path / "repo", "v0.18.0")
    init.init(root)
    opened = paths.open_repository(root)
    add.add(opened, "pirate", synthetic_adapter(tmp_path / "adapter"), Options(dtype="bfloat16"))
    config = protobuf(read_text(opened.config_path))

    assert ["lora_1_warmup"] == [sample.name for sample in config.model_warmup]
    assert {
        "input_ids", "input_lengths", "request_output_len", "end_id", "beam_width",
        "lora_task_id", "lora_weights", "lora_config",
    } == set(config.model_warmup[0].inputs)  # fmt: skip


def test_a_copy_is_made_and_the_repository_stays_as_it_is(tmp_path: Path) -> None:
    """As `init` would have made it; links stay links."""
    root = upstream_repository(tmp_path / "repo", "v0.18.0")
    (root / "tensorrt_llm" / "1" / "engine").symlink_to(tmp_path / "engine")
    before = contents(root)
    changes = init.init_copy(root, tmp_path / "copy")

    assert before == contents(root)
    assert (tmp_path / "engine") == (tmp_path / "copy" / "tensorrt_llm" / "1" / "engine").readlink()
    assert {change.path for change in changes} <= {path for path in (tmp_path / "copy").rglob("*") if path.is_file()}
    init.init(root)
    assert contents(root) == contents(tmp_path / "copy")


def test_a_copy_is_there_whole_or_not_at_all(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever stops it, and never in the place of something else."""
    root = upstream_repository(tmp_path / "repo", "v0.18.0")
    (tmp_path / "taken").write_text("mine")
    with pytest.raises(RepositoryError, match="taken' exists; name a new directory for the copy"):
        init.init_copy(root, tmp_path / "taken")

    def stop(*_: object, **__: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("tritonlora.repository.undo.write", stop)
    with pytest.raises(KeyboardInterrupt):
        init.init_copy(root, tmp_path / "copy")

    assert {"repo", "taken"} == {path.name for path in tmp_path.iterdir()}
