# SPDX-FileCopyrightText: the tritonlora authors
# SPDX-License-Identifier: Apache-2.0
"""Files of an object store, by fsspec and its driver for the scheme. Only s3fs, for s3://, is tested.

The driver finds the credentials itself. For S3 they come from AWS's variables, files or machines.
"""

from __future__ import annotations

import base64
import contextlib
import importlib.util
import re
from collections.abc import Generator, Iterator
from typing import Any

from tritonlora import extras
from tritonlora.errors import MissingExtra, SourceError
from tritonlora.sources.download import Remote, TransferEnded
from tritonlora.sources.location import Location

_CHUNK = 8 << 20  # each is a request
_OPTIONS = {"s3": {"config_kwargs": {"connect_timeout": 10, "read_timeout": 30, "retries": {"max_attempts": 2}}}}
_KNOWN_BY = (
    "ETag",
    "etag",
    "VersionId",
    "generation",
    "md5Hash",
    "content_md5",
    "mtime",
    "LastModified",
    "last_modified",
)
_MD5 = re.compile(r"[0-9a-f]{32}")
_NO_STORES = frozenset(  # of fsspec's protocols: wrappers of others, and places on this machine
    {
        *("blockcache", "cached", "dask", "data", "dir", "file", "filecache", "generic", "jlab", "libarchive", "local"),
        *("memory", "reference", "simplecache", "tar", "zip"),
    }
)


class BucketStore:
    """The files below a location, or the one file that the location is."""

    def __init__(self, location: Location) -> None:
        """MissingExtra when the driver is not installed; SourceError when no driver is known."""
        self._scheme, self._root = location.scheme, location.address.partition("?")[0]
        self._files = _file_system(location.scheme)

    def look(self, name: str) -> Remote | None:
        """The file's size, tag and digest."""
        path = self._path(name)
        with self._errors():
            try:
                found = self._files.info(path)
            except FileNotFoundError:
                return None
            if found.get("type") == "directory":
                return None
            known = [str(found[key]) for key in _KNOWN_BY if found.get(key)]
            tag = known[0].strip('"') if known else ""
            return Remote(name, found.get("size"), tag, self._digest(path, tag))

    def read(self, remote: Remote, start: int) -> Generator[bytes, None, None]:
        """The file's bytes from `start` on, of which each chunk is a request of its own."""
        path, end = self._path(remote.name), remote.nbytes
        while end is None or start < end:
            with self._errors(ended=True):
                stop = start + _CHUNK if end is None else min(start + _CHUNK, end)
                chunk = self._files.cat_file(path, start=start, end=stop)
            if not chunk:
                return
            yield chunk
            start += len(chunk)

    def _path(self, name: str) -> str:
        return str(self._files._strip_protocol(f"{self._root}/{name}" if name else self._root))

    def _digest(self, path: str, tag: str) -> tuple[str, bytes] | None:
        """The digest that S3 keeps of an object: a SHA-256, or the MD5 in the ETag if it was uploaded in one piece."""
        if self._scheme != "s3":
            return None
        bucket, key, _ = self._files.split_path(path)
        head = self._files.call_s3("head_object", Bucket=bucket, Key=key, ChecksumMode="ENABLED")
        with contextlib.suppress(ValueError):
            if len(digest := base64.b64decode(head.get("ChecksumSHA256", ""), validate=True)) == 32:
                return "sha256", digest
        is_md5 = _MD5.fullmatch(tag) and head.get("ServerSideEncryption", "AES256") == "AES256"
        return ("md5", bytes.fromhex(tag)) if is_md5 and "SSECustomerAlgorithm" not in head else None

    @contextlib.contextmanager
    def _errors(self, *, ended: bool = False) -> Iterator[None]:
        """Turn a driver's errors into ours, without their texts, which may hold URLs and keys."""
        try:
            yield
        except FileNotFoundError:
            raise SourceError("it was removed while it was read; try again") from None
        except PermissionError:
            raise SourceError(f"access to it is denied; {self._credentials()}") from None
        except Exception as error:  # noqa: BLE001  a driver may raise anything
            what = type(error).__name__
            if "Credential" in what or "Token" in what:
                raise SourceError(f"there are no credentials for it ({what}); {self._credentials()}") from None
            if ended:
                raise TransferEnded(what) from None
            raise SourceError(f"cannot reach it ({what}); look at the address and the network") from None

    def _credentials(self) -> str:
        if self._scheme == "s3":
            return "set AWS_PROFILE, or AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY, to those of a user who may read it"
        return f"give the driver of {self._scheme}:// the credentials that it documents"


def _file_system(scheme: str) -> Any:
    if scheme == "s3":
        extras.require("s3")
    if importlib.util.find_spec("fsspec") is None:
        raise MissingExtra(f"{scheme}:// needs fsspec and its driver for {scheme}://; install both with pip")
    import fsspec
    from fsspec.registry import known_implementations

    if scheme not in fsspec.available_protocols() or scheme in _NO_STORES:
        raise SourceError(f"there is no source {scheme}://; give a directory, an archive, hf://, s3:// or https://")
    try:
        return fsspec.filesystem(scheme, skip_instance_cache=True, use_listings_cache=False, **_OPTIONS.get(scheme, {}))
    except ImportError:
        advice = known_implementations.get(scheme, {}).get("err", "install the driver that fsspec's docs name")
        raise MissingExtra(f"{scheme}:// needs a driver of fsspec: {advice}") from None
