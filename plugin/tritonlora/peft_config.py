# SPDX-FileCopyrightText: the tritonlora authors
# SPDX-License-Identifier: Apache-2.0
"""adapter_config.json: the fields that decide the weights, and a reason to refuse each of the others.

Source: PEFT src/peft/tuners/lora/{config,layer}.py. A field that is neither known to be harmless nor empty is refused,
so that a feature of a later PEFT cannot be dropped in silence.
"""

from __future__ import annotations

import json
import math
import re
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from tritonlora.errors import InvalidAdapter, UnsupportedAdapter, one_message


@dataclass(frozen=True, slots=True)
class AdapterConfig:
    """The fields of adapter_config.json that conversion needs."""

    base_model_name_or_path: str
    r: int
    lora_alpha: float
    use_rslora: bool = False
    use_dora: bool = False
    fan_in_fan_out: bool = False
    rank_pattern: Mapping[str, int] = field(default_factory=dict)
    alpha_pattern: Mapping[str, float] = field(default_factory=dict)
    base_model_class: str = ""  # "LlamaForCausalLM", which PEFT notes where it was given no task_type

    def rank_of(self, path: str) -> int:
        """The rank that PEFT gives the module `path` ("model.layers.0.self_attn.q_proj")."""
        key = _first_match(self.rank_pattern, path)
        return self.r if key is None else self.rank_pattern[key]

    def scaling_of(self, path: str, rank: int) -> float:
        """What PEFT multiplies B @ A with: alpha / r, or alpha / sqrt(r) with rsLoRA."""
        key = _first_match(self.alpha_pattern, path)
        alpha = self.lora_alpha if key is None else self.alpha_pattern[key]
        return alpha / math.sqrt(rank) if self.use_rslora else alpha / rank


def parse_config(text: bytes) -> AdapterConfig:
    """Read adapter_config.json.

    Raises InvalidAdapter where it is broken, else UnsupportedAdapter; either names every field that is malformed or
    cannot be carried over.
    """
    repeated: list[str] = []

    def as_dict(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        found = dict(pairs)
        repeated.extend(key for key, count in Counter(key for key, _ in pairs).items() if count > 1)
        return found

    try:
        raw = json.loads(text.decode(), object_pairs_hook=as_dict)
    except (ValueError, RecursionError) as error:
        raise InvalidAdapter(f"adapter_config.json is not JSON; save the adapter again: {error}") from error
    if not isinstance(raw, dict):
        raise InvalidAdapter("adapter_config.json is not a JSON object")
    peft_type = raw.get("peft_type", "LORA")
    if peft_type != "LORA":
        raise UnsupportedAdapter(
            f"peft_type is {_short(peft_type)}; TensorRT-LLM takes only 'LORA': {_remedy_for_type(peft_type)}"
        )
    broken = [*(f"{key!r} occurs more than once" for key in repeated), *_broken_fields(raw)]
    refused = _refused_fields(raw)
    if broken:
        raise InvalidAdapter(one_message("adapter_config.json is malformed", [*broken, *refused]))
    if refused:
        raise UnsupportedAdapter(one_message("the adapter uses what cannot be carried to the engine", refused))
    return AdapterConfig(
        base_model_name_or_path=str(raw.get("base_model_name_or_path") or ""),
        r=raw.get("r", 8),
        lora_alpha=raw.get("lora_alpha", 8),
        use_rslora=bool(raw.get("use_rslora")),
        use_dora=bool(raw.get("use_dora")),
        fan_in_fan_out=bool(raw.get("fan_in_fan_out")),
        rank_pattern=raw.get("rank_pattern") or {},
        alpha_pattern=raw.get("alpha_pattern") or {},
        base_model_class=_base_model_class(raw.get("auto_mapping")),
    )


# Fields that choose which layers have a LoRA (the tensors say it too), that matter in training alone, or that the
# dataclass above holds. `modules_to_save` is here because what it saved are tensors, and those are refused by name.
_HARMLESS = frozenset(
    {
        *("peft_type", "task_type", "peft_version", "auto_mapping", "base_model_name_or_path", "revision"),
        *("r", "lora_alpha", "use_rslora", "use_dora", "fan_in_fan_out", "rank_pattern", "alpha_pattern"),
        *("target_modules", "exclude_modules", "layers_to_transform", "layers_pattern", "modules_to_save"),
        *("inference_mode", "lora_dropout", "ensure_weight_tying", "megatron_core", "runtime_config"),
        *("loftq_config", "eva_config", "corda_config", "lora_ga_config", "qalora_group_size"),
    }
)
# What can be done with the other kinds. PEFT can approximate those of the second group by LoRA
# (`supports_lora_conversion` in its layers), and those of the third choose between adapters for each token or task.
_TYPES: tuple[tuple[frozenset[str], str], ...] = (
    (
        frozenset(
            {
                *("PROMPT_TUNING", "MULTITASK_PROMPT_TUNING", "P_TUNING", "PREFIX_TUNING", "CPT", "ADAPTION_PROMPT"),
                "CARTRIDGE",
            }
        ),
        "it is a trained prompt, not weights of layers, so that it cannot be merged either; train a LoRA adapter",
    ),
    (
        frozenset(
            {
                *("LOHA", "LOKR", "VERA", "RANDLORA", "FOURIERFT", "SHIRA", "C3A", "DELORA", "WAVEFT", "MISS"),
                *("VBLORA", "HIRA", "GRALORA", "PSOFT", "TINYLORA", "UNILORA"),
            }
        ),
        "approximate it by LoRA with PEFT's save_as_lora, or merge the adapter into the base model",
    ),
    (
        frozenset({"XLORA", "POLY"}),
        "it mixes several adapters inside the model; convert each of them on its own, or train a LoRA adapter",
    ),
)
_UNMODIFIED_BASE_INITS = ("true", "false", "gaussian", "orthogonal", "eva", "mica")
_MERGE = "merge the adapter into the base model instead"
_REFUSED: Mapping[str, str] = {
    "bias": "the engine has no place for trained biases; train with bias='none'",
    "lora_bias": "the engine has no place for a bias of lora_B; train with lora_bias=False",
    "layer_replication": f"the engine's layers are not those of the adapter; {_MERGE}",
    "target_parameters": f"LoRA on bare parameters (expert layers) cannot be sent; {_MERGE}",
    "trainable_token_indices": f"trained token embeddings cannot be sent; {_MERGE}",
    "alora_invocation_tokens": "activated LoRA switches on inside a prompt, and the engine applies LoRA to all of it; "
    "train without it",
    "use_qalora": f"the input of lora_A is pooled by groups; {_MERGE}",
    "megatron_config": "Megatron's parallel layers are split otherwise; convert the adapter to plain PEFT first",
    "arrow_config": "Arrow routes between adapters inside the model; convert each of them on its own",
    "use_bdlora": f"block-diagonal LoRA has other tensors; {_MERGE}",
    "kasa_config": f"KaSA has other tensors; {_MERGE}",
    "velora_config": f"VeLoRA is not verified here; {_MERGE}",
    "monteclora_config": f"MonteCLoRA has other tensors; {_MERGE}",
}


def _refused_fields(raw: Mapping[str, Any]) -> list[str]:
    refused = []
    for key, value in raw.items():
        if key == "init_lora_weights":
            refused += _refused_init(value)
        elif key in _HARMLESS or value in (None, False, "none") or value in ([], {}, ""):
            continue
        elif key in _REFUSED:
            refused.append(f"{key!r} is {_short(value)}: {_REFUSED[key]}")
        else:
            refused.append(f"{key!r} is {_short(value)}: not a field that is known here, and it may change the weights")
    return refused


def _remedy_for_type(peft_type: object) -> str:
    return next(
        (remedy for types, remedy in _TYPES if isinstance(peft_type, str) and peft_type in types),
        "merge the adapter into the base model, or train a LoRA adapter",
    )


def _refused_init(value: object) -> list[str]:
    if value is None or str(value).lower() in _UNMODIFIED_BASE_INITS:
        return []
    if value == "loftq":
        return [
            "'init_lora_weights' is 'loftq', which replaced the base weights by quantised ones; merge the adapter into "
            "those, or train on a quantised base without LoftQ (QLoRA)"
        ]
    return [
        f"'init_lora_weights' is {_short(value)}, which changed the base weights; convert the adapter to a plain LoRA "
        "with PEFT's save_pretrained(path_initial_model_for_weight_conversion=...)"
    ]


def _broken_fields(raw: Mapping[str, Any]) -> list[str]:
    problems = []
    if not _is_rank(raw.get("r", 8)):
        problems.append(f"'r' is {_short(raw['r'])}, expected a positive integer")
    if not _is_number(raw.get("lora_alpha", 8)):
        problems.append(f"'lora_alpha' is {_short(raw['lora_alpha'])}, expected a number")
    problems += [
        f"{name!r} is {_short(raw[name])}, expected true or false"
        for name in ("use_rslora", "use_dora", "fan_in_fan_out")
        if raw.get(name) not in (None, True, False)
    ]
    for name, is_value in (("rank_pattern", _is_rank), ("alpha_pattern", _is_number)):
        pattern = raw.get(name) or {}
        if not isinstance(pattern, dict):
            problems.append(f"{name!r} is {_short(pattern)}, expected an object")
            continue
        problems += [f"{name}[{key!r}] is {_short(v)}" for key, v in pattern.items() if not is_value(v)]
        problems += [f"{name} has {_short(key)}: {error}" for key in pattern if (error := _regex_error(key))]
        if sum(map(_ways, pattern)) > _MAX_WAYS:
            problems.append(f"{name} has too many alternatives and repetitions in its regular expressions")
    return problems


def _base_model_class(auto_mapping: object) -> str:
    name = auto_mapping.get("base_model_class") if isinstance(auto_mapping, dict) else None
    return name if isinstance(name, str) else ""


def _first_match(patterns: Mapping[str, object], path: str) -> str | None:
    # PEFT's rule (`get_pattern_key` in src/peft/utils/other.py): the first that matches the end of the path, from a dot
    # on; the pattern is a regular expression.
    return next((key for key in patterns if re.match(rf"(.*\.)?({key})$", path)), None)


# A regular expression can take for ever to fail. This bounds the ways to try one on the name of a layer, which has less
# than 64 characters as a rule: a repetition takes some of them, an option is taken or not, and a group is one of its
# alternatives. Repeated groups, with which the ways grow exponentially, are refused, and flags, which could hide them.
_MAX_WAYS = 1_000_000
_REPEATED_GROUP = re.compile(r"\)[*+{]")
_FLAGS = re.compile(r"\(\?[a-zA-Z-]")


def _ways(pattern: str) -> float:
    repetitions = min(len(re.findall(r"[*+{]", pattern)), 20)
    alternatives = math.prod(min(group.count("|"), 1000) + 1 for group in re.split(r"[()]", pattern)[:50])
    options = min(pattern.count("?"), 50)
    return float(64**repetitions / math.factorial(repetitions) * 2**options * alternatives)


def _regex_error(key: str) -> str:
    if len(key) > 1000 or _REPEATED_GROUP.search(key) or _FLAGS.search(key):
        return "a repeated group, flags, or too long"
    try:
        re.compile(rf"(.*\.)?({key})$")
    except (re.error, OverflowError, RecursionError) as error:
        return f"not a regular expression ({error})"
    return ""


def _is_rank(value: object) -> bool:
    return type(value) is int and 0 < value < 1 << 31


def _is_number(value: object) -> bool:
    return type(value) in (int, float) and math.isfinite(value) and abs(value) < 1e30  # type: ignore[arg-type]


def _short(value: object) -> str:
    text = repr(value)
    return text if len(text) <= 80 else text[:77] + "..."
