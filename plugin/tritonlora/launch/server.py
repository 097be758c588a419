# SPDX-FileCopyrightText: the tritonlora authors
# SPDX-License-Identifier: Apache-2.0
"""A running tritonserver: launch it on a model repository, wait until it is ready, stop it.

A `Server` is a context manager. However its `with` block ends, no process of the server and none of its shared-memory
regions are left.
"""

from __future__ import annotations

import contextlib
import http.client
import json
import os
import re
import secrets
import shutil
import signal
import subprocess
import threading
import time
import urllib.parse
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any

from tritonlora.errors import ServerError
from tritonlora.interrupts import held
from tritonlora.launch import tritonserver as installed
from tritonlora.launch.stubs import READY, Stubs
from tritonlora.launch.tritonserver import EXIT_TIMEOUT_SECONDS, World, find_tritonserver, server_command
from tritonlora.machine import LOCAL, SHARED_MEMORY, Ports, free_ports, host_and_port

LOG_LINES_KEPT = 400
LOG_LINES_SHOWN = 50
READY_POLL_SECONDS = 0.05
STUBS_POLL_SECONDS = 1.0  # listing the processes of a large machine takes some 10 ms
ASK_TIMEOUT_SECONDS = 5.0
LOAD_TIMEOUT_SECONDS = 60.0
GRACE_SECONDS = 10  # beyond the exit timeout, for a server to unload its models
# Triton 2.51 needs its whole exit timeout when a stub has died. Requests that other processes can finish have this many
# seconds.
FAULT_PATIENCE_SECONDS = 5.0
_ANY = {"0.0.0.0": LOCAL, "::": "::1"}  # noqa: S104  every interface -> the address to reach it on here
# core, src/model_lifecycle.cc: "loading: lora_router:1", "successfully loaded 'lora_router'"
_LOADING = re.compile(r"\bloading: (?P<begun>[^:\s\"]+):\d+|successfully loaded '(?P<done>[^']+)'")
# Triton crashes with this now and then while models load (triton-inference-server/server, issue 8882, open).
_CRASH = "boost::interprocess::lock_exception"
_AGAIN = f"tritonserver crashed while it loaded models ({_CRASH}), a known fault of it; tritonlora starts it once more"
# glog's error lines, and the output of a process that crashes. Other output that bypasses the log has no level.
_ERROR = re.compile(r"E\d{4} |terminate called|  what\(\): |Signal \(")


# A shell script that stops the server if this process ends without `Server.stop`: the script's stdin is closed then. A
# server that is still loading dies of SIGTERM at once, and leaves stubs and regions behind.
_WATCH = """
read -r _
kill -TERM "$1"
waited=0
while kill -0 "$1" && [ $waited -lt "$2" ]; do sleep 1; waited=$((waited + 1)); done
kill -KILL "-$1"
rm -f "$3"*
"""


class Server:
    """A tritonserver on a model repository, running while its `with` block does."""

    def __init__(
        self,
        repository: Path,
        *,
        ports: Ports | None = None,
        address: str = LOCAL,
        exit_timeout: int = EXIT_TIMEOUT_SECONDS,
        complete_configs: bool = False,
        extra: Sequence[str] = (),
        environment: Mapping[str, str] | None = None,
        world: World | None = None,
        on_log: Callable[[str], None] | None = None,
        explain: Callable[[Sequence[str]], str | None] = lambda _: None,
        watch: Callable[[Server], None] | None = None,
    ) -> None:
        """Prepare the command; entering the `with` block launches it.

        `ports` default to free ports. `address`, a numeric address, defaults to this machine only. When the server is
        stopped, requests under way have `exit_timeout` seconds to end. With `complete_configs`, models may complete
        their config.pbtxt. `on_log` is called with every line of the server's log, in a thread of its own. `explain`
        turns the log of a server that did not start into the reason, or None. `watch` is called in a thread of its own
        once the server is ready. If it raises ServerError, the server is stopped, and `wait` and the end of the `with`
        block raise the error.

        Raises ServerError if there is no tritonserver, or no mpirun for an engine of several processes.
        """
        tritonserver = find_tritonserver()
        if world is not None and world.size > 1 and shutil.which(installed.MPIRUN) is None:
            raise ServerError(
                f"the engine has {world.size} processes, and there is no {installed.MPIRUN} on PATH to start them; "
                "serve inside a container of tritonserver:<yy.mm>-trtllm-python-py3, which has it"
            )
        self.ports = ports or free_ports()
        self._reached_at = _ANY.get(address, address)
        # Containers that share /dev/shm have the same pids.
        self._regions = SHARED_MEMORY / f"{installed.REGIONS}{secrets.token_hex(4)}_"
        self._patience = exit_timeout + GRACE_SECONDS
        self.command = server_command(
            tritonserver,
            repository,
            self.ports,
            address=address,
            shm_prefix=self._regions.name,
            exit_timeout=exit_timeout,
            complete_configs=complete_configs,
            extra=extra,
            world=world,
        )
        self._environment = {**os.environ, **tritonserver.environment, **(environment or {})}
        self._log: deque[str] = deque(maxlen=LOG_LINES_KEPT)
        self._on_log = on_log
        self._explain = explain
        self._watch = watch
        self._watcher: subprocess.Popen[bytes] | None = None
        self._fault: ServerError | None = None  # that `watch` raised
        self._is_ending = threading.Event()
        self._stopping = threading.Lock()  # so that one thread at a time stops the server
        self._stopped = False
        self._crashed = False  # with _CRASH; it was launched again

    def __enter__(self) -> Server:
        """Launch the server without waiting for it; the caller calls `wait_until_ready`."""
        self._started = time.monotonic()
        self._launch()
        return self

    def _launch(self) -> None:
        process = None
        try:
            with held():
                # A session of its own: Ctrl-C on the terminal reaches only us, and we stop the server in order.
                process = self._process = subprocess.Popen(
                    self.command,
                    env=self._environment,
                    stdin=subprocess.DEVNULL,
                    stdout=subprocess.PIPE,
                    stderr=subprocess.STDOUT,
                    text=True,
                    errors="replace",
                    start_new_session=True,
                )
                self._log_reader = threading.Thread(target=self._read_log, name="tritonserver-log", daemon=True)
                self._log_reader.start()
                self._watcher = subprocess.Popen(
                    ["sh", "-c", _WATCH, "sh", *map(str, (process.pid, self._patience, self._regions))],
                    stdin=subprocess.PIPE,
                    stdout=subprocess.DEVNULL,
                    stderr=subprocess.DEVNULL,
                    start_new_session=True,
                )
        except BaseException:  # __exit__ is not called if __enter__ raises
            if process:
                self._end(0)
            raise
        self.stubs = Stubs(process.pid, self.model_states)

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.stop()
        if self._fault is not None and error is not self._fault and (error is None or isinstance(error, ServerError)):
            raise self._fault from error

    @property
    def pid(self) -> int:
        """The process id of tritonserver, which is also the id of its process group."""
        return self._process.pid

    @property
    def http_url(self) -> str:
        """HOST:PORT of the HTTP endpoint."""
        return host_and_port(self._reached_at, self.ports.http)

    @property
    def grpc_url(self) -> str:
        """HOST:PORT of the gRPC endpoint."""
        return host_and_port(self._reached_at, self.ports.grpc)

    @property
    def metrics_url(self) -> str:
        """HOST:PORT of the metrics endpoint."""
        return host_and_port(self._reached_at, self.ports.metrics)

    def log(self) -> list[str]:
        """The last LOG_LINES_KEPT lines of the server's log."""
        return list(self._log)

    def _read_log(self) -> None:
        if self._process.stdout is None:  # stdout is always a pipe: this narrows the type
            return
        with self._process.stdout as lines:
            for line in lines:
                self._add_to_log(line.rstrip("\n"))

    def _add_to_log(self, line: str) -> None:
        self._log.append(line)
        if self._on_log:
            # `_on_log` may fail: rich raises SystemExit on a broken pipe. The log must be read further, as SIGPIPE
            # kills a server whose log is not read.
            with contextlib.suppress(Exception, SystemExit):
                self._on_log(line)

    def models(self) -> dict[str, bool]:
        """Model -> whether it is ready, for each model that the server has begun to load, by the log so far."""
        found = (match for line in list(self._log) if (match := _LOADING.search(line)))
        states: dict[str, bool] = {}
        for match in found:
            states[match["begun"] or match["done"]] = match["done"] is not None
        return states

    def wait_until_ready(
        self, timeout: float = 600.0, on_progress: Callable[[str, int, int], None] = lambda *_: None
    ) -> None:
        """Return when every model is ready. Raises ServerError with the end of the log on an exit or a timeout.

        A server that Triton's known crash ends while models load is launched once more.
        `timeout` is in seconds from the launch. `on_progress` is called again and again meanwhile, with a text on what
        is loading and for how long, the number of models that are ready, and the number of models begun.
        """
        next_look = 0.0
        while not self._is_ready():
            models = self.models()
            loading = ", ".join(name for name, is_ready in models.items() if not is_ready) or "…"
            ready = sum(models.values())
            what = f"{ready} of {len(models)} models ready; loading {loading}"
            on_progress(f"{time.monotonic() - self._started:.0f} s: {what}", ready, len(models))
            if self._process.poll() is not None and not self._launches_again():
                raise self._failure(f"exited with status {self._process.returncode} before it was ready")
            now = time.monotonic()
            if now - self._started > timeout:
                raise self._failure(f"was not ready within {timeout:.0f} s")
            if now >= next_look:
                self.stubs.note()
                next_look = now + STUBS_POLL_SECONDS
            time.sleep(READY_POLL_SECONDS)
        self.stubs.note()
        if self._watch is not None:
            threading.Thread(target=self._watched, args=(self._watch,), name="tritonserver-watch", daemon=True).start()

    def _launches_again(self) -> bool:
        """Launch the server a second time if it has crashed with _CRASH. Returns whether it was launched."""
        self._log_reader.join(timeout=1)  # stubs may hold the log open
        with self._stopping:
            if self._crashed or self._is_ending.is_set() or not any(_CRASH in line for line in self._log):
                return False
            self._crashed = True
            self._end(0)
            self._log.clear()
            self._add_to_log(_AGAIN)
            self._launch()
        return True

    def _watched(self, watch: Callable[[Server], None]) -> None:
        try:
            watch(self)
        except ServerError as error:
            self._fault = error
            self.stop(FAULT_PATIENCE_SECONDS)

    def ends(self, timeout: float) -> bool:
        """Whether the server is being stopped or has ended, now or within `timeout` seconds."""
        return self._is_ending.wait(timeout) or self._process.poll() is not None

    def is_loaded(self, model: str) -> bool:
        """Whether a model is ready for requests."""
        return self._ask("GET", f"/v2/models/{urllib.parse.quote(model, safe='')}/ready") is not None

    def _is_ready(self) -> bool:
        return self._ask("GET", "/v2/health/ready") is not None

    def version(self) -> str | None:
        """The server's version, such as "2.51.0"; None if the server gives no version."""
        answer = self._ask("GET", "/v2")
        version = answer.get("version") if isinstance(answer, dict) else None
        return version if isinstance(version, str) else None

    def model_states(self) -> dict[str, str] | None:
        """Model -> its state, such as "READY" or "UNAVAILABLE"; None if the server gives no states.

        A model with several versions is READY when one of them is.
        """
        answer = self._ask("POST", "/v2/repository/index")
        if not isinstance(answer, list):
            return None
        states: dict[str, str] = {}
        for one in answer:
            name, state = str(one.get("name")), str(one.get("state", "UNAVAILABLE"))
            states[name] = READY if READY in (state, states.get(name)) else state
        return states

    def reload(self, model: str) -> bool:
        """Unload a model and load it again; return whether the server did both.

        The server refuses unless it is in explicit model-control mode. A load alone keeps the instances of a model with
        unchanged files, even an instance whose process has died. Ensembles that lead to the model are unloaded and
        loaded with it.
        """
        path = f"/v2/repository/models/{urllib.parse.quote(model, safe='')}"
        return all(
            self._ask("POST", f"{path}/{verb}", timeout=LOAD_TIMEOUT_SECONDS) is not None for verb in ("unload", "load")
        )

    def _ask(self, method: str, path: str, *, timeout: float = ASK_TIMEOUT_SECONDS) -> Any:
        """The HTTP response: its JSON, or "" for anything else. None without a response of status 200."""
        connection = http.client.HTTPConnection(self._reached_at, self.ports.http, timeout=timeout)
        try:
            connection.request(method, path)
            response = connection.getresponse()
            body = response.read()
        except (OSError, http.client.HTTPException):
            return None
        finally:
            connection.close()
        if response.status != http.client.OK:
            return None
        with contextlib.suppress(ValueError):
            return json.loads(body)
        return ""

    def _failure(self, what: str) -> ServerError:
        self.stop()
        log = self.log()
        heading, lines = "the end of its log", log
        if self._on_log:  # `_on_log` got every line, so the message repeats only errors
            heading, lines = "the errors in its log", [line for line in log if _ERROR.match(line)]
        message = f"tritonserver (pid {self.pid}) {what}"
        if lines:
            message = "\n".join([f"{message}; {heading}:", *(f"  | {line}" for line in lines[-LOG_LINES_SHOWN:])])
        reason = self._explain(log)
        return ServerError(f"{message}\n{reason}" if reason else message)

    def wait(self, timeout: float | None = None) -> int | None:
        """Wait for the server to end by itself. Returns its exit status; None if it runs after `timeout` seconds.

        Raises the ServerError with which `watch` had the server stopped.
        """
        try:
            status = self._process.wait(timeout)
        except subprocess.TimeoutExpired:
            return None
        if self._fault is not None:
            raise self._fault
        return status

    def send_signal(self, number: int) -> None:
        """Send the signal `number` to tritonserver."""
        self._process.send_signal(number)

    def stop(self, patience: float | None = None) -> None:
        """Stop the server with SIGTERM, then kill it after `patience` seconds. A second call does nothing.

        `patience` defaults to `exit_timeout` for requests, plus GRACE_SECONDS to unload models.
        """
        self._is_ending.set()
        with self._stopping:
            if not self._stopped:  # another process group may have its id after that
                try:
                    self._end(self._patience if patience is None else patience)
                finally:
                    self._stopped = True

    def _end(self, patience: float) -> None:
        """End the server, its stubs and its watcher."""
        try:
            if self._process.poll() is None:
                self._process.send_signal(signal.SIGTERM)
                with contextlib.suppress(subprocess.TimeoutExpired):
                    self._process.wait(patience)
        finally:
            # Python backend stubs are in the server's process group, and outlive a server that was killed.
            with contextlib.suppress(ProcessLookupError):
                os.killpg(self._process.pid, signal.SIGKILL)
            self._process.wait()
            self._log_reader.join(timeout=5)
            for region in SHARED_MEMORY.glob(f"{self._regions.name}*"):
                region.unlink(missing_ok=True)
            if self._watcher is not None:
                self._watcher.kill()
                self._watcher.communicate()
