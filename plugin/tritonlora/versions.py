# SPDX-FileCopyrightText: the tritonlora authors
# SPDX-License-Identifier: Apache-2.0
"""Files that may be changed at any time: whether one is a file, and still the one that was read.

This file runs inside a plain Triton container: standard library only.
"""

from __future__ import annotations

import errno
import os
import stat
import time
from pathlib import Path
from typing import TypeAlias

# A file may change again without a later time: where kernels count it in ticks, for up to 10 ms.
SETTLED_SECONDS = 0.05

Version: TypeAlias = "tuple[int, int, int, int]"


def version_of(found: os.stat_result) -> Version:
    """What another content of the file does not share, once this one `is_settled`.

    The time is that of the last change: that of the last modification can be set, and tools do when they copy in place.
    """
    return (found.st_dev, found.st_ino, found.st_size, found.st_ctime_ns)


def open_file(path: Path) -> int:
    """A descriptor to read from. OSError where it is no regular file: opening a FIFO would wait for its other end."""
    descriptor = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
    if not stat.S_ISREG(os.fstat(descriptor).st_mode):
        os.close(descriptor)
        raise OSError(errno.EINVAL, "not a file", str(path))
    return descriptor


def is_settled(found: os.stat_result) -> bool:
    """Whether a change from now on would be another version."""
    return abs(time.time() - found.st_ctime) > SETTLED_SECONDS
