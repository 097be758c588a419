# SPDX-FileCopyrightText: the tritonlora authors
# SPDX-License-Identifier: Apache-2.0
"""Take tritonlora out of a model repository again: every file as it was, byte for byte.

What was there before is kept in lora_router/1/originals, where tritonserver does not look: a copy of each file that
tritonlora changed, and written.json with the SHA-256 of what it wrote. Both are there before the file itself changes,
so that a command may be stopped at any instant. A file that somebody has edited since is never written over.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from pathlib import Path

from tritonlora import ensembles, warmup
from tritonlora.errors import RepositoryError, one_message
from tritonlora.files import (
    TEMPORARY_SUFFIX,
    delete,
    locked,
    place_for_models,
    temporary_directory,
    write_bytes,
    write_text,
)
from tritonlora.model_config import parse_config
from tritonlora.repository import (
    LISTING,
    RESOLVER,
    ROUTER,
    Repository,
    half_written,
    open_repository,
    read_configs,
    read_table,
    read_text,
)

ORIGINALS = Path(ROUTER, "1", "originals")
WRITTEN = ORIGINALS / "written.json"
OURS = (LISTING, RESOLVER, ROUTER)  # the models that come with init; the router, which has the originals, goes last
_NOT_RECORDED = {f"{ROUTER}/adapters.json", f"{ROUTER}/.lock"}

# File, relative to the repository -> SHA-256 of what tritonlora wrote last and of what it wrote before that. A command
# that is stopped in between leaves the older content.
Digests = dict[str, list[str]]


@dataclass(frozen=True, slots=True)
class FileChange:
    """One file that a command writes or deletes."""

    path: Path
    before: str | None  # None: it is new
    after: str | None  # None: it goes

    @property
    def kind(self) -> str:
        """ "wrote", "changed" or "removed"."""
        return "wrote" if self.before is None else "changed" if self.after is not None else "removed"


def begin(router: Path, contents: Mapping[Path, bytes]) -> None:
    """Keep the originals of whatever is written from now on. `contents` are the files of `router`, all of them new."""
    written = router / WRITTEN.relative_to(ROUTER)
    written.parent.mkdir()
    names = {f"{ROUTER}/{name.as_posix()}": content for name, content in contents.items()}
    digests = {name: [_digest(content)] for name, content in names.items() if name not in _NOT_RECORDED}
    write_text(written, _render(digests))


def record(root: Path, model: str, contents: Mapping[Path, bytes]) -> None:
    """Put on record the files of another model that is about to come, all of them new."""
    if (root / WRITTEN).is_file():
        names = {f"{model}/{name.as_posix()}": [_digest(content)] for name, content in contents.items()}
        write_text(root / WRITTEN, _render(_read_digests(root) | names))


def write(root: Path, contents: Mapping[Path, bytes]) -> None:
    """Write whole files of the repository at `root` so that `undo` can put back what was there.

    A file that has its content already is left alone, and no record made of it: it may be the user's own.
    """
    new = {path: content for path, content in contents.items() if _content_of(path) != content}
    if (root / WRITTEN).is_file():
        digests = _read_digests(root)
        recorded = {name: list(known) for name, known in digests.items()}
        for path, content in new.items():
            name = path.relative_to(root).as_posix()
            if name not in _NOT_RECORDED:
                _record(root, name, _content_of(path), content, digests)
        if digests != recorded:
            write_text(root / WRITTEN, _render(digests))
    for path, content in new.items():
        write_bytes(path, content)


def _record(root: Path, name: str, before: bytes | None, content: bytes, digests: Digests) -> None:
    """Put a file that is about to change on record, in `digests`, and keep its original."""
    known = digests.get(name)
    if known is None:
        digests[name] = [_digest(content)]
        if before is not None:
            (root / ORIGINALS / name).parent.mkdir(parents=True, exist_ok=True)
            write_bytes(root / ORIGINALS / name, before)
    # What somebody edited in between stays on record as edited.
    elif known[-1] != _digest(content) and (before is None or _is_known(root, name, before, known)):
        digests[name] = [*known, _digest(content)][-2:]


def plan_undo(root: Path) -> list[FileChange]:
    """What `undo` does; RepositoryError, naming every file, where it would lose something of the user's."""
    if not (root / WRITTEN).is_file():
        raise RepositoryError(
            f"there is nothing to undo: {str(root)!r} has no {WRITTEN}, which is there after `tritonlora init`"
        )
    table = read_table(Repository(root))
    if names := sorted([*table.entries, *table.aliases]):
        raise RepositoryError(
            f"adapters are registered; take them out first, with: tritonlora remove {' '.join(names)}"
        )
    digests = _read_digests(root)
    problems = [
        f"{name}: it is not of tritonlora's; move it elsewhere"
        for name in (path.relative_to(root).as_posix() for model in OURS for path in files_of(root, model))
        if name not in digests and name not in _NOT_RECORDED
    ]
    changes = []
    for name, written in digests.items():
        path, original = root / name, _original(root, name)
        before = _content_of(path)
        if before is None and original is not None:
            problems.append(f"{name}: it is gone; its original is {ORIGINALS / name}")
        elif before is not None and not _is_known(root, name, before, written):
            remedy = (
                "put your changes elsewhere and delete it" if original is None else f"copy {ORIGINALS / name} there"
            )
            problems.append(f"{name}: it was edited since; {remedy}")
        elif before != original:
            changes.append(FileChange(path, _text(before), _text(original)))
    if problems:
        raise RepositoryError(one_message("not everything can be put back as it was; nothing was changed", problems))
    return changes


def undo(root: Path, *, dry_run: bool = False) -> list[FileChange]:
    """Put every file back, and take the router out; what was, or would be, done.

    The engine's config comes before the ensembles, which meanwhile lead to the router, that takes all types; and each
    model goes in one step: so the repository loads whenever this stops.
    """
    changes = plan_undo(root)
    if dry_run:
        return changes
    with locked(root / ROUTER):
        _lead_past_resolver(root)
        for path in [*half_written(root), *_of_removed_adapters(root)]:
            delete(path)
        changes = plan_undo(root)
        models = [*_models_that_go(root, {change.path for change in changes if change.after is None}), *OURS]
        for change in sorted(changes, key=_step):
            original = _original(root, change.path.relative_to(root).as_posix())
            if original is not None:
                write_bytes(change.path, original)
            elif not any(change.path.is_relative_to(root / model) for model in models):
                change.path.unlink()
                _remove_if_empty(change.path.parent)
        take_out(root, models)
    return changes


def _of_removed_adapters(root: Path) -> list[Path]:
    """Their files, which stay for a while."""
    if not (root / ROUTER / "config.pbtxt").is_file():
        return []
    opened = open_repository(root)
    return warmup.files_of(opened.warmup_directory, read_table(opened).retired_lora_task_ids)


def _lead_past_resolver(root: Path) -> None:
    """Lead the ensembles that lead to the resolver to the router: Triton loads none from one type to another."""
    resolving = [path for path, config in read_configs(root).items() if config.leads_to(RESOLVER)]
    if resolving:
        target = open_repository(root).target
        forward = {path: ensembles.rewire_to_forward(read_text(path), target=target) for path in resolving}
        write(root, {path: text.encode() for path, text in forward.items()})


def _step(change: FileChange) -> int:
    """When it is done: what an ensemble leads to first, what nothing leads to any more last."""
    if change.after is None:
        return 2
    return int(change.path.name == "config.pbtxt" and bool(parse_config(change.after).steps))


def take_out(root: Path, models: Collection[str]) -> None:
    """Take these models out of the repository, each in one step."""
    with temporary_directory(place_for_models(root, models) / ROUTER) as doomed:
        for model in models:
            if (root / model).exists():
                (root / model).rename(doomed / model)


def _models_that_go(root: Path, gone: Collection[Path]) -> list[str]:
    """The other models of which no file stays."""
    names = sorted({path.relative_to(root).parts[0] for path in gone} - {*OURS})
    return [name for name in names if {file for file in (root / name).rglob("*") if file.is_file()} <= set(gone)]


def _render(digests: Digests) -> str:
    return json.dumps(digests, indent=2) + "\n"


def _read_digests(root: Path) -> Digests:
    try:
        digests: Digests = json.loads((root / WRITTEN).read_bytes())
    except (OSError, ValueError) as error:
        raise RepositoryError(f"cannot read {root / WRITTEN}: {error}") from None
    return digests


def _original(root: Path, name: str) -> bytes | None:
    return _content_of(root / ORIGINALS / name)


def _content_of(path: Path) -> bytes | None:
    return path.read_bytes() if path.is_file() else None


def _is_known(root: Path, name: str, content: bytes, written: list[str]) -> bool:
    """Whether `content` is what tritonlora wrote, or what was there before."""
    return _digest(content) in written or content == _original(root, name)


def files_of(root: Path, model: str) -> list[Path]:
    """What a model of ours consists of, sorted."""
    return sorted(
        path
        for path in (root / model).rglob("*")
        if path.is_file()
        and not path.is_relative_to(root / ORIGINALS)
        and "__pycache__" not in path.parts
        and not any(part.endswith(TEMPORARY_SUFFIX) for part in path.parts)
    )


def _remove_if_empty(directory: Path) -> None:
    if not any(directory.iterdir()):
        directory.rmdir()


def _digest(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()


def _text(content: bytes | None) -> str | None:
    return None if content is None else content.decode(errors="replace")
