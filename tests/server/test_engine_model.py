# SPDX-FileCopyrightText: the tritonlora authors
# SPDX-License-Identifier: Apache-2.0
"""The CPU engine as a model of a real tritonserver: as it is shipped, and behind what upstream's templates declare."""

from __future__ import annotations

import functools
import queue
import shutil
from collections.abc import Callable, Generator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
import torch
import tritonclient.grpc as grpc
from google.protobuf import text_format

from adapters import lora_weights, save_llama_adapter
from engine_client import config_directory
from peft_oracle import EOS, generate, load_peft
from tritonlora.conversion.layout import plan_layout
from tritonlora.conversion.tensors import lora_config
from tritonlora.engine.profile import load_profile
from tritonlora.launch.server import Server
from tritonlora.peft.adapter import load_adapter
from upstream_configs import VERSIONS, fill, protobuf, upstream

SHIPPED = Path(__file__).parents[2] / "model_repository" / "tensorrt_llm"
HELLO = list(b"hello")
FOREVER = 1_000_000
TIMEOUT = 60.0

Arrays = Mapping[str, npt.NDArray[Any]]


def write_model(repository: Path, name: str, config: Any, **parameters: str) -> None:
    """The shipped model under another name, with the declarations of `config`, a protobuf message."""
    config.name, config.backend = name, "python"
    for key, value in parameters.items():
        config.parameters[key].string_value = value
    shutil.copytree(SHIPPED / "1", repository / name / "1")
    (repository / name / "config.pbtxt").write_text(text_format.MessageToString(config))


def write_warmed_model(repository: Path, directory: Path) -> None:
    """A random Llama with a bfloat16 adapter that Triton's warmup loads as task 3."""
    saved = save_llama_adapter(directory, base_dtype=torch.bfloat16)
    profile = load_profile(saved.base)
    adapter = load_adapter(saved.adapter)
    layout = plan_layout(adapter, dtype="bfloat16", profile=profile)
    weights = lora_weights(adapter, layout)

    config = protobuf((SHIPPED / "config.pbtxt").read_text())
    sample = config.model_warmup.add(name="lora_3", batch_size=1)
    files: dict[str, tuple[str, list[int], bytes]] = {
        "input_ids": ("TYPE_INT32", [4], np.arange(1, 5, dtype=np.int32).tobytes()),
        "input_lengths": ("TYPE_INT32", [1], np.int32(4).tobytes()),
        "request_output_len": ("TYPE_INT32", [1], np.int32(1).tobytes()),
        "lora_task_id": ("TYPE_UINT64", [1], np.uint64(3).tobytes()),
        "lora_weights": ("TYPE_BF16", list(weights.shape), weights.view(torch.int16).numpy().tobytes()),
        "lora_config": ("TYPE_INT32", list(layout.config_shape), lora_config(layout).numpy().tobytes()),
    }
    warmup = repository / "warmed" / "warmup"
    warmup.mkdir(parents=True)
    for name, (data_type, dims, content) in files.items():
        (warmup / name).write_bytes(content)
        sample.inputs[name].data_type = (
            config.DESCRIPTOR.fields_by_name["input"]
            .message_type.fields_by_name["data_type"]
            .enum_type.values_by_name[data_type]
            .number
        )
        sample.inputs[name].dims.extend(dims)
        sample.inputs[name].input_data_file = name
    write_model(repository, "warmed", config, synthetic="false", gpt_model_path=str(saved.base))


@pytest.fixture(scope="module")
def checkpoints(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Where the warmed model's base and adapter are."""
    return tmp_path_factory.mktemp("checkpoints")


@pytest.fixture(scope="module")
def url(launch: Callable[..., Server], tmp_path_factory: pytest.TempPathFactory, checkpoints: Path) -> str:
    """A server with the shipped model, upstream's declarations, a slow one with a small cache, and a warmed one."""
    repository = tmp_path_factory.mktemp("repository")
    shutil.copytree(SHIPPED, repository / "tensorrt_llm", ignore=shutil.ignore_patterns("__pycache__"))
    float16 = str(config_directory(checkpoints / "float16", dtype="float16"))
    config = protobuf(fill(upstream(VERSIONS[0], "tensorrt_llm"), decoupled_mode="False"))
    write_model(repository, "oldest", config, synthetic="true", gpt_model_path=float16)
    write_model(
        repository,
        "slow",
        protobuf(fill(upstream(VERSIONS[-1], "tensorrt_llm"))),
        synthetic="true",
        gpt_model_path=float16,
        exclude_input_in_output="true",
        max_num_requests="1",
        synthetic_token_seconds="0.002",  # noqa: S106  no secret
    )
    write_warmed_model(repository, checkpoints)
    return launch(repository).grpc_url


def tensors(prompt: list[int], max_tokens: int, **inputs: npt.NDArray[Any]) -> dict[str, npt.NDArray[Any]]:
    return {
        "input_ids": np.array([prompt], np.int32),
        "input_lengths": np.array([[len(prompt)]], np.int32),
        "request_output_len": np.array([[max_tokens]], np.int32),
        **inputs,
    }


STREAMING = {"streaming": np.array([[True]])}
ADAPTER: dict[str, npt.NDArray[Any]] = {
    "lora_weights": np.zeros((1, 1, 512), np.float16),
    "lora_config": np.array([[[1, 0, 8]]], np.int32),
}


def task(number: int) -> dict[str, npt.NDArray[Any]]:
    return {"lora_task_id": np.array([[number]], np.uint64)}


def inputs_of(arrays: Arrays) -> list[grpc.InferInput]:
    types = {"int32": "INT32", "uint64": "UINT64", "bool": "BOOL", "float16": "FP16"}
    inputs = []
    for name, array in arrays.items():
        inputs.append(grpc.InferInput(name, array.shape, types[str(array.dtype)]))
        inputs[-1].set_data_from_numpy(array)
    return inputs


def stream(url: str, model: str, arrays: Arrays) -> Generator[Any, None, None]:
    """The responses; closing the iterator early goes away from the request, as a client that hangs up."""
    answers: queue.Queue[tuple[Any, Any]] = queue.Queue()
    with grpc.InferenceServerClient(url) as own:  # a client has one stream
        own.start_stream(lambda result, error: answers.put((result, error)))
        own.async_stream_infer(model, inputs_of(arrays), enable_empty_final_response=True)
        try:
            while True:
                result, error = answers.get(timeout=TIMEOUT)
                if error is not None:
                    raise error
                if result.get_response().outputs:
                    yield result
                if result.get_response().parameters["triton_final_response"].bool_param:
                    return
        finally:
            own.stop_stream(cancel_requests=True)


def tokens_of(response: Any) -> list[int]:
    output_ids, sequence_length = response.as_numpy("output_ids"), response.as_numpy("sequence_length")

    assert (1, 1, sequence_length[0, 0]) == output_ids.shape
    assert (1, 1) == sequence_length.shape
    tokens: list[int] = output_ids[0, 0].tolist()
    return tokens


def test_the_shipped_model_streams_as_it_is(url: str) -> None:
    """A token in each response; one response without streaming; and an empty one where the end token comes."""
    pieces = [tokens_of(response) for response in stream(url, "tensorrt_llm", tensors(HELLO, 12, **STREAMING))]
    whole = [tokens_of(response) for response in stream(url, "tensorrt_llm", tensors(HELLO, 12))]
    end_id = {"end_id": np.array([[ord("h")]], np.int32)}
    ended = [tokens_of(response) for response in stream(url, "tensorrt_llm", tensors(HELLO, 12, **STREAMING, **end_id))]

    assert [[token] for token in b"[base]hello["] == pieces
    assert [list(b"[base]hello[")] == whole
    assert [*([token] for token in b"[base]"), []] == ended


def test_rows_of_a_batch_carry_their_index(url: str) -> None:
    """Two rows through a decoupled model: two responses, each a batch of one."""
    batch = {
        "input_ids": np.array([list(b"abc"), list(b"xyz")], np.int32),
        "input_lengths": np.array([[3], [3]], np.int32),
        "request_output_len": np.array([[8], [7]], np.int32),
    }
    answers = {
        int(response.as_numpy("batch_index")[0, 0]): tokens_of(response)
        for response in stream(url, "tensorrt_llm", batch)
    }

    assert {0: list(b"[base]ab"), 1: list(b"[base]x")} == answers


def test_upstreams_oldest_declarations_work_unchanged(url: str) -> None:
    """Inputs without reshape, not decoupled: an adapter is loaded by its weights, then named by its id."""
    with grpc.InferenceServerClient(url) as client:
        infer = functools.partial(client.infer, "oldest")
        with pytest.raises(grpc.InferenceServerException, match="LoRA task 12 not found in cache. Please send LoRA"):
            infer(inputs_of(tensors(HELLO, 9, **task(12))))
        loading = infer(inputs_of(tensors(HELLO, 9, **task(12), **ADAPTER)))
        by_id = infer(inputs_of(tensors(HELLO, 9, **task(12))))
        with pytest.raises(grpc.InferenceServerException, match="Streaming is only supported if model is deployed"):
            infer(inputs_of(tensors(HELLO, 9, **STREAMING)))

    assert [list(b"hello[12]hello")] * 2 == [tokens_of(loading), tokens_of(by_id)]


def test_a_client_that_hangs_up_makes_room(url: str) -> None:
    """One request at a time: the next is answered only because the first, which never ends, was cancelled."""
    endless = stream(url, "slow", tensors(HELLO, FOREVER, **STREAMING))
    first = tokens_of(next(endless))
    endless.close()
    following = [tokens_of(response) for response in stream(url, "slow", tensors(HELLO, 6))]

    assert [ord("[")] == first
    assert [list(b"[base]")] == following


def test_a_warmed_adapter_answers_to_its_id_at_once(url: str, checkpoints: Path) -> None:
    """bfloat16 weights from a warmup file, through Triton into the model: the answer is PEFT's, not the base's."""
    prompt = [5, 17, 3, 42]
    end_id = {"end_id": np.array([[EOS]], np.int32)}
    [by_id] = [tokens_of(response) for response in stream(url, "warmed", tensors(prompt, 8, **end_id, **task(3)))]
    with pytest.raises(grpc.InferenceServerException, match="LoRA task 4 not found in cache"):
        list(stream(url, "warmed", tensors(prompt, 8, **task(4))))
    model = load_peft(checkpoints / "base", checkpoints / "adapter")

    assert generate(model, prompt, 8) == by_id
    with model.disable_adapter():
        assert generate(model, prompt, 8) != by_id


def test_errors_say_what_upstreams_say(url: str) -> None:
    """With the prefix of the C++ backend, a wrong module by its name, and nothing of this server's files."""
    wrong = {**ADAPTER, **task(1), "lora_config": np.array([[[0, 0, 8]]], np.int32)}
    with pytest.raises(grpc.InferenceServerException) as refused:
        list(stream(url, "slow", tensors(HELLO, 6, **wrong)))

    assert str(refused.value).startswith("Executor failed process requestId ")
    assert "lora module attn_qkv not enabled for this model" in str(refused.value)
