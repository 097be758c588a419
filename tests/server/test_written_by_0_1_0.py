# SPDX-FileCopyrightText: the tritonlora authors
# SPDX-License-Identifier: Apache-2.0
"""A repository of tritonlora 0.1.0 on a real tritonserver, with this version installed."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from repositories import set_streams, synthetic_adapter, written_by_0_1_0
from tritonlora.launch import client
from tritonlora.launch.server import Server
from tritonlora.repository import add, init, paths


@pytest.mark.parametrize("upgrade", [False, True], ids=["as it is", "upgraded"])
def test_it_goes_on_working(tmp_path: Path, launch: Callable[..., Server], upgrade: bool) -> None:
    """Its warm adapter answers, and one that is added now."""
    root = written_by_0_1_0(tmp_path, "after")
    if upgrade:
        init.init(root)
    opened = paths.open_repository(root)
    set_streams(opened, 2)
    add.add(opened, "haiku", synthetic_adapter(tmp_path / "haiku", 1), add.Options(warm=False))
    server = launch(root)
    inputs = {"stream": True, "bad_words": "", "stop_words": ""}

    def ask(name: str | None) -> str:
        return "".join(client.generate("hi", lora_name=name, max_tokens=5, url=server.http_url, inputs=inputs))

    assert ["[1]hi", "[2]hi", "[base"] == [ask(name) for name in ("pirate", "haiku", None)]
