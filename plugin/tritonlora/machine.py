# SPDX-FileCopyrightText: the tritonlora authors
# SPDX-License-Identifier: Apache-2.0
"""The resources of this machine that a server uses: TCP ports, the addresses that it listens at, and shared memory."""

from __future__ import annotations

import contextlib
import errno
import random
import socket
from dataclasses import dataclass
from itertools import islice
from pathlib import Path

from tritonlora.errors import ServerError

SHARED_MEMORY = Path("/dev/shm")  # noqa: S108  Triton's Python backend keeps its regions here
ENDPOINTS = ("http", "grpc", "metrics")
LOCAL = "127.0.0.1"  # the default address of servers: a client that can reach Triton can stop it
_CONNECTIONS_PORTS = Path("/proc/sys/net/ipv4/ip_local_port_range")


@dataclass(frozen=True, slots=True)
class Ports:
    """The TCP ports of one server."""

    http: int = 8000
    grpc: int = 8001
    metrics: int = 8002
    openai: int | None = None  # of the OpenAI API before the server; None: there is none

    def __post_init__(self) -> None:
        """Raise ServerError when two endpoints have the same port.

        tritonserver itself would report this only after it has loaded all models.
        """
        if len({*self.by_option.values()}) < len(self.by_option):
            options = ", ".join(f"{option} {port}" for option, port in self.by_option.items())
            raise ServerError(f"each endpoint needs a port of its own, got {options}")

    @property
    def by_option(self) -> dict[str, int]:
        """The ports by the options of `tritonlora serve` that choose them."""
        ports = {kind: getattr(self, kind) for kind in (*ENDPOINTS, "openai")}
        return {f"--{kind}-port": port for kind, port in ports.items() if port is not None}


def free_ports() -> Ports:
    """Three ports that were free a moment ago.

    tritonserver binds them only when its models are loaded. If possible, they are outside of the range from which Linux
    takes ports for outgoing connections meanwhile.
    """
    words = _CONNECTIONS_PORTS.read_text().split() if _CONNECTIONS_PORTS.exists() else ()
    low, high = map(int, words or (32768, 60999))
    others = [*range(10_000, low), *range(high + 1, 1 << 16)]  # lower ports are those of well-known services
    random.shuffle(others)
    free = (port for port in others if _bind_error(port, LOCAL) is None)
    if len(found := [*islice(free, len(ENDPOINTS))]) == len(ENDPOINTS):
        return Ports(*found)
    with contextlib.ExitStack() as stack:
        sockets = [stack.enter_context(socket.socket()) for _ in ENDPOINTS]
        for one in sockets:
            one.bind((LOCAL, 0))
        return Ports(*(one.getsockname()[1] for one in sockets))


def numeric_address(address: str) -> str:
    """The numeric address of a host name, which tritonserver does not look up. ServerError when there is none."""
    try:
        found = socket.getaddrinfo(address, None, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)
    except (OSError, UnicodeError) as error:
        raise _cannot_listen(address, error) from None
    return str(found[0][4][0])


def check_ports(ports: Ports, address: str = LOCAL) -> None:
    """Raise ServerError unless a server can listen on all of these ports at `address`, a numeric address."""
    if taken := ports_in_use(ports, address):
        named = ", ".join(f"port {port} ({option})" for option, port in ports.by_option.items() if port in taken)
        raise ServerError(f"in use already: {named}; stop what listens there, or give another port")
    for port in ports.by_option.values():
        if error := _bind_error(port, address):
            raise _cannot_listen(host_and_port(address, port), error)


def ports_in_use(ports: Ports, address: str | None = None) -> list[int]:
    """The ports on which another process listens now, at `address`, a numeric address (None: any interface)."""
    errors = [(port, _bind_error(port, address)) for port in ports.by_option.values()]
    return [port for port, error in errors if error and error.errno == errno.EADDRINUSE]


def _bind_error(port: int, address: str | None) -> OSError | None:
    try:
        with socket.socket(socket.AF_INET6 if is_ipv6(address) else socket.AF_INET) as one:
            # A connection that has just ended is no obstacle.
            one.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            one.bind((address or "", port))
    except OSError as error:
        return error
    return None


def _cannot_listen(where: str, error: OSError | UnicodeError) -> ServerError:
    reason = error.strerror if isinstance(error, OSError) else error
    return ServerError(
        f"cannot listen at {where}: {reason}; give --address an address of this machine, and ports that you may use"
    )


def is_ipv6(address: str | None) -> bool:
    return address is not None and ":" in address


def host_and_port(address: str, port: int) -> str:
    return f"[{address}]:{port}" if is_ipv6(address) else f"{address}:{port}"
