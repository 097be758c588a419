# SPDX-FileCopyrightText: the tritonlora authors
# SPDX-License-Identifier: Apache-2.0
"""Find a tritonserver, launch it on a model repository, wait until it is ready, stop it.

A tritonserver on PATH wins. Otherwise the one inside the PyPI wheel `nvidia-pytriton` is used; that wheel keeps the
server, its shared libraries and a Python backend stub per Python version in separate places, so they are put together
in a directory of symbolic links first.

Rule: whoever launches stops. A `Server` is a context manager, and leaving it, for whatever reason, leaves no process
and no shared-memory region behind.
"""

from __future__ import annotations

import contextlib
import errno
import hashlib
import http.client
import importlib.metadata
import importlib.util
import os
import random
import re
import secrets
import shutil
import signal
import socket
import subprocess
import sys
import sysconfig
import threading
import time
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path
from types import TracebackType

import platformdirs

from tritonlora.errors import ServerError, one_message
from tritonlora.interrupts import held

SHARED_MEMORY = Path("/dev/shm")  # noqa: S108  Triton's Python backend keeps its regions here
MPIRUN = "mpirun"
LOG_LINES_KEPT = 400
LOG_LINES_SHOWN = 50
READY_POLL_SECONDS = 0.05
EXIT_TIMEOUT_SECONDS = 30  # tritonserver's own default: what is being answered may be answered to its end
GRACE_SECONDS = 10  # beyond its timeout, for a server to unload its models before it is killed

ENDPOINTS = ("http", "grpc", "metrics")
LOCAL = "127.0.0.1"  # where servers listen unless they are told otherwise: who can reach Triton can end it
_ANY = {"0.0.0.0": LOCAL, "::": "::1"}  # noqa: S104  every interface -> where this machine reaches it
_CONNECTIONS_PORTS = Path("/proc/sys/net/ipv4/ip_local_port_range")
_IPV6_SPELT = {"http": "ipv6:{}", "grpc": "[{}]", "metrics": "ipv6:{}"}  # by libevhtp and by gRPC
_OUR_OPTIONS = {
    **{f"--{kind}-port": f"give --{kind}-port before the --" for kind in ENDPOINTS},
    **{f"--{kind}-address": "give --address before the --" for kind in ENDPOINTS},
    "--allow-http": "leave it out, as tritonlora asks over HTTP whether the server is ready",
}
"""What tritonlora tells tritonserver itself, as it must know it -> what to do instead of telling it, too."""

# core, src/model_lifecycle.cc: "loading: lora_router:1", "successfully loaded 'lora_router'"
_LOADING = re.compile(r"\bloading: (?P<begun>[^:\s\"]+):\d+|successfully loaded '(?P<done>[^']+)'")
# glog's, and what a process says that crashes; what else tritonserver prints without its log has no level.
_ERROR = re.compile(r"E\d{4} |terminate called|  what\(\): |Signal \(")


@dataclass(frozen=True, slots=True)
class Tritonserver:
    """An installed tritonserver: what to execute, and what that one needs."""

    executable: Path
    arguments: tuple[str, ...] = ()
    environment: Mapping[str, str] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class Ports:
    """The TCP ports of one server."""

    http: int = 8000
    grpc: int = 8001
    metrics: int = 8002

    def __post_init__(self) -> None:
        """ServerError when two endpoints have the same port: tritonserver would load all models before it says so."""
        if len({self.http, self.grpc, self.metrics}) < len(ENDPOINTS):
            options = ", ".join(f"--{kind}-port {getattr(self, kind)}" for kind in ENDPOINTS)
            raise ServerError(f"each endpoint needs a port of its own, got {options}")


def find_tritonserver() -> Tritonserver:
    """The tritonserver on PATH, else the one in the wheel `nvidia-pytriton`; ServerError when there is neither."""
    on_path = shutil.which("tritonserver")
    if on_path:
        return Tritonserver(Path(on_path))
    package = importlib.util.find_spec("pytriton")
    if package is None or package.origin is None:
        raise ServerError(
            "no tritonserver found on PATH, nor in the Python package nvidia-pytriton; "
            "run inside a Triton container, or: pip install --no-deps nvidia-pytriton"
        )
    return _embedded(Path(package.origin).parent)


def _embedded(package: Path) -> Tritonserver:
    """The tritonserver of the wheel whose `pytriton` package directory is `package`."""
    version = f"{sys.version_info.major}.{sys.version_info.minor}"
    triton = package / "tritonserver"
    backend = triton / "backends" / "python"
    members = {path.name: path for path in backend.glob("*") if path.is_file()}
    members["triton_python_backend_stub"] = triton / "python_backend_stubs" / version / "triton_python_backend_stub"
    # Its stub reads numpy's structs by the layout of numpy 1: under numpy 2 every output tensor silently arrives empty.
    numpy_version = importlib.metadata.version("numpy")
    if int(numpy_version.split(".", 1)[0]) >= 2:
        raise ServerError(
            f"the tritonserver in nvidia-pytriton needs numpy 1, and numpy {numpy_version} is installed; "
            "run: pip install 'numpy<2'"
        )
    missing = [str(path) for path in (triton / "bin" / "tritonserver", *members.values()) if not path.is_file()]
    if missing:
        raise ServerError(f"the tritonserver in nvidia-pytriton does not support Python {version}: no {missing[0]}")

    key = hashlib.sha256(f"{package.resolve()} {version}".encode()).hexdigest()[:16]
    backends = platformdirs.user_cache_path("tritonlora") / "backends" / key
    for name, path in members.items():
        _link(backends / "python" / name, path.resolve())
    # The stub embeds libpython, and takes its prefix from the first python3 on PATH: the environment that runs us.
    libraries = [str(package.parent / "nvidia_pytriton.libs"), str(sysconfig.get_config_var("LIBDIR"))]
    return Tritonserver(
        executable=triton / "bin" / "tritonserver",
        arguments=(f"--backend-directory={backends}",),
        environment={
            "LD_LIBRARY_PATH": os.pathsep.join([*libraries, *filter(None, [os.environ.get("LD_LIBRARY_PATH")])]),
            "PATH": os.pathsep.join([str(Path(sys.executable).parent), os.environ.get("PATH", os.defpath)]),
        },
    )


def _link(link: Path, target: Path) -> None:
    """Make `link` point to `target`, also while another process does the same."""
    if link.is_symlink() and link.readlink() == target:
        return
    link.parent.mkdir(parents=True, exist_ok=True)
    temporary = link.with_name(f"{link.name}.{os.getpid()}")
    temporary.unlink(missing_ok=True)
    temporary.symlink_to(target)
    temporary.replace(link)


def free_ports() -> Ports:
    """Three ports that were free a moment ago.

    tritonserver takes them once its models are loaded; so they are of those that Linux gives to no outgoing connection
    meanwhile, where it leaves any.
    """
    words = _CONNECTIONS_PORTS.read_text().split() if _CONNECTIONS_PORTS.exists() else ()
    low, high = map(int, words or (32768, 60999))
    others = [*range(10_000, low), *range(high + 1, 1 << 16)]  # below are ports that services are known by
    random.shuffle(others)
    free = (port for port in others if _bind_error(port, LOCAL) is None)
    if len(found := [*islice(free, len(ENDPOINTS))]) == len(ENDPOINTS):
        return Ports(*found)
    with contextlib.ExitStack() as stack:
        sockets = [stack.enter_context(socket.socket()) for _ in ENDPOINTS]
        for one in sockets:
            one.bind((LOCAL, 0))
        return Ports(*(one.getsockname()[1] for one in sockets))


def numeric_address(address: str) -> str:
    """The address that a name stands for: tritonserver looks none up. ServerError when there is none."""
    try:
        found = socket.getaddrinfo(address, None, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)
    except (OSError, UnicodeError) as error:
        raise _cannot_listen(address, error) from None
    return str(found[0][4][0])


def check_ports(ports: Ports, address: str = LOCAL) -> None:
    """ServerError when no server can listen on these ports at `address`, in numbers."""
    if taken := ports_in_use(ports, address):
        raise ServerError(
            f"in use already: port {', '.join(map(str, taken))}; choose others with --http-port and so on"
        )
    for port in (ports.http, ports.grpc, ports.metrics):
        if error := _bind_error(port, address):
            raise _cannot_listen(_host_and_port(address, port), error)


def ports_in_use(ports: Ports, address: str | None = None) -> list[int]:
    """Those of the ports on which somebody else listens now, at `address`, in numbers (None: any interface)."""
    errors = [(port, _bind_error(port, address)) for port in (ports.http, ports.grpc, ports.metrics)]
    return [port for port, error in errors if error and error.errno == errno.EADDRINUSE]


def _bind_error(port: int, address: str | None) -> OSError | None:
    try:
        with socket.socket(socket.AF_INET6 if _is_ipv6(address) else socket.AF_INET) as one:
            one.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)  # one that has just ended is no obstacle
            one.bind((address or "", port))
    except OSError as error:
        return error
    return None


def _cannot_listen(where: str, error: OSError | UnicodeError) -> ServerError:
    reason = error.strerror if isinstance(error, OSError) else error
    return ServerError(
        f"cannot listen at {where}: {reason}; give --address an address of this machine, and ports that you may use"
    )


def _is_ipv6(address: str | None) -> bool:
    return address is not None and ":" in address


def _host_and_port(address: str, port: int) -> str:
    return f"[{address}]:{port}" if _is_ipv6(address) else f"{address}:{port}"


def check_extra(extra: Sequence[str]) -> None:
    """ServerError when the user's own arguments for tritonserver would move it to where nobody looks for it."""
    names = [word.partition("=")[0] for word in extra]
    problems = [f"{name!r}: {_OUR_OPTIONS[name]}" for name in names if name in _OUR_OPTIONS]
    if problems:
        raise ServerError(one_message("not for tritonserver alone", problems))


@dataclass(frozen=True, slots=True)
class World:
    """The processes of one engine: a tritonserver for each, of which the first loads all models and answers."""

    size: int = 1  # tensor-parallel times pipeline-parallel
    target: str = "tensorrt_llm"  # the only model that the others load


def server_command(
    tritonserver: Tritonserver,
    repository: Path,
    ports: Ports,
    *,
    address: str = LOCAL,
    shm_prefix: str | None = None,
    exit_timeout: int = EXIT_TIMEOUT_SECONDS,
    complete_configs: bool = False,
    extra: Sequence[str] = (),
    world: World | None = None,
) -> list[str]:
    """The command line that serves `repository` at `address`, in numbers; `extra` comes last, to have the last word.

    Like TensorRT-LLM's scripts/launch_triton_server.py it switches the completion of configs off, unless
    `complete_configs`, and starts one server for each process of an engine that has several, by mpirun.
    """
    world = world or World()
    spelt = _IPV6_SPELT if _is_ipv6(address) else dict.fromkeys(ENDPOINTS, "{}")
    address_arguments = [f"--{kind}-address={spelt[kind].format(address)}" for kind in ENDPOINTS]

    def one(rank: int) -> list[str]:
        prefix = shm_prefix if world.size == 1 else f"{shm_prefix or 'prefix'}{rank}_"
        return [
            str(tritonserver.executable),
            *tritonserver.arguments,
            f"--model-repository={repository}",
            *(["--model-control-mode=explicit", f"--load-model={world.target}"] if rank else []),
            f"--grpc-port={ports.grpc}",
            f"--http-port={ports.http}",
            f"--metrics-port={ports.metrics}",
            f"--exit-timeout-secs={exit_timeout}",
            *([] if complete_configs else ["--disable-auto-complete-config"]),
            *address_arguments,
            *([f"--backend-config=python,shm-region-prefix-name={prefix}"] if prefix else []),
            *extra,
        ]

    if world.size == 1:
        return one(0)
    return [
        MPIRUN,
        "--allow-run-as-root",
        *(word for rank in range(world.size) for word in ("-n", "1", *one(rank), ":")),
    ]


# A shell that does what `Server.stop` does, once this process is gone without having done it: the other end of its
# stdin is closed then. A server that is still loading dies of SIGTERM at once, and leaves stubs and regions behind.
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
    ) -> None:
        """`on_log` gets every line of the server's log (from a thread of its own).

        `explain` makes of the log of a server that did not start what the user should know first, if it can.

        `ports` default to free ones, and `address`, in numbers, to this machine only. When the server is stopped,
        requests under way have `exit_timeout` seconds to end. `complete_configs`: models may complete theirs.
        """
        tritonserver = find_tritonserver()
        if world is not None and world.size > 1 and shutil.which(MPIRUN) is None:
            raise ServerError(
                f"the engine has {world.size} processes, and there is no {MPIRUN} on PATH to start them; "
                "serve inside a container of tritonserver:<yy.mm>-trtllm-python-py3, which has it"
            )
        self.ports = ports or free_ports()
        self._reached_at = _ANY.get(address, address)
        # Containers that share /dev/shm have the same pids.
        self._regions = SHARED_MEMORY / f"tritonlora_{secrets.token_hex(4)}_"
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
        self._watcher: subprocess.Popen[bytes] | None = None
        self._stopped = False

    def __enter__(self) -> Server:
        """Launch; `wait_until_ready` is for the caller to call."""
        self._started = time.monotonic()
        process = None
        try:
            with held():
                # A session of its own: Ctrl-C on the terminal reaches us alone, and we end the server in order.
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
        except BaseException:  # there is no __exit__ yet that would do it
            if process:
                self.stop()
            raise
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.stop()

    @property
    def pid(self) -> int:
        """Process id of tritonserver, which is also the id of its process group."""
        return self._process.pid

    @property
    def http_url(self) -> str:
        """HOST:PORT of the HTTP endpoint."""
        return _host_and_port(self._reached_at, self.ports.http)

    @property
    def grpc_url(self) -> str:
        """HOST:PORT of the gRPC endpoint."""
        return _host_and_port(self._reached_at, self.ports.grpc)

    @property
    def metrics_url(self) -> str:
        """HOST:PORT of the metrics endpoint."""
        return _host_and_port(self._reached_at, self.ports.metrics)

    def log(self) -> list[str]:
        """The last lines of the server's log."""
        return list(self._log)

    def _read_log(self) -> None:
        if self._process.stdout is None:  # it is a pipe, always: this narrows the type
            return
        with self._process.stdout as lines:
            for line in lines:
                self._log.append(line.rstrip("\n"))
                if self._on_log:
                    # Whoever listens may have gone (rich answers a broken pipe with SystemExit). A server whose log
                    # nobody reads is killed by SIGPIPE.
                    with contextlib.suppress(Exception, SystemExit):
                        self._on_log(line.rstrip("\n"))

    def models(self) -> dict[str, bool]:
        """The models that the server has begun to load, by the log so far -> whether they are ready."""
        found = (match for line in list(self._log) if (match := _LOADING.search(line)))
        states: dict[str, bool] = {}
        for match in found:
            states[match["begun"] or match["done"]] = match["done"] is not None
        return states

    def wait_until_ready(
        self, timeout: float = 600.0, on_progress: Callable[[dict[str, bool]], None] = lambda _: None
    ) -> None:
        """Return when every model is ready; ServerError with the end of the log when that does not come about.

        `on_progress` is called with `models` again and again meanwhile.
        """
        while not self._is_ready():
            on_progress(self.models())
            if self._process.poll() is not None:
                raise self._failure(f"exited with status {self._process.returncode} before it was ready")
            if time.monotonic() - self._started > timeout:
                raise self._failure(f"was not ready within {timeout:.0f} s")
            time.sleep(READY_POLL_SECONDS)

    def _is_ready(self) -> bool:
        connection = http.client.HTTPConnection(self._reached_at, self.ports.http, timeout=5)
        try:
            connection.request("GET", "/v2/health/ready")
            return connection.getresponse().status == http.client.OK
        except (OSError, http.client.HTTPException):
            return False
        finally:
            connection.close()

    def _failure(self, what: str) -> ServerError:
        self.stop()
        log = self.log()
        heading, lines = "the end of its log", log
        if self._on_log:  # who listens has seen it all, and may not have found what matters
            heading, lines = "the errors in its log", [line for line in log if _ERROR.match(line)]
        message = f"tritonserver (pid {self.pid}) {what}"
        if lines:
            message = "\n".join([f"{message}; {heading}:", *(f"  | {line}" for line in lines[-LOG_LINES_SHOWN:])])
        reason = self._explain(log)
        return ServerError(f"{message}\n{reason}" if reason else message)

    def wait(self) -> int:
        """Wait for the server to end by itself; its exit status."""
        return self._process.wait()

    def send_signal(self, number: int) -> None:
        """Pass a signal on to tritonserver."""
        self._process.send_signal(number)

    def stop(self) -> None:
        """End the server: in order, then by force. Safe to call twice."""
        if self._stopped:  # its process group's id may be somebody else's by now
            return
        try:
            if self._process.poll() is None:
                self._process.send_signal(signal.SIGTERM)
                with contextlib.suppress(subprocess.TimeoutExpired):
                    self._process.wait(self._patience)
        finally:
            # Python backend stubs share the server's process group, and outlive it when it was killed.
            with contextlib.suppress(ProcessLookupError):
                os.killpg(self._process.pid, signal.SIGKILL)
            self._process.wait()
            self._log_reader.join(timeout=5)
            for region in SHARED_MEMORY.glob(f"{self._regions.name}*"):
                region.unlink(missing_ok=True)
            self._stopped = True
            if self._watcher is not None:
                self._watcher.kill()
                self._watcher.communicate()
