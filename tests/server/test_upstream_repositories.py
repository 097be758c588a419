# SPDX-FileCopyrightText: the tritonlora authors
# SPDX-License-Identifier: Apache-2.0
"""init and add on model repositories made from upstream's templates, served by a real tritonserver.

Every config is upstream's own, filled as its tools/fill_template.py does. The CPU engine and the shipped text models
stand behind them, as the files that upstream has for these places need a GPU and a tokenizer.
"""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

from repositories import set_streams, synthetic_adapter
from tritonlora.errors import ServerError
from tritonlora.launch import client
from tritonlora.launch.server import Server
from tritonlora.repository import add, init, model_configs, paths
from tritonlora.repository.init import shipped_models
from upstream_configs import VERSIONS, upstream_repository

PARAMETERS = {
    "tensorrt_llm": {"synthetic": "true", "gpt_model_path": "1"},
    "preprocessing": {"tokenizer_dir": "", "add_special_tokens": ""},
    "postprocessing": {"tokenizer_dir": "", "skip_special_tokens": ""},
}


def on_the_cpu(root: Path) -> Path:
    """Put what can run here behind upstream's declarations; the engine's backend is then Python, like theirs."""
    shutil.rmtree(root / "tensorrt_llm_bls")  # calls upstream's own code
    for model, parameters in PARAMETERS.items():
        version = root / model / "1"
        shutil.copytree(shipped_models() / model / "1", version, dirs_exist_ok=True, symlinks=True)
        if model != "tensorrt_llm":
            code = version / "serving"
            code.unlink()
            shutil.copytree(shipped_models() / model / "1" / "serving", code)
        config = root / model / "config.pbtxt"
        text = config.read_text()
        for key, value in parameters.items():
            text = model_configs.set_parameter(text, key, value)
        config.write_text(text)
    return root


@pytest.mark.parametrize(("version", "decoupled"), [*((version, "True") for version in VERSIONS), ("v0.18.0", "False")])
def test_adapters_answer_by_name_in_upstream_s_repositories(
    tmp_path: Path, version: str, decoupled: str, launch: Callable[..., Server]
) -> None:
    """A warm adapter, one that is loaded on its first request, the base model, and nobody for an unknown name.

    Without streaming the engine gives the prompt back, too.
    """
    values = {"triton_backend": "python", "decoupled_mode": decoupled}
    root = on_the_cpu(upstream_repository(tmp_path / "repo", version, values=values))
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
        server.stop()

    assert ["[1]hi", "[2]hi", "[1]hi", "[base"] == answers
