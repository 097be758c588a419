# SPDX-FileCopyrightText: the tritonlora authors
# SPDX-License-Identifier: Apache-2.0
"""files.py: one writer at a time."""

from __future__ import annotations

import os
from pathlib import Path

import filelock
import pytest

from tritonlora import files
from tritonlora.errors import RepositoryError


def test_a_file_stays_its_owner_s_with_its_mode(tmp_path: Path) -> None:
    """root edits what belongs to the server's user."""
    path = tmp_path / "config.pbtxt"
    path.write_text("before")
    owner = (1234, 5678) if os.geteuid() == 0 else (os.getuid(), os.getgid())
    os.chown(path, *owner)
    path.chmod(0o640)
    files.write_text(path, "after")
    found = path.stat()

    assert ("after", *owner, 0o640) == (path.read_text(), found.st_uid, found.st_gid, found.st_mode & 0o777)


def test_whoever_waits_for_another_writer_says_so(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """After a moment; and in the end gives up with that reason."""
    monkeypatch.setattr(files, "SILENT_WAIT_SECONDS", 0.01)
    monkeypatch.setattr(files, "LOCK_TIMEOUT_SECONDS", 0.02)
    with (
        filelock.FileLock(tmp_path / ".lock"),
        pytest.raises(RepositoryError, match="another tritonlora has been writing to .* for a long time"),
        files.locked(tmp_path),
    ):
        pass

    assert [f"waiting for another tritonlora that is writing to {tmp_path}"] == caplog.messages
