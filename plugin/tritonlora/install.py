# SPDX-FileCopyrightText: the tritonlora authors
# SPDX-License-Identifier: Apache-2.0
"""Put the router into a model repository, and lead its ensembles to it.

The router's files come before the ensembles that lead to it, so that the repository loads whenever this is stopped.
"""

from __future__ import annotations

import shutil
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from tritonlora import wiring
from tritonlora.adapters import AdapterTable, render
from tritonlora.errors import ConfigError, RepositoryError
from tritonlora.files import locked, write_text
from tritonlora.pbtxt import ModelConfig
from tritonlora.repository import DEFAULT_TARGET, ROUTER, read_config, read_text

# What the models import. The router's run inside a plain Triton container.
ROUTER_MODULES = ("__init__.py", "errors.py", "adapters.py", "routing.py")
TEXT_MODULES = ("__init__.py", "errors.py", "text.py", "tokenizer.py")
MODEL_MODULES = {"lora_router": ROUTER_MODULES, "preprocessing": TEXT_MODULES, "postprocessing": TEXT_MODULES}
NOT_SHIPPED = shutil.ignore_patterns("__pycache__", ".lock")


@dataclass(frozen=True, slots=True)
class FileChange:
    """One file that a command writes."""

    path: Path
    before: str | None  # None: it is new
    after: str


def shipped_models() -> Path:
    """The model repository that comes with tritonlora; RepositoryError when this installation has none."""
    path = Path(__file__).resolve().parents[2] / "model_repository"
    if not (path / ROUTER / "1" / "model.py").is_file():
        raise RepositoryError(
            f"this installation has no model_repository (looked at {path}); "
            "install tritonlora from a checkout with: pip install -e ."
        )
    return path


def create_repository(root: Path, parameters: Mapping[str, Mapping[str, str]] | None = None) -> None:
    """Copy the shipped repository, with the CPU engine, to `root`; RepositoryError when something is there already.

    `parameters` are set in the models' configs: model -> key -> value. Each model gets the package modules that it
    imports in place of the symbolic link of the checkout, so that the copy stands alone; the CPU engine needs the
    whole package to be installed.
    """
    if root.exists() and any(root.iterdir()):
        raise RepositoryError(f"{str(root)!r} is not empty; name a new directory")
    source = shipped_models()
    for model in sorted(path.name for path in source.iterdir() if path.is_dir()):
        destination = root / model
        shutil.copytree(source / model, destination, symlinks=True, ignore=NOT_SHIPPED)
        link = destination / "1" / "tritonlora"
        if link.is_symlink():
            link.unlink()
            _write_modules(link, MODEL_MODULES[model])
        for key, value in (parameters or {}).get(model, {}).items():
            config = destination / "config.pbtxt"
            write_text(config, wiring.set_parameter(read_text(config), key, value))


def _write_modules(package: Path, modules: Sequence[str]) -> None:
    package.mkdir()
    for module in modules:
        shutil.copyfile(Path(__file__).parent / module, package / module)


def plan_init(root: Path, target: str = DEFAULT_TARGET) -> list[FileChange]:
    """What `init` writes: the router in front of `target`, and the ensembles that now lead to it. Idempotent."""
    config_path = root / target / "config.pbtxt"
    if not config_path.is_file():
        raise RepositoryError(
            f"{str(root)!r} has no model {target!r} (no {config_path}); name the engine's model with --target"
        )
    engine_config = read_config(config_path)
    ensembles = _ensembles_of(root, target)
    if not ensembles:
        raise RepositoryError(f"no ensemble in {str(root)!r} has a step for {target!r}; there is nothing to rewire")
    changes = []
    takes_previous_ids = False
    for path, config in ensembles.items():
        postprocessing = next((s.model_name for s in config.steps if _takes_previous_tokens(root, s.model_name)), None)
        takes_previous_ids |= postprocessing is not None
        before = read_text(path)
        try:
            after = wiring.rewire_ensemble(before, target=target, router=ROUTER, postprocessing=postprocessing)
        except ConfigError as error:
            raise RepositoryError(f"{path}: {error}") from None
        changes.append(FileChange(path, before, after))
    try:
        router_config = wiring.router_config(
            engine_config, name=ROUTER, target_name=target, previous_ids=takes_previous_ids
        )
        # What somebody has tuned stays.
        for key, value in _router_parameters(root).items():
            router_config = wiring.set_parameter(router_config, key, value)
    except ConfigError as error:
        raise RepositoryError(f"{config_path}: {error}") from None
    files = {"config.pbtxt": router_config, "1/model.py": (shipped_models() / ROUTER / "1" / "model.py").read_text()}
    files |= {f"1/tritonlora/{name}": (Path(__file__).parent / name).read_text() for name in ROUTER_MODULES}
    if not (root / ROUTER / "adapters.json").exists():
        files["adapters.json"] = render(AdapterTable())
    for name, content in files.items():
        path = root / ROUTER / name
        changes.append(FileChange(path, read_text(path) if path.exists() else None, content))
    return [change for change in changes if change.before != change.after]


def init(root: Path, target: str = DEFAULT_TARGET, *, dry_run: bool = False) -> list[FileChange]:
    """Put the router into the model repository at `root`, and rewire its ensembles; the changes made, or to be made.

    The router's files come before the ensembles that lead to it, so that the repository loads whenever this stops.
    """
    if not root.is_dir():
        raise RepositoryError(f"there is no model repository at {str(root)!r}")
    changes = plan_init(root, target)
    if not dry_run and changes:
        (root / ROUTER).mkdir(exist_ok=True)
        with locked(root / ROUTER):
            changes = plan_init(root, target)
            for change in sorted(changes, key=lambda change: change.before is not None):
                change.path.parent.mkdir(parents=True, exist_ok=True)
                write_text(change.path, change.after)
    return changes


def _ensembles_of(root: Path, target: str) -> dict[Path, ModelConfig]:
    """The ensembles with a step for `target` or for the router."""
    configs = {path: read_config(path) for path in sorted(root.glob("*/config.pbtxt"))}
    return {
        path: config
        for path, config in configs.items()
        if any(step.model_name in (target, ROUTER) for step in config.steps)
    }


def _router_parameters(root: Path) -> dict[str, str]:
    """The parameters of the router that is there already, less the one that `init` sets."""
    path = root / ROUTER / "config.pbtxt"
    found = read_config(path).parameters if path.is_file() else {}
    return {key: value for key, value in found.items() if key != "target"}


def _takes_previous_tokens(root: Path, model: str) -> bool:
    path = root / model / "config.pbtxt"
    return path.is_file() and read_config(path).input("PREVIOUS_TOKENS") is not None
