# SPDX-FileCopyrightText: the tritonlora authors
# SPDX-License-Identifier: Apache-2.0
"""location.py and policy.py: what a source is called, which one is allowed, and that no secret is in its name."""

from __future__ import annotations

from pathlib import Path

import platformdirs
import pytest

from tritonlora.errors import SourceError
from tritonlora.sources import policy as policies
from tritonlora.sources.location import parse_location
from tritonlora.sources.policy import Policy, policy


@pytest.mark.parametrize(
    ("text", "location"),
    [
        ("hf://org/name", "hf://org/name"),
        ("HF://org/name/", "hf://org/name"),
        ("hf://org/name@v1.0/checkpoint-100", "hf://org/name@v1.0/checkpoint-100"),
        ("hf://org/name@refs/pr/7/a/b", "hf://org/name@refs/pr/7/a/b"),
        ("hf://org/name@refs%2Fpr%2F7", "hf://org/name@refs/pr/7"),
        ("https://Example.com:443/a/b.zip?X-Amz-Signature=secret#x", "https://example.com/a/b.zip"),
        ("https://user:secret@example.com:8443/a/", "https://example.com:8443/a"),
        ("http://[::1]:80/a", "http://[::1]/a"),
        ("s3://Bucket/a/b/", "s3://Bucket/a/b"),
        ("s3://key:secret@bucket/a?versionId=1", "s3://bucket/a"),
        ("file:///a%20b/c", "/a b/c"),
        ("/a/b.zip", "/a/b.zip"),
    ],
)
def test_a_location_is_written_in_one_way_and_without_secrets(text: str, location: str) -> None:
    """A user, a password and a query go to the transport alone; they are not even in the repr."""
    found = parse_location(text)

    assert location == found.text
    assert "secret" not in repr(found)
    assert parse_location(location).text == location


def test_a_hub_location_is_taken_apart() -> None:
    """A revision may have slashes; the rest is the folder."""
    found = parse_location("hf://org/name@refs/pr/7/a/b")

    assert ("hf", "org/name", "refs/pr/7", "a/b") == (found.scheme, found.repository, found.revision, found.folder)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "the source is empty"),
        ("hf://name", "names no repository of the hub; give hf://ORG/NAME"),
        ("hf://org/name@", "names no repository"),
        ("hf://org/na--me", "names no repository"),
        ("hf://org/name/../other", "an empty, '.' or '..' part"),
        ("hf://org/name//x", "an empty, '.' or '..' part"),
        ("hf://org/name@a..b", "an empty, '.' or '..' part"),
        ("https:///a", "has no host"),
        ("https://good/a/../b?token=secret", "'https://good/a/../b' has no host, or a '.' or '..' in its path"),
        ("https://user:secret@good/%2e%2e/b", "'https://good/%2e%2e/b' has no host, or a '.'"),
        ("https://u:secret@good:port/a", "'https://good:port/a' is not a URL"),
        ("https://good/a b", "has a space or a control character"),
        ("https://good/a\nb", "has a space or a control character"),
        ("simplecache::s3://bucket/a", "chains several file systems"),
    ],
)
def test_what_is_no_location_is_refused_without_its_secrets(text: str, message: str) -> None:
    """A dot segment would let a URL leave the beginning that is allowed."""
    with pytest.raises(SourceError, match=message) as raised:
        parse_location(text)

    assert "secret" not in str(raised.value)


@pytest.mark.parametrize(
    ("allowed", "text", "is_allowed"),
    [
        (["hf://org"], "hf://org/name", True),
        (["hf://org/"], "hf://org/name@v1/x", True),
        (["hf://org/name"], "hf://org/name@v1/x", True),
        (["hf://org/name@v1"], "hf://org/name@v1", True),
        (["hf://org/name@v1"], "hf://org/name", False),
        (["hf://org"], "hf://organisation/name", False),
        (["hf://org/na"], "hf://org/name", False),
        (["https://good"], "https://good.evil.example/a", False),
        (["https://good"], "https://good@evil.example/a", False),
        (["https://good/a"], "https://good/ab", False),
        (["s3://b/x", "hf://org"], "s3://b/x/y", True),
        ([""], "hf://org/name", False),
        (["/"], "hf://org/name", False),
        (["hf://org"], "/a/directory", True),
        (["http://plain.example"], "http://plain.example/a", True),
        ([], "http://plain.example/a", False),
        ([], "http://127.evil.example/a", False),
        ([], "http://127.0.0.1:8000/a", True),
        ([], "https://anywhere.example/a", True),
    ],
)
def test_allowed_sources_begin_so(allowed: list[str], text: str, is_allowed: bool) -> None:
    """At a boundary of names. Plain http has to be named, but for this machine's own servers."""
    found = policy(allowed=allowed) if allowed else Policy()
    if is_allowed:
        found.check(parse_location(text))
    else:
        with pytest.raises(SourceError, match="--allow-source"):
            found.check(parse_location(text))


def test_config_files_restrict_what_options_allow(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """All of them have to allow a source."""
    for name in ("site", "user"):
        (tmp_path / name).mkdir()
        monkeypatch.setattr(platformdirs, f"{name}_config_path", lambda _, name=name: tmp_path / name)
    (tmp_path / "site" / "config.yaml").write_text("allow_sources: [hf://org, s3://bucket]\n")
    (tmp_path / "user" / "config.yaml").write_text("offline: true\n")
    named = tmp_path / "named.yaml"
    named.write_text("allow_sources:\n- hf://org/name\n")
    monkeypatch.delenv("HF_HUB_OFFLINE", raising=False)

    assert policy().offline
    policy(allowed=["hf://org/other"]).check(parse_location("hf://org/other"))
    with pytest.raises(
        SourceError, match=r"allow_sources in .*site/config.yaml allows; allowed: hf://org, s3://bucket"
    ):
        policy(allowed=["hf://evil"]).check(parse_location("hf://evil/name"))
    monkeypatch.setenv(policies.CONFIG_VARIABLE, str(named))
    with pytest.raises(SourceError, match=r"allow_sources in .*named.yaml allows; allowed: hf://org/name"):
        policy(allowed=["hf://org"]).check(parse_location("hf://org/other"))


@pytest.mark.parametrize(
    "text", ["allow_sources: hf://org", "allow_sources: [1]", "allowed: []", "[]", "offline: 1", "{", "a: &a [*a]"]
)
def test_a_config_file_that_is_not_understood_allows_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, text: str
) -> None:
    """A misspelt key must not let everything through."""
    (tmp_path / "config.yaml").write_text(text)
    monkeypatch.setenv(policies.CONFIG_VARIABLE, str(tmp_path / "config.yaml"))

    with pytest.raises(SourceError, match=r"config.yaml: (expected allow_sources|it is not YAML)"):
        policy()


@pytest.mark.parametrize(("value", "offline"), [("1", True), ("true", True), ("0", False), ("", False)])
def test_the_hub_s_own_variable_counts(monkeypatch: pytest.MonkeyPatch, value: str, offline: bool) -> None:
    """For all sources."""
    monkeypatch.setenv("HF_HUB_OFFLINE", value)

    assert offline is policy().offline
