# SPDX-FileCopyrightText: the tritonlora authors
# SPDX-License-Identifier: Apache-2.0
"""Reading files that may change at any time: whether a path is a regular file, and whether it changed since it was
read.

`open_file` refuses a FIFO or a device in the place of a file. Reading from one could wait for ever.
"""

from __future__ import annotations

import contextlib
import errno
import os
import stat
import time
from pathlib import Path
from typing import TypeAlias

# A file may change again without getting a later time: some kernels count file times in ticks of up to 10 ms.
SETTLED_SECONDS = 0.05

Version: TypeAlias = "tuple[int, int, int, int]"


def version_of(found: os.stat_result) -> Version:
    """(device, inode, bytes, nanoseconds of the last status change): another content of the file has another version.

    This holds once the file `is_settled`. The time of the last modification would not do: tools that copy in place set
    it back.
    """
    return (found.st_dev, found.st_ino, found.st_size, found.st_ctime_ns)


MOST_NBYTES = 1 << 28  # of a file that is read as a whole; a table of hundreds of thousands of adapters fits


def open_file(path: Path, *, follow: bool = True) -> int:
    """A descriptor to read the regular file `path`. OSError for anything else, and for a link unless `follow`.

    Other kinds are not even opened: opening a FIFO waits for its other end, and opening some devices has an effect.
    """
    if not stat.S_ISREG(path.stat(follow_symlinks=follow).st_mode):
        raise _not_a_file(path)
    descriptor = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC | (0 if follow else os.O_NOFOLLOW))
    if not stat.S_ISREG(os.fstat(descriptor).st_mode):  # another file has taken its place in between
        os.close(descriptor)
        raise _not_a_file(path)
    return descriptor


def _not_a_file(path: Path) -> OSError:
    return OSError(errno.EINVAL, "not a file", str(path))


def read_file(path: Path, most: int = MOST_NBYTES, *, follow: bool = True) -> bytes:
    """The content of the regular file `path`. OSError as from `open_file`, and when it has more than `most` bytes."""
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
    """Whether a change after `found` was taken would give the file another version."""
    return abs(time.time() - found.st_ctime) > SETTLED_SECONDS
