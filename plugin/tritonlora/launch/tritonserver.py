# SPDX-FileCopyrightText: the tritonlora authors
# SPDX-License-Identifier: Apache-2.0
"""Find a tritonserver, and build the command line that serves a model repository with it.

A tritonserver on PATH takes precedence. Otherwise the tritonserver inside the PyPI wheel `nvidia-pytriton` is used. The
wheel keeps the server, its shared libraries and a Python backend stub for each Python version in separate places. A
directory of symbolic links therefore puts them together first.
"""

from __future__ import annotations

import hashlib
import importlib.metadata
import importlib.util
import itertools
import os
import shutil
import sys
import sysconfig
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import platformdirs

from tritonlora import extras
from tritonlora.errors import ServerError, one_message
from tritonlora.machine import ENDPOINTS, LOCAL, Ports, is_ipv6

MPIRUN = "mpirun"
CONTROL_MODE = "--model-control-mode"
REGIONS = "tritonlora_"  # names of a server's regions in /dev/shm begin with this
EXIT_TIMEOUT_SECONDS = 30  # tritonserver's own default, for requests under way
_IPV6_SPELT = {"http": "ipv6:{}", "grpc": "[{}]", "metrics": "ipv6:{}"}  # http and metrics: libevhtp; grpc: gRPC
_OUR_OPTIONS = {
    **{f"--{kind}-port": f"give --{kind}-port before the --" for kind in ENDPOINTS},
    **{f"--{kind}-address": "give --address before the --" for kind in ENDPOINTS},
    "--allow-http": "leave it out, as tritonlora asks over HTTP whether the server is ready",
    **dict.fromkeys(
        ("--model-repository", "--model-store"),
        "adapters lie in the repository that has lora_router; put the other models into it",
    ),
}
"""Option that tritonlora itself gives tritonserver, since it has to know the value -> what the user does instead."""
_POLL = (
    "poll: Triton would load a second engine beside the first one at each change of config.pbtxt, as `add` makes it; "
    "leave it out, as new adapters are served without it"
)


@dataclass(frozen=True, slots=True)
class Tritonserver:
    """An installed tritonserver: the executable, with the arguments and environment variables that it needs."""

    executable: Path
    arguments: tuple[str, ...] = ()
    environment: Mapping[str, str] = field(default_factory=dict)


def find_tritonserver() -> Tritonserver:
    """The tritonserver on PATH, else in the wheel `nvidia-pytriton`. Raises ServerError if there is neither."""
    on_path = shutil.which("tritonserver")
    if on_path:
        return Tritonserver(Path(on_path))
    package = importlib.util.find_spec("pytriton")
    if package is None or package.origin is None:
        raise ServerError(
            "no tritonserver found on PATH, nor in the Python package nvidia-pytriton; "
            f"run inside a Triton container, or with Python 3.10 to 3.12: {extras.install('server')}"
        )
    return _embedded(Path(package.origin).parent)


def _embedded(package: Path) -> Tritonserver:
    """The tritonserver in the wheel whose `pytriton` package is in the directory `package`. Raises ServerError."""
    version = f"{sys.version_info.major}.{sys.version_info.minor}"
    triton = package / "tritonserver"
    backend = triton / "backends" / "python"
    members = {path.name: path for path in backend.glob("*") if path.is_file()}
    members["triton_python_backend_stub"] = triton / "python_backend_stubs" / version / "triton_python_backend_stub"
    # The stub reads numpy's structs by numpy 1's layout: under numpy 2 every output tensor silently arrives empty.
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
    # The stub embeds libpython, which takes its prefix from the first python3 on PATH: here the one that runs this.
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
    """Make `link` point to `target`, atomically: another process may do the same at the same time."""
    if link.is_symlink() and link.readlink() == target:
        return
    link.parent.mkdir(parents=True, exist_ok=True)
    temporary = link.with_name(f"{link.name}.{os.getpid()}")
    temporary.unlink(missing_ok=True)
    temporary.symlink_to(target)
    temporary.replace(link)


def check_extra(extra: Sequence[str]) -> None:
    """Raise ServerError, which names each of the user's tritonserver arguments that tritonlora has to set itself."""
    names = [word.partition("=")[0] for word in extra]
    problems = [f"{name!r}: {_OUR_OPTIONS[name]}" for name in names if name in _OUR_OPTIONS]
    if control_mode(extra) == "poll":
        problems.append(f"{CONTROL_MODE!r} {_POLL}")
    if problems:
        raise ServerError(one_message("not for tritonserver alone", problems))


def values_of(extra: Sequence[str], option: str) -> list[str]:
    """The values of an option among the arguments, written as --option=value or as two words."""
    found = ((word.partition("="), after) for word, after in itertools.pairwise([*extra, ""]))
    return [value if equals else after for (name, equals, value), after in found if name == option]


def control_mode(extra: Sequence[str]) -> str:
    """The model-control mode that the arguments set; "none" by default, as in Triton."""
    return next(reversed(values_of(extra, CONTROL_MODE)), "none")


@dataclass(frozen=True, slots=True)
class World:
    """The processes of one engine, each a tritonserver. The first one loads all models and takes the requests."""

    size: int = 1  # tensor-parallel times pipeline-parallel
    target: str = "tensorrt_llm"  # the only model that the other processes load


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
    """The command line that serves `repository` at `address`, a numeric address.

    As in TensorRT-LLM's scripts/launch_triton_server.py, the completion of configs is off, unless `complete_configs`,
    and mpirun starts one server for each process of an engine with several. `extra` comes last and overrides.
    """
    world = world or World()
    spelt = _IPV6_SPELT if is_ipv6(address) else dict.fromkeys(ENDPOINTS, "{}")
    address_arguments = [f"--{kind}-address={spelt[kind].format(address)}" for kind in ENDPOINTS]

    def one(rank: int) -> list[str]:
        prefix = shm_prefix if world.size == 1 else f"{shm_prefix or 'prefix'}{rank}_"
        return [
            str(tritonserver.executable),
            *tritonserver.arguments,
            f"--model-repository={repository.absolute()}",
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
