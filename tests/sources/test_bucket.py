# SPDX-FileCopyrightText: the tritonlora authors
# SPDX-License-Identifier: Apache-2.0
"""s3://: s3fs against moto's server, in a process of its own; other schemes by their drivers."""

from __future__ import annotations

import hashlib
import shutil
import subprocess
import sys
import time
import urllib.request
from collections.abc import Callable, Generator, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import boto3
import fsspec
import pytest

from repositories import synthetic_adapter
from tritonlora.errors import MissingExtra, SourceError
from tritonlora.machine import free_ports
from tritonlora.sources import bucket, download
from tritonlora.sources.fetch import fetched, pinned, resolved
from tritonlora.sources.location import parse_location
from tritonlora.sources.policy import Policy

WEIGHTS = "adapter_model.safetensors"
FILES = ("adapter_config.json", WEIGHTS)
KEYS = {"AWS_ACCESS_KEY_ID": "key", "AWS_SECRET_ACCESS_KEY": "sesame", "AWS_DEFAULT_REGION": "us-east-1"}


@pytest.fixture(scope="module")
def endpoint() -> Iterator[str]:
    """The URL of moto's server."""
    port = free_ports().http
    with subprocess.Popen(
        [sys.executable, "-m", "moto.server", "-H", "127.0.0.1", "-p", str(port)],
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    ) as server:
        try:
            wait_for(f"http://127.0.0.1:{port}/moto-api/", server)
            yield f"http://127.0.0.1:{port}"
        finally:
            server.terminate()


def wait_for(url: str, server: subprocess.Popen[bytes]) -> None:
    """Wait until the server answers. AssertionError when it has ended."""
    while True:
        assert server.poll() is None
        try:
            with urllib.request.urlopen(url, timeout=5):  # noqa: S310
                return
        except OSError:
            time.sleep(0.05)


@pytest.fixture
def s3(endpoint: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    """A client, with an adapter in s3://models/pirate, and its directory in `adapter`."""
    for name, value in KEYS.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setenv("AWS_ENDPOINT_URL", endpoint)
    monkeypatch.setenv(download.CACHE_VARIABLE, str(tmp_path / "cache"))
    monkeypatch.setattr(download, "PAUSE_SECONDS", 0.0)
    client = boto3.client("s3", endpoint_url=endpoint)
    client.create_bucket(Bucket="models")
    upload(client, tmp_path / "adapter", 1)
    return client


def upload(client: Any, directory: Path, seed: int, prefix: str = "pirate") -> Path:
    """Put an adapter into the bucket."""
    synthetic_adapter(directory, seed)
    for name in FILES:
        client.put_object(Bucket="models", Key=f"{prefix}/{name}", Body=(directory / name).read_bytes())
    client.put_object(Bucket="models", Key=f"{prefix}/optimizer.pt", Body=b"not needed")
    return directory


def enter(*arguments: Any, **options: Any) -> None:
    """Fetch an adapter, and do nothing with it."""
    with fetched(*arguments, **options):
        pass


def test_an_adapter_comes_from_a_bucket(s3: Any, tmp_path: Path) -> None:
    """With the revision of its ETags; a changed object is another revision, and offline nothing is asked."""
    whole, seen = pinned(tmp_path / "adapter").source.sha256, dict[str, int]()
    with fetched("s3://models/pirate", on_progress=lambda file, done, _: seen.update({file: done})) as first:
        assert (whole, "s3://models/pirate") == (first.source.sha256, first.source.location)
    assert {name: (tmp_path / "adapter" / name).stat().st_size for name in FILES} == seen
    assert ("s3://models/pirate", first.source.revision) == resolved("s3://models/pirate")
    other = upload(s3, tmp_path / "other", 2)
    with fetched("s3://models/pirate") as second:
        assert pinned(other).source.sha256 == second.source.sha256
        assert first.source.revision != second.source.revision
    s3.delete_object(Bucket="models", Key=f"pirate/{WEIGHTS}")
    with fetched("s3://models/pirate", Policy(offline=True)) as offline:
        assert second.source == offline.source


def test_an_archive_comes_from_a_bucket(s3: Any, tmp_path: Path) -> None:
    """Its revision is its ETag, which is the MD5 of an object that came in one piece."""
    path = Path(shutil.make_archive(str(tmp_path / "pirate"), "gztar", tmp_path / "adapter"))
    s3.put_object(Bucket="models", Key="pirate.tar.gz", Body=path.read_bytes())
    with fetched("s3://models/pirate.tar.gz") as found:
        assert pinned(tmp_path / "adapter").source.sha256 == found.source.sha256
        assert hashlib.md5(path.read_bytes(), usedforsecurity=False).hexdigest() == found.source.revision


@pytest.mark.parametrize("with_checksum", [False, True])
def test_a_corrupted_object_is_found_by_the_digest_that_s3_keeps(
    s3: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, with_checksum: bool
) -> None:
    """Its SHA-256, or else the MD5 in its ETag."""
    if with_checksum:
        content = (tmp_path / "adapter" / WEIGHTS).read_bytes()
        s3.put_object(Bucket="models", Key=f"pirate/{WEIGHTS}", Body=content, ChecksumAlgorithm="SHA256")
    read = bucket.BucketStore.read

    def corrupted(self: bucket.BucketStore, remote: download.Remote, start: int) -> Generator[bytes, None, None]:
        for chunk in read(self, remote, start):
            yield bytes([chunk[0] ^ 1]) + chunk[1:]

    monkeypatch.setattr(bucket.BucketStore, "read", corrupted)
    algorithm = "sha256" if with_checksum else "md5"
    monkeypatch.setattr(bucket.BucketStore, "look", only(WEIGHTS, bucket.BucketStore.look))
    with pytest.raises(SourceError, match=f"{WEIGHTS} came with the {algorithm} .*, expected .*, as its source says"):
        enter("s3://models/pirate")


def only(name: str, look: Callable[..., download.Remote | None]) -> Callable[..., download.Remote | None]:
    """`look`, which tells the digest of one file alone."""

    def found(self: bucket.BucketStore, file: str) -> download.Remote | None:
        remote = look(self, file)
        return remote if remote is None or file == name else replace(remote, digest=None)

    return found


def test_an_interrupted_transfer_goes_on(s3: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """From the byte where it ended."""
    monkeypatch.setattr(bucket, "_CHUNK", 1000)
    asked: list[tuple[str, int]] = []
    read = bucket.BucketStore.read

    def interrupted(self: bucket.BucketStore, remote: download.Remote, start: int) -> Generator[bytes, None, None]:
        asked.append((remote.name, start))
        yield next(iter(read(self, remote, start)))
        raise download.TransferEnded("ended")

    monkeypatch.setattr(bucket.BucketStore, "read", interrupted)
    with fetched("s3://models/pirate") as found:
        assert pinned(tmp_path / "adapter").source.sha256 == found.source.sha256
    nbytes = (tmp_path / "adapter" / WEIGHTS).stat().st_size
    assert [(WEIGHTS, start) for start in range(0, nbytes, 1000)] == [one for one in asked if one[0] == WEIGHTS]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("s3://models/nowhere", "there is no adapter_config.json in it"),
        ("s3://models/nowhere.zip", "it does not exist; look for a misspelling"),
        ("s3://nobucket/pirate", "there is no adapter_config.json in it"),
    ],
)
def test_what_is_not_there_is_named(s3: Any, text: str, message: str) -> None:
    """A bucket, too."""
    with pytest.raises(SourceError, match=f"^{text}: {message}"):
        enter(text)


def test_credentials_are_missed_and_never_said(s3: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """By their names."""
    for name in KEYS:
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("AWS_CONFIG_FILE", str(tmp_path / "none"))
    monkeypatch.setenv("AWS_SHARED_CREDENTIALS_FILE", str(tmp_path / "none"))
    monkeypatch.setenv("AWS_EC2_METADATA_DISABLED", "true")
    with pytest.raises(SourceError, match="s3://models/pirate: there are no credentials for it .*; set AWS_PROFILE"):
        enter("s3://models/pirate")


def test_a_store_that_is_not_there_is_named(s3: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """Without the driver's own text."""
    monkeypatch.setenv("AWS_ENDPOINT_URL", "http://127.0.0.1:1")
    with pytest.raises(SourceError, match=r"s3://models/pirate: cannot reach it \(\w+\); look at the address"):
        enter("s3://models/pirate")


@pytest.mark.parametrize(
    ("text", "error", "message"),
    [
        ("memory://a/b", SourceError, "there is no source memory://"),
        ("nothing://a/b", SourceError, "there is no source nothing://; give a directory"),
        ("gs://bucket/a", MissingExtra, "gs:// needs a driver of fsspec: .*gcsfs"),
    ],
)
def test_other_schemes_need_a_driver(tmp_path: Path, text: str, error: type[Exception], message: str) -> None:
    """And places on this machine are no sources."""
    with pytest.raises(error, match=message):
        enter(text)


def test_another_scheme_goes_by_its_driver(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of fsspec's own drivers, the one for memory stands for such a driver."""
    monkeypatch.setenv(download.CACHE_VARIABLE, str(tmp_path / "cache"))
    monkeypatch.setattr(bucket, "_NO_STORES", frozenset())
    files = fsspec.filesystem("memory")
    for name in FILES:
        files.pipe_file(f"/models/pirate/{name}", (synthetic_adapter(tmp_path / "adapter") / name).read_bytes())
    with fetched("memory://models/pirate") as found:
        assert pinned(tmp_path / "adapter").source.sha256 == found.source.sha256
    assert "memory://models/pirate" == parse_location("memory://models/pirate").text
