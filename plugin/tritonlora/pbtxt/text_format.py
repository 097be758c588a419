# SPDX-FileCopyrightText: the tritonlora authors
# SPDX-License-Identifier: Apache-2.0
"""Parse protobuf's text format, without a schema, into a tree whose nodes have their positions in the text.

The grammar is that of Triton's own parser, with one addition: a placeholder `${name}`, which upstream's
tools/fill_template.py has not filled in yet, may stand in the place of a scalar value. Every node has its
text[start:end], so that an edit can replace one place and leave every other byte alone. No text is ever rendered from
the tree.
"""

from __future__ import annotations

import re
import sys
from dataclasses import dataclass

from tritonlora.errors import ConfigError

# Triton's ModelConfig does not nest in itself; its deepest field is about eight messages down.
MAX_DEPTH = 32
MAX_LENGTH = 64 * 1024 * 1024  # characters; ten thousand warmup samples take about 12 million

_TEMPLATE = r"\$(?:\{[^{}\n]*\}|[A-Za-z_]\w*)"
_TOKEN = re.compile(
    rf"""
    (?: [ \t\r\n\v\f]+ | \#[^\n]* )*
    (?: (?P<mark>   [{{}}<>\[\]:,;] )
      | (?P<word>   (?: [0-9A-Za-z_.+-]+ | {_TEMPLATE} )+ )
      | (?P<string> "[^"\\\n]*(?:\\[^\n][^"\\\n]*)*" | '[^'\\\n]*(?:\\[^\n][^'\\\n]*)*' )
    )?
    """,
    re.VERBOSE | re.ASCII,
)
_NAME = re.compile(r"[A-Za-z_]\w*", re.ASCII)
_WORD = re.compile(
    rf"-?(?:[A-Za-z_]\w*|0[xX][0-9a-fA-F]+|(?:\d+\.?\d*|\.\d+)(?:[eE][+-]?\d+)?[fF]?)|.*{_TEMPLATE}.*", re.ASCII
)
_ESCAPE = re.compile(
    rb"""\\(?: (?P<letter>[abfnrtv\\'"?]) | (?P<octal>[0-7]{1,3}) | [xX](?P<hex>[0-9a-fA-F]{1,2})
             | u(?P<u4>[0-9a-fA-F]{4}) | U(?P<u8>[0-9a-fA-F]{8}) | (?P<unknown>.?) )""",
    re.VERBOSE | re.DOTALL,
)
_LETTERS = {
    b"a": b"\a", b"b": b"\b", b"f": b"\f", b"n": b"\n", b"r": b"\r", b"t": b"\t", b"v": b"\v",
    b"\\": b"\\", b"'": b"'", b'"': b'"', b"?": b"?",
}  # fmt: skip
_CLOSER = {"{": "}", "<": ">"}


@dataclass(frozen=True, slots=True)
class Scalar:
    """A number, enum name, boolean, placeholder or string at text[start:end]."""

    start: int
    end: int
    value: str  # a string's content, with escapes resolved and adjacent pieces joined; any other value as written
    quoted: bool

    @property
    def is_template(self) -> bool:
        """Whether the value is, or has, a placeholder `${name}` outside of quotes, so that its type is unknown."""
        return not self.quoted and "$" in self.value


@dataclass(frozen=True, slots=True)
class Message:
    """The fields in text[start:end], its brackets included. The outermost message is the whole text."""

    start: int
    end: int
    fields: tuple[Field, ...]

    def all(self, name: str) -> tuple[Scalar | Message, ...]:
        """Every value of the field, from lists and from repeated fields."""
        return tuple(value for field in self.fields if field.name == name for value in field.values)

    def messages(self, name: str) -> tuple[Message, ...]:
        """The values of the field that are messages."""
        return tuple(value for value in self.all(name) if isinstance(value, Message))

    def scalars(self, name: str) -> tuple[Scalar, ...]:
        """The values of the field that are scalars."""
        return tuple(value for value in self.all(name) if isinstance(value, Scalar))

    def message(self, name: str) -> Message | None:
        """The field's last message, or None."""
        return next(reversed(self.messages(name)), None)

    def scalar(self, name: str) -> Scalar | None:
        """The field's last scalar, or None."""
        return next(reversed(self.scalars(name)), None)

    def has(self, name: str, wanted: str) -> bool:
        """Whether one of the field's scalars is `wanted`."""
        return wanted in (scalar.value for scalar in self.scalars(name))

    def find(self, name: str, key: str, wanted: str) -> Message | None:
        """The field's last message whose own field `key` has the scalar `wanted`, or None."""
        return next((message for message in reversed(self.messages(name)) if message.has(key, wanted)), None)


@dataclass(frozen=True, slots=True)
class Field:
    """`name: value`, `name {…}` or `name [ … ]` at text[start:end], with the separator after it."""

    start: int
    end: int
    name: str
    values: tuple[Scalar | Message, ...]
    in_list: bool
    opening: int  # where the value or the list begins


@dataclass(frozen=True, slots=True)
class Document:
    """A text and its tree."""

    text: str
    message: Message


def parse(text: str) -> Document:
    """The document of a config.pbtxt; raises ConfigError with line, column and what was expected there."""
    if len(text) > MAX_LENGTH:
        raise ConfigError(f"expected at most {MAX_LENGTH} characters, got {len(text)}")
    parser = _Parser(text)
    return Document(text, Message(0, len(text), parser.fields(closer="", depth=0)))


def error_at(text: str, offset: int, message: str) -> ConfigError:
    """A ConfigError that names the line and column of text[offset]."""
    return ConfigError(message, line=text.count("\n", 0, offset) + 1, column=offset - text.rfind("\n", 0, offset))


class _Parser:
    """A recursive-descent parser. The current token is text[start:end]; `previous` is the end of the token before."""

    def __init__(self, text: str) -> None:
        self.text = text
        self.tokens = _TOKEN.finditer(text)  # never skips a character: every part of the pattern may be empty
        self.previous = self.start = self.end = 0
        self.token = ""
        self.kind: str | None = None  # None: at the end of the text
        self.advance()

    def advance(self) -> None:
        self.previous = self.end
        match = next(self.tokens)
        self.end = match.end()
        self.kind = match.lastgroup
        if self.kind is None:
            if self.end < len(self.text):
                raise self.unreadable(self.end)
            self.start, self.token = self.end, ""
        else:
            self.start, self.token = match.start(self.kind), match[self.kind]

    def unreadable(self, position: int) -> ConfigError:
        character = self.text[position]
        if character in "\"'":
            return error_at(self.text, position, f"expected a closing {character} on the same line")
        return error_at(self.text, position, f"expected a field or a value, got the character {character!r}")

    def expected(self, what: str) -> ConfigError:
        got = repr(self.token if len(self.token) <= 60 else self.token[:60] + "…")
        return error_at(self.text, self.start, f"expected {what}, got {got if self.token else 'the end of the file'}")

    def take(self, marks: str) -> bool:
        """Step over the next token if it is one of `marks`."""
        if self.kind == "mark" and self.token in marks:
            self.advance()
            return True
        return False

    def fields(self, closer: str, depth: int) -> tuple[Field, ...]:
        """All fields up to and with `closer`, or up to the end of the text."""
        if depth > MAX_DEPTH:
            raise error_at(self.text, self.previous - 1, f"expected at most {MAX_DEPTH} messages inside each other")
        fields = []
        while not (closer and self.take(closer)):
            if self.kind is None and not closer:
                break
            fields.append(self.field(closer, depth))
        return tuple(fields)

    def field(self, closer: str, depth: int) -> Field:
        start, name = self.start, self.token
        if self.kind != "word" or not _NAME.fullmatch(name):
            raise self.expected(f"a field name or {closer!r}" if closer else "a field name")
        self.advance()
        colon = self.take(":")
        opening = self.start
        in_list = self.take("[")
        values = self.values(colon, depth) if in_list else (self.value(colon, depth),)
        self.take(",;")
        return Field(start, self.previous, name, values, in_list, opening)

    def values(self, colon: bool, depth: int) -> tuple[Scalar | Message, ...]:
        """The rest of a list, after its '['."""
        values: list[Scalar | Message] = []
        if self.take("]"):
            return ()
        while True:
            values.append(self.value(colon, depth))
            if self.take("]"):
                return tuple(values)
            if not self.take(","):
                raise self.expected("',' or ']'")

    def value(self, colon: bool, depth: int) -> Scalar | Message:
        start = self.start
        if self.take("{<"):
            fields = self.fields(_CLOSER[self.text[start]], depth + 1)
            return Message(start, self.previous, fields)
        if not colon:
            raise self.expected("':' or a message")
        if self.kind == "string":
            content = self.strings()
            return Scalar(start, self.previous, content, quoted=True)
        if self.kind == "word":
            word = self.word()
            return Scalar(start, self.previous, word, quoted=False)
        raise self.expected("a value")

    def word(self) -> str:
        word = self.token
        if word == "-":  # protobuf allows blanks between a sign and its number
            self.advance()
            word += self.token
        if self.kind != "word" or not _WORD.fullmatch(word):
            raise self.expected("a number, a name or a string")
        self.advance()
        return word

    def strings(self) -> str:
        """The content of a string and the strings directly after it: adjacent strings are one value, as in C."""
        start = self.start
        content = b""
        while self.kind == "string":
            content += self.unescape(self.token[1:-1])
            self.advance()
        try:
            return content.decode()
        except UnicodeDecodeError:
            raise error_at(self.text, start, "expected a string that is UTF-8") from None

    def unescape(self, piece: str) -> bytes:
        def replace(match: re.Match[bytes]) -> bytes:
            kind, value = match.lastgroup, match[match.lastgroup or 0]
            if kind == "letter":
                return _LETTERS[value]
            if kind == "octal":
                return bytes([int(value, 8) & 0xFF])
            if kind == "hex":
                return bytes([int(value, 16)])
            if kind in ("u4", "u8") and int(value, 16) <= sys.maxunicode:
                return chr(int(value, 16)).encode(errors="surrogatepass")
            raise error_at(self.text, self.start, f"expected an escape that protobuf knows, got {match[0].decode()!r}")

        # Bytes, because escapes may spell the UTF-8 bytes of one character one by one.
        content = piece.encode(errors="surrogatepass")
        return _ESCAPE.sub(replace, content) if b"\\" in content else content
