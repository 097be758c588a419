# SPDX-FileCopyrightText: the tritonlora authors
# SPDX-License-Identifier: Apache-2.0
"""`tritonlora openai` as a process before a real server, for tests."""

from __future__ import annotations

import contextlib
import http.client
import os
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from tritonlora.machine import free_ports
from tritonlora.pbtxt.text_format import parse
from tritonlora.repository.model_configs import set_parameters
from tritonlora.repository.paths import Repository, read_text

READY_SECONDS = 60.0


@dataclass(frozen=True)
class Running:
    """A door that listens."""

    process: subprocess.Popen[bytes]
    port: int

    @property
    def url(self) -> str:
        """The base URL, as clients of OpenAI's API take it."""
        return f"http://127.0.0.1:{self.port}/v1"

    def get(self, path: str, **headers: str) -> tuple[int, bytes]:
        """Status and body."""
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=30)
        with contextlib.closing(connection):
            connection.request("GET", path, headers=headers)
            response = connection.getresponse()
            return response.status, response.read()


@contextlib.contextmanager
def opened_door(url: str, *options: object, environment: dict[str, str] | None = None) -> Iterator[Running]:
    """The door before the server at `url`, its gRPC endpoint, while the block runs."""
    port = free_ports().http
    command = [sys.executable, "-m", "tritonlora", "openai", "--url", url, "--port", str(port), *map(str, options)]
    with subprocess.Popen(command, env={**os.environ, **(environment or {})}) as process:
        try:
            yield Running(process, port)
        finally:
            process.terminate()
            process.wait(30)


def wait_until_healthy(door: Running) -> None:
    """Return when /health says that the door is ready."""
    deadline = time.monotonic() + READY_SECONDS
    while True:
        with contextlib.suppress(OSError):
            status, body = door.get("/health")
            if status == http.client.OK:
                return
        assert door.process.poll() is None, door.process.returncode
        assert time.monotonic() < deadline, body
        time.sleep(0.05)


def set_tokenizer(opened: Repository, directory: Path) -> None:
    """Let the text models use the Hugging Face tokenizer in `directory`."""
    for model in ("preprocessing", "postprocessing"):
        config = opened.root / model / "config.pbtxt"
        text = set_parameters(parse(read_text(config)), {"tokenizer_dir": str(directory)}).text
        config.write_text(text, encoding="utf-8")
