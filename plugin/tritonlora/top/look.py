# SPDX-FileCopyrightText: the tritonlora authors
# SPDX-License-Identifier: Apache-2.0
"""One look at a running server: its health, its metrics and its adapters."""

from __future__ import annotations

import time
from collections.abc import Mapping
from dataclasses import dataclass

from tritonlora import exposition
from tritonlora.errors import ServerError, TritonLoraError
from tritonlora.exposition import Samples
from tritonlora.launch import client

TIMEOUT_SECONDS = 5.0  # of each wait; a server that is busy responds to these requests in milliseconds


@dataclass(frozen=True, slots=True)
class Look:
    """What a server said at one time."""

    seconds: float  # time.monotonic()
    is_ready: bool
    samples: Samples
    states: Mapping[str, str] | None  # lora_name -> state, as the model `lora_adapters` lists it; None without listing


def look(url: str, metrics_url: str) -> Look:
    """Look at the server whose HTTP endpoint is at `url`. ServerError if the health or the metrics cannot be had."""
    is_ready = client.is_ready(url, timeout=TIMEOUT_SECONDS)
    try:
        samples = exposition.parse(client.metrics(metrics_url, timeout=TIMEOUT_SECONDS))
    except TritonLoraError as error:
        raise ServerError(f"{error} (another metrics port: --metrics-port PORT)") from None
    return Look(time.monotonic(), is_ready, samples, _states(url))


def _states(url: str) -> dict[str, str] | None:
    try:
        listing = client.adapters(url, timeout=TIMEOUT_SECONDS)
        return {name: str(about["state"]) for name, about in listing.items()}
    except (ServerError, KeyError, TypeError):  # an older server, or one whose model is not loaded
        return None
