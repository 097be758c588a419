# SPDX-FileCopyrightText: the tritonlora authors
# SPDX-License-Identifier: Apache-2.0
"""Conversations as text."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest

from tritonlora.openai.api_error import ApiError
from tritonlora.openai.chat_tokenizer import ChatTokenizer
from tritonlora.serving.tokenizer import byte_tokenizer


@pytest.mark.parametrize(
    ("hugging_face", "missing", "remedy"),
    [
        (None, "this model has no tokenizer", "; ask /v1/completions"),
        (
            SimpleNamespace(chat_template=None),
            "this model's tokenizer has no chat template",
            "The operator .* chat_template.jinja into the tokenizer's directory, and start the API again",
        ),
    ],
)
def test_without_a_chat_template_the_client_and_the_operator_are_told_what_to_do(
    hugging_face: Any, missing: str, remedy: str
) -> None:
    """Without a tokenizer there is no directory for a template."""
    with pytest.raises(ApiError, match=f"^{missing}.*{remedy}$") as caught:
        ChatTokenizer(byte_tokenizer(), hugging_face).render([{"role": "user", "content": "Hi"}], None, None)

    assert (400, "no_chat_template") == (caught.value.status, caught.value.code)
