# SPDX-FileCopyrightText: the tritonlora authors
# SPDX-License-Identifier: Apache-2.0
"""Adapters on the Hugging Face hub, by huggingface_hub, in its own cache.

The commit is resolved first, and all files are of that commit. huggingface_hub compares the size of a file that it
fetches. The SHA-256 that the hub has of a large file, and git's SHA-1 of a small one, are compared here. A file with
another digest is taken out of the cache, or the next attempt would find it there.
"""

from __future__ import annotations

import contextlib
import errno
import hashlib
import importlib
import inspect
import logging
import os
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tritonlora import extras
from tritonlora.errors import SourceError, TritonLoraError
from tritonlora.files import HASH_CHUNK
from tritonlora.sources import adapter_files
from tritonlora.sources.adapter_files import CONFIG, OnProgress
from tritonlora.sources.location import Location

_COMMIT = re.compile(r"[0-9a-f]{40}")
_TIMEOUT_SECONDS = 30.0


@dataclass(frozen=True, slots=True)
class Listed:
    """A file of a commit, as the hub describes it."""

    nbytes: int
    sha256: str | None  # of a large file
    blob_id: str | None  # git's SHA-1 of a small file


def resolve(location: Location) -> tuple[str, dict[str, Listed]]:
    """The commit that the revision stands for now, and its files in the folder, by name. SourceError; MissingExtra."""
    extras.require("hub")
    import huggingface_hub

    with _errors(location):
        info = huggingface_hub.HfApi(endpoint=_endpoint()).model_info(
            location.repository, revision=location.revision or None, files_metadata=True, timeout=_TIMEOUT_SECONDS
        )
    if not info.sha or not _COMMIT.fullmatch(info.sha):
        raise SourceError("the hub does not tell its commit; look at HF_ENDPOINT")
    start = f"{location.folder}/" if location.folder else ""
    paths = {one.rfilename: one for one in info.siblings or () if one.rfilename.startswith(start)}
    files = {path[len(start) :]: one for path, one in paths.items() if "/" not in path[len(start) :]}
    if CONFIG not in files:
        folders = sorted(path.rpartition("/")[0] for path in paths if path.endswith(f"/{CONFIG}"))
        given = [f"{location.text}/{one[len(start) :]}" for one in folders[:20]]
        hint = (
            f"it has adapters in folders, give one: {', '.join(given)}" if given else "give a PEFT adapter's repository"
        )
        raise SourceError(f"there is no {CONFIG} in it; {hint}")
    return info.sha, {
        name: Listed(one.size or 0, one.lfs.sha256 if one.lfs else None, one.blob_id) for name, one in files.items()
    }


def fetch(location: Location, on_progress: OnProgress) -> tuple[Path, str]:
    """The adapter's directory in the hub's cache, and the commit. SourceError when a file is missing or wrong."""
    commit, files = resolve(location)
    weights = adapter_files.weights_file(files)
    if weights is None:
        raise SourceError(f"it has {CONFIG}, but neither {' nor '.join(adapter_files.CHECKPOINTS)}")
    small = [name for name in (CONFIG, *adapter_files.TEMPLATES) if name in files]
    adapter_files.check_size(sum(files[name].nbytes for name in (*small, weights)))
    if not _COMMIT.fullmatch(location.revision):
        _download(location, CONFIG, location.revision or None, files, on_progress)  # notes the branch, for --offline
    for name in adapter_files.TEMPLATES:
        if name in files:
            _checked(location, name, commit, files, on_progress)
    path = _checked(location, CONFIG, commit, files, on_progress)
    index = _checked(location, weights, commit, files, on_progress)
    if weights.endswith(adapter_files.INDEX):
        shards = adapter_files.shards(index.read_bytes())
        if missing := sorted(set(shards) - files.keys()):
            raise SourceError(f"it lacks {missing[0]!r}, which its index names")
        adapter_files.check_size(sum(files[name].nbytes for name in shards))
        for name in shards:
            _checked(location, name, commit, files, on_progress)
    return path.parent, commit


def cached(location: Location) -> tuple[Path, str]:
    """The adapter's directory in the hub's cache, and the commit that was fetched last. SourceError without one."""
    extras.require("hub")
    import huggingface_hub

    name = f"{location.folder}/{CONFIG}" if location.folder else CONFIG
    found = huggingface_hub.try_to_load_from_cache(location.repository, name, revision=location.revision or None)
    if not isinstance(found, str):
        raise SourceError("it is not in the hub's cache on this machine; run the command once without --offline")
    path = Path(found)
    return path.parent, path.parents[name.count("/")].name


def _checked(location: Location, name: str, commit: str, files: Mapping[str, Listed], on_progress: OnProgress) -> Path:
    """The path of a file in the cache, once its digest is the hub's."""
    path = _download(location, name, commit, files, on_progress)
    listed = files[name]
    nbytes = path.stat().st_size
    if listed.sha256:
        digest, expected = hashlib.sha256(), listed.sha256
    elif listed.blob_id and _COMMIT.fullmatch(listed.blob_id):
        digest, expected = hashlib.sha1(f"blob {nbytes}\0".encode(), usedforsecurity=False), listed.blob_id
    else:
        return path
    with path.open("rb", buffering=0) as file:
        while chunk := file.read(HASH_CHUNK):
            digest.update(chunk)
    if digest.hexdigest() != expected:
        path.resolve().unlink()
        path.unlink()
        raise SourceError(
            f"{name} came with the digest {digest.hexdigest()}, expected {expected}, as the hub says; try again"
        )
    return path


def _download(
    location: Location, name: str, revision: str | None, files: Mapping[str, Listed], on_progress: OnProgress
) -> Path:
    import huggingface_hub

    on_progress(name, 0, files[name].nbytes)
    options: dict[str, Any] = {"endpoint": _endpoint()}
    if "tqdm_class" in inspect.signature(huggingface_hub.hf_hub_download).parameters:  # not in old versions
        options["tqdm_class"] = _bar(name, files[name].nbytes, on_progress)
    with _errors(location):
        path = Path(
            huggingface_hub.hf_hub_download(
                location.repository, name, subfolder=location.folder or None, revision=revision, **options
            )
        )
    on_progress(name, files[name].nbytes, files[name].nbytes)
    return path


def _endpoint() -> str | None:
    return os.environ.get("HF_ENDPOINT") or None


def _bar(name: str, nbytes: int, on_progress: OnProgress) -> type:
    """A class in the place of tqdm's, which tells `on_progress` and draws nothing."""
    base: Any = importlib.import_module("huggingface_hub.utils").tqdm

    class Bar(base):  # type: ignore[misc]
        def __init__(self, *args: Any, **settings: Any) -> None:
            super().__init__(*args, **{**settings, "disable": True})
            self._done = settings.get("initial") or 0

        def update(self, n: float | None = 1) -> None:
            self._done += n or 0
            on_progress(name, int(self._done), nbytes)

    return Bar


@contextlib.contextmanager
def _errors(location: Location) -> Iterator[None]:
    """Turn errors of huggingface_hub into ours, without their texts, which hold URLs that may be signed."""
    from huggingface_hub import errors

    log = logging.getLogger("huggingface_hub")
    level = log.level
    log.setLevel(logging.ERROR)  # its warnings hold such URLs, too
    try:
        yield
    except (TritonLoraError, KeyboardInterrupt):
        raise
    except errors.GatedRepoError:
        raise SourceError(f"access to it is gated; ask for it on its page, and {_TOKEN}") from None
    except errors.RevisionNotFoundError:
        raise SourceError(f"it has no revision {location.revision!r}; look for a misspelling") from None
    except errors.RepositoryNotFoundError:
        raise SourceError(f"it does not exist, or is private; look for a misspelling, or {_TOKEN}") from None
    except errors.LocalEntryNotFoundError:
        raise SourceError(_UNREACHABLE) from None
    except errors.EntryNotFoundError:
        raise SourceError("one of its files is gone; try again") from None
    except errors.HfHubHTTPError as error:
        status = getattr(getattr(error, "response", None), "status_code", None)
        if status in (401, 403):
            raise SourceError(f"the hub refuses it with status {status}; {_TOKEN}") from None
        raise SourceError(f"the hub answers with status {status}; try again later") from None
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EACCES, errno.EPERM, errno.EROFS):
            raise SourceError(
                f"the hub's cache cannot be written: {error.strerror}; make room, or set HF_HOME"
            ) from None
        if "Consistency check failed" in str(error):
            raise SourceError("a file came with another size than the hub says; try again") from None
        raise SourceError(f"{_UNREACHABLE} ({type(error).__name__})") from None
    except Exception as error:  # noqa: BLE001  of the HTTP library beneath, which changes with the version
        raise SourceError(f"{_UNREACHABLE} ({type(error).__name__})") from None
    finally:
        log.setLevel(level)


_TOKEN = "set HF_TOKEN to a token that may read it"  # noqa: S105  advice
_UNREACHABLE = "the hub cannot be reached; look at the network and HF_ENDPOINT, or give --offline for what is cached"
