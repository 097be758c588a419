# SPDX-FileCopyrightText: the tritonlora authors
# SPDX-License-Identifier: Apache-2.0
"""archive.py: an adapter in an archive is the same adapter, and nothing else in the archive has any effect."""

from __future__ import annotations

import io
import json
import shutil
import stat
import tarfile
import zipfile
from collections.abc import Callable
from pathlib import Path

import pytest

from repositories import synthetic_adapter
from tritonlora.errors import SourceError
from tritonlora.peft.adapter import load_adapter
from tritonlora.sources import archive, download
from tritonlora.sources.fetch import fetched, pinned


@pytest.fixture(scope="module")
def adapter(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An adapter's directory, with a page beside its files."""
    directory = synthetic_adapter(tmp_path_factory.mktemp("archive") / "pirate")
    (directory / "README.md").write_text("a page")
    (directory / "tokenizer_config.json").write_text('{"chat_template": "{{ messages }}"}')
    return directory


@pytest.fixture(autouse=True)
def _cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(download.CACHE_VARIABLE, str(tmp_path / "cache"))


def names_in(directory: Path) -> list[str]:
    """The files and directories in a directory."""
    return sorted(path.name for path in directory.iterdir())


@pytest.mark.parametrize("kind", ["zip", "tar", "gztar", "bztar", "xztar"])
@pytest.mark.parametrize("with_directory", [False, True])
def test_an_archive_of_an_adapter_is_that_adapter(
    adapter: Path, tmp_path: Path, kind: str, with_directory: bool
) -> None:
    """With the same SHA-256, whatever the archive is, and only the files that are needed are unpacked."""
    root, base = (adapter.parent, adapter.name) if with_directory else (adapter, None)
    path = Path(shutil.make_archive(str(tmp_path / "pirate"), kind, root, base))
    with fetched(str(path)) as found:
        needed = ["adapter_config.json", "adapter_model.safetensors", "tokenizer_config.json"]
        assert needed == names_in(found.directory)
        assert load_adapter(adapter).modules.keys() == load_adapter(found.directory).modules.keys()
        unpacked = found.directory

    assert (str(path), pinned(adapter).source.sha256) == (found.source.location, found.source.sha256)
    assert not unpacked.exists()


def test_a_directory_whose_name_ends_as_an_archive_s_is_a_directory(adapter: Path, tmp_path: Path) -> None:
    """The name alone says nothing of a path."""
    shutil.copytree(adapter, tmp_path / "pirate.zip")
    with fetched(str(tmp_path / "pirate.zip")) as found:
        assert tmp_path / "pirate.zip" == found.directory


def zipped(path: Path, members: dict[str, bytes | int | zipfile.ZipInfo]) -> Path:
    """A zip. A number is a member of so many zeros; a ZipInfo a member without content."""
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as file:
        for name, content in members.items():
            if isinstance(content, zipfile.ZipInfo):
                file.writestr(content, "/etc/passwd")
            else:
                file.writestr(name, bytes(content) if isinstance(content, int) else content)
    return path


def tarred(path: Path, members: dict[str, bytes | tarfile.TarInfo], mode: str = "w") -> Path:
    """A tar."""
    with tarfile.open(path, mode) as file:  # type: ignore[call-overload]
        for name, content in members.items():
            info = content if isinstance(content, tarfile.TarInfo) else tarfile.TarInfo(name)
            if isinstance(content, bytes):
                info.size = len(content)
            file.addfile(info, io.BytesIO(content) if isinstance(content, bytes) else None)
    return path


def link(kind: bytes = tarfile.SYMTYPE, name: str = "adapter_model.safetensors") -> tarfile.TarInfo:
    """A link in a tar, out of it."""
    info = tarfile.TarInfo(name)
    info.type, info.linkname = kind, "/etc/passwd"
    return info


def zip_link() -> zipfile.ZipInfo:
    """A link in a zip, out of it."""
    info = zipfile.ZipInfo("adapter_model.safetensors")
    info.external_attr = (stat.S_IFLNK | 0o777) << 16
    return info


CONFIG = b'{"peft_type": "LORA"}'
INDEX = json.dumps({"weight_map": {"a": "../../escape.safetensors"}}).encode()


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda path: zipped(path, {"../x": b"", "adapter_config.json": CONFIG}), r"'\.\./x' leads out of it"),
        (lambda path: tarred(path, {"a/../../x": b"", "/etc/x": b""}), r"'a/\.\./\.\./x' leads out of it and 1 more"),
        (lambda path: tarred(path, {"/etc/cron.d/x": b""}), "'/etc/cron.d/x' leads out of it"),
        (lambda path: zipped(path, {"..\\x": b""}), "leads out of it"),
        (lambda path: tarred(path, {"adapter_config.json": CONFIG, "m": link()}), "safetensors' is a link or a device"),
        (lambda path: tarred(path, {"m": link(tarfile.LNKTYPE)}), "is a link or a device"),
        (lambda path: tarred(path, {"m": link(tarfile.CHRTYPE)}), "is a link or a device"),
        (lambda path: tarred(path, {"m": link(tarfile.FIFOTYPE, "README")}), "'README' is a link or a device"),
        (lambda path: zipped(path, {"m": zip_link()}), "is a link or a device"),
        (lambda path: tarred(path, {"a": b"1", "./a": b"2"}), r"'\./a' is in it twice"),
        (lambda path: zipped(path, {"README.md": b""}), "it holds no adapter_config.json; make it of the directory"),
        (
            lambda path: zipped(path, {"a/adapter_config.json": CONFIG, "b/adapter_config.json": CONFIG}),
            "several .*: a, b",
        ),
        (
            lambda path: zipped(path, {"adapter_config.json": CONFIG, "adapter_model.safetensors.index.json": INDEX}),
            r"names '\.\./\.\./escape.safetensors', which is no file beside it",
        ),
        (
            lambda path: tarred(
                path,
                {
                    "adapter_config.json": CONFIG,
                    "adapter_model.bin.index.json": b'{"weight_map": {"a": "one.bin"}}',
                },
            ),
            "it lacks 'one.bin'; make it again of the whole adapter",
        ),
        (lambda path: zipped(path, {"zeros": 3 << 20}), "unpacks to more than 1048576 bytes or 100 files"),
        (lambda path: tarred(path, {"zeros": bytes(3 << 20)}, "w:gz"), "unpacks to more than 1048576 bytes"),
        (lambda path: tarred(path, {str(one): b"" for one in range(101)}), "or 100 files, which no adapter needs"),
        (lambda path: path.write_bytes(b"PK\x03\x04 and no more"), "is broken; fetch or make it again"),
        (lambda path: path.write_bytes(b"\x1f\x8b nothing"), "is broken"),
        (lambda path: path.write_bytes(b""), "is broken"),
    ],
)
def test_a_hostile_archive_is_refused_as_a_whole(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, make: Callable[[Path], object], message: str
) -> None:
    """Nothing of it is left on disk."""
    monkeypatch.setattr(archive, "ALWAYS_ALLOWED_NBYTES", 1 << 20)
    monkeypatch.setattr(archive, "MOST_MEMBERS", 100)
    path = tmp_path / "hostile.zip"
    make(path)

    with pytest.raises(SourceError, match=rf"hostile.zip: .*{message}"), fetched(str(path)):
        pass
    assert [] == [one for one in (tmp_path / "cache").rglob("*") if one.is_file()]
    assert ["cache", "hostile.zip"] == names_in(tmp_path)


@pytest.mark.parametrize("suffix", [".zip", ".tar.gz", ".tar.xz"])
def test_a_corrupted_or_cut_archive_is_refused(adapter: Path, tmp_path: Path, suffix: str) -> None:
    """By the archive's own checksums; a password is no corruption."""
    kind = {".zip": "zip", ".tar.gz": "gztar", ".tar.xz": "xztar"}[suffix]
    whole = Path(shutil.make_archive(str(tmp_path / "pirate"), kind, adapter)).read_bytes()
    corrupt = bytearray(whole)
    corrupt[len(whole) // 2] ^= 0xFF
    for content in (bytes(corrupt), whole[: len(whole) // 2]):
        (tmp_path / f"bad{suffix}").write_bytes(content)

        message = f"the archive 'bad{suffix}' is broken"
        with pytest.raises(SourceError, match=message), fetched(str(tmp_path / f"bad{suffix}")):
            pass


def test_an_encrypted_zip_is_refused(tmp_path: Path) -> None:
    """As what it is."""
    path = zipped(tmp_path / "secret.zip", {"adapter_config.json": CONFIG, "adapter_model.safetensors": b"x"})
    content = bytearray(path.read_bytes())
    for mark, offset in ((b"PK\x03\x04", 6), (b"PK\x01\x02", 8)):  # the flag of encryption, in each header
        start = -1
        while (start := content.find(mark, start + 1)) >= 0:
            content[start + offset] |= 1
    path.write_bytes(content)

    with pytest.raises(SourceError, match="is encrypted; give one without a password"), fetched(str(path)):
        pass


def test_what_a_killed_command_unpacked_is_swept(adapter: Path, tmp_path: Path) -> None:
    """By the next one that unpacks."""
    left = download.cache_directory() / "unpacked" / ".adapter.01234567.tritonlora-tmp"
    left.mkdir(parents=True)
    with fetched(shutil.make_archive(str(tmp_path / "pirate"), "zip", adapter)):
        assert not left.exists()
