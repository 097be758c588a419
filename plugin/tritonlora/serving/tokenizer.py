# SPDX-FileCopyrightText: the tritonlora authors
# SPDX-License-Identifier: Apache-2.0
"""A tokenizer as the text models need it: one whose decoding is *local*.

Rule: appending tokens never changes text that was already complete. `decode(a + b)` starts with `decode(a)`, but for
one U+FFFD at its end, which stands for a character whose last bytes are still to come. Streaming depends on this rule
(`text`). Two habits of Hugging Face tokenizers break it, and are corrected here:

* Clean-up of spaces removes a space when a full stop follows it. It is never applied.
* A tokenizer with byte fallback (Llama 2, Gemma) decodes a run of byte tokens like `<0xE2>` all or nothing. One bad
  byte turns every character of the run into U+FFFD, even those that were already sent. So a run is made well-formed
  first. Then only the malformed bytes become U+FFFD, as with a byte-level tokenizer.

transformers is imported only when a tokenizer is loaded from a directory. Without one, a token is a UTF-8 byte.
"""

from __future__ import annotations

from collections.abc import Callable, Container, Sequence
from dataclasses import dataclass
from itertools import groupby
from pathlib import Path
from typing import Any

from .errors import ModelConfigError

REPLACEMENT = "\N{REPLACEMENT CHARACTER}"


@dataclass(frozen=True, slots=True)
class Tokenizer:
    """Text to token ids and back."""

    encode: Callable[[str, bool], list[int]]  # text, and whether to add special tokens
    decode: Callable[[Sequence[int]], str]  # local, see above; takes audible tokens alone
    audible: Container[int]  # the tokens with text: known ones, less special ones if these are skipped
    chat: Callable[[str], list[int]] | None  # one user message in the chat template, up to the start of the response
    end_id: int | None
    pad_id: int | None
    vocab_size: int

    def text(self, ids: Sequence[int]) -> str:
        """The text of `ids`. Tokens without text are skipped."""
        return self.decode([token for token in ids if token in self.audible])


BYTE_END_ID = 256


def byte_tokenizer() -> Tokenizer:
    """A tokenizer whose tokens are UTF-8 bytes; 256 ends a text. It needs no files and no dependencies."""
    return Tokenizer(
        encode=lambda text, add_special_tokens: list(text.encode()),  # noqa: ARG005
        decode=lambda ids: bytes(ids).decode("utf-8", "replace"),
        audible=range(256),
        chat=None,
        end_id=BYTE_END_ID,
        pad_id=BYTE_END_ID,
        vocab_size=BYTE_END_ID + 1,
    )


def load_tokenizer(directory: Path, *, skip_special_tokens: bool = True) -> Tokenizer:
    """The Hugging Face tokenizer in `directory`. Code in the directory is not run.

    ModelConfigError when transformers is missing or cannot load a tokenizer from there.
    """
    if not directory.is_dir():
        raise ModelConfigError(f"tokenizer_dir {str(directory)!r} is not a directory; name one with a tokenizer.json")
    try:
        from transformers import AutoTokenizer  # here, because the byte tokenizer does not need it
    except ImportError as error:
        raise ModelConfigError(f"tokenizer_dir needs the Python package transformers: {error}") from error
    try:
        loaded = AutoTokenizer.from_pretrained(str(directory), local_files_only=True, trust_remote_code=False)
    except Exception as error:  # malformed files raise errors of many types
        raise ModelConfigError(f"tokenizer_dir {str(directory)!r} holds no usable tokenizer: {error}") from error
    return from_transformers(loaded, skip_special_tokens=skip_special_tokens)


def from_transformers(hugging_face: Any, *, skip_special_tokens: bool = True) -> Tokenizer:
    """Any tokenizer of transformers, with its decoding made local."""
    known = set(hugging_face.get_vocab().values())
    special = {*hugging_face.all_special_ids}
    special |= {token for token, added in hugging_face.added_tokens_decoder.items() if added.special}

    def encode(text: str, add_special_tokens: bool) -> list[int]:
        return list(hugging_face.encode(text, add_special_tokens=add_special_tokens))

    def decode(ids: Sequence[int]) -> str:
        return str(hugging_face.decode(list(ids), skip_special_tokens=False, clean_up_tokenization_spaces=False))

    def chat(message: str) -> list[int]:
        prompt = hugging_face.apply_chat_template(
            [{"role": "user", "content": message}], add_generation_prompt=True, tokenize=False
        )
        return encode(str(prompt), False)  # the template adds the special tokens itself

    end_id, pad_id = hugging_face.eos_token_id, hugging_face.pad_token_id
    return Tokenizer(
        encode=encode,
        decode=_with_well_formed_bytes(decode, _byte_tokens(hugging_face, decode)),
        audible=frozenset(known - special if skip_special_tokens else known),
        chat=chat if hugging_face.chat_template else None,
        end_id=end_id,
        pad_id=end_id if pad_id is None else pad_id,
        vocab_size=max(known, default=-1) + 1,
    )


def _byte_tokens(hugging_face: Any, decode: Callable[[Sequence[int]], str]) -> list[int]:
    """The ids of <0x00> to <0xFF> in this order; [] when the tokenizer has no byte fallback."""
    vocabulary = hugging_face.get_vocab()
    ids = [vocabulary.get(f"<0x{byte:02X}>") for byte in range(256)]
    # A byte-level tokenizer may have these names as ordinary text, so decode some of them to find out.
    if None in ids or decode([ids[byte] for byte in "€".encode()]) != "€":
        return []
    return ids


def _with_well_formed_bytes(
    decode: Callable[[Sequence[int]], str], byte_ids: list[int]
) -> Callable[[Sequence[int]], str]:
    """`decode`, with U+FFFD only for the malformed bytes in a run of byte tokens."""
    if not byte_ids:
        return decode
    byte_of = {token: byte for byte, token in enumerate(byte_ids)}

    def well_formed(ids: Sequence[int]) -> list[int]:
        mended: list[int] = []
        for is_byte, run in groupby(ids, key=byte_of.__contains__):
            if is_byte:
                text = bytes(byte_of[token] for token in run).decode("utf-8", "replace")
                mended.extend(byte_ids[byte] for byte in text.encode())
            else:
                mended.extend(run)
        return mended

    return lambda ids: decode(well_formed(ids))
