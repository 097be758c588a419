# SPDX-FileCopyrightText: the tritonlora authors
# SPDX-License-Identifier: Apache-2.0
"""The tritonserver that our models run in, which is the parent process of each."""

from __future__ import annotations

import os
import time
from datetime import datetime
from pathlib import Path

from .adapter_table import AdapterTable

# A server whose age is less is being started, and the engine's model with it.
STARTING_SECONDS = 60.0


def stat_of(pid: int) -> list[str]:
    """The fields of a process' stat that follow its name: state, parent, and so on (proc_pid_stat(5))."""
    return Path(f"/proc/{pid}/stat").read_text(errors="replace").rpartition(")")[2].split()


def start_ticks(pid: int) -> int:
    """When a process was started, in clock ticks since the machine was."""
    return int(stat_of(pid)[19])


def started_at(pid: int) -> float:
    """When a process was started, in seconds of the epoch (btime of proc_stat(5))."""
    booted = next(line.split()[1] for line in Path("/proc/stat").read_text().splitlines() if line.startswith("btime "))
    return int(booted) + start_ticks(pid) / os.sysconf("SC_CLK_TCK")


def is_starting(pid: int) -> bool:
    """Whether a server was started only just."""
    return time.time() - started_at(pid) < STARTING_SECONDS


def warmed_at_start(table: AdapterTable, started_at: float) -> dict[int, int]:
    """Pages of the adapters that an engine was started with at that time, by lora_task_id, in the order of its warmup.

    The time is in seconds of the epoch. An adapter that was added in the same second may have been too late.
    """
    return {
        entry.lora_task_id: entry.pages or 1
        for entry in sorted(table.entries.values(), key=lambda entry: entry.lora_task_id)
        if entry.warm and datetime.fromisoformat(entry.added_at).timestamp() + 1 <= started_at
    }
