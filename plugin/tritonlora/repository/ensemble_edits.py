# SPDX-FileCopyrightText: the tritonlora authors
# SPDX-License-Identifier: Apache-2.0
"""Put the router or the resolver into an ensemble's config.pbtxt, so that requests can name adapters.

    forward    preprocessing -> lora_router -> postprocessing; the router sends requests to the engine's model
    resolve    preprocessing -> lora_resolver -> tensorrt_llm -> postprocessing

The LLM API's model takes and gives text, so it needs neither preprocessing nor postprocessing. In the forward topology,
its ensemble's text_output is the new text, which the router makes. Otherwise it is the whole text so far, as the model
gives it.

The edits are lossless and idempotent, and each topology can be changed into the other. In the resolve topology, a step
of tritonlora's postprocessing announces each request before the engine gets it (see `serving.text_streams`).
"""

from __future__ import annotations

from collections.abc import Mapping

from tritonlora.errors import ConfigError
from tritonlora.pbtxt.edits import append_value, quote, remove_value, replace_value
from tritonlora.pbtxt.model_config import DATA_TYPES
from tritonlora.pbtxt.text_format import Document, Message, error_at
from tritonlora.repository.paths import DEFAULT_TARGET, RESOLVER, ROUTER
from tritonlora.serving.routing import SPLIT_KEY
from tritonlora.serving.wire import ENGINE_MODEL, INPUT_LENGTHS, REQUIRED, WIRES, Wire, wire_of

PREVIOUS_TOKENS = "_PREVIOUS_TOKENS"
ANNOUNCED_LENGTH = "_ANNOUNCED_OUTPUT_LEN"
# A model with this output can announce requests. Another step of the same model decodes tokens.
ANNOUNCEMENT = "OUT_REQUEST_OUTPUT_LEN"
# Inputs of the engine -> those of the step that announces a request.
ANNOUNCED = {
    REQUIRED: "REQUEST_OUTPUT_LEN",
    "streaming": "STREAMING",
    "beam_width": "BEAM_WIDTH",
    "num_return_sequences": "NUM_RETURN_SEQUENCES",
    "stop_words_list": "STOP_WORDS_LIST",
}
# Outputs of the engine -> inputs of the step that decodes tokens.
INDICES = {"batch_index": "BATCH_INDEX", "sequence_index": "SEQUENCE_INDEX"}
NAMING = ("lora_name", SPLIT_KEY)  # optional inputs of the ensemble, which its step for the router or resolver gets
RESOLVED_INPUTS = {REQUIRED: "_RESOLVED_OUTPUT_LEN", "text_input": "_RESOLVED_TEXT_INPUT"}  # `Wire.required` -> tensor


def resolved_tensors(wire: Wire) -> dict[str, str]:
    """Output of the resolver -> the ensemble's tensor, from which the target's step gets its input of the same name."""
    return {wire.required: RESOLVED_INPUTS[wire.required], **{name: f"_{name.upper()}" for name in wire.resolved}}


def rewire_to_forward(
    document: Document,
    *,
    target: str = DEFAULT_TARGET,
    postprocessing: str | None = None,
) -> Document:
    """An ensemble's config.pbtxt with the router in the place of `target`, and the inputs in `NAMING`.

    Inputs that only the router may send to the target are disconnected. Tensors that are unused then are removed, since
    Triton refuses an ensemble with an unused tensor. `postprocessing` is the name of a step with the input
    PREVIOUS_TOKENS, which gets the router's previous_ids. An ensemble that resolved gets the router's own output in the
    place of the target's output that it is made of (`Wire.router_output`).

    Raises ConfigError when not exactly one step is for `target` or the router.
    """
    _require_one_step(document, target)
    document = _remove_announcement(document)
    document = _remove_resolver(document, target)
    document = _rename_step(document, target, ROUTER)
    for name in (name for wire in WIRES for name in wire.router_only):
        document = _disconnect(document, ROUTER, name)
    for name in NAMING:
        document = _connect(_declare_string(document, name), ROUTER, "input_map", name, name)
    if postprocessing is not None:
        document = _connect(document, ROUTER, "output_map", "previous_ids", PREVIOUS_TOKENS)
        document = _connect(document, postprocessing, "input_map", "PREVIOUS_TOKENS", PREVIOUS_TOKENS)
    return document


def rewire_to_resolve(
    document: Document,
    *,
    target: str = DEFAULT_TARGET,
    wire: Wire = ENGINE_MODEL,
    postprocessing: str | None = None,
) -> Document:
    """An ensemble's config.pbtxt with a step for the resolver, which sends the step for `target` its LoRA inputs.

    `wire` is that of the target. The resolver gets the inputs in `NAMING`, and the adapter's id if the ensemble had one
    for the target. `Wire.required` goes through the resolver to the target. The target does not run without it, so an
    empty response of the resolver never becomes a request to the base model. The router's own outputs are disconnected:
    the resolver does not have them. `postprocessing` is a model with the output OUT_REQUEST_OUTPUT_LEN; a step of it
    announces each request.

    Raises ConfigError when not exactly one step is for `target` or the router, or when that step has no
    `Wire.required`.
    """
    _require_one_step(document, target)
    document = _rename_step(document, ROUTER, target)
    for name in NAMING:
        document = _declare_string(document, name)
    given, asked = _maps(document, "input_map", target), _maps(document, "input_map", RESOLVER)
    required = asked.get(wire.required, given.get(wire.required))
    if required is None:
        raise ConfigError(
            f"the ensemble leads no {wire.required} to the step for {target!r}; rewire this ensemble by hand"
        )
    resolved = resolved_tensors(wire)
    inputs = {wire.required: required, **{name: name for name in NAMING}}
    if INPUT_LENGTHS in given:
        inputs[INPUT_LENGTHS] = given[INPUT_LENGTHS]
    task_id = given.get(wire.task_id, resolved[wire.task_id])
    if task_id != resolved[wire.task_id]:
        inputs[wire.task_id] = task_id
    if _find_step(document, RESOLVER):
        for kind, tensors in (("input_map", inputs), ("output_map", resolved)):
            for key, tensor in tensors.items():
                document = _connect(document, RESOLVER, kind, key, tensor)
    else:
        document = _add_step(document, RESOLVER, inputs, resolved)
    for name in NAMING:
        if name not in resolved:
            document = _disconnect(document, target, name)
    for key, tensor in resolved.items():
        document = _reconnect(document, target, key, tensor)
    if wire.router_output:
        document = _rename_output(document, target, *wire.router_output)
    for model in _step_names(document):
        for key, tensor in _maps(document, "input_map", model).items():
            if tensor == PREVIOUS_TOKENS:
                document = _disconnect(document, model, key)
    return document if postprocessing is None else _announce(document, target, postprocessing)


def _announce(document: Document, target: str, postprocessing: str) -> Document:
    """The ensemble with a step of `postprocessing` that announces requests and passes request_output_len on."""
    if _announcement(document) is not None:
        return document
    length = _maps(document, "input_map", RESOLVER)[REQUIRED]
    given = _maps(document, "input_map", target) | {REQUIRED: length}
    inputs = {name: given[key] for key, name in ANNOUNCED.items() if key in given}
    document = _add_step(document, postprocessing, inputs, {ANNOUNCEMENT: ANNOUNCED_LENGTH})
    document = _reconnect(document, RESOLVER, REQUIRED, ANNOUNCED_LENGTH)
    outputs = _maps(document, "output_map", target)
    for key, name in INDICES.items():
        if key in outputs:
            document = _connect(document, postprocessing, "input_map", name, outputs[key])
    return document


def _remove_announcement(document: Document) -> Document:
    """The ensemble without the step that announces requests, and without the inputs that only this step needs."""
    step = _announcement(document)
    if step is None:
        return document
    name, length = step.scalars("model_name")[0].value, _map_of(step, "input_map")[ANNOUNCED[REQUIRED]]
    document = remove_value(document, document.message.messages("ensemble_scheduling")[-1], step)
    for model in _step_names(document):
        for key, tensor in _maps(document, "input_map", model).items():
            if tensor == ANNOUNCED_LENGTH:
                document = _reconnect(document, model, key, length)
    for key in INDICES.values():
        document = _disconnect(document, name, key)
    return document


def _remove_resolver(document: Document, target: str) -> Document:
    """The ensemble without the resolver's step. The target's inputs that went through it lead to `target` again.

    The step for `target`, which the router is to take over, gets the router's own output.
    """
    if _find_step(document, RESOLVER) is None:
        return document
    wire = wire_of(_maps(document, "output_map", RESOLVER))
    given, asked = _maps(document, "input_map", target), _maps(document, "input_map", RESOLVER)
    for key, tensor in resolved_tensors(wire).items():
        if given.get(key) == tensor:
            document = (
                _reconnect(document, target, key, asked[key]) if key in asked else _disconnect(document, target, key)
            )
    if wire.router_output:
        own, source = wire.router_output
        document = _rename_output(document, target, source, own)
    gone = _find_step(document, RESOLVER)
    return remove_value(document, document.message.messages("ensemble_scheduling")[-1], gone) if gone else document


def _require_one_step(document: Document, target: str) -> None:
    steps = _step_names(document)
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


def _rename_step(document: Document, old: str, new: str) -> Document:
    step = _find_step(document, old)
    if step is None:
        return document
    version = step.scalar("model_version")
    if version is not None and version.value != "-1":
        raise error_at(
            document.text,
            version.start,
            f"the step asks for version {version.value} of {old!r}, and {new!r} does not have it; set it to -1",
        )
    model_name = step.scalars("model_name")[0]
    return replace_value(document, model_name, quote(new))


def _rename_output(document: Document, model: str, old: str, new: str) -> Document:
    """Connect the ensemble's tensor of the output `old` of the step for `model` with its output `new` instead."""
    step = _find_step(document, model)
    entry = step.find("output_map", "key", old) if step else None
    key = entry.scalar("key") if entry else None
    return replace_value(document, key, quote(new)) if key else document


def _declare_string(document: Document, name: str) -> Document:
    """The ensemble with the optional input `name`, a string. ConfigError when it has the input with another type."""
    spec = document.message.find("input", "name", name)
    if spec is None:
        literal = f"{{\n  name: {quote(name)}\n  data_type: TYPE_STRING\n  dims: [ 1 ]\n  optional: true\n}}"
        return append_value(document, document.message, "input", literal)
    data_type = spec.scalar("data_type")
    if data_type is None or data_type.value not in _STRING:
        got = data_type.value if data_type else "none"
        raise ConfigError(f"expected the ensemble's input {name!r} to be TYPE_STRING, got {got}")
    return document


def _add_step(document: Document, model: str, inputs: Mapping[str, str], outputs: Mapping[str, str]) -> Document:
    maps = (("input_map", inputs), ("output_map", outputs))
    entries = "".join(
        f"\n  {kind} {{\n    key: {quote(key)}\n    value: {quote(tensor)}\n  }}"
        for kind, tensors in maps
        for key, tensor in tensors.items()
    )
    scheduling = document.message.messages("ensemble_scheduling")[-1]
    literal = f"{{\n  model_name: {quote(model)}\n  model_version: -1{entries}\n}}"
    return append_value(document, scheduling, "step", literal)


_STRING = ("TYPE_STRING", str(DATA_TYPES.index("TYPE_STRING")))  # protobuf takes an enum's number as well


def _connect(document: Document, model: str, kind: str, key: str, tensor: str) -> Document:
    """Connect the ensemble's `tensor` with the tensor `key` of the step for `model`; `kind` is input_map or output_map.

    ConfigError when `key` is connected with another tensor already.
    """
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
            document.text,
            place,
            f"expected {kind} {key!r} of the step for {model!r} to be {tensor!r}; edit or remove it",
        )
    return document


def _reconnect(document: Document, model: str, key: str, tensor: str) -> Document:
    """Lead `tensor` to the input `key` of the step for `model`. The tensor before it is removed if it is unused now."""
    step = _find_step(document, model)
    entry = step.find("input_map", "key", key) if step else None
    value = entry.scalar("value") if entry else None
    if value is None:
        return _connect(document, model, "input_map", key, tensor)
    if value.value == tensor:
        return document
    return _without_unused(replace_value(document, value, quote(tensor)), value.value)


def _disconnect(document: Document, model: str, key: str) -> Document:
    """Remove the input `key` from the step for `model`. Its tensor is removed if it is unused now."""
    step = _find_step(document, model)
    entry = step.find("input_map", "key", key) if step else None
    if step is None or entry is None:
        return document
    value = entry.scalar("value")
    document = remove_value(document, step, entry)
    return document if value is None else _without_unused(document, value.value)


def _without_unused(document: Document, tensor: str) -> Document:
    """The ensemble without `tensor`, if nothing uses it: Triton refuses an ensemble with an unused tensor."""
    is_used = document.message.find("output", "name", tensor) is not None or any(
        entry.has("value", tensor) for step in _steps(document) for entry in step.messages("input_map")
    )
    return document if is_used else _remove_producers(document, tensor)


def _remove_producers(document: Document, tensor: str) -> Document:
    """Remove `tensor` from the ensemble's inputs, or from the outputs of the step that makes it."""
    if declared := document.message.find("input", "name", tensor):
        return remove_value(document, document.message, declared, with_comment=True)
    for step in _steps(document):
        if entry := step.find("output_map", "value", tensor):
            return remove_value(document, step, entry)
    return document


def _steps(document: Document) -> tuple[Message, ...]:
    scheduling = document.message.message("ensemble_scheduling")
    return scheduling.messages("step") if scheduling else ()


def _step_names(document: Document) -> list[str]:
    names = (step.scalar("model_name") for step in _steps(document))
    return [name.value if name else "" for name in names]


def _maps(document: Document, kind: str, model: str) -> dict[str, str]:
    """The input_map or output_map of the ensemble's step for `model`; empty if there is no such step."""
    step = _find_step(document, model)
    return _map_of(step, kind) if step else {}


def _map_of(step: Message, kind: str) -> dict[str, str]:
    found = ((entry.scalar("key"), entry.scalar("value")) for entry in step.messages(kind))
    return {key.value: value.value for key, value in found if key and value}


def _find_step(document: Document, model: str) -> Message | None:
    """The step for a model, other than the step that announces requests; None if there is none."""
    found = (step for step in _steps(document) if step.has("model_name", model) and not _announces(step))
    return next(found, None)


def _announcement(document: Document) -> Message | None:
    return next(filter(_announces, _steps(document)), None)


def _announces(step: Message) -> bool:
    return step.find("output_map", "key", ANNOUNCEMENT) is not None
