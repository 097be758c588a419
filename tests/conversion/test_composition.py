# SPDX-FileCopyrightText: the tritonlora authors
# SPDX-License-Identifier: Apache-2.0
"""composition.py: the deltas of a composition against PEFT's own `add_weighted_adapter`, and its text, too."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file

import peft_oracle
from adapters import lora_pair, lora_weights, save_llama_adapter, without_warnings, write_adapter
from engine_client import ask, tensors_of
from peft_oracle import EOS, load_peft
from tritonlora.conversion.composition import Compression, Part, composed_ranks, write_composition
from tritonlora.conversion.layout import plan_layout
from tritonlora.conversion.peft_directory import check_for_llm_api
from tritonlora.conversion.tensors import lora_config
from tritonlora.cpu_engine.engine import load_engine
from tritonlora.engine.profile import load_profile
from tritonlora.errors import InvalidAdapter, UnsupportedAdapter
from tritonlora.peft.adapter import load_adapter

Q = "model.layers.0.self_attn.q_proj"
ATTENTION = ["q_proj", "k_proj", "v_proj", "o_proj"]
# What two adapters may have that differs, each with what the composition has to make of it.
PAIRS: Mapping[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "the same shapes": ({}, {}),
    "ranks and alphas": ({"r": 2, "lora_alpha": 3}, {"r": 8, "lora_alpha": 32}),
    "rslora": ({"use_rslora": True, "r": 8}, {"lora_alpha": 5}),
    "other layers": ({"target_modules": ["q_proj", "up_proj"]}, {"target_modules": ["q_proj", "down_proj"]}),
    "patterns": (
        {"rank_pattern": {"q_proj": 2, "layers.1.mlp.up_proj": 6}, "alpha_pattern": {"k_proj": 3}},
        {
            "alpha_pattern": {"layers.0.self_attn.v_proj": 1, "down_proj": 9},
            "target_modules": [*ATTENTION, "down_proj"],
        },
    ),
    "one layer": ({"layers_to_transform": [1]}, {"layers_to_transform": [1], "r": 2}),
    "fp16 and bf16": ({"dtype": torch.float16}, {"dtype": torch.bfloat16}),
    "fp16": ({"dtype": torch.float16}, {"dtype": torch.float16}),
    "fp32 and bf16": ({"dtype": torch.float32}, {"dtype": torch.bfloat16}),
}
WEIGHTS = (0.7, -0.3)


@pytest.fixture
def pair(tmp_path: Path, request: pytest.FixtureRequest) -> tuple[Path, list[Path]]:
    """The base model, and two random adapters of it."""
    found = [
        save_llama_adapter(tmp_path / str(number), seed=number, **options)
        for number, options in enumerate(getattr(request, "param", ({}, {})))
    ]
    for one in found[1:]:  # the base model is random, so both adapters get that of the first
        config = json.loads((one.adapter / "adapter_config.json").read_text())
        config["base_model_name_or_path"] = str(found[0].base)
        (one.adapter / "adapter_config.json").write_text(json.dumps(config))
    return found[0].base, [one.adapter for one in found]


def composed(
    directories: Sequence[Path], out: Path, weights: Sequence[float] = WEIGHTS, rank: int | None = None
) -> Compression | None:
    """Write the composition of these adapters to `out`."""
    out.mkdir()
    parts = [Part(one.parent.name, load_adapter(one), weight) for one, weight in zip(directories, weights, strict=True)]
    return write_composition(parts, out, rank=rank)


@without_warnings
def peft_model(base: Path, directories: Mapping[str, Path]) -> Any:
    """These adapters in one PEFT model."""
    model: Any = transformers.AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
    for number, (name, directory) in enumerate(directories.items()):
        if number:
            model.load_adapter(directory, name)
        else:
            model = peft.PeftModel.from_pretrained(model, directory, adapter_name=name)
    return model


@without_warnings
def deltas_of(model: Any, name: str) -> dict[str, torch.Tensor]:
    """Path -> what PEFT adds to the layer's weight, (out, in), computed in float64."""
    model.double()
    return {
        path: module.get_delta_weight(name).detach()
        for path, module in model.get_base_model().named_modules()
        if isinstance(module, peft.tuners.lora.Linear) and name in module.lora_A
    }


def deltas(base: Path, directory: Path) -> dict[str, torch.Tensor]:
    """The deltas of the adapter in a directory, as PEFT loads it."""
    return deltas_of(peft_model(base, {"one": directory}), "one")


@without_warnings
def by_peft(base: Path, directories: Sequence[Path], **options: Any) -> dict[str, torch.Tensor]:
    """The deltas of what PEFT itself composes, in float64."""
    names = [f"part{number}" for number in range(len(directories))]
    model = peft_model(base, dict(zip(names, directories, strict=True)))
    model.double()
    model.add_weighted_adapter(names, list(WEIGHTS), "sum", **options)
    return deltas_of(model, "sum")


def relative(found: Mapping[str, torch.Tensor], expected: Mapping[str, torch.Tensor]) -> float:
    """The largest error of a layer's delta, relative to the delta, in the Frobenius norm."""
    zero = torch.zeros(())
    assert {path for path, delta in expected.items() if delta.any()} <= found.keys()
    return max(float((found.get(path, zero) - delta).norm() / delta.norm()) for path, delta in expected.items())


@pytest.mark.parametrize("pair", PAIRS.values(), ids=PAIRS.keys(), indirect=True)
def test_the_delta_is_pefts_weighted_sum(pair: tuple[Path, list[Path]], tmp_path: Path) -> None:
    """To the rounding of float32, which B is stored in; measured: 6e-8 at most. PEFT loads it, and so do we."""
    base, directories = pair
    composed(directories, tmp_path / "sum")
    expected: dict[str, torch.Tensor] = {}
    for directory, weight in zip(directories, WEIGHTS, strict=True):
        for path, delta in deltas(base, directory).items():
            expected[path] = expected.get(path, torch.zeros(())) + weight * delta

    assert relative(deltas(base, tmp_path / "sum"), expected) < 2**-23
    # PEFT 0.21 keeps use_rslora of the first adapter, and so scales its sum by the root of the rank once more.
    if not any(load_adapter(one).config.use_rslora for one in directories):
        assert relative(by_peft(base, directories, combination_type="cat"), expected) < 1e-12
    adapter = load_adapter(tmp_path / "sum")
    assert () == adapter.remarks
    assert {*expected} == {*adapter.modules}
    check_for_llm_api(adapter)
    for path, module in adapter.modules.items():
        delta = module.scaling * module.lora_B.load().double() @ module.lora_A.load().double()
        torch.testing.assert_close(delta, expected[path], rtol=1e-6, atol=1e-6 * float(expected[path].abs().max()))


def test_a_is_carried_bit_for_bit_one_below_the_other(pair: tuple[Path, list[Path]], tmp_path: Path) -> None:
    """In the adapters' own dtype; B has the weight and the scaling, in float32."""
    _, directories = pair
    composed(directories, tmp_path / "sum")
    first, second = (load_file(one / "adapter_model.safetensors") for one in directories)
    found = load_file(tmp_path / "sum" / "adapter_model.safetensors")

    for key in first:
        if "lora_A" in key:
            assert torch.equal(torch.cat([first[key], second[key]]), found[key])
        else:
            expected = torch.cat([first[key].double() * 2 * 0.7, second[key].double() * 2 * -0.3], dim=1)
            assert torch.equal(expected.float(), found[key])


@pytest.mark.parametrize("rank", [1, 3, 6])
@pytest.mark.parametrize("pair", [PAIRS["patterns"], PAIRS["ranks and alphas"]], indirect=True)
def test_compressed_deltas_are_pefts_svd_and_the_error_is_told(
    pair: tuple[Path, list[Path]], tmp_path: Path, rank: int
) -> None:
    """Layers of a smaller rank stay exact."""
    base, directories = pair
    found = composed(directories, tmp_path / "sum", rank=rank)
    svd, cat = (by_peft(base, directories, combination_type=kind, svd_rank=rank) for kind in ("svd", "cat"))
    own = deltas(base, tmp_path / "sum")

    assert found is not None
    assert relative(own, svd) < 1e-5
    errors = {path: float((own[path] - cat[path]).norm() / cat[path].norm()) for path in cat}
    assert found.errors == pytest.approx({path: error for path, error in errors.items() if error > 1e-6}, rel=1e-3)
    whole = sum(float(one.norm()) ** 2 for one in cat.values()) ** 0.5
    assert found.overall == pytest.approx(
        sum(float((own[p] - cat[p]).norm()) ** 2 for p in cat) ** 0.5 / whole, rel=1e-3
    )
    assert {*range(1, rank + 1)} >= {module.r for module in load_adapter(tmp_path / "sum").modules.values()}


def test_a_rank_that_no_layer_exceeds_compresses_nothing(pair: tuple[Path, list[Path]], tmp_path: Path) -> None:
    """The files are those of the exact sum."""
    _, directories = pair

    assert None is composed(directories, tmp_path / "exact") is composed(directories, tmp_path / "sum", rank=8)
    for name in ("adapter_model.safetensors", "adapter_config.json"):
        assert (tmp_path / "exact" / name).read_bytes() == (tmp_path / "sum" / name).read_bytes()


def test_a_layer_smaller_than_the_rank_is_exact(tmp_path: Path) -> None:
    """4 outputs have no more than 4 singular values."""
    parts = [
        write_adapter(tmp_path / name, lora_pair(Q, r=8, in_features=32, out_features=4), r=8) for name in ("a", "b")
    ]
    found = composed(parts, tmp_path / "sum", rank=6)

    assert found is not None
    assert found.overall < 1e-12
    assert [(6, 32), (4, 6)] == [
        tuple(one.shape) for one in load_file(tmp_path / "sum" / "adapter_model.safetensors").values()
    ]


def test_the_engines_text_is_pefts(pair: tuple[Path, list[Path]], tmp_path: Path) -> None:
    """Greedy text of the CPU engine from the wire tensors, against PEFT's generate with PEFT's own sum."""
    base, directories = pair
    composed(directories, tmp_path / "sum", (0.25, 0.25))
    adapter, profile = load_adapter(tmp_path / "sum"), load_profile(base)
    layout = plan_layout(adapter, dtype=profile.dtype, profile=profile)
    wire = {"lora_weights": lora_weights(adapter, layout)[None], "lora_config": lora_config(layout)[None]}
    model = peft_model(base, {"a": directories[0], "b": directories[1]})
    without_warnings(model.add_weighted_adapter)(["a", "b"], [0.25, 0.25], "sum", combination_type="cat")
    model.set_adapter("sum")
    prompts = ([5, 17, 3, 42], [9, 9, 1], [60, 2, 33, 21, 8, 30])
    engine = load_engine({"gpt_model_path": str(base), "exclude_input_in_output": "true"}, Path(), decoupled=True)
    try:
        found = [ask(engine, tensors_of(p, 20, end_id=EOS, lora_task_id=1, **wire)).tokens() for p in prompts]
    finally:
        engine.close()

    assert [peft_oracle.generate(model.eval(), prompt, 20) for prompt in prompts] == found
    alone = load_peft(base, directories[0])
    assert [peft_oracle.generate(alone, prompt, 20) for prompt in prompts] != found


def test_paths_that_begin_otherwise_are_the_same_layers(tmp_path: Path) -> None:
    """A text model alone, and in a model with a vision tower; the composition has the names of the first adapter."""
    first = write_adapter(tmp_path / "a", lora_pair(Q), target_modules=["q_proj"])
    second = write_adapter(tmp_path / "b", lora_pair(f"model.language_{Q}"), target_modules=["q_proj"])
    composed([first, second], tmp_path / "sum")

    assert {Q: 4} == {path: module.r for path, module in load_adapter(tmp_path / "sum").modules.items()}


# Refusals


def part(directory: Path, weight: float = 1.0, **options: Any) -> Part:
    """A part from `write_adapter`."""
    tensors = options.pop("tensors", None) or lora_pair(Q)
    return Part(directory.name, load_adapter(write_adapter(directory, tensors, **options)), weight)


def test_dora_and_layers_of_other_sizes_are_refused_together(tmp_path: Path) -> None:
    """The two adapters and the layers are named."""
    magnitude = {f"{Q}.lora_magnitude_vector": torch.ones(32)}
    parts = [
        part(tmp_path / "dora", tensors=lora_pair(Q) | magnitude, use_dora=True),
        part(tmp_path / "small", tensors=lora_pair(Q, in_features=16)),
        part(tmp_path / "sound"),
    ]

    with pytest.raises(
        UnsupportedAdapter, match="(?s)dora uses DoRA.*32 -> 32 in dora and 16 -> 32 in small and 32 -> 32"
    ):
        composed_ranks(parts)
    with pytest.raises(UnsupportedAdapter, match="dora uses DoRA"):
        write_composition(parts[:1], tmp_path)


@pytest.mark.parametrize("rank", [None, 1])
def test_values_that_are_not_finite_are_refused_by_name(tmp_path: Path, rank: int | None) -> None:
    """Whether or not the sum is compressed."""
    bad = write_adapter(tmp_path / "bad", lora_pair(Q))
    tensors = load_file(bad / "adapter_model.safetensors")
    tensors[f"base_model.model.{Q}.lora_B.weight"][3, 1] = float("nan")
    save_file(tensors, bad / "adapter_model.safetensors")

    with pytest.raises(
        InvalidAdapter, match=rf"lora_B of '{Q}' has NaN or infinite values in bad; take another adapter"
    ):
        write_composition([part(tmp_path / "sound"), Part("bad", load_adapter(bad), 1.0)], tmp_path, rank=rank)


@pytest.mark.parametrize(
    ("weight", "message"), [(1e300, "has values too large for float32"), (1e-300, "vanishes in float32")]
)
def test_weights_that_float32_cannot_hold_are_refused(tmp_path: Path, weight: float, message: str) -> None:
    """Rather than an adapter of infinities, or of zeros."""
    with pytest.raises(InvalidAdapter, match=rf"lora_B of '{Q}' {message}; give"):
        write_composition([part(tmp_path / "a", weight)], tmp_path)
