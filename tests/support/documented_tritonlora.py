# SPDX-FileCopyrightText: the tritonlora authors
# SPDX-License-Identifier: Apache-2.0
"""`tritonlora` for the code blocks of the docs: the same commands, on free ports, and `serve` in the background.

`preloaded` runs it for tests/docs/test_blocks.py, with DOCUMENTED_PORTS=HTTP,GRPC,METRICS in the environment. `serve`
returns when the server is ready; its process id is then in the file named by DOCUMENTED_PID.
"""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

from tritonlora.cli import commands


def main(words: list[str]) -> int:
    """Run the command with the ports that it needs."""
    http, grpc, metrics = os.environ["DOCUMENTED_PORTS"].split(",")
    ports = ["--http-port", http, "--grpc-port", grpc, "--metrics-port", metrics]
    command, rest = words[0], words[1:]
    if command == "generate":
        rest = ["--url", f"localhost:{http}", *rest]
    if command in ("check", "serve"):
        rest = [*ports, *rest]
    if command != "serve" or "--print-command" in rest:
        return commands.main([command, *rest])
    router = Path("REPO/lora_router/config.pbtxt")
    router.write_text(router.read_text().replace("count: 3", "count: 2"))  # instances start and stop in turn
    with Path("serve.log").open("w") as log:
        server = subprocess.Popen(
            [sys.executable, "-m", "tritonlora", command, *rest], stdout=subprocess.PIPE, stderr=log, text=True
        )
    Path(os.environ["DOCUMENTED_PID"]).write_text(str(server.pid))
    assert server.stdout is not None
    expected = ["ready on", "verified: "] if "--verify" in rest else ["ready on"]
    for start in expected:
        line = server.stdout.readline()
        sys.stdout.write(line)
        if not line.startswith(start):
            sys.stderr.write(Path("serve.log").read_text())
            return 1
    return 0
