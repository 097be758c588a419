# SPDX-FileCopyrightText: the tritonlora authors
# SPDX-License-Identifier: Apache-2.0
"""A web server, and a server of the Hugging Face hub's API, in a process of its own, with faults on demand.

    ROOT/web/…                           files, under /web/…
    ROOT/hub/ORG/NAME/COMMIT/…           repositories; ROOT/hub/ORG/NAME/refs.json: {branch: commit}
    ROOT/faults.json                     {part of a path: fault}, read again for each request
    ROOT/requests.jsonl                  what was asked: method, path, range, authorization

A fault is an object with some of these. "times" is how often it still occurs; without it, always.

    status: answer with it          cut: end the connection after so many bytes of a response
    size: promise so many bytes, where one is asked for
    corrupt: change the first byte that is sent         hang: wait so many seconds
    no_range: send whole files only
    redirect: lead there            headers: further headers

The API is as huggingface_hub 0.34 to 2.4 asks it: /api/models/ORG/NAME[/revision/REV], /ORG/NAME/resolve/REV/PATH.
"""

from __future__ import annotations

import contextlib
import hashlib
import http.server
import json
import re
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.parse import unquote, urlsplit

LARGE_NBYTES = 4096  # files from this size on are "LFS"
TOKEN = "hf_sesame"  # noqa: S105  opens the repositories whose name ends with -private
_LOCK = threading.Lock()
_REST = re.compile(r"(?:/(?:revision|resolve)/(?P<revision>refs/pr/[0-9]+|[^/]+)(?:/(?P<file>.*))?)?")


@dataclass(frozen=True)
class SourceServer:
    """A running server."""

    url: str
    root: Path

    def fault(self, **faults: dict[str, Any]) -> None:
        """Set the faults, by a part of the path."""
        (self.root / "faults.json").write_text(json.dumps(faults))

    def requests(self) -> list[dict[str, Any]]:
        """What was asked since the last call."""
        path = self.root / "requests.jsonl"
        found = [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []
        path.unlink(missing_ok=True)
        return found


@contextlib.contextmanager
def running(root: Path) -> Iterator[SourceServer]:
    """Start one on a free port, and stop it at the end."""
    command = [sys.executable, __file__, str(root)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        try:
            assert process.stdout is not None
            yield SourceServer(f"http://127.0.0.1:{int(process.stdout.readline())}", root)
        finally:
            process.terminate()


def git_sha1(content: bytes) -> str:
    """The id that git gives a file."""
    return hashlib.sha1(f"blob {len(content)}\0".encode() + content, usedforsecurity=False).hexdigest()


class _Handler(http.server.BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    root: Path

    def log_message(self, *_: Any) -> None:
        """Nothing on stderr."""

    def do_HEAD(self) -> None:
        self.do_GET()

    def do_GET(self) -> None:
        parts = urlsplit(self.path)
        path = unquote(parts.path)
        said = {name: self.headers.get(name) for name in ("Range", "Authorization")}
        with _LOCK, (self.root / "requests.jsonl").open("a") as log:
            log.write(json.dumps({"method": self.command, "path": path, "query": parts.query, **said}) + "\n")
        fault = self._fault(path)
        time.sleep(fault.get("hang", 0))
        if "redirect" in fault:
            self._answer(302, b"", {"Location": fault["redirect"]})
        elif "status" in fault:
            self._answer(fault["status"], b"no")
        elif path.startswith("/web/"):
            file = self.root / path[1:]
            content = file.read_bytes() if file.is_file() else None
            if content is None:
                self._answer(404, b"no such file")
            else:
                self._send(content, {"ETag": f'"{hashlib.md5(content, usedforsecurity=False).hexdigest()}"'}, fault)
        else:
            self._hub(path, fault)

    def _fault(self, path: str) -> dict[str, Any]:
        with _LOCK:
            file = self.root / "faults.json"
            faults: dict[str, dict[str, Any]] = json.loads(file.read_text()) if file.exists() else {}
            for part, fault in faults.items():
                if part in path and fault.get("times", 1) > 0:
                    if "times" in fault:
                        fault["times"] -= 1
                        file.write_text(json.dumps(faults))
                    return fault
        return {}

    def _hub(self, path: str, fault: dict[str, Any]) -> None:
        match = re.fullmatch(r"/(?P<api>api/models/)?(?P<name>[^/]+/[^/]+)(?P<rest>/.*)?", path)
        repository = self.root / "hub" / match["name"] if match else None
        if match is None or repository is None or not repository.is_dir():
            self._answer(404, b"{}", {"X-Error-Code": "RepoNotFound"})
            return
        if repository.name.endswith("-private") and self.headers.get("Authorization") != f"Bearer {TOKEN}":
            self._answer(401, b"{}", {"X-Error-Code": "RepoNotFound"})
            return
        if repository.name.endswith("-gated"):
            self._answer(403, b"{}", {"X-Error-Code": "GatedRepo"})
            return
        refs: dict[str, str] = json.loads((repository / "refs.json").read_text())
        rest = re.fullmatch(
            r"(?:/(?:revision|resolve)/(?P<revision>refs/pr/[0-9]+|[^/]+)(?:/(?P<file>.*))?)?", match["rest"] or ""
        )
        revision = (rest["revision"] if rest else None) or "main"
        commit = refs.get(revision, revision)
        if not (repository / commit).is_dir():
            self._answer(404, b"{}", {"X-Error-Code": "RevisionNotFound"})
        elif match["api"]:
            siblings = [
                self._listed(repository / commit, file)
                for file in sorted((repository / commit).rglob("*"))
                if file.is_file()
            ]
            answer = {"id": match["name"], "modelId": match["name"], "sha": commit, "siblings": siblings, "tags": []}
            self._answer(200, json.dumps(answer).encode(), {"Content-Type": "application/json"})
        else:
            file = repository / commit / (rest["file"] if rest else "")
            if not file.is_file():
                self._answer(404, b"no", {"X-Error-Code": "EntryNotFound", "X-Repo-Commit": commit})
                return
            content = file.read_bytes()
            large = len(content) >= LARGE_NBYTES
            tag = hashlib.sha256(content).hexdigest() if large else git_sha1(content)
            self._send(content, {"ETag": f'"{tag}"', "X-Repo-Commit": commit}, fault)

    def _listed(self, commit: Path, file: Path) -> dict[str, Any]:
        content = file.read_bytes()
        listed: dict[str, Any] = {
            "rfilename": str(file.relative_to(commit)),
            "size": len(content),
            "blobId": git_sha1(content),
        }
        if len(content) >= LARGE_NBYTES:
            listed["lfs"] = {"sha256": hashlib.sha256(content).hexdigest(), "size": len(content), "pointerSize": 130}
        return listed

    def _send(self, content: bytes, headers: dict[str, str], fault: dict[str, Any]) -> None:
        asked = re.fullmatch(r"bytes=(?P<start>[0-9]+)-(?P<stop>[0-9]*)", self.headers.get("Range", ""))
        headers |= fault.get("headers", {})
        total, status = len(content), 200
        if self.headers.get("Range") == "bytes=0-0":
            total = fault.get("size", total)
        if asked and not fault.get("no_range"):
            start, stop = int(asked["start"]), int(asked["stop"] or len(content) - 1)
            if start >= len(content):
                self._answer(416, b"", {"Content-Range": f"bytes */{len(content)}", **headers})
                return
            status = 206
            headers["Content-Range"] = f"bytes {start}-{min(stop, total - 1)}/{total}"
            content = content[start : stop + 1]
            total = len(content) if asked["stop"] else total - start
        if fault.get("corrupt") and content:
            content = bytes([content[0] ^ 1]) + content[1:]
        self._answer(status, content, headers, total, fault.get("cut"))

    def _answer(
        self,
        status: int,
        content: bytes,
        headers: dict[str, str] | None = None,
        total: int | None = None,
        cut: int | None = None,
    ) -> None:
        self.send_response(status)
        for name, value in (headers or {}).items():
            self.send_header(name, value)
        total = len(content) if total is None else total
        self.send_header("Content-Length", str(total))
        self.end_headers()
        if self.command == "HEAD":
            return
        with contextlib.suppress(ConnectionError):
            self.wfile.write(content if cut is None else content[:cut])
            self.wfile.flush()
        if cut is not None or total != len(content):
            self.close_connection = True


if __name__ == "__main__":
    _Handler.root = Path(sys.argv[1])
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), _Handler) as server:
        sys.stdout.write(f"{server.server_port}\n")
        sys.stdout.flush()
        server.serve_forever()
