# SPDX-FileCopyrightText: the tritonlora authors
# SPDX-License-Identifier: Apache-2.0
"""Parse the text of a metrics endpoint.

Source: prometheus.io, docs/instrumenting/exposition_formats, "text format details".
"""

from __future__ import annotations

import re
from typing import TypeAlias

from tritonlora.errors import TritonLoraError

Labels: TypeAlias = "tuple[tuple[str, str], ...]"  # (name, value) of each label, sorted by name
Samples: TypeAlias = "dict[tuple[str, Labels], float]"  # (metric, labels) -> value

_LABEL = r'\s*[a-zA-Z_]\w*\s*=\s*"(?:[^"\\\n]|\\.)*"\s*'
_LABELS = rf"(?:{_LABEL}(?:,{_LABEL})*(?:,\s*)?)?"
_SAMPLE = re.compile(
    rf"(?P<metric>[a-zA-Z_:][\w:]*)\s*(?:\{{(?P<labels>{_LABELS})\}})?\s+(?P<value>\S+)(?:\s+-?\d+)?", re.ASCII
)
_NAME_AND_VALUE = re.compile(r'(\w+)\s*=\s*"((?:[^"\\]|\\.)*)"', re.ASCII)
_ESCAPE = re.compile(r"\\(.)")
_ESCAPED = {"n": "\n", "\\": "\\", '"': '"'}


def parse(text: str) -> Samples:
    """The samples of all metrics. A histogram has one for each bucket. TritonLoraError names the line that is wrong."""
    found: Samples = {}
    for number, line in enumerate(text.split("\n"), 1):
        stripped = line.strip(" \t\r")
        if not stripped or stripped.startswith("#"):
            continue
        match = _SAMPLE.fullmatch(stripped)
        value = _value(match["value"]) if match else None
        if match is None or value is None:
            raise TritonLoraError(f"line {number} of the metrics is no sample: {stripped[:100]!r}")
        found[match["metric"], _labels(match["labels"] or "")] = value
    return found


def _labels(text: str) -> Labels:
    return tuple(sorted((name, _ESCAPE.sub(_unescaped, value)) for name, value in _NAME_AND_VALUE.findall(text)))


def _unescaped(match: re.Match[str]) -> str:
    return _ESCAPED.get(match[1], match[0])


def _value(text: str) -> float | None:
    try:
        return float(text)
    except ValueError:
        return None
