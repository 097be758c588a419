# SPDX-FileCopyrightText: the tritonlora authors
# SPDX-License-Identifier: Apache-2.0
"""compose.py: a weighted sum of adapters becomes an adapter of the repository, or nothing changes."""

from __future__ import annotations

import json
import math
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from adapters import lora_pair, write_adapter
from repositories import llm_api_repository, synthetic_adapter, synthetic_repository
from tritonlora.check import checks
from tritonlora.errors import AdapterTableError, EngineMismatch, InvalidAdapter, RepositoryError, TritonLoraError
from tritonlora.peft.adapter import load_adapter
from tritonlora.repository import add, compose, init, paths, registry, undo, upkeep
from tritonlora.repository.add import Options
from tritonlora.repository.paths import Repository, read_table
from tritonlora.repository.shipped import shipped_models
from upstream_configs import upstream_repository_on_the_cpu

Q = "model.layers.0.self_attn.q_proj"


@pytest.fixture(scope="module")
def sound(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A repository with two adapters of rank 8, both of seeds of their own."""
    root = tmp_path_factory.mktemp("compose") / "repo"
    return synthetic_repository(root, warm=["pirate"], cold=["haiku"], topology="resolve").root


@pytest.fixture
def opened(sound: Path, tmp_path: Path) -> Repository:
    """A copy of it."""
    shutil.copytree(sound, tmp_path / "repo")
    return paths.open_repository(tmp_path / "repo")


def source(sound: Path, name: str) -> Path:
    """The PEFT directory that a registered adapter was added from."""
    return sound.parent / "repo-adapters" / name


def snapshot(root: Path) -> dict[str, bytes]:
    """Every file's bytes, but for the lock's."""
    return {
        str(path.relative_to(root)): path.read_bytes()
        for path in sorted(root.rglob("*"))
        if path.is_file() and path.name != ".lock"
    }


def stored_deltas(opened: Repository, name: str) -> list[torch.Tensor]:
    """B @ A of each row as the engine gets it, in float64: read off the file with the engine's sizes alone."""
    entry = read_table(opened).entries[name]
    config = json.loads((opened.target_directory / "1" / "config.json").read_text())
    sizes = {1: config["hidden_size"], 3: config["num_key_value_heads"] * config["head_dim"]}
    rows = np.fromfile(opened.root / entry.lora_config_file, "<i4").reshape(-1, 3).tolist()
    content = bytearray((opened.root / entry.lora_weights_file).read_bytes())
    weights = torch.frombuffer(content, dtype=torch.bfloat16).view(entry.lora_weights_shape).double()
    deltas = []
    for (module, _, rank), row in zip(rows, weights, strict=True):
        a_end = rank * config["hidden_size"]
        a, b = row[:a_end].view(rank, -1), row[a_end : a_end + rank * sizes[module]].view(-1, rank)
        deltas.append(b @ a)
    return deltas


def relative(found: list[torch.Tensor], expected: list[torch.Tensor]) -> float:
    """The largest error of a row's delta, in the Frobenius norm."""
    return max(float((one - other).norm() / other.norm()) for one, other in zip(found, expected, strict=True))


@pytest.mark.parametrize("from_directory", [False, True])
def test_the_engine_gets_the_weighted_sum(opened: Repository, sound: Path, from_directory: bool) -> None:
    """Of registered adapters, or of one and a directory; to the rounding of bfloat16, measured: 2e-3."""
    pirate = str(source(sound, "pirate")) if from_directory else "pirate"
    composed = compose.compose(opened, "mix", {pirate: 0.7, "haiku": -0.3})
    parts = [stored_deltas(opened, name) for name in ("pirate", "haiku")]
    expected = [0.7 * first - 0.3 * second for first, second in zip(*parts, strict=True)]

    assert relative(stored_deltas(opened, "mix"), expected) < 2**-8
    assert (3, (16,), {}) == (composed.added.entry.lora_task_id, composed.ranks, composed.errors)
    assert [] == checks.check(opened, deep=True)
    noted = read_table(opened).entries["mix"].source
    assert noted is not None
    assert f"compose:{pirate}=0.7,haiku=-0.3" == noted.location


def test_weights_that_are_powers_of_two_change_no_bit(opened: Repository) -> None:
    """The rows of the sum are those of the parts, put together."""
    compose.compose(opened, "mix", {"pirate": 1.0, "haiku": 0.5})
    parts = [stored_deltas(opened, name) for name in ("pirate", "haiku")]

    expected = [first + 0.5 * second for first, second in zip(*parts, strict=True)]
    assert relative(stored_deltas(opened, "mix"), expected) < 1e-14


def test_composing_again_changes_nothing_and_other_weights_get_another_id(opened: Repository) -> None:
    """As with `add`. The adapters that it was composed of may go."""
    first = compose.compose(opened, "mix", {"pirate": 0.7, "haiku": 0.3})
    before = snapshot(opened.root)
    again = compose.compose(opened, "mix", {"pirate": 0.7, "haiku": 0.3})

    assert (False, True) == (first.added.unchanged, again.added.unchanged)
    assert before == snapshot(opened.root)
    other = compose.compose(opened, "mix", {"pirate": 0.6, "haiku": 0.3}, Options(warm=False))
    assert (3, 4) == (other.added.was, other.added.entry.lora_task_id)
    registry.remove(opened, "pirate", "haiku")
    assert [] == [one for one in checks.check(opened, deep=True) if one.where == "adapter mix"]
    registry.remove(opened, "mix")


def test_a_repository_with_a_composition_is_undone_as_any(tmp_path: Path) -> None:
    """Every byte is as before; there is nothing else of a composition on disk than of any adapter."""
    upstream_repository_on_the_cpu(tmp_path / "repo", "v0.18.0", decoupled="True")
    before = snapshot(tmp_path / "repo")
    init.init(tmp_path / "repo")
    opened = paths.open_repository(tmp_path / "repo")
    add.add(opened, "pirate", synthetic_adapter(tmp_path / "pirate", 1))
    compose.compose(opened, "mix", {"pirate": 0.7})
    kinds = [
        {path.name.replace(str(number), "N") for path in opened.warmup_directory.glob(f"*_{number}*")}
        for number in (1, 2)
    ]
    registry.remove(opened, "mix", "pirate")
    undo.undo(opened.root)

    assert kinds[0] == kinds[1]
    assert before == snapshot(opened.root)


def test_check_tells_of_a_part_that_was_replaced_since(opened: Repository, tmp_path: Path) -> None:
    """With the command that composes it again."""
    compose.compose(opened, "mix", {"pirate": 0.7, "haiku": 0.3}, rank=8)
    add.add(opened, "pirate", synthetic_adapter(tmp_path / "other", 7))
    (finding,) = [one for one in checks.check(opened) if one.where == "adapter mix"]

    assert "composed of pirate as it was under lora_task_id 1, and pirate has 4 now" in finding.problem
    assert "compose it again: tritonlora compose mix pirate=0.7 haiku=0.3 --rank 8" in finding.remedy


def test_an_alias_is_its_adapter(opened: Repository) -> None:
    """In the table, too."""
    registry.alias(opened, "prod", "pirate")
    composed = compose.compose(opened, "loud", {"prod": 2.0})

    assert {"pirate": 2.0} == composed.weights
    assert (8,) == composed.ranks


def test_a_compressed_sum_has_the_rank_and_tells_the_error(opened: Repository) -> None:
    """The error is that of what the engine gets, but for its rounding."""
    composed = compose.compose(opened, "mix", {"pirate": 0.7, "haiku": 0.3}, rank=8)
    parts = [stored_deltas(opened, name) for name in ("pirate", "haiku")]
    expected = [0.7 * first + 0.3 * second for first, second in zip(*parts, strict=True)]
    errors = [
        float((one - other).norm() / other.norm())
        for one, other in zip(stored_deltas(opened, "mix"), expected, strict=True)
    ]

    assert (8,) == composed.ranks
    assert sorted(errors) == pytest.approx(sorted(composed.errors.values()), rel=0.02)
    assert min(errors) <= composed.error <= max(errors)


def test_output_keeps_the_adapter_for_others(opened: Repository, tmp_path: Path) -> None:
    """A directory of PEFT's; a dry run keeps none, and writes nothing."""
    before = snapshot(opened.root)
    dry = compose.compose(opened, "mix", {"pirate": 0.7}, output=tmp_path / "out", dry_run=True)

    assert (None, before, False) == (dry.output, snapshot(opened.root), (tmp_path / "out").exists())
    compose.compose(opened, "mix", {"pirate": 0.7}, output=tmp_path / "out")
    kept = load_adapter(tmp_path / "out")
    assert (8, 4) == (kept.config.r, len(kept.modules))
    assert ["adapter_config.json", "adapter_model.safetensors"] == sorted(
        one.name for one in (tmp_path / "out").iterdir()
    )
    again = add.add(opened, "copy", tmp_path / "out")
    assert read_table(opened).entries["mix"].lora_weights_sha256 == again.entry.lora_weights_sha256
    with pytest.raises(RepositoryError, match="is there already; give a new directory"):
        compose.compose(opened, "mix", {"pirate": 0.7}, output=tmp_path / "out")


def test_the_llm_api_gets_a_directory(tmp_path: Path) -> None:
    """Of which its scaling is that of PEFT, for modules of unlike ranks, too."""
    init.init(root := llm_api_repository(tmp_path / "repo", shipped_models() / "tensorrt_llm" / "1"))
    opened = paths.open_repository(root)
    add.add(opened, "pirate", synthetic_adapter(tmp_path / "pirate", 1, r=8))
    torch.manual_seed(5)
    path = next(iter(load_adapter(tmp_path / "pirate").modules))
    a = load_file(tmp_path / "pirate" / "adapter_model.safetensors")[f"base_model.model.{path}.lora_A.weight"]
    add.add(
        opened,
        "haiku",
        write_adapter(tmp_path / "haiku", lora_pair(path, in_features=a.shape[1], out_features=a.shape[1])),
    )
    compose.compose(opened, "mix", {"pirate": 0.7, "haiku": 0.3})
    entry = read_table(opened).entries["mix"]
    config = json.loads((root / (entry.lora_path or "") / "adapter_config.json").read_text())
    tensors = load_file(root / (entry.lora_path or "") / "adapter_model.safetensors")

    assert ({}, 10) == (config["alpha_pattern"], config["lora_alpha"])
    for key in tensors:
        if "lora_A" in key:
            found = tensors[key].double(), tensors[key.replace("lora_A", "lora_B")].double()
            delta = config["lora_alpha"] / len(found[0]) * found[1] @ found[0]
            expected = sum(
                weight * part.scaling * part.lora_B.load().double() @ part.lora_A.load().double()
                for weight, directory in ((0.7, "pirate"), (0.3, "haiku"))
                if (part := load_adapter(tmp_path / directory).modules.get(key.removeprefix("base_model.model.")[:-14]))
            )
            torch.testing.assert_close(delta, expected, rtol=1e-5, atol=1e-5)
    assert [] == [one for one in checks.check(opened, deep=True) if one.where == "adapter mix"]


# Refusals


@pytest.mark.parametrize(
    ("name", "weights", "options", "error", "message"),
    [
        (
            "mix",
            {"pirate": 0.5, "haiko": 0.5},
            {},
            RepositoryError,
            "no adapter 'haiko' is registered, .*available: haiku",
        ),
        (
            "mix",
            {"pirate": math.nan, "haiku": 0.0},
            {},
            RepositoryError,
            "(?s)'pirate' is nan, .*'haiku' is 0, expected",
        ),
        ("mix", {"pirate": math.inf}, {}, RepositoryError, "'pirate' is inf, expected a finite number other than 0"),
        ("mix", {}, {}, RepositoryError, "no adapter is given; give NAME=WEIGHT"),
        ("pirate", {"pirate": 0.5}, {}, RepositoryError, "'pirate' would be composed of itself"),
        ("mix", {"pirate": 0.5, "prod": 0.5}, {}, RepositoryError, "'prod' is 'pirate', which is given twice"),
        ("mix", {"split": 0.5}, {}, RepositoryError, "'split' is divided between 'haiku', 'pirate'; name one of them"),
        ("a/b", {"pirate": 0.5}, {}, AdapterTableError, "'a/b' is not a legal adapter name"),
        ("prod", {"haiku": 0.5}, {}, AdapterTableError, "'prod' is an alias of adapter 'pirate'"),
        ("mix", {"pirate": 0.5}, {"rank": 0}, RepositoryError, "the rank is 0, expected at least 1"),
        ("mix", {"pirate": 0.5}, {"rank": 10**6}, EngineMismatch, "rank 1000000 is larger than .*give --rank 64"),
        ("mix", {"pirate": 1e300}, {}, InvalidAdapter, "has values too large for float32; give smaller weights"),
    ],
)
def test_what_cannot_be_composed_changes_nothing(
    opened: Repository, name: str, weights: dict[str, float], options: dict[str, Any], error: type, message: str
) -> None:
    """Nothing is left behind, either."""
    registry.alias(opened, "prod", "pirate")
    registry.alias(opened, "split", {"pirate": 50, "haiku": 50})
    before = snapshot(opened.root)

    with pytest.raises(error, match=message):
        compose.compose(opened, name, weights, **options)
    assert before == snapshot(opened.root)
    assert [] == [*opened.warmup_directory.glob(".*")]


def test_more_than_the_engine_takes_names_the_rank_that_it_takes(opened: Repository) -> None:
    """The sum of the ranks is what counts."""
    upkeep.set_parameters(opened, {"max_lora_rank": "12"})

    with pytest.raises(EngineMismatch, match="has rank 16, the sum of the ranks, .*is 12; compress it with --rank 12"):
        compose.compose(opened, "mix", {"pirate": 0.5, "haiku": 0.5})
    assert (12,) == compose.compose(opened, "mix", {"pirate": 0.5, "haiku": 0.5}, rank=12).ranks


@pytest.mark.parametrize(
    ("one", "other", "message"),
    [
        ({"base_model_name_or_path": "org/one"}, {}, "base model: 'org/one' of '.*one', 'base' of '.*other'"),
        (
            {"auto_mapping": {"base_model_class": "LlamaForCausalLM"}},
            {"auto_mapping": {"base_model_class": "Qwen2ForCausalLM"}},
            "its class: 'LlamaForCausalLM' of '.*one', 'Qwen2ForCausalLM' of '.*other'",
        ),
    ],
)
def test_adapters_of_two_base_models_are_refused(
    opened: Repository, tmp_path: Path, one: dict[str, Any], other: dict[str, Any], message: str
) -> None:
    """Unless the user says that the names are of one model. An adapter that does not say its model is of any."""
    for seed, (name, config) in enumerate(
        {"one": one, "other": other, "silent": {"base_model_name_or_path": ""}}.items()
    ):
        path = synthetic_adapter(tmp_path / name, seed) / "adapter_config.json"
        path.write_text(json.dumps({**json.loads(path.read_text()), **config}))
    weights = {str(tmp_path / name): 0.5 for name in ("one", "other")}

    with pytest.raises(EngineMismatch, match=f"(?s)give --any-base.*{message}"):
        compose.compose(opened, "mix", weights)
    assert (16,) == compose.compose(opened, "mix", weights, any_base=True).ranks
    assert (16,) == compose.compose(opened, "mix", {str(tmp_path / "one"): 1.0, str(tmp_path / "silent"): 1.0}).ranks


def test_all_parts_that_cannot_be_read_are_told_at_once(opened: Repository, tmp_path: Path) -> None:
    """A directory with a module trained in full, an adapter whose file was altered, one whose file is gone."""
    saved = write_adapter(tmp_path / "saved", lora_pair(Q) | {"model.norm.modules_to_save.weight": torch.ones(2)})
    add.add(opened, "gone", synthetic_adapter(tmp_path / "third", 3))
    entries = read_table(opened).entries
    path = opened.root / entries["pirate"].lora_weights_file
    path.write_bytes(b"\0" + path.read_bytes()[1:])
    (opened.root / entries["gone"].lora_weights_file).unlink()

    with pytest.raises(TritonLoraError, match="(?s)'pirate': .* was altered.*'gone': cannot read .*trained in full"):
        compose.compose(opened, "mix", {"pirate": 1.0, "gone": 1.0, str(saved): 1.0})


def test_without_the_engine_the_rows_cannot_be_taken_apart(opened: Repository, sound: Path) -> None:
    """--base says the sizes; directories need neither."""
    base = opened.target_directory / "1"
    upkeep.set_parameters(opened, {"gpt_model_path": "nowhere"})

    with pytest.raises(EngineMismatch, match="adapter 'pirate': the sizes of its rows are not known, .*give --base"):
        compose.compose(opened, "mix", {"pirate": 1.0})
    assert (8,) == compose.compose(opened, "mix", {str(source(sound, "pirate")): 1.0}, Options(dtype="bfloat16")).ranks
    assert (8,) == compose.compose(opened, "mix", {"haiku": 1.0}, Options(base=base)).ranks


def test_a_stopped_command_leaves_nothing_that_stays(opened: Repository, monkeypatch: pytest.MonkeyPatch) -> None:
    """The temporary directory of a killed one is swept by the next command."""
    left = opened.warmup_directory / ".composition.01234567.tritonlora-tmp"
    left.mkdir()
    (left / "adapter_model.safetensors").write_bytes(b"half")
    compose.compose(opened, "mix", {"pirate": 1.0})

    assert not left.exists()


@pytest.mark.parametrize(
    ("weights", "rank", "text"),
    [
        ({"pirate": 0.7, "haiku": -0.3}, None, "compose:pirate=0.7,haiku=-0.3"),
        ({"/a dir/x=1,y": 1e-05}, 16, "compose:/a%20dir/x%3D1%2Cy=1e-05?rank=16"),
    ],
)
def test_a_recipe_is_read_back(weights: dict[str, float], rank: int | None, text: str) -> None:
    """Whatever characters a directory has."""
    assert text == compose.render_recipe(weights, rank)
    assert (weights, rank) == compose.parse_recipe(text)
    assert None is compose.parse_recipe("hf://org/name") is compose.parse_recipe("compose:a=b")
