# SPDX-FileCopyrightText: the tritonlora authors
# SPDX-License-Identifier: Apache-2.0
"""Read an engine's profile, the facts that decide which adapters it accepts: dims, dtype, modules, rank, parallelism.

It is read from the config.json of a TensorRT-LLM engine (`trtllm-build`, v0.9 and later) or from that of a Hugging
Face model. This file does not import torch.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from tritonlora.architectures.lora_modules import BY_NAME, ModuleDims
from tritonlora.engine import hf_config
from tritonlora.engine.model_sizes import MODULE_DIMS, Sizes, module_dims, size_in
from tritonlora.errors import EngineMismatch, one_message
from tritonlora.serving.dtypes import LORA_DTYPES
from tritonlora.serving.file_version import read_file

_MAX_CONFIG_BYTES = 16 << 20


@dataclass(frozen=True, slots=True)
class EngineProfile:
    """The facts about one engine that LoRA conversion, cache planning and the CPU engine need."""

    source: str  # the path that the profile was read from, for messages
    architecture: str  # "LlamaForCausalLM"
    dtype: str  # of lora_weights: "bfloat16", "float16" or "float32"
    num_layers: int
    modules: Mapping[str, ModuleDims]  # module name -> full dims, only those the engine has LoRA for; empty: no LoRA
    max_lora_rank: int | None  # None: not known, for it is the engine's and not the model's
    tp_size: int = 1
    pp_size: int = 1
    max_beam_width: int = 1
    num_heads: int = 0  # 0: not known, and fused attention layers cannot be split
    num_kv_heads: int = 0
    head_size: int = 0
    mlp_width: int = 0  # width of the model's MLP layers, if the engine's LoRA has a larger one; else 0
    reports: tuple[tuple[str, str], ...] = ()  # (problem, remedy) of each report that LoRA fails in such an engine
    lora_plugin_dtype: str | None = None  # dtype of the engine's lora_plugin, if it differs from the model's

    @property
    def what(self) -> str:
        """The name for messages, "the engine" or "the base model". Only an engine has a max_lora_rank."""
        return "the engine" if self.max_lora_rank is not None else "the base model"

    @property
    def rank_limit(self) -> int:
        """`max_lora_rank`; if it is not known, the largest number in an int32 of lora_config."""
        return (1 << 31) - 1 if self.max_lora_rank is None else self.max_lora_rank

    def layer_dims(self, name: str) -> tuple[int, int]:
        """(in, out) of the model's layer for the LoRA module `name`, which is one of `modules`.

        MLP layers of the first Qwen are half as wide as intermediate_size (TensorRT-LLM
        tensorrt_llm/models/qwen/model.py). The engine's LoRA has the whole intermediate_size
        (cpp/tensorrt_llm/runtime/gptJsonConfig.cpp).
        """
        dims = self.modules[name]
        inward, outward = MODULE_DIMS[name]
        return (
            self.mlp_width if self.mlp_width and inward == "mlp" else dims.in_features,
            self.mlp_width if self.mlp_width and outward == "mlp" else dims.out_features,
        )

    def faults(self) -> list[tuple[str, str]]:
        """(problem, remedy) of each fault of the engine itself. No adapter can be served with a fault."""
        faults = []
        if self.lora_plugin_dtype is not None:
            problem = (
                f"the engine's lora_plugin is {self.lora_plugin_dtype} and its model {self.dtype}: it would read the "
                "weights of every adapter as another type"
            )
            faults.append((problem, "build the engine again with --lora_plugin auto"))
        if self.num_layers % self.pp_size:
            problem = (
                f"the engine's {self.num_layers} layers do not divide among its {self.pp_size} pipeline-parallel "
                "ranks: TensorRT-LLM loses the LoRA of some layers"
            )
            faults.append((problem, "build the engine with a pp_size that divides its layers"))
        return faults


def load_profile(path: Path, *, dtype: str | None = None) -> EngineProfile:
    """The profile of a TensorRT-LLM engine or a Hugging Face model: `path` is its directory or its config.json.

    `dtype` is the dtype of the engine to be built from a Hugging Face model, by default the model's own. It has no
    effect on an engine. Raises EngineMismatch if `path` is neither an engine nor a model.
    """
    config = read_config_json(_config_file(path))
    if "pretrained_config" in config or "builder_config" in config or "build_config" in config:
        return profile_from_engine(config, str(path))
    return profile_from_hf(config, str(path), dtype=dtype)


def read_config_json(file: Path) -> dict[str, Any]:
    """The content of a config.json; EngineMismatch if it cannot be read, or is no JSON object."""
    try:
        if file.stat().st_size > _MAX_CONFIG_BYTES:
            raise EngineMismatch(f"{str(file)!r} is larger than any config.json; expected at most 16 MiB")
        config = json.loads(read_file(file))
    except OSError as error:
        raise EngineMismatch(f"cannot read {str(file)!r}: {error.strerror}") from error
    except (ValueError, RecursionError) as error:
        raise EngineMismatch(f"{str(file)!r} is not JSON: {error}") from error
    if not isinstance(config, dict):
        raise EngineMismatch(f"{str(file)!r} is not a JSON object")
    return config


def profile_from_hf(
    config: Mapping[str, Any],
    source: str,
    *,
    max_lora_rank: int | None = None,
    target_modules: Iterable[str] | None = None,
    dtype: str | None = None,
) -> EngineProfile:
    """The profile of a Hugging Face model's config.json.

    `target_modules` are names of LoRA modules ("attn_q"); None stands for all that the architecture has, fused layers
    taken apart. `dtype` overrides the model's. Raises EngineMismatch, naming everything that is missing or unknown;
    UnknownArchitecture where that is the architecture.
    """
    architecture, text = hf_config.text_model(config, source)
    problems: list[str] = []
    sizes = hf_config.sizes_of(text, architecture, problems)
    found = dtype or next((c[k] for c in (text, config) for k in ("dtype", "torch_dtype") if c.get(k)), None)
    if found not in LORA_DTYPES:
        problems.append(f"dtype is {found!r}, expected one of {', '.join(LORA_DTYPES)}; give it explicitly")
    targets = sorted(hf_config.modules_of(text, architecture) if target_modules is None else set(target_modules))
    problems += [
        f"unknown LoRA module {target!r}; known: {', '.join(BY_NAME)}" for target in targets if target not in BY_NAME
    ]
    if sizes is None or problems:
        raise EngineMismatch(one_message(f"{source!r} does not describe the model", problems))
    return EngineProfile(
        source=source,
        architecture=architecture.name,
        dtype=str(found),
        num_layers=sizes.layers,
        modules=module_dims(targets, sizes, dense_in=sizes.heads * sizes.head_size),
        max_lora_rank=max_lora_rank,
        num_heads=sizes.heads,
        num_kv_heads=sizes.kv_heads,
        head_size=sizes.head_size,
        mlp_width=_narrow_mlp(architecture.name, sizes),
    )


def profile_from_engine(config: Mapping[str, Any], source: str) -> EngineProfile:
    """The profile of a TensorRT-LLM engine's config.json (`pretrained_config` and `build_config`, v0.9 and later).

    An engine without the LoRA plugin has no `modules`. Raises EngineMismatch, naming everything missing or unknown.
    Source: TensorRT-LLM cpp/tensorrt_llm/runtime/gptJsonConfig.cpp.
    """
    pretrained, build = config.get("pretrained_config"), config.get("build_config")
    if not isinstance(pretrained, dict) or not isinstance(build, dict):
        raise EngineMismatch(
            f"{source!r} is an engine of an unknown layout (version {config.get('version', 'not given')!r}): expected "
            "`pretrained_config` and `build_config`; build the engine with trtllm-build of TensorRT-LLM v0.9 or later"
        )
    problems: list[str] = []
    mapping = _section(pretrained, "mapping", "pretrained_config", problems)
    # The first releases with pretrained_config kept the two fields there.
    lora = _section(build, "lora_config", "build_config", problems) if "lora_config" in build else pretrained
    plugins = _section(build, "plugin_config", "build_config", problems)
    hidden = size_in(pretrained, ("hidden_size",), problems)
    heads = size_in(pretrained, ("num_attention_heads",), problems)
    sizes = Sizes(
        hidden=hidden,
        layers=size_in(pretrained, ("num_hidden_layers",), problems),
        heads=heads,
        kv_heads=size_in(pretrained, ("num_key_value_heads",), problems, missing=heads),
        head_size=size_in(pretrained, ("head_size",), problems, missing=hidden // max(heads, 1)),
        mlp=size_in(pretrained, ("intermediate_size",), problems, missing=4 * hidden),
        experts=_experts(pretrained, problems),
    )
    dtype = pretrained.get("dtype")
    if dtype not in LORA_DTYPES:
        problems.append(f"pretrained_config.dtype is {dtype!r}, expected one of {', '.join(LORA_DTYPES)}")
    # Without LoRA, trtllm-build writes null or leaves the key out. The other two fields then have no meaning.
    plugin = plugins.get("lora_plugin")
    has_lora = bool(plugin)
    targets = _engine_targets(lora.get("lora_target_modules"), problems) if has_lora else []
    tp_size = size_in(mapping, ("tp_size",), problems, missing=1)
    # Each rank has one key-value head at least, and createLoraModules multiplies what each has.
    repeated = replace(sizes, kv_heads=max(sizes.kv_heads // max(tp_size, 1), 1) * tp_size)
    profile = EngineProfile(
        source=source,
        architecture=_engine_architecture(pretrained),
        dtype=str(dtype),
        num_layers=sizes.layers,
        # createLoraModules takes attn_dense to be hidden x hidden, whatever the heads are.
        modules=module_dims(targets, repeated, dense_in=sizes.hidden),
        max_lora_rank=size_in(lora, ("max_lora_rank",), problems) if has_lora else 0,
        tp_size=tp_size,
        pp_size=size_in(mapping, ("pp_size",), problems, missing=1),
        max_beam_width=size_in(build, ("max_beam_width",), problems, missing=1),
        num_heads=sizes.heads,
        num_kv_heads=sizes.kv_heads,
        head_size=sizes.head_size,
        mlp_width=_narrow_mlp(_engine_architecture(pretrained), sizes),
        reports=tuple(_reports(pretrained, build, targets)),
        lora_plugin_dtype=plugin if isinstance(plugin, str) and plugin not in ("", "auto", dtype) else None,
    )
    if problems:
        raise EngineMismatch(
            one_message(f"{source!r} does not describe an engine that LoRA can be planned for", problems)
        )
    return profile


def _engine_architecture(pretrained: Mapping[str, Any]) -> str:
    name = str(pretrained.get("architecture", ""))
    # Releases that call every GPT by this name call JAIS by it, too, which is the one with a gate.
    if name == "GPTForCausalLM" and pretrained.get("hidden_act") == "swiglu":
        return "JAISLMHeadModel"
    # All Qwens have one class in TensorRT-LLM, and qwen_type tells them apart; "qwen" is the first.
    return "QWenLMHeadModel" if name.startswith("QWen") and pretrained.get("qwen_type") == "qwen" else name


# The docs' page Compatibility says what is known of these, and of others that `check` cannot see.
ENCODER_DECODER = (
    "it is an encoder-decoder's, in which TensorRT-LLM's C++ runtime was reported not to apply LoRA: responses may be "
    "the base model's (TensorRT-LLM issues 2282 and 10258)",
    "compare responses with PEFT's before you serve adapters, or build an engine of a merged model",
)
_NO_KV_CACHE = (
    "it was built without a KV cache, with which LoRA was reported to crash the server (TensorRT-LLM issue 2543)",
    "build it with --kv_cache_type paged",
)
SPECULATIVE = (
    "model.yaml has a speculative_config, with which LoRA failed before TensorRT-LLM's pull request 12661 of April "
    "2026 (issue 12617)",
    "take it out, unless your TensorRT-LLM has that pull request",
)
_ENCODER_DECODERS = frozenset({"DecoderModel", "EncoderModel", "WhisperEncoder"})  # engines' names for them


def _reports(
    pretrained: Mapping[str, Any], build: Mapping[str, Any], targets: Iterable[str]
) -> Iterator[tuple[str, str]]:
    if pretrained.get("architecture") in _ENCODER_DECODERS or any(name.startswith("cross_attn") for name in targets):
        yield ENCODER_DECODER
    if str(build.get("kv_cache_type")).lower() == "disabled":
        yield _NO_KV_CACHE


def _narrow_mlp(architecture: str, sizes: Sizes) -> int:
    return sizes.mlp // 2 if architecture == "QWenLMHeadModel" else 0


def _config_file(path: Path) -> Path:
    if path.is_file():
        return path
    if not path.is_dir():
        raise EngineMismatch(f"{str(path)!r} is neither a directory nor a config.json")
    # An encoder-decoder engine is a directory with one engine for each; LoRA tensors go to the decoder's.
    for file in (path / "config.json", path / "decoder" / "config.json"):
        if file.exists():
            return file
    raise EngineMismatch(
        f"there is no config.json in {str(path)!r}; give an engine's or a Hugging Face model's directory"
    )


def _engine_targets(names: object, problems: list[str]) -> list[str]:
    if not isinstance(names, Sequence) or isinstance(names, str) or not names:
        problems.append(
            "the engine has the LoRA plugin but build_config.lora_config.lora_target_modules is "
            f"{names!r}; build it with --lora_target_modules"
        )
        return []
    unknown = [name for name in names if not isinstance(name, str) or name not in BY_NAME]
    problems += [
        f"unknown LoRA module {name!r} in lora_target_modules; known: {', '.join(BY_NAME)}" for name in unknown
    ]
    targets = {name for name in names if name not in unknown}
    # `get_missing_qkv_modules` in TensorRT-LLM tensorrt_llm/lora_manager.py: one of them brings in the others.
    for trio in (("attn_q", "attn_k", "attn_v"), ("cross_attn_q", "cross_attn_k", "cross_attn_v")):
        if targets.intersection(trio):
            targets.update(trio)
    return sorted(targets)


def _experts(pretrained: Mapping[str, Any], problems: list[str]) -> int:
    """The number of experts: 0 for a model that has none, which newer releases write out and older ones leave out."""
    moe = pretrained.get("moe")
    section, key = (moe, "num_experts") if isinstance(moe, dict) else (pretrained, "moe_num_experts")
    return 0 if section.get(key) == 0 else size_in(section, (key,), problems, missing=0)


def _section(config: Mapping[str, Any], key: str, where: str, problems: list[str]) -> Mapping[str, Any]:
    value = config.get(key)
    if value is None:
        return {}
    if not isinstance(value, dict):
        problems.append(f"{where}.{key} is {value!r}, expected an object")
        return {}
    return value
