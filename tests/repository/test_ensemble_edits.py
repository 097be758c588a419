# SPDX-FileCopyrightText: the tritonlora authors
# SPDX-License-Identifier: Apache-2.0
"""ensembles, on upstream's configs and against protobuf's parser."""

from __future__ import annotations

import pytest

from tritonlora.errors import ConfigError
from tritonlora.pbtxt.text_format import parse
from tritonlora.repository import ensemble_edits
from upstream_configs import VERSIONS, as_rewired_before, fill, protobuf, removed_and_added, step_of, upstream

ENSEMBLE = """\
platform: "ensemble"
max_batch_size: 4
input [ { name: "text" data_type: TYPE_STRING dims: [ 1 ] } ]
output [ { name: "out" data_type: TYPE_INT32 dims: [ -1 ] } ]
ensemble_scheduling {
  step [
    { model_name: "pre" input_map { key: "T" value: "text" } output_map { key: "I" value: "_ids" } %s },
    { model_name: "tensorrt_llm" model_version: -1 input_map { key: "input_ids" value: "_ids" } %s
      output_map { key: "output_ids" value: "out" } }
  ]
}
"""


def rewire_to_forward(text: str, *, postprocessing: str | None = None) -> str:
    """The text of the document that `ensemble_edits` makes of the document of `text`."""
    return ensemble_edits.rewire_to_forward(parse(text), postprocessing=postprocessing).text


def rewire_to_resolve(text: str, *, postprocessing: str | None = None) -> str:
    """The text of the document that `ensemble_edits` makes of the document of `text`."""
    return ensemble_edits.rewire_to_resolve(parse(text), postprocessing=postprocessing).text


# --- rewire_to_forward ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("version", VERSIONS)
def test_rewire_to_forward_makes_exactly_the_intended_change(version: str) -> None:
    """protobuf sees the router in the engine's place, lora_name leading to it, and nothing else changed."""
    text = fill(upstream(version, "ensemble"))
    wanted = protobuf(text)
    step = step_of(wanted, "tensorrt_llm")
    step.model_name = "lora_router"
    for name in ("lora_weights", "lora_config"):
        step.input_map.pop(name, None)
        for tensor in [tensor for tensor in wanted.input if tensor.name == name]:
            wanted.input.remove(tensor)
    for name in ("lora_name", "lora_split_key"):
        step.input_map[name] = name
        wanted.input.add(name=name, data_type=13, dims=[1], optional=True)

    rewired = rewire_to_forward(text)

    assert wanted == protobuf(rewired)


@pytest.mark.parametrize("version", VERSIONS)
def test_rewire_to_forward_leaves_all_other_lines_as_they_are(version: str) -> None:
    """The lines that go are those of the step's name and of the weights, with the comments about them."""
    text = upstream(version, "ensemble")

    removed, added = removed_and_added(text, rewire_to_forward(text))

    assert '      model_name: "tensorrt_llm"' in removed
    assert '      model_name: "lora_router"' in added
    assert 24 >= len(added)
    if version == "v0.10.0":
        assert 1 == len(removed)
    else:
        assert not [line for line in removed if "lora_task_id" in line]
        assert 2 == len([line for line in removed if "name:" in line and "lora_" in line])


@pytest.mark.parametrize("version", VERSIONS)
@pytest.mark.parametrize("postprocessing", [None, "postprocessing"])
def test_rewire_to_forward_is_idempotent(version: str, postprocessing: str | None) -> None:
    """Doing it again changes no byte."""
    once = rewire_to_forward(upstream(version, "ensemble"), postprocessing=postprocessing)

    assert once == rewire_to_forward(once, postprocessing=postprocessing)


def test_rewire_to_forward_leads_previous_ids_to_our_postprocessing() -> None:
    """The router's previous_ids are the postprocessing's PREVIOUS_TOKENS, when that step asks for them."""
    rewired = protobuf(rewire_to_forward(fill(upstream("v0.18.0", "ensemble")), postprocessing="postprocessing"))

    assert "_PREVIOUS_TOKENS" == step_of(rewired, "lora_router").output_map["previous_ids"]
    assert "_PREVIOUS_TOKENS" == step_of(rewired, "postprocessing").input_map["PREVIOUS_TOKENS"]


def test_rewire_to_forward_adds_the_postprocessing_to_an_ensemble_rewired_before() -> None:
    """The parts can be added one after the other."""
    text = upstream("v0.15.0", "ensemble")

    assert rewire_to_forward(text, postprocessing="postprocessing") == rewire_to_forward(
        rewire_to_forward(text), postprocessing="postprocessing"
    )


def test_rewire_to_forward_keeps_crlf_and_a_missing_newline_at_the_end() -> None:
    """Line ends are the file's."""
    text = upstream("v0.18.0", "ensemble").rstrip("\n")

    rewired = rewire_to_forward(text.replace("\n", "\r\n"))

    assert rewire_to_forward(text).replace("\n", "\r\n") == rewired


def test_rewire_to_forward_takes_tensors_that_nothing_uses_any_more() -> None:
    """Triton refuses an ensemble with an unused tensor: the weights go from the step that made them, too."""
    text = ENSEMBLE % (
        'output_map { key: "W" value: "_w" } output_map { key: "C" value: "_c" }',
        'input_map { key: "lora_weights" value: "_w" } input_map { key: "lora_config" value: "_c" }',
    )
    wanted = protobuf(rewire_to_forward(ENSEMBLE % ("", "")))

    assert wanted == protobuf(rewire_to_forward(text))


def test_rewire_to_forward_keeps_tensors_that_another_step_uses() -> None:
    """The ensemble's lora_weights stay where another step still takes them."""
    text = (ENSEMBLE % ('input_map { key: "W" value: "w" }', 'input_map { key: "lora_weights" value: "w" }')).replace(
        "input [", 'input [ { name: "w" data_type: TYPE_FP16 dims: [ -1, -1 ] },'
    )

    rewired = protobuf(rewire_to_forward(text))

    assert ["w", "text", "lora_name", "lora_split_key"] == [tensor.name for tensor in rewired.input]
    assert "w" == step_of(rewired, "pre").input_map["W"]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ('name: "engine"', "expected an ensemble, got a config without ensemble_scheduling steps"),
        (
            (ENSEMBLE % ("", "")).replace("tensorrt_llm", "tensorrt_llm_bls"),
            "no step for 'tensorrt_llm', only for 'pre', 'tensorrt_llm_bls'; name the engine's model",
        ),
        (
            (ENSEMBLE % ("", "")).replace('"pre"', '"lora_router"'),
            "expected one step for 'tensorrt_llm' or 'lora_router', got 'lora_router', 'tensorrt_llm'",
        ),
        (
            (ENSEMBLE % ("", "")).replace("model_version: -1", "model_version: 3"),
            "line 8, column 49: the step asks for version 3 of 'tensorrt_llm'",
        ),
        (
            (ENSEMBLE % ("", "")).replace("input [", "input [ { name: 'lora_name' data_type: TYPE_INT32 },", 1),
            "expected the ensemble's input 'lora_name' to be TYPE_STRING, got TYPE_INT32",
        ),
        (
            ENSEMBLE % ("", 'input_map { key: "lora_name" value: "text" }'),
            "expected input_map 'lora_name' of the step for 'lora_router' to be 'lora_name'",
        ),
        (
            ENSEMBLE % ("", 'input_map { key: "lora_name" }'),
            "line 8, column 106: expected input_map 'lora_name' of the step for 'lora_router' to be 'lora_name'",
        ),
    ],
    ids=[
        "no ensemble",
        "another model",
        "two steps",
        "a pinned version",
        "lora_name of another type",
        "mapped already",
        "mapped to nothing",
    ],
)
def test_rewire_to_forward_refuses_what_it_cannot_do_without_guessing(text: str, message: str) -> None:
    """The reason is named."""
    with pytest.raises(ConfigError, match=message):
        rewire_to_forward(text)


def test_rewire_to_forward_needs_the_postprocessing_step_it_is_told_of() -> None:
    """A postprocessing that is not there is named."""
    with pytest.raises(ConfigError, match="the ensemble has no step for 'postprocessing'"):
        rewire_to_forward(ENSEMBLE % ("", ""), postprocessing="postprocessing")


# --- rewire_to_resolve ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("version", VERSIONS)
def test_rewire_to_resolve_makes_exactly_the_intended_change(version: str) -> None:
    """protobuf sees one more step, which gives the engine its LoRA inputs, and nothing else changed."""
    text = fill(upstream(version, "ensemble"))
    wanted = protobuf(text)
    engine = step_of(wanted, "tensorrt_llm")
    given = engine.input_map.get("lora_task_id")
    for name in ("lora_weights", "lora_config"):
        for tensor in [tensor for tensor in wanted.input if tensor.name == name]:
            wanted.input.remove(tensor)
    naming = ("lora_name", "lora_split_key")
    for name in naming:
        wanted.input.add(name=name, data_type=13, dims=[1], optional=True)
    resolver = wanted.ensemble_scheduling.step.add(model_name="lora_resolver", model_version=-1)
    required = engine.input_map["request_output_len"]
    resolver.input_map.update({"request_output_len": required, **{name: name for name in naming}})
    resolver.input_map.update({"input_lengths": engine.input_map["input_lengths"]})
    resolver.input_map.update({"lora_task_id": given} if given else {})
    for name in ("lora_task_id", "lora_weights", "lora_config"):
        resolver.output_map[name] = engine.input_map[name] = f"_{name.upper()}"
    resolver.output_map["request_output_len"] = engine.input_map["request_output_len"] = "_RESOLVED_OUTPUT_LEN"

    assert wanted == protobuf(rewire_to_resolve(text))


@pytest.mark.parametrize("version", VERSIONS)
def test_an_ensemble_that_was_led_past_the_router_before_gets_what_it_lacked(version: str) -> None:
    """The engine's request_output_len comes from the resolver now; and it can be led to the router again, as ever."""
    text = fill(upstream(version, "ensemble"))
    resolve = rewire_to_resolve(text)
    before = as_rewired_before(resolve)
    assert protobuf(before) != protobuf(resolve)

    assert protobuf(resolve) == protobuf(rewire_to_resolve(before))
    assert protobuf(rewire_to_forward(text)) == protobuf(rewire_to_forward(before))


@pytest.mark.parametrize("version", VERSIONS)
@pytest.mark.parametrize("postprocessing", [None, "postprocessing"])
def test_either_topology_can_be_changed_into_the_other(version: str, postprocessing: str | None) -> None:
    """And each edit is idempotent, to the byte."""
    text = fill(upstream(version, "ensemble"))
    forward = rewire_to_forward(text, postprocessing=postprocessing)
    resolve = rewire_to_resolve(text)

    assert resolve == rewire_to_resolve(resolve)
    assert protobuf(resolve) == protobuf(rewire_to_resolve(forward))
    assert protobuf(forward) == protobuf(rewire_to_forward(resolve, postprocessing=postprocessing))


@pytest.mark.parametrize("version", VERSIONS)
def test_an_announced_request_goes_through_a_second_step_of_postprocessing(version: str) -> None:
    """protobuf sees one more step, through which request_output_len goes, and whose tokens a response has."""
    text = fill(upstream(version, "ensemble"))
    wanted = protobuf(rewire_to_resolve(text))
    resolver, engine = step_of(wanted, "lora_resolver"), step_of(wanted, "tensorrt_llm")
    tokens = step_of(wanted, "postprocessing")
    for name in ("batch_index", "sequence_index"):
        if name in engine.output_map:
            tokens.input_map[name.upper()] = engine.output_map[name]
    announcing = wanted.ensemble_scheduling.step.add(model_name="postprocessing", model_version=-1)
    announcing.input_map["REQUEST_OUTPUT_LEN"] = resolver.input_map["request_output_len"]
    for name in ("streaming", "beam_width", "num_return_sequences"):
        if name in engine.input_map:
            announcing.input_map[name.upper()] = engine.input_map[name]
    announcing.input_map["STOP_WORDS_LIST"] = engine.input_map["stop_words_list"]
    announcing.output_map["OUT_REQUEST_OUTPUT_LEN"] = "_ANNOUNCED_OUTPUT_LEN"
    resolver.input_map["request_output_len"] = "_ANNOUNCED_OUTPUT_LEN"
    announced = rewire_to_resolve(text, postprocessing="postprocessing")

    assert wanted == protobuf(announced)
    assert announced == rewire_to_resolve(announced, postprocessing="postprocessing")
    assert protobuf(rewire_to_forward(text)) == protobuf(rewire_to_forward(announced))


@pytest.mark.parametrize("version", VERSIONS)
def test_rewire_to_resolve_leaves_all_other_lines_as_they_are(version: str) -> None:
    """The lines that go are those of the LoRA inputs, with the comments about them."""
    text = upstream(version, "ensemble")

    removed, added = removed_and_added(text, rewire_to_resolve(text))

    assert not [line for line in added if "tensorrt_llm" in line]
    assert not [line for line in removed if "model_name" in line]
    assert 3 >= len([line for line in removed if "key:" in line])


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "expected an ensemble, got a config without ensemble_scheduling steps"),
        (
            ENSEMBLE % ("", ""),
            "the ensemble leads no request_output_len to the step for 'tensorrt_llm'; rewire this ensemble by hand",
        ),
        (
            (ENSEMBLE % ("", ""))
            .replace("tensorrt_llm", "lora_router")
            .replace("model_version: -1", "model_version: 3"),
            "the step asks for version 3 of 'lora_router'",
        ),
    ],
    ids=["no ensemble", "no request_output_len", "a pinned version"],
)
def test_rewire_to_resolve_refuses_what_it_cannot_do_without_guessing(text: str, message: str) -> None:
    """The reason is named."""
    with pytest.raises(ConfigError, match=message):
        rewire_to_resolve(text)
