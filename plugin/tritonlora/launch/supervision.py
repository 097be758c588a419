# SPDX-FileCopyrightText: the tritonlora authors
# SPDX-License-Identifier: Apache-2.0
"""Wait for a server to end, and stop it when a model's process has died, since Triton does not notice the death."""

from __future__ import annotations

from collections.abc import Callable

from tritonlora.errors import ServerError
from tritonlora.launch.server import STUBS_POLL_SECONDS, Server

# Triton 2.51 needs its whole exit timeout when a stub has died. Requests that other processes can finish have this many
# seconds.
PATIENCE_SECONDS = 5.0


def wait(running: Server, *, keep_going: bool, say: Callable[[str], None]) -> int:
    """Wait for a ready server to end by itself, and return its exit status.

    When a stub has died, its model is loaded again, if the server is in explicit model-control mode. Otherwise the
    server is stopped and ServerError gives the reason. With `keep_going` the server runs on, and `say` gets the reason.
    """
    while (status := running.wait(STUBS_POLL_SECONDS)) is None:
        for death in running.stubs.deaths():
            # The model may have been loaded again already, for an earlier death in this list.
            if running.stubs.runs(death.stub):
                continue
            if running.reload(death.stub.model) and running.stubs.runs(death.stub):
                say(
                    f"{death}; the model was loaded again, and requests that waited in that process may get no response"
                )
                continue
            what = f"{death}; Triton starts no new one, so requests to that model fail or wait for ever"
            if not keep_going:
                running.stop(PATIENCE_SECONDS)
                raise ServerError(f"{what}; the server was ended: start it again with tritonlora serve")
            say(f"{what}; start the server again when you can")
    return status
