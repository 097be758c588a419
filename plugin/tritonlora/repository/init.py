# SPDX-FileCopyrightText: the tritonlora authors
# SPDX-License-Identifier: Apache-2.0
"""Put the router and the resolver into a model repository, and lead its ensembles to one of them.

The models are written before the ensembles that lead to them. So the repository loads even if the command is stopped at
any instant.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path

from tritonlora.errors import RepositoryError, one_message
from tritonlora.files import (
    delete,
    locked,
    make_directory,
    place_for_models,
    sync_directory,
    temporary_directory,
    write_bytes,
    write_text,
    writing,
)
from tritonlora.pbtxt.model_config import ModelConfig, has_template, parse_config
from tritonlora.pbtxt.text_format import parse
from tritonlora.repository import ensemble_edits, model_configs, undo
from tritonlora.repository.paths import (
    COPY_AGAIN,
    DEFAULT_TARGET,
    LISTING,
    REPOSITORY_PATH,
    RESOLVER,
    ROUTER,
    SERVING,
    TOKENS,
    Repository,
    cache_pages,
    dead_links,
    half_written,
    naming,
    read_table,
    read_text,
    require_directory,
    version_in,
)
from tritonlora.repository.shipped import PACKAGE, code_of, shipped_models
from tritonlora.repository.state import Models
from tritonlora.repository.undo import OURS, WITH_CODE, FileChange
from tritonlora.serving.adapter_table import AdapterTable
from tritonlora.serving.adapter_table_json import render
from tritonlora.serving.wire import Wire
from tritonlora.targets import target_of

_BLS_TARGET = "tensorrt_llm_model_name"  # parameter of upstream's tensorrt_llm_bls: the model that it calls
_CALL_THE_DEFAULT_TARGET = frozenset({"whisper_bls"})  # models of upstream that call DEFAULT_TARGET without a parameter
ENSEMBLE = "ensemble"
FORWARD, RESOLVE = TOPOLOGIES = ("forward", "resolve")


def create_repository(root: Path, parameters: Mapping[str, Mapping[str, str]] | None = None) -> None:
    """Copy the shipped repository, with the CPU engine, to `root`. RepositoryError when `root` is not empty.

    `parameters` are set in the models' configs: model -> key -> value. Each model except the CPU engine gets a copy of
    the code that it runs, so that it does not need this installation. The CPU engine needs tritonlora to be installed.
    """
    if root.exists() and any(root.iterdir()):
        raise RepositoryError(f"{str(root)!r} is not empty; name a new directory")
    source = shipped_models()
    for model in sorted(path.name for path in source.iterdir() if path.is_dir()):
        shutil.copytree(source / model, root / model, ignore=shutil.ignore_patterns("__pycache__", ".lock", SERVING))
        if (root / model / "1" / "model.py").is_file() and model != DEFAULT_TARGET:
            shutil.copytree(PACKAGE / SERVING, root / model / "1" / SERVING, ignore=_NO_CACHES)
        if own := (parameters or {}).get(model):
            config = root / model / "config.pbtxt"
            write_text(config, model_configs.set_parameters(parse(read_text(config)), own).text)


_NO_CACHES = shutil.ignore_patterns("__pycache__")


def plan_init(
    root: Path, target: str | None = None, *, served_at: str | None = None, topology: str | None = None
) -> list[FileChange]:
    """The changes that `init` makes: the router in front of `target`, and the ensembles that lead to it.

    After `init`, a second call returns no changes.

    - `target` is by default the target of the present router, or else "tensorrt_llm".
    - `topology` is by default the present one. If there is none, it is "resolve" if the ensembles can use the resolver,
      and otherwise "forward".
    - A target that takes text, and to which no ensemble leads, gets an ensemble of its own.

    RepositoryError when a model of the repository does not allow it.
    """
    if links := dead_links(root):
        raise RepositoryError(one_message(f"links to models' code lead nowhere; {COPY_AGAIN}", map(str, links)))
    models = Models(root)
    target = _choose_target(models, target)
    engine_config = models.served_config(target)
    ensembles = _ensembles_of(models, target)
    obstacle = _why_not_resolve(target, engine_config, ensembles)
    if topology == RESOLVE and obstacle:
        raise RepositoryError(obstacle)
    resolves = (topology or _topology_of(models) or (FORWARD if obstacle else RESOLVE)) == RESOLVE
    changes = [*_rewired(models, target, target_of(engine_config).WIRE, ensembles, resolves=resolves)]
    files = _config_files(models, target, engine_config, ensembles, served_at=served_at, resolves=resolves)
    for model in WITH_CODE:
        files |= code_of(model)
    if not (root / ROUTER / "adapters.json").exists():
        is_new = not (root / ROUTER / "config.pbtxt").exists()  # else the table was lost, and with it the ids
        files[f"{ROUTER}/adapters.json"] = render(AdapterTable() if is_new else read_table(Repository(root, target)))
    for name, content in files.items():
        path = root / name
        changes.append(FileChange(path, read_text(path) if path.exists() else None, content))
    # Files that an earlier version wrote into these models, and this version does not write.
    unused = [root / name for name in undo.recorded(root) if name not in files and Path(name).parts[0] in OURS]
    changes += [FileChange(path, read_text(path), None) for path in unused if path.is_file()]
    return [change for change in changes if change.before != change.after]


def _rewired(
    models: Models, target: str, wire: Wire, ensembles: Mapping[str, ModelConfig], *, resolves: bool
) -> Iterator[FileChange]:
    """The ensembles that are there, led to the resolver or to the router."""
    for name, config in ensembles.items():
        before = models.document(name)
        with naming(models.path(name)):
            if resolves:
                announcing = _first_step(models, config, _can_announce)
                after = ensemble_edits.rewire_to_resolve(before, target=target, wire=wire, postprocessing=announcing)
            else:
                decoding = _first_step(models, config, _takes_previous_tokens)
                after = ensemble_edits.rewire_to_forward(before, target=target, postprocessing=decoding)
        yield FileChange(models.path(name), before.text, after.text)


def _config_files(
    models: Models,
    target: str,
    engine_config: ModelConfig,
    ensembles: Mapping[str, ModelConfig],
    *,
    served_at: str | None,
    resolves: bool,
) -> dict[str, str]:
    """The config.pbtxt files of tritonlora's own models and ensembles: path in the repository -> content."""
    previous_ids = any(_first_step(models, config, _takes_previous_tokens) for config in ensembles.values())
    files = {f"{LISTING}/config.pbtxt": read_text(shipped_models() / LISTING / "config.pbtxt")}
    with naming(models.path(target)):
        files[f"{ROUTER}/config.pbtxt"] = _router_config(
            models, target, engine_config, previous_ids=previous_ids, served_at=served_at
        )
        files[f"{RESOLVER}/config.pbtxt"] = _resolver_config(models, target, engine_config)
        tokens = model_configs.target_ensemble(engine_config, name=TOKENS, target_name=target, router=ROUTER)
        text = model_configs.text_ensemble(engine_config, name=ENSEMBLE, target_name=target)
    if _why_past_the_resolver(target, engine_config):
        return files
    own = {TOKENS: tokens}
    if text and not ensembles and not (models.root / ENSEMBLE).exists():
        own[ENSEMBLE] = text
    for name, config in own.items():
        ensemble = ensemble_edits.rewire_to_resolve(parse(config), target=target, wire=target_of(engine_config).WIRE)
        if name == ENSEMBLE and not resolves:
            ensemble = ensemble_edits.rewire_to_forward(ensemble, target=target)
        files |= {f"{name}/1/.gitkeep": "", f"{name}/config.pbtxt": ensemble.text}
    return files


def topology_of(root: Path) -> str | None:
    """The topology of a repository's ensembles: "resolve", "forward", or None if they lead to neither model."""
    return _topology_of(Models(root))


def _topology_of(models: Models) -> str | None:
    configs = [config for name, config in models.configs().items() if name != TOKENS]
    for topology, model in ((RESOLVE, RESOLVER), (FORWARD, ROUTER)):
        if any(config.leads_to(model) for config in configs):
            return topology
    return None


def _cache_parameters(models: Models, target: str, engine_config: ModelConfig) -> dict[str, str]:
    """The parameter cache_pages of the router and the resolver, if the size of the engine's cache is known."""
    directory = models.path(target).parent
    pages = cache_pages(engine_config, lambda: target_of(engine_config).profile(engine_config, directory))
    return {"cache_pages": str(pages)} if pages else {}


def _router_config(
    models: Models, target: str, engine_config: ModelConfig, *, previous_ids: bool, served_at: str | None
) -> str:
    """The router's config.pbtxt, with the streams and the parameters that the user has tuned."""
    tuned = models.present(ROUTER)
    streams = {"max_streams": tuned.instance_count} if tuned and isinstance(tuned.instance_count, int) else {}
    text = model_configs.router_config(
        engine_config, name=ROUTER, target_name=target, resolver=RESOLVER, previous_ids=previous_ids, **streams
    )
    kept = {key: value for key, value in _tuned_parameters(tuned).items() if key not in _ROUTER_HAD}
    return _with_parameters(text, kept | ({REPOSITORY_PATH: served_at} if served_at else {}))


def _resolver_config(models: Models, target: str, engine_config: ModelConfig) -> str:
    """The resolver's config.pbtxt, with the parameters that the user has tuned, and the size of the engine's cache."""
    text = model_configs.resolver_config(engine_config, name=RESOLVER, target_name=target, router=ROUTER)
    tuned = _tuned_parameters(models.present(ROUTER)) | _tuned_parameters(models.present(RESOLVER))
    kept = {key: value for key, value in tuned.items() if key in _RESOLVER_TUNABLE}
    return _with_parameters(text, kept | _cache_parameters(models, target, engine_config))


# The router of an earlier version had the first three.
_ROUTER_HAD = {"cache_full_timeout_seconds", "load_timeout_seconds", "cache_pages"}
_RESOLVER_TUNABLE = {*_ROUTER_HAD, "refresh_seconds"}


def _with_parameters(text: str, parameters: Mapping[str, str]) -> str:
    return model_configs.set_parameters(parse(text), parameters).text


def init(
    root: Path,
    target: str | None = None,
    *,
    served_at: str | None = None,
    topology: str | None = None,
    dry_run: bool = False,
) -> list[FileChange]:
    """Put the router into the model repository at `root`, and rewire its ensembles. Returns the changes.

    `served_at` is the path of the repository on the server, if it differs from `root`, as in a container. With
    `dry_run` nothing is written.

    A model is added in one step, before the ensembles that lead to it. So the repository loads even if the command is
    stopped at any instant.
    """
    require_directory(root)
    changes = plan_init(root, target, served_at=served_at, topology=topology)
    if dry_run or not changes:
        return changes
    if not (root / ROUTER).exists():  # the router's directory has the lock
        _add_model(ROUTER, root, changes)
    with locked(root / ROUTER):
        for path in half_written(root):
            delete(path)
        planned = plan_init(root, target, served_at=served_at, topology=topology)
        for model in (LISTING, RESOLVER, TOKENS, ENSEMBLE):
            is_new = any(change.after is not None and change.path.is_relative_to(root / model) for change in planned)
            if is_new and not (root / model).exists():
                _add_model(model, root, planned)
        ordered = sorted(planned, key=_step)
        undo.write(root, {one.path: one.after.encode() for one in ordered if one.after is not None})
        undo.delete_recorded(root, [change.path for change in planned if change.after is None])
    return changes


def init_copy(
    root: Path,
    output: Path,
    target: str | None = None,
    *,
    served_at: str | None = None,
    topology: str | None = None,
) -> list[FileChange]:
    """Do what `init` does with a copy of the model repository, which is then at `output`. Returns the changes.

    `output` appears whole or not at all. RepositoryError where there is something already. Links are copied as links.
    """
    require_directory(root)
    if os.path.lexists(output):
        raise RepositoryError(f"{str(output)!r} exists; name a new directory for the copy")
    try:
        with temporary_directory(output) as parent:
            copy = parent / "copy"
            shutil.copytree(root, copy, symlinks=True)
            changes = init(copy, target, served_at=served_at, topology=topology)
            copy.rename(output)
            sync_directory(output.parent)
    except OSError as error:
        raise RepositoryError(f"cannot copy {root} to {output}: {error.strerror or error}") from None
    return [replace(change, path=output / change.path.relative_to(copy)) for change in changes]


def _step(change: FileChange) -> int:
    """The order of writing: new files (0), changed files (1), and then the ensembles (2), which need the models."""
    is_ensemble = change.path.name == "config.pbtxt" and bool(parse_config(change.after or "").steps)
    return 0 if change.before is None else 2 if is_ensemble else 1


def _add_model(model: str, root: Path, changes: Sequence[FileChange]) -> None:
    """Make a model's directory inside another model's, where Triton takes it for no model, and move it into place."""
    contents = {
        change.path.relative_to(root / model): (change.after or "").encode()
        for change in changes
        if change.path.is_relative_to(root / model)
    }
    with writing(root), temporary_directory(place_for_models(root) / model) as directory:
        for name, content in contents.items():
            make_directory((directory / name).parent)
            write_bytes(directory / name, content)
        if model == ROUTER:
            undo.begin(directory, contents)
        else:
            undo.record(root, model, contents)
        try:
            directory.rename(root / model)
        except OSError:  # another `init` may have been faster
            if not (root / model).exists():
                raise
        else:
            sync_directory(root)


def versions(changes: Sequence[FileChange]) -> dict[str, tuple[str, str]]:
    """Model -> the version of tritonlora whose code the model ran before `changes`, and the version after them."""
    found = {}
    for change in changes:
        if change.path.parts[-2:] == (SERVING, "__init__.py"):
            old, new = (version_in(text or "") for text in (change.before, change.after))
            if old and new and old != new:
                found[change.path.parts[-4]] = (old, new)
    return found


def notes(root: Path, changes: Sequence[FileChange] = ()) -> list[str]:
    """Notes for the user after `init` on `root`, one line each. `changes` are those that `init` made."""
    models = Models(root)
    router = models.config(ROUTER)
    target = router.parameters.get("target", DEFAULT_TARGET)
    found = _ensembles_of(models, target)
    lines = [] if found else [f"no ensemble has a step for {target!r}: clients send their tokens to {ROUTER!r}"]
    resolver = models.present(RESOLVER)
    if _topology_of(models) == RESOLVE and resolver and resolver.parameters.get("cache_pages", "0") == "0":
        lines.append(
            "the size of the engine's cache is not known, so each request waits for a load of its own: run tritonlora "
            "plan --apply where the engine's config.json is"
        )
    lines += _inputs_gone(changes)
    return lines + [
        f"{name!r} calls {target!r} itself and takes no lora_name: clients that want adapters ask "
        + (" or ".join(map(repr, found)) or repr(ROUTER))
        for name in models_past_the_router(models.configs(), target)
    ]


def _inputs_gone(changes: Sequence[FileChange]) -> list[str]:
    """A line for each ensemble that lost inputs. Upstream's ensembles take an adapter's tensors from v0.16 on."""
    lines = []
    for change in changes:
        if change.path.name == "config.pbtxt" and change.before is not None and change.after is not None:
            before, after = parse_config(change.before), parse_config(change.after)
            gone = [spec.name for spec in before.inputs if after.input(spec.name) is None]
            if gone and after.steps:
                lines.append(
                    f"{change.path.parent.name!r} no longer takes {', '.join(gone)}: Triton refuses a request that "
                    "sends them, and its generate endpoint drops them; clients that sent an adapter's weights send "
                    "its lora_name, once it was registered with tritonlora add"
                )
    return lines


def models_past_the_router(configs: Mapping[str, ModelConfig], target: str) -> list[str]:
    """The models that call the engine's model by BLS, and so do not go through the router.

    No config can lead upstream's tensorrt_llm_bls through the router: it does not forward the input lora_name.
    Upstream's whisper_bls calls tensorrt_llm by this name, which is in its code.
    """
    called = {name: config.parameters.get(_BLS_TARGET) for name, config in configs.items()}
    called |= dict.fromkeys(_CALL_THE_DEFAULT_TARGET & configs.keys(), "")
    return [
        name
        for name, value in called.items()
        if value is not None and (value == target or (target == DEFAULT_TARGET and (not value or has_template(value))))
    ]


def _choose_target(models: Models, asked: str | None) -> str:
    """The name of the engine's model.

    RepositoryError when it is not there, when the router has another target, or when one of our names is taken.
    """
    root, router = models.root, models.present(ROUTER)
    present = router.parameters.get("target", "") if router else None
    others = {model: models.present(model) for model in (LISTING, RESOLVER, TOKENS)}
    foreign = {ROUTER: present == ""} | {
        model: config is not None and not config.parameters.get("router") for model, config in others.items()
    }
    for model, is_foreign in foreign.items():
        if is_foreign:
            raise RepositoryError(
                f"{str(root)!r} has a model {model!r} that tritonlora did not write; rename that model first"
            )
    if asked and present and asked != present:
        raise RepositoryError(
            f"the router of {str(root)!r} stands before {present!r}, and one repository has one router; "
            f"serve {asked!r} from another repository, or take the router out with: tritonlora init --undo {root}"
        )
    target = asked or present or DEFAULT_TARGET
    if not models.path(target).is_file():
        candidates = [
            repr(name)
            for name, config in models.configs().items()
            if not config.steps
            and not target_of(config).WIRE.missing([spec.name for spec in config.inputs])
            and _BLS_TARGET not in config.parameters
        ]
        raise RepositoryError(
            f"{str(root)!r} has no model {target!r} (no {models.path(target)}); "
            f"name the engine's model with --target{': ' if candidates else ''}{', '.join(candidates)}"
        )
    return target


def _ensembles_of(models: Models, target: str) -> dict[str, ModelConfig]:
    """The ensembles with a step for `target` or the router. RepositoryError when all ensembles lead to other models."""
    candidates = {name: config for name, config in models.configs().items() if config.steps and name != TOKENS}
    found = {
        name: config
        for name, config in candidates.items()
        if any(step.model_name in (target, ROUTER) for step in config.steps)
    }
    if candidates and not found:
        names = ", ".join(map(repr, candidates))
        raise RepositoryError(
            f"no ensemble of {names} has a step for {target!r}; name the engine's model with --target"
        )
    return found


def _tuned_parameters(config: ModelConfig | None) -> dict[str, str]:
    """The parameters of a present model that stay: all except those that `init` sets. {} without such a model."""
    parameters = config.parameters if config else {}
    return {key: value for key, value in parameters.items() if key not in ("target", "router", "resolver")}


def _first_step(models: Models, ensemble: ModelConfig, has: Callable[[ModelConfig], bool]) -> str | None:
    """The name of the first model in an ensemble for whose config `has` is true, or None."""
    configs = {step.model_name: models.present(step.model_name) for step in ensemble.steps}
    return next((name for name, config in configs.items() if config is not None and has(config)), None)


def _can_announce(config: ModelConfig) -> bool:
    return config.output(ensemble_edits.ANNOUNCEMENT) is not None


def _takes_previous_tokens(config: ModelConfig) -> bool:
    return config.input("PREVIOUS_TOKENS") is not None


def _why_not_resolve(target: str, engine: ModelConfig, ensembles: Mapping[str, ModelConfig]) -> str:
    """The reason why the resolve topology is not possible; "" when it is possible."""
    if not ensembles and target_of(engine).ENSEMBLE_INPUTS is None:
        return f"the resolve topology needs an ensemble with a step for {target!r}, and there is none"
    return _why_past_the_resolver(target, engine)


def _why_past_the_resolver(target: str, engine: ModelConfig) -> str:
    """The reason why no ensemble can lead through the resolver to this engine; "" when one can."""
    wire = target_of(engine).WIRE
    required = engine.input(wire.required)
    if required is None or required.optional:
        return f"the resolve topology needs {target!r} to have the input {wire.required}, which must not be optional"
    if wire.sends_weights and engine.max_batch_size == 0:
        return f"the resolve topology needs {target!r} to have a max_batch_size above 0"
    return ""
