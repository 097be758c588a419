# SPDX-FileCopyrightText: the tritonlora authors
# SPDX-License-Identifier: Apache-2.0
"""warmup, read back with protobuf's parser and numpy."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tritonclient.utils import serialize_byte_tensor

from table import sample as tensor_sample
from tritonlora.errors import ConfigError
from tritonlora.pbtxt.model_config import DATA_TYPES, parse_config
from tritonlora.pbtxt.text_format import parse
from tritonlora.repository.warmup import (
    BEGIN,
    END,
    WarmupSample,
    read_block,
    render_block,
    replace_block,
    shared_files,
    task_id_of,
)
from tritonlora.targets import string_bytes, task_id_bytes, task_id_file
from tritonlora.targets.declarations import declare_lora_weights
from upstream_configs import VERSIONS, fill, protobuf, upstream

# --- Helpers -------------------------------------------------------------------------------------------------------

NUMPY = {"TYPE_INT32": "<i4", "TYPE_UINT32": "<u4", "TYPE_INT64": "<i8", "TYPE_UINT64": "<u8"}

SAMPLES = st.lists(
    st.builds(
        lambda task_id, rows, width, columns: tensor_sample(task_id, (rows, width), (rows, columns)),
        task_id=st.integers(0, 2**64 - 1),
        rows=st.integers(1, 300),
        width=st.integers(1, 2**40),
        columns=st.just(3),
    ),
    max_size=4,
    unique_by=lambda sample: sample.task_id,
)

ONE = (tensor_sample(1, (224, 589824), (224, 3)),)


def engine_text(version: str = "v0.18.0") -> str:
    """An upstream engine model's config, filled and declared for bfloat16 adapters."""
    return declare_lora_weights(parse(fill(upstream(version, "tensorrt_llm"))), "bfloat16").text


def minimal(inputs: str, max_batch_size: int = 4) -> str:
    """A config with only the LoRA inputs and `inputs`."""
    lora = (
        "{ name: 'lora_task_id' data_type: TYPE_UINT64 dims: [ 1 ] optional: true },"
        "{ name: 'lora_weights' data_type: TYPE_BF16 dims: [ -1, -1 ] optional: true },"
        "{ name: 'lora_config' data_type: TYPE_INT32 dims: [ -1, 3 ] optional: true }"
    )
    return f"name: 'engine' max_batch_size: {max_batch_size} input [ {lora}, {inputs} ]"


def with_samples(text: str, samples: Any) -> str:
    """The config with a block for the samples."""
    return replace_block(text, render_block(parse_config(text), samples))


# --- Files ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("version", VERSIONS)
def test_shared_files_are_read_back_at_the_dims_of_the_block(version: str) -> None:
    """numpy, with the block's types and dims, finds the values, and no byte is left over."""
    text = engine_text(version)
    config = parse_config(text)
    values = {
        "input_ids": [1, 2, 3, 4], "input_lengths": [4], "end_id": [0], "request_output_len": [1], "beam_width": [1],
    }  # fmt: skip
    files = shared_files(config)
    block = render_block(config, ONE)

    (sample,) = protobuf(replace_block(text, block)).model_warmup

    for name, wanted in values.items():
        entry = sample.inputs[name]
        content = files.pop(entry.input_data_file)
        numbers = np.frombuffer(content, NUMPY[DATA_TYPES[entry.data_type]])
        assert wanted == numbers.reshape(tuple(entry.dims)).tolist()
    assert {} == files


def test_shared_files_have_the_types_that_the_model_declares() -> None:
    """UINT32 as before v0.7, and whatever else is declared; inputs that are not declared have no file."""
    text = minimal("{ name: 'end_id' data_type: TYPE_UINT32 dims: [ 1 ] }, { name: 'input_ids' data_type: TYPE_INT64 }")

    files = shared_files(parse_config(text))

    assert {"end_id": bytes(4), "input_ids": b"".join(bytes([token]) + bytes(7) for token in (1, 2, 3, 4))} == files


@pytest.mark.parametrize("render", [shared_files, lambda config: render_block(config, ONE)], ids=["files", "block"])
def test_a_required_input_without_a_value_is_named(render: Any) -> None:
    """Triton would refuse the sample; so the input is named before anything is written."""
    config = parse_config(minimal("{ name: 'prompt_style' data_type: TYPE_INT32 dims: [ 1 ] }"))

    with pytest.raises(ConfigError, match="'engine' cannot be warmed up: input 'prompt_style' is required"):
        render(config)


def test_a_model_without_lora_inputs_is_named() -> None:
    """What is missing, and from which version on it is there."""
    text = "name: 'old' input { name: 'lora_weights' } input { name: 'lora_config' }"

    with pytest.raises(ConfigError, match=r"'old' cannot be warmed up: it declares no input 'lora_task_id'.*v0\.9\.0"):
        shared_files(parse_config(text))


def test_shared_files_refuse_types_that_are_no_integers() -> None:
    """Named, with those that can be."""
    text = minimal("{ name: 'beam_width' data_type: TYPE_FP32 }")

    with pytest.raises(ConfigError, match="expected input 'beam_width' to be one of TYPE_INT32, .*; got TYPE_FP32"):
        shared_files(parse_config(text))


def test_an_unfilled_input_is_no_error_when_no_sample_needs_it() -> None:
    """Templates of inputs that are left out do not matter; those of inputs that are sent do."""
    config = parse_config(upstream("v0.18.0", "tensorrt_llm"))

    assert 5 == len(shared_files(config))
    unfilled = parse_config(minimal("{ name: 'end_id' data_type: ${end_id_type} dims: [ 1 ] }"))
    with pytest.raises(ConfigError, match=r"data_type of input 'end_id' is still \$\{end_id_type\}"):
        shared_files(unfilled)


def test_files_of_an_adapter_are_named_by_its_task_id() -> None:
    """Names as people know them; the id is an unsigned 64-bit number."""
    files = [one.file for one in tensor_sample(7, (1, 8), (1, 3)).inputs]

    assert ["lora_id_7", "adapter_model_7.bin", "adapter_config_7.bin"] == files
    assert [7, 7, 7] == [task_id_of(file) for file in files]
    assert [7, 7, 7] == [task_id_of(file) for file in ("adapter_7", "lora_name_7", "lora_path_7")]
    assert [None, None] == [task_id_of(file) for file in ("input_ids", "adapter_07")]
    assert "lora_id_7" == task_id_file(7)
    assert b"\7" + bytes(7) == task_id_bytes(7)
    assert 2**64 - 1 == np.frombuffer(task_id_bytes(2**64 - 1), "<u8")[0]


def test_a_string_is_its_length_and_its_bytes() -> None:
    """As tritonclient serialises a tensor of strings."""
    text = "/models/größe 日本"
    serialized = serialize_byte_tensor(np.array([text.encode()], np.object_))

    assert serialized.item() == string_bytes(text)


# --- The block -----------------------------------------------------------------------------------------------------


@settings(max_examples=40, deadline=None)
@given(samples=SAMPLES, version=st.sampled_from(VERSIONS))
def test_protobuf_sees_exactly_the_samples(samples: list[WarmupSample], version: str) -> None:
    """Of each adapter its name, files, types and dims; the rest of the config is as it was; read_block agrees."""
    text = engine_text(version)

    edited = with_samples(text, samples)

    proto = protobuf(edited)
    assert [f"lora_{sample.task_id}_warmup" for sample in samples] == [sample.name for sample in proto.model_warmup]
    for sample, seen in zip(samples, proto.model_warmup, strict=True):
        assert {
            "lora_task_id": ("TYPE_UINT64", [1], f"lora_id_{sample.task_id}"),
            "lora_weights": ("TYPE_BF16", list(sample.inputs[1].shape), f"adapter_model_{sample.task_id}.bin"),
            "lora_config": ("TYPE_INT32", list(sample.inputs[2].shape), f"adapter_config_{sample.task_id}.bin"),
            "input_ids": ("TYPE_INT32", [4], "input_ids"),
            "input_lengths": ("TYPE_INT32", [1], "input_lengths"),
            "request_output_len": ("TYPE_INT32", [1], "output_lengths"),
            "end_id": ("TYPE_INT32", [1], "end_id"),
            "beam_width": ("TYPE_INT32", [1], "beam_width"),
        } == {
            name: (DATA_TYPES[entry.data_type], list(entry.dims), entry.input_data_file)
            for name, entry in seen.inputs.items()
        }
        assert 1 == seen.batch_size
    del proto.model_warmup[:]
    assert protobuf(text) == proto
    assert tuple(samples) == read_block(edited)


@settings(max_examples=40, deadline=None)
@given(first=SAMPLES, second=SAMPLES, newline=st.sampled_from(["\n", "\r\n"]), end=st.sampled_from(["", "\n", "\n\n"]))
def test_replace_block_leaves_the_text_around_it_alone(
    first: list[WarmupSample], second: list[WarmupSample], newline: str, end: str
) -> None:
    """A second block replaces the first; an empty one leaves the text as it was before there was any."""
    text = minimal("{ name: 'end_id' data_type: TYPE_INT32 dims: [ 1 ] }") + "\n# the end" + end
    text = text.replace("\n", newline)

    once = with_samples(text, first)
    twice = with_samples(once, second)

    assert twice == with_samples(text, second)
    assert twice == with_samples(twice, second)
    assert text == with_samples(twice, [])
    assert twice.startswith(text.removesuffix(newline))
    assert once.count("\n") == once.count(newline)


@pytest.mark.parametrize("text", ["", "\n", "#", "a: 1\r\nb: 2"])
def test_replace_block_can_be_taken_back_from_any_text(text: str) -> None:
    """Also from a text without any line."""
    assert text == replace_block(replace_block(text, "model_warmup { }\n"), "")


def test_text_after_the_block_stays() -> None:
    """What a user writes below the block is not ours."""
    text = with_samples(engine_text(), ONE) + "# below\n"

    assert engine_text() + "# below\n" == replace_block(text, "")


def test_a_warmup_of_the_users_own_stays_and_works_together_with_the_block() -> None:
    """The field is repeated: both their sample and ours are seen, and read_block reads ours only."""
    theirs = 'model_warmup [ { name: "theirs" batch_size: 1 } ]\n'
    text = engine_text() + theirs

    edited = with_samples(text, ONE)

    assert ["theirs", "lora_1_warmup"] == [sample.name for sample in protobuf(edited).model_warmup]
    assert ONE == read_block(edited)
    assert text == replace_block(edited, "")
    assert () == read_block(text)


def test_a_marker_that_is_not_a_line_of_its_own_is_not_ours() -> None:
    """A string or a comment that holds the marker is text like any other."""
    text = f'name: "{BEGIN}" # see {END}\n'

    assert () == read_block(text)
    assert text == replace_block(text, "")


def test_dims_of_a_model_without_batching_have_its_leading_ones() -> None:
    """Such a model declares the batch dim itself, and the sample has to have it."""
    text = """
        name: "engine" max_batch_size: 0
        input { name: "input_ids" data_type: TYPE_INT32 dims: [ 1, -1 ] }
        input { name: "lora_task_id" data_type: TYPE_UINT64 dims: [ 1, 1 ] }
        input { name: "lora_weights" data_type: TYPE_BF16 dims: [ -1, -1, -1 ] }
        input { name: "lora_config" data_type: TYPE_INT32 dims: [ 1, -1, 3 ] }
    """

    edited = with_samples(text, ONE)

    assert {
        "input_ids": [1, 4], "lora_task_id": [1, 1], "lora_weights": [1, 224, 589824], "lora_config": [1, 224, 3],
    } == {name: list(entry.dims) for name, entry in protobuf(edited).model_warmup[0].inputs.items()}  # fmt: skip


def test_render_block_names_everything_that_does_not_fit() -> None:
    """A sample of another type, with other columns, or too many dims is refused before Triton cuts or refuses it."""
    text = minimal("{ name: 'end_id' data_type: TYPE_INT32 dims: [ 1, 1, 2 ] }").replace("TYPE_BF16", "TYPE_FP16")
    sample = tensor_sample(9, (2, 8), (2, 4))

    with pytest.raises(ConfigError) as error:
        render_block(parse_config(text), [sample])

    assert [
        "the warmup samples do not fit the model:",
        "  every sample: end_id is declared with dims [1, 1, 2], and has [1]",
        "  lora_9_warmup: lora_weights is declared TYPE_FP16, and its file holds TYPE_BF16",
        "  lora_9_warmup: lora_config is declared with dims [-1, 3], and has [2, 4]",
    ] == str(error.value).splitlines()


@pytest.mark.parametrize(
    ("text", "line", "message"),
    [
        (f"{BEGIN}\n", 1, "expected one line"),
        (f"\n{END}\n{BEGIN}\n", 2, "expected one line"),
        (f"{BEGIN}\n{END}\n{BEGIN}\n{END}\n", 1, "expected one line"),
        (f"a: 1\n{BEGIN}\nmodel_warmup [ {{\n{END}\n", 4, "expected a field name or '}', got the end of the file"),
        (f"{BEGIN}\nmodel_warmup {{ name: 'x' }}\n{END}", 1, "sample 'x' was not written by tritonlora"),
        (
            f"{BEGIN}\nmodel_warmup {{ name: 'lora_1_warmup' }}\n{END}",
            1,
            "sample 'lora_1_warmup' was not written by tritonlora",
        ),
    ],
    ids=["no end", "wrong order", "two blocks", "half a sample", "another sample", "no inputs"],
)
def test_read_block_refuses_a_block_that_somebody_broke(text: str, line: int, message: str) -> None:
    """The place and the reason are named."""
    with pytest.raises(ConfigError, match=message) as error:
        read_block(text)

    assert line == error.value.line


def test_read_block_refuses_dims_that_are_none() -> None:
    """They are named."""
    text = with_samples(engine_text(), ONE)

    with pytest.raises(ConfigError, match=r"its lora_config has dims \['224', '-1'\]"):
        read_block(text.replace("dims: [ 224, 3 ]", "dims: [ 224, -1 ]"))


@pytest.mark.parametrize(
    ("before", "after"), [("TYPE_BF16\n        dims: [ 224", "TYPE_INT8\n        dims: [ 224"), ("589824", "589825")]
)
def test_read_block_sees_edits_inside_the_block(before: str, after: str) -> None:
    """Types and dims are those that stand there."""
    text = with_samples(engine_text(), ONE)
    assert before in text

    assert ONE != read_block(text.replace(before, after))
