# SPDX-FileCopyrightText: the tritonlora authors
# SPDX-License-Identifier: Apache-2.0
"""The OpenAI door before a real tritonserver, asked by clients that nobody here wrote.

The synthetic engine answers with a tag and the prompt, again and again. `tritonlora generate`, which asks the ensemble
with the text models, is the oracle.
"""

from __future__ import annotations

import asyncio
import shutil
import socket
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import openai
import pytest
from tokenizers import Tokenizer

from monitoring import metric_names
from openai_door import Running, opened_door, set_tokenizer, wait_until_healthy
from repositories import resolving, synthetic_adapter
from text_tokenizer import save_tokenizer
from tritonlora.exposition import parse
from tritonlora.launch import client
from tritonlora.launch.server import Server
from tritonlora.machine import free_ports
from tritonlora.repository import add, registry, upkeep
from tritonlora.repository.paths import Repository

TEXT = "é日🎉ü"
MESSAGES: Any = [{"role": "user", "content": TEXT}]
RENDERED = f"<user>{TEXT}<model>"  # by the template of text_tokenizer
CONTEXT = 100_000
TAG = 3  # characters before the prompt in the engine's text


@dataclass(frozen=True)
class Served:
    """A server with the adapters pirate and haiku, the alias arr, and a door before it."""

    server: Server
    opened: Repository
    door: Running
    client: openai.OpenAI
    tokenizer: Tokenizer

    def generated(self, model: str | None, prompt: str, tokens: int) -> str:
        """What `tritonlora generate` answers."""
        return "".join(client.generate(prompt, lora_name=model, max_tokens=tokens, url=self.server.http_url))


SILENCE = "silence"  # while the repository has this file, the engine makes no token
ENGINE = f'''\
import time
from pathlib import Path

from tritonlora.cpu_engine.synthetic import SyntheticModel
from tritonlora.cpu_engine.triton_model import TritonPythonModel

SILENCE = Path(__file__).parents[2] / "{SILENCE}"
next_token = SyntheticModel.next_token


def next_token_after_the_silence(model, state):
    while SILENCE.exists():
        time.sleep(0.01)
    return next_token(model, state)


SyntheticModel.next_token = next_token_after_the_silence
'''


@pytest.fixture(scope="module")
def served(launch: Callable[..., Server], tmp_path_factory: pytest.TempPathFactory) -> Iterator[Served]:
    """One for all tests."""
    directory = tmp_path_factory.mktemp("openai")
    opened = resolving(directory / "repo", ("pirate",), ("haiku",), pages=100)
    registry.alias(opened, "arr", "pirate")
    upkeep.set_parameters(opened, {"synthetic_token_seconds": "0.002", "max_num_requests": "64"})
    (opened.target_directory / "1" / "model.py").write_text(ENGINE)
    save_tokenizer(directory / "tokenizer")
    set_tokenizer(opened, directory / "tokenizer")
    server = launch(opened.root)
    with opened_door(server.grpc_url, "--repo", opened.root, "--context-length", CONTEXT) as door:
        wait_until_healthy(door)
        with openai.OpenAI(base_url=door.url, api_key="unused", max_retries=0) as official:
            yield Served(
                server, opened, door, official, Tokenizer.from_file(str(directory / "tokenizer" / "tokenizer.json"))
            )


@pytest.mark.parametrize("model", ["pirate", "haiku", "arr", None])
@pytest.mark.parametrize("tokens", [1, 5, 17, 40])
def test_a_conversation_is_answered_as_generate_answers_its_text(
    served: Served, model: str | None, tokens: int
) -> None:
    """Whole and streamed, wherever the response ends in a character; with its usage and its reason to end."""
    base = served.client.models.list().data[0].id
    ask: Any = served.client.chat.completions.create
    whole = ask(model=model or base, messages=MESSAGES, max_tokens=tokens)
    *pieces, last = ask(
        model=model or base,
        messages=MESSAGES,
        max_tokens=tokens,
        stream=True,
        stream_options={"include_usage": True},
    )

    expected = served.generated(model, RENDERED, tokens)
    assert expected == whole.choices[0].message.content
    assert expected == "".join(piece.choices[0].delta.content or "" for piece in pieces)
    assert ("length", "length") == (whole.choices[0].finish_reason, pieces[-1].choices[0].finish_reason)
    prompt = len(served.tokenizer.encode(RENDERED).ids)
    for usage in (whole.usage, last.usage):
        assert (prompt, tokens, prompt + tokens) == (
            usage.prompt_tokens, usage.completion_tokens, usage.total_tokens,
        )  # fmt: skip


def test_the_models_are_those_of_the_server(served: Served) -> None:
    """The base model, the adapters, and an alias with the adapter as its root."""
    found = {one.id: one.to_dict() for one in served.client.models.list()}
    base = "base/tensorrt_llm"

    assert {base: (base, None), "arr": ("pirate", base), "haiku": ("haiku", base), "pirate": ("pirate", base)} == {
        name: (one["root"], one["parent"]) for name, one in found.items()
    }
    assert "arr" == served.client.models.retrieve("arr").id


@pytest.mark.parametrize("model", ["parrot", "no/such/model", "Pirate", "ünknown"])
def test_an_unknown_model_is_named_with_those_that_there_are(served: Served, model: str) -> None:
    """In OpenAI's form. The base model never answers for it."""
    with pytest.raises(openai.NotFoundError) as caught:
        served.client.chat.completions.create(model=model, messages=MESSAGES, max_tokens=4)

    assert ("model_not_found", "model") == (caught.value.code, caught.value.param)
    assert f"The model {model!r} does not exist; available: base/tensorrt_llm, arr, haiku, pirate" in str(caught.value)


def test_64_at_once_get_their_own_responses(served: Served) -> None:
    """The asynchronous client, whole and streamed by turns, each with a prompt of its own."""

    async def ask(client: openai.AsyncOpenAI, number: int) -> str:
        model, prompt = ("pirate", "haiku", "arr")[number % 3], f"{number} é日"
        request: Any = {"model": model, "prompt": prompt, "max_tokens": 20 + number % 7}
        if number % 2:
            return str((await client.completions.create(**request)).choices[0].text)
        stream = await client.completions.create(**request, stream=True)
        return "".join([event.choices[0].text async for event in stream])

    async def all_of_them() -> list[str]:
        async with openai.AsyncOpenAI(base_url=served.door.url, api_key="unused", max_retries=0) as client:
            return await asyncio.gather(*(ask(client, number) for number in range(64)))

    texts = asyncio.run(all_of_them())

    for number, text in enumerate(texts):
        unit = served.tokenizer.encode(f"{number} é日").ids
        tag = list(b"[2]" if number % 3 == 1 else b"[1]")
        tokens = 20 + number % 7
        assert served.tokenizer.decode(([*tag, *unit] * tokens)[:tokens]) == text


@pytest.mark.filterwarnings("ignore")  # of its own, about other packages
def test_litellm_is_served(served: Served) -> None:
    """Whole, streamed, and its error of an unknown model."""
    import litellm  # with warnings, too

    settled: Any = {"api_base": served.door.url, "api_key": "unused", "messages": MESSAGES, "max_tokens": 17}
    expected = served.generated("pirate", RENDERED, 17)
    whole: Any = litellm.completion("openai/pirate", **settled)
    pieces: Any = litellm.completion("openai/pirate", stream=True, **settled)

    assert (expected, "length", 17) == (
        whole.choices[0].message.content, whole.choices[0].finish_reason, whole.usage.completion_tokens,
    )  # fmt: skip
    assert expected == "".join(piece.choices[0].delta.content or "" for piece in pieces)
    with pytest.raises(litellm.exceptions.NotFoundError, match="available: base/tensorrt_llm, arr, haiku, pirate"):
        litellm.completion("openai/parrot", **settled)


@pytest.mark.filterwarnings("ignore")
def test_langchain_is_served(served: Served) -> None:
    """Whole and streamed."""
    import langchain_openai

    options: Any = {"model": "haiku", "base_url": served.door.url, "api_key": "unused", "max_completion_tokens": 17}
    chat = langchain_openai.ChatOpenAI(**options)
    expected = served.generated("haiku", RENDERED, 17)

    assert expected == chat.invoke(TEXT).content
    assert expected == "".join(str(piece.content) for piece in chat.stream(TEXT))


@pytest.mark.parametrize(
    ("stop", "expected"), [("日", "|R~é"), (["🎉ü", "zz"], "|R~é日"), ("R~é日🎉ü|", "|"), ("nowhere", None)]
)
@pytest.mark.parametrize("stream", [True, False])
def test_a_stop_string_ends_the_response_in_the_engine(
    served: Served, stop: Any, expected: str | None, stream: bool
) -> None:
    """Before the string; long before max_tokens, which would take minutes."""
    tokens = 40 if expected is None else 50_000
    found: Any = served.client.completions.create(
        model="pirate", prompt=TEXT, max_tokens=tokens, stop=stop, stream=stream
    )
    choices = [event.choices[0] for event in found] if stream else [found.choices[0]]

    whole = served.generated("pirate", TEXT, 40) if expected is None else expected
    reason = "length" if expected is None else "stop"
    assert (whole, reason) == ("".join(choice.text for choice in choices), choices[-1].finish_reason)


def test_several_choices_and_prompts_have_their_own_places(served: Served) -> None:
    """n choices of each prompt, in their order, whole and streamed."""
    request: Any = {"model": "pirate", "prompt": ["ab", "cd"], "n": 2, "max_tokens": 9}
    whole = served.client.completions.create(**request)
    texts = dict.fromkeys(range(4), "")
    for event in served.client.completions.create(**request, stream=True):
        texts[event.choices[0].index] += event.choices[0].text

    expected = [served.generated("pirate", prompt, 9) for prompt in ("ab", "ab", "cd", "cd")]
    assert expected == [choice.text for choice in whole.choices] == [texts[index] for index in range(4)]
    assert whole.usage is not None
    assert (4, 36) == (whole.usage.prompt_tokens, whole.usage.completion_tokens)


@pytest.mark.parametrize(
    ("fields", "told"),
    [
        ({"max_tokens": 1_000_000}, "the context has 100000 tokens"),
        ({"messages": [{"role": "user", "content": "x" * 2_000_000}]}, "too few for 2000013 characters"),
        ({"messages": [{"role": "user", "content": "x" * 100_000}]}, "the context has 100000 tokens"),
        ({"logprobs": True}, "return_log_probs"),
        ({"logit_bias": {"5": 1.0}}, "embedding_bias"),
        ({"response_format": {"type": "json_object"}}, "response_format: model 'tensorrt_llm' has no input"),
        ({"min_tokens": 9, "max_tokens": 8}, "min_tokens is 9"),
    ],
)
def test_what_does_not_fit_is_refused_by_name(served: Served, fields: dict[str, Any], told: str) -> None:
    """By the door, or by the engine before the response has begun."""
    body = {"model": "pirate", "messages": MESSAGES, "max_tokens": 4, **fields}
    for stream in (True, False):
        with pytest.raises(openai.BadRequestError) as caught:
            served.client.post("/chat/completions", body={**body, "stream": stream}, cast_to=object)

        assert told in str(caught.value)


def test_the_base_model_answers_for_no_adapter(served: Served) -> None:
    """An adapter that comes, changes its alias, and goes while the door runs."""
    base = served.client.models.list().data[0].id

    def said(model: str) -> str:
        return served.client.completions.create(model=model, prompt="x", max_tokens=9).choices[0].text

    texts = {said(model) for model in (base, "pirate", "haiku")}
    assert 3 == len(texts)
    add.add(served.opened, "new", synthetic_adapter(served.opened.root.parent / "new", 7))
    registry.alias(served.opened, "arr", "new")

    assert "new" in {one.id for one in served.client.models.list()}
    assert said("new") == said("arr")
    assert said("new") not in texts
    registry.alias(served.opened, "arr", "pirate")
    registry.remove(served.opened, "new")
    with pytest.raises(openai.NotFoundError, match="available: base/tensorrt_llm, arr, haiku, pirate"):
        said("new")


def test_an_adapter_s_own_template_renders_its_conversations(served: Served) -> None:
    """And those of its alias; the others have the tokenizer's. A template may refuse."""
    directory = synthetic_adapter(served.opened.root.parent / "own", 8)
    (directory / "chat_template.jinja").write_text(
        "{% if messages[0].content == 'no' %}{{ raise_exception('not that') }}{% endif %}own {{ messages[0].content }}"
    )
    add.add(served.opened, "own", directory)
    registry.alias(served.opened, "mine", "own")
    ask: Any = served.client.chat.completions.create
    texts = [ask(model=model, messages=MESSAGES, max_tokens=18).choices[0].message.content for model in ("own", "mine")]
    with pytest.raises(openai.BadRequestError, match="the chat template refuses these messages: not that"):
        ask(model="own", messages=[{"role": "user", "content": "no"}], max_tokens=18)
    registry.remove(served.opened, "mine")
    registry.remove(served.opened, "own")

    plain = served.client.completions.create(model="pirate", prompt=f"own {TEXT}", max_tokens=18).choices[0].text
    assert [plain[TAG:]] * 2 == [text[TAG:] for text in texts]


def test_tools_are_rendered_and_calls_are_not_parsed(served: Served) -> None:
    """tool_choice none, or nothing."""
    directory = synthetic_adapter(served.opened.root.parent / "tools", 9)
    (directory / "chat_template.jinja").write_text("{{ tools[0].function.name }}")
    add.add(served.opened, "tools", directory)
    tools: Any = [{"type": "function", "function": {"name": "weather", "parameters": {}}}]
    ask: Any = served.client.chat.completions.create
    said = ask(model="tools", messages=MESSAGES, max_tokens=10, tools=tools, tool_choice="none").choices[0].message
    for choice in ("auto", "required", {"type": "function", "function": {"name": "weather"}}):
        with pytest.raises(openai.BadRequestError, match="tool_choice"):
            ask(model="tools", messages=MESSAGES, max_tokens=10, tools=tools, tool_choice=choice)
    registry.remove(served.opened, "tools")

    assert "weather" == said.content[TAG:]


def leave(served: Served, path: str, body: str) -> None:
    """Send a request, and leave after the first byte of the response, or at once if it is not streamed."""
    with socket.create_connection(("127.0.0.1", served.door.port), timeout=30) as connection:
        head = (
            f"POST {path} HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\nContent-Length: {len(body)}\r\n\r\n"
        )
        connection.sendall((head + body).encode())
        if "stream" in body:
            assert connection.recv(1)


@pytest.mark.parametrize("extra", ['"stream": true', '"n": 1', '"n": 4, "stream": true'])
def test_clients_that_leave_end_their_requests_in_the_engine(served: Served, extra: str) -> None:
    """The engine takes 64 at a time: each round would fill it for minutes."""
    body = f'{{"model": "pirate", "prompt": "x", "max_tokens": 90000, {extra}}}'
    for _ in range(2):
        for _ in range(64 // (4 if "4" in extra else 1)):
            leave(served, "/v1/completions", body)

        assert served.client.completions.create(model="pirate", prompt="x", max_tokens=5, timeout=60).choices[0].text


def test_an_engine_that_falls_silent_is_not_waited_for(served: Served) -> None:
    """It makes no token for any of the 64 requests that it takes at a time. They have ended when it goes on."""
    silence = served.opened.root / SILENCE
    with opened_door(served.server.grpc_url, "--context-length", CONTEXT, "--stall-seconds", 1) as door:
        wait_until_healthy(door)

        async def ask(client: openai.AsyncOpenAI, begun: asyncio.Semaphore) -> None:
            stream = await client.completions.create(model="pirate", prompt="x", max_tokens=90_000, stream=True)
            await anext(stream)
            begun.release()
            with pytest.raises(openai.APIError, match="the engine sent no token for 1 s"):
                async for _ in stream:
                    pass

        async def all_of_them() -> None:
            begun = asyncio.Semaphore(0)
            async with openai.AsyncOpenAI(base_url=door.url, api_key="unused", max_retries=0) as client:
                asked = asyncio.gather(*(ask(client, begun) for _ in range(64)))
                for _ in range(64):
                    await begun.acquire()
                silence.touch()
                await asked

        try:
            asyncio.run(all_of_them())
        finally:
            silence.unlink()
    assert served.client.completions.create(model="pirate", prompt="x", max_tokens=5, timeout=60).choices[0].text


def test_the_api_is_as_its_own_document_says(served: Served, tmp_path: Path) -> None:
    """schemathesis, against the door's OpenAPI document: no 5xx, and each response is one that the document has."""
    checks = "not_a_server_error,status_code_conformance,content_type_conformance,response_schema_conformance"
    document = f"http://127.0.0.1:{served.door.port}/openapi.json"
    command = [sys.executable, "-m", "schemathesis.cli", "run", document, "--checks", checks, "--max-examples", "10"]
    command += ["--phases", "coverage,fuzzing", "--no-color"]
    done = subprocess.run(command, cwd=tmp_path, text=True, capture_output=True, check=False)  # it keeps a cache there

    assert 0 == done.returncode, done.stdout


def test_serve_with_the_api_drains_it_and_ends(served: Served, tmp_path: Path) -> None:
    """SIGTERM: a stream that is under way comes to its end first."""
    ports = free_ports()
    repo = shutil.copytree(served.opened.root, tmp_path / "repo")
    api = free_ports().http
    with (tmp_path / "log").open("w") as log:
        options = ["--http-port", ports.http, "--grpc-port", ports.grpc, "--metrics-port", ports.metrics]
        command = [sys.executable, "-m", "tritonlora", "serve", repo, *options, "--openai-port", api]
        process = subprocess.Popen([*map(str, command)], stdout=log, stderr=log)
    door = Running(process, api)
    wait_until_healthy(door)
    with openai.OpenAI(base_url=door.url, api_key="unused", max_retries=0) as client_:
        stream = client_.completions.create(model="pirate", prompt="x", max_tokens=1000, stream=True)
        texts = [next(stream).choices[0].text]
        process.terminate()
        texts += [event.choices[0].text for event in stream]

    assert 1001 == len(texts), "1,000 tokens and the event with the reason"
    assert 0 == process.wait(60), (tmp_path / "log").read_text()
    with pytest.raises(OSError):
        door.get("/health")


def test_a_scrape_has_every_metric_that_dashboard_and_alerts_ask_the_door_for(served: Served) -> None:
    """Once it has answered a request. Prometheus does not see the first event of a counter that begins with it."""
    served.client.completions.create(model="pirate", prompt="x", max_tokens=2)
    scraped = {metric for metric, _ in parse(served.door.get("/metrics")[1].decode())}

    assert {name for name in metric_names() if name.startswith("tritonlora_openai_")} <= scraped


def test_without_its_server_the_door_asks_to_come_again(served: Served) -> None:
    """The last test: it ends the server. A stream that is under way ends with an error, and the door lives on."""
    stream = served.client.completions.create(model="pirate", prompt="x", max_tokens=90_000, stream=True)
    next(stream)
    served.server.stop()
    with pytest.raises(openai.APIError, match="does not answer"):
        list(stream)
    for path, prompt in (("/completions", {"prompt": "x"}), ("/chat/completions", {"messages": MESSAGES})):
        for is_streamed in (False, True):
            body = {"model": "pirate", "max_tokens": 5, "stream": is_streamed, **prompt}
            with pytest.raises(openai.InternalServerError) as caught:
                served.client.post(path, body=body, cast_to=object)

            assert 503 == caught.value.status_code
    assert [503, 503] == [served.door.get(path)[0] for path in ("/health", "/v1/models")]
    served.door.process.terminate()
    assert 0 == served.door.process.wait(30)
