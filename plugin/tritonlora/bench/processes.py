# SPDX-FileCopyrightText: the tritonlora authors
# SPDX-License-Identifier: Apache-2.0
"""Processor time, memory and open files of a running tritonserver's processes, from Linux' /proc."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterable, Mapping
from pathlib import Path

from tritonlora.machine import SHARED_MEMORY
from tritonlora.serving.server_process import stat_of

PROC = Path("/proc")
SERVER = "tritonserver"
BLOCK_NBYTES = 512  # of st_blocks, see stat(2)


def processes_of(server: int) -> dict[str, list[int]]:
    """Model -> process ids of its instances in Triton's Python backend; `SERVER` -> the process id of tritonserver."""
    found = {SERVER: [server]}
    for directory in PROC.glob("[0-9]*"):
        with contextlib.suppress(OSError):
            parent = int(stat_of(int(directory.name))[1])
            words = (directory / "cmdline").read_bytes().decode(errors="replace").split("\0")
            model = next((Path(word).parts[-3] for word in words if word.endswith("/1/model.py")), None)
            if parent == server and model:
                found.setdefault(model, []).append(int(directory.name))
    return found


def processor_seconds(processes: Mapping[str, Iterable[int]]) -> dict[str, float]:
    """Processor time of each group of processes so far, user and system."""
    ticks = os.sysconf("SC_CLK_TCK")
    return {name: sum(sum(map(int, stat_of(pid)[11:13])) for pid in pids) / ticks for name, pids in processes.items()}


def pss_nbytes(processes: Iterable[int], *fields: str) -> int:
    """The memory of the processes in bytes. A page that n processes of the machine share counts as 1/n in each.

    `fields` are those of smaps_rollup, by default Pss. Pss_Anon and Pss_Shmem leave out the pages of files, such as
    programs. Of those a process has a larger part when other processes with the same program end.
    """
    lines = [line for pid in processes for line in (PROC / str(pid) / "smaps_rollup").read_text().splitlines()]
    return sum(int(line.split()[1]) * 1024 for line in lines if line.partition(":")[0] in (fields or ("Pss",)))


def shared_memory_nbytes(processes: Iterable[int]) -> int:
    """The memory of the files in /dev/shm that the processes have mapped, in bytes. Each file counts once.

    Deleted files do not count, such as the semaphores that Python's multiprocessing makes.
    """
    lines = [line for pid in processes for line in (PROC / str(pid) / "maps").read_text().splitlines()]
    files = {line[line.index("/") :] for line in lines if f" {SHARED_MEMORY}/" in line}
    return sum(Path(file).stat().st_blocks * BLOCK_NBYTES for file in files if not file.endswith(" (deleted)"))


def open_files(processes: Iterable[int]) -> int:
    """The number of file descriptors that the processes have."""
    return sum(len([*(PROC / str(pid) / "fd").iterdir()]) for pid in processes)
