# SPDX-FileCopyrightText: the tritonlora authors
# SPDX-License-Identifier: Apache-2.0
"""Read a PEFT adapter directory into an `Adapter`.

Rules: a tensor or a field that is not understood is refused, because dropping it would change the responses. One error
lists all such tensors and fields. Matrices are never transposed: PEFT stores A as (r, in) and B as (out, r), for Conv1D
layers, too.
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path

from tritonlora.architectures.families import Leaf
from tritonlora.architectures.layers import locate, why_not
from tritonlora.errors import InvalidAdapter, Problems, UnsupportedAdapter, collected, error_of, merge_layers
from tritonlora.peft.adapter_config import MERGE, AdapterConfig, Stated, parse_config
from tritonlora.peft.checkpoint import file_inside, load_checkpoint, read_json_bytes
from tritonlora.peft.directory import WEIGHTS_FILES, adapter_directory
from tritonlora.peft.embeddings import EMBEDDING, compare_embeddings
from tritonlora.peft.formats import format_of_directory, format_of_tensors, refuse
from tritonlora.peft.stored_tensor import StoredTensor
from tritonlora.serving.dtypes import LORA_DTYPES

# The largest known layers have 106,496 outputs. All elements of a row are in memory at one time, so they are bounded.
_MAX_FEATURES = 1 << 20
_MAX_ELEMENTS = 1 << 27


@dataclass(frozen=True, slots=True)
class AdapterModule:
    """The LoRA of one linear layer."""

    path: str  # in the base model: "model.layers.0.self_attn.q_proj"
    layer: int
    leaves: Mapping[str, Leaf]  # family -> the layer of this name, in each family that has one
    lora_A: StoredTensor  # noqa: N815  (r, in); PEFT's name
    lora_B: StoredTensor  # noqa: N815  (out, r)
    scaling: float  # the factor of B @ A
    magnitude: StoredTensor | None = None  # (out,), DoRA

    @property
    def name(self) -> str:
        """The layer's own name, the last part of its path: "q_proj"."""
        return self.path.rpartition(".")[2]

    @property
    def r(self) -> int:
        """The rank of lora_A and lora_B."""
        return self.lora_A.shape[0]


@dataclass(frozen=True, slots=True)
class Adapter:
    """A checked PEFT adapter: all its fields and tensors are understood."""

    directory: Path
    config: AdapterConfig
    modules: Mapping[str, AdapterModule]  # by path
    remarks: tuple[str, ...] = ()  # for the user; none is a reason to refuse the adapter


def load_adapter(path: Path, base: Path | None = None) -> Adapter:
    """Read the adapter in the directory `path`; the tensors stay in their files.

    `base` is the base model's checkpoint. Only embeddings that were saved whole are compared with it.
    Raises InvalidAdapter if the adapter is broken, and UnsupportedAdapter if it is sound but cannot be converted.
    Either error lists every problem.
    """
    directory = adapter_directory(path)
    if not any(os.path.lexists(directory / name) for name in WEIGHTS_FILES):
        refuse(directory, format_of_directory(directory))
    problems: Problems = {InvalidAdapter: [], UnsupportedAdapter: []}
    config: AdapterConfig | None = None
    tensors: Mapping[str, StoredTensor] = {}
    with collected(problems):
        config = parse_config(read_json_bytes(file_inside(directory, "adapter_config.json")))
    with collected(problems):
        tensors = load_checkpoint(directory, "adapter_model.safetensors", "adapter_model.bin")
    refuse(directory, format_of_tensors(tensors))
    embeddings = {key: one for key, one in tensors.items() if EMBEDDING.fullmatch(key)}
    tensors = {key: one for key, one in tensors.items() if key not in embeddings}
    changed, remarks = compare_embeddings(embeddings, base)
    problems[UnsupportedAdapter] += changed
    modules: dict[str, AdapterModule] = {}
    # If the config has another peft_type, that is a problem already: do not list each of the tensors, too.
    if not any(problems.values()) or any(map(_lora_key, tensors)):
        modules = _modules(tensors, config, problems, remarks)
    if config is None or any(problems.values()):
        merged = {kind: merge_layers(texts) for kind, texts in problems.items()}
        raise error_of(f"cannot use the adapter in {str(directory)!r}", merged)
    return Adapter(directory, config, modules, (*remarks, *_task_remarks(config)))


def _modules(
    tensors: Mapping[str, StoredTensor], config: AdapterConfig | None, problems: Problems, remarks: list[str]
) -> dict[str, AdapterModule]:
    """Path -> module of a PEFT state dict. Without a config, which is a problem already, only add more problems."""
    groups = _grouped(tensors, problems)
    located = {path: place for path in groups if (place := locate(path))}
    stated: Mapping[str, Stated] = {}
    if config is not None:
        with collected(problems):
            stated = config.stated(sorted(located))
    modules = {}
    for path, group in groups.items():
        if path not in located:
            problems[UnsupportedAdapter].append(f"{path!r}: {why_not(path)}")
            continue
        found = _tensor_problems(path, group.tensors, config, stated.get(path))
        problems[InvalidAdapter] += found
        if config is not None and path in stated and not found:
            rank = group.tensors["A"].shape[0]
            layer, leaves = located[path]
            modules[path] = AdapterModule(
                path=path,
                layer=layer,
                leaves=leaves,
                lora_A=group.tensors["A"],
                lora_B=group.tensors["B"],
                scaling=config.scaling(rank, stated[path].alphas[0]),
                magnitude=group.tensors.get("magnitude"),
            )
    problems[InvalidAdapter] += _order_problems(modules, stated)
    remarks += [*_wrapper_remarks(tensors), *_alpha_remarks(stated)]
    if not groups and not any(problems.values()):
        problems[InvalidAdapter].append("there is no LoRA tensor in it; save the adapter again")
    return modules


@dataclass(slots=True)
class _Group:
    """The tensors of one module: "A", "B" or "magnitude" -> tensor, and its key in the state dict."""

    tensors: dict[str, StoredTensor] = field(default_factory=dict)
    keys: dict[str, str] = field(default_factory=dict)


def _grouped(tensors: Mapping[str, StoredTensor], problems: Problems) -> dict[str, _Group]:
    """Path -> the tensors of one module."""
    groups: dict[str, _Group] = {}
    adapters = set()
    for key in sorted(tensors):
        match = _lora_key(key)
        if match is None:
            problems[UnsupportedAdapter].append(f"{key!r}: {_why_not_key(key)}")
            continue
        path, matrix, name, magnitude_name = match.groups()
        adapters.add(name or magnitude_name or "")
        group, what = groups.setdefault(path, _Group()), matrix or "magnitude"
        if what in group.tensors:
            problems[InvalidAdapter].append(f"{path!r} has more than one {what}: {group.keys[what]!r} and {key!r}")
        group.tensors[what] = tensors[key]
        group.keys[what] = key
    if len(adapters) > 1:
        problems[InvalidAdapter].append(
            f"tensors of several adapters: {', '.join(map(repr, sorted(adapters)))}; save each on its own"
        )
    return groups


_MAX_KEY = 1000  # characters
_LORA_KEY = re.compile(
    r"(?:base_model\.model\.)?(?P<path>.+)\."
    r"(?:lora_(?P<matrix>[AB])(?:\.(?P<name>[^.]+))?\.weight"
    r"|lora_magnitude_vector(?:\.(?!weight$)(?P<magnitude_name>[^.]+))?(?:\.weight)?)"
)
# First match wins; the last line always matches.
_WHY_NOT_KEY = (
    (r"\.lora_embedding_[AB]", f"LoRA on an embedding; {MERGE}, or train again without it"),
    (
        r"(^|\.)(score|classifier|qa_outputs|v_head|value_head)\.",
        "a head that gives classes or scores, which no engine that generates text has; serve the adapter with its "
        "base model in transformers, for example",
    ),
    (r"\.base_layer\.bias$", f"a trained bias; {MERGE}, or train again with bias='none'"),
    (r"\.base_layer\.", "the base model's own weight; save with save_embedding_layers=False"),
    (r"\.lora_B\.(\w+\.)?bias$", f"a bias of lora_B; {MERGE}, or train again with lora_bias=False"),
    (r"\.bias$", f"a trained bias; {MERGE}, or train again with bias='none'"),
    (
        r"\.(modules_to_save|original_module)\.",
        f"a module trained in full; {MERGE}, or train again without modules_to_save",
    ),
    (r"\.(trainable_tokens|token_adapter)", f"trained token embeddings; {MERGE}"),
    (r"\.weight_m_wdecomp\.", "DoRA as NVIDIA's converter stores it; give PEFT's own files"),
    (r"\.(hada_|lokr_|vera_|ia3_|oft_|boft_|lora_E|prompt_)", f"not LoRA; {MERGE}"),
    (
        r"",
        "not a LoRA tensor; if PEFT saved the base model's embedding, save with save_embedding_layers=False; if a "
        f"module was trained in full, {MERGE}",
    ),
)


# Name in a path -> the wrapper around a model, or a part of it, in training. The name is a part of every tensor's name
# if the weights were not gathered by the trainer's own function.
_WRAPPERS = {
    "_orig_mod": "torch.compile",
    "module": "DDP or DeepSpeed",
    "_fsdp_wrapped_module": "FSDP",
    "_fpw_module": "FSDP",
    "_checkpoint_wrapped_module": "activation checkpointing",
}


def _lora_key(key: str) -> re.Match[str] | None:
    """The parts of a LoRA tensor's name, without wrappers; None if `key` is no such name."""
    if len(key) > _MAX_KEY:
        return None
    return _LORA_KEY.fullmatch(".".join(part for part in key.split(".") if part not in _WRAPPERS))


def _why_not_key(key: str) -> str:
    if len(key) > _MAX_KEY:
        return f"a name of {len(key)} characters, which no layer has; save the adapter again"
    return next(reason for pattern, reason in _WHY_NOT_KEY if re.search(pattern, key))


def _tensor_problems(
    path: str, tensors: Mapping[str, StoredTensor], config: AdapterConfig | None, stated: Stated | None
) -> list[str]:
    missing = [
        f"{path!r}: lora_{matrix} is missing; save the adapter again" for matrix in "AB" if matrix not in tensors
    ]
    if missing:
        return missing
    a, b, magnitude = tensors["A"], tensors["B"], tensors.get("magnitude")
    problems = [
        f"{path!r}: lora_{what} is {tensor.dtype.name}, expected float32, bfloat16 or float16; save it in one of these"
        for what, tensor in tensors.items()
        if tensor.dtype.name not in LORA_DTYPES
    ]
    shape_a, shape_b = a.shape, b.shape
    if len(shape_a) != 2 or len(shape_b) != 2 or shape_a[0] != shape_b[1] or 0 in shape_a + shape_b:
        problems.append(
            f"{path!r}: lora_A is {shape_a} and lora_B {shape_b}, expected (r, in) and (out, r); save the adapter again"
        )
    elif max(shape_a[1], shape_b[0]) > _MAX_FEATURES or shape_a[0] * (shape_a[1] + shape_b[0]) > _MAX_ELEMENTS:
        problems.append(
            f"{path!r}: lora_A is {shape_a} and lora_B {shape_b}, which no layer of any model needs: expected at most "
            f"{_MAX_FEATURES} inputs and outputs, and {_MAX_ELEMENTS} elements in both; fetch or save the adapter again"
        )
    elif stated is not None and shape_a[0] not in stated.ranks:
        ranks = " or ".join(str(one) for one in dict.fromkeys(stated.ranks))
        problems.append(
            f"{path!r}: lora_A has rank {shape_a[0]}, but adapter_config.json says r = {ranks}; give two files that "
            "were saved together"
        )
    if config is not None and (magnitude is None) == config.use_dora:
        problems.append(
            f"{path!r}: adapter_config.json says use_dora = {str(config.use_dora).lower()}, but lora_magnitude_vector "
            f"is {'missing' if magnitude is None else 'there'}; give two files that were saved together"
        )
    elif magnitude is not None and len(shape_b) == 2 and magnitude.numel != shape_b[0]:
        problems.append(f"{path!r}: lora_magnitude_vector is {magnitude.shape}, expected ({shape_b[0]},)")
    return problems


def _order_problems(modules: Mapping[str, AdapterModule], stated: Mapping[str, Stated]) -> list[str]:
    """Problems of alphas, if the ranks show that the patterns were saved in another order than in training.

    In PEFT the first matching pattern counts. If a tensor's rank is not the first pattern's rank, the order in the file
    cannot be trusted for any module. PEFT itself cannot load such an adapter.
    """
    if all(module.r == stated[path].ranks[0] for path, module in modules.items()):
        return []
    return [
        f"{path!r}: several patterns of alpha_pattern match, and PEFT's save_pretrained sorts them: the pattern that "
        "counted in training is not known; write patterns of which only one matches"
        for path in modules
        if len(set(stated[path].alphas)) > 1
    ]


def _wrapper_remarks(keys: Iterable[str]) -> Iterator[str]:
    """A remark if names of training wrappers are in the `keys` of the state dict."""
    if wrappers := {part for key in keys for part in key.split(".")} & _WRAPPERS.keys():
        named = ", ".join(f"{name} ({_WRAPPERS[name]})" for name in sorted(wrappers))
        yield (
            f"the names of its tensors contain names of training wrappers, {named}; these were removed here, and PEFT "
            "itself would load none of these tensors"
        )


def _alpha_remarks(stated: Mapping[str, Stated]) -> list[str]:
    """Remarks on modules to which several patterns give different alphas. The alpha of training is then not known."""
    doubtful = {path: one.alphas for path, one in stated.items() if len(set(one.alphas)) > 1}
    texts = [
        f"{path!r}: several patterns of alpha_pattern match: lora_alpha is {alphas[0]:g}, as PEFT loads it, and may "
        f"have been {' or '.join(f'{one:g}' for one in dict.fromkeys(alphas[1:]))} in training, since "
        "save_pretrained sorts the patterns"
        for path, alphas in doubtful.items()
    ]
    return merge_layers(texts)


# task_type -> the result that the adapter was trained to give. An engine that generates text does not give it.
_OTHER_TASKS = {
    "SEQ_CLS": "the classes of a text",
    "TOKEN_CLS": "the classes of tokens",
    "QUESTION_ANS": "the place of an answer in a text",
    "FEATURE_EXTRACTION": "embeddings",
}


def _task_remarks(config: AdapterConfig) -> Iterator[str]:
    if config.task_type in _OTHER_TASKS:
        yield (
            f"task_type is {config.task_type!r}: it was trained for {_OTHER_TASKS[config.task_type]}, and the engine "
            "generates text"
        )
