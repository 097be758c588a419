# SPDX-FileCopyrightText: the tritonlora authors
# SPDX-License-Identifier: Apache-2.0
"""Read a source that a user gives, into a location that can be compared, stored and printed.

Rules: a location never holds a user, a password or a query string. A path in it has no "." or ".." segment, so that the
beginning of a location tells where the content is.
"""

from __future__ import annotations

import re
from dataclasses import dataclass, field
from pathlib import Path
from urllib.parse import quote, unquote, urlsplit, urlunsplit

from tritonlora.errors import SourceError

ARCHIVES = (".zip", ".tar", ".tar.gz", ".tgz", ".tar.bz2", ".tar.xz")
HUB = "hf"
WEB = ("https", "http")
_SCHEME = re.compile(r"(?P<scheme>[A-Za-z][A-Za-z0-9+.-]*)://(?P<rest>.*)", re.DOTALL)
_PART = r"[A-Za-z0-9](?:[\w.-]{0,94}[A-Za-z0-9])?"  # of a repository's name, as huggingface_hub's validate_repo_id
HUB_NAME = re.compile(rf"(?!.*(?:--|\.\.)){_PART}/{_PART}", re.ASCII)
_HUB_FORM = "hf://ORG/NAME, hf://ORG/NAME@REVISION or hf://ORG/NAME/FOLDER"


@dataclass(frozen=True, slots=True)
class Location:
    """Where an adapter is."""

    scheme: str  # "" for a path on this machine; "hf", "https", "s3", …
    text: str  # as the table keeps it, and as messages say it
    address: str = field(repr=False)  # for the transport; it may hold credentials, and is never stored or printed
    repository: str = ""  # hf: ORG/NAME
    revision: str = ""  # hf: a branch, a tag or a commit; "": the main branch
    folder: str = ""  # hf: the folder in the repository, without slashes at its ends

    @property
    def is_archive(self) -> bool:
        """Whether the location is that of an archive, by its name."""
        return self.text.lower().endswith(ARCHIVES)


def parse_location(text: str) -> Location:
    """The location of a source: "adapters/pirate", "pirate.zip", "hf://org/name@rev/folder", "https://…", "s3://…".

    SourceError when it is none.
    """
    match = _SCHEME.fullmatch(text)
    if re.match(r"[A-Za-z0-9+.-]+::", text):
        raise SourceError(f"{_public(text)!r} chains several file systems; give one source")
    if match is None:
        if not text or "\0" in text:
            raise SourceError("the source is empty; give a directory, an archive, hf://ORG/NAME, s3://… or https://…")
        return Location("", str(Path(text).absolute()), text)
    scheme, rest = match["scheme"].lower(), match["rest"]
    if scheme == "file":
        return parse_location(unquote(urlsplit(text).path))
    if any(ord(letter) < 33 or ord(letter) == 127 for letter in text):
        raise SourceError(f"{_public(text)!r} has a space or a control character in it; write it as %20, for example")
    return _hub_location(rest) if scheme == HUB else _url_location(scheme, text)


def _hub_location(rest: str) -> Location:
    words = rest.strip("/").split("/")
    name, _, revision = words[1].partition("@") if len(words) > 1 else ("", "", "")
    folders = words[2:]
    if revision == "refs" and len(folders) > 1:  # refs/pr/1 and refs/convert/parquet are revisions with slashes
        revision, folders = "/".join([revision, *folders[:2]]), folders[2:]
    repository, folder, revision = f"{words[0]}/{name}", "/".join(folders), unquote(revision)
    if not HUB_NAME.fullmatch(repository) or words[1].endswith("@"):
        raise SourceError(f"'hf://{rest}' names no repository of the hub; give {_HUB_FORM}")
    if {"", ".", ".."} & {*folders} or ".." in revision or "\\" in rest:
        raise SourceError(f"'hf://{rest}' has an empty, '.' or '..' part; give {_HUB_FORM}")
    text = f"hf://{repository}{'@' if revision else ''}{quote(revision, safe='/')}{'/' if folder else ''}{folder}"
    return Location(HUB, text, text, repository, revision, folder)


def _url_location(scheme: str, text: str) -> Location:
    try:
        parts = urlsplit(text)
        host, port = (parts.hostname or ""), parts.port
    except ValueError as error:
        raise SourceError(f"{_public(text)!r} is not a URL: {error}") from None
    path = parts.path.rstrip("/") if parts.path != "/" else ""
    if not host or {".", ".."} & {unquote(part) for part in path.split("/")} or "\\" in unquote(path):
        raise SourceError(f"{_public(text)!r} has no host, or a '.' or '..' in its path; give the whole URL")
    if scheme not in WEB:  # a bucket's name keeps its letters
        host = parts.netloc.rpartition("@")[2]
        port = None
    if (scheme, port) in (("https", 443), ("http", 80)):
        port = None
    place = f"[{host}]" if ":" in host else host
    public = urlunsplit((scheme, f"{place}:{port}" if port else place, path, "", ""))
    return Location(scheme, public, urlunsplit((scheme, parts.netloc, path, parts.query, "")))


def _public(text: str) -> str:
    """A malformed URL without what may be secret in it: a user and a password, a query and a fragment."""
    head = re.split(r"[?#]", text, maxsplit=1)[0]
    scheme, separator, rest = head.partition("://")
    place, slash, path = rest.partition("/")
    return f"{scheme}{separator}{place.rpartition('@')[2]}{slash}{path}"[:200]
