# SPDX-FileCopyrightText: the tritonlora authors
# SPDX-License-Identifier: Apache-2.0
"""Recognise other formats than a PEFT adapter, by the names of their files and of their tensors."""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from tritonlora.errors import UnsupportedAdapter


@dataclass(frozen=True, slots=True)
class Format:
    """A format that is not a PEFT adapter, and the remedy for a user who gives it."""

    what: str
    remedy: str
    files: tuple[str, ...] = ()  # patterns of names that only this format has
    key: str = ""  # a regular expression for names of tensors that only this format has

    def __str__(self) -> str:
        """The format and the remedy, for a message."""
        return f"{self.what}; {self.remedy}"


# First match wins. Sources: the trainers' own code for saving and converting.
FORMATS = (
    Format(
        "an adapter of mlx-lm, whose matrices are transposed",
        "convert it to PEFT as the page Conversion of the docs shows, or merge it with mlx_lm.fuse and build an engine "
        "of the merged model",
        ("adapters.safetensors", "adapters.npz"),
        r"^(model|language_model|transformer)\..*\.lora_[ab]$",
    ),
    Format(
        "an adapter of mistral-finetune, whose rows of q and k are in another order than Hugging Face's",
        "merge it with mistral-finetune's utils/merge_lora.py, convert that with transformers' "
        "convert_mistral_weights_to_hf.py, and build an engine of it",
        ("lora.safetensors",),
        r"^layers\.[0-9]+\.attention\.w[qkv]\.lora_[AB]\.weight$",
    ),
    Format(
        "an adapter of torchtune",
        "give the directory with adapter_model.safetensors and adapter_config.json that its FullModelHFCheckpointer "
        "writes, or convert it with torchtune.models.convert_weights.tune_to_peft_adapter_weights",
        ("adapter_model.pt", "adapter_[0-9]*.pt"),
        r"^layers\.[0-9]+\.(attn|mlp)\.\w+\.lora_[ab]\.weight$",
    ),
    Format(
        "an adapter of NeMo",
        "export it from NeMo 2 with nemo.collections.llm.export_ckpt(target='hf-peft'), or merge it with NeMo's "
        "merge script and build an engine of the merged model",
        ("*.nemo", "*.distcp", "weights/*.distcp"),
        r"\.adapter_layer\.|\.adapter\.linear_(in|out)\.weight$",
    ),
    Format(
        "an adapter of an image model",
        "serve it with that model: TensorRT-LLM's engines generate text",
        ("pytorch_lora_weights.safetensors",),
        r"^(lora_unet|lora_te|unet\.|transformer\.(single_)?transformer_blocks\.)",
    ),
    Format("an adapter in GGUF", "give the PEFT adapter that it was converted from", ("*.gguf",)),
    Format(
        "a whole model, and no adapter",
        "build an engine of it, or give the directory of the adapter",
        (
            *("model.safetensors", "model.safetensors.index.json", "model-*-of-*.safetensors"),
            *("pytorch_model.bin", "pytorch_model.bin.index.json", "consolidated*.safetensors"),
        ),
    ),
)


def format_of_directory(directory: Path) -> Format | None:
    """The format of the files in `directory`, which holds no PEFT adapter; None if no file name shows it."""
    return next((one for one in FORMATS if any(any(directory.glob(name)) for name in one.files)), None)


def format_of_tensors(keys: Iterable[str]) -> Format | None:
    """The format whose tensors have names like `keys`; None for PEFT's names and for unknown names."""
    keys = [key for key in keys if len(key) < 1000]
    return next((one for one in FORMATS if one.key and any(re.search(one.key, key) for key in keys)), None)


def refuse(directory: Path, found: Format | None) -> None:
    """Raise UnsupportedAdapter if `directory` is of another format than PEFT's."""
    if found is not None:
        raise UnsupportedAdapter(f"{str(directory)!r} is {found}")
