# SPDX-FileCopyrightText: the tritonlora authors
# SPDX-License-Identifier: Apache-2.0
"""`tritonlora`, and `python -m tritonlora`: Ctrl-C makes exit code 130 from the first moment to the last."""

from __future__ import annotations

import os
import signal
from types import FrameType

from tritonlora import interrupts


def main() -> int:
    """Run one command; its exit code. The process has to end after it, as its signals stay handled here."""
    interrupts.handle(_leave)
    from tritonlora.cli import commands  # takes a while

    code = commands.main()
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Python's own end lets go of handlers; SIGTERM ends one that hangs
    return code


def _leave(_number: int, _frame: FrameType | None) -> None:
    # At once, as nothing has been begun yet, or all has ended: in between, the command line handles signals itself.
    os._exit(130)


if __name__ == "__main__":
    raise SystemExit(main())
