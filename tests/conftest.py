# SPDX-FileCopyrightText: the tritonlora authors
# SPDX-License-Identifier: Apache-2.0
"""What all tests stand on."""

from __future__ import annotations

import signal
from pathlib import Path

import pytest

from tritonlora.interrupts import ENDING


def pytest_configure() -> None:
    """The signals as a terminal has them: a shell's background jobs and nohup ignore some, as do then all children."""
    for number in ENDING:
        if signal.getsignal(number) is signal.SIG_IGN:
            signal.signal(number, signal.default_int_handler if number == signal.SIGINT else signal.SIG_DFL)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """The folders that take longest come first, so that no worker is left alone with one of them at the end."""
    items.sort(key=lambda item: _FOLDERS_BY_TIME.get(item.path.relative_to(_TESTS).parts[0], len(_FOLDERS_BY_TIME)))


_TESTS = Path(__file__).parent
_FOLDERS_BY_TIME = {"server": 0, "packaging": 1, "repository": 2, "cpu_engine": 3}
