# SPDX-FileCopyrightText: the tritonlora authors
# SPDX-License-Identifier: Apache-2.0
"""Warmup files and the matching model_warmup block: Triton itself loads each adapter into the engine at start.

Rules: types come from what the model's own config.pbtxt declares. dims and bytes come from one place, since Triton cuts
a file that is too long without a word (core, src/backend_model_instance.cc, GenerateWarmupData). The block stands
between two comment lines and is the only part of the file that is ours; a model_warmup of the user's outside of it
stays as it is, and both take effect, since the field is repeated.
"""

from __future__ import annotations

import re
import struct
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from tritonlora.errors import ConfigError, one_message
from tritonlora.pbtxt import TRITON_TYPES, Message, ModelConfig, TensorSpec, error_at, filled, newline_of, parse, quote

BEGIN = "# tritonlora: model_warmup (generated; edits here are lost)"
END = "# tritonlora: end"

INPUT_IDS = (1, 2, 3, 4)

SHARED_FILES = {
    "input_ids": "input_ids",
    "input_lengths": "input_lengths",
    "end_id": "end_id",
    "request_output_len": "output_lengths",
    "beam_width": "beam_width",
}
"""Input of the engine's model -> its file, the same for all samples."""

_LORA_INPUTS = ("lora_task_id", "lora_weights", "lora_config")
_ADAPTER_FILE = re.compile(r"lora_id_([1-9][0-9]*)|adapter_(?:model|config)_([1-9][0-9]*)\.bin")
_LINE_END = re.compile(r"\A\r?\n")
_STRUCT_CODES = {"TYPE_INT32": "i", "TYPE_UINT32": "I", "TYPE_INT64": "q", "TYPE_UINT64": "Q"}
_DTYPES = {data_type: dtype for dtype, data_type in TRITON_TYPES.items()}


@dataclass(frozen=True, slots=True)
class WarmupSample:
    """One adapter that is loaded at start."""

    task_id: int
    weights_shape: tuple[int, int]  # (n, W)
    config_shape: tuple[int, int]  # (n, 3), or (n, 4) with DoRA
    dtype: str  # of lora_weights: "bfloat16", "float16" or "float32"

    @property
    def name(self) -> str:
        """What Triton calls it in the log and in the error when it cannot be loaded."""
        return f"lora_{self.task_id}_warmup"


# --- Files ---------------------------------------------------------------------------------------------------------


def shared_files(
    config: ModelConfig,
    *,
    input_ids: Sequence[int] = INPUT_IDS,
    end_id: int = 0,
    request_output_len: int = 1,
    beam_width: int = 1,
) -> dict[str, bytes]:
    """The files that all samples share, by name: little-endian, with the integer types that `config` declares.

    Only what the model has an input for is there. The defaults load an adapter into any engine: token ids that every
    vocabulary has, and one token of output, so that it hardly matters which token ends it.
    Raises ConfigError for a required input that has no file.
    """
    values = {
        "input_ids": tuple(input_ids),
        "input_lengths": (len(input_ids),),
        "end_id": (end_id,),
        "request_output_len": (request_output_len,),
        "beam_width": (beam_width,),
    }
    _require_inputs(config)
    problems = []
    files = {}
    for spec in _shared_inputs(config):
        code = _STRUCT_CODES.get(filled(spec.data_type))
        if code is None:
            expected = ", ".join(_STRUCT_CODES)
            problems.append(f"expected input {spec.name!r} to be one of {expected}; got {spec.data_type}")
            continue
        numbers = values[spec.name]
        try:
            files[SHARED_FILES[spec.name]] = struct.pack(f"<{len(numbers)}{code}", *numbers)
        except struct.error:
            problems.append(f"{spec.name} {list(numbers)} does not fit into {spec.data_type}")
    if problems:
        raise ConfigError(one_message("the warmup files cannot be written", problems))
    return files


def task_id_bytes(task_id: int) -> bytes:
    """The content of `task_id_file(task_id)`: uint64, little-endian."""
    return struct.pack("<Q", task_id)


def task_id_file(task_id: int) -> str:
    """The name of the file with the task id."""
    return f"lora_id_{task_id}"


def weights_file(task_id: int) -> str:
    """The name of the file with lora_weights: (n, W), raw."""
    return f"adapter_model_{task_id}.bin"


def config_file(task_id: int) -> str:
    """The name of the file with lora_config: int32, (n, 3) or (n, 4), raw."""
    return f"adapter_config_{task_id}.bin"


def task_id_of(file: str) -> int | None:
    """The task id of an adapter's warmup file, from the file's name; None when it is no such name."""
    match = _ADAPTER_FILE.fullmatch(file)
    return int(match[1] or match[2]) if match else None


# --- The block -----------------------------------------------------------------------------------------------------


def render_block(config: ModelConfig, samples: Sequence[WarmupSample], *, input_length: int = len(INPUT_IDS)) -> str:
    """The text between the comment lines: one model_warmup sample for each adapter. "" when there are none.

    `input_length` is the number of tokens in the file input_ids. Raises ConfigError with everything in which a
    sample is not what `config` declares.
    """
    if not samples:
        return ""
    _require_inputs(config)
    lengths = {"input_ids": input_length}
    shared = [
        _Input(spec, filled(spec.data_type), (lengths.get(spec.name, 1),), SHARED_FILES[spec.name])
        for spec in _shared_inputs(config)
    ]
    declared = {spec.name: spec for spec in config.inputs}
    problems = [problem for entry in shared for problem in _mismatch(entry, "every sample")]
    rendered = []
    for sample in samples:
        own = _lora_inputs(declared, sample)
        problems += [problem for entry in own for problem in _mismatch(entry, sample.name)]
        rendered.append(_render_sample(sample, [*shared, *own]))
    if problems:
        raise ConfigError(one_message("the warmup samples do not fit the model", problems))
    return "model_warmup [\n" + ",\n".join(rendered) + "\n]\n"


def replace_block(text: str, block: str) -> str:
    """A config.pbtxt with `block` between the comment lines: at the end of the file if there are none yet.

    An empty block takes the lines away, which leaves the text as it was before the first block.
    """
    newline = newline_of(text)
    span = _find_block(text)
    if span is None:
        if not block:
            return text
        managed = f"{BEGIN}\n{block}{END}".replace("\n", newline)
        # A file without a newline at its end stays one, so that taking the block out gives the same bytes.
        return text + managed + newline if text.endswith("\n") or not text else text + newline + managed
    start, end = span
    if block:
        return text[:start] + f"{BEGIN}\n{block}{END}".replace("\n", newline) + text[end:]
    before, after = text[:start], text[end:]
    return before + _LINE_END.sub("", after, count=1) if after else before.removesuffix(newline)


def read_block(text: str) -> tuple[WarmupSample, ...]:
    """The samples in the block of a config.pbtxt, () when it has none.

    Raises ConfigError when somebody has changed the block so that it is not one of ours any more.
    """
    span = _find_block(text)
    if span is None:
        return ()
    # Blank out what is around the block: places in error messages stay right.
    before = re.sub(r"[^\n]", " ", text[: span[0]])
    document = parse(before + text[span[0] : span[1]])
    try:
        return tuple(_read_sample(sample) for sample in document.message.messages("model_warmup"))
    except ValueError as error:
        raise error_at(
            text,
            span[0],
            f"the model_warmup block has been edited ({error}); write it again with `tritonlora check --fix`",
        ) from error


def foreign_task_id_files(text: str) -> tuple[str, ...]:
    """The files with a lora_task_id that samples outside the block, the user's own, load adapters under."""
    entries = [
        entry
        for sample in parse(replace_block(text, "")).message.messages("model_warmup")
        for entry in sample.messages("inputs")
        if (key := entry.scalar("key")) and key.value == "lora_task_id"
    ]
    files = [value.scalar("input_data_file") for entry in entries if (value := entry.message("value"))]
    return tuple(file.value for file in files if file is not None)


def _find_block(text: str) -> tuple[int, int] | None:
    """Where the block stands, from its first comment line to the end of its last, without the line end."""
    begins = [match.span() for match in _line(BEGIN).finditer(text)]
    ends = [match.span() for match in _line(END).finditer(text)]
    if not begins and not ends:
        return None
    if len(begins) != 1 or len(ends) != 1 or ends[0][0] < begins[0][0]:
        place = min(begins + ends)[0]
        raise error_at(text, place, f"expected one line {BEGIN!r} and after it one {END!r}; remove the lines by hand")
    return begins[0][0], ends[0][1]


def _line(content: str) -> re.Pattern[str]:
    return re.compile(rf"^{re.escape(content)}(?=\r?$)", re.MULTILINE)


# --- Samples -------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class _Input:
    """One input of a sample: what the model declares, and what the file holds."""

    declared: TensorSpec
    data_type: str
    shape: tuple[int, ...]  # without the batch dim
    file: str


def _shared_inputs(config: ModelConfig) -> list[TensorSpec]:
    return [spec for spec in config.inputs if spec.name in SHARED_FILES]


def _lora_inputs(declared: Mapping[str, TensorSpec], sample: WarmupSample) -> list[_Input]:
    task_id = sample.task_id
    weights_type = TRITON_TYPES[sample.dtype]
    return [
        _Input(declared["lora_task_id"], "TYPE_UINT64", (1,), task_id_file(task_id)),
        _Input(declared["lora_weights"], weights_type, sample.weights_shape, weights_file(task_id)),
        _Input(declared["lora_config"], "TYPE_INT32", sample.config_shape, config_file(task_id)),
    ]


def _require_inputs(config: ModelConfig) -> None:
    """Triton counts a sample's required inputs; the engine loads an adapter only with all three LoRA inputs."""
    known = {*SHARED_FILES, *_LORA_INPUTS}
    problems = [
        f"input {spec.name!r} is required, and there is no value to warm it up with; declare it optional"
        for spec in config.inputs
        if spec.name not in known and not spec.optional
    ]
    problems += [
        f"it declares no input {name!r}, which the models of tensorrtllm_backend have from v0.9.0 on"
        for name in _LORA_INPUTS
        if config.input(name) is None
    ]
    if problems:
        raise ConfigError(one_message(f"{config.name or 'the model'!r} cannot be warmed up", problems))


def _mismatch(entry: _Input, sample: str) -> list[str]:
    """In what an input of `sample` is not what the model declares."""
    name, data_type, dims = entry.declared.name, filled(entry.declared.data_type), filled(entry.declared.dims)
    problems = []
    if entry.data_type != data_type:
        problems.append(f"{sample}: {name} is declared {data_type}, and its file holds {entry.data_type}")
    shape = _shape(entry)
    if len(shape) != len(dims) or any(size not in (-1, got) for size, got in zip(dims, shape, strict=False)):
        problems.append(f"{sample}: {name} is declared with dims {list(dims)}, and has {list(entry.shape)}")
    return problems


def _shape(entry: _Input) -> tuple[int, ...]:
    """The shape with the leading ones that a model without batching has to declare itself."""
    return (1,) * (len(filled(entry.declared.dims)) - len(entry.shape)) + entry.shape


def _render_sample(sample: WarmupSample, inputs: Sequence[_Input]) -> str:
    lines = ["  {", f"    name: {quote(sample.name)}", "    batch_size: 1"]
    for entry in inputs:
        lines += [
            "    inputs {",
            f"      key: {quote(entry.declared.name)}",
            "      value {",
            f"        data_type: {entry.data_type}",
            f"        dims: [ {', '.join(map(str, _shape(entry)))} ]",
            f"        input_data_file: {quote(entry.file)}",
            "      }",
            "    }",
        ]
    return "\n".join([*lines, "  }"])


def _read_sample(sample: Message) -> WarmupSample:
    """A sample of the block; ValueError when it is not one that `render_block` writes."""
    values = {
        key.value: value
        for entry in sample.messages("inputs")
        if (key := entry.scalar("key")) and (value := entry.message("value"))
    }
    name = sample.scalar("name")
    match = re.fullmatch(r"lora_(\d+)_warmup", name.value if name else "", re.ASCII)
    if match is None or any(key not in values for key in _LORA_INPUTS):
        raise ValueError(f"sample {name.value if name else ''!r} is not one of ours")
    data_type = values["lora_weights"].scalar("data_type")
    dtype = _DTYPES.get(data_type.value if data_type else "")
    if dtype is None:
        raise ValueError(f"lora_weights of sample {match[0]!r} has no data_type of a LoRA")
    weights_shape, config_shape = (
        _last_two_dims(values[key], match[0], key) for key in ("lora_weights", "lora_config")
    )
    return WarmupSample(int(match[1]), weights_shape, config_shape, dtype)


def _last_two_dims(value: Message, sample: str, key: str) -> tuple[int, int]:
    dims = [scalar.value for scalar in value.scalars("dims")]
    if len(dims) < 2 or not all(dim.isdecimal() for dim in dims):
        raise ValueError(f"{key} of sample {sample!r} has the dims {dims}")
    return int(dims[-2]), int(dims[-1])
