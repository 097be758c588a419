# SPDX-FileCopyrightText: the tritonlora authors
# SPDX-License-Identifier: Apache-2.0
"""Checks of the machine that serves the repository: its shared memory and its ports."""

from __future__ import annotations

import shutil
from collections.abc import Iterator

from tritonlora.check.findings import Finding, Subject, warning
from tritonlora.machine import SHARED_MEMORY, ports_in_use
from tritonlora.repository.paths import RESOLVER
from tritonlora.serving.tickets import MOST_CARRIED_NBYTES


def shared_memory(subject: Subject) -> Iterator[Finding]:
    """Shared memory has the capacity for the weights that the resolver sends. Triton never gives any of it back."""
    plan = subject.plan
    if plan is None or not SHARED_MEMORY.is_dir():
        return
    there_is = shutil.disk_usage(SHARED_MEMORY).total
    kept = plan.resend_shm_bytes + min(plan.resend_shm_bytes, MOST_CARRIED_NBYTES)
    if there_is < plan.resend_shm_bytes:
        yield warning(
            str(SHARED_MEMORY),
            f"to send an adapter again takes {plan.resend_shm_bytes} bytes of shared memory, more than there is",
            "docker run --shm-size …",
        )
    elif there_is < kept and not (plan.fits and all(adapter.warm for adapter in plan.adapters)):
        yield warning(
            str(SHARED_MEMORY),
            f"{RESOLVER} keeps shared memory for the largest adapter that it loads, and for the largest one that goes "
            f"along with requests: {kept} bytes in all, more than there is",
            "docker run --shm-size …",
        )


def ports(subject: Subject) -> Iterator[Finding]:
    """A warning where a port is in use. The server of this very repository may be the one that uses it."""
    if subject.ports and (taken := ports_in_use(subject.ports)):
        options = [f"{option} PORT" for option, port in subject.ports.by_option.items() if port in taken]
        yield warning(
            f"port {', '.join(map(str, taken))}",
            "in use: a server listens there already, and tritonlora serve cannot start a second one there",
            f"nothing if it is this repository's server; else stop it, or choose: tritonlora serve {' '.join(options)}",
        )
