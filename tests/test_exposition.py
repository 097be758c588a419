# SPDX-FileCopyrightText: the tritonlora authors
# SPDX-License-Identifier: Apache-2.0
"""exposition.py: the text of a metrics endpoint, against the parser of Prometheus' own client."""

from __future__ import annotations

import math

import pytest
from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest
from prometheus_client.parser import text_string_to_metric_families

from tritonlora import exposition
from tritonlora.errors import TritonLoraError

# As prometheus-cpp writes it, which Triton uses. Without nv_inference_request_success' TYPE, counter: the other parser
# renames a counter whose name does not end with _total.
TRITON = """\
# HELP nv_inference_request_success Number of successful inference requests, all batch sizes
nv_inference_request_success{model="lora_resolver",version="1"} 5
# HELP lora_requests_total Requests
# TYPE lora_requests_total counter
lora_requests_total{lora_name="pirate",model="lora_resolver",outcome="OK",version="1"} 7.000000
nv_cpu_utilization 0.25
"""


def oracle(text: str) -> exposition.Samples:
    """The samples by Prometheus' client."""
    return {
        (sample.name, tuple(sorted(sample.labels.items()))): sample.value
        for family in text_string_to_metric_families(text)
        for sample in family.samples
    }


def written() -> str:
    """Every kind of metric, with labels that need escapes, as Prometheus' client writes them."""
    registry = CollectorRegistry()
    counter = Counter("asked", 'a help text with "quotes" and } braces {', ["lora_name"], registry=registry)
    for name in ("", "a b", 'x",y="z', "back\\slash", "line\nbreak", "} 7", "\N{SNOWMAN}"):
        counter.labels(lora_name=name).inc(3)
    Gauge("now", "", registry=registry).set(math.inf)
    histogram = Histogram("waited", "", ["model"], registry=registry)
    histogram.labels("resolver").observe(0.3)
    return generate_latest(registry).decode()


@pytest.mark.parametrize(
    "text", [TRITON, written(), "a 1 1395066363000\nb{} -2e-3\nc { x = \"y\" , } +Inf\r\n\n  # no metric\n"],
    ids=["Triton", "prometheus_client", "by hand"],
)  # fmt: skip
def test_samples_are_those_of_another_parser(text: str) -> None:
    """With labels in any order."""
    assert oracle(text) == exposition.parse(text) != {}


@pytest.mark.parametrize(
    "line",
    [
        "lora_requests_total",
        "lora_requests_total seven",
        'lora_requests_total{lora_name="pirate} 7',
        'lora_requests_total{lora_name="pirate"',
        'lora_requests_total{lora_name="a" lora_name="b"} 7',
        "lora_requests_total{lora_name=pirate} 7",
        "<html>",
        "a 1 2 3",
    ],
)
def test_a_line_that_is_no_sample_is_named(line: str) -> None:
    """Left out, it would look like an adapter that nobody asks for."""
    with pytest.raises(TritonLoraError, match="line 2 of the metrics is no sample") as refused:
        exposition.parse(f"a 1\n{line}\n")

    assert repr(line) in str(refused.value)


def test_long_lines_are_refused_at_once() -> None:
    """A pattern that tries all ways to read 100,000 spaces would take minutes."""
    for line in ('a{b="c"' + " " * 100_000 + "; 1", 'a{b="' + '\\"' * 100_000 + "} 1", "a" + " " * 100_000 + "{"):
        with pytest.raises(TritonLoraError, match="no sample"):
            exposition.parse(line)
