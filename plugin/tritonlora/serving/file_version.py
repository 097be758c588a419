# SPDX-FileCopyrightText: the tritonlora authors
# SPDX-License-Identifier: Apache-2.0
"""Files that may be changed at any time: whether one is a regular file, and still the one that was read.

Everything that tritonlora reads it opens with `open_file`: a FIFO or a device in a file's place is refused at once.
"""

from __future__ import annotations

import contextlib
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


MOST_NBYTES = 1 << 28  # of a file that is read as a whole: a table of hundreds of thousands of adapters


def open_file(path: Path, *, follow: bool = True) -> int:
    """A descriptor to read the regular file `path` from. OSError where it is anything else, or a link without `follow`.

    Nothing else is opened: to open a FIFO waits for its other end, and to open some devices does something.
    """
    if not stat.S_ISREG(path.stat(follow_symlinks=follow).st_mode):
        raise _not_a_file(path)
    descriptor = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC | (0 if follow else os.O_NOFOLLOW))
    if not stat.S_ISREG(os.fstat(descriptor).st_mode):  # it has become something else since
        os.close(descriptor)
        raise _not_a_file(path)
    return descriptor


def _not_a_file(path: Path) -> OSError:
    return OSError(errno.EINVAL, "not a file", str(path))


def read_file(path: Path, most: int = MOST_NBYTES, *, follow: bool = True) -> bytes:
    """The content of the regular file `path`. OSError as of `open_file`, and where it has more than `most` bytes."""
    with open(open_file(path, follow=follow), "rb", buffering=0) as file:
        nbytes = os.fstat(file.fileno()).st_size
        if nbytes > most:
            raise OSError(errno.EFBIG, f"it has {nbytes} bytes, expected at most {most}", str(path))
        return file.read()


def has_content(path: Path, content: bytes) -> bool:
    """Whether `path` is a regular file with exactly this content."""
    with contextlib.suppress(OSError):
        return path.stat().st_size == len(content) and read_file(path) == content
    return False


def is_settled(found: os.stat_result) -> bool:
    """Whether a change from now on would be another version."""
    return abs(time.time() - found.st_ctime) > SETTLED_SECONDS
