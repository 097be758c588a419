# SPDX-FileCopyrightText: the tritonlora authors
# SPDX-License-Identifier: Apache-2.0
"""Warmup files and the model_warmup block that names them, by which Triton loads each warm adapter at start.

Rules:

- Types are those that the model's own config.pbtxt declares.
- The dims of a sample and the bytes of its file come from the same value. Triton would cut a file that is too long
  without an error (core, src/backend_model_instance.cc, GenerateWarmupData).
- tritonlora edits only the block between its two comment lines. A model_warmup of the user's own outside of the block
  stays as it is. Both take effect, since the field is repeated.
"""

from __future__ import annotations

import re
import struct
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from tritonlora.errors import ConfigError, one_message
from tritonlora.pbtxt.edits import newline_of, quote
from tritonlora.pbtxt.model_config import ModelConfig, TensorSpec, filled
from tritonlora.pbtxt.text_format import Document, Message, error_at, parse
from tritonlora.serving.adapter_table import AdapterTable
from tritonlora.targets import TARGETS, SampleInput, Target, string_bytes, target_of

BEGIN = "# tritonlora: model_warmup (generated; edits here are lost)"
END = "# tritonlora: end"

_SHARED = {name for kind in TARGETS for name in kind.SHARED_INPUTS}
TASK_IDS = {kind.WIRE.task_id for kind in TARGETS}
_ADAPTER_FILE = re.compile(
    r"(?:lora_(?:id|name|path)_|chat_template_|adapter_(?:(?:model|config)_)?)([1-9][0-9]*)(?:\.bin|\.jinja)?"
)
_LINE_END = re.compile(r"\A\r?\n")
# The integer types that a shared input may have -> their struct codes. DTYPES has an adapter's types instead.
_STRUCT_CODES = {"TYPE_INT32": "i", "TYPE_UINT32": "I", "TYPE_INT64": "q", "TYPE_UINT64": "Q"}


@dataclass(frozen=True, slots=True)
class WarmupSample:
    """The warmup sample of one adapter that is loaded at start."""

    task_id: int
    inputs: tuple[SampleInput, ...]  # the inputs that name or hold the adapter; the shared ones are not among them

    @property
    def name(self) -> str:
        """The sample's name, which Triton writes to the log, and into the error when the sample fails."""
        return f"lora_{self.task_id}_warmup"


def task_id_of_sample(name: str) -> int | None:
    """The task id in a sample's name; None when it is not a name of tritonlora's."""
    match = re.fullmatch(r"lora_(\d+)_warmup", name, re.ASCII)
    return int(match[1]) if match else None


# --- Files ---------------------------------------------------------------------------------------------------------


def shared_files(config: ModelConfig) -> dict[str, bytes]:
    """The files that all samples share: name -> content, little-endian, in the types that `config` declares.

    There is one file for each shared input that the model declares. Raises ConfigError when the model requires an input
    that no sample has, or declares a shared input with a type that is no integer.
    """
    kind = _require_inputs(config)
    problems = []
    files = {}
    for spec in _shared_inputs(config, kind):
        shared = kind.SHARED_INPUTS[spec.name]
        data_type = filled(spec.data_type)
        if isinstance(shared.value, str):
            files[shared.file] = string_bytes(shared.value)
        elif data_type in _STRUCT_CODES:
            files[shared.file] = struct.pack(f"<{len(shared.value)}{_STRUCT_CODES[data_type]}", *shared.value)
        else:
            expected = ", ".join(_STRUCT_CODES)
            problems.append(f"expected input {spec.name!r} to be one of {expected}; got {data_type}")
    if problems:
        raise ConfigError(one_message("the warmup files cannot be written", problems))
    return files


def files(config: ModelConfig, table: AdapterTable, served: Path) -> dict[str, bytes]:
    """The files of the warm adapters' samples, without the adapters' own: name -> content.

    `served` is the model repository's path on the server. Raises ConfigError as `shared_files` does.
    """
    kind = target_of(config)
    warm = {name: entry for name, entry in table.entries.items() if entry.warm}
    found = shared_files(config) if warm else {}
    for name, entry in warm.items():
        found |= kind.sample_files(name, entry, served)
    return found


def samples(config: ModelConfig, table: AdapterTable) -> list[WarmupSample]:
    """One sample for each warm adapter, in the order of their ids."""
    kind = target_of(config)
    warm = sorted((entry for entry in table.entries.values() if entry.warm), key=lambda entry: entry.lora_task_id)
    return [WarmupSample(entry.lora_task_id, kind.sample_inputs(entry)) for entry in warm]


def task_id_of(file: str) -> int | None:
    """The task id in the name of an adapter's file or directory in the warmup directory; None for any other name."""
    match = _ADAPTER_FILE.fullmatch(file)
    return int(match[1]) if match else None


def files_of(directory: Path, task_ids: Collection[int]) -> list[Path]:
    """The files and directories of the adapters with these ids in the warmup `directory`."""
    ids = frozenset(task_ids)
    return [path for path in directory.glob("*") if task_id_of(path.name) in ids]


# --- The block -----------------------------------------------------------------------------------------------------


def render_block(config: ModelConfig, samples: Sequence[WarmupSample]) -> str:
    """The text between the comment lines: one model_warmup sample for each adapter. "" without samples.

    Raises ConfigError with every difference between a sample and the inputs that `config` declares.
    """
    if not samples:
        return ""
    kind = _require_inputs(config)
    shared = [_shared_sample(spec, kind) for spec in _shared_inputs(config, kind)]
    declared = {spec.name: spec for spec in config.inputs}
    problems = [problem for one in shared for problem in _mismatch(one, declared[one.name], "every sample")]
    rendered = []
    for sample in samples:
        problems += [problem for one in sample.inputs for problem in _mismatch(one, declared[one.name], sample.name)]
        rendered.append(_render_sample(sample, [*shared, *sample.inputs], declared))
    if problems:
        raise ConfigError(one_message("the warmup samples do not fit the model", problems))
    return "model_warmup [\n" + ",\n".join(rendered) + "\n]\n"


def replace_block(text: str, block: str) -> str:
    """A config.pbtxt with `block` between the comment lines. Without such lines they come at the end of the file.

    An empty block removes the lines, too. The text is then as it was before the first block.
    """
    newline = newline_of(text)
    span = _find_block(text)
    if span is None:
        if not block:
            return text
        managed = f"{BEGIN}\n{block}{END}".replace("\n", newline)
        # A file without a newline at its end gets none, so that removing the block restores the same bytes.
        return text + managed + newline if text.endswith("\n") or not text else text + newline + managed
    start, end = span
    if block:
        return text[:start] + f"{BEGIN}\n{block}{END}".replace("\n", newline) + text[end:]
    before, after = text[:start], text[end:]
    return before + _LINE_END.sub("", after, count=1) if after else before.removesuffix(newline)


def read_block(text: str) -> tuple[WarmupSample, ...]:
    """The samples in the block of a config.pbtxt; () when it has none.

    Raises ConfigError when the block was edited, and has a sample that tritonlora does not write.
    """
    span = _find_block(text)
    if span is None:
        return ()
    # Blank out the text before the block, so that the lines and columns in error messages stay right.
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


def foreign_inputs(document: Document) -> list[tuple[str, str]]:
    """(input, file) for each file that the user's own samples read, which are those outside of the block."""
    start, end = _find_block(document.text) or (0, 0)
    samples = document.message.messages("model_warmup")
    return _files_by_input(sample for sample in samples if not start <= sample.start < end)


def named_files(document: Document) -> list[str]:
    """The files that all samples of a config.pbtxt read: those of the block, and the user's own."""
    return [file for _, file in _files_by_input(document.message.messages("model_warmup"))]


def _files_by_input(samples: Iterable[Message]) -> list[tuple[str, str]]:
    return [
        (key.value, file.value)
        for sample in samples
        for entry in sample.messages("inputs")
        if (key := entry.scalar("key"))
        and (value := entry.message("value"))
        and (file := value.scalar("input_data_file"))
    ]


def _find_block(text: str) -> tuple[int, int] | None:
    """(start, end) of the block, from its first comment line to the end of its last one, without the line end.

    None when there is no block. Raises ConfigError when one of the lines is missing, repeated or in the wrong place.
    """
    begins = [match.span() for match in _line(BEGIN).finditer(text)]
    ends = [match.span() for match in _line(END).finditer(text)]
    if not begins and not ends:
        return None
    if len(begins) != 1 or len(ends) != 1 or ends[0][0] < begins[0][0]:
        place = min(begins + ends)[0]
        raise error_at(text, place, f"expected one line {BEGIN!r} and after it one {END!r}; remove the lines by hand")
    return begins[0][0], ends[0][1]


def _line(content: str) -> re.Pattern[str]:
    literal = re.escape(content)  # a pattern that begins with a literal is a hundred times as fast as one with ^ first
    return re.compile(rf"{literal}(?<=^{literal})(?=\r?$)", re.MULTILINE)


# --- Samples -------------------------------------------------------------------------------------------------------


def _shared_inputs(config: ModelConfig, kind: Target) -> list[TensorSpec]:
    return [spec for spec in config.inputs if spec.name in kind.SHARED_INPUTS]


def _shared_sample(spec: TensorSpec, kind: Target) -> SampleInput:
    shared = kind.SHARED_INPUTS[spec.name]
    size = 1 if isinstance(shared.value, str) else len(shared.value)
    return SampleInput(spec.name, filled(spec.data_type), (size,), shared.file)


def _require_inputs(config: ModelConfig) -> Target:
    """The kind of the target; ConfigError when its warmup samples would lack an input.

    Triton counts a sample's required inputs, and the engine loads an adapter only with all LoRA inputs.
    """
    kind = target_of(config)
    known = {*kind.SHARED_INPUTS, *kind.WIRE.inputs}
    problems = [
        f"input {spec.name!r} is required, and there is no value to warm it up with; declare it optional"
        for spec in config.inputs
        if spec.name not in known and not spec.optional
    ]
    if missing := kind.WIRE.missing([spec.name for spec in config.inputs]):
        problems.append(f"it declares no input {', '.join(map(repr, missing))}: {kind.ORIGIN}")
    if problems:
        raise ConfigError(one_message(f"{config.name or 'the model'!r} cannot be warmed up", problems))
    return kind


def _mismatch(one: SampleInput, declared: TensorSpec, sample: str) -> list[str]:
    """One line for each difference between an input of `sample` and the model's declaration."""
    data_type, dims = filled(declared.data_type), filled(declared.dims)
    problems = []
    if one.data_type != data_type:
        problems.append(f"{sample}: {one.name} is declared {data_type}, and its file holds {one.data_type}")
    shape = _shape(one, declared)
    if len(shape) != len(dims) or any(size not in (-1, got) for size, got in zip(dims, shape, strict=False)):
        problems.append(f"{sample}: {one.name} is declared with dims {list(dims)}, and has {list(one.shape)}")
    return problems


def _shape(one: SampleInput, declared: TensorSpec) -> tuple[int, ...]:
    """The shape of an input with the leading dims of 1 that a model without batching declares itself."""
    return (1,) * (len(filled(declared.dims)) - len(one.shape)) + one.shape


def _render_sample(sample: WarmupSample, inputs: Sequence[SampleInput], declared: Mapping[str, TensorSpec]) -> str:
    lines = ["  {", f"    name: {quote(sample.name)}", "    batch_size: 1"]
    for one in inputs:
        lines += [
            "    inputs {",
            f"      key: {quote(one.name)}",
            "      value {",
            f"        data_type: {one.data_type}",
            f"        dims: [ {', '.join(map(str, _shape(one, declared[one.name])))} ]",
            f"        input_data_file: {quote(one.file)}",
            "      }",
            "    }",
        ]
    return "\n".join([*lines, "  }"])


def _read_sample(sample: Message) -> WarmupSample:
    """A sample of the block, with its dims as they stand there; ValueError when tritonlora did not write it."""
    name = sample.scalar("name")
    task_id = task_id_of_sample(name.value if name else "")
    inputs = [
        _read_input(key.value, value)
        for entry in sample.messages("inputs")
        if (key := entry.scalar("key")) and (value := entry.message("value")) and key.value not in _SHARED
    ]
    if task_id is None or not inputs:
        raise ValueError(f"sample {name.value if name else ''!r} was not written by tritonlora")
    return WarmupSample(task_id, tuple(inputs))


def _read_input(key: str, value: Message) -> SampleInput:
    data_type, file = value.scalar("data_type"), value.scalar("input_data_file")
    dims = [scalar.value for scalar in value.scalars("dims")]
    if data_type is None or file is None or not all(dim.isdecimal() for dim in dims):
        raise ValueError(f"its {key} has dims {dims} or lacks a type or a file")
    return SampleInput(key, data_type.value, tuple(map(int, dims)), file.value)
