# SPDX-FileCopyrightText: the tritonlora authors
# SPDX-License-Identifier: Apache-2.0
"""The LLM API's model as the target in a model repository: init, add, remove, check, plan."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from safetensors.torch import load_file

from adapters import lora_pair, save_llama_adapter, write_adapter
from repositories import let_time_pass, llm_api_repository, synthetic_adapter
from tritonlora.check import checks
from tritonlora.cli import commands
from tritonlora.errors import EngineMismatch, InvalidAdapter, RepositoryError, TritonLoraError, UnsupportedAdapter
from tritonlora.files import TEMPORARY_SUFFIX
from tritonlora.launch import diagnosis
from tritonlora.launch.tritonserver import World
from tritonlora.repository import add, generated, init, paths, registry, undo, upkeep
from tritonlora.repository.add import Options
from tritonlora.repository.paths import Repository, read_table, read_text
from tritonlora.repository.shipped import shipped_models
from tritonlora.repository.state import Models, State, read_state
from upstream_configs import protobuf

BASE = shipped_models() / "tensorrt_llm" / "1"


@pytest.fixture
def root(tmp_path: Path) -> Path:
    """A repository as its users have it."""
    return llm_api_repository(tmp_path / "repo", BASE, triton_config={"decoupled": True, "max_batch_size": 0})


@pytest.fixture
def opened(root: Path) -> Repository:
    """The same with a router."""
    init.init(root)
    return paths.open_repository(root)


@pytest.fixture
def adapter(tmp_path: Path) -> Path:
    """An adapter for it."""
    return synthetic_adapter(tmp_path / "adapter")


def snapshot(root: Path) -> dict[str, bytes]:
    """Every file's bytes, but for the lock's."""
    return {
        str(path.relative_to(root)): path.read_bytes()
        for path in sorted(root.rglob("*"))
        if path.is_file() and path.name != ".lock"
    }


def string(file: Path) -> str:
    """What a warmup file of one string says."""
    content = file.read_bytes()
    assert len(content) - 4 == int.from_bytes(content[:4], "little")
    return content[4:].decode()


# init


@pytest.mark.parametrize("decoupled", [True, False])
def test_init_declares_what_clients_may_send(tmp_path: Path, decoupled: bool) -> None:
    """All of the model's inputs but those with a path; the transaction policy is that of model.yaml."""
    root = llm_api_repository(tmp_path / "repo", BASE, triton_config={"decoupled": decoupled, "max_batch_size": 0})
    init.init(root)
    target, router = (protobuf((root / name / "config.pbtxt").read_text()) for name in ("tensorrt_llm", "lora_router"))

    expected = [one for one in target.input if one.name not in ("lora_path", "lora_ckpt_source")]
    assert [*(one.name for one in expected), "lora_split_key"] == [one.name for one in router.input]
    assert expected == list(router.input)[:-1]
    own = ["text_diff", "lora_name", "all_outputs"]
    assert [*(one.name for one in target.output), *own] == [one.name for one in router.output]
    assert (0, decoupled) == (router.max_batch_size, router.model_transaction_policy.decoupled)


def test_init_makes_an_ensemble_under_the_engine_model_s_names(opened: Repository) -> None:
    """So that a client asks both alike. The path of an adapter comes from the resolver alone."""
    ensemble = protobuf((opened.root / "ensemble" / "config.pbtxt").read_text())
    engine, resolver = ensemble.ensemble_scheduling.step
    inputs = {one.name: one for one in ensemble.input}
    resolved = {
        "text_input": "_RESOLVED_TEXT_INPUT", "lora_id": "_LORA_ID", "lora_name": "_LORA_NAME",
        "lora_path": "_LORA_PATH",
    }  # fmt: skip

    assert ("ensemble", "tensorrt_llm", "lora_resolver") == (ensemble.platform, engine.model_name, resolver.model_name)
    assert {
        "sampling_param_max_tokens": "max_tokens", "streaming": "stream", "sampling_param_stop": "stop_words",
        **resolved,
    }.items() <= dict(engine.input_map).items()  # fmt: skip
    assert resolved == dict(resolver.output_map)
    assert {
        "text_input": "text_input", "lora_name": "lora_name", "lora_id": "lora_task_id",
        "lora_split_key": "lora_split_key",
    } == dict(resolver.input_map)  # fmt: skip
    assert {"text_output": "text_output"} == dict(engine.output_map)
    assert {*engine.input_map.values(), *resolver.input_map.values()} == {*inputs, *resolved.values()}
    assert ["text_input"] == [name for name, one in inputs.items() if not one.optional]
    assert (opened.root / "ensemble" / "1").is_dir()


def test_the_ensemble_can_lead_through_the_router(opened: Repository) -> None:
    """And back. There text_output is the new text, which the router makes of the whole one."""
    config = opened.root / "ensemble" / "config.pbtxt"
    before = config.read_text()
    init.init(opened.root, topology="forward")
    ensemble = protobuf(config.read_text())
    [step] = ensemble.ensemble_scheduling.step
    router = protobuf((opened.root / "lora_router" / "config.pbtxt").read_text())

    assert ("lora_router", {"text_diff": "text_output"}) == (step.model_name, dict(step.output_map))
    assert {"lora_id": "lora_task_id", "lora_name": "lora_name"}.items() <= dict(step.input_map).items()
    assert {one.name for one in router.input} == set(step.input_map)
    assert set(step.input_map.values()) == {one.name for one in ensemble.input}
    assert [] == init.init(opened.root)

    init.init(opened.root, topology="resolve")
    assert protobuf(before) == protobuf(config.read_text())


def test_init_leads_past_the_router_with_the_model_s_own_names(opened: Repository) -> None:
    """For the OpenAI API, whatever ensembles there are."""
    ensemble = protobuf((opened.root / "lora_tokens" / "config.pbtxt").read_text())
    engine = protobuf((opened.root / "tensorrt_llm" / "config.pbtxt").read_text())
    left_out = {"lora_path", "lora_ckpt_source"}

    assert {one.name for one in ensemble.input} == {one.name for one in engine.input} - left_out | {"lora_split_key"}
    assert [one.name for one in ensemble.output] == [one.name for one in engine.output]


def test_init_is_idempotent_and_can_be_undone(root: Path) -> None:
    """Byte for byte."""
    before = snapshot(root)
    init.init(root)

    assert [] == init.init(root)
    undo.undo(root)
    assert before == snapshot(root)
    assert ["tensorrt_llm"] == sorted(path.name for path in root.iterdir())


def test_init_rewires_an_ensemble_that_is_there(root: Path) -> None:
    """Instead of making one; the path comes from the resolver, and from no client."""
    (root / "mine" / "1").mkdir(parents=True)
    (root / "mine" / "config.pbtxt").write_text("""
        platform: "ensemble"
        input [ { name: "question" data_type: TYPE_STRING dims: [ -1 ] },
                { name: "path" data_type: TYPE_STRING dims: [ 1 ] optional: true } ]
        output [ { name: "answer" data_type: TYPE_STRING dims: [ -1 ] } ]
        ensemble_scheduling { step [ {
            model_name: "tensorrt_llm" model_version: -1
            input_map { key: "text_input" value: "question" }
            input_map { key: "lora_path" value: "path" }
            output_map { key: "text_output" value: "answer" } } ] }
    """)
    init.init(root)
    ensemble = protobuf((root / "mine" / "config.pbtxt").read_text())
    engine, resolver = ensemble.ensemble_scheduling.step

    assert not (root / "ensemble").exists()
    naming = ["lora_name", "lora_split_key"]
    assert ("lora_resolver", {"text_input": "question", **{name: name for name in naming}}) == (
        resolver.model_name,
        dict(resolver.input_map),
    )
    assert "_LORA_PATH" == engine.input_map["lora_path"]
    assert ["question", *naming] == [one.name for one in ensemble.input]


def test_an_ensemble_that_forwards_stays_so(root: Path) -> None:
    """Until it is asked to resolve."""
    init.init(root, topology="forward")

    assert [] == init.init(root)
    assert "forward" == init.topology_of(root)


def test_a_model_from_before_lora_is_refused_with_where_to_get_one(root: Path) -> None:
    """Nothing is written."""
    config = root / "tensorrt_llm" / "config.pbtxt"
    for name in ("lora_id", "lora_name", "lora_path"):
        config.write_text(config.read_text().replace(f'"{name}"', f'"no_{name}"'))
    before = snapshot(root)

    with pytest.raises(RepositoryError, match="declares no input 'lora_id', 'lora_name', 'lora_path': .* llmapi model"):
        init.init(root)

    assert before == snapshot(root)


def test_a_model_yaml_that_cannot_be_read_is_refused(root: Path) -> None:
    """It has what config.pbtxt leaves out."""
    (root / "tensorrt_llm" / "1" / "model.yaml").unlink()

    with pytest.raises(RepositoryError, match=r"cannot read .*model\.yaml"):
        init.init(root)


# add and remove


def test_an_added_adapter_is_copied_bit_for_bit_and_warmed_up(opened: Repository, adapter: Path) -> None:
    """The directory, adapters.json, the sample and its strings say the same."""
    add.add(opened, "pirate", adapter)
    entry = json.loads(opened.table_path.read_text())["adapters"]["pirate"]
    copy = opened.root / entry["lora_path"]
    [sample] = protobuf(read_text(opened.config_path)).model_warmup
    original, copied = (load_file(one / "adapter_model.safetensors") for one in (adapter, copy))

    assert original.keys() == copied.keys()
    assert all(torch.equal(original[name], copied[name]) for name in original)
    assert (adapter / "adapter_config.json").read_bytes() == (copy / "adapter_config.json").read_bytes()
    assert [f"{entry['lora_path']}/adapter_model.safetensors", f"{entry['lora_path']}/adapter_config.json"] == [
        entry["lora_weights_file"],
        entry["lora_config_file"],
    ]
    assert ([8], ["attn_q", "attn_v"], None) == (entry["adapter_sizes"], entry["modules"], entry["pages"])
    assert {
        "text_input": (13, [1], "text_input"), "sampling_param_max_tokens": (8, [1], "max_tokens"),
        "lora_id": (5, [1], "lora_id_1"), "lora_name": (13, [1], "lora_name_1"), "lora_path": (13, [1], "lora_path_1"),
    } == {
        name: (one.data_type, list(one.dims), one.input_data_file) for name, one in sample.inputs.items()
    }  # fmt: skip
    assert "pirate" == string(opened.warmup_directory / "lora_name_1")
    assert str(copy.resolve()) == string(opened.warmup_directory / "lora_path_1")
    assert (1).to_bytes(8, "little") == (opened.warmup_directory / "lora_id_1").read_bytes()
    assert [] == checks.check(opened, deep=True)


def test_the_same_content_changes_nothing_and_other_content_gets_a_new_id(
    opened: Repository, adapter: Path, tmp_path: Path
) -> None:
    """The engine keeps what it has read under an id."""
    add.add(opened, "pirate", adapter)
    before = snapshot(opened.root)

    assert add.add(opened, "pirate", adapter).unchanged
    assert before == snapshot(opened.root)
    add.add(opened, "pirate", synthetic_adapter(tmp_path / "other", seed=1))
    assert 2 == read_table(opened).entries["pirate"].lora_task_id
    let_time_pass(opened)
    upkeep.repair(opened)
    assert not (opened.warmup_directory / "adapter_1").exists()


def test_a_removed_adapter_leaves_nothing(opened: Repository, adapter: Path) -> None:
    """But for the shared files, and for a while what requests under way may need."""
    add.add(opened, "pirate", adapter)
    registry.remove(opened, "pirate")
    let_time_pass(opened)
    upkeep.repair(opened)

    assert {"text_input", "max_tokens"} == {path.name for path in opened.warmup_directory.iterdir()}
    assert "model_warmup" not in read_text(opened.config_path)


def test_pickles_and_shards_are_stored_as_one_safetensors_file(opened: Repository, tmp_path: Path) -> None:
    """The engine's reader takes no shards."""
    adapter = synthetic_adapter(tmp_path / "adapter")
    tensors = load_file(adapter / "adapter_model.safetensors")
    (adapter / "adapter_model.safetensors").unlink()
    torch.save(tensors, adapter / "adapter_model.bin")
    add.add(opened, "pirate", adapter)
    copied = load_file(opened.warmup_directory / "adapter_1" / "adapter_model.safetensors")

    assert tensors.keys() == copied.keys()
    assert all(torch.equal(tensors[name], copied[name]) for name in tensors)


def test_the_paths_of_samples_are_those_that_the_server_sees(root: Path, adapter: Path) -> None:
    """A repository that is mounted elsewhere in the server's container."""
    init.init(root, served_at="/models")
    opened = paths.open_repository(root)
    add.add(opened, "pirate", adapter)

    assert "/models/tensorrt_llm/warmup/adapter_1" == string(opened.warmup_directory / "lora_path_1")
    assert [] == init.init(root)


def test_an_adapter_can_be_added_without_the_base_model(tmp_path: Path, adapter: Path) -> None:
    """A name on a hub says nothing about dims; that they were not checked is said."""
    root = llm_api_repository(tmp_path / "repo", Path("TinyLlama/TinyLlama-1.1B-Chat-v1.0"))
    init.init(root)
    added = add.add(paths.open_repository(root), "pirate", adapter)

    assert "not checked" in added.remarks[0]


def _two(**changes: Any) -> dict[str, Any]:
    return {"r": 8, "lora_alpha": 16, "target_modules": ["q_proj"], **changes}


def _pair(**changes: Any) -> dict[str, torch.Tensor]:
    return lora_pair("model.layers.0.self_attn.q_proj", **{"r": 8, "in_features": 64, "out_features": 64, **changes})


REFUSED: dict[str, tuple[dict[str, torch.Tensor], dict[str, Any], type[TritonLoraError], str]] = {
    "DoRA": (
        {**_pair(), "model.layers.0.self_attn.q_proj.lora_magnitude_vector": torch.ones(64)},
        _two(use_dora=True),
        UnsupportedAdapter,
        "it uses DoRA: the LLM API expects normalised magnitudes",
    ),
    "alpha_pattern": (
        _pair(),
        _two(alpha_pattern={"q_proj": 32}),
        UnsupportedAdapter,
        "the LLM API ignores alpha_pattern: 'model.layers.0.self_attn.q_proj' has the scaling 4, and would get 2",
    ),
    "a bias": (_pair(), _two(bias="all"), UnsupportedAdapter, "'bias' is 'all'"),
    "a rank that the engine does not take": (
        _pair(r=128),
        _two(r=128),
        EngineMismatch,
        "max_lora_rank",
    ),
    "dims that the engine does not have": (
        _pair(out_features=32),
        _two(),
        EngineMismatch,
        "attn_q: it is 64 -> 32 in the adapter",
    ),
    "NaN": ({name: tensor * torch.nan for name, tensor in _pair().items()}, _two(), InvalidAdapter, "NaN or infinite"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_would_answer_wrongly_is_refused_and_nothing_is_written(
    opened: Repository, tmp_path: Path, name: str
) -> None:
    """All that the conversion refuses, and what the engine's reader would take for something else."""
    tensors, config, kind, message = REFUSED[name]
    adapter = write_adapter(tmp_path / "adapter", tensors, **config)
    before = snapshot(opened.root)

    with pytest.raises(kind, match=message):
        add.add(opened, "pirate", adapter)

    assert before == {name: content for name, content in snapshot(opened.root).items() if "tritonlora-tmp" not in name}


def test_a_pattern_that_changes_nothing_is_no_reason_to_refuse(opened: Repository, tmp_path: Path) -> None:
    """What counts is the scaling that each module gets."""
    adapter = write_adapter(tmp_path / "adapter", _pair(), **_two(alpha_pattern={"k_proj": 64, "q_proj": 16}))

    assert not add.add(opened, "pirate", adapter).unchanged


def test_peft_s_own_files_are_taken(tmp_path: Path) -> None:
    """All seven linear layers of a Llama, as save_pretrained writes them; and what is stored is what PEFT stored."""
    saved = save_llama_adapter(tmp_path / "saved")
    root = llm_api_repository(tmp_path / "repo", saved.base)
    init.init(root)
    opened = paths.open_repository(root)
    add.add(opened, "all", saved.adapter, Options(dtype="float32"))
    original = load_file(saved.adapter / "adapter_model.safetensors")
    copied = load_file(opened.warmup_directory / "adapter_1" / "adapter_model.safetensors")

    assert original.keys() == copied.keys()
    assert all(torch.equal(original[name], copied[name]) for name in original)


# check and plan


@pytest.fixture
def sound(opened: Repository, adapter: Path) -> Repository:
    """A repository with an adapter, in which nothing is wrong."""
    add.add(opened, "pirate", adapter)
    return opened


def _edit_yaml(opened: Repository, **changes: object) -> None:
    path = opened.target_directory / "1" / "model.yaml"
    path.write_text(yaml.safe_dump({**yaml.safe_load(path.read_text()), **changes}))


def _copy(opened: Repository) -> Path:
    return opened.warmup_directory / "adapter_1"


def _truncate(file: Path) -> None:
    file.write_bytes(file.read_bytes()[:-1])


def _warm_two_where_one_is_kept(opened: Repository) -> None:
    _edit_yaml(opened, lora_config={"max_cpu_loras": 1})
    add.add(opened, "second", synthetic_adapter(opened.root.parent / "second", 1))


PLANTED: dict[str, tuple[Callable[[Repository], object], str, str]] = {
    "weights are missing": (
        lambda opened: (_copy(opened) / "adapter_model.safetensors").unlink(),
        "error",
        "adapter pirate: tensorrt_llm/warmup/adapter_1/adapter_model.safetensors is missing",
    ),
    "weights are short": (
        lambda opened: _truncate(_copy(opened) / "adapter_model.safetensors"),
        "error",
        "adapter pirate: ",
    ),
    "the config is missing": (
        lambda opened: (_copy(opened) / "adapter_config.json").unlink(),
        "error",
        "adapter pirate: tensorrt_llm/warmup/adapter_1/adapter_config.json is missing",
    ),
    "the engine has no LoRA": (
        lambda opened: _edit_yaml(opened, lora_config=None),
        "error",
        "engine: it was built without LoRA",
    ),
    "the engine's rank is lower": (
        lambda opened: _edit_yaml(opened, lora_config={"max_lora_rank": 4}),
        "error",
        "adapter pirate: it has rank 8, and the engine's max_lora_rank is 4",
    ),
    "the engine has no LoRA for a module": (
        lambda opened: _edit_yaml(opened, lora_config={"lora_target_modules": ["attn_q"]}),
        "error",
        "adapter pirate: the engine has no LoRA for attn_v",
    ),
    "the engine keeps fewer adapters than are warm": (
        _warm_two_where_one_is_kept,
        "warning",
        "model.yaml: 2 adapters are warm, and max_cpu_loras is 1",
    ),
    "the transaction policy was changed": (
        lambda opened: _edit_yaml(opened, triton_config={"decoupled": False, "max_batch_size": 0}),
        "error",
        "lora_router/config.pbtxt: its transaction policy is not that of tensorrt_llm",
    ),
    "a path was altered": (
        lambda opened: (opened.warmup_directory / "lora_path_1").write_bytes(b"x"),
        "error",
        "warmup/lora_path_1: it is missing or altered, and warmup samples need it",
    ),
    "an input of the contract is not declared": (
        lambda opened: opened.config_path.write_text(read_text(opened.config_path).replace('"lora_path"', '"lora_p"')),
        "error",
        "tensorrt_llm/config.pbtxt: it declares no input lora_path",
    ),
    "a command was killed": (
        lambda opened: (opened.warmup_directory / f".adapter_2.x{TEMPORARY_SUFFIX}").write_bytes(b""),
        "warning",
        f"tensorrt_llm/warmup/.adapter_2.x{TEMPORARY_SUFFIX}: a command that was stopped left it half-written",
    ),
}


@pytest.mark.parametrize("name", PLANTED)
def test_what_is_wrong_is_found(sound: Repository, name: str) -> None:
    """Named, with its severity and a remedy."""
    plant, severity, problem = PLANTED[name]
    assert [] == checks.check(sound, deep=True)
    plant(sound)
    findings = checks.check(sound)

    assert [one for one in findings if one.severity == severity and f"{one.where}: {one.problem}".startswith(problem)]
    assert all(one.remedy for one in findings)


def test_adapter_whose_layers_only_the_engine_can_tell_is_checked_against_it(
    opened: Repository, tmp_path: Path
) -> None:
    """An up_proj without a gate_proj is one module or another by the architecture."""
    pair = lora_pair("model.layers.0.mlp.up_proj", r=8, in_features=64, out_features=128)
    add.add(opened, "pirate", write_adapter(tmp_path / "up", pair, r=8, lora_alpha=16))

    assert [] == checks.check(opened, deep=True)
    _edit_yaml(opened, lora_config={"max_lora_rank": 4})
    (finding,) = checks.check(opened)
    assert "adapter pirate" == finding.where
    assert "mlp_gate: rank 8 is larger than the engine's max_lora_rank, 4" in finding.problem


def test_an_altered_file_is_found_by_its_digest(sound: Repository) -> None:
    """The last byte of the weights."""
    file = _copy(sound) / "adapter_model.safetensors"
    content = file.read_bytes()
    file.write_bytes(content[:-1] + bytes([content[-1] ^ 1]))

    assert [] == checks.check(sound)
    assert ["adapter pirate"] == [one.where for one in checks.check(sound, deep=True)]


def test_a_repository_that_was_moved_is_repaired(sound: Repository, tmp_path: Path) -> None:
    """The samples' paths are the old ones."""
    shutil.move(sound.root, tmp_path / "moved")
    moved = paths.open_repository(tmp_path / "moved")

    assert ["warmup/lora_path_1"] == [one.where for one in checks.check(moved)]
    upkeep.repair(moved)
    assert [] == checks.check(moved)
    assert str(tmp_path / "moved") in string(moved.warmup_directory / "lora_path_1")


def test_plan_says_how_many_adapters_the_engine_keeps(sound: Repository, capsys: pytest.CaptureFixture[str]) -> None:
    """Their number is what this kind of target limits; the rest is read again."""
    _edit_yaml(sound, lora_config={"max_cpu_loras": 1, "max_loras": 1})
    add.add(sound, "second", synthetic_adapter(sound.root.parent / "second", 1))

    assert 0 == commands.main(["plan", "--repo", str(sound.root)])
    output = capsys.readouterr().out
    assert "2 adapters; the engine keeps 1 in host memory (max_cpu_loras), 1 at one time on the GPU" in output
    assert "recommended: max_cpu_loras: 2 in model.yaml" in output
    assert 1 == commands.main(["plan", "--apply", "--repo", str(sound.root)])


def test_serve_lets_the_model_complete_its_config(sound: Repository, capsys: pytest.CaptureFixture[str]) -> None:
    """max_batch_size and the transaction policy are in model.yaml."""
    assert 0 == commands.main(["serve", "--print-command", "--repo", str(sound.root)])
    assert "--disable-auto-complete-config" not in capsys.readouterr().out


def test_serve_starts_one_server_whatever_the_number_of_gpus(sound: Repository) -> None:
    """The LLM API starts its other processes by itself."""
    _edit_yaml(sound, tensor_parallel_size=2)

    assert World(1, "tensorrt_llm") == diagnosis.world_of(sound, Models(sound.root).served_config(sound.target))


def test_a_config_that_changes_after_it_was_read_is_refused(
    opened: Repository, adapter: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The engine would read another one than was checked."""

    def change_meanwhile(repository: Repository) -> State:
        config = json.loads((adapter / "adapter_config.json").read_text())
        (adapter / "adapter_config.json").write_text(json.dumps({**config, "lora_alpha": 1}))
        return read_state(repository)

    monkeypatch.setattr("tritonlora.repository.add.read_state", change_meanwhile)
    with pytest.raises(InvalidAdapter, match="adapter_config.json' was changed after it had been looked at; try again"):
        add.add(opened, "pirate", adapter)

    assert {} == read_table(opened).entries


def test_a_directory_that_a_warmup_sample_leads_to_stays(opened: Repository, adapter: Path, tmp_path: Path) -> None:
    """config.pbtxt names the file with its path alone, when an `add` was killed before it wrote that one."""
    add.add(opened, "pirate", adapter)
    before = read_text(opened.config_path)
    add.add(opened, "pirate", synthetic_adapter(tmp_path / "other", 1))
    after = read_text(opened.config_path)
    opened.config_path.write_text(before)
    let_time_pass(opened)
    generated.sweep(read_state(opened))
    kept = {path.name for path in opened.warmup_directory.glob("*_1")}
    opened.config_path.write_text(after)
    generated.sweep(read_state(opened))

    assert {"adapter_1", "lora_id_1", "lora_name_1", "lora_path_1"} == kept
    assert [] == list(opened.warmup_directory.glob("*_1"))
