# SPDX-FileCopyrightText: the tritonlora authors
# SPDX-License-Identifier: Apache-2.0
"""Take tritonlora out of a model repository again: every file becomes as it was before, byte for byte.

The directory lora_router/1/originals, where tritonserver does not look, has a copy of each file before tritonlora
changed it. Its written.json has the SHA-256 of each content that tritonlora wrote. Both are written before the file
itself changes, so that a command may be stopped at any instant. A file that the user has edited since is never
overwritten.

tritonlora keeps this record itself, because no library keeps one that survives a stopped command. git would need its
program in every container, and would interfere with a git repository of the user.

Anybody who can write to the repository can write the record. So it is checked like any input: a name that is no file
inside a model is refused, and so is a path that leads out of the repository.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import shutil
from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

from tritonlora import strict_json
from tritonlora.errors import ConfigError, RepositoryError, one_message
from tritonlora.files import (
    TEMPORARY_SUFFIX,
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
from tritonlora.pbtxt.differences import differences
from tritonlora.pbtxt.model_config import parse_config
from tritonlora.repository import ensemble_edits
from tritonlora.repository.paths import (
    LISTING,
    RESOLVER,
    ROUTER,
    TOKENS,
    Repository,
    half_written,
    open_repository,
    read_bytes,
    read_table,
)
from tritonlora.repository.state import Models, named_by_samples, outlived, read_state
from tritonlora.serving.file_version import has_content, read_file

ORIGINALS = Path(ROUTER, "1", "originals")
WRITTEN = ORIGINALS / "written.json"
# The models that `init` adds, in the order in which they go: each after the models that lead to it. The router has the
# originals, and goes last.
WITH_CODE = (LISTING, RESOLVER, ROUTER)
OURS = (TOKENS, *WITH_CODE)
NOTHING_CHANGED = "not everything can be put back as it was; nothing was changed"
_NOT_RECORDED = {f"{ROUTER}/adapters.json", f"{ROUTER}/.lock"}
_MOST_NBYTES = 64 << 20  # of written.json, which takes a hundred bytes for each adapter that was ever warm
_DIGEST = re.compile(r"[0-9a-f]{64}")

# File, relative to the repository -> the SHA-256 of the last one or two contents that tritonlora wrote, the last one at
# the end. A command that is stopped before it writes the file leaves the older content.
Digests = dict[str, list[str]]


@dataclass(frozen=True, slots=True)
class FileChange:
    """One file that a command writes or deletes."""

    path: Path
    before: str | None  # None: the file is new
    after: str | None  # None: the file is deleted

    @property
    def kind(self) -> str:
        """ "wrote", "changed" or "removed"."""
        return "wrote" if self.before is None else "changed" if self.after is not None else "removed"

    def settings(self) -> list[str]:
        """The settings of a changed config.pbtxt that differ, "what: old -> new"; [] for any other file."""
        if self.path.name != "config.pbtxt" or self.before is None or self.after is None:
            return []
        try:
            return [*differences(parse_config(self.before), parse_config(self.after))]
        except ConfigError:  # the file before was malformed
            return []


# The record


def begin(router: Path, contents: Mapping[Path, bytes]) -> None:
    """Begin the record in the new directory `router`, whose files will be `contents`."""
    written = router / WRITTEN.relative_to(ROUTER)
    make_directory(written.parent)
    names = {f"{ROUTER}/{name.as_posix()}": content for name, content in contents.items()}
    digests = {name: [_digest(content)] for name, content in names.items() if name not in _NOT_RECORDED}
    write_text(written, _render(digests))


def record(root: Path, model: str, contents: Mapping[Path, bytes]) -> None:
    """Record the files of another new model, before the model is added."""
    if os.path.lexists(root / WRITTEN):
        names = {f"{model}/{name.as_posix()}": [_digest(content)] for name, content in contents.items()}
        write_text(root / WRITTEN, _render(_read_digests(root) | names))


def write(root: Path, contents: Mapping[Path, bytes]) -> None:
    """Write whole files of the repository at `root`, in this order, so that `undo` can restore the files before.

    All digests are recorded first, in one write. A file that has its content already is neither written nor recorded:
    it may be the user's own.
    """
    new = {path: content for path, content in contents.items() if not has_content(path, content)}
    if os.path.lexists(root / WRITTEN):
        digests = _read_digests(root)
        recorded = {name: list(known) for name, known in digests.items()}
        for path, content in new.items():
            name = path.relative_to(root).as_posix()
            if name not in _NOT_RECORDED:
                _record(root, name, content, digests)
        if digests != recorded:
            write_text(root / WRITTEN, _render(digests))
    for path, content in new.items():
        make_directory(path.parent)
        write_bytes(path, content)


def recorded(root: Path) -> list[str]:
    """The files that tritonlora wrote and that were not edited since, relative to the repository."""
    if not os.path.lexists(root / WRITTEN):
        return []
    digests = _read_digests(root)
    contents = {name: _content_of(root / name) for name in digests}
    return [name for name, content in contents.items() if content and _digest(content) in digests[name]]


def delete_recorded(root: Path, paths: Collection[Path]) -> None:
    """Delete files that only tritonlora ever wrote, and remove them from the record."""
    if not paths:
        return
    for path in paths:
        delete(path)
    for directory in sorted({path.parent for path in paths}, reverse=True):
        shutil.rmtree(directory / "__pycache__", ignore_errors=True)
        if directory.is_dir() and not any(directory.iterdir()):
            directory.rmdir()
    names = {path.relative_to(root).as_posix() for path in paths}
    digests = _read_digests(root)
    write_text(root / WRITTEN, _render({name: known for name, known in digests.items() if name not in names}))


def _record(root: Path, name: str, content: bytes, digests: Digests) -> None:
    """Add a file that is about to get `content` to `digests`, and keep a copy of its original."""
    known, before = digests.get(name), _content_of(root / name)
    if known is None:
        digests[name] = [_digest(content)]
        if before is not None:
            original = root / ORIGINALS / name
            make_directory(original.parent)
            write_bytes(original, before, like=root / name)
    # A file that the user edited in between gets no new digest, so that it still counts as edited.
    elif known[-1] != _digest(content) and (before is None or _is_known(before, _original(root, name), known)):
        digests[name] = [*known, _digest(content)][-2:]


def _render(digests: Digests) -> str:
    return json.dumps(digests, indent=2) + "\n"


def _read_digests(root: Path) -> Digests:
    """The content of written.json; RepositoryError with everything in it that tritonlora never writes."""
    path = root / WRITTEN
    try:
        document, repeated = strict_json.parse(read_file(path, _MOST_NBYTES, follow=False))
    except OSError as error:
        raise RepositoryError(f"cannot read {path}: {error.strerror}") from None
    except (ValueError, RecursionError) as error:
        problems = [f"it is not JSON: {error}"]
    else:
        problems = ["a file stands in it twice"] if repeated else list(_problems_of(document))
    if problems:
        raise RepositoryError(one_message(f"{path} is not as tritonlora wrote it; put it back from a backup", problems))
    digests: Digests = document
    return digests


def _problems_of(document: object) -> Iterator[str]:
    if not isinstance(document, dict):
        yield f"expected an object, from files to digests, got {type(document).__name__}"
        return
    for name, digests in document.items():
        parts = name.split("/")
        if len(parts) < 2 or {"", ".", ".."}.intersection(parts) or "\0" in name:
            yield f"{name!r}: expected the path of a file in a model of this repository, relative to it"
        elif name in _NOT_RECORDED or Path(name).is_relative_to(ORIGINALS):
            yield f"{name!r}: it is no file that init --undo puts back"
        if (
            not isinstance(digests, list)
            or not 1 <= len(digests) <= 2
            or not all(isinstance(one, str) and _DIGEST.fullmatch(one) for one in digests)
        ):
            yield f"{name!r}: expected one or two SHA-256 digests"


# Undoing


def plan_undo(root: Path) -> list[FileChange]:
    """The changes that `undo` makes. RepositoryError, naming every file, when it would lose something of the user's."""
    if not os.path.lexists(root / WRITTEN):
        raise RepositoryError(
            f"there is nothing to undo: {str(root)!r} has no {WRITTEN}, which is there after `tritonlora init`"
        )
    digests = _read_digests(root)
    table = read_table(Repository(root))
    if names := sorted([*table.entries, *table.aliases]):
        raise RepositoryError(
            f"adapters are registered; take them out first, with: tritonlora remove {' '.join(names)}"
        )
    problems = [
        f"{name}: tritonlora did not write it; move it elsewhere"
        for name in (path.relative_to(root).as_posix() for model in OURS for path in _all_in(root, model))
        if name not in digests and name not in _NOT_RECORDED
    ]
    problems += [f"{model}: it is a link; put the directory there" for model in OURS if (root / model).is_symlink()]
    changes = []
    for name, written in digests.items():
        path, original = root / name, _original(root, name)
        before = _content_of(path)
        if before == original:
            continue
        if before is None:
            problems.append(f"{name}: it is gone; its original is {ORIGINALS / name}")
        elif not _is_known(before, original, written):
            remedy = (
                "put your changes elsewhere and delete it" if original is None else f"copy {ORIGINALS / name} there"
            )
            problems.append(f"{name}: it was edited since; {remedy}")
        elif not _is_inside(root, path):
            remedy = "delete it" if original is None else f"copy {ORIGINALS / name} there"
            problems.append(f"{name}: a link leads to it, out of the repository: {path.resolve()}; {remedy} yourself")
        else:
            changes.append(FileChange(path, _text(before), _text(original)))
    gone = {change.path for change in changes if change.after is None}
    stay = {path.relative_to(root).parts[0] for path in gone} - {*OURS, *_models_that_go(root, gone)}
    for model in sorted(stay):
        if root / model / "config.pbtxt" in gone:
            other = min({*_not_directories(root / model)} - gone).relative_to(root)
            problems.append(
                f"{model}/config.pbtxt would go, and {other} stay: move {other} elsewhere, or, if the config was there "
                f"before tritonlora, put {ORIGINALS / model / 'config.pbtxt'} back from a backup"
            )
    if problems:
        raise RepositoryError(one_message(NOTHING_CHANGED, problems))
    return changes


def undo(root: Path, *, dry_run: bool = False) -> list[FileChange]:
    """Restore every file, and take the router out. Returns the changes that were made, or would be with `dry_run`.

    The ensembles lead to the router, which takes all types, until the engine's config is restored. Each model is
    removed in one step. So the repository loads even if this is stopped at any instant. The same call again completes
    it. RepositoryError when a file cannot be written or deleted.
    """
    if not os.path.lexists(root / ROUTER) and (left := half_written(root)):  # a stopped undo had only these left
        with writing(root):
            for path in left if not dry_run else ():
                delete(path)
        return [FileChange(path, "", None) for path in left]
    changes = plan_undo(root)
    if dry_run:
        return changes
    with locked(root / ROUTER):
        planned = plan_undo(root)
        take_out(root, [TOKENS])  # it leads to the resolver, and has no other use
        _lead_past_resolver(root)
        for path in half_written(root):
            delete(path)
        changes = plan_undo(root)
        models = [*_models_that_go(root, {change.path for change in changes if change.after is None}), *OURS]
        for change in sorted(changes, key=_step):
            original = _original(root, change.path.relative_to(root).as_posix())
            if original is not None:
                write_bytes(change.path, original)
        # A model that goes is moved as a whole below. A file that a sample of the user's own names has to stay.
        alone = [one.path for one in changes if one.after is None and one.path.relative_to(root).parts[0] not in models]
        for path in {*alone} - (named_by_samples(Models(root)) if alone else set()):
            path.unlink()
        for path in _of_removed_adapters(root):
            delete(path)
        for name in _read_digests(root):
            _remove_if_empty(root, (root / name).parent, models)
        take_out(root, models)
    return planned


def _of_removed_adapters(root: Path) -> list[Path]:
    """The files of removed adapters that no command has deleted yet."""
    if not (root / ROUTER / "config.pbtxt").is_file():
        return []
    return outlived(read_state(open_repository(root)))


def _lead_past_resolver(root: Path) -> None:
    """Lead the ensembles from the resolver to the router.

    Triton refuses an ensemble that connects tensors of different types. The router takes all types.
    """
    models = Models(root)
    resolving = [name for name, config in models.configs().items() if config.leads_to(RESOLVER)]
    if resolving:
        target = open_repository(root).target
        forward = {name: ensemble_edits.rewire_to_forward(models.document(name), target=target) for name in resolving}
        write(root, {models.path(name): after.text.encode() for name, after in forward.items()})


def _step(change: FileChange) -> int:
    """The order of changes: models (0), then the ensembles that lead to them (1), then deletions (2)."""
    if change.after is None:
        return 2
    return int(change.path.name == "config.pbtxt" and bool(parse_config(change.after).steps))


def take_out(root: Path, models: Collection[str]) -> None:
    """Take these models out of the repository, each in one step. OSError when a file of theirs cannot be deleted."""
    with temporary_directory(place_for_models(root, models) / ROUTER) as doomed:
        for model in models:
            if os.path.lexists(root / model):
                (root / model).rename(doomed / model)
        sync_directory(root)
    delete(doomed)  # raises OSError if a file in it could not be deleted


def _models_that_go(root: Path, gone: Collection[Path]) -> list[str]:
    """The models besides OURS of which no file stays."""
    names = sorted({path.relative_to(root).parts[0] for path in gone} - {*OURS})
    return [name for name in names if {*_not_directories(root / name)} <= {*gone}]


def _original(root: Path, name: str) -> bytes | None:
    path = root / ORIGINALS / name
    if not os.path.lexists(path):
        return None
    if path.resolve() != root.resolve() / ORIGINALS / name:
        raise RepositoryError(f"{path} is a link, or in a directory that is one; put the original itself there")
    return read_bytes(path)


def text_of(path: Path) -> str | None:
    """The text of a file, with marks for bytes that are not UTF-8; None when there is no such file."""
    return _text(_content_of(path))


def _content_of(path: Path) -> bytes | None:
    return read_bytes(path) if path.exists() else None


def _is_known(content: bytes, original: bytes | None, written: list[str]) -> bool:
    """Whether `content` is a recorded content of tritonlora, or the original."""
    return content == original or _digest(content) in written


def _is_inside(root: Path, path: Path) -> bool:
    return path.resolve().is_relative_to(root.resolve())


def files_of(root: Path, model: str) -> list[Path]:
    """The files of one of tritonlora's models, sorted."""
    return [path for path in _all_in(root, model) if path.is_file()]


def _all_in(root: Path, model: str) -> list[Path]:
    """The files and links in one of tritonlora's models, without originals, temporary files and Python's caches."""
    return sorted(
        path
        for path in _not_directories(root / model)
        if not path.is_relative_to(root / ORIGINALS)
        and "__pycache__" not in path.parts
        and not any(part.endswith(TEMPORARY_SUFFIX) for part in path.parts)
    )


def _not_directories(directory: Path) -> Iterator[Path]:
    return (path for path in directory.rglob("*") if path.is_symlink() or not path.is_dir())


def _remove_if_empty(root: Path, directory: Path, models: Collection[str]) -> None:
    """Delete an empty directory that tritonlora may have made. Directories of `models` are moved as a whole later."""
    model = directory.relative_to(root).parts[0]
    if model not in models and directory.is_dir() and _is_inside(root, directory) and not any(directory.iterdir()):
        directory.rmdir()


def _digest(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()


def _text(content: bytes | None) -> str | None:
    return None if content is None else content.decode(errors="replace")
