# SPDX-FileCopyrightText: the tritonlora authors
# SPDX-License-Identifier: Apache-2.0
"""What an adapter's reader takes as it is and tells the user, and the ways in which an adapter may be named."""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from adapters import lora_pair, save_llama_adapter, write_adapter
from peft_oracle import load_peft
from tritonlora.conversion.layout import plan_layout
from tritonlora.engine.profile import load_profile
from tritonlora.errors import InvalidAdapter
from tritonlora.peft.adapter import load_adapter
from tritonlora.peft.adapter_config import parse_config

Q = "model.layers.0.self_attn.q_proj"
V = "model.layers.0.self_attn.v_proj"


def edit_config(adapter: Path, **fields: Any) -> None:
    """Set fields of adapter_config.json."""
    file = adapter / "adapter_config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), **fields}))


@pytest.mark.parametrize(
    ("wrapped", "wrapper"),
    [
        ("_orig_mod.base_model.model.{}", r"_orig_mod \(torch.compile\)"),
        ("module.base_model.model.{}", r"module \(DDP or DeepSpeed\)"),
        ("base_model.model.module.{}", r"module \(DDP or DeepSpeed\)"),
        ("_fsdp_wrapped_module._orig_mod.base_model.model.{}", r"_fsdp_wrapped_module \(FSDP\), _orig_mod"),
        ("{}._checkpoint_wrapped_module", "checkpointing"),
        ("{}._fpw_module", "FSDP"),
    ],
)
def test_wrappers_are_taken_out_of_the_names(wrapped: str, wrapper: str, tmp_path: Path) -> None:
    """The tensors are those of an adapter that was saved without the wrapper, and a remark names it."""
    tensors = {
        f"{wrapped.format(path)}.lora_{matrix}.weight": pair
        for path in (Q, V)
        for matrix, pair in zip("AB", lora_pair(path).values(), strict=True)
    }
    adapter = load_adapter(write_adapter(tmp_path, tensors, prefix=""))

    assert [Q, V] == list(adapter.modules)
    for name, path in zip(tensors, (Q, Q, V, V), strict=True):
        matrix = getattr(adapter.modules[path], name[-len("lora_A.weight") :].removesuffix(".weight"))
        assert torch.equal(tensors[name], matrix.load())
    (remark,) = adapter.remarks
    assert re.search(wrapper, remark)


def test_a_wrapped_name_and_a_plain_one_for_the_same_tensor_are_an_error(tmp_path: Path) -> None:
    """Nothing says which of the two is the trained one."""
    tensors = lora_pair(Q) | {f"_orig_mod.{name}": tensor for name, tensor in lora_pair(Q).items()}

    with pytest.raises(InvalidAdapter, match=r"q_proj' has more than one A: '.*_orig_mod.* and '"):
        load_adapter(write_adapter(tmp_path, tensors))


def test_several_alphas_for_a_layer_are_a_remark_and_peft_loads_what_is_converted(tmp_path: Path) -> None:
    """Saving sorts the patterns: PEFT itself loads another alpha than it trained with."""
    patterns = {"model.layers.1.mlp.down_proj": 128, "down_proj": 16}
    saved = save_llama_adapter(tmp_path, target_modules=["down_proj"], alpha_pattern=patterns)
    path = "model.layers.1.mlp.down_proj"
    adapter = load_adapter(saved.adapter)
    layer: Any = saved.model.get_base_model().get_submodule(path)
    loaded: Any = load_peft(saved.base, saved.adapter).get_base_model().get_submodule(path)

    (remark,) = adapter.remarks
    assert f"{path!r}: several patterns of alpha_pattern match: lora_alpha is 16, as PEFT loads it" in remark
    assert "may have been 128 in training" in remark
    assert 32.0 == layer.scaling["default"]
    assert loaded.scaling["default"] == adapter.modules[path].scaling == 4.0


def test_patterns_of_all_layers_of_a_large_model_are_read(tmp_path: Path) -> None:
    """As axolotl writes them: a pattern for each of 80 layers, with seven names in each."""
    names = "q_proj|k_proj|v_proj|o_proj|gate_proj|up_proj|down_proj"
    patterns = {rf".*\.layers\.{layer}\..*({names})$": 8 + layer for layer in range(80)}
    paths = [f"model.layers.{layer}.mlp.{name}" for layer in range(80) for name in ("up_proj", "down_proj")]
    tensors = {name: tensor for path in paths for name, tensor in lora_pair(path).items()}
    adapter = load_adapter(write_adapter(tmp_path, tensors, alpha_pattern=patterns))

    assert () == adapter.remarks
    assert {path: (8 + int(path.split(".")[2])) / 2 for path in paths} == {
        path: module.scaling for path, module in adapter.modules.items()
    }


@pytest.mark.parametrize("task_type", ["SEQ_CLS", "TOKEN_CLS", "QUESTION_ANS", "FEATURE_EXTRACTION"])
def test_an_adapter_for_another_task_gets_a_remark(task_type: str, tmp_path: Path) -> None:
    """And one for text generation none."""
    adapter = write_adapter(tmp_path, lora_pair(Q), task_type=task_type)
    (remark,) = load_adapter(adapter).remarks

    assert remark.startswith(f"task_type is {task_type!r}: it was trained for ")
    for generates in ("CAUSAL_LM", "SEQ_2_SEQ_LM", None):
        edit_config(adapter, task_type=generates)
        assert () == load_adapter(adapter).remarks


def test_names_in_target_modules_without_tensors_are_named(tmp_path: Path) -> None:
    """A name that exclude_modules takes away again is none of them."""
    targets = ["q_proj", "k_proj", "v_proj", "layers.0.self_attn.q_proj"]
    adapter = write_adapter(tmp_path, lora_pair(Q), target_modules=targets, exclude_modules=["v_proj"])
    (remark,) = plan_layout(load_adapter(adapter), dtype="bfloat16").remarks

    assert remark.startswith("target_modules lists k_proj, of which there are no tensors")


@pytest.mark.parametrize(
    ("fields", "expected"),
    [
        ({}, "k_proj, q_proj in layers 1, 3"),
        ({"target_modules": r".*\.(q|k)_proj"}, "k_proj, q_proj in layer 1"),  # no profile: the last layer is the 2nd
        ({"layers_to_transform": [0, 2]}, None),
        ({"layers_to_transform": [0, 1, 2]}, "k_proj, q_proj in layer 1"),
        ({"exclude_modules": ["layers.1.self_attn.k_proj", "layers.3.self_attn.k_proj"]}, "q_proj in layers 1, 3"),
        ({"exclude_modules": r".*layers\.[13]\..*"}, None),
        ({"target_modules": r"(repeated)*"}, None),  # a pattern that is not supported: nothing is said
    ],
)
def test_layers_without_tensors_are_named(fields: dict[str, Any], expected: str | None, tmp_path: Path) -> None:
    """Those that target_modules, exclude_modules and layers_to_transform let one expect, by PEFT's rule."""
    saved = save_llama_adapter(tmp_path, target_modules=["q_proj", "k_proj"])
    with_profile = "target_modules" not in fields
    pairs: dict[str, torch.Tensor] = {}
    for layer in (0, 2):
        pairs |= lora_pair(f"model.layers.{layer}.self_attn.q_proj")
        pairs |= lora_pair(f"model.layers.{layer}.self_attn.k_proj", out_features=16)
    adapter = write_adapter(tmp_path / "cut", pairs, **{"target_modules": ["q_proj", "k_proj"], **fields})
    config = saved.base / "config.json"
    config.write_text(json.dumps({**json.loads(config.read_text()), "num_hidden_layers": 4}))
    profile = load_profile(saved.base, dtype="bfloat16") if with_profile else None
    remarks = plan_layout(load_adapter(adapter), dtype="bfloat16", profile=profile).remarks

    assert ([] if expected is None else [f"there are no tensors of {expected}, "]) == [
        remark[: len(f"there are no tensors of {expected}, ")] for remark in remarks
    ]


@pytest.mark.parametrize("options", [{}, {"target_modules": "all-linear"}, {"target_modules": r".*\.(q_proj|up_proj)"}])
def test_a_whole_adapter_has_no_remarks(options: dict[str, Any], tmp_path: Path) -> None:
    """However its layers were chosen."""
    saved = save_llama_adapter(tmp_path, **options)
    profile = load_profile(saved.base, dtype="bfloat16")

    assert () == plan_layout(load_adapter(saved.adapter), dtype="bfloat16", profile=profile).remarks


def test_whole_numbers_with_a_point_are_whole_numbers(tmp_path: Path) -> None:
    """r = 8.0 is 8; 8.5 is none."""
    fields = {"peft_type": "LORA", "r": 8.0, "lora_alpha": 16.0, "rank_pattern": {"q_proj": 4.0}}
    config = parse_config(json.dumps(fields).encode())

    assert (8, 16, {"q_proj": 4}) == (config.r, config.lora_alpha, config.rank_pattern)
    assert int is type(config.r)
    with pytest.raises(InvalidAdapter, match=r"'r' is 8\.5, expected a positive integer"):
        parse_config(json.dumps({**fields, "r": 8.5}).encode())


def test_peft_type_in_small_letters_is_told_from_another_type() -> None:
    """PEFT cannot load it either, and the remedy is one word."""
    with pytest.raises(InvalidAdapter, match=r"peft_type is 'lora', which PEFT writes in capitals; set it to 'LORA'"):
        parse_config(json.dumps({"peft_type": "lora", "r": 8}).encode())


def test_links_of_a_kubernetes_volume_are_followed(tmp_path: Path) -> None:
    """Its files are links to `..data`, which is a link to a directory that changes with each update."""
    written = write_adapter(tmp_path / "written", lora_pair(Q))
    volume = tmp_path / "volume"
    (volume / "..2026_01_01").mkdir(parents=True)
    for file in list(written.iterdir()):
        shutil.move(file, volume / "..2026_01_01" / file.name)
        (volume / file.name).symlink_to(Path("..data") / file.name)
    (volume / "..data").symlink_to("..2026_01_01")

    assert [Q] == list(load_adapter(volume).modules)


@pytest.mark.parametrize("file", ["adapter_model.safetensors", "adapter_config.json"])
def test_a_file_of_the_adapter_stands_for_its_directory(file: str, tmp_path: Path) -> None:
    """A file of another name may be another adapter's, and is refused."""
    adapter = write_adapter(tmp_path / "adapter", lora_pair(Q))
    save_file(load_file(adapter / "adapter_model.safetensors"), adapter / "other.safetensors")

    assert adapter == load_adapter(adapter / file).directory
    with pytest.raises(InvalidAdapter, match=r"other.safetensors' is not a directory; give the directory"):
        load_adapter(adapter / "other.safetensors")


def test_a_hub_cache_leads_to_the_revision_that_was_fetched(tmp_path: Path) -> None:
    """refs/main says which; without it, there must be only one."""
    cache = tmp_path / "models--owner--name"
    for revision in ("aaa", "bbb"):
        snapshot = write_adapter(cache / "snapshots" / revision, lora_pair(Q))
        (cache / "blobs").mkdir(exist_ok=True)
        shutil.move(snapshot / "adapter_model.safetensors", cache / "blobs" / revision)
        (snapshot / "adapter_model.safetensors").symlink_to(Path("../../blobs") / revision)
    (cache / "refs").mkdir()
    (cache / "refs" / "main").write_text("bbb")

    assert cache / "snapshots" / "bbb" == load_adapter(cache).directory
    (cache / "refs" / "main").unlink()
    with pytest.raises(InvalidAdapter, match=r"is a download cache with 2 revisions, give one: .*aaa, .*bbb"):
        load_adapter(cache)
    shutil.rmtree(cache / "snapshots" / "aaa")
    assert cache / "snapshots" / "bbb" == load_adapter(cache).directory
    shutil.rmtree(cache / "snapshots" / "bbb")
    with pytest.raises(InvalidAdapter, match="is a download cache with 0 revisions; download the adapter again"):
        load_adapter(cache)
