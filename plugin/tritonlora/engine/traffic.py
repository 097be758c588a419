# SPDX-FileCopyrightText: the tritonlora authors
# SPDX-License-Identifier: Apache-2.0
"""Read the number of requests for each adapter, from a file of weights or from the server's metrics."""

from __future__ import annotations

import math
import re
from collections.abc import Container

from tritonlora import exposition
from tritonlora.errors import TritonLoraError, one_message

REQUESTS_METRIC = "lora_requests_total"
_OTHER_METRICS = re.compile(r"^# TYPE \w+ (?:counter|gauge|histogram|summary|untyped)$", re.MULTILINE)


def parse_traffic(text: str, registered: Container[str]) -> dict[str, float]:
    """Adapter name -> number of requests for it, or a weight in proportion to that number.

    `text` is either the body of the server's /metrics, or a line `name: weight` for each adapter, with blank lines and
    # comments. In metrics, adapters that are no longer registered are left out. TritonLoraError names every wrong line,
    in metrics the first one.
    """
    if REQUESTS_METRIC in text:
        return _of_metrics(text, registered)
    if _OTHER_METRICS.search(text):
        raise TritonLoraError(
            f"these metrics have no {REQUESTS_METRIC}: give those of Triton's metrics port, 8002 by default, after a "
            "request for an adapter"
        )
    return _of_lines(text, registered)


def _of_metrics(text: str, registered: Container[str]) -> dict[str, float]:
    sums: dict[str, float] = {}
    for (metric, labels), count in exposition.parse(text).items():
        adapter = dict(labels).get("lora_name", "")
        if metric == REQUESTS_METRIC and adapter in registered and _is_weight(count):
            sums[adapter] = sums.get(adapter, 0.0) + count
    return sums


def _of_lines(text: str, registered: Container[str]) -> dict[str, float]:
    weights: dict[str, float] = {}
    problems = []
    for number, line in enumerate(text.splitlines(), 1):
        entry = line.partition("#")[0].strip()
        if not entry:
            continue
        name, _, value = (part.strip() for part in entry.rpartition(":"))
        weight = _weight(value)
        if not name or weight is None:
            problems.append(f"line {number}: expected 'name: weight' with a weight from 0, got {entry[:100]!r}")
        elif name not in registered:
            problems.append(f"line {number}: no adapter {name!r} is registered")
        elif name in weights:
            problems.append(f"line {number}: {name!r} is there twice")
        else:
            weights[name] = weight
    if not weights and not problems:
        problems = [f"there is neither a line 'name: weight' nor the metric {REQUESTS_METRIC}"]
    if problems:
        raise TritonLoraError(one_message("the weights cannot be read", problems))
    return weights


def _weight(text: str) -> float | None:
    try:
        weight = float(text)
    except ValueError:
        return None
    return weight if _is_weight(weight) else None


def _is_weight(value: float) -> bool:
    return math.isfinite(value) and value >= 0
