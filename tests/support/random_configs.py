# SPDX-FileCopyrightText: the tritonlora authors
# SPDX-License-Identifier: Apache-2.0
"""Random ModelConfig texts in every spelling that protobuf's text format has."""

from __future__ import annotations

import random
from typing import Any

from google.protobuf.descriptor import FieldDescriptor

CHARACTERS = "ab_Z09 .-/:;,#{}[]<>\"'\\\n\t\x01\x7fé漢🙂${x}"
COMMENTS = ["", " plain", '} ] " ${x}', "it's , ; : <", "\té漢", "# nested"]


def blank(rng: random.Random) -> str:
    """Something that stands for nothing; often nothing at all."""
    pieces = ["", "", "", " ", "\t", "\n", "\r\n", "\f", "\v", f"#{rng.choice(COMMENTS)}{rng.choice(['', chr(13)])}\n"]
    return "".join(rng.choice(pieces) for _ in range(rng.randint(0, 2)))


def gap(rng: random.Random) -> str:
    """A blank that keeps two words apart."""
    return rng.choice([" ", "\n", "\t", "#\n"]) + blank(rng)


def string_literal(rng: random.Random, content: str | None = None) -> str:
    """A random string, or `content`, in one or more pieces, with random escapes."""
    if content is None:
        content = "".join(rng.choice(CHARACTERS) for _ in range(rng.randint(0, 6)))
    cut = rng.randint(0, len(content))
    pieces = [content[:cut], content[cut:]] if rng.random() < 0.3 else [content]
    return blank(rng).join(_piece(rng, piece) for piece in pieces)


def _piece(rng: random.Random, content: str) -> str:
    mark = rng.choice("\"'")
    escapes = {"\n": "\\n", "\t": "\\t", "\\": "\\\\"}
    out = []
    for character in content:
        data = character.encode()
        if character in (mark, "\n", "\\") or rng.random() < 0.2:
            if character in escapes and rng.random() < 0.5:
                out.append(escapes[character])
            else:
                form = rng.choice(["\\{:03o}", "\\x{:02x}"])
                out.append("".join(form.format(byte) for byte in data))
        else:
            out.append(character)
    return mark + "".join(out) + mark


def scalar_literal(rng: random.Random, field: Any) -> str:
    """A random value of the field, as text."""
    kinds = FieldDescriptor
    if field.cpp_type == kinds.CPPTYPE_STRING:
        return string_literal(rng)
    if field.cpp_type == kinds.CPPTYPE_BOOL:
        return rng.choice(["true", "false", "True", "False", "t", "f", "0", "1"])
    if field.cpp_type == kinds.CPPTYPE_ENUM:
        value = rng.choice(field.enum_type.values)
        return str(rng.choice([value.name, value.number]))
    if field.cpp_type in (kinds.CPPTYPE_FLOAT, kinds.CPPTYPE_DOUBLE):
        return rng.choice(["0", "1.5", "-2e3", ".25", "1.", "inf", "-inf", "3f"])
    number = rng.choice([0, 1, 7, 8, 123456789])
    if field.cpp_type in (kinds.CPPTYPE_INT32, kinds.CPPTYPE_INT64):
        number *= rng.choice([1, -1])
    return rng.choice([str(number), f"{'-' * (number < 0)}0x{abs(number):X}", f"{'-' * (number < 0)}0{abs(number):o}"])


def value_text(rng: random.Random, field: Any, depth: int) -> str:
    """A random value, scalar or message."""
    if field.message_type is None:
        return scalar_literal(rng, field)
    inside = message_text(rng, field.message_type, depth + 1)
    return rng.choice([f"{{{inside}}}", f"<{inside}>"])


def field_text(rng: random.Random, field: Any, depth: int) -> str:
    """A random field with all its values, as a list, as repeats, or as both."""
    optional_colon = rng.choice(["", ":"]) if field.message_type else ":"
    prefix = f"{field.name}{blank(rng)}{optional_colon}{blank(rng)}"
    if not field.is_repeated:
        return prefix + value_text(rng, field, depth)
    spellings = []
    for _ in range(rng.randint(1, 2)):
        if rng.random() < 0.5:
            values = [value_text(rng, field, depth) for _ in range(rng.randint(0, 3))]
            inside = f"{blank(rng)},{blank(rng)}".join(values)
            spellings.append(f"{prefix}[{blank(rng)}{inside}{blank(rng)}]")
        else:
            spellings.append(prefix + value_text(rng, field, depth))
    return gap(rng).join(spellings)


def message_text(rng: random.Random, descriptor: Any, depth: int = 0) -> str:
    """A random message's fields, without its brackets."""
    fields = rng.sample(list(descriptor.fields), rng.randint(0, min(len(descriptor.fields), 4 if depth else 8)))
    seen: set[Any] = set()
    text = blank(rng)
    for field in fields:
        if field.containing_oneof in seen or (field.message_type and depth > 4):
            continue
        if field.containing_oneof:
            seen.add(field.containing_oneof)
        text += field_text(rng, field, depth)
        text += rng.choice([gap(rng), gap(rng), blank(rng) + rng.choice(",;") + blank(rng)])
    return text
