# SPDX-FileCopyrightText: the tritonlora authors
# SPDX-License-Identifier: Apache-2.0
"""Read the architecture, the sizes and the LoRA modules of a model from its Hugging Face config.json."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from tritonlora.architectures.families import ARCHITECTURES, BY_MODEL_TYPE, LFM2, T5, Architecture
from tritonlora.architectures.layers import why_none
from tritonlora.engine.model_sizes import Sizes, size_in
from tritonlora.errors import UnknownArchitecture

# Keys under which a model with a vision tower describes its text model. InternVL's own code uses the second.
_TEXT_CONFIGS = ("text_config", "llm_config")
# Size -> its keys in config.json, the usual one first. A family may put other keys before them.
_SPELLINGS: Mapping[str, tuple[str, ...]] = {
    "hidden": ("hidden_size", "n_embd", "d_model", "n_embed"),
    "layers": ("num_hidden_layers", "n_layer", "n_layers", "num_layers"),
    "heads": ("num_attention_heads", "n_head", "n_heads", "num_heads"),
    "kv_heads": ("num_key_value_heads", "num_kv_heads"),
    "head_size": ("head_dim", "d_kv", "head_size"),
    "mlp": ("intermediate_size", "ffn_dim", "ffn_hidden_size", "d_ff", "n_inner"),
}
# Models whose MLP is four times as wide as the hidden size if config.json has no size for it. Other models need one.
# (transformers does not read MPT's expansion_ratio, another multiple.)
_FOUR_TIMES_HIDDEN = frozenset(
    {
        *("GPT2LMHeadModel", "GPTBigCodeForCausalLM", "GPTNeoForCausalLM", "GPTJForCausalLM", "BloomForCausalLM"),
        *("FalconForCausalLM", "MptForCausalLM", "GPTNeoXJapaneseForCausalLM"),
    }
)
_MULTI_QUERY = frozenset({"FalconForCausalLM", "GPTBigCodeForCausalLM"})


def text_model(config: Mapping[str, Any], source: str) -> tuple[Architecture, Mapping[str, Any]]:
    """The architecture of the text model, and its own part of `config`. UnknownArchitecture, naming `source`."""
    nested = next((config[key] for key in _TEXT_CONFIGS if isinstance(config.get(key), dict)), None)
    text: Mapping[str, Any] = config if nested is None else nested
    names, model_type = config.get("architectures"), str(text.get("model_type", ""))
    name = names[0] if isinstance(names, list) and names and isinstance(names[0], str) else ""
    # Models with a vision tower are of many architectures, and their text models of few.
    architecture = ARCHITECTURES.get(name) or BY_MODEL_TYPE.get(model_type)
    if architecture is None:
        if why := why_none(name):
            raise UnknownArchitecture(f"{source!r}: {name}: {why}; merge the adapter into the base model")
        raise UnknownArchitecture(
            f"{source!r}: unknown architecture {name!r}, and unknown model_type {model_type!r}; expected one of the "
            f"{len(ARCHITECTURES)} that are known, such as {', '.join(list(ARCHITECTURES)[:3])}; merge the adapter "
            "into the base model. If layers of the same names have the same meaning in a known architecture, convert "
            "without the base model, which only DoRA needs"
        )
    return architecture, text if nested is None else {**architecture.nested, **nested}


def modules_of(config: Mapping[str, Any], architecture: Architecture) -> frozenset[str]:
    """The LoRA modules that a text model has. T5 has a gate only in some of its versions."""
    known = {"feed_forward_proj": "relu", **architecture.defaults, **config}
    if architecture.family is T5 and not str(known["feed_forward_proj"]).startswith("gated"):
        return architecture.family.modules - {"mlp_gate"}
    return architecture.family.modules


def sizes_of(config: Mapping[str, Any], architecture: Architecture, problems: list[str]) -> Sizes | None:
    """The sizes in the `config` of a text model. What is wrong is added to `problems`; None if no size can be told."""
    sections = [(name, section) for name, section in config.items() if isinstance(section, dict)]
    config = {**config, **{f"{name}.{key}": value for name, section in sections for key, value in section.items()}}
    # With null the model derives the size. With a missing key it takes the default of its architecture.
    known = {key: value for key, value in {**architecture.defaults, **config}.items() if value is not None}
    names = {what: architecture.family.sizes.get(what, spellings) for what, spellings in _SPELLINGS.items()}
    before = len(problems)
    hidden = size_in(known, names["hidden"], problems)
    heads = size_in(known, names["heads"], problems)
    layers = size_in(known, names["layers"], problems)
    if len(problems) > before:
        return None
    if architecture.name in _MULTI_QUERY and not known.get("new_decoder_architecture"):
        # GPTBigCode and the first Falcons ignore num_kv_heads: one key-value head, or one for each head.
        kv_heads = 1 if config.get("multi_query", True) else heads
    else:
        kv_heads = size_in(known, names["kv_heads"], problems, missing=heads)
    four_times = hidden * size_in(known, ("intermediate_multiple_size",), problems, missing=4)
    missing = four_times if architecture.name in _FOUR_TIMES_HIDDEN else None
    mlp = size_in(known, names["mlp"], problems, missing)
    return Sizes(
        hidden=hidden,
        layers=layers,
        heads=heads,
        kv_heads=kv_heads,
        head_size=size_in(known, names["head_size"], problems, missing=hidden // heads),
        mlp=_lfm2_mlp(mlp, known, problems) if architecture.family is LFM2 else mlp,
    )


def _lfm2_mlp(size: int, config: Mapping[str, Any], problems: list[str]) -> int:
    """Two thirds of the `size` that config.json says, and that rounded up (transformers' `Lfm2MLP`)."""
    if not config.get("block_auto_adjust_ff_dim"):
        return size
    size = int(2 * size / 3)
    multiplier = config.get("block_ffn_dim_multiplier")
    if multiplier is None:
        return size
    if not isinstance(multiplier, (int, float)) or not 0 < multiplier < 1 << 10:
        problems.append(f"'block_ffn_dim_multiplier' is {multiplier!r}, expected a positive number")
        return size
    multiple = size_in(config, ("block_multiple_of",), problems, missing=1)
    return -(-int(multiplier * size) // multiple) * multiple
