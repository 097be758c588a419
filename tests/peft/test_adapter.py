# SPDX-FileCopyrightText: the tritonlora authors
# SPDX-License-Identifier: Apache-2.0
"""Reading PEFT directories: what is understood, and that all the rest is refused by name."""

from __future__ import annotations

import dataclasses
import json
import os
import pickle
import re
import resource
import struct
import warnings
import zipfile
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
import transformers
from hypothesis import given
from hypothesis import strategies as st
from peft.utils.other import get_pattern_key
from safetensors.torch import load_file, save_file

from adapters import LLAMA_CONFIG, lora_pair, save_llama_adapter, write_adapter
from tritonlora.conversion.layout import plan_layout
from tritonlora.errors import InvalidAdapter, UnsupportedAdapter
from tritonlora.peft.adapter import load_adapter
from tritonlora.peft.adapter_config import AdapterConfig, parse_config

Q = "model.layers.0.self_attn.q_proj"
V = "model.layers.0.self_attn.v_proj"


def config_bytes(**fields: Any) -> bytes:
    return json.dumps({"peft_type": "LORA", "r": 2, "lora_alpha": 4, **fields}).encode()


def test_tensors_of_a_saved_adapter_are_those_of_peft(tmp_path: Path) -> None:
    """Every tensor that PEFT wrote is there, bit for bit, under its module."""
    saved = save_llama_adapter(tmp_path)
    written = load_file(saved.adapter / "adapter_model.safetensors")
    adapter = load_adapter(saved.adapter)

    assert len(written) == 2 * len(adapter.modules)
    for path, module in adapter.modules.items():
        assert torch.equal(written[f"base_model.model.{path}.lora_A.weight"], module.lora_A.load())
        assert torch.equal(written[f"base_model.model.{path}.lora_B.weight"], module.lora_B.load())


def test_scaling_and_ranks_are_those_of_peft(tmp_path: Path) -> None:
    """rsLoRA, rank_pattern and alpha_pattern, as PEFT's own layers resolved them."""
    saved = save_llama_adapter(
        tmp_path,
        r=4,
        lora_alpha=6,
        use_rslora=True,
        rank_pattern={r"layers\.1\..*_proj": 3, "q_proj": 5},
        alpha_pattern={"^model.layers.0.mlp.up_proj": 9, "v_proj": 1},
    )
    adapter = load_adapter(saved.adapter)

    for path, layer in saved.model.get_base_model().named_modules():
        if isinstance(layer, peft.tuners.lora.Linear):
            assert (layer.r["default"], layer.scaling["default"]) == (
                adapter.modules[path].r,
                adapter.modules[path].scaling,
            )


@given(
    patterns=st.lists(
        st.sampled_from(["q_proj", "proj", r".*_proj", r"layers\.1\..*", "^model", r"mlp\.up_proj", "x"])
    ),
    path=st.sampled_from([Q, "model.layers.1.mlp.up_proj", "model.layers.11.self_attn.k_proj", "q_proj"]),
)
def test_patterns_match_as_in_peft(patterns: list[str], path: str) -> None:
    """The first pattern that matches wins, by PEFT's own function."""
    ranks = {pattern: number for number, pattern in enumerate(patterns, 1)}
    config = AdapterConfig("", 99, 1.0, rank_pattern=ranks)

    assert ranks.get(get_pattern_key(list(ranks), path), 99) == config.stated([path])[path].ranks[0]


@pytest.mark.parametrize(
    "options",
    [
        {"target_modules": "all-linear"},
        {"target_modules": r".*\.(q_proj|up_proj)"},
        {"target_modules": ["q_proj", "v_proj"], "layers_to_transform": [1]},
        {"target_modules": "all-linear", "exclude_modules": ["down_proj"]},
        {"adapter_name": "pirate"},
        {"safe_serialization": False},
        {"init_lora_weights": "gaussian"},
        {"init_lora_weights": "orthogonal"},
        {"dtype": torch.float16},
        {"modules_to_save": []},
    ],
    ids=str,
)
def test_ways_of_saving_an_adapter_are_understood(options: dict[str, Any], tmp_path: Path) -> None:
    """However the layers were chosen and the file was written, the modules are those that PEFT has."""
    saved = save_llama_adapter(tmp_path, **options)
    expected = saved.deltas()
    adapter = load_adapter(saved.adapter)

    assert expected.keys() == adapter.modules.keys()
    for path, module in adapter.modules.items():
        delta = module.scaling * (module.lora_B.load().double() @ module.lora_A.load().double())
        torch.testing.assert_close(delta, expected[path], rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("init", ["pissa", "olora"])
def test_adapter_that_peft_converted_to_plain_lora_adds_up_to_the_trained_weights(init: Any, tmp_path: Path) -> None:
    """The remedy in the refusal works: base weights and converted LoRA together are what was trained."""
    torch.manual_seed(0)
    model = transformers.LlamaForCausalLM(transformers.LlamaConfig(**LLAMA_CONFIG))
    before = {name: weight.detach().double() for name, weight in model.named_parameters()}
    options = peft.LoraConfig(r=4, lora_alpha=4, target_modules=["q_proj", "down_proj"], init_lora_weights=init)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        trained = peft.get_peft_model(model, options)
        options.init_lora_weights = True
        trained.save_pretrained(str(tmp_path / "untrained"))
        options.init_lora_weights = init
        for name, weight in trained.named_parameters():
            weight.data += 0.1 * torch.randn(weight.shape) * ("lora_" in name)
        trained.save_pretrained(
            str(tmp_path / "adapter"), path_initial_model_for_weight_conversion=str(tmp_path / "untrained")
        )
    adapter = load_adapter(tmp_path / "adapter")

    assert 4 == len(adapter.modules)
    for path, module in adapter.modules.items():
        layer: Any = trained.get_base_model().get_submodule(path)
        expected = layer.get_base_layer().weight.double() + layer.get_delta_weight("default").double()
        delta = module.scaling * (module.lora_B.load().double() @ module.lora_A.load().double())
        torch.testing.assert_close(before[f"{path}.weight"] + delta, expected, rtol=1e-5, atol=1e-6)


def test_keys_with_an_adapter_name_are_understood(tmp_path: Path) -> None:
    """`lora_A.default.weight` is `lora_A.weight`."""
    tensors = {f"{Q}.lora_A.default.weight": torch.ones(2, 8), f"{Q}.lora_B.default.weight": torch.ones(8, 2)}

    assert [Q] == list(load_adapter(write_adapter(tmp_path, tensors)).modules)


def write_sharded(directory: Path, weight_map: Mapping[str, str], shards: Mapping[str, Iterable[str]]) -> None:
    """A config, the index, and each shard with a random LoRA of the paths named."""
    directory.mkdir(exist_ok=True)
    (directory / "adapter_config.json").write_bytes(config_bytes())
    for shard, paths in shards.items():
        pairs = [lora_pair(path) for path in paths]
        save_file({f"base_model.model.{k}": v for pair in pairs for k, v in pair.items()}, directory / shard)
    (directory / "adapter_model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))


def map_of(path: str, shard: str) -> dict[str, str]:
    return {f"base_model.model.{path}.lora_{matrix}.weight": shard for matrix in "AB"}


def test_sharded_checkpoint_is_read_whole(tmp_path: Path) -> None:
    """The shards that the index names make one adapter."""
    write_sharded(
        tmp_path, map_of(Q, "1.safetensors") | map_of(V, "2.safetensors"), {"1.safetensors": [Q], "2.safetensors": [V]}
    )

    assert {Q, V} == load_adapter(tmp_path).modules.keys()


def test_index_that_its_shards_contradict_is_refused(tmp_path: Path) -> None:
    """Missing shards, tensors in another shard than stated, and tensors that the index leaves out, all in one error."""
    k, o = Q.replace("q_proj", "k_proj"), Q.replace("q_proj", "o_proj")
    weight_map = map_of(Q, "1.safetensors") | map_of(V, "1.safetensors") | map_of(k, "3.safetensors")
    write_sharded(tmp_path, weight_map | map_of(o, "../4.safetensors"), {"1.safetensors": [Q, o]})
    write_sharded(tmp_path / "outside", {}, {"4.safetensors": [o]})
    write_sharded(tmp_path, weight_map | map_of("x", "2.safetensors"), {"1.safetensors": [Q, o], "2.safetensors": [V]})

    with pytest.raises(InvalidAdapter, match="its shards disagree") as caught:
        load_adapter(tmp_path)
    text = str(caught.value)
    for part in (
        f"'base_model.model.{o}.lora_A.weight' is in '1.safetensors', but the index says 'nothing of it'",
        f"'base_model.model.{V}.lora_B.weight' is not in '1.safetensors'",
        f"'base_model.model.{V}.lora_B.weight' is in '2.safetensors', but the index says '1.safetensors'",
        "3.safetensors' is not a file",
    ):
        assert part in text


@pytest.mark.parametrize("shard", ["../x.safetensors", "/etc/passwd", "..", 3])
def test_index_that_names_a_path_is_refused(shard: object, tmp_path: Path) -> None:
    """A shard is a file of the directory, nothing else."""
    (tmp_path / "adapter_config.json").write_bytes(config_bytes())
    (tmp_path / "adapter_model.safetensors.index.json").write_text(json.dumps({"weight_map": {"a": shard}}))

    with pytest.raises(InvalidAdapter, match=r"is not the name of a file|names no shards"):
        load_adapter(tmp_path)


def test_problems_of_config_and_tensors_are_in_one_error(tmp_path: Path) -> None:
    """What is wrong with the config does not hide what is wrong with the tensors, nor the other way round."""
    tensors = {**lora_pair(Q), **lora_pair("lm_head"), f"{V}.lora_A.weight": torch.ones(2, 8)}
    adapter = write_adapter(tmp_path, tensors, r=0, bias="all", use_rslora="no")

    with pytest.raises(
        InvalidAdapter, match=r"(?s)'r' is 0.*'use_rslora' is 'no'.*'bias' is 'all'.*lora_B is missing.*'lm_head'"
    ):
        load_adapter(adapter)
    (adapter / "adapter_model.safetensors").write_bytes(b"short")
    with pytest.raises(InvalidAdapter, match=r"(?s)'r' is 0.*is not a whole safetensors file"):
        load_adapter(adapter)


def test_tensors_of_another_kind_of_adapter_are_not_listed(tmp_path: Path) -> None:
    """The peft_type says it all."""
    adapter = write_adapter(tmp_path, {f"{Q}.hada_w1_a": torch.ones(2, 8)}, peft_type="LOHA")

    with pytest.raises(UnsupportedAdapter, match="peft_type is 'LOHA'") as caught:
        load_adapter(adapter)
    assert "hada_w1_a" not in str(caught.value)


def test_all_that_is_not_understood_is_listed_in_one_error(tmp_path: Path) -> None:
    """Every offending key is named, with its reason; nothing is dropped."""
    tensors = {
        **lora_pair(Q),
        **lora_pair("lm_head"),
        "model.embed_tokens.weight": torch.ones(4, 4),
        "model.embed_tokens.lora_embedding_A": torch.ones(2, 4),
        f"{Q}.lora_B.bias": torch.ones(4),
        f"{Q}.base_layer.bias": torch.ones(4),
        "model.layers.0.mlp.experts.0.w1.lora_A.weight": torch.ones(2, 4),
    }

    with pytest.raises(UnsupportedAdapter) as caught:
        load_adapter(write_adapter(tmp_path, tensors))
    text = str(caught.value)
    for part in (
        "lm_head",
        "embed_tokens.weight",
        "lora_embedding_A",
        "lora_B.bias",
        "experts.0.w1",
        "lora_bias=False",
        "base_layer.bias': a trained bias; merge the adapter into the base model, or train again with bias='none'",
    ):
        assert part in text


@pytest.mark.parametrize(
    ("tensors", "message"),
    [
        ({f"{Q}.lora_A.weight": torch.ones(2, 8)}, "lora_B is missing"),
        ({f"{Q}.lora_A.weight": torch.ones(2, 8), f"{Q}.lora_B.weight": torch.ones(8, 3)}, r"lora_A is \(2, 8\) and"),
        ({f"{Q}.lora_A.weight": torch.ones(3, 8), f"{Q}.lora_B.weight": torch.ones(8, 3)}, "says r = 2"),
        ({f"{Q}.lora_A.weight": torch.ones(16), f"{Q}.lora_B.weight": torch.ones(8, 2)}, r"lora_A is \(16,\) and"),
        ({f"{Q}.lora_A.weight": torch.ones(2, 0), f"{Q}.lora_B.weight": torch.ones(8, 2)}, r"lora_A is \(2, 0\) and"),
        ({k: v.to(torch.int8) for k, v in lora_pair(Q).items()}, "is int8, expected float32"),
        (
            {**lora_pair(Q), f"{Q}.lora_magnitude_vector": torch.ones(32)},
            "use_dora = false, .*_vector is there; give two",
        ),
        ({**lora_pair(Q), f"{Q}.lora_A.other.weight": torch.ones(2, 32)}, "more than one A"),
        ({}, "there is no LoRA tensor"),
    ],
)
def test_contradictory_tensors_are_refused(tensors: dict[str, torch.Tensor], message: str, tmp_path: Path) -> None:
    """A without B, ranks that disagree, wrong dims and dtypes are errors that name the module."""
    with pytest.raises(InvalidAdapter, match=message):
        load_adapter(write_adapter(tmp_path, tensors))


PATTERNS = {"q_proj": 8, "^model.layers.0.self_attn.q_proj": 2}


def test_rank_of_a_pattern_that_peft_sorted_away_is_that_of_the_tensors(tmp_path: Path) -> None:
    """PEFT saves patterns in alphabetical order, and cannot load what it saved where several match; we can."""
    saved = save_llama_adapter(tmp_path, rank_pattern=PATTERNS, alpha_pattern={"q_proj": 6})
    expected, modules = saved.deltas(), load_adapter(saved.adapter).modules

    assert 8 == modules[Q].r
    delta = modules[Q].scaling * (modules[Q].lora_B.load().double() @ modules[Q].lora_A.load().double())
    torch.testing.assert_close(delta, expected[Q], rtol=1e-9, atol=1e-9)


def test_alpha_of_patterns_that_peft_sorted_is_not_guessed(tmp_path: Path) -> None:
    """The ranks show that the order is another one than in training, and the alphas cannot."""
    saved = save_llama_adapter(tmp_path, rank_pattern=PATTERNS, alpha_pattern=PATTERNS)

    with pytest.raises(InvalidAdapter, match=rf"'{Q}': several patterns of alpha_pattern match.* only one matches"):
        load_adapter(saved.adapter)


def test_a_rank_shows_the_order_of_all_patterns(tmp_path: Path) -> None:
    """Saving sorts both kinds, so that the alpha of a module whose own rank shows nothing is not known either."""
    ranks = {"v_proj": 5, r"layers\.0\.self_attn\.v_proj": 1}
    alphas = {"o_proj": 1, r"layers\.\d\.self_attn\.o_proj": 6}
    plain = save_llama_adapter(tmp_path / "plain", alpha_pattern=alphas, r=2)
    saved = save_llama_adapter(tmp_path / "saved", alpha_pattern=alphas, r=2, rank_pattern=ranks)

    # Where no rank shows it, PEFT takes the first in the file, too.
    assert 3.0 == load_adapter(plain.adapter).modules["model.layers.0.self_attn.o_proj"].scaling
    with pytest.raises(InvalidAdapter, match=r"o_proj': several patterns of alpha_.*the same in layer 1"):
        load_adapter(saved.adapter)


def test_config_and_tensors_that_disagree_about_dora_are_refused(tmp_path: Path) -> None:
    """A magnitude that is missing is named, with what was expected."""
    with pytest.raises(InvalidAdapter, match=r"use_dora = true, but lora_magnitude_vector is missing; give two"):
        load_adapter(write_adapter(tmp_path, lora_pair(Q), use_dora=True))


def test_tensors_of_several_adapters_are_refused(tmp_path: Path) -> None:
    """One file is one adapter."""
    tensors = {
        f"model.layers.{layer}.self_attn.q_proj.lora_{m}.{name}.weight": torch.ones(2, 2)
        for layer, name in enumerate("xy")
        for m in "AB"
    }

    with pytest.raises(InvalidAdapter, match="several adapters: 'x', 'y'"):
        load_adapter(write_adapter(tmp_path, tensors))


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("bias", "all"),
        ("lora_bias", True),
        ("layer_replication", [[0, 2]]),
        ("target_parameters", ["experts.w"]),
        ("trainable_token_indices", [1]),
        ("alora_invocation_tokens", [1, 2]),
        ("use_qalora", True),
        ("megatron_config", {"a": 1}),
        ("arrow_config", {"top_k": 1}),
        ("use_bdlora", {"a": 1}),
        ("init_lora_weights", "pissa_niter_4"),
        ("init_lora_weights", "olora"),
        ("init_lora_weights", "corda"),
        ("init_lora_weights", "lora_ga"),
        ("init_lora_weights", "loftq"),
        ("loftq_config", {"loftq_bits": 4}),  # LoftQ's own script takes the init out before it saves
        ("init_lora_weights", "an_init_of_tomorrow"),
        ("init_lora_weights", 5),
        ("a_field_of_tomorrow", 1),
        ("a_field_of_tomorrow", 0),
        ("a_field_of_tomorrow", "none"),
    ],
)
def test_fields_that_change_the_weights_are_refused_by_name(field: str, value: object) -> None:
    """A feature that cannot be carried over is never ignored, and a field of a later PEFT is one."""
    with pytest.raises(UnsupportedAdapter, match=f"'{field}' is "):
        parse_config(config_bytes(**{field: value}))


@pytest.mark.parametrize("peft_type", [t.value for t in peft.PeftType if t.value != "LORA"])
def test_other_kinds_of_adapters_are_refused_by_name(peft_type: str) -> None:
    """Every peft_type but LORA."""
    with pytest.raises(UnsupportedAdapter, match=f"peft_type is '{peft_type}'"):
        parse_config(config_bytes(peft_type=peft_type))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"bias": "lora_only"}, "'bias' is 'lora_only': .*merge the adapter .*train again with bias='none'"),
        ({"lora_bias": True}, "'lora_bias' is True: .*merge the adapter .*train again with lora_bias=False"),
        ({"target_modules": ["embed_tokens"]}, "embed_tokens.lora_embedding_A', .*: LoRA on an embedding; merge"),
        (
            {"target_modules": ["lm_head"]},
            "'lm_head': TensorRT-LLM has no LoRA for the output embedding; merge the adapter",
        ),
        ({"modules_to_save": ["lm_head"]}, r"lm_head\.weight': an embedding, saved whole; --base with"),
        ({"modules_to_save": ["input_layernorm"]}, r"0\.input_layernorm\.weight': .* merge the adapter"),
        ({"trainable_token_indices": [1, 2]}, r"'trainable_token_indices' is \[1, 2\]: .*merge"),
        ({"init_lora_weights": "pissa"}, "'pissa', which changed the base .*path_initial_model_for_weight_conversion"),
        ({"init_lora_weights": "olora"}, "'olora', which changed the base .*path_initial_model_for_weight_conversion"),
        (
            {"alora_invocation_tokens": [1], "task_type": "CAUSAL_LM"},
            "activated LoRA begins inside a prompt.*train again",
        ),
        ({"layer_replication": [[0, 2], [1, 2]]}, "the engine's layers are not those of the adapter; merge"),
        ({"use_qalora": True}, "'use_qalora' is True: the input of lora_A is pooled"),
    ],
    ids=str,
)
def test_what_peft_can_save_and_the_engine_cannot_take_is_refused(
    options: dict[str, Any], message: str, tmp_path: Path
) -> None:
    """Adapters that PEFT itself made and saved, each refused by name with what could be done instead."""
    saved = save_llama_adapter(tmp_path, **options)

    with pytest.raises(UnsupportedAdapter, match=message):
        load_adapter(saved.adapter)


@pytest.mark.parametrize(
    ("peft_type", "remedy"),
    [
        ("LOHA", "save_as_lora"),
        (["LORA"], "merge the"),
        ("PREFIX_TUNING", "cannot be merged"),
        ("POLY", "each of them"),
        ("IA3", "merge the"),
        ("SHIRA", "'LORA': merge the"),
        ("HIRA", "'LORA': merge the"),
    ],
)
def test_remedy_fits_the_kind_of_adapter(peft_type: object, remedy: str) -> None:
    """A trained prompt cannot be merged, a mixture is several adapters, and save_as_lora itself refuses some kinds."""
    with pytest.raises(UnsupportedAdapter, match=rf"peft_type is {re.escape(repr(peft_type))}.*{remedy}"):
        parse_config(config_bytes(peft_type=peft_type))


def test_every_field_that_peft_writes_by_default_is_accepted() -> None:
    """A plain LoraConfig of the installed PEFT, with nothing special set, is understood."""
    fields = dataclasses.asdict(peft.LoraConfig(r=3, lora_alpha=5))
    del fields["peft_type"]

    assert AdapterConfig("", 3, 5) == parse_config(config_bytes(**json.loads(json.dumps(fields, default=list))))


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (b"{", "is not JSON"),
        (b"\xff", "is not JSON"),
        (b"[" * 100_000, "is not JSON"),
        (b"[]", "not a JSON object"),
        (config_bytes(r=0), "'r' is 0"),
        (config_bytes(r=True), "'r' is True"),
        (config_bytes(lora_alpha="4"), "'lora_alpha' is '4'"),
        (config_bytes(lora_alpha=float("nan")), "'lora_alpha' is nan"),
        (config_bytes(lora_alpha=float("-inf")), "'lora_alpha' is -inf"),
        (config_bytes(lora_alpha=10**400), "'lora_alpha' is 10000.*expected a number"),
        (config_bytes(alpha_pattern={"q": 10**400}), r"alpha_pattern\['q'\] is 10000.*expected a number"),
        (config_bytes(rank_pattern={"q": -1}), r"rank_pattern\['q'\] is -1, expected a positive integer"),
        (config_bytes(alpha_pattern={"q": "1"}), r"alpha_pattern\['q'\] is '1', expected a number"),
        (config_bytes(target_modules=5), "'target_modules' is 5, expected names in a list, or one"),
        (config_bytes(modules_to_save=[1]), r"'modules_to_save' is \[1\], expected names"),
        (config_bytes(layers_to_transform="1"), "'layers_to_transform' is '1', expected numbers"),
        (config_bytes(base_model_name_or_path={}), "'base_model_name_or_path' is {}, expected a name"),
        (config_bytes(use_dora=1), "again: 'use_dora' is 1, expected true or false"),
        (config_bytes(rank_pattern=[1]), r"'rank_pattern' is \[1\]"),
        (config_bytes(alpha_pattern={"(": 1}), "not a regular expression"),
        (config_bytes(rank_pattern={f"q{i}": 1 for i in range(5000)}), "'rank_pattern' has 5000 patterns, .* 4096"),
        (config_bytes(rank_pattern={"(a+)+x": 1}), "a repeated group"),
        (config_bytes(rank_pattern={"(a|a)*x": 1}), "a repeated group"),
        (config_bytes(rank_pattern={f"{i:04}{'a*' * 40}": 1 for i in range(4000)}), "of 336000 characters, .* 262144"),
        (
            config_bytes(base_model_name_or_path="x" * 5000),
            "'base_model_name_or_path' is 'xxx.*at most 4096",
        ),
        (config_bytes(rank_pattern={"(a|b)" * 2000: 1}), "a repeated group, flags, or too long"),
        (config_bytes(alpha_pattern={"(?x:(a+) +)": 1}), "a repeated group, flags"),
        (b'{"r": ' + b"9" * 5000 + b"}", "'r' is inf, expected a positive integer$"),
        (b'{"lora_alpha": -' + b"9" * 5000 + b"}", "'lora_alpha' is -inf, expected a number$"),
        (config_bytes(use_rslora="false"), "'use_rslora' is 'false', expected true or false"),
        (b'{"r": 2, "r": 4, "lora_alpha": 4}', "'r' occurs more than once"),
        (config_bytes(r=0, use_dora=1.5, lora_alpha=None), r"(?s)'r' is 0.*'lora_alpha' is None.*'use_dora' is 1\.5"),
    ],
)
def test_malformed_config_is_refused(text: bytes, message: str) -> None:
    """What cannot be a LoraConfig is InvalidAdapter, naming the field."""
    with pytest.raises(InvalidAdapter, match=message):
        parse_config(text)


def test_config_of_a_hundred_megabytes_is_not_read(tmp_path: Path) -> None:
    """The size alone refuses it."""
    write_adapter(tmp_path, lora_pair(Q))
    os.truncate(tmp_path / "adapter_config.json", 100 << 20)

    with pytest.raises(InvalidAdapter, match="has 104857600 bytes, expected at most"):
        load_adapter(tmp_path)


def test_link_out_of_the_directory_is_refused(tmp_path: Path) -> None:
    """An adapter is its directory; a link to elsewhere in it is not followed."""
    outside = write_adapter(tmp_path / "outside", lora_pair(Q))
    inside = write_adapter(tmp_path / "inside", lora_pair(Q))
    (inside / "adapter_model.safetensors").unlink()
    (inside / "adapter_model.safetensors").symlink_to(outside / "adapter_model.safetensors")

    with pytest.raises(InvalidAdapter, match="is a link out of its directory"):
        load_adapter(inside)


def test_link_to_nothing_is_not_a_missing_file(tmp_path: Path) -> None:
    """A download that was not finished is told from a directory without weights."""
    (write_adapter(tmp_path, lora_pair(Q)) / "adapter_model.safetensors").unlink()
    (tmp_path / "adapter_model.safetensors").symlink_to(tmp_path / "blob")

    with pytest.raises(InvalidAdapter, match="adapter_model.safetensors' is a link to nothing; fetch"):
        load_adapter(tmp_path)


def test_link_to_a_device_is_not_one_to_nothing(tmp_path: Path) -> None:
    """It leads somewhere, and nothing is read from there."""
    (write_adapter(tmp_path, lora_pair(Q)) / "adapter_model.safetensors").unlink()
    (tmp_path / "adapter_model.safetensors").symlink_to("/dev/zero")

    with pytest.raises(InvalidAdapter, match="adapter_model.safetensors' is not a file; fetch"):
        load_adapter(tmp_path)


def test_pointer_of_git_lfs_is_refused_with_the_remedy(tmp_path: Path) -> None:
    """What a clone without Git LFS holds is not called a broken file."""
    pointer = "version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 9\n"
    (write_adapter(tmp_path, lora_pair(Q)) / "adapter_model.safetensors").write_text(pointer)

    with pytest.raises(InvalidAdapter, match="is a pointer to a file in Git LFS; fetch the file with `git lfs pull`"):
        load_adapter(tmp_path)


def test_links_of_the_hugging_face_cache_are_followed(tmp_path: Path) -> None:
    """A downloaded snapshot is links into the cache's own blobs."""
    blobs = write_adapter(tmp_path / "blobs", lora_pair(Q))
    snapshot = tmp_path / "snapshots" / "abc"
    snapshot.mkdir(parents=True)
    for name in ("adapter_config.json", "adapter_model.safetensors"):
        (snapshot / name).symlink_to(blobs / name)

    assert [Q] == list(load_adapter(snapshot).modules)


def test_directory_of_several_adapters_asks_which(tmp_path: Path) -> None:
    """Nothing is guessed: the adapters that are there are listed."""
    for name in ("one", "two"):
        write_adapter(tmp_path / name, lora_pair(Q))

    with pytest.raises(InvalidAdapter, match=r"holds several adapters, give one: .*/one, .*/two"):
        load_adapter(tmp_path)


class _Mark:
    def __reduce__(self) -> tuple[Any, ...]:
        return (os.system, ("touch /tmp/tritonlora-pickle-ran",))


def test_pickle_that_runs_code_is_refused_and_does_not_run(tmp_path: Path) -> None:
    """A .bin is read with weights_only; what it calls is never called."""
    mark = Path("/tmp/tritonlora-pickle-ran")  # noqa: S108  (the pickle cannot be told tmp_path)
    mark.unlink(missing_ok=True)
    (tmp_path / "adapter_config.json").write_bytes(config_bytes())
    torch.save({"a": _Mark()}, tmp_path / "adapter_model.bin", pickle_module=pickle)

    with pytest.raises(InvalidAdapter, match=r"of plain tensors: it asks for '\S+'; save .* as safetensors$"):
        load_adapter(tmp_path)
    assert not mark.exists()


def test_pickle_of_parameters_and_transposed_tensors_is_read(tmp_path: Path) -> None:
    """What torch.save wrote of a model in training: tensors that ask for gradients, or are stored by columns."""
    lora_a, lora_b = torch.randn(2, 32), torch.randn(2, 32).T
    write_adapter(tmp_path, {}, r=2)
    (tmp_path / "adapter_model.safetensors").unlink()
    key = f"base_model.model.{Q}.lora_"
    tensors = {f"{key}A.weight": torch.nn.Parameter(lora_a), f"{key}B.weight": lora_b}
    torch.save(tensors, tmp_path / "adapter_model.bin")
    module = load_adapter(tmp_path).modules[Q]
    memory = bytearray(8)
    module.lora_B.read_at(4, memoryview(memory))

    assert not lora_b.is_contiguous()
    assert torch.equal(lora_a, module.lora_A.load())
    assert torch.equal(lora_b, module.lora_B.load())
    assert (lora_b[0, 1], lora_b[1, 0]) == struct.unpack("<2f", memory)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ({f"{Q}.lora_A.weight": torch.ones(1).expand(1 << 40)}, "more elements than the file holds"),
        ({f"{Q}.lora_A.weight": [1, 2]}, "expected a tensor under a name, got list"),
        ({f"{Q}.lora_A.weight": torch.ones(2, 2).to_sparse()}, "expected a plain tensor"),
        ([torch.ones(1)], "holds a list"),
    ],
)
def test_pickle_of_other_things_is_refused(content: object, message: str, tmp_path: Path) -> None:
    """Only plain tensors under names, whose bytes are in the file."""
    (tmp_path / "adapter_config.json").write_bytes(config_bytes())
    torch.save(content, tmp_path / "adapter_model.bin")

    with pytest.raises(InvalidAdapter, match=message):
        load_adapter(tmp_path)


def test_compressed_pickle_is_refused(tmp_path: Path) -> None:
    """torch.load reads it; mapped, its compressed bytes would be the weights."""
    (tmp_path / "adapter_config.json").write_bytes(config_bytes())
    plain, compressed = tmp_path / "plain.bin", tmp_path / "adapter_model.bin"
    torch.save({"base_model.model.model.layers.0.self_attn.q_proj.lora_A.weight": torch.ones(2, 8)}, plain)
    with zipfile.ZipFile(plain) as source, zipfile.ZipFile(compressed, "w", zipfile.ZIP_DEFLATED) as target:
        for name in source.namelist():
            target.writestr(name, source.read(name))

    with pytest.raises(InvalidAdapter, match=r"adapter_model.bin' is compressed.*as safetensors"):
        load_adapter(tmp_path)


def test_pickle_cut_short_is_refused(tmp_path: Path) -> None:
    """A truncated .bin is a named error."""
    (tmp_path / "adapter_config.json").write_bytes(config_bytes())
    torch.save({"a": torch.ones(100)}, tmp_path / "adapter_model.bin")
    os.truncate(tmp_path / "adapter_model.bin", 300)

    with pytest.raises(InvalidAdapter, match="is not a checkpoint of plain tensors"):
        load_adapter(tmp_path)


# Sizes that a header makes up


def _sparse_adapter(directory: Path, shapes: Mapping[str, tuple[int, int]], **config: Any) -> Path:
    """An adapter of zeros that takes no room on the disk: module -> (r, features), both ways."""
    header: dict[str, object] = {}
    offset = 0
    for path, (r, features) in shapes.items():
        for matrix, shape in (("A", [r, features]), ("B", [features, r])):
            nbytes = 2 * r * features
            header[f"base_model.model.{path}.lora_{matrix}.weight"] = {
                "dtype": "BF16",
                "shape": shape,
                "data_offsets": [offset, offset + nbytes],
            }
            offset += nbytes
    text = json.dumps(header).encode()
    directory.mkdir()
    (directory / "adapter_config.json").write_text(json.dumps({"peft_type": "LORA", "lora_alpha": 4, **config}))
    weights = directory / "adapter_model.safetensors"
    weights.write_bytes(len(text).to_bytes(8, "little") + text)
    os.truncate(weights, 8 + len(text) + offset)
    return directory


@pytest.mark.parametrize(
    ("r", "features"), [(1 << 20, 1 << 19), (8, 1 << 21), (1 << 16, 1 << 11), ((1 << 30) - 1, 4), (2, 1 << 36)]
)
def test_a_row_that_no_model_has_is_refused_before_memory_is_asked_for(tmp_path: Path, r: int, features: int) -> None:
    """Only the header is read of a file whose size costs nothing."""
    adapter = _sparse_adapter(tmp_path / "adapter", {Q: (r, features)}, r=r)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    with pytest.raises(InvalidAdapter, match=r"which no layer of any model needs: expected at most 1048576 inputs and"):
        load_adapter(adapter)

    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 64 << 10


def test_a_row_of_the_largest_models_is_taken(tmp_path: Path) -> None:
    """A fused layer of 405 billion weights, at rank 1024."""
    assert load_adapter(_sparse_adapter(tmp_path / "adapter", {Q: (1024, 65536 - 4096)}, r=1024))


def test_tensors_that_are_too_large_together_are_refused(tmp_path: Path) -> None:
    """All rows are as wide as the widest one, and the file would be hashed."""
    wide = {"model.layers.0.self_attn.q_proj": (512, 1 << 16)}
    narrow = {f"model.layers.{layer}.self_attn.q_proj": (1, 4) for layer in range(1, 1100)}
    config = {"r": 1, "rank_pattern": {r"layers\.0\.self_attn\.q_proj": 512}}
    adapter = load_adapter(_sparse_adapter(tmp_path / "adapter", wide | narrow, **config))

    with pytest.raises(
        UnsupportedAdapter, match=r"lora_weights takes 147639500800 bytes, 1100 rows as wide as the widest"
    ):
        plan_layout(adapter, dtype="bfloat16")


def test_a_file_of_the_old_format_that_would_fill_the_memory_is_refused(tmp_path: Path) -> None:
    """It cannot be mapped."""
    adapter = write_adapter(tmp_path / "adapter", lora_pair(Q))
    (adapter / "adapter_model.safetensors").unlink()
    (adapter / "adapter_model.bin").write_bytes(b"\x80\x02")
    os.truncate(adapter / "adapter_model.bin", 1 << 40)

    with pytest.raises(InvalidAdapter, match="1099511627776 bytes in the format before torch 1.6, expected at most"):
        load_adapter(adapter)


def test_two_hundred_thousand_missing_shards_are_one_short_message(tmp_path: Path) -> None:
    """The first of them, and how many more there are."""
    adapter = write_adapter(tmp_path / "adapter", lora_pair(Q))
    (adapter / "adapter_model.safetensors").unlink()
    weight_map = {f"tensor{number}": f"shard-{number}.safetensors" for number in range(200_000)}
    (adapter / "adapter_model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
    with pytest.raises(InvalidAdapter) as caught:
        load_adapter(adapter)

    assert len(str(caught.value)) < 51_000
    assert "shard-0.safetensors' is not a file" in str(caught.value)
    assert "and 199900 more" in str(caught.value)
