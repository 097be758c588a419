# SPDX-FileCopyrightText: the tritonlora authors
# SPDX-License-Identifier: Apache-2.0
"""The LLM API's model as the target of a real tritonserver: init, add, and answers by name, against PEFT's generate."""

from __future__ import annotations

import http.client
import json
import queue
import shutil
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import openai
import pytest
import torch
import tritonclient.grpc as grpc
from tritonclient.utils import InferenceServerException

from openai_door import opened_door, wait_until_healthy
from peft_answers import PROMPTS, TOKENS, save_llama
from repositories import llm_api_repository, set_streams
from synthetic import await_sample, listing
from text_tokenizer import save_tokenizer
from tritonlora.cli import commands
from tritonlora.errors import ServerError
from tritonlora.launch import client, diagnosis
from tritonlora.launch.server import Server
from tritonlora.repository import add, init, paths, registry, upkeep
from tritonlora.repository.paths import Repository, read_table
from tritonlora.repository.state import Models
from tritonlora.serving.shares import choose

Launch = Callable[..., Server]
WARM = ("attention", "all")
COLD = ("rslora", "narrow")
TRIES = 5  # Triton 2.51 crashes now and then before it has logged the warmup that failed
ADAPTERS: dict[str, dict[str, Any]] = {
    "attention": {"r": 8, "lora_alpha": 16, "target_modules": ["q_proj", "v_proj"]},
    "all": {"r": 4, "lora_alpha": 8, "target_modules": ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj"]},
    "rslora": {"r": 16, "lora_alpha": 16, "use_rslora": True, "target_modules": ["o_proj", "up_proj", "gate_proj"]},
    "narrow": {"r": 2, "lora_alpha": 32, "target_modules": ["down_proj"], "layers_to_transform": [1]},
}


@dataclass(frozen=True)
class Served:
    """A server, and what PEFT says that its adapters answer."""

    opened: Repository
    server: Server
    answers: dict[tuple[str | None, str], str]  # (lora_name, prompt) -> text
    decoupled: bool


@pytest.fixture(scope="module", params=[True, False], ids=["decoupled, resolve", "whole, forward"])
def served(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory, launch: Launch) -> Served:
    """A small random Llama with four random adapters, of which the engine holds two at a time."""
    directory = tmp_path_factory.mktemp("llm_api")
    answers = save_llama(directory, ADAPTERS, layers=2, dtype=torch.bfloat16)
    root = llm_api_repository(
        directory / "repo", directory / "base", triton_config={"decoupled": request.param, "max_batch_size": 0}
    )
    init.init(root, topology=None if request.param else init.FORWARD)
    opened = paths.open_repository(root)
    set_streams(opened, 4)
    for name in ADAPTERS:
        add.add(opened, name, directory / name, add.Options(warm=name in WARM))
        shutil.rmtree(directory / name)  # what is served is the copy
    return Served(opened, launch(root, complete_configs=True), answers, request.param)


def ask(served: Served, lora_name: str | None, prompt: str) -> str:
    """The text that the client of the engine's model gets, asking as it does."""
    pieces = client.generate(prompt, lora_name=lora_name, max_tokens=TOKENS, url=served.server.http_url)
    return "".join(pieces)


def post(served: Served, path: str, body: dict[str, Any]) -> tuple[int, str]:
    """Status and body of the answer to a POST."""
    connection = http.client.HTTPConnection(served.server.http_url, timeout=60)
    try:
        connection.request("POST", path, json.dumps(body))
        response = connection.getresponse()
        return response.status, response.read().decode()
    finally:
        connection.close()


def inputs_of(**values: Any) -> list[grpc.InferInput]:
    """gRPC inputs of one element each."""
    types = {bytes: ("BYTES", np.object_), bool: ("BOOL", np.bool_), int: ("INT32", np.int32)}
    inputs = []
    for name, value in values.items():
        datatype, dtype = ("UINT64", np.uint64) if name == "lora_id" else types[type(value)]
        inputs.append(grpc.InferInput(name, [1], datatype))
        inputs[-1].set_data_from_numpy(np.array([value], dtype))
    return inputs


def results(served: Served, model: str, outputs: Any = None, **values: Any) -> Iterator[Any]:
    """Results of one request over gRPC streaming; raises what the server answers as an error."""
    answers: queue.Queue[tuple[Any, Any]] = queue.Queue()
    with grpc.InferenceServerClient(served.server.grpc_url) as connection:
        connection.start_stream(callback=lambda result, error: answers.put((result, error)))
        connection.async_stream_infer(model, inputs_of(**values), outputs=outputs, enable_empty_final_response=True)
        while True:
            result, error = answers.get(timeout=60)
            if error is not None:
                raise error
            if result.as_numpy("text_output") is not None:
                yield result
            if result.get_response().parameters["triton_final_response"].bool_param:
                return


def test_the_adapters_answer_differently(served: Served) -> None:
    """Else the other tests would prove nothing."""
    for prompt in PROMPTS:
        assert len(ADAPTERS) + 1 == len({served.answers[name, prompt] for name in (None, *ADAPTERS)})


@pytest.mark.parametrize("lora_name", [None, *ADAPTERS])
def test_an_answer_is_peft_s_own_token_for_token(served: Served, lora_name: str | None) -> None:
    """Through the ensemble that init made, for the base model and every adapter, warm and cold."""
    assert [served.answers[lora_name, prompt] for prompt in PROMPTS] == [
        ask(served, lora_name, prompt) for prompt in PROMPTS
    ]


def test_answers_stay_right_when_the_engine_reads_adapters_again(served: Served) -> None:
    """Four adapters take turns in an engine that holds two, eight requests at a time."""
    asked = [(name, prompt) for _ in range(2) for prompt in PROMPTS for name in (*ADAPTERS, None)]
    with ThreadPoolExecutor(8) as pool:
        answers = list(pool.map(lambda one: ask(served, *one), asked))

    assert [served.answers[one] for one in asked] == answers


def test_an_alias_is_divided_by_the_key(served: Served) -> None:
    """The router names the adapter that responds to who asks for that output."""
    registry.alias(served.opened, "prod", {"all": 50, "attention": 50})
    prompt, keys = PROMPTS[0], [f"user-{number}".encode() for number in range(4)]
    chosen = [choose({"all": 50, "attention": 50}, key) for key in keys]
    values = {"text_input": prompt.encode(), "sampling_param_max_tokens": TOKENS, "lora_name": b"prod"}
    outputs = [grpc.InferRequestedOutput(name) for name in ("text_output", "lora_name")]

    assert {"all", "attention"} == set(chosen)
    for key, name in zip(keys, chosen, strict=True):
        (*_, last) = results(served, "lora_router", outputs=outputs, lora_split_key=key, **values)
        assert [name.encode(), served.answers[name, prompt].encode()] == [
            last.as_numpy(output).item() for output in ("lora_name", "text_output")
        ]
    registry.remove(served.opened, "prod")


def test_the_openai_api_answers_as_peft_does(served: Served, tmp_path: Path) -> None:
    """Whole, streamed and in conversations, with the tokens counted. What the model cannot do is refused by name."""
    save_tokenizer(tmp_path)  # a byte is a token, as in the model
    prompt, chat = PROMPTS[0], f"<user>{PROMPTS[1]}<model>"
    asked: dict[str, Any] = {"prompt": prompt, "max_tokens": TOKENS}
    messages: Any = [{"role": "user", "content": PROMPTS[1]}]
    with opened_door(served.server.grpc_url, "--tokenizer", tmp_path, "--context-length", 500) as door:
        wait_until_healthy(door)
        with openai.OpenAI(base_url=door.url, api_key="unused", max_retries=0) as official:
            base = official.models.list().data[0].id
            for name in (None, *ADAPTERS):
                expected, model = served.answers[name, prompt], name or base
                whole = official.completions.create(model=model, **asked)
                pieces = list(official.completions.create(model=model, stream=True, **asked))
                said = official.chat.completions.create(model=model, messages=messages, max_tokens=9).choices[0]

                assert (expected, "length") == (whole.choices[0].text, whole.choices[0].finish_reason)
                assert whole.usage is not None
                assert (len(prompt), TOKENS) == (whole.usage.prompt_tokens, whole.usage.completion_tokens)
                assert expected == "".join(piece.choices[0].text for piece in pieces)
                assert "length" == pieces[-1].choices[0].finish_reason
                assert served.decoupled == (len(pieces) > 2)
                assert ask(served, name, chat)[:9] == said.message.content
            expected, stop = served.answers["all", prompt], served.answers["all", prompt][5:7]
            for is_streamed in (False, True):
                found: Any = official.completions.create(model="all", stop=stop, stream=is_streamed, **asked)
                choices = [one.choices[0] for one in (found if is_streamed else [found])]
                assert expected.partition(stop)[0] == "".join(one.text for one in choices)
                assert "stop" == choices[-1].finish_reason
            for field, value in (("logit_bias", {"5": 1}), ("logprobs", 0), ("ignore_eos", True), ("prompt", [1, 2])):
                with pytest.raises(openai.BadRequestError) as refused:
                    official.post("/completions", body={"model": "all", **asked, field: value}, cast_to=object)
                assert field == refused.value.param
            with pytest.raises(openai.NotFoundError, match="available: .*, all, attention, narrow, rslora"):
                official.completions.create(model="nobody", **asked)


# Streams


def test_the_client_gives_what_is_new(served: Served) -> None:
    """A piece for each token, though each response has the whole text so far."""
    prompt = PROMPTS[0]
    pieces = list(client.generate(prompt, lora_name="rslora", max_tokens=TOKENS, url=served.server.http_url))
    whole = served.answers["rslora", prompt]

    assert ([*whole, ""] if served.decoupled else [whole]) == pieces


@pytest.mark.parametrize("served", [True], indirect=True, ids=["decoupled, resolve"])
def test_the_router_makes_the_new_text_and_the_ensemble_past_it_does_not(served: Served) -> None:
    """Past the router, text_output is the engine's own."""
    prompt, whole = PROMPTS[0], served.answers["rslora", PROMPTS[0]]
    values = {"text_input": prompt.encode(), "lora_name": b"rslora"}
    diffs = results(
        served,
        "lora_router",
        outputs=[grpc.InferRequestedOutput(name) for name in ("text_output", "text_diff")],
        sampling_param_max_tokens=TOKENS,
        streaming=True,
        **values,
    )
    texts = results(served, "ensemble", max_tokens=TOKENS, stream=True, **values)

    assert [character.encode() for character in [*whole, ""]] == [one.as_numpy("text_diff").item() for one in diffs]
    assert [whole[:length].encode() for length in (*range(1, len(whole) + 1), len(whole))] == [
        one.as_numpy("text_output").item() for one in texts
    ]


def test_the_router_passes_on_the_engine_s_own_answers(served: Served) -> None:
    """Clients of the LLM API's model ask the router as they asked the model, and get what they got."""
    prompt = PROMPTS[0]
    values = {"text_input": prompt.encode(), "sampling_param_max_tokens": 3, "lora_name": b"all"}
    whole = served.answers["all", prompt][:3]
    [result] = results(served, "lora_router", return_finish_reason=True, **values)

    assert [whole.encode()] == result.as_numpy("text_output").tolist()
    assert [b"length"] == result.as_numpy("finish_reason").tolist()
    if served.decoupled:
        texts = [one.as_numpy("text_output").item() for one in results(served, "lora_router", streaming=True, **values)]
        assert [whole[:length].encode() for length in (1, 2, 3, 3)] == texts


def test_who_names_no_outputs_gets_what_the_engine_gives(served: Served) -> None:
    """Nothing of the router's own."""
    values = {"text_input": PROMPTS[0].encode(), "sampling_param_max_tokens": 3, "streaming": served.decoupled}
    direct, routed = (
        [[one.name for one in answer.get_response().outputs] for answer in results(served, model, **values)]
        for model in ("tensorrt_llm", "lora_router")
    )

    assert ["text_output"] == direct[0]
    assert direct == routed


def test_an_id_is_as_good_as_its_name(served: Served) -> None:
    """As lora_id at the router, as lora_task_id at the ensemble."""
    lora_id = read_table(served.opened).entries["narrow"].lora_task_id
    values = {"text_input": PROMPTS[1].encode(), "sampling_param_max_tokens": TOKENS, "lora_id": lora_id}
    [result] = results(served, "lora_router", **values)
    body = {"text_input": PROMPTS[1], "max_tokens": TOKENS, "lora_task_id": lora_id}
    _, answer = post(served, "/v2/models/ensemble/generate", body)

    assert served.answers["narrow", PROMPTS[1]].encode() == result.as_numpy("text_output").item()
    assert served.answers["narrow", PROMPTS[1]] == json.loads(answer)["text_output"]


def test_stop_words_end_an_answer(served: Served) -> None:
    """Under the name that ensembles of the engine's model have for them."""
    whole = served.answers["all", PROMPTS[0]]
    word = whole[4:6]
    body = {"text_input": PROMPTS[0], "max_tokens": TOKENS, "lora_name": "all", "stop_words": [word]}
    _, answer = post(served, "/v2/models/ensemble/generate", body)

    assert whole[: whole.index(word)] == json.loads(answer)["text_output"]


# Never a wrong answer


@pytest.mark.parametrize("name", ["lora_path", "lora_ckpt_source"])
def test_a_client_cannot_choose_what_the_server_reads(served: Served, name: str) -> None:
    """As an input, at the router and at the ensemble, and as what `generate` makes a parameter: INVALID_ARG."""
    for model in ("lora_router", "ensemble"):
        values = {"text_input": b"x", "lora_name": b"all", name: str(served.opened.root).encode()}
        with pytest.raises(InferenceServerException, match=f"unexpected inference input '{name}'") as raised:
            list(results(served, model, **values))
        body = {"text_input": "x", "lora_name": "all", name: str(served.opened.root)}
        status, answer = post(served, f"/v2/models/{model}/generate", body)

        assert raised.value.status() in ("StatusCode.INVALID_ARGUMENT", None)  # streams have messages only
        assert (400, True) == (status, f"{name}: not taken as a parameter; name the adapter with the input" in answer)


@pytest.mark.parametrize(
    ("inputs", "message"),
    [
        ({"lora_name": "nobody"}, "unknown LoRA adapter 'nobody'; available: all, attention, narrow, rslora"),
        ({"lora_name": ""}, "lora_name is empty; to ask the base model, leave it out"),
        ({"lora_name": "/etc/passwd"}, "is not a legal adapter name"),
        ({"lora_task_id": 99}, "unknown lora_task_id 99; available"),
        ({"lora_name": "all", "lora_task_id": 1}, "lora_name 'all' has lora_task_id 2, but the request says 1"),
    ],
)
def test_a_name_that_is_not_an_adapter_is_an_error(served: Served, inputs: dict[str, Any], message: str) -> None:
    """The base model does not answer."""
    status, answer = post(served, "/v2/models/ensemble/generate", {"text_input": "x", "max_tokens": 4, **inputs})

    assert (400, True) == (status, message in json.loads(answer)["error"])


def test_an_adapter_whose_directory_is_gone_is_an_error_without_a_path(served: Served) -> None:
    """An error with the adapter's name and nothing of this machine; and the others serve on."""
    add.add(served.opened, "gone", register_again(served, "narrow"), add.Options(warm=False))
    entry = read_table(served.opened).entries["gone"]
    shutil.rmtree(served.opened.root / str(entry.lora_path))
    with pytest.raises(ServerError, match="LoRA adapter 'gone': adapter_model.safetensors is missing") as raised:
        ask(served, "gone", "x")
    registry.remove(served.opened, "gone")

    assert str(served.opened.root) not in str(raised.value)
    assert served.answers["all", "x"] == ask(served, "all", "x")


def register_again(served: Served, name: str) -> Path:
    """The directory of a registered adapter, to add it under another name."""
    return served.opened.root / str(read_table(served.opened).entries[name].lora_path)


# Changes while serving


def test_adapters_come_and_go_without_a_restart(served: Served) -> None:
    """Other content under a known name gets a new id: the engine keeps what it has read under the old one."""
    prompt = PROMPTS[2]
    add.add(served.opened, "new", register_again(served, "all"), add.Options(warm=False))
    first = read_table(served.opened).entries["new"].lora_task_id

    assert served.answers["all", prompt] == ask(served, "new", prompt)

    add.add(served.opened, "new", register_again(served, "narrow"), add.Options(warm=False))

    assert first != read_table(served.opened).entries["new"].lora_task_id
    assert served.answers["narrow", prompt] == ask(served, "new", prompt)

    registry.remove(served.opened, "new")

    with pytest.raises(ServerError, match="unknown LoRA adapter 'new'"):
        ask(served, "new", prompt)


# Warmup


def test_serve_finds_that_all_is_right(served: Served) -> None:
    """Each warm adapter answers, and an id that nobody registered is refused."""
    config = Models(served.opened.root).served_config(served.opened.target)

    assert [] == diagnosis.verify(served.server.http_url, served.opened, config, read_table(served.opened))


@pytest.mark.parametrize("served", [False], indirect=True, ids=["whole"])
def test_a_server_whose_warmup_cannot_read_an_adapter_does_not_start(
    served: Served, tmp_path: Path, launch: Launch
) -> None:
    """The strings of the samples reach the engine: a path that is not there is named."""
    root = shutil.copytree(served.opened.root, tmp_path / "repo")
    shutil.rmtree(root / str(read_table(served.opened).entries["all"].lora_path))
    opened = paths.open_repository(root)
    upkeep.repair(opened)  # the paths are those of the copy

    why = f"lora_path does not exist on the Triton server's filesystem: {root}"
    for _ in range(TRIES):
        with pytest.raises(ServerError) as raised:
            launch(root, complete_configs=True)
        if why in str(raised.value) or "exited with status -11" not in str(raised.value):
            break

    assert why in str(raised.value)


def test_listing_and_metrics_are_those_of_the_engine_s_model(served: Served) -> None:
    """The same model gives them."""
    for name in (WARM[0], None):
        ask(served, name, "x")
    for lora_name in (WARM[0], ""):
        await_sample(served.server, "lora_requests_total", lambda count: count > 0, lora_name=lora_name, outcome="OK")
    found = listing(served.server)

    assert ADAPTERS.keys() == found.keys()
    assert ["warm", "unknown"] == [found[name]["state"] for name in WARM]  # the other one may have left by now


def test_its_engine_loads_adapters_by_itself(served: Served, capsys: pytest.CaptureFixture[str]) -> None:
    """`warm` says so, and nothing can be pinned."""
    assert 1 == commands.main(["warm", *WARM, "--url", served.server.http_url])
    why = "not loaded: this engine loads adapters by itself, each on its first request"
    assert [f"{name} {why}" for name in WARM] == capsys.readouterr().out.splitlines()
    assert 1 == commands.main(["warm", WARM[0], "--pin", "--repo", str(served.opened.root)])

    assert "as many as max_cpu_loras in model.yaml says; set max_cpu_loras to" in capsys.readouterr().err
