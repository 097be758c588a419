# SPDX-FileCopyrightText: the tritonlora authors
# SPDX-License-Identifier: Apache-2.0
"""Read adapter_config.json: keep the fields that decide the weights, and refuse other fields unless they are harmless.

Rule: an unknown field is refused unless it is empty, so that no feature of a later PEFT is dropped silently.
Source: PEFT src/peft/tuners/lora/{config,layer}.py.
"""

from __future__ import annotations

import math
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from tritonlora import strict_json
from tritonlora.errors import InvalidAdapter, UnsupportedAdapter, one_message
from tritonlora.peft.patterns import matches, parse


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
    base_model_class: str = ""  # "LlamaForCausalLM"; PEFT writes it if no task_type was given
    task_type: str = ""  # "CAUSAL_LM"
    target_modules: str | tuple[str, ...] = ()  # a regular expression (str), or names
    exclude_modules: str | tuple[str, ...] = ()
    layers_to_transform: tuple[int, ...] = ()  # empty: all

    def stated(self, paths: Sequence[str]) -> dict[str, Stated]:
        """The ranks and alphas of the modules at `paths` ("model.layers.0.self_attn.q_proj").

        Raises InvalidAdapter if there are too many patterns to match them within seconds.
        """
        ranks, alphas = matches(self.rank_pattern, paths), matches(self.alpha_pattern, paths)
        return {
            path: Stated(tuple(ranks.get(path, [self.r])), tuple(alphas.get(path, [self.lora_alpha]))) for path in paths
        }

    def scaling(self, rank: int, alpha: float) -> float:
        """The factor that PEFT multiplies B @ A by: alpha / r, or alpha / sqrt(r) with rsLoRA."""
        return alpha / math.sqrt(rank) if self.use_rslora else alpha / rank


@dataclass(frozen=True, slots=True)
class Stated:
    """The ranks and alphas that the config gives one module, in the file's order. PEFT uses the first of each.

    There are several if several patterns match. PEFT may save patterns in another order than training used.
    """

    ranks: tuple[int, ...]
    alphas: tuple[float, ...]


def parse_config(text: bytes) -> AdapterConfig:
    """Read adapter_config.json.

    Raises InvalidAdapter if the file is broken, else UnsupportedAdapter. Either error names every field that is
    malformed or cannot be converted.
    """
    try:
        raw, repeated = strict_json.parse(text, parse_int=_integer, parse_float=_number)
    except (ValueError, RecursionError) as error:
        raise InvalidAdapter(f"adapter_config.json is not JSON; save the adapter again: {error}") from error
    if not isinstance(raw, dict):
        raise InvalidAdapter("adapter_config.json is not a JSON object; save the adapter again")
    peft_type = raw.get("peft_type", "LORA")
    if peft_type != "LORA":
        if str(peft_type).upper() == "LORA":
            raise InvalidAdapter(
                f"peft_type is {_short(peft_type)}, which PEFT writes in capitals; set it to 'LORA' in "
                "adapter_config.json"
            )
        raise UnsupportedAdapter(
            f"peft_type is {_short(peft_type)}; TensorRT-LLM takes only 'LORA': {_remedy_for_type(peft_type)}"
        )
    broken = [*(f"{key!r} occurs more than once" for key in repeated), *_broken_fields(raw)]
    refused = _refused_fields(raw)
    if broken:
        raise InvalidAdapter(
            one_message("adapter_config.json is malformed; save the adapter again", [*broken, *refused])
        )
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
        task_type=str(raw.get("task_type") or ""),
        target_modules=_names(raw.get("target_modules")),
        exclude_modules=_names(raw.get("exclude_modules")),
        layers_to_transform=_layers(raw.get("layers_to_transform")),
    )


# Fields that choose the layers with a LoRA (the tensors show these, too), that matter only in training, or that the
# dataclass above holds. `modules_to_save` is here because it saves tensors, and these are refused by their names.
_HARMLESS = frozenset(
    {
        *("peft_type", "task_type", "peft_version", "auto_mapping", "base_model_name_or_path", "revision"),
        *("r", "lora_alpha", "use_rslora", "use_dora", "fan_in_fan_out", "rank_pattern", "alpha_pattern"),
        *("target_modules", "exclude_modules", "layers_to_transform", "layers_pattern", "modules_to_save"),
        *("inference_mode", "lora_dropout", "ensure_weight_tying", "megatron_core", "runtime_config"),
        *("eva_config", "corda_config", "lora_ga_config", "qalora_group_size"),
    }
)
# Other values of peft_type -> the remedy. PEFT can approximate the second group by LoRA (`supports_lora_conversion` in
# its layers). The third group chooses between adapters for each token or task.
_TYPES: tuple[tuple[frozenset[str], str], ...] = (
    (
        frozenset(
            {
                *("PROMPT_TUNING", "MULTITASK_PROMPT_TUNING", "P_TUNING", "PREFIX_TUNING", "CPT", "ADAPTION_PROMPT"),
                "CARTRIDGE",
            }
        ),
        "it is a trained prompt, not weights of layers, so it cannot be merged either; train a LoRA adapter",
    ),
    (
        frozenset(
            {
                *("LOHA", "LOKR", "VERA", "RANDLORA", "FOURIERFT", "C3A", "DELORA", "WAVEFT", "MISS"),
                *("VBLORA", "GRALORA", "PSOFT", "TINYLORA", "UNILORA"),
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
_MODIFIED_BASE_INITS = ("pissa", "olora", "corda", "lora_ga")
MERGE = "merge the adapter into the base model"
_REFUSED: Mapping[str, str] = {
    "bias": f"the engine does not take trained biases; {MERGE}, or train again with bias='none'",
    "lora_bias": f"the engine does not take a bias of lora_B; {MERGE}, or train again with lora_bias=False",
    "loftq_config": "LoftQ replaced the base weights by quantised ones; if the engine is built from the weights saved "
    "with LoftQ, take this out of adapter_config.json, else train on a quantised base without LoftQ (QLoRA)",
    "layer_replication": f"the engine's layers are not those of the adapter; {MERGE}",
    "target_parameters": f"LoRA on bare parameters (expert layers) cannot be sent; {MERGE}, or train again with "
    "`target_modules` that name other layers only (`exclude_modules` does not exclude these)",
    "trainable_token_indices": f"trained token embeddings cannot be sent; {MERGE}",
    "alora_invocation_tokens": "activated LoRA begins inside a prompt, and the engine applies LoRA to all of it; "
    "train again without it",
    "use_qalora": f"the input of lora_A is pooled by groups; {MERGE}",
    "megatron_config": "Megatron's parallel layers are split otherwise; convert the adapter to plain PEFT first",
    "arrow_config": "Arrow routes between adapters inside the model; convert each of them on its own",
    "use_bdlora": f"block-diagonal LoRA has other tensors; {MERGE}",
    "kasa_config": f"KaSA has other tensors; {MERGE}",
    "velora_config": f"VeLoRA is not verified here; {MERGE}",
    "monteclora_config": f"MonteCLoRA has other tensors; {MERGE}",
}


def _refused_fields(raw: Mapping[str, Any]) -> list[str]:
    refused = []
    for key, value in raw.items():
        if key == "init_lora_weights":
            refused += _refused_init(value)
        elif key in _HARMLESS or _is_empty(value) or (key == "bias" and value == "none"):
            continue
        elif key in _REFUSED:
            refused.append(f"{key!r} is {_short(value)}: {_REFUSED[key]}")
        else:
            refused.append(
                f"{key!r} is {_short(value)}: this field is not known here, and it may change the weights; if it "
                f"matters only in training, take it out of adapter_config.json, else {MERGE}"
            )
    return refused


def _is_empty(value: object) -> bool:
    """Whether the value means "not used". The number 0 may mean something, so it does not."""
    return value is None or value is False or value in ([], {}, "")


def _remedy_for_type(peft_type: object) -> str:
    return next(
        (remedy for types, remedy in _TYPES if str(peft_type).upper() in types),
        "merge the adapter into the base model, or train a LoRA adapter",
    )


def _refused_init(value: object) -> list[str]:
    if value is None or str(value).lower() in _UNMODIFIED_BASE_INITS:
        return []
    if value == "loftq":
        return [
            "'init_lora_weights' is 'loftq', which replaced the base weights by quantised ones; merge the adapter into "
            "the quantised weights, or train on a quantised base without LoftQ (QLoRA)"
        ]
    changed = "changed" if str(value).startswith(_MODIFIED_BASE_INITS) else "may have changed"
    return [
        f"'init_lora_weights' is {_short(value)}, which {changed} the base weights; convert the adapter to a plain "
        "LoRA with PEFT's save_pretrained(path_initial_model_for_weight_conversion=...)"
    ]


def _broken_fields(raw: Mapping[str, Any]) -> list[str]:
    problems = []
    for names, is_right, expected in _EXPECTED:
        problems += [
            f"{name!r} is {_short(raw[name])}, expected {expected}"
            for name in names
            if name in raw and not is_right(raw[name])
        ]
    for name, is_value, expected in (
        ("rank_pattern", _is_rank, "a positive integer"),
        ("alpha_pattern", _is_number, "a number"),
    ):
        pattern = raw.get(name) or {}
        if not isinstance(pattern, dict):
            problems.append(f"{name!r} is {_short(pattern)}, expected an object")
            continue
        if len(pattern) > _MAX_PATTERNS:
            problems.append(f"{name!r} has {len(pattern)} patterns, expected at most {_MAX_PATTERNS}")
            continue
        characters = sum(map(len, pattern))
        if characters > _MAX_CHARACTERS:
            problems.append(f"{name!r} has patterns of {characters} characters, expected at most {_MAX_CHARACTERS}")
            continue
        problems += [
            f"{name}[{key!r}] is {_short(v)}, expected {expected}" for key, v in pattern.items() if not is_value(v)
        ]
        problems += [f"{name} has {_short(key)}: {error}" for key in pattern if (error := _pattern_error(key))]
    return problems


def _integer(digits: str) -> int | float:
    """The integer, or infinity if it has more digits than Python reads. Every field refuses infinity."""
    return int(digits) if len(digits) <= sys.int_info.str_digits_check_threshold else float(digits)


def _number(digits: str) -> int | float:
    """The number. "8.0" gives the integer 8, since some trainers write integers so."""
    number = float(digits)
    return int(number) if number.is_integer() and abs(number) < 1 << 53 else number


def _base_model_class(auto_mapping: object) -> str:
    name = auto_mapping.get("base_model_class") if isinstance(auto_mapping, dict) else None
    return name if isinstance(name, str) else ""


# No model has as many linear layers, and a layer has at most one pattern of its own.
_MAX_PATTERNS = 4096
_MAX_CHARACTERS = 64 * _MAX_PATTERNS  # parsing takes up to 15 us per character


def _pattern_error(key: str) -> str:
    try:
        parse(key)
    except ValueError as error:
        return str(error)
    return ""


def _is_rank(value: object) -> bool:
    return type(value) is int and 0 < value < 1 << 31


def _is_number(value: object) -> bool:
    return isinstance(value, (int, float)) and type(value) is not bool and abs(value) < 1e30  # not NaN, nor infinity


def _is_switch(value: object) -> bool:
    return value is None or type(value) is bool


def _is_names(value: object) -> bool:
    return (
        value is None or isinstance(value, str) or (isinstance(value, list) and all(isinstance(v, str) for v in value))
    )


_MAX_NAME = 4096  # characters: Linux' longest path


def _is_name(value: object) -> bool:
    return value is None or (isinstance(value, str) and len(value) <= _MAX_NAME)


def _is_layers(value: object) -> bool:
    return value is None or all(type(layer) is int for layer in (value if isinstance(value, list) else [value]))


def _names(value: str | list[str] | None) -> str | tuple[str, ...]:
    return value if isinstance(value, str) else tuple(value or ())


def _layers(value: int | list[int] | None) -> tuple[int, ...]:
    return () if value is None else tuple(value) if isinstance(value, list) else (value,)


# (fields that decide the weights or the layers, check of a value, the expected value in words)
_EXPECTED: tuple[tuple[tuple[str, ...], Callable[[object], bool], str], ...] = (
    (("r",), _is_rank, "a positive integer"),
    (("lora_alpha",), _is_number, "a number"),
    (("use_rslora", "use_dora", "fan_in_fan_out"), _is_switch, "true or false"),
    (("target_modules", "exclude_modules", "layers_pattern", "modules_to_save"), _is_names, "names in a list, or one"),
    (("layers_to_transform",), _is_layers, "numbers in a list, or one"),
    (("base_model_name_or_path",), _is_name, f"a name or a path of at most {_MAX_NAME} characters"),
)


def _short(value: object) -> str:
    text = repr(value)
    return text if len(text) <= 80 else text[:77] + "..."
