# SPDX-FileCopyrightText: the tritonlora authors
# SPDX-License-Identifier: Apache-2.0
"""Whether a file is still the one that was read.

This file runs inside a plain Triton container: standard library only.
"""

from __future__ import annotations

import os
import time
from typing import TypeAlias

# A file may change again without a later time: where kernels count it in ticks, for up to 10 ms.
SETTLED_SECONDS = 0.05

Version: TypeAlias = "tuple[int, int, int, int]"


def version_of(found: os.stat_result) -> Version:
    """What another content of the file does not share, once this one `is_settled`.

    The time is that of the last change: that of the last modification can be set, and tools do when they copy in place.
    """
    return (found.st_dev, found.st_ino, found.st_size, found.st_ctime_ns)


def is_settled(found: os.stat_result) -> bool:
    """Whether a change from now on would be another version."""
    return abs(time.time() - found.st_ctime) > SETTLED_SECONDS
