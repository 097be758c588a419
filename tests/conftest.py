# SPDX-FileCopyrightText: the tritonlora authors
# SPDX-License-Identifier: Apache-2.0
"""What all tests stand on."""

from __future__ import annotations

import gc
import os
import signal
from pathlib import Path

import pytest

from tritonlora.interrupts import ENDING

# In servers and commands as well, and before anything imports torch. Several modules of tests run at a time: with more
# threads than cores, the threads of each torch wait for one another at full load.
os.environ.setdefault("OMP_NUM_THREADS", "1")


def pytest_configure() -> None:
    """The signals as a terminal has them: a shell's background jobs and nohup ignore some, as do then all children."""
    for number in ENDING:
        if signal.getsignal(number) is signal.SIG_IGN:
            signal.signal(number, signal.default_int_handler if number == signal.SIGINT else signal.SIG_DFL)
    gc.disable()  # half of the time in which each process imports the tests, and with them all that they test


def pytest_collection_finish() -> None:
    """What was imported stays: nobody looks through it for garbage."""
    gc.freeze()
    gc.enable()


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """The longest modules come first, so that no worker is left alone with one at the end."""
    items.sort(key=_place)


def _place(item: pytest.Item) -> int:
    path = item.path.relative_to(_TESTS).as_posix()
    return next((place for place, start in enumerate(_LONGEST) if path.startswith(start)), len(_LONGEST))


_TESTS = Path(__file__).parent
_LONGEST = (
    "packaging/test_installed.py",
    "server/test_serve.py",
    "docs/test_blocks.py",
    "server/test_openai.py",
    "server/test_llm_api.py",
    "server/test_dead_stubs.py",
    "server/test_answers.py",
    "server/test_demo_answers.py",
    "repository/test_stopped_undo.py",
    "repository/test_stopped_commands.py",
    "test_regular_files.py",
    "server/",
    "repository/",
    "cpu_engine/",
)
