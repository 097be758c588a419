# SPDX-FileCopyrightText: the tritonlora authors
# SPDX-License-Identifier: Apache-2.0
"""https: against a web server in a process of its own, which is interrupted, slow, lying, changing and hostile."""

from __future__ import annotations

import base64
import hashlib
import shutil
from collections.abc import Generator, Iterator
from pathlib import Path
from typing import Any

import pytest

from repositories import synthetic_adapter
from source_server import SourceServer, running
from tritonlora.errors import InvalidAdapter, SourceError
from tritonlora.peft.adapter import load_adapter
from tritonlora.sources import adapter_files, download, web
from tritonlora.sources.fetch import fetched, pinned, resolved
from tritonlora.sources.location import parse_location
from tritonlora.sources.policy import Policy

WEIGHTS = "adapter_model.safetensors"


@pytest.fixture(scope="module")
def served(tmp_path_factory: pytest.TempPathFactory) -> Iterator[SourceServer]:
    """A server."""
    with running(tmp_path_factory.mktemp("web")) as server:
        yield server


@pytest.fixture
def server(served: SourceServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> SourceServer:
    """The server, with one adapter at /web/pirate, and its archive; with a new cache and without patience."""
    monkeypatch.setenv(download.CACHE_VARIABLE, str(tmp_path / "cache"))
    monkeypatch.setattr(download, "PAUSE_SECONDS", 0.0)
    monkeypatch.setattr(web, "TIMEOUT_SECONDS", 1.0)
    shutil.rmtree(served.root / "web", ignore_errors=True)
    adapter = synthetic_adapter(served.root / "web" / "pirate", 1)
    shutil.make_archive(str(served.root / "web" / "pirate"), "zip", adapter)
    served.fault()
    served.requests()
    return served


def enter(*arguments: Any, **options: Any) -> None:
    """Fetch an adapter, and do nothing with it."""
    with fetched(*arguments, **options):
        pass


def files_left(tmp_path: Path) -> list[str]:
    """What is in the cache, but for the lock and the note of what is current."""
    left = (path for path in (tmp_path / "cache").rglob("*") if path.is_file())
    return sorted(path.name for path in left if path.name not in (".lock", "current.json"))


@pytest.mark.parametrize("name", ["pirate", "pirate/", "pirate.zip"])
def test_an_adapter_comes_from_a_directory_or_an_archive(server: SourceServer, name: str) -> None:
    """The same as from the disk. A second time nothing is sent, and offline nothing is asked."""
    url, whole = f"{server.url}/web/{name}", pinned(server.root / "web" / "pirate")
    seen: dict[str, int] = {}
    with fetched(f"{url}?token=secret", on_progress=lambda file, done, _: seen.update({file: done})) as first:
        assert whole.source.sha256 == first.source.sha256
    sizes = [path.stat().st_size for path in (server.root / "web" / "pirate").iterdir()]
    zipped = (server.root / "web" / "pirate.zip").stat().st_size
    assert sorted([zipped] if name.endswith("zip") else sizes) == sorted(seen.values())
    assert {"token=secret"} == {one["query"] for one in server.requests()}
    with fetched(url) as again:
        assert first.source == again.source
    assert {"bytes=0-0"} == {one["Range"] for one in server.requests()}
    assert (url.rstrip("/"), first.source.revision) == resolved(url)
    server.requests()
    with fetched(url, Policy(offline=True)) as offline:
        assert first.source == offline.source
    assert [] == server.requests()


def test_the_revision_of_an_archive_is_its_etag(server: SourceServer) -> None:
    """And another content has another one."""
    url = f"{server.url}/web/pirate.zip"
    content = (server.root / "web" / "pirate.zip").read_bytes()
    with fetched(url) as first:
        assert f'"{hashlib.md5(content, usedforsecurity=False).hexdigest()}"' == first.source.revision
    other = synthetic_adapter(server.root / "other", 2)
    shutil.make_archive(str(server.root / "web" / "pirate"), "zip", other)
    with fetched(url) as second:
        assert first.source.revision != second.source.revision == resolved(url)[1]
        assert pinned(other).source.sha256 == second.source.sha256


def test_an_interrupted_download_goes_on_where_it_ended(server: SourceServer, tmp_path: Path) -> None:
    """Within one command for as long as bytes come, and in the next command after it gave up."""
    nbytes = (server.root / "web" / "pirate" / WEIGHTS).stat().st_size
    server.fault(**{WEIGHTS: {"cut": 1000}})
    with fetched(f"{server.url}/web/pirate") as found:
        assert pinned(server.root / "web" / "pirate").source.sha256 == found.source.sha256
    starts = [one["Range"] for one in server.requests() if WEIGHTS in one["path"] and one["Range"] != "bytes=0-0"]
    assert [None, *(f"bytes={start}-" for start in range(1000, nbytes, 1000))] == starts

    shutil.rmtree(tmp_path / "cache")
    server.fault(**{"adapter_model.safetensors": {"cut": 0}})
    with (
        pytest.raises(
            SourceError, match=rf"did not come whole: .*; 0 of {nbytes} bytes are here, and the same command goes on"
        ),
        fetched(f"{server.url}/web/pirate"),
    ):
        pass
    assert ["adapter_config.json", f"{WEIGHTS}.part"] == files_left(tmp_path)
    server.fault()
    server.requests()
    with fetched(f"{server.url}/web/pirate"):
        assert 1 == len([one for one in server.requests() if one["Range"] != "bytes=0-0"])
    assert ["adapter_config.json", WEIGHTS] == files_left(tmp_path)


def test_a_server_that_ignores_ranges_is_read_from_the_start_again(server: SourceServer) -> None:
    """And what is here already is skipped."""
    server.fault(**{WEIGHTS: {"cut": 3000, "no_range": True, "times": 3}})
    with fetched(f"{server.url}/web/pirate") as found:
        assert pinned(server.root / "web" / "pirate").source.sha256 == found.source.sha256


def test_busy_answers_are_tried_again(server: SourceServer) -> None:
    """503 is not the end."""
    server.fault(**{WEIGHTS: {"status": 503, "times": 1}})
    with fetched(f"{server.url}/web/pirate"):
        pass


@pytest.mark.parametrize(
    ("fault", "message"),
    [
        ({"size": 10}, r"it was changed while it was read, or the server tells different sizes; try again"),
        ({"size": 10**9}, r"it was changed while it was read, or the server tells different sizes; try again"),
        ({"size": 10**12}, r"it has 1000000\d+ bytes, expected at most 68719476736; it is no adapter"),
        ({"hang": 1.5}, r"cannot reach it: nothing came for 1 seconds"),
        ({"status": 403}, r"the server refuses it with status 403; give a user and a password in ~/.netrc"),
        ({"status": 418}, r"the server answers with status 418; look at the address"),
        ({"status": 404}, r"neither adapter_model.safetensors nor adapter_model.bin"),
        ({"redirect": "file:///etc/passwd"}, r"the server answers with status 302; look at the address"),
        ({"redirect": "ftp://example.com/x"}, r"it redirects to ftp://example.com, which is not https"),
    ],
)
def test_a_lying_server_is_found_out(
    server: SourceServer, tmp_path: Path, fault: dict[str, object], message: str
) -> None:
    """The error names the source, without the password in it. Nothing stays that could pass for whole."""
    server.fault(**{WEIGHTS: fault})
    url = f"{server.url}/web/pirate"
    with pytest.raises(SourceError, match=rf"(?s){url}: .*{message}") as raised:
        enter(f"{url.replace('http://', 'http://user:secret@')}?signature=secret")

    assert "secret" not in str(raised.value)
    assert WEIGHTS not in files_left(tmp_path)


@pytest.mark.parametrize("header", ["Repr-Digest", "X-Checksum-Sha256", "x-amz-checksum-sha256"])
def test_a_corrupted_file_is_found_where_the_server_tells_its_digest(
    server: SourceServer, tmp_path: Path, header: str
) -> None:
    """And the whole file is fetched again, rather than the rest of it."""
    digest = hashlib.sha256((server.root / "web" / "pirate" / WEIGHTS).read_bytes())
    coded = base64.b64encode(digest.digest()).decode()
    value = {"Repr-Digest": f"sha-256=:{coded}:", "X-Checksum-Sha256": digest.hexdigest()}.get(header, coded)
    server.fault(**{WEIGHTS: {"corrupt": True, "headers": {header: value}}})
    with pytest.raises(
        SourceError, match=f"came with the sha256 .*, expected {digest.hexdigest()}, as its source says"
    ):
        enter(f"{server.url}/web/pirate")
    assert ["adapter_config.json"] == files_left(tmp_path)
    server.fault(**{WEIGHTS: {"headers": {header: value}}})
    enter(f"{server.url}/web/pirate")


def test_a_corrupted_file_without_a_digest_is_found_by_who_reads_it(server: SourceServer) -> None:
    """The error of the file names the source."""
    server.fault(**{WEIGHTS: {"corrupt": True}})
    with (
        pytest.raises(InvalidAdapter, match=rf"(?s)^{server.url}/web/pirate: .*is broken; fetch or save it again"),
        fetched(f"{server.url}/web/pirate") as found,
    ):
        load_adapter(found.directory)


def test_a_source_that_changes_while_it_is_read_is_refused(server: SourceServer, tmp_path: Path) -> None:
    """Before a file and after one that is here already. The next command takes the new one."""
    url = f"{server.url}/web/pirate"

    def change(file: str, done: int, _: int | None) -> None:
        if (file, done) == moment and file == WEIGHTS:
            config = server.root / "web" / "pirate" / "adapter_config.json"
            config.write_text(config.read_text().replace('"lora_alpha": 16', '"lora_alpha": 32'))
        elif (file, done) == moment:
            synthetic_adapter(server.root / "web" / "pirate", 5, r=4)

    for place in (("adapter_config.json", 0), (WEIGHTS, 1000)):
        moment = place
        synthetic_adapter(server.root / "web" / "pirate", 1)
        server.fault(**{WEIGHTS: {"cut": 1000}})
        with pytest.raises(SourceError, match=f"{url}: it was changed while it was read"):
            enter(url, on_progress=change)
        assert WEIGHTS not in files_left(tmp_path)
    with fetched(url) as found:
        assert pinned(server.root / "web" / "pirate").source.sha256 == found.source.sha256


def test_more_bytes_than_were_promised_are_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Before they fill the disk, where a store does not say again how many come; fewer are waited for, in vain."""

    class Lying:
        def look(self, name: str) -> download.Remote | None:
            return download.Remote(name, 10, "tag")

        def read(self, remote: download.Remote, start: int) -> Generator[bytes, None, None]:
            yield from [bytes(promised)] if not start and remote.tag else []

    monkeypatch.setenv(download.CACHE_VARIABLE, str(tmp_path / "cache"))
    monkeypatch.setattr(download, "PAUSE_SECONDS", 0.0)
    for number, message in (
        (11, "has more bytes than the 10 that were promised"),
        (9, "did not come whole: .* 9 of 10"),
    ):
        promised = number
        with pytest.raises(SourceError, match=message):
            download.download(parse_location("s3://models/pirate"), Lying(), lambda *_: None)
    assert ["adapter_config.json.part"] == files_left(tmp_path)


def test_a_huge_adapter_is_refused_before_it_is_read(server: SourceServer, monkeypatch: pytest.MonkeyPatch) -> None:
    """Or the disk has no room for it."""
    free = shutil.disk_usage("/")._replace(free=1)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: free)
    with pytest.raises(SourceError, match=r"bytes, and .* has 1 free; make room, or set TRITONLORA_CACHE"):
        enter(f"{server.url}/web/pirate")
    monkeypatch.setattr(adapter_files, "MOST_NBYTES", 100)
    with pytest.raises(SourceError, match="bytes, expected at most 100; it is no adapter"):
        enter(f"{server.url}/web/pirate")


def test_a_password_goes_to_its_own_server_alone(
    server: SourceServer, tmp_path_factory: pytest.TempPathFactory
) -> None:
    """Not where a redirect leads."""
    with running(tmp_path_factory.mktemp("elsewhere")) as other:
        shutil.copytree(server.root / "web", other.root / "web")
        server.fault(**{WEIGHTS: {"redirect": f"{other.url}/web/pirate/{WEIGHTS}"}})
        with fetched(f"{server.url}/web/pirate".replace("http://", "http://user:secret@")):
            pass
        said, heard = server.requests(), other.requests()

    assert {"Basic dXNlcjpzZWNyZXQ="} == {one["Authorization"] for one in said}
    assert {None} == {one["Authorization"] for one in heard}


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("nowhere", "there is no adapter_config.json in it; give the directory of a PEFT adapter"),
        ("nowhere.zip", "it does not exist; look for a misspelling"),
    ],
)
def test_a_source_that_is_not_there_is_named(server: SourceServer, tmp_path: Path, name: str, message: str) -> None:
    """Nothing is left of it."""
    with pytest.raises(SourceError, match=rf"{server.url}/web/{name}: {message}"), fetched(f"{server.url}/web/{name}"):
        pass
    assert [] == files_left(tmp_path)


def test_a_server_that_does_not_answer_is_named(server: SourceServer) -> None:
    """Offline, what was never here is missed."""
    with pytest.raises(SourceError, match=r"cannot reach it: Connection refused; look at the address"):
        enter("http://127.0.0.1:1/x")
    with pytest.raises(SourceError, match=r"was not downloaded on this machine before; run .* without --offline"):
        enter(f"{server.url}/web/pirate", Policy(offline=True))
