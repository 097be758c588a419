# SPDX-FileCopyrightText: the tritonlora authors
# SPDX-License-Identifier: Apache-2.0
"""Model repositories of the benchmarks, with adapters and models to compare with, and servers on them."""

from __future__ import annotations

import json
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

from tritonlora.bench.convert import LAYERS, LLAMA_8B, make_adapter
from tritonlora.errors import RepositoryError
from tritonlora.files import write_text
from tritonlora.launch.server import Server
from tritonlora.repository import add, init, model_configs, paths, upkeep
from tritonlora.repository.paths import ROUTER, Repository
from tritonlora.serving.adapter_table import AdapterEntry, AdapterTable
from tritonlora.serving.adapter_table_json import render

EXIT_TIMEOUT_SECONDS = 2  # no client waits for a response any more
PASS_THROUGH = "pass_through"  # noqa: S105
PAST_ROUTER = "past_router"
TAKER = "taker"
BARE_ENSEMBLE = "bare_ensemble"
# The resolver does not expect warmup to have loaded adapters that were added shortly before the server started.
LONG_AGO = "2026-01-01T00:00:00+00:00"
SMALL = {"self_attn.q_proj": (64, 64), "self_attn.v_proj": (64, 32)}  # (in, out) in the shipped synthetic engine
SMALL_LAYERS = 2
LARGE_ADAPTERS = 3
LARGE_RANK = 32  # 224 rows of 589,824 bfloat16: 264 MB
FEW_STREAMS = 2  # for parts in which each instance of the router has to warm up first
LLAMA_8B_CONFIG = {
    "architectures": ["LlamaForCausalLM"],
    "dtype": "bfloat16",
    "hidden_size": 4096,
    "intermediate_size": 14336,
    "num_attention_heads": 32,
    "num_hidden_layers": LAYERS,
    "num_key_value_heads": 8,
    "vocab_size": 128256,
}
# A BLS model that does the least work. EACH is replaced by its code for a response, and END by that for the end.
_BARE_MODEL = '''\
"""Sends each request to the engine's model, and its responses to the client."""

from collections import deque

import triton_python_backend_utils as pb_utils

OUTPUTS = {NAMES}  # of the engine's model; Triton asks for the router's own outputs, too, when a client names none


class TritonPythonModel:
    def initialize(self, args):
        self.last_streams = deque(maxlen=4)  # Triton's stub may hang when it frees the last reference to a stream

    def execute(self, requests):
        for request in requests:
            sender = request.get_response_sender()
            forwarded = pb_utils.InferenceRequest(
                model_name="tensorrt_llm",
                inputs=request.inputs(),
                requested_output_names=[*OUTPUTS.intersection(request.requested_output_names())],
            )
            answers = forwarded.exec(decoupled=True)
            self.last_streams.append(answers)
            last = []
            for answer in answers:
                if answer.has_error():
                    sender.send(pb_utils.InferenceResponse(error=answer.error()))
                else:
                    EACH
            END
            sender.send(flags=pb_utils.TRITONSERVER_RESPONSE_COMPLETE_FINAL)
'''
_TO_CLIENT = "sender.send(pb_utils.InferenceResponse({}))"
_BARE_MODELS = {
    PASS_THROUGH: {"EACH": _TO_CLIENT.format("answer.output_tensors()"), "END": ""},
    # No model that reads all responses by BLS can be faster than one that sends only the last of them.
    TAKER: {"EACH": "last = answer.output_tensors() or last", "END": _TO_CLIENT.format("last")},
}

# An ensemble of the engine alone, with the inputs that the benchmark sends. `init` can put the resolver into it.
_TOKENS_ENSEMBLE = """\
name: "%s"
platform: "ensemble"
max_batch_size: 64
input [
  { name: "input_ids" data_type: TYPE_INT32 dims: [ -1 ] },
  { name: "input_lengths" data_type: TYPE_INT32 dims: [ 1 ] },
  { name: "request_output_len" data_type: TYPE_INT32 dims: [ 1 ] },
  { name: "end_id" data_type: TYPE_INT32 dims: [ 1 ] optional: true },
  { name: "streaming" data_type: TYPE_BOOL dims: [ 1 ] optional: true }
]
output [
  { name: "output_ids" data_type: TYPE_INT32 dims: [ -1, -1 ] },
  { name: "sequence_length" data_type: TYPE_INT32 dims: [ -1 ] }
]
ensemble_scheduling {
  step [
    {
      model_name: "tensorrt_llm"
      model_version: -1
      input_map { key: "input_ids" value: "input_ids" }
      input_map { key: "input_lengths" value: "input_lengths" }
      input_map { key: "request_output_len" value: "request_output_len" }
      input_map { key: "end_id" value: "end_id" }
      input_map { key: "streaming" value: "streaming" }
      output_map { key: "output_ids" value: "output_ids" }
      output_map { key: "sequence_length" value: "sequence_length" }
    }
  ]
}
"""


@contextmanager
def directory() -> Iterator[Path]:
    """A directory that is there while the `with` block runs."""
    with tempfile.TemporaryDirectory(prefix="tritonlora-bench-") as name:
        yield Path(name)


@contextmanager
def serving(
    opened: Repository, *, exit_timeout: int = EXIT_TIMEOUT_SECONDS, extra: Sequence[str] = ()
) -> Iterator[Server]:
    """A server on a repository, ready for requests while the `with` block runs. `extra` are words for tritonserver."""
    with Server(opened.root, exit_timeout=exit_timeout, extra=extra) as server:
        server.wait_until_ready()
        yield server


def task_ids(count: int) -> dict[str, int]:
    """lora_name -> lora_task_id of `count` adapters of a scratch repository."""
    return {f"n{number}": number for number in range(1, count + 1)}


def small_adapters(root: Path, count: int, *, streams: int, room: int | None = None) -> Repository:
    """The shipped repository with `count` adapters, n1 and so on, and with the models to compare the router with.

    The adapters share one pair of files. Each model has `streams` instances. The engine's cache holds `room` adapters.
    Without `room` it holds all adapters, all of them are warm, and the repository has the ensemble PAST_ROUTER too.
    """
    init.create_repository(root)
    opened = paths.open_repository(root)
    _register(opened, count, SMALL, SMALL_LAYERS, rank=8)
    _set_cache(opened, room or count)
    _put_bare_models(opened, streams)
    if room is None:
        _put_resolver(opened)
    return opened


def paced(
    root: Path, count: int, *, pages: int, token_seconds: float, rank: int | None = None, layers: int = LAYERS
) -> Repository:
    """The shipped repository with `count` adapters, n1 and so on, and an engine that takes `token_seconds` for a token.

    The engine's cache has `pages` pages, and an adapter takes one. With a `rank`, the adapters are of that rank and of
    a Llama 8B of `layers` layers, they differ, and the cache holds `pages` of them. No adapter is loaded at start. The
    ensemble PAST_ROUTER leads past the router.
    """
    init.create_repository(root)
    opened = paths.open_repository(root)
    if rank is None:
        _register(opened, count, SMALL, SMALL_LAYERS, rank=8)
    else:
        _add_large(opened, count, rank, layers)
    _set_cache(opened, pages)
    upkeep.set_parameters(opened, {"synthetic_token_seconds": f"{token_seconds:g}", "max_num_requests": "512"})
    _put_ensemble(opened, PAST_ROUTER)
    init.init(opened.root, topology=init.RESOLVE)
    return opened


def set_cached(opened: Repository, adapters: int) -> None:
    """Let the engine's cache hold so many adapters from the next start on. All adapters take equally many pages."""
    _set_cache(opened, adapters)
    init.init(opened.root)


def put_small(opened: Repository, name: str, *, seed: int) -> int:
    """Add a random adapter of one page, or replace the one of that name, and return its lora_task_id."""
    return _add(opened, name, SMALL, SMALL_LAYERS, rank=8, seed=seed).lora_task_id


def large_adapters(root: Path, *, rank: int = LARGE_RANK, layers: int = LAYERS) -> Repository:
    """A repository with LARGE_ADAPTERS adapters of a Llama 8B, n1 and so on, in the forward topology.

    The engine's cache holds one of them. The adapters differ. Requests that name them in turn never let an instance of
    the router send the adapter that it sent last.
    """
    init.create_repository(root)
    opened = paths.open_repository(root)
    _add_large(opened, LARGE_ADAPTERS, rank, layers)
    _set_cache(opened, 1)
    _put_bare_models(opened, FEW_STREAMS)
    init.init(opened.root, topology=init.FORWARD)
    return opened


def table_of(entry: AdapterEntry, count: int) -> AdapterTable:
    """A table of `count` adapters, n1 and so on, each with the fields of `entry` and an id of its own."""
    entries = {name: replace(entry, lora_task_id=number) for name, number in task_ids(count).items()}
    return AdapterTable(entries, next_lora_task_id=count + 1)


def _register(opened: Repository, count: int, shapes: Mapping[str, tuple[int, int]], layers: int, *, rank: int) -> None:
    """Convert one adapter, and register it under `count` names."""
    entry = _add(opened, "n1", shapes, layers, rank=rank)
    write_text(opened.table_path, render(table_of(entry, count)))


def _add_large(opened: Repository, count: int, rank: int, layers: int) -> None:
    """Make the engine's model a Llama 8B, and add `count` random adapters of it."""
    config = LLAMA_8B_CONFIG | {"num_hidden_layers": layers}
    write_text(opened.target_directory / "1" / "config.json", json.dumps(config))
    for name, number in task_ids(count).items():
        _add(opened, name, LLAMA_8B, layers, rank=rank, seed=number)


def _add(
    opened: Repository, name: str, shapes: Mapping[str, tuple[int, int]], layers: int, *, rank: int, seed: int = 0
) -> AdapterEntry:
    with tempfile.TemporaryDirectory(dir=opened.root.parent) as adapter:
        make_adapter(Path(adapter), rank, layers, shapes, seed=seed)
        return add.add(opened, name, Path(adapter), add.Options(warm=False)).entry


def _set_cache(opened: Repository, room: int) -> None:
    """Set the size of the engine's cache to `room` adapters."""
    table = paths.read_table(opened)
    rank = str(max(next(iter(table.entries.values())).adapter_sizes))
    upkeep.set_parameters(opened, {"lora_cache_optimal_adapter_size": rank, "lora_cache_max_adapter_size": rank})
    config = paths.read_config(opened.config_path)
    plan = paths.plan_of(opened, table, config, paths.engine_profile(opened, config))
    if plan is None:
        raise RepositoryError("the engine's cache is not in pages")
    nbytes = room * plan.adapters[0].pages * plan.tightest.page_bytes
    upkeep.set_parameters(opened, {"lora_cache_host_memory_bytes": str(nbytes)})
    pages = {adapter.name: adapter.pages for adapter in plan.adapters}
    entries = {name: replace(entry, pages=pages[name]) for name, entry in table.entries.items()}
    write_text(opened.table_path, render(replace(table, entries=entries)))


def _put_resolver(opened: Repository) -> None:
    """Make all adapters warm, and add the ensembles PAST_ROUTER, with the resolver, and BARE_ENSEMBLE, without it."""
    table = paths.read_table(opened)
    entries = {name: replace(entry, warm=True, added_at=LONG_AGO) for name, entry in table.entries.items()}
    write_text(opened.table_path, render(replace(table, entries=entries)))
    upkeep.repair(opened)
    _put_ensemble(opened, PAST_ROUTER)
    init.init(opened.root, topology=init.RESOLVE)
    _put_ensemble(opened, BARE_ENSEMBLE)  # after `init`, which would put the resolver into it


def _put_ensemble(opened: Repository, name: str) -> None:
    (opened.root / name / "1").mkdir(parents=True)
    write_text(opened.root / name / "config.pbtxt", _TOKENS_ENSEMBLE % name)


def _put_bare_models(opened: Repository, streams: int) -> None:
    """Add the bare models, which have the router's inputs. They and the router get `streams` instances each."""
    target = paths.read_config(opened.config_path)
    for name, parts in _BARE_MODELS.items():
        model = _BARE_MODEL.replace("NAMES", ", ".join(repr(spec.name) for spec in target.outputs))
        for place, part in parts.items():
            model = model.replace(place, part)
        (opened.root / name / "1").mkdir(parents=True)
        write_text(
            opened.root / name / "config.pbtxt", model_configs.router_config(target, name=name, max_streams=streams)
        )
        write_text(opened.root / name / "1" / "model.py", model)
    router = opened.root / ROUTER / "config.pbtxt"
    write_text(router, model_configs.router_config(target, previous_ids=True, max_streams=streams))
