# SPDX-FileCopyrightText: the tritonlora authors
# SPDX-License-Identifier: Apache-2.0
"""check.py: each finding, planted."""

from __future__ import annotations

import json
import re
import shutil
import socket
from collections.abc import Callable, Iterable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from adapters import lora_pair, write_adapter
from engine_configs import ENGINE
from repositories import lead_as_before, let_time_pass, set_cache_pages, set_decoupled, synthetic_repository
from tritonlora.check import checks
from tritonlora.check.findings import REPAIR
from tritonlora.cli import commands
from tritonlora.errors import EngineMismatch
from tritonlora.files import TEMPORARY_SUFFIX
from tritonlora.machine import SHARED_MEMORY, free_ports
from tritonlora.repository import add, init, paths, registry, upkeep, warmup
from tritonlora.repository.paths import Repository, read_table, read_text
from tritonlora.serving.adapter_table import with_entry
from tritonlora.serving.adapter_table_json import render
from upstream_configs import fill, upstream, upstream_repository


@pytest.fixture(scope="module")
def sound(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A repository with a warm and a cold adapter, in which nothing is wrong."""
    return synthetic_repository(
        tmp_path_factory.mktemp("check") / "repo", warm=["warm"], cold=["cold"], streams=64
    ).root


@pytest.fixture
def opened(sound: Path, tmp_path: Path) -> Repository:
    """A copy of it, to damage."""
    shutil.copytree(sound, tmp_path / "repo")
    return paths.open_repository(tmp_path / "repo")


def found(opened: Repository, *, deep: bool = False) -> list[tuple[str, str]]:
    """(severity, where: problem) of each finding."""
    return [(one.severity, f"{one.where}: {one.problem}") for one in checks.check(opened, deep=deep)]


def edit(path: Path, before: str, after: str) -> None:
    """Replace the first `before` in a file."""
    text = path.read_text()
    assert before in text
    path.write_text(text.replace(before, after, 1))


def lora_input(opened: Repository, name: str, before: str, after: str) -> None:
    """Change a value in the declaration of one of the engine's inputs."""
    head, mark, tail = read_text(opened.config_path).partition(f'name: "{name}"')
    assert before in tail
    opened.config_path.write_text(head + mark + tail.replace(before, after, 1))


def test_a_sound_repository_has_no_findings(opened: Repository) -> None:
    """Also with every digest compared, and in the other topology."""
    assert [] == found(opened, deep=True)
    init.init(opened.root, topology="resolve")
    assert [] == found(opened, deep=True)


def _without_router_step(opened: Repository) -> None:
    edit(opened.root / "ensemble" / "config.pbtxt", 'model_name: "lora_router"', 'model_name: "tensorrt_llm"')


def _resolve(opened: Repository, before: str, after: str) -> None:
    init.init(opened.root, topology="resolve")
    edit(opened.root / "lora_resolver" / "config.pbtxt", before, after)


def _resolve_as_before(opened: Repository) -> None:
    init.init(opened.root, topology="resolve")
    lead_as_before(opened)


def _set_batches(opened: Repository, **sizes: int) -> None:
    """Set max_batch_size of the named models, which is 64."""
    for model, size in sizes.items():
        edit(opened.root / model / "config.pbtxt", "max_batch_size: 64", f"max_batch_size: {size}")


def _engine(opened: Repository) -> Path:
    return opened.target_directory / "1" / "config.json"


def _warm_both_in_a_cache_of_one(opened: Repository) -> None:
    table = read_table(opened)
    opened.table_path.write_text(render(with_entry(table, "cold", replace(table.entries["cold"], warm=True))))
    upkeep.repair(opened)
    set_cache_pages(opened, 1)


def _own_sample(opened: Repository, key: str, file: str, content: bytes) -> None:
    """A warmup sample of the user's own, outside the block."""
    (opened.warmup_directory / file).write_bytes(content)
    value = f'{{ data_type: TYPE_INT32 dims: [ 1 ] input_data_file: "{file}" }}'
    sample = f'model_warmup {{ name: "mine" inputs {{ key: "{key}" value {value} }} }}\n'
    opened.config_path.write_text(sample + read_text(opened.config_path))


def _model(root: Path, name: str, config: str) -> None:
    (root / name).mkdir()
    (root / name / "config.pbtxt").write_text(config)


def _bls_model(root: Path) -> None:
    """Upstream's tensorrt_llm_bls, unfilled where that does no harm."""
    (root / "tensorrt_llm_bls").mkdir()
    (root / "tensorrt_llm_bls" / "config.pbtxt").write_text(fill(upstream("v0.18.0", "tensorrt_llm_bls")))


def _removed_long_ago(opened: Repository, name: str) -> None:
    registry.remove(opened, name)
    let_time_pass(opened)


def _dead_link(path: Path) -> None:
    shutil.rmtree(path)
    path.symlink_to("../../../plugin/tritonlora")


CACHE_PAGES = 'key: "cache_pages"\n  value {{\n    string_value: "{}"'

PLANTED: dict[str, tuple[Callable[[Repository], object], str, str]] = {
    "a weights file is missing": (
        lambda opened: (opened.warmup_directory / "adapter_model_2.bin").unlink(),
        "error",
        "adapter cold: tensorrt_llm/warmup/adapter_model_2.bin is missing",
    ),
    "a weights file is short": (
        lambda opened: (opened.warmup_directory / "adapter_model_2.bin").write_bytes(b"x"),
        "error",
        "adapter cold: tensorrt_llm/warmup/adapter_model_2.bin has 1 bytes, expected 8192",
    ),
    "a rows file is long": (
        lambda opened: (opened.warmup_directory / "adapter_config_2.bin").write_bytes(bytes(49)),
        "error",
        "adapter cold: tensorrt_llm/warmup/adapter_config_2.bin has 49 bytes, expected 48",
    ),
    "a row names a module that no engine has": (
        lambda opened: (opened.warmup_directory / "adapter_config_2.bin").write_bytes(b"\x63" + bytes(47)),
        "error",
        "adapter cold: lora_config has the row (99, 0, 0), which no engine takes",
    ),
    "the engine has no LoRA for a module": (
        lambda opened: upkeep.set_parameters(opened, {"lora_target_modules": "attn_q"}),
        "error",
        "adapter warm: the engine has no LoRA for attn_v",
    ),
    "the engine's rank is lower": (
        lambda opened: upkeep.set_parameters(opened, {"max_lora_rank": "4"}),
        "error",
        "adapter warm: it has rank 8, and the engine's max_lora_rank is 4",
    ),
    "the engine has fewer layers": (
        lambda opened: edit(_engine(opened), '"num_hidden_layers": 2', '"num_hidden_layers": 1'),
        "error",
        "adapter warm: it has layer 1, and the engine has 1",
    ),
    "the engine is wider": (
        lambda opened: edit(_engine(opened), '"hidden_size": 64', '"hidden_size": 640'),
        "error",
        "adapter warm: its rows are too short for attn_q (640 to 64)",
    ),
    "the engine has another dtype": (
        lambda opened: edit(_engine(opened), "bfloat16", "float16"),
        "error",
        "adapter warm: it is bfloat16, and the engine takes float16",
    ),
    "the engine was built without LoRA": (
        lambda opened: upkeep.set_parameters(opened, {"lora_target_modules": "none"}),
        "error",
        "engine: it was built without LoRA: it ignores adapters and answers from the base model",
    ),
    "the engine was built for fewer beams": (
        lambda opened: upkeep.set_parameters(opened, {"max_beam_width": "4"}),
        "error",
        "tensorrt_llm/config.pbtxt: max_beam_width is 4, and the engine was built for 1",
    ),
    "the user's own warmup asks for more beams": (
        lambda opened: _own_sample(opened, "beam_width", "my_beams", b"\3\0\0\0"),
        "error",
        "warmup/my_beams: a model_warmup sample of your own asks for 3 beams, and the engine was built for 1",
    ),
    "the engine is not here": (
        lambda opened: upkeep.set_parameters(opened, {"gpt_model_path": "/nowhere"}),
        "warning",
        "tensorrt_llm/config.pbtxt: no config.json at gpt_model_path '/nowhere'",
    ),
    "the engine's config.json is broken": (
        lambda opened: (opened.target_directory / "1" / "config.json").write_text("{"),
        "error",
        "gpt_model_path: ",
    ),
    "a type is still a placeholder": (
        lambda opened: edit(opened.config_path, "data_type: TYPE_FP32", "data_type: ${logits_datatype}"),
        "error",
        "tensorrt_llm/config.pbtxt: data_type of input 'draft_logits' is still ${logits_datatype}",
    ),
    "a type of another model is still a placeholder": (
        lambda opened: edit(
            opened.root / "preprocessing" / "config.pbtxt", "data_type: TYPE_STRING", "data_type: ${x}"
        ),
        "error",
        "preprocessing/config.pbtxt: data_type of input 'QUERY' is still ${x}",
    ),
    "lora_config has four columns and three are declared": (
        lambda opened: edit(
            opened.table_path,
            '"lora_config_shape": [4, 3',
            '"lora_config_shape": [4, 4',
        ),
        "error",
        "tensorrt_llm/config.pbtxt: lora_config has dims [-1, 3], and adapter cold has 4",
    ),
    "lora_weights is declared in another type": (
        lambda opened: lora_input(opened, "lora_weights", "TYPE_BF16", "TYPE_FP16"),
        "error",
        "tensorrt_llm/config.pbtxt: lora_weights is TYPE_FP16, and adapter warm is bfloat16",
    ),
    "lora_config is declared with four columns": (
        lambda opened: lora_input(opened, "lora_config", "-1, 3", "-1, 4"),
        "error",
        "tensorrt_llm/config.pbtxt: lora_config has dims [-1, 4], and adapter warm has 3",
    ),
    "an input of the LoRA contract is not declared": (
        lambda opened: edit(opened.config_path, 'name: "lora_weights"', 'name: "lora_wights"'),
        "error",
        "tensorrt_llm/config.pbtxt: it declares no input lora_weights",
    ),
    "a Python backend of upstream's with bfloat16": (
        lambda opened: edit(opened.config_path, 'key: "synthetic"', 'key: "sintetic"'),
        "error",
        "tensorrt_llm/config.pbtxt: backend 'python' reads lora_weights through numpy, which has no bfloat16",
    ),
    "the warmup block is gone": (
        lambda opened: opened.config_path.write_text(warmup.replace_block(read_text(opened.config_path), "")),
        "warning",
        "tensorrt_llm/config.pbtxt: adapter warm has no warmup sample: it is loaded on its first request",
    ),
    "the warmup block has other dims": (
        lambda opened: edit(opened.config_path, "dims: [ 4, 1024 ]", "dims: [ 4, 1000 ]"),
        "error",
        "tensorrt_llm/config.pbtxt: the warmup sample of adapter warm has other dims than its files",
    ),
    "the warmup block warms up an adapter that is not": (
        lambda opened: edit(opened.config_path, "lora_1_warmup", "lora_2_warmup"),
        "error",
        "tensorrt_llm/config.pbtxt: it warms up lora_task_id 2, which no warm adapter has",
    ),
    "the warmup block was edited": (
        lambda opened: edit(opened.config_path, "lora_1_warmup", "mine"),
        "error",
        "tensorrt_llm/config.pbtxt: line ",
    ),
    "a shared warmup file is missing": (
        lambda opened: (opened.warmup_directory / "input_ids").unlink(),
        "error",
        "warmup/input_ids: it is missing or altered, and warmup samples need it",
    ),
    "a task id file was altered": (
        lambda opened: (opened.warmup_directory / "lora_id_1").write_bytes(bytes(8)),
        "error",
        "warmup/lora_id_1: it is missing or altered, and warmup samples need it",
    ),
    "the cache is too small to load": (
        lambda opened: upkeep.set_parameters(opened, {"lora_cache_host_memory_bytes": "20000"}),
        "error",
        "tensorrt_llm/config.pbtxt: the engine will not load: ",
    ),
    "the cache is too small for the warm adapters": (
        _warm_both_in_a_cache_of_one,
        "warning",
        "tensorrt_llm/config.pbtxt: the warm adapters take 2 pages, the cache has 1",
    ),
    "the engine may pause requests": (
        lambda opened: upkeep.set_parameters(opened, {"batch_scheduler_policy": "max_utilization"}),
        "error",
        "lora_resolver/config.pbtxt: batch_scheduler_policy of tensorrt_llm is max_utilization, which",
    ),
    "the router has fewer instances than the engine takes requests": (
        lambda opened: edit(opened.root / "lora_router" / "config.pbtxt", "count: 64", "count: 63"),
        "warning",
        "lora_router/config.pbtxt: it has 63 instances, which forward one request each at a time, and the engine takes "
        "64: further requests of ensemble wait",
    ),
    "the resolver believes in another cache": (
        lambda opened: _resolve(opened, *map(CACHE_PAGES.format, (100, 7))),
        "warning",
        "lora_resolver/config.pbtxt: cache_pages is 7, and the engine's cache has 100",
    ),
    "the resolver declares another type": (
        lambda opened: _resolve(opened, "TYPE_BF16", "TYPE_FP16"),
        "error",
        "lora_resolver/config.pbtxt: lora_weights is not declared as tensorrt_llm declares it",
    ),
    "the pages of an adapter are those of another cache": (
        lambda opened: edit(opened.table_path, '"pages": 1', '"pages": 7'),
        "warning",
        "adapter cold: it is registered with 7 pages of the engine's cache, and takes 1 now",
    ),
    "a parameter is not a number": (
        lambda opened: upkeep.set_parameters(opened, {"lora_cache_host_memory_bytes": "a lot"}),
        "warning",
        "tensorrt_llm/config.pbtxt: lora_cache_host_memory_bytes",
    ),
    "the router declares another type": (
        lambda opened: edit(opened.root / "lora_router" / "config.pbtxt", "TYPE_INT32", "TYPE_INT64"),
        "error",
        "lora_router/config.pbtxt: input_ids is not declared as tensorrt_llm declares it",
    ),
    "the router has another transaction policy": (
        lambda opened: edit(opened.root / "lora_router" / "config.pbtxt", "decoupled: true", "decoupled: false"),
        "error",
        "lora_router/config.pbtxt: its transaction policy is not that of tensorrt_llm",
    ),
    "an ensemble goes past the router": (
        _without_router_step,
        "error",
        "ensemble/config.pbtxt: it leads to tensorrt_llm past the router: names have no effect",
    ),
    "another model goes past the router": (
        lambda opened: _bls_model(opened.root),
        "warning",
        "tensorrt_llm_bls/config.pbtxt: it calls tensorrt_llm itself: a lora_name in a request to it has no effect",
    ),
    "a step of an ensemble has no model": (
        lambda opened: shutil.rmtree(opened.root / "postprocessing"),
        "error",
        "ensemble/config.pbtxt: it has a step for 'postprocessing', and there is no such model",
    ),
    "an ensemble takes larger batches than its steps": (
        lambda opened: _set_batches(opened, ensemble=65),
        "error",
        "ensemble/config.pbtxt: max_batch_size is 65, and its step lora_router takes 64: the ensemble does not load",
    ),
    "an ensemble takes larger batches than the router": (
        lambda opened: _set_batches(opened, lora_router=32),
        "error",
        "ensemble/config.pbtxt: max_batch_size is 64, and its step lora_router takes 32: the ensemble does not load",
    ),
    "another model's config cannot be read": (
        lambda opened: _model(opened.root, "aa", 'name: "aa'),
        "error",
        "aa/config.pbtxt: ",
    ),
    "the tokenizer's place is still a placeholder": (
        lambda opened: edit(opened.root / "preprocessing" / "config.pbtxt", 'string_value: ""', 'string_value: "${x}"'),
        "error",
        "preprocessing/config.pbtxt: tokenizer_dir is still ${x}",
    ),
    "Triton keeps what clients have left": (
        lambda opened: edit(
            opened.root / "postprocessing" / "config.pbtxt",
            "max_batch_size: 64",
            "max_batch_size: 64\ndynamic_batching { }",
        ),
        "warning",
        "postprocessing/config.pbtxt: it has dynamic_batching: before 26.02, Triton never lets go of a stream",
    ),
    "a stream's pieces come out of order": (
        lambda opened: edit(opened.root / "postprocessing" / "config.pbtxt", "count: 1", "count: 4"),
        "error",
        "postprocessing/config.pbtxt: it has 4 instances, which run at the same time: the pieces of a stream of "
        "ensemble come out of order",
    ),
    "Triton keeps the responses of the resolver": (
        lambda opened: _resolve(opened, "instance_group", "response_cache { enable: true }\ninstance_group"),
        "error",
        "lora_resolver/config.pbtxt: response_cache is on: Triton's response cache keeps an error as an empty success",
    ),
    "the ensemble is as init led it to the resolver before": (
        _resolve_as_before,
        "warning",
        "ensemble/config.pbtxt: request_output_len goes past lora_resolver: tensorrt_llm would take an empty response",
    ),
    "the router's code was edited": (
        lambda opened: edit(opened.root / "lora_router" / "1" / "model.py", "import", "import  "),
        "warning",
        "lora_router/1/model.py: it was edited since tritonlora wrote it",
    ),
    "the listing's code is missing": (
        lambda opened: (opened.root / "lora_adapters" / "1" / "model.py").unlink(),
        "error",
        "lora_adapters/1/model.py: it is missing: the model does not load",
    ),
    "a module of the router is missing": (
        lambda opened: (opened.root / "lora_router" / "1" / "serving" / "routing.py").unlink(),
        "error",
        "lora_router/1/serving/routing.py: it is missing: the model does not load",
    ),
    "a checkout's repository was copied alone": (
        lambda opened: _dead_link(opened.root / "preprocessing" / "1" / "serving"),
        "error",
        "preprocessing/1/serving: the link leads nowhere: the model does not load",
    ),
    "an add was killed before it wrote the table": (
        lambda opened: (opened.warmup_directory / "adapter_model_3.bin").write_bytes(b""),
        "warning",
        "warmup/adapter_model_3.bin: no adapter has it: an `add` that was stopped left it",
    ),
    "an init was killed": (
        lambda opened: (opened.target_directory / f".lora_router.0{TEMPORARY_SUFFIX}").mkdir(),
        "warning",
        f"tensorrt_llm/.lora_router.0{TEMPORARY_SUFFIX}: a command that was stopped left it",
    ),
    "a command was killed": (
        lambda opened: (opened.warmup_directory / f".x{TEMPORARY_SUFFIX}").write_bytes(b""),
        "warning",
        f"tensorrt_llm/warmup/.x{TEMPORARY_SUFFIX}: a command that was stopped left it half-written",
    ),
    "an adapter has another one's file": (
        lambda opened: edit(opened.table_path, "adapter_model_2.bin", "adapter_model_1.bin"),
        "error",
        "adapter cold: tensorrt_llm/warmup/adapter_model_1.bin is another adapter's, too, with another SHA-256",
    ),
    "files of a removed adapter are left": (
        lambda opened: _removed_long_ago(opened, "warm"),
        "warning",
        "warmup/adapter_model_1.bin: it belongs to an adapter that was removed or replaced",
    ),
}


# The adapter has to be another one, or the engine.
OF_ANOTHER_ENGINE = {
    "a row names a module that no engine has",
    "the engine has no LoRA for a module",
    "the engine's rank is lower",
    "the engine has fewer layers",
    "the engine is wider",
    "the engine has another dtype",
}
IN_WORDS = {
    "Triton keeps the responses of the resolver",
    "a step of an ensemble has no model",
    "an ensemble takes larger batches than its steps",
    "another model's config cannot be read",
    "the tokenizer's place is still a placeholder",
    "the engine was built without LoRA",
    "the engine was built for fewer beams",
    "the user's own warmup asks for more beams",
    "the engine is not here",
    "the engine's config.json is broken",
    "a type is still a placeholder",
    "a type of another model is still a placeholder",
    "an input of the LoRA contract is not declared",
    "a Python backend of upstream's with bfloat16",
    "another model goes past the router",
    "Triton keeps what clients have left",
    "a stream's pieces come out of order",
    "a checkout's repository was copied alone",
    "an add was killed before it wrote the table",
}


@pytest.mark.parametrize("name", PLANTED)
def test_what_is_wrong_is_found(opened: Repository, name: str) -> None:
    """Named, with its severity and a remedy."""
    plant, severity, problem = PLANTED[name]
    plant(opened)
    findings = checks.check(opened)

    assert [one for one in findings if one.severity == severity and f"{one.where}: {one.problem}".startswith(problem)]
    assert all(one.remedy for one in findings)


COMMAND = re.compile(r"tritonlora ((?:add|check|init|plan) [^;,]+)")


@pytest.mark.parametrize("name", PLANTED)
def test_the_remedy_works(opened: Repository, sound: Path, name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """The command that it says, as it says it; where it says none, it is said what to do in words."""
    plant, _, problem = PLANTED[name]
    plant(opened)
    [remedy] = {one.remedy for one in checks.check(opened) if f"{one.where}: {one.problem}".startswith(problem)}
    command = COMMAND.search(remedy)
    monkeypatch.setenv("TRITONLORA_REPO", str(opened.root))
    arguments = command[1].split() if command and name not in OF_ANOTHER_ENGINE else []
    if arguments:
        adapter = str(sound.parent / f"{sound.name}-adapters" / arguments[1])
        commands.main([adapter if argument == "ADAPTER_DIR" else argument for argument in arguments])

    assert bool(arguments) == (problem not in " ".join(what for _, what in found(opened)))
    assert bool(arguments) == (name not in {*IN_WORDS, *OF_ANOTHER_ENGINE})


def test_a_config_that_cannot_be_read_hides_nothing(opened: Repository) -> None:
    """What is wrong elsewhere is found all the same, and is not put down to the engine's model."""
    _model(opened.root, "aa", 'name: "aa')
    _bls_model(opened.root)

    assert ["aa/config.pbtxt", "tensorrt_llm_bls/config.pbtxt"] == [one.where for one in checks.check(opened)]


OUTER = """
platform: "ensemble"
max_batch_size: 4
input [ { name: "text" data_type: TYPE_STRING dims: [ 1 ] } ]
output [ { name: "out" data_type: TYPE_STRING dims: [ -1 ] } ]
ensemble_scheduling { step [
  { model_name: "last" model_version: -1 input_map { key: "x" value: "middle" } output_map { key: "y" value: "out" } },
  { model_name: "ensemble" model_version: -1 input_map { key: "text_input" value: "text" }
    output_map { key: "text_output" value: "inner" } },
  { model_name: "between" model_version: -1 input_map { key: "x" value: "inner" }
    output_map { key: "y" value: "middle" } }
] }
"""


@pytest.mark.parametrize("topology", ["forward", "resolve"])
def test_no_response_is_kept_of_a_model_that_adapters_depend_on(opened: Repository, topology: str) -> None:
    """The engine's, ours, those that call these, and ensembles, however far before them. Of others Triton may."""
    init.init(opened.root, topology=topology)
    _bls_model(opened.root)
    for name, config in {"outer": OUTER, "between": 'backend: "python"', "last": 'backend: "python"'}.items():
        _model(opened.root, name, config)
    models = sorted(path.parent.name for path in opened.root.glob("*/config.pbtxt"))
    others = {"preprocessing", "postprocessing", "between", "last"}
    before = found(opened)
    for model in models:
        with (opened.root / model / "config.pbtxt").open("a") as file:
            file.write("response_cache { enable: false }\n")
    assert before == found(opened)
    for model in models:
        edit(opened.root / model / "config.pbtxt", "enable: false", "enable: true")

    assert [f"{model}/config.pbtxt" for model in models if model not in others] == sorted(
        one.where for one in checks.check(opened) if "response_cache is on" in one.problem
    )


BATCHED = 'backend: "python" max_batch_size: 4 dynamic_batching { }'


@pytest.mark.parametrize(("topology", "decoupled"), [("forward", True), ("resolve", True), ("forward", False)])
def test_what_is_batched_behind_a_stream_is_found(opened: Repository, topology: str, decoupled: bool) -> None:
    """However far behind, once for each model; what is before it, and what no stream comes to, is none."""
    for model in ("preprocessing", "postprocessing"):
        edit(opened.root / model / "config.pbtxt", "max_batch_size: 64", "max_batch_size: 64 dynamic_batching { }")
    for name, config in {"outer": OUTER, "between": 'backend: "python"', "last": BATCHED, "lonely": BATCHED}.items():
        _model(opened.root, name, config)
    if not decoupled:
        set_decoupled(opened, False)
    init.init(opened.root, topology=topology)
    found = [one.where for one in checks.check(opened) if "it has dynamic_batching" in one.problem]

    assert (["last/config.pbtxt", "postprocessing/config.pbtxt"] if decoupled else []) == sorted(found)


@pytest.mark.parametrize(("topology", "decoupled"), [("forward", True), ("resolve", True), ("forward", False)])
def test_several_instances_behind_a_stream_are_found(opened: Repository, topology: str, decoupled: bool) -> None:
    """Models before the stream may have several instances, and so may those that no stream comes to."""
    several = BATCHED + " instance_group [ { count: 2 }, { count: 1 } ]"
    for name, config in {"outer": OUTER, "between": 'backend: "python"', "last": several, "lonely": several}.items():
        _model(opened.root, name, config)
    for model in ("preprocessing", "postprocessing"):
        edit(opened.root / model / "config.pbtxt", "count: 1", "count: 2")
    if not decoupled:
        set_decoupled(opened, False)
    init.init(opened.root, topology=topology)
    found = [(one.severity, one.where) for one in checks.check(opened) if "come out of order" in one.problem]

    wrong = [("error", "last/config.pbtxt"), ("error", "postprocessing/config.pbtxt")]
    assert (wrong if decoupled else []) == sorted(found)


@pytest.mark.parametrize(
    ("sizes", "remedies"),
    [
        ({"preprocessing": 32, "postprocessing": 16}, ["set max_batch_size to 16 in ensemble/config.pbtxt"]),
        ({"ensemble": 65, "lora_router": 32}, ["set max_batch_size to 32 in ensemble/config.pbtxt"]),
        ({"tensorrt_llm": 65, "ensemble": 65, "lora_router": 32}, ["tritonlora init"]),
        ({"ensemble": 63}, []),
        ({"preprocessing": 0}, []),
        ({"ensemble": 0}, []),
    ],
)
def test_the_remedy_for_batches_is_for_the_smallest_step(
    opened: Repository, sizes: dict[str, int], remedies: list[str]
) -> None:
    """A step without batches is no limit, and an ensemble may take smaller batches than its steps."""
    _set_batches(opened, **sizes)
    found = [one.remedy for one in checks.check(opened) if "the ensemble does not load" in one.problem]

    assert remedies == [remedy.removesuffix(f" {opened.root}") for remedy in found]


def test_an_altered_file_is_found_by_its_digest(opened: Repository) -> None:
    """Only when asked: it reads all the weights."""
    file = opened.warmup_directory / "adapter_model_2.bin"
    file.write_bytes(bytes(file.stat().st_size))

    assert [] == found(opened)
    altered = "tensorrt_llm/warmup/adapter_model_2.bin was altered: its SHA-256 is not the registered one"
    assert [("error", f"adapter cold: {altered}")] == found(opened, deep=True)


@pytest.mark.parametrize(
    ("change", "expected"),
    [
        (lambda name, one: one * 0 if "lora_B" in name else one, "zero in all layers (attn_q, attn_v in layers 0, 1):"),
        (lambda name, one: -one * 0 if ".0.self_attn" in name else one, "is zero in attn_q, attn_v in layer 0: the"),
        (lambda name, one: None if ".1.self_attn.q" in name else one, "there are no tensors of q_proj in layer 1, "),
        (lambda name, one: None if "v_proj" in name else one, "target_modules lists v_proj, of which there are no "),
    ],
    ids=["all", "layer", "missing", "listed"],
)
def test_layers_in_which_an_adapter_changes_nothing_are_found(
    change: Callable[[str, torch.Tensor], torch.Tensor | None], expected: str, opened: Repository, tmp_path: Path
) -> None:
    """Only when asked, from the files of the repository alone; and `add` says so, too."""
    pairs: dict[str, torch.Tensor] = {}
    for layer in (0, 1):
        for leaf, outputs in (("q_proj", 64), ("v_proj", 32)):
            path = f"model.layers.{layer}.self_attn.{leaf}"
            pairs |= lora_pair(path, in_features=64, out_features=outputs)
    changed = {name: new for name, tensor in pairs.items() if (new := change(name, tensor)) is not None}
    adapter = write_adapter(tmp_path / "adapter", changed, target_modules=["q_proj", "v_proj"])
    (remark,) = add.add(opened, "new", adapter).remarks

    assert remark.startswith(
        ("there are no tensors of q_proj in layer 1", "target_modules", "lora_A or lora_B is zero")
    )
    assert [] == found(opened)
    ((severity, problem),) = found(opened, deep=True)
    assert "warning" == severity
    assert problem.startswith("adapter new: ")
    assert expected in problem


def test_layers_that_were_left_out_on_purpose_are_no_finding(opened: Repository, tmp_path: Path) -> None:
    """layers_to_transform names the layers that were trained."""
    pair = lora_pair("model.layers.1.self_attn.q_proj", in_features=64, out_features=64)
    adapter = write_adapter(tmp_path / "adapter", pair, target_modules=["q_proj"], layers_to_transform=[1])

    assert () == add.add(opened, "new", adapter).remarks
    assert [] == found(opened, deep=True)


def test_the_remarks_of_a_table_that_an_older_version_wrote_come_with_the_same_adapter(
    opened: Repository, tmp_path: Path
) -> None:
    """Such a table has no field for them. The same `add` again fills it in, and keeps the id."""
    pair = lora_pair("model.layers.1.self_attn.q_proj", in_features=64, out_features=64)
    adapter = write_adapter(tmp_path / "adapter", pair, target_modules=["q_proj"])
    before = add.add(opened, "new", adapter).entry
    document = json.loads(opened.table_path.read_text())
    for entry in document["adapters"].values():
        del entry["remarks"]
    opened.table_path.write_text(json.dumps(document))

    assert () == read_table(opened).entries["new"].remarks
    assert [] == found(opened, deep=True)
    assert before == add.add(opened, "new", adapter).entry
    assert ["there are no tensors of q_proj in layer 0, "] == [one[:43] for one in before.remarks]
    assert before.remarks == read_table(opened).entries["new"].remarks
    assert 1 == len(found(opened, deep=True))


@pytest.mark.parametrize(
    "name",
    [
        "lora_weights is declared in another type",
        "the warmup block is gone",
        "the warmup block has other dims",
        "the warmup block warms up an adapter that is not",
        "the warmup block was edited",
        "a shared warmup file is missing",
        "a task id file was altered",
        "a command was killed",
        "an init was killed",
    ],
)
def test_what_is_generated_can_be_put_right(opened: Repository, name: str) -> None:
    """check --fix, as the remedy says."""
    PLANTED[name][0](opened)
    assert REPAIR in {one.remedy for one in checks.check(opened)}
    upkeep.repair(opened)

    assert [] == found(opened, deep=True)


def test_a_check_that_cannot_be_done_does_not_stop_the_others(opened: Repository) -> None:
    """The end of the block of warmup samples was deleted, and an adapter's weights are gone: both are said, once."""
    text = read_text(opened.config_path)
    opened.config_path.write_text("".join(line for line in text.splitlines(True) if "# tritonlora: end" not in line))
    (opened.root / read_table(opened).entries["cold"].lora_weights_file).unlink()
    problems = [one.problem for one in checks.check(opened) if one.severity == "error"]

    assert 2 == len(problems)
    assert any("model_warmup" in problem for problem in problems)
    assert any(problem.endswith("is missing") for problem in problems)


@pytest.mark.parametrize(
    "name",
    [
        "the router declares another type",
        "the router has another transaction policy",
        "an ensemble goes past the router",
        "the router's code was edited",
        "a module of the router is missing",
    ],
)
def test_init_puts_the_router_right(opened: Repository, name: str) -> None:
    """As the remedy says; check --fix does it, too."""
    PLANTED[name][0](opened)
    assert f"tritonlora init {opened.root}" in {one.remedy for one in checks.check(opened)}
    init.init(opened.root)

    assert [] == found(opened)


def test_a_small_dev_shm_is_found(opened: Repository, monkeypatch: pytest.MonkeyPatch) -> None:
    """Docker gives 64 MiB, and an adapter that is sent again needs room for all of it."""
    usage = shutil.disk_usage("/")._replace(total=2 * 1024**2)
    monkeypatch.setattr("tritonlora.check.machine.shutil.disk_usage", lambda _: usage)
    problem = f"{SHARED_MEMORY}: to send an adapter again takes 2105392 bytes of shared memory, more than there is"

    assert [("warning", problem)] == found(opened)


@pytest.mark.parametrize("cold", [False, True])
def test_a_dev_shm_that_is_too_small_for_both_copies_of_the_resolver_is_found(
    cold: bool, opened: Repository, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It keeps what it has sent; where no adapter is ever sent again, it needs none of it."""
    usage = shutil.disk_usage("/")._replace(total=2 * 2105392 - 1)
    monkeypatch.setattr("tritonlora.check.machine.shutil.disk_usage", lambda _: usage)
    if not cold:
        registry.remove(opened, "cold")

    problem = (
        f"{SHARED_MEMORY}: lora_resolver keeps shared memory for the largest adapter that it loads, and for the "
        "largest one that goes along with requests: 4210784 bytes in all, more than there is"
    )
    expected = [("warning", problem)] if cold else []

    assert expected == [one for one in found(opened) if str(SHARED_MEMORY) in one[1]]


def test_ports_in_use_are_found(opened: Repository) -> None:
    """Those that a server would be given."""
    with socket.socket() as taken:
        taken.bind(("", 0))
        taken.listen()
        ports = replace(free_ports(), metrics=taken.getsockname()[1])
        findings = checks.check(opened, ports=ports)

    assert [("warning", f"port {ports.metrics}")] == [(one.severity, one.where) for one in findings]


def engine_repository(tmp_path: Path, parameters: dict[str, str] | None = None, **changes: Any) -> Repository:
    """Upstream's repository, with an engine of one LoRA module (attn_dense), four pipeline ranks and max rank 128.

    `changes` go into its config.json: dotted paths with "__" for the dots.
    """
    engine: dict[str, Any] = json.loads(json.dumps(ENGINE))
    engine["pretrained_config"]["mapping"] = {"tp_size": 1, "pp_size": 4}
    engine["build_config"]["lora_config"] |= {"max_lora_rank": 128, "lora_target_modules": ["attn_dense"]}
    for path, value in changes.items():
        *parents, last = path.split("__")
        section = engine
        for parent in parents:
            section = section[parent]
        section[last] = value
    root = upstream_repository(tmp_path / "repo", "v0.18.0", values={"tokenizer_dir": "/tokenizer"})
    init.init(root)
    opened = paths.open_repository(root)
    (tmp_path / "config.json").write_text(json.dumps(engine))
    upkeep.set_parameters(opened, {"gpt_model_path": str(tmp_path), **(parameters or {})})
    return opened


def dense_adapter(tmp_path: Path, rank: int, layers: Iterable[int] = range(32)) -> Path:
    """An adapter of attn_dense alone."""
    tensors: dict[str, torch.Tensor] = {}
    for layer in layers:
        path = f"model.layers.{layer}.self_attn.o_proj"
        tensors |= lora_pair(path, r=rank, in_features=4096, out_features=4096)
    return write_adapter(tmp_path / f"adapter-{rank}", tensors, r=rank, lora_alpha=rank)


def findings_about(opened: Repository, words: str) -> list[tuple[str, str]]:
    """(severity, where) of the findings whose problem has these words."""
    return [(one.severity, one.where) for one in checks.check(opened) if words in one.problem]


def test_an_adapter_that_the_engine_cannot_load_is_refused_until_its_page_is_wide_enough(tmp_path: Path) -> None:
    """With the default parameters it is refused; the command that the refusal names makes it loadable."""
    opened, adapter = engine_repository(tmp_path), dense_adapter(tmp_path, 128)
    with pytest.raises(EngineMismatch, match="cannot load 'wide'") as refused:
        add.add(opened, "wide", adapter)
    command = str(refused.value).partition("tritonlora ")[2]

    assert 0 == commands.main([*command.split(), "--repo", str(opened.root)])
    assert add.add(opened, "wide", adapter).entry.pages
    assert [] == [one for one in found(opened) if "adapter wide" in one[1]]


def test_a_registered_adapter_that_the_engine_cannot_load_is_found_until_plan_apply(tmp_path: Path) -> None:
    """It was added while the parameter was larger."""
    opened = engine_repository(tmp_path, {"lora_cache_max_adapter_size": "128"})
    add.add(opened, "wide", dense_adapter(tmp_path, 128))
    upkeep.set_parameters(opened, {"lora_cache_max_adapter_size": "64"})
    (before,) = (one for one in checks.check(opened) if "never load" in one.problem)
    command = before.remedy.partition("tritonlora ")[2].partition(",")[0]

    assert ("error", "adapter wide") == (before.severity, before.where)
    assert 0 == commands.main([*command.split(), "--repo", str(opened.root)])
    assert [] == [one for one in found(opened) if "adapter wide" in one[1]]


def test_adapters_that_pipeline_ranks_cannot_serve_are_refused_and_found(tmp_path: Path) -> None:
    """One without layers on a rank; and where not all fit, one that takes other pages on other ranks."""
    opened = engine_repository(tmp_path)
    with pytest.raises(EngineMismatch, match="pipeline-parallel rank 3"):
        add.add(opened, "idle", dense_adapter(tmp_path, 8, range(24)))
    even = dense_adapter(tmp_path, 8)
    for name in ("uneven", "other"):
        add.add(opened, name, even)
    rows = np.array([(4, layer, 64 if layer >= 24 else 8) for layer in range(32)], "<i4")
    config_file = opened.root / read_table(opened).entries["uneven"].lora_config_file
    config_file.write_bytes(rows.tobytes())
    roomy = findings_about(opened, "pages on different pipeline-parallel ranks")
    upkeep.set_parameters(opened, {"lora_cache_host_memory_bytes": str(8 << 20)})
    narrow = findings_about(opened, "pages on different pipeline-parallel ranks")
    rows[24:, 1] = 0
    config_file.write_bytes(rows.tobytes())
    idle = findings_about(opened, "pipeline-parallel rank 3")

    assert [] == roomy
    assert [("warning", "adapter uneven")] == narrow
    assert [("error", "adapter uneven")] == idle


@pytest.mark.parametrize(
    ("change", "problem"),
    [
        ({"build_config__plugin_config__lora_plugin": "float16"}, "lora_plugin is float16 and its model bfloat16"),
        (
            {"pretrained_config__dtype": "float16", "build_config__plugin_config__lora_plugin": "bfloat16"},
            "lora_plugin is bfloat16 and its model float16",
        ),
        ({"pretrained_config__num_hidden_layers": 30}, "30 layers do not divide among its 4 pipeline-parallel ranks"),
    ],
)
def test_an_engine_for_which_no_adapter_is_right_is_refused_and_found(
    tmp_path: Path, change: dict[str, Any], problem: str
) -> None:
    """`add` refuses, with the remedy; `check` reports the engine."""
    opened = engine_repository(tmp_path, **change)
    with pytest.raises(EngineMismatch, match=f"{problem}.*; build the engine"):
        add.add(opened, "x", dense_adapter(tmp_path, 8))

    assert [("error", True)] == [
        (one.severity, problem in one.problem) for one in checks.check(opened) if one.where == "engine"
    ]


@pytest.mark.parametrize("plugin", ["auto", "bfloat16"])
def test_a_lora_plugin_of_the_model_s_dtype_is_right(tmp_path: Path, plugin: str) -> None:
    """ "auto" is that dtype."""
    opened = engine_repository(tmp_path, build_config__plugin_config__lora_plugin=plugin)
    add.add(opened, "x", dense_adapter(tmp_path, 8))

    assert [] == [one for one in checks.check(opened) if one.where == "engine"]


def test_the_gpu_s_cache_is_checked_where_its_memory_is_known(tmp_path: Path) -> None:
    """Too little for the engine to load; and enough for that, but not for one adapter; and enough for all."""
    opened = engine_repository(tmp_path, {"lora_cache_max_adapter_size": "64", "lora_cache_optimal_adapter_size": "8"})
    add.add(opened, "big", dense_adapter(tmp_path, 64))
    upkeep.set_parameters(opened, {"lora_cache_max_adapter_size": "1"})
    problems = {
        nbytes: [
            one.problem
            for one in checks.check(opened, gpu_memory=nbytes)
            if "GPU memory" in one.problem or "device" in one.problem
        ]
        for nbytes in (1 << 20, 1 << 27, 1 << 34)
    }

    assert ["the engine will not load", "it is larger than the engine's LoRA cache in GPU memory"] == [
        problem.partition(":")[0] for problem in problems[1 << 20]
    ]
    assert ["it is larger than the engine's LoRA cache in GPU memory"] == [
        problem.partition(":")[0] for problem in problems[1 << 27]
    ]
    assert [] == problems[1 << 34]


def test_a_real_engine_s_config_is_checked(tmp_path: Path) -> None:
    """Upstream's repository with an engine that was built without LoRA, and for three beams."""
    root = upstream_repository(tmp_path / "repo", "v0.18.0", values={"tokenizer_dir": "/tokenizer"})
    init.init(root)
    opened = paths.open_repository(root)
    build = {**ENGINE["build_config"], "plugin_config": {"lora_plugin": None}}
    (tmp_path / "config.json").write_text(json.dumps({**ENGINE, "build_config": build}))
    upkeep.set_parameters(opened, {"gpt_model_path": str(tmp_path), "max_beam_width": "4"})

    assert [
        ("error", "engine: it was built without LoRA: it ignores adapters and answers from the base model"),
        ("error", "tensorrt_llm/config.pbtxt: max_beam_width is 4, and the engine was built for 3"),
        (
            "warning",
            "tensorrt_llm_bls/config.pbtxt: it calls tensorrt_llm itself: a lora_name in a request to it has no effect",
        ),
        (
            "warning",
            "postprocessing/config.pbtxt: it has dynamic_batching: before 26.02, Triton never lets go of a stream of "
            "ensemble that its client has left, nor of its memory, and takes all its time to stop",
        ),
    ] == found(opened)


@pytest.mark.parametrize(
    ("change", "problem"),
    [
        ({"build_config__kv_cache_type": "DISABLED"}, "without a KV cache"),
        ({"pretrained_config__architecture": "DecoderModel"}, "an encoder-decoder's"),
    ],
)
def test_engines_in_which_lora_was_reported_broken_are_a_warning(
    tmp_path: Path, change: dict[str, Any], problem: str
) -> None:
    """Once an adapter is there; it is added all the same."""
    opened = engine_repository(tmp_path, **change)

    assert [] == [one for one in checks.check(opened) if one.where == "engine"]
    add.add(opened, "x", dense_adapter(tmp_path, 8))
    (found_one,) = (one for one in checks.check(opened) if one.where == "engine")
    assert "warning" == found_one.severity
    assert problem in found_one.problem
    assert re.search(r"TensorRT-LLM issues? [0-9]+", found_one.problem)


def test_the_encoder_of_a_decoder_is_a_warning(tmp_path: Path) -> None:
    """Also where the engine's own files do not say so; a placeholder is none."""
    opened = engine_repository(tmp_path, {"encoder_model_path": "/engines/encoder"})
    add.add(opened, "x", dense_adapter(tmp_path, 8))
    assert ["encoder-decoder" in one.problem for one in checks.check(opened) if one.where == "engine"] == [True]
    upkeep.set_parameters(opened, {"encoder_model_path": "${encoder_model_path}"})

    assert [] == [one for one in checks.check(opened) if one.where == "engine"]
