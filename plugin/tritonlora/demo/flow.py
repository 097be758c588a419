# SPDX-FileCopyrightText: the tritonlora authors
# SPDX-License-Identifier: Apache-2.0
"""The demo: fetch a base model, make a repository, add adapters, start a server, ask each adapter the same questions.

Only the questions and the output are the demo's own. The rest are functions that the other commands call, too.
"""

from __future__ import annotations

import functools
import json
import time
import uuid
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import asdict, dataclass
from pathlib import Path
from tempfile import TemporaryDirectory

from rich.console import Console

from tritonlora import extras
from tritonlora.demo import view
from tritonlora.demo.base_model import base_checkpoint
from tritonlora.demo.questions import MAX_TOKENS, QUESTIONS
from tritonlora.errors import ServerError
from tritonlora.launch import client
from tritonlora.launch.server import Server
from tritonlora.launch.tritonserver import find_tritonserver
from tritonlora.repository import add, init, paths

ADAPTERS = Path(__file__).parent / "adapters"
STREAMED = {"stream": True}
EXIT_TIMEOUT_SECONDS = 2  # after Ctrl-C no client waits for a response


@dataclass(frozen=True, slots=True)
class Answer:
    """The response of one model to one question."""

    question: str
    lora_name: str | None  # None: the base model
    text: str
    pieces: int  # number of pieces in which the server streamed the text
    seconds: float
    request_nbytes: int  # size of the whole body that the client sent


@dataclass(frozen=True, slots=True)
class LoadedAdapter:
    """One adapter as it was registered."""

    lora_name: str
    lora_task_id: int
    adapter_sizes: tuple[int, ...]  # r
    modules: tuple[str, ...]
    lora_weights_nbytes: int


@dataclass(frozen=True, slots=True)
class Demonstration:
    """The results of one run of the demo."""

    base: str
    repository: str
    adapters: tuple[LoadedAdapter, ...]
    answers: tuple[Answer, ...]
    seconds: float

    @property
    def largest_request_nbytes(self) -> int:
        """The size of the largest request."""
        return max(answer.request_nbytes for answer in self.answers)


def run(
    *,
    base: Path | None = None,
    keep: Path | None = None,
    as_json: bool = False,
    stdout: Console | None = None,
    stderr: Console | None = None,
) -> Demonstration:
    """Run the demo. It reports steps on `stderr`, and prints responses (with `as_json`: all results) on `stdout`.

    `base` is a checkpoint to use instead of the one that is fetched. The model repository is made in `keep`, and stays
    there, or in a scratch directory. However the demo ends, it leaves no process and no scratch directory. Raises
    TritonLoraError if a step fails, or if an adapter changed no response of the base model.
    """
    out, err = stdout or Console(), stderr or Console(stderr=True)
    started = time.monotonic()
    extras.require("demo")  # what is missing, this or a server, is reported before a download begins
    find_tritonserver()
    with ExitStack() as stack:
        with view.step(err, "base model") as progress:
            checkpoint = base.resolve() if base else base_checkpoint(progress)
        root = (keep or Path(stack.enter_context(TemporaryDirectory(prefix="tritonlora-demo-")))).resolve()
        with view.step(err, "model repository"):
            adapters = prepare_repository(root, checkpoint)
        with view.step(err, f"tritonserver, {len(adapters)} adapters loaded by its warmup") as progress:
            server = stack.enter_context(Server(root, exit_timeout=EXIT_TIMEOUT_SECONDS))
            server.wait_until_ready(on_progress=progress)
        names = [adapter.lora_name for adapter in adapters]
        with view.silent() if as_json else view.answers(out, names) as show:
            answers = _ask_all(server.http_url, names, show)
    shown = Demonstration(str(checkpoint), str(root), adapters, answers, round(time.monotonic() - started, 1))
    if as_json:
        out.file.write(json.dumps(asdict(shown), indent=2) + "\n")
    else:
        out.print(_summary(shown), markup=False, highlight=False, soft_wrap=True)
    if keep:
        err.print(f"serve it again with: tritonlora serve --repo {root}", highlight=False, soft_wrap=True)
    check_answers(answers)
    return shown


# The steps


def prepare_repository(root: Path, base: Path, adapters: Path = ADAPTERS) -> tuple[LoadedAdapter, ...]:
    """Make the shipped model repository in `root`, for the checkpoint `base`, with every adapter in `adapters`."""
    init.create_repository(
        root,
        {
            "preprocessing": {"tokenizer_dir": str(base), "chat_template": "true"},
            "postprocessing": {"tokenizer_dir": str(base)},
            "tensorrt_llm": {"gpt_model_path": str(base), "synthetic": "false"},
        },
    )
    opened = paths.open_repository(root)
    loaded = []
    for directory in sorted(path for path in adapters.iterdir() if path.is_dir()):
        entry = add.add(opened, directory.name, directory).entry
        loaded.append(
            LoadedAdapter(
                directory.name, entry.lora_task_id, entry.adapter_sizes, entry.modules, entry.lora_weights_nbytes
            )
        )
    return tuple(loaded)


def ask(url: str, question: str, lora_name: str | None, on_text: Callable[[str], None]) -> Answer:
    """Ask one question by adapter name. `on_text` gets the text so far whenever a piece arrives."""
    started = time.monotonic()
    text, pieces = "", 0
    own_id = {"id": uuid.uuid4().hex}
    for piece in client.generate(question, lora_name=lora_name, max_tokens=MAX_TOKENS, url=url, inputs=own_id):
        text, pieces = text + piece, pieces + 1
        on_text(text)
    nbytes = len(client.request_body(question, lora_name, MAX_TOKENS, own_id | STREAMED))
    return Answer(question, lora_name, text.strip(), pieces, round(time.monotonic() - started, 2), nbytes)


def _ask_all(url: str, names: Sequence[str], show: view.Show) -> tuple[Answer, ...]:
    """The responses of the base model and of each adapter to each question. `show` gets each text as it grows."""
    return tuple(
        ask(url, question, name, functools.partial(show, question, name))
        for question in QUESTIONS
        for name in (None, *names)
    )


def check_answers(answers: Sequence[Answer]) -> None:
    """Raise ServerError if all responses of an adapter are those of the base model: then it was not applied."""
    by_name: dict[str | None, list[str]] = {}
    for answer in answers:
        by_name.setdefault(answer.lora_name, []).append(answer.text)
    same = [str(name) for name, texts in by_name.items() if name is not None and texts == by_name[None]]
    if same:
        raise ServerError(f"these adapters changed no response of the base model: {', '.join(same)}")


def _summary(shown: Demonstration) -> str:
    weights = sum(adapter.lora_weights_nbytes for adapter in shown.adapters)
    name = shown.adapters[0].lora_name
    example = client.request_body(QUESTIONS[0], name, MAX_TOKENS, STREAMED).decode()
    return (
        f"The clients sent names, never weights: {len(shown.answers)} requests of at most "
        f"{shown.largest_request_nbytes} bytes, such as\n"
        f"  {example}\n"
        f"The {weights:,} bytes of lora_weights were loaded by Triton's warmup before the server was ready."
    )
