# SPDX-FileCopyrightText: the tritonlora authors
# SPDX-License-Identifier: Apache-2.0
"""Files of a web server, by ranged GET requests of the standard library.

A server that ignores ranges sends the file from its start, and the bytes that are here already are skipped. Each
response must have the tag of the first one, so that no file is put together of two.
"""

from __future__ import annotations

import base64
import binascii
import contextlib
import http.client
import netrc
import re
import urllib.error
import urllib.request
from collections.abc import Generator
from email.message import Message
from typing import IO, Any
from urllib.parse import quote, unquote, urlsplit, urlunsplit

from tritonlora import __version__
from tritonlora.errors import SourceError
from tritonlora.sources.download import Remote, TransferEnded
from tritonlora.sources.location import Location

TIMEOUT_SECONDS = 30.0
_CHUNK = 1 << 20
_RETRIED = {408, 425, 429, 500, 502, 503, 504}
_TOTAL = re.compile(r"bytes (?:(?P<start>\d+)-\d+|\*)/(?P<total>\d+|\*)")


class WebStore:
    """The files below a URL, or the one file that the URL is."""

    def __init__(self, location: Location) -> None:
        """`location` may have a user and a password, and a query, which is sent with each request."""
        self._parts = urlsplit(location.address)
        self._authorization = _authorization(location.address)
        self._opener = urllib.request.build_opener(_Redirects)

    def look(self, name: str) -> Remote | None:
        """The file's size, tag and digest, by a GET of its first byte: signed URLs often allow no HEAD."""
        for attempt in range(2):
            try:
                with self._get(name, "bytes=0-0") as response:
                    return _described(name, response.status, response.headers)
            except urllib.error.HTTPError as error:
                with error:
                    if error.code in (404, 410):
                        return None
                    if error.code == 416:  # an empty file has no first byte
                        return _described(name, 206, error.headers)
                    if error.code not in _RETRIED or attempt:
                        raise _refused(error.code) from None
            except TransferEnded as error:
                if attempt:
                    raise SourceError(f"cannot reach it: {error}; look at the address and the network") from None
        raise AssertionError("the second attempt returns or raises")

    def read(self, remote: Remote, start: int) -> Generator[bytes, None, None]:
        """The file's bytes from `start` on."""
        try:
            with self._get(remote.name, f"bytes={start}-" if start else None) as response:
                now = _described(remote.name, response.status, response.headers)
                if (now.tag, now.nbytes or remote.nbytes) != (remote.tag, remote.nbytes or now.nbytes):
                    raise SourceError(
                        "it was changed while it was read, or the server tells different sizes; try again"
                    )
                skipped = start if response.status == 200 else 0
                while chunk := self._chunk(response):
                    taken = chunk[skipped:]
                    skipped = max(0, skipped - len(chunk))
                    if taken:
                        yield taken
        except urllib.error.HTTPError as error:
            with error:
                if error.code == 416:
                    raise TransferEnded("the server has no more bytes") from None
                if error.code in _RETRIED:
                    raise TransferEnded(f"the server answered with status {error.code}") from None
                raise _refused(error.code) from None

    def _get(self, name: str, span: str | None) -> Any:
        path = f"{self._parts.path}/{quote(name)}" if name else self._parts.path
        place = self._parts.netloc.rpartition("@")[2]
        request = urllib.request.Request(  # noqa: S310  the scheme is http or https
            urlunsplit((self._parts.scheme, place, path or "/", self._parts.query, ""))
        )
        request.add_header("User-Agent", f"tritonlora/{__version__}")
        request.add_header("Accept-Encoding", "identity")
        if span is not None:
            request.add_header("Range", span)
        if self._authorization is not None:
            request.add_unredirected_header("Authorization", self._authorization)
        try:
            return self._opener.open(request, timeout=TIMEOUT_SECONDS)
        except urllib.error.HTTPError:
            raise
        except (OSError, http.client.HTTPException, ValueError) as error:
            raise TransferEnded(_reason(error)) from None

    @staticmethod
    def _chunk(response: http.client.HTTPResponse) -> bytes:
        try:
            return response.read1(_CHUNK)
        except (OSError, http.client.HTTPException) as error:
            raise TransferEnded(_reason(error)) from None


class _Redirects(urllib.request.HTTPRedirectHandler):
    """Follows redirects, but not to plain http. The password goes only to the host that it is for."""

    def redirect_request(
        self,
        req: urllib.request.Request,
        fp: IO[bytes],
        code: int,
        msg: str,
        headers: http.client.HTTPMessage,
        newurl: str,
    ) -> urllib.request.Request | None:
        """The request for the new place."""
        before, after = urlsplit(req.full_url), urlsplit(newurl)
        if after.scheme != before.scheme and after.scheme != "https":
            fp.close()
            raise SourceError(f"it redirects to {after.scheme}://{after.hostname}, which is not https; give that place")
        request = super().redirect_request(req, fp, code, msg, headers, newurl)
        if request is not None and before.netloc == after.netloc and req.has_header("Authorization"):
            request.add_unredirected_header("Authorization", str(req.get_header("Authorization")))
        return request


def _authorization(address: str) -> str | None:
    """The header for the user and password in the URL, else for those in ~/.netrc, if there are any."""
    parts = urlsplit(address)
    login: tuple[str, str] | None = None
    if parts.username is not None:
        login = unquote(parts.username), unquote(parts.password or "")
    else:
        with contextlib.suppress(OSError, netrc.NetrcParseError):
            found = netrc.netrc().authenticators(parts.hostname or "")
            login = (found[0], found[2] or "") if found else None
    return None if login is None else f"Basic {base64.b64encode(':'.join(login).encode()).decode()}"


def _described(name: str, status: int, headers: Message) -> Remote:
    total = headers.get("Content-Length") if status == 200 else None
    if status == 206 and (match := _TOTAL.fullmatch(headers.get("Content-Range", "").strip())):
        total = match["total"]
    nbytes = int(total) if total is not None and total.isdecimal() else None
    return Remote(name, nbytes, headers.get("ETag") or headers.get("Last-Modified") or "", _digest(headers))


def _digest(headers: Message) -> tuple[str, bytes] | None:
    """The digest of the whole file, where the server sends one."""
    structured = re.search(r"sha-256=:(?P<digest>[A-Za-z0-9+/=]+):", headers.get("Repr-Digest", ""))
    for algorithm, text, decode in (
        ("sha256", structured and structured["digest"], base64.b64decode),  # RFC 9530
        ("sha256", headers.get("X-Checksum-Sha256"), binascii.unhexlify),  # Artifactory
        ("sha256", headers.get("x-amz-checksum-sha256"), base64.b64decode),  # S3
    ):
        with contextlib.suppress(ValueError):
            if text and len(digest := decode(text)) == 32:
                return algorithm, digest
    return None


def _refused(code: int) -> SourceError:
    if code in (401, 403, 407):
        return SourceError(
            f"the server refuses it with status {code}; give a user and a password in ~/.netrc, or a new signed URL"
        )
    return SourceError(f"the server answers with status {code}; look at the address")


def _reason(error: BaseException) -> str:
    """The reason of an error, without a URL in it."""
    inner = error.reason if isinstance(error, urllib.error.URLError) else error
    if isinstance(inner, TimeoutError):
        return f"nothing came for {TIMEOUT_SECONDS:g} seconds"
    if isinstance(inner, OSError) and inner.strerror:
        return inner.strerror
    return type(inner).__name__ if isinstance(inner, BaseException) else "the connection failed"
