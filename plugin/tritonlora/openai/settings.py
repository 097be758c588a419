# SPDX-FileCopyrightText: the tritonlora authors
# SPDX-License-Identifier: Apache-2.0
"""The settings of one door. They are pickled for each worker process."""

from __future__ import annotations

import ipaddress
from dataclasses import dataclass
from pathlib import Path

from tritonlora.errors import ServerError
from tritonlora.machine import LOCAL

DEFAULT_PORT = 9000
DEFAULT_URL = "localhost:8001"
STALL_SECONDS = 300.0  # as lora_router waits
API_KEY_VARIABLE = "TRITONLORA_API_KEY"


@dataclass(frozen=True, slots=True)
class Settings:
    """Where the door listens, which server it asks, and what the server does not tell by itself."""

    url: str = DEFAULT_URL  # HOST:PORT of the server's gRPC endpoint
    address: str = LOCAL
    port: int = DEFAULT_PORT
    repository: Path | None = None  # the server's model repository, if it is on this machine
    tokenizer: Path | None = None  # None: the directory that the server's preprocessing names
    base_name: str | None = None  # the base model's id for clients; None: its name on the Hugging Face hub, or "base/…"
    context_length: int | None = None  # tokens of prompt and response; None: as the engine's config.json says
    api_key: str | None = None
    workers: int = 1
    stall_seconds: float = STALL_SECONDS  # without a response of the engine, after which a request is given up
    drain_seconds: float = 30.0  # for requests under way when the door is stopped


def check_access(address: str, api_key: str | None) -> None:
    """Raise ServerError when anybody on the network could ask: without an API key at an address of others."""
    if api_key == "":
        raise ServerError("the API key is empty; leave it out to listen on this machine alone, or set one")
    if api_key is None and not ipaddress.ip_address(address).is_loopback:
        raise ServerError(
            f"without an API key anybody who reaches {address} could ask; set {API_KEY_VARIABLE}, or listen at {LOCAL}"
        )
