# SPDX-FileCopyrightText: the tritonlora authors
# SPDX-License-Identifier: Apache-2.0
"""traffic.py: requests by adapter, from a file or from metrics."""

from __future__ import annotations

import pytest

from tritonlora.engine.traffic import REQUESTS_METRIC, parse_traffic
from tritonlora.errors import TritonLoraError
from tritonlora.serving.metrics import REQUESTS

METRICS = """\
# HELP lora_requests_total Requests
# TYPE lora_requests_total counter
lora_requests_total{lora_name="pirate",model="lora_router",outcome="ok",version="1"} 7.000000
lora_requests_total{model="lora_router",outcome="error",lora_name="pirate",version="1"} 2
lora_requests_total{lora_name="gone",outcome="ok"} 100
lora_requests_total{lora_name="haiku",outcome="ok"} 1e3
lora_loads_total{lora_name="pirate",reason="evicted"} 50
nv_inference_request_success{model="lora_router",version="1"} 5
"""


def test_weights_are_lines_of_name_and_weight() -> None:
    """Blank lines and comments aside; a name may hold anything that a name may."""
    text = "# who asks for what\n\npirate: 7  # a lot\r\nv1.0-b_2 :0.5\n"

    assert {"pirate": 7.0, "v1.0-b_2": 0.5} == parse_traffic(text, {"pirate", "v1.0-b_2"})


def test_metrics_are_counted_over_all_outcomes() -> None:
    """Whatever the order of the labels; adapters that are gone count for nothing."""
    assert {"pirate": 9.0, "haiku": 1000.0} == parse_traffic(METRICS, {"pirate", "haiku", "unasked"})


def test_every_wrong_line_is_named() -> None:
    """In one error."""
    with pytest.raises(TritonLoraError) as refused:
        parse_traffic("pirate\nhaiku: -1\nbard: 1\npirate: 1\npirate: 2\npirate: nan\n", {"pirate", "haiku"})

    assert [
        "the weights cannot be read:",
        "  line 1: expected 'name: weight' with a weight from 0, got 'pirate'",
        "  line 2: expected 'name: weight' with a weight from 0, got 'haiku: -1'",
        "  line 3: no adapter 'bard' is registered",
        "  line 5: 'pirate' is there twice",
        "  line 6: expected 'name: weight' with a weight from 0, got 'pirate: nan'",
    ] == str(refused.value).splitlines()


def test_a_text_that_says_nothing_is_refused() -> None:
    """Else everybody would count as unasked."""
    with pytest.raises(TritonLoraError, match="neither a line 'name: weight' nor the metric lora_requests_total"):
        parse_traffic("# nothing\n", {"pirate"})


def test_metrics_of_another_server_are_one_problem() -> None:
    """Such as those of the OpenAI API, which have a line for each bucket of a histogram."""
    text = '# TYPE tritonlora_openai_requests_total counter\ntritonlora_openai_requests_total{model="pirate"} 9.0\n' * 9

    with pytest.raises(TritonLoraError, match="^these metrics have no lora_requests_total: give those of Triton's"):
        parse_traffic(text, {"pirate"})


def test_the_metric_is_that_of_the_listing() -> None:
    """Under another name, nothing would be found in what the server says."""
    assert REQUESTS.name == REQUESTS_METRIC
