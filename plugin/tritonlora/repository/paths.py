# SPDX-FileCopyrightText: the tritonlora authors
# SPDX-License-Identifier: Apache-2.0
"""The paths of a model repository with a router in it, and functions that read the files there. It writes nothing.

`state.State` has the content of all of these files. `init` adds the router, and `add` adds adapters.
"""

from __future__ import annotations

import contextlib
import re
import shlex
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

from tritonlora.engine.cache_plan import CachePlan, Entry, host_pages, plan_cache
from tritonlora.engine.cpu_engine_settings import is_cpu_engine
from tritonlora.engine.profile import EngineProfile
from tritonlora.errors import AdapterTableError, ConfigError, RepositoryError, TritonLoraError
from tritonlora.files import TEMPORARY_SUFFIX, is_abandoned
from tritonlora.pbtxt.model_config import ModelConfig, parse_config
from tritonlora.repository import warmup
from tritonlora.serving.adapter_table import AdapterTable
from tritonlora.serving.adapter_table_json import REPAIR, parse
from tritonlora.serving.file_version import read_file
from tritonlora.targets import target_of

ROUTER = "lora_router"
RESOLVER = "lora_resolver"
LISTING = "lora_adapters"
TOKENS = "lora_tokens"  # the ensemble of the resolver and the engine alone, for clients with a tokenizer of their own
COPY_AGAIN = "copy the repository again, with what its links lead to: cp -rL"
WARMUP = "warmup"
SERVING = "serving"  # beside a model.py of tritonlora: a copy of the package that the model runs
FORMER_SERVING = "tritonlora"  # the name of that copy before version 0.2
DEFAULT_TARGET = "tensorrt_llm"
REPOSITORY_PATH = "repository_path"  # parameter of the router: the repository's path on the server


@dataclass(frozen=True, slots=True)
class Repository:
    """A model repository that has a router, and the model that the router forwards to."""

    root: Path
    target: str = DEFAULT_TARGET
    served_root: Path = Path()  # the path of `root` on the server

    @property
    def table_path(self) -> Path:
        """The path of adapters.json."""
        return self.root / ROUTER / "adapters.json"

    @property
    def target_directory(self) -> Path:
        """The directory of the engine's model."""
        return self.root / self.target

    @property
    def config_path(self) -> Path:
        """The config.pbtxt of the engine's model."""
        return self.target_directory / "config.pbtxt"

    @property
    def warmup_directory(self) -> Path:
        """The directory in which Triton looks for the files of warmup samples."""
        return self.target_directory / WARMUP

    def relative(self, path: Path) -> str:
        """`path` relative to the repository, in POSIX form, as in adapters.json."""
        return path.relative_to(self.root).as_posix()


def open_repository(root: Path) -> Repository:
    """The repository at `root`; RepositoryError when it has no router or no engine model."""
    require_directory(root)
    router_config = root / ROUTER / "config.pbtxt"
    if not router_config.is_file():
        raise RepositoryError(
            f"model repository {str(root)!r} has no {ROUTER!r}; put it there with: "
            f"tritonlora init {shlex.quote(str(root))}"
        )
    parameters = read_config(router_config).parameters
    target = parameters.get("target", DEFAULT_TARGET)
    repository = Repository(root, target, Path(parameters.get(REPOSITORY_PATH) or root.resolve()))
    if not repository.config_path.is_file():
        raise RepositoryError(f"model repository {str(root)!r} has no model {target!r} (no {repository.config_path})")
    return repository


def require_directory(root: Path) -> None:
    """RepositoryError when there is no directory at `root`."""
    if scheme := _REMOTE.match(str(root)):
        raise RepositoryError(
            f"a model repository must be a directory, and {scheme[1]}: is an object store; copy the repository to a "
            "disk, or mount it"
        )
    if not root.is_dir():
        found = "it is a file" if root.exists() else "there is nothing"
        raise RepositoryError(f"there is no model repository at {str(root)!r}: {found}; give its directory")


_REMOTE = re.compile(r"(s3|gs|as|https?):/")  # as tritonserver takes them; a path has one slash of two


def read_bytes(path: Path) -> bytes:
    """The content of a regular file; RepositoryError when it cannot be read."""
    try:
        return read_file(path)
    except OSError as error:
        raise RepositoryError(f"cannot read {path}: {error.strerror}") from None


def read_text(path: Path) -> str:
    """The text of a UTF-8 file, with its line ends unchanged; RepositoryError when it cannot be read."""
    try:
        return read_bytes(path).decode()
    except UnicodeDecodeError:
        raise RepositoryError(f"{path} is not UTF-8") from None


def read_config(path: Path) -> ModelConfig:
    """The meaning of a config.pbtxt; RepositoryError, naming the file, when it cannot be understood."""
    with naming(path):
        return parse_config(read_text(path))


@contextlib.contextmanager
def naming(path: Path) -> Iterator[None]:
    """Turn a ConfigError in the block into a RepositoryError that names the config.pbtxt."""
    try:
        yield
    except ConfigError as error:
        raise RepositoryError(f"{path}: {error}") from None


def read_table(repository: Repository) -> AdapterTable:
    """The table in adapters.json; AdapterTableError when it cannot be read.

    Without the file, the table is empty. If there are adapters' files, that is an error instead: their ids must not be
    used again.
    """
    try:
        text = read_file(repository.table_path).decode()
    except FileNotFoundError:
        found = [path for path in repository.warmup_directory.glob("*") if warmup.task_id_of(path.name)]
        if found:
            raise AdapterTableError(
                f"{repository.table_path} is missing, and there are adapters ({min(found)}); put it back from a "
                f"backup. To begin anew, delete {repository.warmup_directory}, add each adapter, and restart the server"
            ) from None
        return AdapterTable()
    except UnicodeDecodeError:
        raise AdapterTableError(f"{repository.table_path} is not UTF-8; {REPAIR}") from None
    except OSError as error:
        raise AdapterTableError(f"cannot read {repository.table_path}: {error.strerror}") from None
    try:
        return parse(text)
    except AdapterTableError as error:
        raise AdapterTableError(f"{repository.table_path}: {error}") from None


def engine_profile(repository: Repository, config: ModelConfig) -> EngineProfile | None:
    """What the target's engine accepts; None when the engine's config.json is not on this machine."""
    return target_of(config).profile(config, repository.target_directory)


def cache_pages(config: ModelConfig, profile: Callable[[], EngineProfile | None]) -> int | None:
    """The pages of the engine's LoRA cache; None when they are not known, or the target keeps adapters by itself.

    `profile` reads the engine's profile. `check` reports the problems of an engine that cannot be read.
    """
    try:
        found = profile() if target_of(config).WIRE.sends_weights else None
        return host_pages(found, config.parameters) if found else None
    except TritonLoraError:
        return None


def has_gpu_cache(config: ModelConfig) -> bool:
    """Whether the target's engine keeps adapters in GPU memory, in pages."""
    return target_of(config).WIRE.sends_weights and not is_cpu_engine(config.parameters)


def served_version(root: Path, model: str) -> str | None:
    """The version of tritonlora whose code a model runs; None when the model has no code of tritonlora."""
    directory = root / model / "1"
    if (directory / FORMER_SERVING).is_dir() and not (directory / SERVING).is_dir():
        return "0.1.0"
    try:
        return version_in(read_text(directory / SERVING / "__init__.py"))
    except RepositoryError:
        return None


def version_in(code: str) -> str | None:
    """The version that the text of a `serving/__init__.py` declares."""
    match = re.search(r'^__version__ = "([^"]+)"$', code, re.MULTILINE)
    return match[1] if match else None


def dead_links(root: Path) -> list[Path]:
    """Links to models' code that lead nowhere. This happens when a repository is copied out of its checkout."""
    links = (path / name for path in sorted(root.glob("*/1")) for name in (SERVING, FORMER_SERVING))
    return [link for link in links if link.is_symlink() and not link.exists()]


def half_written(root: Path) -> list[Path]:
    """Temporary files and directories that stopped commands have left in a model repository, sorted."""
    places = ("*", f"*/{WARMUP}", "*/1", f"*/1/{SERVING}", f"*/1/{FORMER_SERVING}")
    found = {path for place in places for path in root.glob(f"{place}/.*{TEMPORARY_SUFFIX}")}
    return sorted(path for path in found if is_abandoned(path))


def plan_of(
    repository: Repository,
    table: AdapterTable,
    config: ModelConfig,
    profile: EngineProfile | None,
    *,
    gpu_memory: int | None = None,
) -> CachePlan | None:
    """The cache plan of a repository's adapters; None when the engine is not known or its cache is not in pages."""
    kind = target_of(config)
    if profile is None or not profile.modules or not kind.WIRE.sends_weights:
        return None
    return plan_cache(plan_entries(repository, table, config), profile, config.parameters, gpu_memory=gpu_memory)


def plan_entries(repository: Repository, table: AdapterTable, config: ModelConfig) -> list[Entry]:
    """The registered adapters, as entries for `plan_cache`."""
    kind = target_of(config)
    return [
        Entry(name, kind.rows(repository.root, entry, None), entry.lora_weights_nbytes, entry.warm)
        for name, entry in sorted(table.entries.items())
    ]
