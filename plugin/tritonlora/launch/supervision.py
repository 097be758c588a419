# SPDX-FileCopyrightText: the tritonlora authors
# SPDX-License-Identifier: Apache-2.0
"""Watch the processes of a server's models, since Triton does not notice the death of one."""

from __future__ import annotations

from collections.abc import Callable

from tritonlora.errors import ServerError
from tritonlora.launch.server import STUBS_POLL_SECONDS, Server


def watch(running: Server, *, keep_going: bool, say: Callable[[str], None]) -> None:
    """Look for dead stubs of a ready server, until the server ends.

    When a stub has died, its model is loaded again, if the server is in explicit model-control mode. Otherwise
    ServerError gives the reason to stop the server. With `keep_going` the server runs on, and `say` gets the reason.
    """
    while not running.ends(STUBS_POLL_SECONDS):
        for death in running.stubs.deaths():
            # The model may have been loaded again already, for an earlier death in this list.
            if running.ends(0) or running.stubs.runs(death.stub):
                continue
            if running.reload(death.stub.model) and running.stubs.runs(death.stub):
                say(
                    f"{death}; the model was loaded again, and requests that waited in that process may get no response"
                )
                continue
            if running.ends(0):
                return
            what = f"{death}; Triton starts no new one, so requests to that model fail or wait for ever"
            if not keep_going:
                raise ServerError(f"{what}; the server was ended: start it again with tritonlora serve")
            say(f"{what}; start the server again when you can")
