# SPDX-FileCopyrightText: the tritonlora authors
# SPDX-License-Identifier: Apache-2.0
"""Wait for a server's end, and end it when a process of one of its models has died: Triton notices no such death."""

from __future__ import annotations

from collections.abc import Callable

from tritonlora.errors import ServerError
from tritonlora.launch.server import STUBS_POLL_SECONDS, Server

# Triton 2.51 takes the whole of its exit timeout when a stub has died. Requests that other processes can finish get
# this long.
PATIENCE_SECONDS = 5.0


def wait(running: Server, *, keep_going: bool, say: Callable[[str], None]) -> int:
    """Wait for a ready server to end by itself; its exit status.

    When a stub has died, its model is loaded again where the server lets anybody do that, which is explicit
    model-control mode. Otherwise the server is ended and ServerError says why; with `keep_going`, `say` does.
    """
    while (status := running.wait(STUBS_POLL_SECONDS)) is None:
        for death in running.stubs.deaths():
            # An earlier one of the same model may have been the reason to load it again.
            if running.stubs.runs(death.stub):
                continue
            if running.reload(death.stub.model) and running.stubs.runs(death.stub):
                say(
                    f"{death}; the model was loaded again, and requests that waited in that process may get no response"
                )
                continue
            what = f"{death}; Triton starts no other one, so requests to that model fail or wait for ever"
            if not keep_going:
                running.stop(PATIENCE_SECONDS)
                raise ServerError(f"{what}; the server was ended: start it again with tritonlora serve")
            say(f"{what}; start the server again when you can")
    return status
