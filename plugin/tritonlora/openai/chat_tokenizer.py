# SPDX-FileCopyrightText: the tritonlora authors
# SPDX-License-Identifier: Apache-2.0
"""The base model's tokenizer, as the door needs it: text to tokens and back, and conversations to text."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tritonlora.errors import ModelConfigError
from tritonlora.openai.api_error import invalid
from tritonlora.serving.tokenizer import Tokenizer, byte_tokenizer, from_transformers

NO_TOKENIZER = "this model has no tokenizer, and so no chat template to write messages as text; ask /v1/completions"
NO_TEMPLATE = (
    "this model's tokenizer has no chat template to write messages as text; ask /v1/completions. The operator of this "
    "API can put a chat_template.jinja into the tokenizer's directory, and start the API again"
)


@dataclass(frozen=True, slots=True)
class ChatTokenizer:
    """A tokenizer, and the chat template in its directory."""

    tokenizer: Tokenizer
    hugging_face: Any = None  # None: a token is a UTF-8 byte, and there is no template
    add_special_tokens: bool = True  # to the prompts of completions; a template adds them itself
    longest_token: int = 1  # characters

    def tokens(self, text: str, *, is_rendered: bool) -> list[int]:
        """The tokens of a prompt. `is_rendered`: a chat template has written the text."""
        return self.tokenizer.encode(text, self.add_special_tokens and not is_rendered)

    def without_start(self, text: str) -> str:
        """A rendered conversation without the special token at its start that a target adds to every text."""
        start = getattr(self.hugging_face, "bos_token", None)
        adds_it = start and self.tokenizer.encode("", True)[:1] == self.tokenizer.encode(start, False)
        return text.removeprefix(start) if start and adds_it else text

    def render(
        self, messages: Sequence[Mapping[str, Any]], tools: Sequence[Mapping[str, Any]] | None, template: str | None
    ) -> str:
        """A conversation as text, up to the start of the response. `template` replaces the tokenizer's own.

        ApiError when there is no template, or when it refuses the messages.
        """
        if self.hugging_face is None:
            raise invalid(NO_TOKENIZER, "messages", "no_chat_template")
        if not (template or self.hugging_face.chat_template):
            raise invalid(NO_TEMPLATE, "messages", "no_chat_template")
        try:
            return str(
                self.hugging_face.apply_chat_template(
                    list(messages),
                    tools=list(tools) if tools else None,
                    chat_template=template,
                    add_generation_prompt=True,
                    tokenize=False,
                )
            )
        except Exception as error:  # noqa: BLE001  templates raise errors of many types
            raise invalid(f"the chat template refuses these messages: {error}"[:1000], "messages") from None


def load(directory: Path | None, *, add_special_tokens: bool = True, skip_special_tokens: bool = True) -> ChatTokenizer:
    """The Hugging Face tokenizer in `directory`; without one, each UTF-8 byte is a token. Code there is not run.

    ModelConfigError when there is no usable tokenizer.
    """
    if directory is None:
        return ChatTokenizer(byte_tokenizer())
    if not directory.is_dir():
        raise ModelConfigError(f"{str(directory)!r} is not a directory on this machine; give --tokenizer DIR")
    from transformers import AutoTokenizer  # it takes seconds

    try:
        loaded = AutoTokenizer.from_pretrained(str(directory), local_files_only=True, trust_remote_code=False)
    except Exception as error:  # malformed files raise errors of many types
        raise ModelConfigError(f"{str(directory)!r} holds no usable tokenizer: {error}") from error
    tokenizer = from_transformers(loaded, skip_special_tokens=skip_special_tokens)
    longest = max(map(len, loaded.get_vocab()), default=1)
    return ChatTokenizer(tokenizer, loaded, add_special_tokens, longest)
