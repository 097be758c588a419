# SPDX-FileCopyrightText: the tritonlora authors
# SPDX-License-Identifier: Apache-2.0
"""Model repositories with the CPU engine, for tests."""

from __future__ import annotations

import json
import os
import re
import shutil
import tarfile
from collections.abc import Iterable, Mapping
from dataclasses import replace
from pathlib import Path

import torch
import yaml

from adapters import lora_pair, write_adapter
from tritonlora.files import write_text
from tritonlora.pbtxt.text_format import parse
from tritonlora.repository import add, init, paths, undo, upkeep
from tritonlora.repository.ensemble_edits import rewire_to_forward, rewire_to_resolve
from tritonlora.repository.model_configs import set_parameters
from tritonlora.repository.paths import Repository
from tritonlora.repository.shipped import shipped_models
from tritonlora.serving.adapter_table import with_adapter
from tritonlora.serving.adapter_table_json import render
from upstream_configs import as_rewired_before

LLM_API = Path(__file__).parent / "llm_api" / "tensorrt_llm"
MANY_OUTPUTS = Path(__file__).parent / "many_outputs_engine.py"
SYNTHETIC_GEOMETRY = json.loads((shipped_models() / "tensorrt_llm" / "1" / "config.json").read_text())


def synthetic_adapter(directory: Path, seed: int = 0, *, r: int = 8, dtype: torch.dtype = torch.bfloat16) -> Path:
    """An adapter for the geometry of the shipped synthetic engine: q and v of both layers."""
    torch.manual_seed(seed)
    hidden = SYNTHETIC_GEOMETRY["hidden_size"]
    kv = SYNTHETIC_GEOMETRY["num_key_value_heads"] * SYNTHETIC_GEOMETRY["head_dim"]
    tensors: dict[str, torch.Tensor] = {}
    for layer in range(SYNTHETIC_GEOMETRY["num_hidden_layers"]):
        for leaf, out_features in (("q_proj", hidden), ("v_proj", kv)):
            path = f"model.layers.{layer}.self_attn.{leaf}"
            tensors |= lora_pair(path, r=r, in_features=hidden, out_features=out_features, dtype=dtype)
    return write_adapter(directory, tensors, r=r, lora_alpha=2 * r, target_modules=["q_proj", "v_proj"])


def synthetic_repository(
    root: Path,
    *,
    warm: Iterable[str] = (),
    cold: Iterable[str] = (),
    pages: int = 100,
    decoupled: bool = True,
    streams: int = 4,
    topology: str = "forward",
    parameters: Mapping[str, str] | None = None,
) -> Repository:
    """The shipped repository with adapters in it, and an engine cache of `pages` pages; each adapter takes one."""
    init.create_repository(root, {"tensorrt_llm": dict(parameters or {})})
    init.init(root, topology=topology)
    opened = paths.open_repository(root)
    set_streams(opened, streams)
    if not decoupled:
        set_decoupled(opened, False)
    for number, name in enumerate([*warm, *cold]):
        adapter = synthetic_adapter(root.parent / f"{root.name}-adapters" / name, number)
        add.add(opened, name, adapter, add.Options(warm=number < len(tuple(warm))))
    set_cache_pages(opened, pages)
    let_all_be_warmed(opened)
    return opened


def files(root: Path) -> dict[str, bytes | None]:
    """Every file and directory in a repository."""
    return {
        path.relative_to(root).as_posix(): path.read_bytes() if path.is_file() else None for path in root.rglob("*")
    }


def added(root: Path, name: str, seed: int = 0) -> Repository:
    """The repository with one more adapter."""
    opened = paths.open_repository(root)
    adapter = synthetic_adapter(root.parent / "adapters" / name, seed)
    add.add(opened, name, adapter, add.Options(dtype="bfloat16"))
    return opened


def put_many_outputs_engine(opened: Repository) -> None:
    """Put the engine of many_outputs_engine.py in the place of the CPU engine."""
    shutil.copyfile(MANY_OUTPUTS, opened.target_directory / "1" / "model.py")


def register_copies(opened: Repository, names: Iterable[str]) -> None:
    """Register these names too, cold, each with an id of its own, and with the files of the first adapter."""
    table = paths.read_table(opened)
    first = replace(next(iter(table.entries.values())), warm=False)
    for name in names:
        table = with_adapter(table, name, replace(first, lora_task_id=table.next_lora_task_id))
    write_text(opened.table_path, render(table))


def let_all_be_warmed(opened: Repository) -> None:
    """Registered long before the server that is about to start: the resolver does not trust the last second."""
    table = paths.read_table(opened)
    entries = {name: replace(entry, added_at="2026-01-01T00:00:00+00:00") for name, entry in table.entries.items()}
    write_text(opened.table_path, render(replace(table, entries=entries)))


def let_time_pass(opened: Repository) -> None:
    """Everything in the warmup directory is older than any request that is under way."""
    for path in opened.warmup_directory.iterdir():
        os.utime(path, (0, 0))


def set_streams(opened: Repository, streams: int) -> None:
    """Give the router that many instances, which each take a moment to start."""
    path = opened.root / "lora_router" / "config.pbtxt"
    text = paths.read_text(path)
    text, found = re.subn(r"\bcount: \d+", f"count: {streams}", text)
    assert found == 1
    write_text(path, text)


def set_cache_full_timeout(opened: Repository, seconds: float) -> None:
    """How long a request waits for capacity in the engine's cache."""
    path = opened.root / "lora_resolver" / "config.pbtxt"
    text = paths.read_text(path)
    assert text.count('"30"') == 1
    write_text(path, text.replace('"30"', f'"{seconds:g}"'))


def set_cache_pages(opened: Repository, pages: int) -> None:
    """Give the engine's LoRA cache that many pages."""
    profile = paths.engine_profile(opened, paths.read_config(opened.config_path))
    assert profile is not None
    parameters = {"lora_cache_optimal_adapter_size": "8", "lora_cache_max_adapter_size": "8"}
    upkeep.set_parameters(opened, parameters)
    plan = paths.plan_of(opened, paths.read_table(opened), paths.read_config(opened.config_path), profile)
    assert plan is not None
    upkeep.set_parameters(opened, {"lora_cache_host_memory_bytes": str(pages * plan.tightest.page_bytes)})


def forget_cache_pages(opened: Repository) -> None:
    """Do not tell the resolver how large the engine's cache is, as on a machine without the engine's config.json."""
    path = opened.root / "lora_resolver" / "config.pbtxt"
    write_text(path, set_parameters(parse(paths.read_text(path)), {"cache_pages": "0"}).text)


def set_decoupled(opened: Repository, decoupled: bool) -> None:
    """Set the engine's transaction policy, and bring the router in step with it."""
    text = paths.read_text(opened.config_path)
    before, after = f"decoupled: {str(not decoupled).lower()}", f"decoupled: {str(decoupled).lower()}"
    assert text.count(before) == 1
    write_text(opened.config_path, text.replace(before, after))
    init.init(opened.root)


def lead_as_before(opened: Repository) -> None:
    """Lead the ensemble to the resolver, and declare the resolver's tensors, as `init` did in earlier versions.

    Those announced no requests. With that step beside the resolver's, Triton 2.51 crashes where the latter fails first.
    """
    ensemble, resolver = (opened.root / model / "config.pbtxt" for model in ("ensemble", "lora_resolver"))
    text = paths.read_text(resolver)
    for declared in (
        '  {\n    name: "request_output_len"\n    data_type: TYPE_INT32\n    dims: [ 1 ]\n    optional: true\n  },\n',
        '  {\n    name: "request_output_len"\n    data_type: TYPE_INT32\n    dims: [ 1 ]\n  },\n',
    ):
        assert 1 == text.count(declared)
        text = text.replace(declared, "")
    text = text.replace("optional: true\n  ", "", 1)  # of input_lengths
    shutil.rmtree(opened.root / "lora_tokens")  # which those did not write
    linear = rewire_to_resolve(rewire_to_forward(parse(paths.read_text(ensemble)))).text
    contents = {ensemble: as_rewired_before(linear), resolver: text}
    undo.write(opened.root, {path: content.encode() for path, content in contents.items()})


def llm_api_repository(root: Path, base: Path, **settings: object) -> Path:
    """A repository as the LLM API's users have it: one model, here the stand-in, for the checkpoint `base`.

    `settings` go into model.yaml; triton_config and lora_config are merged with what is there.
    """
    shutil.copytree(LLM_API, root / "tensorrt_llm", ignore=shutil.ignore_patterns("__pycache__"))
    path = root / "tensorrt_llm" / "1" / "model.yaml"
    document = {**yaml.safe_load(path.read_text()), "model": str(base)}
    for key, value in settings.items():
        document[key] = {**document[key], **value} if isinstance(value, dict) else value
    path.write_text(yaml.safe_dump(document))
    return root


def resolving(
    root: Path, warm: Iterable[str], cold: Iterable[str], *, pages: int, decoupled: bool = True
) -> Repository:
    """A synthetic repository whose ensembles lead past the router."""
    return synthetic_repository(
        root, warm=warm, cold=cold, pages=pages, decoupled=decoupled, streams=1, topology="resolve"
    )


def written_by_0_1_0(directory: Path, when: str) -> Path:
    """Upstream's repository of v0.18.0 with the CPU engine, "before" 0.1.0's `init` and `add pirate`, or "after"."""
    with tarfile.open(Path(__file__).parent / "written_by_0.1.0.tar.xz") as archive:
        members = [member for member in archive if member.name.partition("/")[0] == when]
        archive.extractall(directory, members, filter="data")
    return directory / when
