# SPDX-FileCopyrightText: the tritonlora authors
# SPDX-License-Identifier: Apache-2.0
"""The config.pbtxt files of triton-inference-server/tensorrtllm_backend, and protobuf's view of a config."""

from __future__ import annotations

import difflib
import functools
import shutil
import string
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from google.protobuf import text_format
from tritonclient.grpc.model_config_pb2 import ModelConfig

from tritonlora.pbtxt.text_format import parse
from tritonlora.repository.model_configs import set_parameters
from tritonlora.repository.shipped import shipped_models

ROOT = Path(__file__).parent / "upstream"
PATHS = sorted(ROOT.glob("*/*/config.pbtxt"))
NAMES = [f"{path.parent.parent.name}-{path.parent.name}" for path in PATHS]
VERSIONS = sorted(path.name for path in ROOT.iterdir())

VALUES = {
    "triton_backend": "tensorrtllm",
    "triton_max_batch_size": "4",
    "decoupled_mode": "True",
    "max_queue_delay_microseconds": "0",
    "max_queue_size": "0",
    "logits_datatype": "TYPE_FP32",
    "encoder_input_features_data_type": "TYPE_FP16",
    "preprocessing_instance_count": "1",
    "postprocessing_instance_count": "1",
    "bls_instance_count": "1",
}


def upstream(version: str, model: str) -> str:
    """An upstream config as it is, with its templates."""
    with (ROOT / version / model / "config.pbtxt").open(newline="") as file:
        return file.read()


def fill(text: str, **values: str) -> str:
    """What upstream's tools/fill_template.py makes of a template; string parameters stay unfilled."""
    return string.Template(text).safe_substitute({**VALUES, **values})


def protobuf(text: str) -> Any:
    """The config as protobuf's own parser sees it."""
    return ModelConfig.FromString(_serialized(text))


@functools.lru_cache(1024)  # the parser takes 10 ms for some of these texts, and most come again and again
def _serialized(text: str) -> bytes:
    return bytes(text_format.Parse(text, ModelConfig()).SerializeToString())


def step_of(ensemble: Any, name: str) -> Any:
    """The step for a model."""
    return next(step for step in ensemble.ensemble_scheduling.step if step.model_name == name)


def as_rewired_before(text: str) -> str:
    """What rewire_to_resolve has given, as it was when the resolver got input_lengths alone, and gave no length."""
    required = step_of(protobuf(text), "lora_resolver").input_map["request_output_len"]
    before, name, rest = text.partition('model_name: "lora_resolver"')
    step, after_name, after = rest.partition("model_name: ")
    mapped = '{}_map {{\n        key: "request_output_len"\n        value: "{}"\n      }}\n      '
    for entry in (mapped.format("output", "_RESOLVED_OUTPUT_LEN"), mapped.format("input", required)):
        assert 1 == step.count(entry)
        step = step.replace(entry, "")
    return "".join([before, name, step, after_name, after]).replace("_RESOLVED_OUTPUT_LEN", required)


def upstream_repository(
    root: Path, version: str, *, filled: bool = True, values: Mapping[str, str] | None = None
) -> Path:
    """A model repository made from upstream's templates, with `values` besides VALUES."""
    for model in ("ensemble", "preprocessing", "postprocessing", "tensorrt_llm", "tensorrt_llm_bls"):
        text = upstream(version, model)
        (root / model / "1").mkdir(parents=True)
        (root / model / "config.pbtxt").write_text(fill(text, **(values or {})) if filled else text)
    return root


_ON_THE_CPU = {
    "tensorrt_llm": {"synthetic": "true", "gpt_model_path": "1"},
    "preprocessing": {"tokenizer_dir": "", "add_special_tokens": ""},
    "postprocessing": {"tokenizer_dir": "", "skip_special_tokens": ""},
}


def upstream_repository_on_the_cpu(root: Path, version: str, *, decoupled: str) -> Path:
    """The same, and it can be served here: the CPU engine and the shipped text models stand behind the templates.

    Upstream's own code for these models needs a GPU and a tokenizer. `decoupled` is "True" or "False".
    """
    upstream_repository(root, version, values={"triton_backend": "python", "decoupled_mode": decoupled})
    shutil.rmtree(root / "tensorrt_llm_bls")  # calls upstream's own code
    for model, parameters in _ON_THE_CPU.items():
        version_directory = root / model / "1"
        shutil.copytree(shipped_models() / model / "1", version_directory, dirs_exist_ok=True, symlinks=True)
        if model != "tensorrt_llm":
            code = version_directory / "serving"
            code.unlink()
            shutil.copytree(shipped_models() / model / "1" / "serving", code)
        config = root / model / "config.pbtxt"
        config.write_text(set_parameters(parse(config.read_text()), parameters).text)
    return root


def removed_and_added(before: str, after: str) -> tuple[list[str], list[str]]:
    """The lines that an edit took and put in."""
    old, new = before.splitlines(), after.splitlines()
    changes = difflib.SequenceMatcher(None, old, new, autojunk=False).get_opcodes()
    changed = [change for change in changes if change[0] != "equal"]
    return [line for _, i, j, _, _ in changed for line in old[i:j]], [
        line for _, _, _, i, j in changed for line in new[i:j]
    ]
