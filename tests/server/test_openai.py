# SPDX-FileCopyrightText: the tritonlora authors
# SPDX-License-Identifier: Apache-2.0
"""The OpenAI door before a real tritonserver, asked by clients that nobody here wrote.

The synthetic engine answers with a tag and the prompt, again and again. `tritonlora generate`, which asks the ensemble
with the text models, is the oracle.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import openai
import pytest
from tokenizers import Tokenizer

from openai_door import Running, opened_door, set_tokenizer, wait_until_healthy
from repositories import resolving
from text_tokenizer import save_tokenizer
from tritonlora.launch import client
from tritonlora.launch.server import Server
from tritonlora.repository import add
from tritonlora.repository.paths import Repository

TEXT = "é日🎉ü"
MESSAGES: Any = [{"role": "user", "content": TEXT}]
RENDERED = f"<user>{TEXT}<model>"  # by the template of text_tokenizer
CONTEXT = 500


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


@pytest.fixture(scope="module")
def served(launch: Callable[..., Server], tmp_path_factory: pytest.TempPathFactory) -> Iterator[Served]:
    """One for all tests."""
    directory = tmp_path_factory.mktemp("openai")
    opened = resolving(directory / "repo", ("pirate",), ("haiku",), pages=100)
    add.alias(opened, "arr", "pirate")
    save_tokenizer(directory / "tokenizer")
    set_tokenizer(opened, directory / "tokenizer")
    server = launch(opened.root)
    with opened_door(server.grpc_url, "--context-length", CONTEXT) as door:
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
