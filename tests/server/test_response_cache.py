# SPDX-FileCopyrightText: the tritonlora authors
# SPDX-License-Identifier: Apache-2.0
"""Triton's response cache on a real tritonserver, which makes an empty success of an error that it keeps."""

from __future__ import annotations

import http.client
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from asking import PROMPT
from repositories import lead_as_before, synthetic_repository
from synthetic import expected, post
from tritonlora.files import write_text
from tritonlora.launch.server import Server
from tritonlora.launch.tritonserver import find_tritonserver
from tritonlora.repository import init
from tritonlora.repository.paths import Repository, read_table, read_text
from tritonlora.repository.undo import WITH_CODE

CACHE = "response_cache { enable: true }\n"
WITH_CACHE = (
    f"--cache-directory={find_tritonserver().executable.parents[1] / 'caches'}",
    "--cache-config=local,size=1048576",
)
EXPLICIT = ("--model-control-mode=explicit", "--load-model=*")

Launch = Callable[..., Server]


def keep_responses(opened: Repository, model: str) -> None:
    """Switch the cache on for a model, and keep its code from refusing that."""
    config, code = opened.root / model / "config.pbtxt", opened.root / model / "1" / "serving" / "resolver_model.py"
    write_text(config, read_text(config) + CACHE)
    assert 1 == read_text(code).count("        check_config(config)\n")
    write_text(code, read_text(code).replace("        check_config(config)\n", ""))


def ask(server: Server, name: str | None) -> tuple[int, dict[str, Any]]:
    """Status and JSON of what the ensemble answers."""
    body = {"text_input": PROMPT, "max_tokens": 12, **({"lora_name": name} if name else {})}
    return post(server, "/v2/models/ensemble/generate", body)


def hits(server: Server, model: str) -> int:
    """How many responses of the model came out of the cache."""
    connection = http.client.HTTPConnection(server.http_url, timeout=60)
    connection.request("GET", f"/v2/models/{model}/stats")
    statistics = json.loads(connection.getresponse().read())["model_stats"][0]["inference_stats"]
    connection.close()
    return int(statistics.get("cache_hit", {}).get("count", 0))


@pytest.mark.parametrize("decoupled", [True, False])
def test_an_error_that_triton_keeps_is_never_answered_by_the_base_model(
    tmp_path: Path, launch: Launch, decoupled: bool
) -> None:
    """The resolver's response for an unknown name is empty the second time. The engine refuses what is left then."""
    opened = synthetic_repository(tmp_path / "repo", cold=["pirate"], decoupled=decoupled, streams=1)
    init.init(opened.root, topology="resolve")
    keep_responses(opened, "lora_resolver")
    server = launch(opened.root, extra=WITH_CACHE)
    answers = [ask(server, name) for name in ("nobody", "nobody", "nobody", "pirate", "pirate")]
    errors = [answer.get("error", "") for _, answer in answers[:3]]
    text = expected(read_table(opened), "pirate", tokens=12)

    assert [400] * 3 + [200] * 2 == [status for status, _ in answers]
    assert errors[0].startswith("in ensemble 'ensemble', unknown LoRA adapter 'nobody'; available: pirate")
    assert ["in ensemble 'ensemble', request_output_len is not present in the request"] * 2 == errors[1:]
    assert [text] * 2 == [answer["text_output"] for _, answer in answers[3:]]
    assert 3 == hits(server, "lora_resolver")


def test_our_models_do_not_load_with_a_response_cache(tmp_path: Path, launch: Launch) -> None:
    """Whoever starts the server. Of a decoupled model Triton itself keeps nothing, and does not load it either."""
    opened = synthetic_repository(tmp_path / "repo", cold=["pirate"], decoupled=False, streams=1)
    init.init(opened.root, topology="resolve")
    server = launch(opened.root, extra=EXPLICIT)
    for model in WITH_CODE:
        path = opened.root / model / "config.pbtxt"
        write_text(path, read_text(path) + CACHE)
        status, answer = post(server, f"/v2/repository/models/{model}/load", {})

        assert 400 == status
        assert (
            f"response_cache is on in the config.pbtxt of {model}; take it out: Triton's response cache keeps"
            in (answer["error"])
        )


def test_an_ensemble_from_before_is_answered_as_ever(tmp_path: Path, launch: Launch) -> None:
    """By an adapter, by the base model, and not for an unknown name; `init` may have been stopped in its midst."""
    opened = synthetic_repository(tmp_path / "repo", cold=["pirate"], streams=1)
    init.init(opened.root, topology="resolve")
    now = read_text(opened.root / "lora_resolver" / "config.pbtxt")
    lead_as_before(opened)
    table = read_table(opened)
    before = read_text(opened.root / "lora_resolver" / "config.pbtxt")
    for resolver in (before, now):  # the ensemble is written after it
        write_text(opened.root / "lora_resolver" / "config.pbtxt", resolver)
        server = launch(opened.root)

        assert 400 == ask(server, "nobody")[0]
        assert [expected(table, name, tokens=12) for name in ("pirate", None)] == [
            ask(server, name)[1]["text_output"] for name in ("pirate", None)
        ]
