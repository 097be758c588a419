# SPDX-FileCopyrightText: the tritonlora authors
# SPDX-License-Identifier: Apache-2.0
"""The generated block, files and configs, loaded by a real tritonserver."""

from __future__ import annotations

import http.client
import json
import string
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from table import sample
from tritonlora.errors import ServerError
from tritonlora.launch.server import Server
from tritonlora.pbtxt.edits import append_value
from tritonlora.pbtxt.model_config import parse_config
from tritonlora.pbtxt.text_format import parse
from tritonlora.repository.ensemble_edits import rewire_to_forward
from tritonlora.repository.model_configs import router_config, set_parameters
from tritonlora.repository.warmup import render_block, replace_block, shared_files
from tritonlora.targets import engine_model, task_id_bytes, task_id_file
from tritonlora.targets.declarations import declare_lora_weights

UPSTREAM = Path(__file__).parents[1] / "support" / "upstream"

# Answers each requested output with zeros, or empty strings, in the smallest shape that its declaration allows.
ZEROS = """
import json
from pathlib import Path

import numpy as np
import triton_python_backend_utils as pb_utils


class TritonPythonModel:
    def initialize(self, args):
        self.config = json.loads(args["model_config"])

    def execute(self, requests):
        return [pb_utils.InferenceResponse(self.answer(request)) for request in requests]

    def answer(self, request):
        wanted = request.requested_output_names()
        return [self.zeros(output) for output in self.config["output"] if output["name"] in wanted]

    def zeros(self, output):
        shape = [1, *(max(1, int(dim)) for dim in output["dims"])]
        if output["data_type"] == "TYPE_STRING":
            return pb_utils.Tensor(output["name"], np.full(shape, b"", dtype=object))
        return pb_utils.Tensor(output["name"], np.zeros(shape, pb_utils.triton_string_to_numpy(output["data_type"])))
"""

# Writes down the dtypes and shapes it gets in the directory of its parameter `seen`, under the task id.
ENGINE = (
    ZEROS.replace("TritonPythonModel", "Zeros")
    + """
import torch


class TritonPythonModel(Zeros):
    def answer(self, request):
        tensors = {tensor.name(): torch.from_dlpack(tensor.to_dlpack()) for tensor in request.inputs()}
        seen = {name: (str(tensor.dtype), list(tensor.shape)) for name, tensor in tensors.items()}
        if "lora_weights" in tensors:
            seen["sums"] = [tensors["lora_weights"].double().sum().item(), tensors["lora_config"].sum().item()]
        directory = Path(self.config["parameters"]["seen"]["string_value"])
        (directory / str(tensors["lora_task_id"].flatten()[0].item())).write_text(json.dumps(seen))
        return super().answer(request)
"""
)

# A router that gives every name the task id 5: what is tested is that its config's wire shapes are the engine's.
ROUTER = (
    ZEROS.replace("TritonPythonModel", "Zeros")
    + """

class TritonPythonModel(Zeros):
    def answer(self, request):
        inputs = [tensor for tensor in request.inputs() if tensor.name() not in ("lora_name", "lora_task_id")]
        inputs.append(pb_utils.Tensor("lora_task_id", np.array([[5]], np.uint64)))
        outputs = [name for name in request.requested_output_names() if name != "previous_ids"]
        response = pb_utils.InferenceRequest(
            model_name="tensorrt_llm", requested_output_names=outputs, inputs=inputs
        ).exec()
        if response.has_error():
            raise pb_utils.TritonModelException(response.error().message())
        own = [self.zeros(output) for output in self.config["output"] if output["name"] == "previous_ids"]
        return [*response.output_tensors(), *own]
"""
)

VALUES = {
    "triton_backend": "python",
    "triton_max_batch_size": "4",
    "decoupled_mode": "False",
    "max_queue_delay_microseconds": "0",
    "max_queue_size": "0",
    "logits_datatype": "TYPE_FP32",
    "encoder_input_features_data_type": "TYPE_FP16",
    "preprocessing_instance_count": "1",
    "postprocessing_instance_count": "1",
}
SHAPES = {1: (4, 96), 2**64 - 1: (3, 160)}  # task id -> (n, W)
SAMPLES = [sample(task_id, shape, (shape[0], 3)) for task_id, shape in SHAPES.items()]


def filled_upstream(version: str, model: str) -> str:
    """An upstream config, filled for a Python model in the engine's place."""
    return string.Template((UPSTREAM / version / model / "config.pbtxt").read_text()).safe_substitute(VALUES)


def write_model(repository: Path, name: str, config: str, code: str = "") -> Path:
    """A model directory."""
    directory = repository / name
    (directory / "1").mkdir(parents=True)
    (directory / "config.pbtxt").write_text(config)
    (directory / "1" / "model.py").write_text(code)
    return directory


def engine_config(version: str, seen: Path) -> str:
    """The upstream engine model's config with the block for SAMPLES."""
    declared = declare_lora_weights(parse(filled_upstream(version, "tensorrt_llm")), "bfloat16")
    text = set_parameters(declared, {"seen": str(seen)}).text
    return replace_block(text, render_block(parse_config(text), SAMPLES))


def write_warmup(directory: Path, config: str) -> None:
    """The warmup files for SAMPLES: weights of bfloat16 ones, a config of ones."""
    files = shared_files(parse_config(config))
    for task_id, (rows, width) in SHAPES.items():
        files[task_id_file(task_id)] = task_id_bytes(task_id)
        files[engine_model.PLACES.of(task_id).weights_file] = b"\x80\x3f" * (rows * width)
        files[engine_model.PLACES.of(task_id).config_file] = b"\1\0\0\0" * (rows * 3)
    (directory / "warmup").mkdir()
    for name, content in files.items():
        (directory / "warmup" / name).write_bytes(content)


def post(server: Server, path: str, body: dict[str, Any]) -> tuple[int, Any]:
    """Status and JSON answer of a POST."""
    connection = http.client.HTTPConnection(server.http_url, timeout=60)
    connection.request("POST", path, json.dumps(body), {"Content-Type": "application/json"})
    response = connection.getresponse()
    answer = json.loads(response.read())
    connection.close()
    return response.status, answer


@pytest.mark.parametrize("version", ["v0.10.0", "v0.15.0", "v0.18.0"])
def test_a_real_server_loads_each_adapter_from_the_block_and_serves_it_by_name(
    version: str, tmp_path: Path, launch: Callable[..., Server]
) -> None:
    """At READY the engine has had each adapter's tensors; the rewired ensemble leads to it through the router."""
    seen = tmp_path / "seen"
    seen.mkdir()
    repository = tmp_path / "repository"
    config = engine_config(version, seen)
    write_warmup(write_model(repository, "tensorrt_llm", config, ENGINE), config)
    write_model(repository, "lora_router", router_config(parse_config(config), previous_ids=True), ROUTER)
    write_model(repository, "preprocessing", filled_upstream(version, "preprocessing"), ZEROS)
    postprocessing = parse(filled_upstream(version, "postprocessing"))
    previous = '{\n  name: "PREVIOUS_TOKENS"\n  data_type: TYPE_INT32\n  dims: [ -1 ]\n}'
    postprocessing = append_value(postprocessing, postprocessing.message, "input", previous)
    write_model(repository, "postprocessing", postprocessing.text, ZEROS)
    ensemble = rewire_to_forward(parse(filled_upstream(version, "ensemble")), postprocessing="postprocessing")
    write_model(repository, "ensemble", ensemble.text)

    server = launch(repository)

    for task_id, (rows, width) in SHAPES.items():
        got = json.loads((seen / str(task_id)).read_text())
        assert ["torch.bfloat16", [1, rows, width]] == got["lora_weights"]
        assert ["torch.int32", [1, rows, 3]] == got["lora_config"]
        assert ["torch.uint64", [1]] == got["lora_task_id"]
        assert ["torch.int32", [1, 4]] == got["input_ids"]
        assert [rows * width, rows * 3] == got["sums"]
    status, answer = post(
        server,
        "/v2/models/ensemble/generate",
        {"text_input": "", "max_tokens": 1, "bad_words": "", "stop_words": "", "lora_name": "x"},
    )
    assert 200 == status, answer
    assert "" == answer["text_output"]
    got = json.loads((seen / "5").read_text())
    assert ["torch.uint64", [1]] == got["lora_task_id"]
    assert ["torch.int32", [1]] == got["input_lengths"]


def test_a_real_server_refuses_a_weights_file_that_is_too_short(tmp_path: Path, launch: Callable[..., Server]) -> None:
    """The block's dims are what Triton holds the file's bytes against."""
    config = engine_config("v0.18.0", tmp_path)
    directory = write_model(tmp_path / "repository", "tensorrt_llm", config, ENGINE)
    write_warmup(directory, config)
    path = directory / "warmup" / engine_model.PLACES.of(1).weights_file
    path.write_bytes(path.read_bytes()[:-1])

    with pytest.raises(ServerError, match="warmup setting expects 768 bytes, but the data provided from .*767 bytes"):
        launch(tmp_path / "repository")
