# SPDX-FileCopyrightText: the tritonlora authors
# SPDX-License-Identifier: Apache-2.0
"""Packed rows: the engine's layout, exactness, and what is refused before or while they are written."""

from __future__ import annotations

import io
import json
import os
import resource
import tempfile
import threading
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file

from adapters import (
    LINEAR,
    LLAMA_CONFIG,
    Saved,
    lora_pair,
    lora_weights,
    save_adapter,
    save_llama_adapter,
    write_adapter,
)
from tritonlora.architectures.lora_modules import BY_ID, BY_NAME, ModuleDims
from tritonlora.conversion import tensors as pack
from tritonlora.conversion.convert import npy_header
from tritonlora.conversion.layout import plan_layout
from tritonlora.conversion.rows import Layout
from tritonlora.conversion.tensors import check_values, convert_file, lora_config
from tritonlora.conversion.unpack import unpack, unpack_magnitudes
from tritonlora.engine.profile import EngineProfile, load_profile
from tritonlora.errors import AdapterError, EngineMismatch, InvalidAdapter, UnsupportedAdapter
from tritonlora.peft.adapter import Adapter, load_adapter

Q = "model.layers.0.self_attn.q_proj"
V = "model.layers.0.self_attn.v_proj"
LLAMA_NAMES = {
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_dense": "self_attn.o_proj",
    "mlp_h_to_4h": "mlp.gate_proj",
    "mlp_gate": "mlp.up_proj",
    "mlp_4h_to_h": "mlp.down_proj",
}
LLAMA_SIDES = {  # in, out
    "attn_q": ("hidden", "heads"),
    "attn_k": ("hidden", "kv"),
    "attn_v": ("hidden", "kv"),
    "attn_dense": ("heads", "hidden"),
    "mlp_h_to_4h": ("hidden", "mlp"),
    "mlp_gate": ("hidden", "mlp"),
    "mlp_4h_to_h": ("mlp", "hidden"),
}
PROFILE = EngineProfile(
    source="engine",
    architecture="LlamaForCausalLM",
    dtype="bfloat16",
    num_layers=2,
    modules={name: ModuleDims(BY_NAME[name], 32, 32) for name in ("attn_q", "attn_v")},
    max_lora_rank=8,
)


def packed(adapter: Adapter, dtype: str) -> tuple[Layout, torch.Tensor]:
    layout = plan_layout(adapter, dtype=dtype)
    return layout, lora_weights(adapter, layout)


def normalised_by_peft(saved: Saved, path: str) -> torch.Tensor:
    """PEFT's magnitude of the layer `path` over the weight norm that its own DoRA layer computes."""
    layer: Any = saved.model.get_base_model().get_submodule(path)
    dora = layer.lora_magnitude_vector["default"]
    delta = layer.lora_B["default"].weight @ layer.lora_A["default"].weight
    norm = dora.get_weight_norm(layer.get_base_layer().weight, delta, layer.scaling["default"])
    normalised: torch.Tensor = (dora.weight / norm).detach()
    return normalised


def test_golden_vector_of_the_engine_is_reproduced(tmp_path: Path) -> None:
    """r=2, 3 -> 4, alpha 4: A as it stands, then twice B, and [module, layer, rank]."""
    a = torch.tensor([[1.0, 2, 3], [4, 5, 6]])
    b = torch.tensor([[1.0, 2], [3, 4], [5, 6], [7, 8]])
    adapter = load_adapter(write_adapter(tmp_path, {f"{Q}.lora_A.weight": a, f"{Q}.lora_B.weight": b}))
    layout, out = packed(adapter, "bfloat16")

    assert [[1, 2, 3, 4, 5, 6, 2, 4, 6, 8, 10, 12, 14, 16]] == out.tolist()
    assert [[1, 0, 2]] == lora_config(layout).tolist()


def test_memory_is_made_for_as_many_rows_as_there_are(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A batch of short rows has room for thousands, which would take a small adapter seconds."""
    places: list[object] = []

    class Counted(pack._Place):
        def __init__(self, row: torch.Tensor) -> None:
            super().__init__(row)
            places.append(self)

    monkeypatch.setattr(pack, "_Place", Counted)
    packed(load_adapter(write_adapter(tmp_path, lora_pair(Q))), "bfloat16")

    assert 0 < len(places) <= pack._BATCHES


@settings(max_examples=40, deadline=None)
@given(
    ranks_of=st.dictionaries(
        st.tuples(st.integers(0, 11), st.sampled_from(sorted(LLAMA_NAMES))), st.integers(1, 9), min_size=1, max_size=12
    ),
    sizes=st.lists(
        st.fixed_dictionaries(dict.fromkeys(("hidden", "heads", "kv", "mlp"), st.integers(1, 20))),
        min_size=12,
        max_size=12,
    ),
    dtypes=st.tuples(*[st.sampled_from(["bfloat16", "float16", "float32"])] * 2),
    alpha=st.floats(0.1, 64),
    rslora=st.booleans(),
    order=st.randoms(use_true_random=False),
)
def test_any_adapter_comes_back_out_of_its_rows(
    ranks_of: dict[tuple[int, str], int],
    sizes: list[dict[str, int]],
    dtypes: tuple[str, str],
    alpha: float,
    rslora: bool,
    order: Any,
) -> None:
    """Rows are sorted, and each is A cast, B scaled in float32 and rounded once, and zeros, whatever went in."""
    stored, wanted = (getattr(torch, dtype) for dtype in dtypes)
    # Without a gate_proj, up_proj can be of another architecture.
    modules = {(0, "mlp_h_to_4h"): 1, **ranks_of}
    tensors, ranks = {}, {}
    for (layer, name), r in modules.items():
        in_features, out_features = (sizes[layer][side] for side in LLAMA_SIDES[name])
        path = f"model.layers.{layer}.{LLAMA_NAMES[name]}"
        tensors.update(lora_pair(path, r=r, in_features=in_features, out_features=out_features, dtype=stored))
        ranks[path] = r
    names = list(tensors)
    order.shuffle(names)
    with tempfile.TemporaryDirectory() as directory:
        shuffled = {name: tensors[name] for name in names}
        write_adapter(Path(directory), shuffled, lora_alpha=alpha, use_rslora=rslora, rank_pattern=ranks)
        layout, out = packed(load_adapter(Path(directory)), dtypes[1])

    expected_keys = sorted((layer, BY_NAME[name].id) for layer, name in modules)
    assert [[module, layer] for layer, module in expected_keys] == lora_config(layout)[:, :2].tolist()
    for row, (layer, module_id) in zip(out, expected_keys, strict=True):
        path = f"model.layers.{layer}.{LLAMA_NAMES[BY_ID[module_id].name]}"
        a, b = tensors[f"{path}.lora_A.weight"], tensors[f"{path}.lora_B.weight"]
        scaling = alpha / (ranks[path] ** 0.5 if rslora else ranks[path])
        scaled = (b.float() * torch.tensor(scaling, dtype=torch.float32)).to(wanted)
        assert torch.equal(a.to(wanted).flatten(), row[: a.numel()])
        assert torch.equal(scaled.flatten(), row[a.numel() : a.numel() + b.numel()])
        assert not row[a.numel() + b.numel() :].any()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_scaling_in_half_precision_rounds_once(dtype: torch.dtype) -> None:
    """torch multiplies a tensor by a number in float32: for every finite value, the same as doing so by hand."""
    values = torch.arange(-(1 << 15), 1 << 15, dtype=torch.int32).to(torch.int16).view(dtype)
    values = values[values.isfinite()]
    for scaling in (2.0, 1 / 3, 16 / 64**0.5, 7 / 6**0.5, 0.1):
        by_hand = (values.float() * torch.tensor(scaling, dtype=torch.float32)).to(dtype)
        assert torch.equal(by_hand, values * scaling)


LLAVA: dict[str, Any] = {
    "text_config": {**LLAMA_CONFIG, "model_type": "llama"},
    "vision_config": {**LLAMA_CONFIG, "num_key_value_heads": 4, "model_type": "clip_vision_model"},
    "image_token_index": 1,
}
DORA: dict[str, tuple[Any, Any, Any]] = {
    "llama": (transformers.LlamaForCausalLM, transformers.LlamaConfig(**LLAMA_CONFIG), list(LINEAR)),
    "gpt2": (
        transformers.GPT2LMHeadModel,
        transformers.GPT2Config(n_embd=32, n_layer=2, n_head=4, vocab_size=64),
        ["attn.c_proj", "c_fc"],
    ),
    # Its vision tower has layers of the same numbers, names and shapes.
    "llava": (
        transformers.LlavaForConditionalGeneration,
        transformers.LlavaConfig(**LLAVA),
        r".*language_model\.layers\..*(q|up)_proj",
    ),
}


@pytest.mark.parametrize("model", DORA)
def test_dora_magnitudes_are_normalised_as_in_peft(model: str, tmp_path: Path) -> None:
    """The last piece of a DoRA row is PEFT's magnitude over PEFT's own weight norm; Conv1D layers too."""
    model_class, config, targets = DORA[model]
    saved = save_adapter(
        tmp_path, model_class, config, dtype=torch.float32, use_dora=True, use_rslora=True, target_modules=targets
    )
    adapter = load_adapter(saved.adapter)
    profile = load_profile(saved.base)
    layout = plan_layout(adapter, dtype="float32", profile=profile, base=saved.base)
    out = lora_weights(adapter, layout, base=saved.base)
    found = unpack_magnitudes(out, lora_config(layout), {dims.module.id: dims for dims in profile.modules.values()})

    assert 4 == layout.config_shape[1]
    assert lora_config(layout)[:, 3].all()
    assert len(adapter.modules) == len(found)
    for row, source in zip(layout.rows, layout.sources, strict=True):
        magnitude = found[row.layer, row.module.name]
        torch.testing.assert_close(magnitude, normalised_by_peft(saved, source.path), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(("model", "targets"), [("llama", ["q_proj", "o_proj"]), ("gpt2", ["attn.c_proj"])])
def test_dora_goes_by_the_kind_of_the_layer(model: str, targets: list[str], tmp_path: Path) -> None:
    """PEFT does not look at fan_in_fan_out where the base is quantised; square weights fit either way round."""
    model_class, config, _ = DORA[model]
    saved = save_adapter(
        tmp_path, model_class, config, dtype=torch.float32, use_dora=True, use_rslora=True, target_modules=targets
    )
    stated = json.loads((saved.adapter / "adapter_config.json").read_text())
    wrong = stated | {"fan_in_fan_out": not stated["fan_in_fan_out"]}
    profile, packed = load_profile(saved.base), []
    for fields in (stated, wrong):
        (saved.adapter / "adapter_config.json").write_text(json.dumps(fields))
        adapter = load_adapter(saved.adapter)
        layout = plan_layout(adapter, dtype="float32", profile=profile, base=saved.base)
        packed.append(lora_weights(adapter, layout, base=saved.base))

    assert 4 == layout.config_shape[1]
    assert torch.equal(*packed)


def test_fused_dora_magnitudes_are_divided_like_the_outputs(tmp_path: Path) -> None:
    """The rows of a fused layer's parts carry their own pieces of its magnitude."""
    config = transformers.GPT2Config(n_embd=32, n_layer=1, n_head=4, vocab_size=64)
    saved = save_adapter(
        tmp_path, transformers.GPT2LMHeadModel, config, dtype=torch.float32, use_dora=True, target_modules=["c_attn"]
    )
    adapter, profile = load_adapter(saved.adapter), load_profile(saved.base)
    layout = plan_layout(adapter, dtype="float32", profile=profile, base=saved.base)
    out = lora_weights(adapter, layout, base=saved.base)
    found = unpack_magnitudes(out, lora_config(layout), {dims.module.id: dims for dims in profile.modules.values()})
    parts = torch.cat([found[0, name] for name in ("attn_q", "attn_k", "attn_v")])

    torch.testing.assert_close(parts, normalised_by_peft(saved, "transformer.h.0.attn.c_attn"))


def test_dora_without_its_base_model_is_refused_with_the_remedy(tmp_path: Path) -> None:
    """Without the base weights the magnitude cannot be normalised."""
    adapter = load_adapter(save_llama_adapter(tmp_path, use_dora=True).adapter)

    with pytest.raises(UnsupportedAdapter, match="--base CHECKPOINT"):
        plan_layout(adapter, dtype="bfloat16")


def test_dora_with_another_base_model_is_refused(tmp_path: Path) -> None:
    """A base model whose weights have other shapes is named, layer by layer."""
    adapter = load_adapter(save_llama_adapter(tmp_path / "one", use_dora=True, target_modules=["q_proj"]).adapter)
    config = transformers.LlamaConfig(
        hidden_size=16, intermediate_size=8, num_hidden_layers=2, num_attention_heads=2, vocab_size=8
    )
    other = save_adapter(tmp_path / "two", transformers.LlamaForCausalLM, config, target_modules=["q_proj"])

    with pytest.raises(
        UnsupportedAdapter,
        match=r"is not the unquantised base.*give its base model: .*layers\.0.*\(16, 16\), expected"
        ".*the same in layer 1",
    ):
        plan_layout(adapter, dtype="bfloat16", base=other.base)


@pytest.mark.parametrize("dtype", [torch.float8_e4m3fn, torch.float8_e5m2, torch.int8])
def test_dora_with_a_quantised_base_model_is_refused(dtype: torch.dtype, tmp_path: Path) -> None:
    """A weight that needs a scale next to it has other norms; float8 is refused although torch calls it floats."""
    saved = save_llama_adapter(tmp_path, use_dora=True, target_modules=["q_proj"])
    adapter = load_adapter(saved.adapter)
    file = saved.base / "model.safetensors"
    weights = {name: tensor.to(dtype) if "q_proj" in name else tensor for name, tensor in load_file(file).items()}
    save_file(weights, file)
    name = str(dtype).removeprefix("torch.")

    with pytest.raises(
        UnsupportedAdapter,
        match=rf"is not the unquantised base.*q_proj\.weight' is {name} .*the same in layer 1",
    ):
        plan_layout(adapter, dtype="bfloat16", base=saved.base)


def test_nothing_of_an_older_file_is_left(tmp_path: Path) -> None:
    """Neither in the padding, which is never written, nor behind the rows."""
    adapter = load_adapter(save_llama_adapter(tmp_path).adapter)
    layout, out = packed(adapter, "bfloat16")
    (tmp_path / "out").write_bytes(b"x" * (layout.weights_nbytes + 7))
    convert_file(adapter, layout, tmp_path / "out")

    assert out.view(torch.uint8).numpy().tobytes() == (tmp_path / "out").read_bytes()


@pytest.mark.parametrize("dtype", ["float16", "float32"])
def test_npy_file_is_read_by_numpy(dtype: str, tmp_path: Path) -> None:
    """Header and rows are what numpy itself writes and reads."""
    adapter = load_adapter(save_llama_adapter(tmp_path).adapter)
    layout, out = packed(adapter, dtype)
    header = npy_header((1, *layout.weights_shape), dtype)
    convert_file(adapter, layout, tmp_path / "out.npy", header=header)
    by_numpy = io.BytesIO()
    np.save(by_numpy, out.numpy()[None])

    assert by_numpy.getvalue() == (tmp_path / "out.npy").read_bytes()
    assert by_numpy.getvalue().startswith(header)


@pytest.mark.parametrize("shape", [(3,), (2, 3), (1, 2, 3)])
def test_npy_header_is_that_of_numpy(shape: tuple[int, ...]) -> None:
    """For lora_config too, of any number of dims."""
    by_numpy = io.BytesIO()
    np.save(by_numpy, np.zeros(shape, np.int32))

    assert by_numpy.getvalue() == npy_header(shape, "int32") + bytes(4 * int(np.prod(shape)))


def test_npy_of_bfloat16_is_refused_with_the_reason() -> None:
    """numpy has no such type, and what it writes instead is read by nobody."""
    with pytest.raises(UnsupportedAdapter, match=r"\.npy has no bfloat16.*lora_prefetch_dir"):
        npy_header((1, 2, 3), "bfloat16")


def test_full_disk_is_an_error_with_the_files_name(tmp_path: Path) -> None:
    """A write that the file system refuses names the file, not a descriptor."""
    adapter = load_adapter(save_llama_adapter(tmp_path).adapter)
    layout = plan_layout(adapter, dtype="bfloat16")
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1000, limits[1]))
    try:
        with pytest.raises(OSError, match="File too large") as caught:
            convert_file(adapter, layout, tmp_path / "out")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)

    assert str(tmp_path / "out") == caught.value.filename


def test_adapter_that_is_cut_short_meanwhile_is_a_named_error(tmp_path: Path) -> None:
    """A download that starts anew while its last result is converted does not end the process."""
    directory = save_llama_adapter(tmp_path).adapter
    adapter = load_adapter(directory)
    layout = plan_layout(adapter, dtype="bfloat16")
    os.truncate(directory / "adapter_model.safetensors", 100)
    before = threading.active_count()

    with pytest.raises(InvalidAdapter, match="adapter_model.safetensors' was changed after it had been looked at"):
        convert_file(adapter, layout, tmp_path / "out")
    assert before == threading.active_count()


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_nonfinite_weights_are_refused_by_name_unless_allowed(value: float, tmp_path: Path) -> None:
    """Every tensor with NaN or infinite values is named; --allow-nonfinite converts them."""
    tensors = {**lora_pair(Q), **lora_pair(V)}
    tensors[f"{Q}.lora_B.weight"][3, 1] = value
    tensors[f"{V}.lora_A.weight"][0, 5] = -value
    adapter = load_adapter(write_adapter(tmp_path, tensors))
    layout = plan_layout(adapter, dtype="bfloat16")

    with pytest.raises(
        InvalidAdapter, match=rf"(?s)lora_A of '{V}' has NaN .*--allow-nonfinite.*\n.*lora_B of '{Q}' has NaN"
    ):
        convert_file(adapter, layout, tmp_path / "out")
    convert_file(adapter, layout, tmp_path / "out", allow_nonfinite=True)
    out = torch.from_file(str(tmp_path / "out"), size=layout.weights_nbytes // 2, dtype=torch.bfloat16)
    assert 2 == int((~out.isfinite()).sum())


@pytest.mark.parametrize(("matrix", "value"), [("A", 70000.0), ("B", 40000.0)])
def test_float16_overflow_names_the_module(matrix: str, value: float, tmp_path: Path) -> None:
    """A value that float16 cannot hold, before scaling or after it, is an error."""
    tensors = lora_pair(Q, dtype=torch.float32)
    tensors[f"{Q}.lora_{matrix}.weight"][0, 0] = value
    adapter = load_adapter(write_adapter(tmp_path, tensors))

    with pytest.raises(
        UnsupportedAdapter, match=f"lora_{matrix} of '{Q}' has values too large for float16; convert to bf"
    ):
        packed(adapter, "float16")


@pytest.mark.parametrize("matrix", ["A", "B"])
@pytest.mark.parametrize("stored", [torch.float32, torch.bfloat16])
def test_a_matrix_that_vanishes_in_float16_is_refused(stored: torch.dtype, matrix: str, tmp_path: Path) -> None:
    """The layer would have no effect, in silence; in bfloat16 it has, and one that was zero before is sound."""
    tensors = lora_pair(Q, dtype=stored)
    tensors[f"{Q}.lora_{matrix}.weight"] *= 1e-9
    tiny = load_adapter(write_adapter(tmp_path / "tiny", tensors))
    tensors[f"{Q}.lora_{matrix}.weight"] *= 0
    zero = load_adapter(write_adapter(tmp_path / "zero", tensors))

    with pytest.raises(UnsupportedAdapter, match=f": lora_{matrix} of '{Q}' vanishes in float16; convert to bfloat16$"):
        packed(tiny, "float16")
    assert packed(tiny, "bfloat16")[1].count_nonzero() > packed(zero, "float16")[1].count_nonzero()


def test_a_scaling_that_makes_lora_b_vanish_is_refused(tmp_path: Path) -> None:
    """Where the adapter's values are float16 themselves; a scaling of zero is the adapter's own."""
    tensors = lora_pair(Q, dtype=torch.float16)

    with pytest.raises(UnsupportedAdapter, match=f"lora_B of '{Q}' vanishes in float16"):
        packed(load_adapter(write_adapter(tmp_path / "tiny", tensors, lora_alpha=1e-9)), "float16")
    assert packed(load_adapter(write_adapter(tmp_path / "zero", tensors, lora_alpha=0)), "float16")[1].any()


def test_allowed_nonfinite_values_do_not_hide_an_overflow(tmp_path: Path) -> None:
    """--allow-nonfinite passes on what was NaN or infinite already, and nothing that only becomes so."""
    tensors = {**lora_pair(Q, dtype=torch.float32), **lora_pair(V, dtype=torch.float32)}
    tensors[f"{Q}.lora_B.weight"][0] = torch.tensor([float("nan"), 40000.0])
    tensors[f"{V}.lora_A.weight"][0, 0] = float("inf")
    adapter = load_adapter(write_adapter(tmp_path / "adapter", tensors))
    layout = plan_layout(adapter, dtype="float16")

    with pytest.raises(UnsupportedAdapter, match=rf"': lora_B of '{Q}' has values too large for float16[^\n]*$"):
        convert_file(adapter, layout, tmp_path / "out", allow_nonfinite=True)
    with pytest.raises(InvalidAdapter, match=rf"(?s)lora_A of '{V}' has NaN.*lora_B of '{Q}' has NaN.* too large"):
        convert_file(adapter, layout, tmp_path / "out")


def test_a_part_of_a_fused_layer_is_blamed_for_its_own_values(tmp_path: Path) -> None:
    """A NaN in the outputs that become one row does not excuse what overflows in those of another."""
    pair = lora_pair("model.layers.0.mlp.gate_up_proj", out_features=64, dtype=torch.float32)
    lora_b = pair["model.layers.0.mlp.gate_up_proj.lora_B.weight"]
    lora_b[0, 0], lora_b[63, 1] = float("nan"), 40000.0
    adapter = load_adapter(write_adapter(tmp_path / "adapter", pair))

    with pytest.raises(UnsupportedAdapter, match="lora_B of .* too large for float16"):
        check_values(adapter, plan_layout(adapter, dtype="float16"), allow_nonfinite=True)


def test_dora_of_nonfinite_weights_is_not_called_too_large(tmp_path: Path) -> None:
    """The norm of a row with a NaN is one, and so is the magnitude over it."""
    saved = save_llama_adapter(tmp_path, use_dora=True, target_modules=["q_proj"])
    file = saved.adapter / "adapter_model.safetensors"
    weights = load_file(file)
    weights[f"base_model.model.{Q}.lora_B.weight"][0, 0] = float("nan")
    save_file(weights, file)
    adapter = load_adapter(saved.adapter)
    layout = plan_layout(adapter, dtype="bfloat16", base=saved.base)

    with pytest.raises(InvalidAdapter, match=r"lora_B of .* NaN .*\n.*normalised lora_magnitude_vector of .* NaN") as e:
        convert_file(adapter, layout, tmp_path / "out", base=saved.base)
    assert "too large" not in str(e.value)
    convert_file(adapter, layout, tmp_path / "out", base=saved.base, allow_nonfinite=True)


def test_large_sums_of_finite_values_are_not_taken_for_infinite(tmp_path: Path) -> None:
    """The quick check of a whole tensor never refuses a sound one."""
    tensors = {name: torch.full_like(tensor, 30000.0) for name, tensor in lora_pair(Q, dtype=torch.float16).items()}
    _, out = packed(load_adapter(write_adapter(tmp_path, tensors)), "float16")

    assert out.isfinite().all()


def test_threads_of_torch_are_as_before(tmp_path: Path) -> None:
    """Conversion leaves the caller's setting alone."""
    before = torch.get_num_threads()
    torch.set_num_threads(before + 1)
    packed(load_adapter(write_adapter(tmp_path, lora_pair(Q))), "bfloat16")
    after = torch.get_num_threads()
    torch.set_num_threads(before)

    assert before + 1 == after


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"dtype": "float16"}, "dtype is 'bfloat16', but the engine takes only its own, 'float16'"),
        (
            {"max_lora_rank": 1},
            r"attn_q: rank 2 is larger than the engine's max_lora_rank, 1; raise that to 2 .* \(layer 0\)",
        ),
        ({"num_layers": 0}, "attn_q: the engine has 0 layers, and not this one"),
        (
            {"modules": {}},
            "the engine has no LoRA: it would ignore the adapter, .*; build the engine with trtllm-build --lora_plugin",
        ),
        (
            {"modules": {"attn_q": ModuleDims(BY_NAME["attn_q"], 64, 32)}},
            "32 -> 32 in the adapter, but 64 -> 32",
        ),
    ],
    ids=["dtype", "rank", "layer", "module", "dims"],
)
def test_adapter_that_does_not_fit_the_engine_is_refused(change: dict[str, Any], message: str, tmp_path: Path) -> None:
    """Each check of the engine is made before a byte is written."""
    adapter = load_adapter(write_adapter(tmp_path, lora_pair(Q)))

    assert 1 == len(plan_layout(adapter, dtype="bfloat16", profile=PROFILE).rows)
    with pytest.raises(EngineMismatch, match=message):
        plan_layout(adapter, dtype="bfloat16", profile=replace(PROFILE, **change))


def test_same_reason_in_many_layers_is_one_line(tmp_path: Path) -> None:
    """The wrong base model is said once for each module, not once for each layer."""
    tensors: dict[str, torch.Tensor] = {}
    for layer in range(4):
        tensors.update(lora_pair(f"model.layers.{layer}.self_attn.q_proj", in_features=8))
    adapter = load_adapter(write_adapter(tmp_path, tensors))

    with pytest.raises(EngineMismatch, match=r": attn_q: it is 8 -> 32 .* another base model \(layers 0 to 3\)$"):
        plan_layout(adapter, dtype="bfloat16", profile=replace(PROFILE, num_layers=4))


def test_attention_output_that_the_engine_takes_for_square_is_explained(tmp_path: Path) -> None:
    """Where heads * head_size is not the hidden size, the cause is not another base model."""
    adapter = load_adapter(write_adapter(tmp_path, lora_pair(Q.replace("q_proj", "o_proj"), in_features=64)))
    dense = {"attn_dense": ModuleDims(BY_NAME["attn_dense"], 32, 32)}

    with pytest.raises(EngineMismatch, match="hidden x hidden, which this model's is not"):
        plan_layout(adapter, dtype="bfloat16", profile=replace(PROFILE, modules=dense, num_heads=4, head_size=16))


def test_two_layers_that_become_the_same_row_are_refused(tmp_path: Path) -> None:
    """The engine would take the last of them in silence."""
    adapter = load_adapter(write_adapter(tmp_path, {**lora_pair(Q), **lora_pair(Q.removeprefix("model."))}))

    with pytest.raises(UnsupportedAdapter, match="are both attn_q of layer 0"):
        plan_layout(adapter, dtype="bfloat16")


def test_fused_layer_without_a_profile_is_refused_with_the_remedy(tmp_path: Path) -> None:
    """Only the number of heads tells where a fused attention layer divides; it is not guessed."""
    pair = lora_pair("model.layers.0.self_attn.qkv_proj", out_features=64)
    adapter = load_adapter(write_adapter(tmp_path, pair))

    with pytest.raises(AdapterError, match=r"qkv_proj: a fused layer.*\(--base\)"):
        plan_layout(adapter, dtype="bfloat16")


def test_fused_layer_that_does_not_divide_by_the_ranks_is_refused(tmp_path: Path) -> None:
    """One key-value head cannot be shared between tensor-parallel ranks by slicing."""
    adapter = load_adapter(write_adapter(tmp_path, lora_pair("h.0.self_attention.query_key_value", out_features=48)))
    profile = replace(
        PROFILE,
        architecture="FalconForCausalLM",
        modules={"attn_qkv": ModuleDims(BY_NAME["attn_qkv"], 32, 48)},
        tp_size=2,
        num_heads=4,
        num_kv_heads=1,
        head_size=8,
    )

    with pytest.raises(EngineMismatch, match="do not divide by the engine's tp_size, 2"):
        plan_layout(adapter, dtype="bfloat16", profile=profile)


def test_unpack_gives_views(tmp_path: Path) -> None:
    """Nothing is copied: the views change with lora_weights."""
    layout, out = packed(load_adapter(write_adapter(tmp_path, lora_pair(Q))), "bfloat16")
    a, b = unpack(out, lora_config(layout), {1: PROFILE.modules["attn_q"]})[0, "attn_q"]
    out.zero_()

    assert ((2, 32), (32, 2)) == (tuple(a.shape), tuple(b.shape))
    assert not a.any()
    assert not b.any()
