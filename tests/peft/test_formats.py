# SPDX-FileCopyrightText: the tritonlora authors
# SPDX-License-Identifier: Apache-2.0
"""What people give that is not a PEFT adapter is named in one sentence, with what can be done with it."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from adapters import as_mlx, lora_pair, save_llama_adapter, write_adapter
from tritonlora.errors import InvalidAdapter, UnsupportedAdapter
from tritonlora.peft.adapter import load_adapter

Q = "model.layers.0.self_attn.q_proj"
CONVERSION = Path(__file__).parents[2] / "plugin" / "docs" / "conversion.md"


def _mlx_renamed(directory: Path) -> None:
    tensors = {f"{Q}.lora_a": torch.ones(8, 2), f"{Q}.lora_b": torch.ones(2, 8)}
    write_adapter(directory, tensors, prefix="")


def _mistral(directory: Path) -> None:
    (directory / "params.json").write_text("{}")
    (directory / "lora.safetensors").write_bytes(b"x")


def _mistral_renamed(directory: Path) -> None:
    write_adapter(directory, lora_pair("layers.0.attention.wq"), prefix="")


def _torchtune(directory: Path) -> None:
    (directory / "adapter_model.pt").write_bytes(b"x")
    (directory / "adapter_config.json").write_text(json.dumps({"peft_type": "LORA", "r": 8}))


def _torchtune_renamed(directory: Path) -> None:
    tensors = {f"layers.0.attn.q_proj.lora_{one}.weight": torch.ones(2, 2) for one in "ab"}
    write_adapter(directory, tensors, prefix="")


def _file(name: str) -> Callable[[Path], None]:
    def write(directory: Path) -> None:
        (directory / name).parent.mkdir(exist_ok=True)
        (directory / name).write_bytes(b"x")

    return write


@pytest.mark.parametrize(
    ("make", "sentence"),
    [
        (_mlx_renamed, "an adapter of mlx-lm, .*; convert it to PEFT as the page Conversion"),
        (_mistral, "an adapter of mistral-finetune, .*; merge it with"),
        (_mistral_renamed, "an adapter of mistral-finetune, .*; merge it with"),
        (_torchtune, "an adapter of torchtune; give the directory"),
        (_torchtune_renamed, "an adapter of torchtune; give the directory"),
        (_file("megatron_gpt_peft_lora_tuning.nemo"), "an adapter of NeMo; export it"),
        (_file("weights/__0_0.distcp"), "an adapter of NeMo; export it"),
        (_file("pytorch_lora_weights.safetensors"), "an adapter of an image model; serve it"),
        (_file("adapter-f16.gguf"), "an adapter in GGUF; give the PEFT adapter"),
        (_file("model-00001-of-00002.safetensors"), "a whole model, and no adapter; build an engine"),
    ],
)
def test_another_format_is_one_sentence(make: Callable[[Path], None], sentence: str, tmp_path: Path) -> None:
    """By its files, or, where these were renamed, by the names of its tensors."""
    make(tmp_path)
    with pytest.raises(UnsupportedAdapter, match=f"^'{re.escape(str(tmp_path))}' is {sentence}") as caught:
        load_adapter(tmp_path)

    assert 1 == len(str(caught.value).splitlines())


def test_files_of_another_format_beside_an_adapter_are_no_matter(tmp_path: Path) -> None:
    """torchtune writes its own file beside PEFT's two, and a trainer may leave a merged model there."""
    write_adapter(tmp_path, lora_pair(Q))
    for name in ("adapter_model.pt", "model.safetensors", "adapter.gguf"):
        (tmp_path / name).write_bytes(b"x")

    assert [Q] == list(load_adapter(tmp_path).modules)


def test_an_empty_directory_is_said_to_be_empty(tmp_path: Path) -> None:
    """An interrupted download, say."""
    with pytest.raises(InvalidAdapter, match="is empty; fetch the adapter again, or remove the directory"):
        load_adapter(tmp_path)


@pytest.mark.parametrize("head", ["score.weight", "classifier.bias", "score.modules_to_save.default.weight"])
def test_the_head_of_a_classifier_is_told_from_a_trained_module(head: str, tmp_path: Path) -> None:
    """PEFT saves it with every adapter for classes, so that "train without it" would be no remedy."""
    adapter = write_adapter(tmp_path, {**lora_pair(Q), head: torch.ones(2, 8)}, task_type="SEQ_CLS")
    with pytest.raises(
        UnsupportedAdapter, match="a head that gives classes or scores, .*; serve the adapter with its base"
    ) as caught:
        load_adapter(adapter)

    assert "train" not in str(caught.value)


def test_the_script_in_the_docs_makes_a_peft_adapter_of_one_of_mlx_lm(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its LoRA is what mlx-lm computes: scale * (x @ lora_a @ lora_b)."""
    saved = save_llama_adapter(tmp_path)
    mlx = load_file(as_mlx(saved.adapter, tmp_path / "mlx") / "adapters.safetensors")
    (script,) = re.findall(r"```python\n(.*?mlx.*?)```", CONVERSION.read_text(), re.DOTALL)
    monkeypatch.chdir(tmp_path)
    (tmp_path / "mlx").rename("mlx-adapter")
    exec(compile(script, "conversion.md", "exec"), {})  # noqa: S102
    adapter = load_adapter(tmp_path / "peft-adapter")

    assert 14 == len(adapter.modules)
    for path, module in adapter.modules.items():
        expected = 2.5 * (mlx[f"{path}.lora_a"].double() @ mlx[f"{path}.lora_b"].double()).T
        found = module.scaling * (module.lora_B.load().double() @ module.lora_A.load().double())
        torch.testing.assert_close(found, expected, rtol=1e-9, atol=1e-9)
