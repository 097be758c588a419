# SPDX-FileCopyrightText: the tritonlora authors
# SPDX-License-Identifier: Apache-2.0
"""The demo's own steps and looks; tests/server drives what it calls."""

from __future__ import annotations

import io
import json
import tempfile
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path

import pytest
from rich.console import Console

from tritonlora.demo import flow, view
from tritonlora.demo.flow import Answer, ask, check_answers, prepare_repository
from tritonlora.demo.questions import MAX_TOKENS, QUESTIONS
from tritonlora.errors import ServerError
from tritonlora.repository import paths

FIRST, SECOND = QUESTIONS[:2]
SMOLLM2_135M = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "dtype": "bfloat16",
    "hidden_size": 576,
    "intermediate_size": 1536,
    "num_attention_heads": 9,
    "num_hidden_layers": 30,
    "num_key_value_heads": 3,
    "vocab_size": 49152,
}


@pytest.fixture
def base(tmp_path: Path) -> Path:
    """As much of the base model as the conversion of adapters looks at."""
    directory = tmp_path / "base"
    directory.mkdir()
    (directory / "config.json").write_text(json.dumps(SMOLLM2_135M))
    return directory


@contextmanager
def server_that_streams(*pieces: str) -> Iterator[tuple[str, list[bytes]]]:
    """HOST:PORT of Triton's generate extension, answering with `pieces`, and the bodies that it received."""
    bodies: list[bytes] = []

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            bodies.append(self.rfile.read(int(self.headers["Content-Length"])))
            self.send_response(200)
            self.end_headers()
            for piece in pieces:
                self.wfile.write(f"data: {json.dumps({'text_output': piece})}\n\n".encode())

        def log_message(self, *args: object) -> None:
            pass

    with HTTPServer(("127.0.0.1", 0), Handler) as http_server:
        thread = threading.Thread(target=http_server.serve_forever, kwargs={"poll_interval": 0.01})
        thread.start()
        try:
            yield f"127.0.0.1:{http_server.server_address[1]}", bodies
        finally:
            http_server.shutdown()
            thread.join()


def answer(lora_name: str | None, text: str, question: str = FIRST) -> Answer:
    return Answer(question, lora_name, text, pieces=1, seconds=0.1, request_nbytes=99)


def test_an_answer_grows_while_it_is_streamed() -> None:
    """Each piece is seen at once, and the answer tells what came and what was sent for it."""
    seen: list[str] = []
    with server_that_streams("Arr,", " matey!", "") as (url, bodies):
        got = ask(url, FIRST, "pirate", seen.append)

    assert ["Arr,", "Arr, matey!", "Arr, matey!"] == seen
    assert ("Arr, matey!", 3, "pirate") == (got.text, got.pieces, got.lora_name)
    assert [got.request_nbytes] == [len(body) for body in bodies]


def test_a_request_holds_a_name_and_no_weights() -> None:
    """What a client sends of an adapter is its name; for the base model it sends none."""
    with server_that_streams("x") as (url, bodies):
        ask(url, FIRST, "pirate", lambda text: None)
        ask(url, FIRST, None, lambda text: None)
    plain = {"text_input": FIRST, "max_tokens": MAX_TOKENS, "stream": True}

    requests = [json.loads(body) for body in bodies]
    assert 2 == len({request.pop("id") for request in requests})
    assert [plain | {"lora_name": "pirate"}, plain] == requests


def test_every_committed_adapter_is_put_into_the_repository(tmp_path: Path, base: Path) -> None:
    """The repository is the shipped one, set up for the checkpoint, with the adapters warm."""
    adapters = prepare_repository(tmp_path / "repository", base)
    opened = paths.open_repository(tmp_path / "repository")
    engine = paths.read_config(opened.config_path)

    assert ["bard", "json", "pirate"] == [adapter.lora_name for adapter in adapters]
    assert [(8,), (1,), (4,)] == [adapter.adapter_sizes for adapter in adapters]
    assert [1, 7, 3] == [len(adapter.modules) for adapter in adapters]
    assert all(entry.warm for entry in paths.read_table(opened).entries.values())
    assert str(base) == engine.parameters["gpt_model_path"]


def test_an_adapter_that_changes_nothing_is_an_error() -> None:
    """Answers of the base model under an adapter's name are refused, and the adapters named."""
    answers = [
        *(answer(None, "Berlin."), answer("pirate", "Arr!"), answer("json", "Berlin.")),
        *(answer(None, "Blue.", SECOND), answer("pirate", "Blue.", SECOND), answer("json", "Blue.", SECOND)),
    ]
    with pytest.raises(ServerError, match=r"^these adapters changed no response of the base model: json$"):
        check_answers(answers)


def test_adapters_that_change_an_answer_pass() -> None:
    """One different answer is enough: an adapter may agree with the base model on a fact."""
    check_answers([answer(None, "Berlin."), answer("pirate", "Arr!")])


def test_without_a_server_nothing_is_fetched(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A missing tritonserver is found out first."""

    def none_found() -> None:
        raise ServerError("no tritonserver found")

    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setattr(flow, "find_tritonserver", none_found)
    with pytest.raises(ServerError, match="no tritonserver found"):
        flow.run()

    assert [] == list(tmp_path.iterdir())


def test_a_stop_leaves_no_scratch_directory(tmp_path: Path, base: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Ctrl-C at the server's launch removes the repository that was made for it."""
    scratch = tmp_path / "scratch"
    scratch.mkdir()
    made: list[str] = []

    def interrupted(root: Path, exit_timeout: int) -> None:
        made.extend(path.name for path in root.iterdir())
        raise KeyboardInterrupt

    monkeypatch.setattr(tempfile, "tempdir", str(scratch))
    monkeypatch.setattr(flow, "find_tritonserver", lambda: None)
    monkeypatch.setattr(flow, "Server", interrupted)
    with pytest.raises(KeyboardInterrupt):
        flow.run(base=base, stderr=Console(file=io.StringIO()))

    assert "lora_router" in made
    assert [] == list(scratch.iterdir())


def test_in_a_pipe_answers_are_lines() -> None:
    """Each question is a heading, each model a line that grows; nothing is written twice."""
    file = io.StringIO()
    with view.answers(Console(file=file), ["pirate"]) as show:
        show(FIRST, None, "Ber")
        show(FIRST, None, "Berlin.")
        show(FIRST, "pirate", "Arr!")
        show(SECOND, None, "Blue.")

    assert f"\n{FIRST}\n  base    Berlin.\n  pirate  Arr!\n{SECOND}\n  base    Blue.\n\n" == file.getvalue()


def test_on_a_terminal_answers_stand_side_by_side() -> None:
    """The table has a column for each question, and the answers of one model in one row."""
    file = io.StringIO()
    with view.answers(Console(file=file, force_terminal=True, width=100), ["pirate"]) as show:
        show(FIRST, "pirate", "Arr, Berlin!")
        show(SECOND, "pirate", "Arr, blue!")
    rows = [line for line in file.getvalue().splitlines() if "pirate" in line]

    assert "Arr, Berlin!" in rows[-1]
    assert rows[-1].index("Arr, Berlin!") < rows[-1].index("Arr, blue!")


def test_a_step_says_how_long_it_took() -> None:
    """A step that is done is one line; in a pipe there is nothing else."""
    file = io.StringIO()
    with view.step(Console(file=file), "base model") as progress:
        progress("fetching", 1, 2)

    assert "   0.0 s  base model\n" == file.getvalue()
