# SPDX-FileCopyrightText: the tritonlora authors
# SPDX-License-Identifier: Apache-2.0
"""What all tests stand on."""

from __future__ import annotations

import signal

from tritonlora.interrupts import ENDING


def pytest_configure() -> None:
    """The signals as a terminal has them: a shell's background jobs and nohup ignore some, as do then all children."""
    for number in ENDING:
        if signal.getsignal(number) is signal.SIG_IGN:
            signal.signal(number, signal.default_int_handler if number == signal.SIGINT else signal.SIG_DFL)
