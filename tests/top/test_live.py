# SPDX-FileCopyrightText: the tritonlora authors
# SPDX-License-Identifier: Apache-2.0
"""live.py and the command: views on a terminal, in a pipe and as JSON, of a server that says what a test wants."""

from __future__ import annotations

import contextlib
import itertools
import json
import re
import termios
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from types import SimpleNamespace

import pytest

from terminal import on_terminal
from tritonlora import exposition
from tritonlora.cli import top
from tritonlora.cli.commands import main
from tritonlora.errors import ServerError
from tritonlora.top.live import views
from tritonlora.top.look import Look

SHOW, ENTER, LEAVE = b"\x1b[?25h", b"\x1b[?1049h", b"\x1b[?1049l"  # the cursor; the alternate screen


class _Handler(BaseHTTPRequestHandler):
    asked = 0

    def do_GET(self) -> None:
        _Handler.asked += 1
        text = f'lora_requests_total{{lora_name="pirate",outcome="OK"}} {_Handler.asked}\nlora_cache_pages 16\n'
        self._send(text if self.path == "/metrics" else "")

    def do_POST(self) -> None:
        self._send("data: " + json.dumps({"adapters": json.dumps({"pirate": {"state": "warm"}})}) + "\n\n")

    def _send(self, text: str) -> None:
        self.send_response(200)
        self.send_header("Content-Length", str(len(text)))
        self.end_headers()
        self.wfile.write(text.encode())

    def log_message(self, *_: object) -> None:
        pass


@contextmanager
def serving(port: int = 0) -> Iterator[int]:
    """A server, health, metrics and listing on one port. Its end is at once, and its port is free then."""
    _Handler.asked = 0
    with ThreadingHTTPServer(("127.0.0.1", port), _Handler) as server:
        thread = threading.Thread(target=server.serve_forever, args=(0.01,))
        thread.start()
        try:
            yield server.server_port
        finally:
            server.shutdown()
            thread.join()


def words(port: int, *more: str) -> list[str]:
    """The command for that server."""
    return ["top", "--url", f"127.0.0.1:{port}", "--metrics-port", str(port), "--interval", "0.5", *more]


def at(seconds: float, requests: int) -> Look:
    """A look at a server with that many requests."""
    samples = exposition.parse(f'lora_requests_total{{lora_name="a",outcome="OK"}} {requests}\n')
    return Look(seconds, is_ready=True, samples=samples, states=None)


def test_a_server_that_comes_back_has_rates_from_the_second_look_on() -> None:
    """Those of the time between would be of nothing."""
    left: list[Look | ServerError] = [at(0, 5), at(1, 7), ServerError("gone"), at(3, 9), at(5, 13)]

    shown = views(lambda: _raised(left.pop(0)), 0.0, lambda _: not left)

    assert [(None, None), (None, 2.0), ("gone", None), (None, None), (None, 2.0)] == [
        (view.problem, view.total.requests_per_second) for view in shown
    ]


def test_ctrl_c_leaves_the_terminal_as_it_was() -> None:
    """The first screen, a cursor, echo. NO_COLOR means none."""
    with serving() as port, on_terminal(words(port), NO_COLOR="1") as terminal:
        before = terminal.settings()
        terminal.await_text(b"requests/s 4")
        during = terminal.settings()
        terminal.press(b"\x03")

        assert 130 == terminal.await_end()
        assert b"\0" == during[6][termios.VSUSP], "Ctrl-Z would leave the shell with the alternate screen"
        assert before == terminal.settings() != during
        assert is_put_back(terminal.written)
        assert not re.search(rb"\x1b\[[0-9;]*3[0-7][;m]", terminal.written)


def test_the_view_goes_on_while_the_server_goes_and_comes_back() -> None:
    """With counters that begin at 0 again, in a window that changes its size, until the key q."""
    with contextlib.ExitStack() as stack:
        first = stack.enter_context(contextlib.ExitStack())
        port = first.enter_context(serving())
        terminal = stack.enter_context(on_terminal(words(port)))
        before = terminal.settings()
        terminal.await_text(b"requests/s 4")
        first.close()
        terminal.await_text(b"NO ANSWER")
        with serving(port):
            wide = terminal.await_text(b"requests/s 4")
            terminal.resize(40, 12)
            narrow = terminal.await_text(b"choose the column to sort")
        terminal.await_text(b"NO ANSWER")
        with serving(port):
            terminal.await_text(b"requests/s 4")
            terminal.press(b">")
            terminal.press(b"\x1b[D")
            terminal.press(b"q")

            assert 0 == terminal.await_end()
        assert before == terminal.settings()
        assert is_put_back(terminal.written)
        assert (True, False) == (b"LOAD/S" in wide, b"LOAD/S" in narrow)
        assert b"pirate       \x1b[32mwarm" in wide
        assert not re.search(rb"requests/s -\d", terminal.written)


def is_put_back(written: bytes) -> bool:
    """Whether the cursor is shown, and the first screen, after all that was drawn."""
    return written.index(ENTER) < written.rindex(b"q quit") < written.rindex(SHOW) < written.rindex(LEAVE)


def test_json_is_a_line_for_each_view(capfd: pytest.CaptureFixture[str]) -> None:
    """With --once there is one, with rates."""
    with serving() as port:
        assert 0 == main(words(port, "--once", "--json"))
    [line] = capfd.readouterr().out.splitlines()
    found = json.loads(line)

    assert (True, None, 16, 4) == (
        *(found["is_ready"], found["problem"], found["cache_pages"]),
        round(found["requests_per_second"]),
    )
    assert [("pirate", "warm")] == [(one["lora_name"], one["state"]) for one in found["adapters"]]


def test_in_a_pipe_a_view_is_text_without_colours(capfd: pytest.CaptureFixture[str]) -> None:
    """And ends with its last row."""
    with serving() as port:
        assert 0 == main(words(port, "--once", "--sort", "name"))
    lines = capfd.readouterr().out.splitlines()

    assert "\x1b" not in "".join(lines)
    assert ["tritonlora", "ADAPTER", "pirate"] == [lines[0].split()[0], lines[-2].split()[0], lines[-1].split()[0]]


@pytest.mark.parametrize("options", [(), ("--once",), ("--json",)])
def test_no_server_at_the_start_is_an_error(capfd: pytest.CaptureFixture[str], options: Sequence[str]) -> None:
    """That says which endpoint does not answer."""
    with serving() as port:
        pass

    assert 1 == main(words(port, *options))
    out, err = capfd.readouterr()
    assert ("", True) == (out, err.startswith(f"error: no answer from 127.0.0.1:{port}: "))


def test_in_a_pipe_a_server_that_goes_away_is_told_with_the_time(
    capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Since the last look that succeeded."""
    looks: list[Look | ServerError] = [at(0, 5), at(1, 7), *[ServerError("gone")] * 2]
    monkeypatch.setattr(top, "look", lambda *_: at(0, 5))
    monkeypatch.setattr(top, "views", lambda *_: views(lambda: _raised(looks.pop(0)), 0.0, lambda _: not looks))
    monkeypatch.setattr(top, "time", SimpleNamespace(monotonic=itertools.count().__next__))

    assert 0 == main(["top"])
    assert ["NO ANSWER for 1 s", "NO ANSWER for 2 s"] == re.findall(r"NO ANSWER for \d s", capfd.readouterr().out)


def _raised(found: Look | ServerError) -> Look:
    if isinstance(found, ServerError):
        raise found
    return found


def test_metrics_at_another_port_are_asked_for(capfd: pytest.CaptureFixture[str]) -> None:
    """The message has the address once, and the option."""
    with serving() as closed:
        pass
    with serving() as port:
        assert 1 == main([*words(port, "--once"), "--metrics-port", str(closed)])
    message = capfd.readouterr().err

    assert message.startswith(f"error: no answer from http://127.0.0.1:{closed}/metrics: ")
    assert message.endswith("; is the server running? (another metrics port: --metrics-port PORT)\n")


@pytest.mark.parametrize(
    ("option", "message"),
    [(("--sort", "rank"), "no column 'rank'; there are name, state"), (("--url", "a b"), "'a b' is not HOST:PORT")],
)
def test_what_cannot_be_meant_is_refused(
    option: Sequence[str], message: str, capfd: pytest.CaptureFixture[str]
) -> None:
    """Before anything is looked at."""
    assert 0 != main(["top", *option])
    assert message in " ".join(capfd.readouterr().err.split())
