# SPDX-FileCopyrightText: the tritonlora authors
# SPDX-License-Identifier: Apache-2.0
"""model_configs.py, on upstream's configs and against protobuf's parser."""

from __future__ import annotations

from typing import Any

import pytest

from tritonlora.errors import ConfigError
from tritonlora.pbtxt.model_config import config_of, parse_config
from tritonlora.pbtxt.text_format import parse
from tritonlora.repository.model_configs import resolver_config, router_config, set_parameters
from tritonlora.targets.declarations import declare_lora_weights
from upstream_configs import NAMES, PATHS, VERSIONS, fill, protobuf, removed_and_added, upstream

# --- Helpers -------------------------------------------------------------------------------------------------------

TARGET = """\
name: "engine"
max_batch_size: 0
input [
  { name: "input_ids" data_type: TYPE_INT32 dims: [ -1 ] },
  { name: "lora_task_id" data_type: TYPE_UINT64 dims: [ 1 ] reshape: { shape: [ ] } optional: true },
  { name: "lora_weights" data_type: TYPE_FP16 dims: [ -1, -1 ] optional: true allow_ragged_batch: true },
  { name: "lora_config" data_type: TYPE_INT32 dims: [ -1, 3 ] optional: true allow_ragged_batch: true }
]
output [ { name: "output_ids" data_type: TYPE_INT32 dims: [ -1, -1 ] } ]
"""


NEEDS = "'engine' needs a max_batch_size above 0, and the input request_output_len, which must not be optional"


def as_on_the_wire(tensor: Any) -> Any:
    """A declaration without its reshape."""
    tensor.ClearField("reshape")
    return tensor


# --- router_config -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("version", VERSIONS)
@pytest.mark.parametrize("decoupled", ["True", "False"])
def test_router_config_declares_what_the_target_declares(version: str, decoupled: str) -> None:
    """Same tensors in the same order, as on the wire, less the weights, plus lora_name and lora_split_key."""
    text = fill(upstream(version, "tensorrt_llm"), decoupled_mode=decoupled, triton_max_batch_size="7")
    target = protobuf(text)

    router = protobuf(router_config(parse_config(text)))

    wanted = [as_on_the_wire(tensor) for tensor in target.input if tensor.name not in ("lora_weights", "lora_config")]
    assert wanted == list(router.input)[:-2]
    assert [("lora_name", 13, [1], True), ("lora_split_key", 13, [1], True)] == [
        (one.name, one.data_type, list(one.dims), one.optional) for one in router.input[-2:]
    ]
    assert "lora_task_id" in [tensor.name for tensor in router.input]
    assert [as_on_the_wire(tensor) for tensor in target.output] == list(router.output)[:-2]
    assert [("lora_name", 13), ("all_outputs", 1)] == [(one.name, one.data_type) for one in router.output[-2:]]
    assert (7, decoupled == "True") == (router.max_batch_size, router.model_transaction_policy.decoupled)
    assert ("lora_router", "python") == (router.name, router.backend)
    assert [(3, router.instance_group[0].KIND_CPU)] == [(group.count, group.kind) for group in router.instance_group]


def test_router_config_carries_its_parameters() -> None:
    """Target, limits and the CPU-only inputs are parameters that the router's model.py reads."""
    router = protobuf(router_config(parse_config(TARGET), name="my_router", target_name="engine", max_streams=3))

    assert "my_router" == router.name
    assert [3] == [group.count for group in router.instance_group]
    assert {
        "target": "engine",
        "resolver": "lora_resolver",
        "first_answer_timeout_seconds": "3600",
        "stall_timeout_seconds": "300",
        "FORCE_CPU_ONLY_INPUT_TENSORS": "yes",
    } == {key: value.string_value for key, value in router.parameters.items()}


def test_router_config_gives_previous_ids_when_asked_for() -> None:
    """previous_ids comes after the target's own outputs, with the one by which the router knows who named it."""
    router = protobuf(router_config(parse_config(TARGET), previous_ids=True))

    own = [("lora_name", 13, [1]), ("previous_ids", 8, [-1]), ("all_outputs", 1, [1])]

    assert [("output_ids", 8, [-1, -1]), *own] == [
        (tensor.name, tensor.data_type, list(tensor.dims)) for tensor in router.output
    ]


def test_router_config_names_every_value_that_nobody_filled_in() -> None:
    """Triton refuses such a target, so the router refuses it too, with all places and the remedy."""
    with pytest.raises(ConfigError) as error:
        router_config(parse_config(upstream("v0.18.0", "tensorrt_llm")))

    message = str(error.value)
    assert 7 == len(message.splitlines())
    for part in (
        "line 29, column 17: max_batch_size is still ${triton_max_batch_size}: set it with tools/fill_template.py",
        "decoupled is still ${decoupled_mode}",
        "data_type of input 'encoder_input_features' is still ${encoder_input_features_data_type}",
        "data_type of input 'draft_logits' is still ${logits_datatype}",
        "data_type of output 'context_logits' is still ${logits_datatype}",
    ):
        assert part in message


def test_router_config_needs_a_target_with_lora_inputs() -> None:
    """A target from before v0.9 is refused, naming what it lacks and from which versions on it is there."""
    text = "name: 'old' input { name: 'lora_weights' } input { name: 'lora_config' }"

    with pytest.raises(ConfigError, match=r"'old' declares no input 'lora_task_id': .* v0\.9\.0 to v1\.x"):
        router_config(parse_config(text))


def test_router_config_refuses_a_target_that_routes_by_name_itself() -> None:
    """Two inputs of the same name would be a config that Triton refuses."""
    text = TARGET.replace("input [", "input [ { name: 'lora_name' data_type: TYPE_STRING dims: [ 1 ] },")

    with pytest.raises(ConfigError, match="'engine' takes lora_name itself"):
        router_config(parse_config(text), target_name="engine")


# --- resolver_config -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ('name: "x" max_batch_size: 4', "'x' declares no input 'lora_task_id', 'lora_weights', 'lora_config'"),
        (TARGET.replace("size: 0", "size: ${size}"), "the config of 'engine' is not complete"),
    ],
    ids=["no LoRA", "a template"],
)
def test_resolver_config_needs_a_target_that_it_can_stand_before(text: str, message: str) -> None:
    """The reason is named."""
    with pytest.raises(ConfigError, match=message):
        resolver_config(parse_config(text), target_name="engine")


# --- declare_lora_weights ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("version", VERSIONS)
@pytest.mark.parametrize(("dtype", "number"), [("bfloat16", 14), ("float16", 10), ("float32", 11)])
@pytest.mark.parametrize(("columns", "dim"), [([3], 3), ([4, 4], 4), ([3, 4], -1)])
def test_declare_lora_weights_changes_type_and_columns_only(
    version: str, dtype: str, number: int, columns: list[int], dim: int
) -> None:
    """protobuf sees the new data_type and the new last dim; one line each differs."""
    text = fill(upstream(version, "tensorrt_llm"))
    wanted = protobuf(text)
    for tensor in wanted.input:
        if tensor.name == "lora_weights":
            tensor.data_type = number
        if tensor.name == "lora_config":
            tensor.dims[1] = dim

    declared = declare_lora_weights(parse(text), dtype, columns).text

    assert wanted == protobuf(declared)
    assert (dtype != "float16") + (dim != 3) == len(removed_and_added(text, declared)[0])
    assert declared == declare_lora_weights(parse(declared), dtype, columns).text


def test_declare_lora_weights_declares_a_type_that_was_left_out() -> None:
    """A lora_weights input without data_type gets one, and free columns stay free."""
    text = TARGET.replace("data_type: TYPE_FP16 ", "").replace("[ -1, 3 ]", "[ -1, -1 ]")

    config = config_of(declare_lora_weights(parse(text), "bfloat16", [4]))

    assert ["TYPE_BF16", (-1, -1)] == [
        spec.data_type if spec.name == "lora_weights" else spec.dims for spec in config.inputs[2:]
    ]


def test_declare_lora_weights_needs_lora_inputs() -> None:
    """A model without them is refused."""
    with pytest.raises(ConfigError, match="declares no input 'lora_weights', so it takes no adapters"):
        declare_lora_weights(parse('name: "x"'), "bfloat16")


# --- set_parameters ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("path", PATHS, ids=NAMES)
def test_set_parameter_adds_one_to_every_upstream_config(path: Any) -> None:
    """protobuf sees one parameter more; no line goes."""
    text = fill(path.read_text())
    wanted = protobuf(text)
    wanted.parameters["new key"].string_value = 'a "value"\n'

    edited = set_parameters(parse(text), {"new key": 'a "value"\n'}).text

    assert wanted == protobuf(edited)
    assert [] == removed_and_added(text, edited)[0]


@pytest.mark.parametrize("version", VERSIONS)
def test_set_parameter_replaces_upstream_parameters(version: str) -> None:
    """protobuf sees the new value; only its line differs."""
    text = fill(upstream(version, "tensorrt_llm"))
    for key in sorted(protobuf(text).parameters)[::6]:
        wanted = protobuf(text)
        wanted.parameters[key].string_value = "64"

        edited = set_parameters(parse(text), {key: "64"}).text

        assert wanted == protobuf(edited)
        pairs = zip(text.splitlines(), edited.splitlines(), strict=True)
        assert 1 == len([line for line, other in pairs if line != other])


@pytest.mark.parametrize(
    ("before", "after"),
    [
        ("parameters { key: 'k' value < string_value: 'v' > }", "parameters { key: 'k' value < string_value: 'v' > }"),
        ('parameters { key: "k" value { } }', 'parameters { key: "k" value { string_value: "v"  } }'),
        ('parameters { key: "k" }', 'parameters { key: "k" value { string_value: "v" } }'),
        ("# a comment", '# a comment\nparameters: {\n  key: "k"\n  value {\n    string_value: "v"\n  }\n}\n'),
        (
            'parameters [ { key: "a" }, { key: "k" value { string_value: "w" "x" } } ]',
            'parameters [ { key: "a" }, { key: "k" value { string_value: "v" } } ]',
        ),
    ],
)
def test_set_parameter_edits_every_spelling(before: str, after: str) -> None:
    """The value is set where the file has its place, and left alone where it is right already."""
    assert after == set_parameters(parse(before), {"k": "v"}).text
