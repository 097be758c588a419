# SPDX-FileCopyrightText: the tritonlora authors
# SPDX-License-Identifier: Apache-2.0
"""init and add on model repositories made from upstream's templates, served by a real tritonserver.

Every config is upstream's own, filled as its tools/fill_template.py does.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from repositories import set_streams, synthetic_adapter
from tritonlora.errors import ServerError
from tritonlora.launch import client
from tritonlora.launch.server import Server
from tritonlora.repository import add, init, paths
from upstream_configs import VERSIONS, upstream_repository_on_the_cpu


@pytest.mark.parametrize(("version", "decoupled"), [*((version, "True") for version in VERSIONS), ("v0.18.0", "False")])
def test_adapters_answer_by_name_in_upstream_s_repositories(
    tmp_path: Path, version: str, decoupled: str, launch: Callable[..., Server]
) -> None:
    """A warm adapter, one that is loaded on its first request, the base model, and nobody for an unknown name.

    Without streaming the engine gives the prompt back, too.
    """
    root = upstream_repository_on_the_cpu(tmp_path / "repo", version, decoupled=decoupled)
    init.init(root)
    opened = paths.open_repository(root)
    set_streams(opened, 2)
    for number, name in enumerate(("warm", "cold")):
        adapter = synthetic_adapter(tmp_path / name, number)
        add.add(opened, name, adapter, add.Options(warm=name == "warm"))

    server = launch(root)
    inputs = {"stream": decoupled == "True", "bad_words": "", "stop_words": ""}

    def ask(name: str | None) -> str:
        return "".join(client.generate("hi", lora_name=name, max_tokens=5, url=server.http_url, inputs=inputs))

    try:
        answers = [ask(name).removeprefix("hi") for name in ("warm", "cold", "warm", None)]
        with pytest.raises(ServerError, match="unknown LoRA adapter 'x'; available: cold, warm"):
            ask("x")
    finally:
        server.stop(0)

    assert ["[1]hi", "[2]hi", "[1]hi", "[base"] == answers
