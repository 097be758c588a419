# SPDX-FileCopyrightText: the tritonlora authors
# SPDX-License-Identifier: Apache-2.0
"""Facts about the tritonserver process, which is the parent of each model's process."""

from __future__ import annotations

import os
import time
from datetime import datetime
from pathlib import Path

from .adapter_table import AdapterTable

# A younger server counts as being started, and so does the engine's model in it.
STARTING_SECONDS = 60.0


def stat_of(pid: int) -> list[str]:
    """The fields of /proc/PID/stat after the name of the program: state, parent, and so on (proc_pid_stat(5))."""
    return Path(f"/proc/{pid}/stat").read_text(errors="replace").rpartition(")")[2].split()


def start_ticks(pid: int) -> int:
    """When a process was started, in clock ticks since the machine was started."""
    return int(stat_of(pid)[19])


def name_for(model: str) -> str:
    """A name that only processes of this model in this tritonserver have.

    The server's process id and start time tell it from servers that have ended. The namespace tells apart containers,
    which may share /dev/shm and have process ids of their own.
    """
    server = os.getppid()
    namespace = Path("/proc/self/ns/pid").stat().st_ino
    return f"tritonlora-{namespace}-{start_ticks(server)}-{server}-{model}"


def started_at(pid: int) -> float:
    """When a process was started, in seconds since 1970 (btime of proc_stat(5))."""
    booted = next(line.split()[1] for line in Path("/proc/stat").read_text().splitlines() if line.startswith("btime "))
    return int(booted) + start_ticks(pid) / os.sysconf("SC_CLK_TCK")


def is_starting(pid: int) -> bool:
    """Whether a server was started less than STARTING_SECONDS ago."""
    return time.time() - started_at(pid) < STARTING_SECONDS


def warmed_at_start(table: AdapterTable, started_at: float) -> tuple[dict[int, int], set[int]]:
    """lora_task_id -> pages of the adapters that the warmup of an engine may have loaded, in the order of the warmup.

    `started_at` is the time of the engine's start, in seconds since 1970. The second value has the ids of those that
    may have come too late: they were added in the second before, or later.
    """
    warm = sorted((entry for entry in table.entries.values() if entry.warm), key=lambda entry: entry.lora_task_id)
    late = (one for one in warm if datetime.fromisoformat(one.added_at).timestamp() + 1 > started_at)
    return {entry.lora_task_id: entry.pages or 1 for entry in warm}, {entry.lora_task_id for entry in late}
