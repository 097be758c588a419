# SPDX-FileCopyrightText: the tritonlora authors
# SPDX-License-Identifier: Apache-2.0
"""The edits that lead an ensemble to its engine's model by the names of adapters: text to text, lossless, idempotent.

    forward    preprocessing -> lora_router -> postprocessing; the router asks the engine's model by itself
    resolve    preprocessing -> lora_resolver -> tensorrt_llm -> postprocessing

Either way can be changed into the other.
"""

from __future__ import annotations

from collections.abc import Mapping

from tritonlora.errors import ConfigError
from tritonlora.pbtxt.edits import append_value, quote, remove_value, replace_value
from tritonlora.pbtxt.model_config import ModelConfig, parse_config
from tritonlora.pbtxt.text_format import Document, Message, error_at, parse
from tritonlora.repository.model_configs import FORMERLY_THERE, REQUIRED
from tritonlora.repository.paths import DEFAULT_TARGET, RESOLVER, ROUTER
from tritonlora.serving.wire import WIRES

PREVIOUS_TOKENS = "_PREVIOUS_TOKENS"
# Outputs of the resolver -> the ensemble's tensors, from which the engine's step gets its inputs of the same names.
RESOLVED = {
    REQUIRED: "_RESOLVED_OUTPUT_LEN",
    "lora_task_id": "_LORA_TASK_ID",
    "lora_weights": "_LORA_WEIGHTS",
    "lora_config": "_LORA_CONFIG",
}


def rewire_to_forward(
    text: str,
    *,
    target: str = DEFAULT_TARGET,
    postprocessing: str | None = None,
) -> str:
    """An ensemble's config.pbtxt with the router in `target`'s place, and the optional input lora_name leading to it.

    What only the router gives no longer leads to that step, and tensors that this leaves unused go: Triton refuses an
    ensemble with an unused tensor. With `postprocessing`, the name of a step with the input PREVIOUS_TOKENS, the
    router's previous_ids lead there.

    Raises ConfigError when it is not plain which step to change.
    """
    _require_one_step(text, target)
    text = _remove_resolver(text, target)
    text = _rename_step(text, target, ROUTER)
    for name in (name for wire in WIRES for name in wire.router_only):
        text = _disconnect(text, ROUTER, name)
    text = _declare_lora_name(text)
    text = _connect(text, ROUTER, "input_map", "lora_name", "lora_name")
    if postprocessing is not None:
        text = _connect(text, ROUTER, "output_map", "previous_ids", PREVIOUS_TOKENS)
        text = _connect(text, postprocessing, "input_map", "PREVIOUS_TOKENS", PREVIOUS_TOKENS)
    return text


def rewire_to_resolve(text: str, *, target: str = DEFAULT_TARGET) -> str:
    """An ensemble's config.pbtxt with a step for the resolver, which gives the step for `target` its LoRA inputs.

    The resolver gets the optional inputs lora_name, and lora_task_id where the ensemble gave one to the target. The
    target's request_output_len goes through the resolver: the target refuses to be without, so that an empty response
    of the resolver is no request to the base model. The router's previous_ids go: nobody but the router knows them.

    Raises ConfigError when it is not plain which step to change.
    """
    _require_one_step(text, target)
    text = _rename_step(text, ROUTER, target)
    text = _declare_lora_name(text)
    given = _input_map(text, target)
    asked = _input_map(text, RESOLVER)
    required = asked.get(REQUIRED, given.get(REQUIRED))
    if required is None:
        raise ConfigError(f"the ensemble gives the step for {target!r} no {REQUIRED}; rewire this ensemble by hand")
    inputs = {REQUIRED: required, "lora_name": "lora_name"}
    task_id = given.get("lora_task_id", RESOLVED["lora_task_id"])
    if task_id != RESOLVED["lora_task_id"]:
        inputs["lora_task_id"] = task_id
    document = parse(text)
    if not _find_step(document, RESOLVER):
        scheduling = document.message.messages("ensemble_scheduling")[-1]
        literal = f"{{\n  model_name: {quote(RESOLVER)}\n  model_version: -1\n}}"
        text = append_value(document, scheduling, "step", literal)
    for key, tensor in inputs.items():
        text = _connect(text, RESOLVER, "input_map", key, tensor)
    text = _disconnect(text, target, "lora_name")
    text = _disconnect(text, RESOLVER, FORMERLY_THERE)
    for key, tensor in RESOLVED.items():
        text = _connect(text, RESOLVER, "output_map", key, tensor)
        text = _reconnect(text, target, key, tensor)
    for other in parse_config(text).steps:
        for key, tensor in other.input_map.items():
            if tensor == PREVIOUS_TOKENS:
                text = _disconnect(text, other.model_name, key)
    return text


def _remove_resolver(text: str, target: str) -> str:
    """The ensemble without that step; what the resolver got of the target's inputs leads to `target` again."""
    if _find_step(parse(text), RESOLVER) is None:
        return text
    given, asked = _input_map(text, target), _input_map(text, RESOLVER)
    for key, tensor in RESOLVED.items():
        if given.get(key) == tensor:
            text = _reconnect(text, target, key, asked[key]) if key in asked else _disconnect(text, target, key)
    document = parse(text)
    gone = _find_step(document, RESOLVER)
    return remove_value(document, document.message.messages("ensemble_scheduling")[-1], gone) if gone else text


def _input_map(text: str, model: str) -> Mapping[str, str]:
    """That of the ensemble's step for `model`; empty where there is none."""
    return next((step.input_map for step in parse_config(text).steps if step.model_name == model), {})


def _require_one_step(text: str, target: str) -> None:
    steps = [step.model_name for step in parse_config(text).steps]
    if not steps:
        raise ConfigError("expected an ensemble, got a config without ensemble_scheduling steps")
    found = [name for name in steps if name in (target, ROUTER)]
    listed = ", ".join(map(repr, steps))
    if not found:
        raise ConfigError(
            f"the ensemble has no step for {target!r}, only for {listed}; name the engine's model (--target)"
        )
    if len(found) > 1:
        raise ConfigError(f"expected one step for {target!r} or {ROUTER!r}, got {listed}; rewire this ensemble by hand")


def _rename_step(text: str, old: str, new: str) -> str:
    document = parse(text)
    step = _find_step(document, old)
    if step is None:
        return text
    version = step.scalar("model_version")
    if version is not None and version.value != "-1":
        raise error_at(
            text,
            version.start,
            f"the step asks for version {version.value} of {old!r}, and {new!r} has none but its own; set it to -1",
        )
    model_name = step.scalars("model_name")[0]
    return replace_value(document, model_name, quote(new))


def _declare_lora_name(text: str) -> str:
    config = parse_config(text)
    spec = config.input("lora_name")
    if spec is None:
        document = parse(text)
        literal = '{\n  name: "lora_name"\n  data_type: TYPE_STRING\n  dims: [ 1 ]\n  optional: true\n}'
        return append_value(document, document.message, "input", literal)
    if spec.data_type != "TYPE_STRING":
        raise ConfigError(f"expected the ensemble's input 'lora_name' to be TYPE_STRING, got {spec.data_type}")
    return text


def _connect(text: str, model: str, kind: str, key: str, tensor: str) -> str:
    """Lead the ensemble's `tensor` to (input_map) or from (output_map) the tensor `key` of the step for `model`."""
    document = parse(text)
    step = _find_step(document, model)
    if step is None:
        raise ConfigError(f"the ensemble has no step for {model!r}")
    entry = step.find(kind, "key", key)
    if entry is None:
        return append_value(document, step, kind, f"{{\n  key: {quote(key)}\n  value: {quote(tensor)}\n}}")
    value = entry.scalar("value")
    if value is None or value.value != tensor:
        place = entry.start if value is None else value.start
        raise error_at(
            text, place, f"expected {kind} {key!r} of the step for {model!r} to be {tensor!r}; edit or remove it"
        )
    return text


def _reconnect(text: str, model: str, key: str, tensor: str) -> str:
    """Lead `tensor` to the input `key` of the step for `model`, whatever led there; what nothing uses then goes."""
    document = parse(text)
    step = _find_step(document, model)
    entry = step.find("input_map", "key", key) if step else None
    value = entry.scalar("value") if entry else None
    if value is None:
        return _connect(text, model, "input_map", key, tensor)
    if value.value == tensor:
        return text
    return _without_unused(replace_value(document, value, quote(tensor)), value.value)


def _disconnect(text: str, model: str, key: str) -> str:
    """Take the input `key` from the step for `model`; what nothing in the ensemble uses then goes."""
    document = parse(text)
    step = _find_step(document, model)
    entry = step.find("input_map", "key", key) if step else None
    if step is None or entry is None:
        return text
    value = entry.scalar("value")
    text = remove_value(document, step, entry)
    return text if value is None else _without_unused(text, value.value)


def _without_unused(text: str, tensor: str) -> str:
    """The ensemble without `tensor`, if nothing uses it: Triton refuses an ensemble with an unused tensor."""
    return text if _is_used(parse_config(text), tensor) else _remove_producers(text, tensor)


def _is_used(ensemble: ModelConfig, tensor: str) -> bool:
    return ensemble.output(tensor) is not None or any(tensor in step.input_map.values() for step in ensemble.steps)


def _remove_producers(text: str, tensor: str) -> str:
    """Take `tensor` from the ensemble's inputs and from the steps that give it."""
    document = parse(text)
    if declared := document.message.find("input", "name", tensor):
        return remove_value(document, document.message, declared, with_comment=True)
    for step in _steps(document):
        if entry := step.find("output_map", "value", tensor):
            return remove_value(document, step, entry)
    return text


def _steps(document: Document) -> tuple[Message, ...]:
    scheduling = document.message.message("ensemble_scheduling")
    return scheduling.messages("step") if scheduling else ()


def _find_step(document: Document, model: str) -> Message | None:
    return next((step for step in _steps(document) if step.has("model_name", model)), None)
