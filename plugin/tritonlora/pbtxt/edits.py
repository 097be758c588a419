# SPDX-FileCopyrightText: the tritonlora authors
# SPDX-License-Identifier: Apache-2.0
"""Lossless editing of a config.pbtxt: a document in, a document out.

Strategy: an edit takes a document and a node of its tree. It returns the document of a new text in which only that
place differs, so that the next edit finds its node in a tree that is up to date. Each text is parsed once. A new piece
of text is given as pbtxt indented by two spaces, without comments. It takes on the indentation and the line ends of its
neighbours.

Read files with newline="" so that CRLF gets here, and back, as it is.
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
    """The line end that the text uses: that of its first line."""
    return "\r\n" if text[: text.find("\n") + 1].endswith("\r\n") else "\n"


def replace_value(document: Document, value: Scalar | Message, literal: str) -> Document:
    """The document with `literal` in the place of `value`."""
    return parse(document.text[: value.start] + literal + document.text[value.end :])


def insert_field(document: Document, message: Message, snippet: str) -> Document:
    """The document with the fields in `snippet` at the end of `message`."""
    return parse(_with_field(document, message, snippet))


def append_value(document: Document, message: Message, name: str, literal: str) -> Document:
    """The document with one more value of the repeated field `name`: in its list, or as one more `name`.

    `literal` is a scalar, or a message in curly brackets.
    """
    return parse(_with_value(document, message, name, literal))


def remove_value(
    document: Document, message: Message, value: Scalar | Message, *, with_comment: bool = False
) -> Document:
    """The document without that value of one of `message`'s fields. Its line goes if nothing else is on it.

    With `with_comment`, the lines of comment directly above it go as well.
    """
    return parse(_without_value(document, message, value, with_comment=with_comment))


def _with_field(document: Document, message: Message, snippet: str) -> str:
    text = document.text
    if message is document.message:
        # Behind the comments at the end of the file, which may say what the fields above them are.
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
    """Where the lines that hold only a comment, directly above text[start], begin; `start` if there are none."""
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
    """`snippet` on lines of its own below `anchor`, or beside it where more follows on its line."""
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
    """The blanks that the line of text[position] begins with, and whether nothing else stands before it."""
    line = text[text.rfind("\n", 0, position) + 1 : position]
    blanks = line[: len(line) - len(line.lstrip(" \t"))]
    return blanks, blanks == line


def _indentation(text: str, node: Field | Scalar | Message) -> str:
    blanks, first_on_line = _leading_blanks(text, node.start)
    return blanks if first_on_line else _leading_blanks(text, node.end)[0]


def _unit(text: str, anchor: Field | Scalar | Message) -> str:
    """How much deeper the fields inside `anchor` stand than it does: two spaces where it does not say."""
    value = anchor.values[-1] if isinstance(anchor, Field) and anchor.values else anchor
    if isinstance(value, Message) and value.fields:
        outer, (inner, first_on_line) = _indentation(text, anchor), _leading_blanks(text, value.fields[0].start)
        if first_on_line and inner.startswith(outer) and inner != outer:
            return inner[len(outer) :]
    return "  "


def _cut(text: str, start: int, end: int) -> str:
    """The text without text[start:end], and without the lines that this leaves blank."""
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
