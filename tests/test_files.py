# SPDX-FileCopyrightText: the tritonlora authors
# SPDX-License-Identifier: Apache-2.0
"""files.py: one writer at a time, modes, what is in the making, and deleting."""

from __future__ import annotations

import errno
import fcntl
import os
import stat
from collections.abc import Iterator
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


# Modes


@pytest.fixture(params=[0o077, 0o022, 0o002, 0o000], ids=oct)
def umask(request: pytest.FixtureRequest) -> Iterator[int]:
    """The umask of whoever runs a command."""
    before = os.umask(request.param)
    yield request.param
    os.umask(before)


def mode(path: Path) -> int:
    """The permissions of a file or directory."""
    return stat.S_IMODE(path.lstat().st_mode)


def test_everybody_can_read_what_is_new_and_others_cannot_write_it(tmp_path: Path, umask: int) -> None:
    """Whatever the umask takes away or leaves: the server may run as another user."""
    files.make_directory(tmp_path / "a" / "b")
    files.write_text(tmp_path / "a" / "b" / "file", "x")
    found = [mode(tmp_path / "a"), mode(tmp_path / "a" / "b"), mode(tmp_path / "a" / "b" / "file")]

    group = 0o020 if not umask & 0o020 else 0
    assert [0o755 | group, 0o755 | group, 0o644 | group] == found


def test_a_file_in_the_making_is_never_writable_for_others(tmp_path: Path, umask: int) -> None:
    """Who opens it then can still write to it when it has its name."""
    with files.temporary_name(tmp_path / "file") as temporary:
        assert 0 == mode(temporary) & 0o002
    with files.temporary_directory(tmp_path / "directory") as temporary:
        assert 0 == mode(temporary) & 0o002


def test_what_is_not_for_all_is_as_the_umask_says(tmp_path: Path, umask: int) -> None:
    """Less what others could write."""
    with files.temporary_name(tmp_path / "file") as temporary:
        files.publish(temporary, tmp_path / "file", for_all=False)

    assert 0o666 & ~umask & ~0o002 == mode(tmp_path / "file")


@pytest.mark.parametrize("kept", [0o600, 0o640, 0o664, 0o666])
def test_a_file_that_is_replaced_keeps_its_mode(tmp_path: Path, umask: int, kept: int) -> None:
    """It is its owner's to decide."""
    (tmp_path / "file").write_text("before")
    (tmp_path / "file").chmod(kept)
    files.write_text(tmp_path / "file", "after")

    assert kept == mode(tmp_path / "file")


def test_a_copy_of_a_private_file_is_private(tmp_path: Path, umask: int) -> None:
    """What init keeps of a config.pbtxt that only its owner can read."""
    (tmp_path / "file").write_text("secret")
    (tmp_path / "file").chmod(0o600)
    files.write_bytes(tmp_path / "copy", b"secret", like=tmp_path / "file")

    assert 0o600 == mode(tmp_path / "copy")


def test_a_file_whose_owner_cannot_be_kept_can_be_read_by_that_owner(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Only root gives files away; the owner may be the server."""

    def refuse(*_: int) -> None:
        raise PermissionError

    (tmp_path / "file").write_text("before")
    (tmp_path / "file").chmod(0o600)
    monkeypatch.setattr(os, "fchown", refuse)
    files.write_text(tmp_path / "file", "after")

    assert 0o644 == mode(tmp_path / "file")


def test_a_directory_keeps_the_bits_that_it_inherits(tmp_path: Path) -> None:
    """Those of a directory that a group shares."""
    tmp_path.chmod(0o2775)
    files.make_directory(tmp_path / "a")

    assert 0o2755 == mode(tmp_path / "a")


# In the making


def test_a_file_is_abandoned_when_its_writer_has_ended(tmp_path: Path) -> None:
    """Not before, in whatever process; and when it is not known."""
    with files.temporary_name(tmp_path / "file") as file, files.temporary_directory(tmp_path / "d") as directory:
        assert not files.is_abandoned(file)
        assert not files.is_abandoned(directory)
        assert [] == files.abandoned_beside([tmp_path / "file"])
    left, link, fifo, nested = (
        tmp_path / f".{name}.01234567{files.TEMPORARY_SUFFIX}" for name in ("file", "link", "fifo", "nested")
    )
    left.write_text("half")
    link.symlink_to(left)
    os.mkfifo(fifo)
    nested.mkdir()

    assert [True, False, False, True] == [files.is_abandoned(path) for path in (left, link, fifo, nested)]
    assert not files.is_abandoned(tmp_path / "nothing")
    assert [left] == files.abandoned_beside([tmp_path / name for name in ("file", "link", "fifo", "nested", "other")])


def test_a_file_that_is_taken_for_abandoned_before_it_is_locked_is_made_anew(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The moment in between is somebody's chance to delete it."""
    flock, deleted = fcntl.flock, list[Path]()

    def flock_too_late(descriptor: int, operation: int) -> None:
        if not deleted:
            deleted.append(Path(f"/proc/self/fd/{descriptor}").readlink())
            deleted[0].unlink()
        flock(descriptor, operation)

    monkeypatch.setattr(fcntl, "flock", flock_too_late)
    with files.temporary_name(tmp_path / "file") as temporary:
        assert temporary.exists()
        assert temporary != deleted[0]


def test_deleting_says_what_stays(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of a directory, too; what is gone already is no problem."""
    (tmp_path / "a").mkdir()
    (tmp_path / "a" / "file").write_text("")

    def busy(path: str, **_: object) -> None:
        raise OSError(errno.EBUSY, "busy", path)

    with monkeypatch.context() as patched:
        patched.setattr(os, "unlink", busy)
        with pytest.raises(OSError, match="busy"):
            files.delete(tmp_path / "a")
    files.delete(tmp_path / "a")
    files.delete(tmp_path / "a")

    assert [] == list(tmp_path.iterdir())


# Reading beside a writer


def test_readers_share_and_writers_wait_for_them(tmp_path: Path) -> None:
    """Where nobody has written yet, there is nothing to hold, and nothing is made."""
    with files.reading(tmp_path) as held:
        assert not held
    assert [] == list(tmp_path.iterdir())
    with files.locked(tmp_path):
        pass
    with files.reading(tmp_path) as held, files.reading(tmp_path) as held_too:
        assert held
        assert held_too
        with pytest.raises(filelock.Timeout):
            filelock.FileLock(tmp_path / ".lock").acquire(timeout=0)
    with files.locked(tmp_path):
        pass


def test_whoever_reads_while_another_writes_says_so(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """As a writer does."""
    monkeypatch.setattr(files, "SILENT_WAIT_SECONDS", 0.01)
    monkeypatch.setattr(files, "LOCK_TIMEOUT_SECONDS", 0.2)
    with (
        filelock.FileLock(tmp_path / ".lock"),
        pytest.raises(RepositoryError, match="another tritonlora has been writing to .* for a long time"),
        files.reading(tmp_path),
    ):
        pass

    assert [f"waiting for another tritonlora that is writing to {tmp_path}"] == caplog.messages


def test_the_lock_can_be_opened_by_whoever_checks(tmp_path: Path, umask: int) -> None:
    """Whatever the umask of the first writer was."""
    with files.locked(tmp_path):
        pass

    assert 0o644 == mode(tmp_path / ".lock")
