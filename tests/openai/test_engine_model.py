# SPDX-FileCopyrightText: the tritonlora authors
# SPDX-License-Identifier: Apache-2.0
"""Requests as the engine's tensors, and its tokens as text.

The engine is upstream's, as its config.pbtxt of v0.18 declares it. For text the oracle is the tokenizers library.
"""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer

from text_tokenizer import END, save_tokenizer
from tritonlora.openai import chat_tokenizer
from tritonlora.openai.api_error import ApiError
from tritonlora.openai.chat_tokenizer import ChatTokenizer
from tritonlora.openai.engine_model import EngineModel, TokenSequence
from tritonlora.openai.schema import CompletionRequest
from tritonlora.openai.served_model import Declared, Source
from tritonlora.pbtxt.model_config import parse_config
from tritonlora.repository.model_configs import target_ensemble
from tritonlora.repository.shipped import shipped_models

CONFIG = parse_config((shipped_models() / "tensorrt_llm" / "config.pbtxt").read_text())
TYPES = {spec.name: str(spec.data_type) for spec in CONFIG.inputs}
GUIDES = {"guided_decoding_guide_type": "TYPE_STRING", "guided_decoding_guide": "TYPE_STRING"}


@pytest.fixture(scope="module")
def directory(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A Hugging Face tokenizer whose tokens are bytes."""
    found = tmp_path_factory.mktemp("tokenizer")
    save_tokenizer(found)
    return found


@pytest.fixture(scope="module")
def text(directory: Path) -> ChatTokenizer:
    """The same, as the door has it."""
    return chat_tokenizer.load(directory)


def model(text: ChatTokenizer, types: dict[str, str] = TYPES, *, decoupled: bool = True) -> EngineModel:
    """An engine with these inputs."""
    return EngineModel("lora_tokens", "tensorrt_llm", Declared("tensorrt_llm", types, True), types, decoupled, text)


def request(**fields: Any) -> CompletionRequest:
    """A request of /v1/completions."""
    return CompletionRequest.model_validate({"model": "m", "prompt": "x", **fields})


def test_the_choices_of_a_request_have_one_split_key(text: ChatTokenizer) -> None:
    """The user's, or one of the request's own: the choices must not come from different adapters of an alias."""
    served = model(text, TYPES | {"lora_split_key": "TYPE_STRING"})

    def keys(asked: CompletionRequest) -> list[str]:
        prompts = [served.request_inputs(asked, Source("x", [7]), 1) for _ in range(2)]
        choices = [served.choice_inputs(inputs, "prod", number) for inputs in prompts for number in range(2)]
        assert {(1, 1)} == {one["lora_split_key"].shape for one in choices}
        return [one["lora_split_key"].item().decode() for one in choices]

    assert ["zoë"] * 4 == keys(request(user="zoë"))
    first, second = ({*keys(request(user=user))} for user in ("", None))
    assert (1, 1, 2) == (len(first), len(second), len(first | second))
    assert "lora_split_key" not in model(text).request_inputs(request(user="zoë"), Source("x", [7]), 1)


def test_each_field_goes_to_its_input(text: ChatTokenizer) -> None:
    """With the dtypes and shapes that the engine declares."""
    fields = {
        "temperature": 0.5, "top_p": 0.25, "top_k": 3, "seed": -1, "frequency_penalty": 0.5, "presence_penalty": -0.5,
        "repetition_penalty": 1.5, "min_tokens": 2, "stop": ["ab", "c"], "logit_bias": {"5": -1.5}, "logprobs": 0,
        "guided_regex": "a+", "stream": True,
    }  # fmt: skip
    served = model(text, TYPES | GUIDES)
    inputs = served.request_inputs(request(**fields), Source("xyz", [7, 8, 9]), 4)
    a, b, c = (text.tokenizer.encode(one, False)[0] for one in "abc")
    bias = inputs.pop("embedding_bias")

    expected: dict[str, tuple[Any, Any]] = {
        "input_ids": ([[7, 8, 9]], np.int32),
        "input_lengths": ([[3]], np.int32),
        "request_output_len": ([[4]], np.int32),
        "end_id": ([[END]], np.int32),
        "temperature": ([[0.5]], np.float32),
        "runtime_top_p": ([[0.25]], np.float32),
        "runtime_top_k": ([[3]], np.int32),
        "random_seed": ([[(1 << 64) - 1]], np.uint64),
        "frequency_penalty": ([[0.5]], np.float32),
        "presence_penalty": ([[-0.5]], np.float32),
        "repetition_penalty": ([[1.5]], np.float32),
        "min_length": ([[2]], np.int32),
        "stop_words_list": ([[[a, b, c], [2, 3, -1]]], np.int32),
        "return_log_probs": ([[True]], np.bool_),
        "guided_decoding_guide_type": ([[b"regex"]], np.object_),
        "guided_decoding_guide": ([[b"a+"]], np.object_),
        "streaming": ([[True]], np.bool_),
    }
    assert {name: (values, np.dtype(dtype)) for name, (values, dtype) in expected.items()} == {
        name: (array.tolist(), array.dtype) for name, array in inputs.items()
    }
    assert (1, text.tokenizer.vocab_size) == bias.shape
    assert {5: -1.5} == {int(index): float(bias[0, index]) for index in bias[0].nonzero()[0]}


SCHEMA = {"type": "object", "required": ["é"]}


@pytest.mark.parametrize(
    ("fields", "expected"),
    [
        ({"response_format": {"type": "text"}}, (None, None)),
        ({"response_format": {"type": "json_object"}}, ("json", None)),
        (
            {"response_format": {"type": "json_schema", "json_schema": {"name": "x", "schema": SCHEMA}}},
            ("json_schema", SCHEMA),
        ),
        ({"guided_json": SCHEMA}, ("json_schema", SCHEMA)),
        ({"guided_regex": "é+"}, ("regex", "é+")),
        ({"guided_grammar": 'root ::= "é"'}, ("ebnf_grammar", 'root ::= "é"')),
    ],
)
def test_a_guide_is_what_the_engines_model_reads(
    text: ChatTokenizer, fields: dict[str, Any], expected: tuple[str | None, Any]
) -> None:
    """As TensorRT-LLM does, triton_backend/all_models/inflight_batcher_llm/tensorrt_llm/1/model.py: [1, 1] bytes.

    The ensemble that the door asks has the inputs, and passes them on, where the engine's model declares them.
    """
    declared = "".join(
        f'input {{ name: "{name}" data_type: TYPE_STRING dims: [ 1 ] optional: true }}\n' for name in GUIDES
    )
    target = parse_config((shipped_models() / "tensorrt_llm" / "config.pbtxt").read_text() + declared)
    asked = parse_config(target_ensemble(target, name="lora_tokens", target_name="tensorrt_llm", router="lora_router"))
    types = {spec.name: str(spec.data_type) for spec in asked.inputs}
    inputs = model(text, types).request_inputs(request(**fields), Source("x", [1]), 4)
    kind, guide = (inputs[name].squeeze(axis=0)[0].decode() if name in inputs else None for name in GUIDES)

    assert GUIDES.items() <= types.items()
    assert any(GUIDES.keys() <= {*step.input_map} for step in asked.steps)
    assert expected == (kind, json.loads(guide or "") if kind == "json_schema" else guide)


def test_the_end_token_is_told_or_taken_away(text: ChatTokenizer) -> None:
    """ignore_eos."""
    ends = [
        model(text).request_inputs(request(**fields), Source("x", [1]), 4)["end_id"].item()
        for fields in ({}, {"ignore_eos": False}, {"ignore_eos": True})
    ]

    assert [END, END, -1] == ends


@pytest.mark.parametrize(
    ("fields", "needed"),
    [
        ({"temperature": 0.5}, "temperature"),
        ({"top_k": 5}, "runtime_top_k"),
        ({"seed": 5}, "random_seed"),
        ({"frequency_penalty": 1.0}, "frequency_penalty"),
        ({"presence_penalty": 1.0}, "presence_penalty"),
        ({"repetition_penalty": 1.1}, "repetition_penalty"),
        ({"min_tokens": 1}, "min_length"),
        ({"stop": "a"}, "stop_words_list"),
        ({"logit_bias": {"1": 1.0}}, "embedding_bias"),
        ({"logprobs": 0}, "return_log_probs"),
        ({"response_format": {"type": "json_object"}}, "guided_decoding_guide_type"),
        ({"guided_json": {}}, "guided_decoding_guide_type"),
    ],
)
def test_what_the_target_has_no_input_for_is_refused_by_name(
    text: ChatTokenizer, fields: dict[str, Any], needed: str
) -> None:
    """Never ignored."""
    types = {name: kind for name, kind in (TYPES | GUIDES).items() if name != needed}
    assert model(text, TYPES | GUIDES).request_inputs(request(**fields), Source("x", [1]), 4)
    with pytest.raises(ApiError, match=f"{next(iter(fields))}: model 'tensorrt_llm' has no input .*{needed}") as caught:
        model(text, types).request_inputs(request(**fields), Source("x", [1]), 4)

    assert (400, next(iter(fields))) == (caught.value.status, caught.value.param)


@pytest.mark.parametrize("key", ["-1", "x", "260", "9" * 30, "1.5", ""])
def test_a_bias_of_no_token_is_refused(text: ChatTokenizer, key: str) -> None:
    """With the key."""
    with pytest.raises(ApiError, match="is no token id below 260"):
        model(text).request_inputs(request(logit_bias={key: 1.0}), Source("x", [1]), 4)


def test_choices_have_seeds_of_their_own(text: ChatTokenizer) -> None:
    """And the adapter's name, which the base model has none of."""
    served = model(text)
    inputs = served.request_inputs(request(seed=(1 << 63) - 1024), Source("x", [1]), 4)
    first, second = (served.choice_inputs(inputs, name, number) for number, name in enumerate([None, "pirate"]))

    assert "lora_name" not in first
    assert [[b"pirate"]] == second["lora_name"].tolist()
    assert 1 == second["random_seed"].item() - first["random_seed"].item()


def test_a_request_to_stop_has_what_the_target_requires(text: ChatTokenizer) -> None:
    """None, if the target cannot stop."""
    inputs = model(text).stop_inputs()

    assert inputs is not None
    assert {"input_ids", "input_lengths", "request_output_len", "stop"} == inputs.keys()
    assert model(text, {name: kind for name, kind in TYPES.items() if name != "stop"}).stop_inputs() is None


def response(ids: list[int], logprobs: list[float] | None = None) -> SimpleNamespace:
    """A ModelInferResponse with these tokens."""
    outputs = {"output_ids": np.array([[ids]], np.int32), "sequence_length": np.array([[len(ids)]], np.int32)}
    if logprobs is not None:
        outputs["output_log_probs"] = np.array([[logprobs]], np.float32)
    return SimpleNamespace(
        outputs=[SimpleNamespace(name=name) for name in outputs],
        raw_output_contents=[array.tobytes() for array in outputs.values()],
    )


@settings(deadline=None)
@given(st.data())
def test_text_is_the_library_s_own_however_the_tokens_come(directory: Path, data: st.DataObject) -> None:
    """Whole characters only, and at the end U+FFFD for what is no character."""
    oracle = Tokenizer.from_file(str(directory / "tokenizer.json"))
    ids = data.draw(st.lists(st.one_of(st.integers(0, 259), st.sampled_from(oracle.encode("é日🎉ü").ids)), max_size=20))
    sequence = TokenSequence(_LOADED.setdefault(directory, chat_tokenizer.load(directory)), (), 100)
    pieces, left = [], ids
    while left:
        size = data.draw(st.integers(1, len(left)))
        pieces.append(sequence.add(response(left[:size])).text)
        left = left[size:]
    pieces.append(sequence.end().text)

    assert oracle.decode(ids, skip_special_tokens=True) == "".join(pieces)
    assert len(ids) == sequence.count


_LOADED: dict[Path, ChatTokenizer] = {}


def test_log_probabilities_may_be_of_all_tokens_so_far(text: ChatTokenizer) -> None:
    """Or of the new ones alone."""
    for second in ([-1.0, -2.0, -3.0], [-2.0, -3.0]):
        sequence = TokenSequence(text, (), 100)
        sequence.add(response([1], [-1.0]))

        assert ((2, -2.0), (3, -3.0)) == sequence.add(response([2, 3], second)).logprobs


@pytest.mark.parametrize(
    ("ids", "stops", "reason"), [([1, 2, 3], (), "length"), ([1, 2], (), "stop"), ([65, 66, 67], ("",), "length")]
)
def test_the_reason_to_end(text: ChatTokenizer, ids: list[int], stops: tuple[str, ...], reason: str) -> None:
    """All tokens that were allowed, or fewer."""
    sequence = TokenSequence(text, [stop for stop in stops if stop], 3)
    sequence.add(response(ids))

    assert reason == sequence.finish_reason


def test_a_stop_string_in_the_last_token_is_the_reason(text: ChatTokenizer) -> None:
    """Even if the response has as many tokens as it may have."""
    ids = text.tokenizer.encode("abc", False)
    sequence = TokenSequence(text, ["c"], 3)

    assert ("ab", "stop", True) == (sequence.add(response(ids)).text, sequence.finish_reason, sequence.is_stopped)


def test_an_engine_that_does_not_stream_may_send_the_prompt_first(text: ChatTokenizer) -> None:
    """Where it has no input that leaves the prompt out."""
    types = {name: kind for name, kind in TYPES.items() if name != "exclude_input_in_output"}
    served = model(text, types, decoupled=False)
    prompt, answer = (text.tokenizer.encode(one, False) for one in ("ab", "cd"))
    sequence = served.sequence(request(), Source("ab", prompt), 9)

    assert "cd" == sequence.add(response([*prompt, *answer])).text
    assert 2 == sequence.count
