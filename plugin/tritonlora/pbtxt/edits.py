# SPDX-FileCopyrightText: the tritonlora authors
# SPDX-License-Identifier: Apache-2.0
"""Lossless edits of a config.pbtxt. Each edit takes a document and returns a new one.

Strategy: an edit takes a document and a node of its tree. It parses the new text, in which only that place differs. So
the next edit finds its node in a tree that is up to date, and each text is parsed once. New text is pbtxt indented by
two spaces, without comments. It gets the indentation and the line ends of its neighbours.

Read and write files with newline="", so that CRLF is kept.
"""

from __future__ import annotations

import re

from tritonlora.pbtxt.text_format import Document, Field, Message, Scalar, parse

_BLANKS = re.compile(r"(?:[ \t\r\n\v\f]+|#[^\n]*)*")
_REST_OF_LINE = re.compile(r"[ \t\v\f]*(?:#[^\r\n]*)?(?=\r?\n|\Z)")
_COMMENT_LINE = re.compile(r"[ \t]*(?P<comment>#[^\n]*)\n")
_NAME_AND_COLON = re.compile(r"\w+[ \t]*:?", re.ASCII)
_QUOTED = {"\\": "\\\\", '"': '\\"', "\n": "\\n", "\r": "\\r", "\t": "\\t"}


def quote(content: str) -> str:
    """A string literal with that content."""
    escaped = (_QUOTED.get(c, c if c.isprintable() else "".join(f"\\{b:03o}" for b in c.encode())) for c in content)
    return f'"{"".join(escaped)}"'


def newline_of(text: str) -> str:
    """The line end of the text's first line: CRLF or LF."""
    return "\r\n" if text[: text.find("\n") + 1].endswith("\r\n") else "\n"


def replace_value(document: Document, value: Scalar | Message, literal: str) -> Document:
    """The document with `literal` in the place of `value`."""
    return parse(document.text[: value.start] + literal + document.text[value.end :])


def insert_field(document: Document, message: Message, snippet: str) -> Document:
    """The document with the fields in `snippet` at the end of `message`."""
    return parse(_with_field(document, message, snippet))


def append_value(document: Document, message: Message, name: str, literal: str) -> Document:
    """The document with one more value of the repeated field `name`.

    The value goes into the field's list, or else becomes one more field `name`. `literal` is a scalar, or a message in
    curly brackets.
    """
    return parse(_with_value(document, message, name, literal))


def remove_value(
    document: Document, message: Message, value: Scalar | Message, *, with_comment: bool = False
) -> Document:
    """The document without `value`, which is a value of one of `message`'s fields.

    A line is removed if nothing else is on it. With `with_comment`, the comment lines directly above `value` are
    removed, too.
    """
    return parse(_without_value(document, message, value, with_comment=with_comment))


def _with_field(document: Document, message: Message, snippet: str) -> str:
    text = document.text
    if message is document.message:
        # After the comments at the end of the file, which may belong to the fields above them.
        newline = newline_of(text)
        gap = "" if not text or text.endswith("\n") else newline
        return text + gap + snippet.replace("\n", newline) + newline
    if not message.fields:
        return _insert_at(text, message.start + 1, f" {_one_line(snippet)} ")
    last = message.fields[-1]
    return _insert_after(text, last, snippet, unit=_unit(text, last))


def _with_value(document: Document, message: Message, name: str, literal: str) -> str:
    text = document.text
    last = next((field for field in reversed(message.fields) if field.name == name), None)
    if last is None:
        return _with_field(document, message, f"{name}: {literal}")
    if not last.in_list:
        head = text[last.start : last.opening].rstrip()
        spelling = head if _NAME_AND_COLON.fullmatch(head) else f"{name}:"
        return _insert_after(text, last, f"{spelling} {literal}", unit=_unit(text, last))
    if not last.values:
        return _insert_at(text, last.opening + 1, f" {_one_line(literal)} ")
    return _insert_after(text, last.values[-1], literal, unit=_unit(text, last.values[-1]), comma=",")


def _without_value(document: Document, message: Message, value: Scalar | Message, *, with_comment: bool) -> str:
    text = document.text
    place = next(field for field in message.fields if any(other is value for other in field.values))
    start, end = (value.start, value.end) if place.in_list else (place.start, place.end)
    if with_comment:
        start = _comment_above(text, start)
    if not place.in_list:
        return _cut(text, start, end)
    index = next(index for index, other in enumerate(place.values) if other is value)
    if index + 1 < len(place.values):
        comma = _comma_after(text, end)
        if comma == end:
            return _cut(text, start, end + 1)
        return _cut(text[:comma] + text[comma + 1 :], start, end)
    shorter = _cut(text, start, end)
    if index == 0:
        return shorter
    comma = _comma_after(text, place.values[index - 1].end)
    return shorter[:comma] + shorter[comma + 1 :]


def _comment_above(text: str, start: int) -> int:
    """The start of the comment lines directly above text[start]; `start` if there are none."""
    blanks, first_on_line = _leading_blanks(text, start)
    if not first_on_line:
        return start
    line_start = start - len(blanks)
    while line_start and (match := _COMMENT_LINE.fullmatch(text, text.rfind("\n", 0, line_start - 1) + 1, line_start)):
        start, line_start = match.start("comment"), match.start()
    return start


def _comma_after(text: str, position: int) -> int:
    match = _BLANKS.match(text, position)
    return match.end() if match else position


def _insert_at(text: str, position: int, piece: str) -> str:
    return text[:position] + piece + text[position:]


def _insert_after(text: str, anchor: Field | Scalar | Message, snippet: str, *, unit: str, comma: str = "") -> str:
    """The text with `snippet` on new lines below `anchor`, or beside `anchor` if more follows on its line."""
    rest = _REST_OF_LINE.match(text, anchor.end)
    if rest is None:
        gap = "" if text[anchor.end] in " \t\r\n\v\f]}>" else " "
        return _insert_at(text, anchor.end, f"{comma} {_one_line(snippet)}{gap}")
    newline, outer = newline_of(text), _indentation(text, anchor)
    lines = "".join(newline + outer + _reindent(line, unit) for line in snippet.split("\n"))
    return text[: anchor.end] + comma + rest[0] + lines + text[rest.end() :]


def _one_line(snippet: str) -> str:
    return " ".join(line.strip() for line in snippet.split("\n"))


def _reindent(line: str, unit: str) -> str:
    content = line.lstrip(" ")
    return unit * ((len(line) - len(content)) // 2) + content


def _leading_blanks(text: str, position: int) -> tuple[str, bool]:
    """The blanks at the start of the line of text[position], and whether only blanks are before text[position]."""
    line = text[text.rfind("\n", 0, position) + 1 : position]
    blanks = line[: len(line) - len(line.lstrip(" \t"))]
    return blanks, blanks == line


def _indentation(text: str, node: Field | Scalar | Message) -> str:
    blanks, first_on_line = _leading_blanks(text, node.start)
    return blanks if first_on_line else _leading_blanks(text, node.end)[0]


def _unit(text: str, anchor: Field | Scalar | Message) -> str:
    """The extra indentation of the fields inside `anchor`; two spaces if it has no fields on lines of their own."""
    value = anchor.values[-1] if isinstance(anchor, Field) and anchor.values else anchor
    if isinstance(value, Message) and value.fields:
        outer, (inner, first_on_line) = _indentation(text, anchor), _leading_blanks(text, value.fields[0].start)
        if first_on_line and inner.startswith(outer) and inner != outer:
            return inner[len(outer) :]
    return "  "


def _cut(text: str, start: int, end: int) -> str:
    """The text without text[start:end], and without the line if it is blank then."""
    line_start = text.rfind("\n", 0, start) + 1
    line_end = text.find("\n", end)
    if line_end < 0:
        line_end = len(text)
    alone_before, alone_after = not text[line_start:start].strip(), not text[end:line_end].strip()
    if alone_before and alone_after:
        return text[:line_start] + text[line_end + 1 :]
    if alone_after:
        return text[:start].rstrip(" \t") + text[end:]
    return text[:start] + text[end:].lstrip(" \t")
