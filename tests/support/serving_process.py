# SPDX-FileCopyrightText: the tritonlora authors
# SPDX-License-Identifier: Apache-2.0
"""`tritonlora serve` as a process."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

from tritonlora.machine import Ports

TRITONLORA = (sys.executable, "-m", "tritonlora")


def start(repo: Path, ports: Ports, *extra: str) -> subprocess.Popen[str]:
    """`tritonlora serve` in the background."""
    options = ["--http-port", ports.http, "--grpc-port", ports.grpc, "--metrics-port", ports.metrics]
    command = [*TRITONLORA, "serve", "--repo", str(repo), *map(str, options), *extra]
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
