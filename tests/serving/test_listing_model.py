# SPDX-FileCopyrightText: the tritonlora authors
# SPDX-License-Identifier: Apache-2.0
"""listing_model.py, with the fake in the place of Triton, for what no client can make Triton pass on."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

import fake_pb_utils
from fake_pb_utils import InferenceRequest, Tensor, TritonError, import_model
from repositories import synthetic_repository
from scripted_resolver import ScriptedResolver


def test_an_error_that_nobody_foresaw_is_that_request_s_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """INTERNAL, and an entry in the log; the other requests of the batch are answered."""
    opened = synthetic_repository(tmp_path / "repo", cold=["pirate"])
    parameters = {"router": {"string_value": "lora_router"}}
    model = import_model(monkeypatch, "tritonlora.serving.listing_model").TritonPythonModel()
    model.initialize(
        {
            "model_repository": str(opened.root / "lora_adapters"),
            "model_config": json.dumps({"parameters": parameters}),
        }
    )
    fake_pb_utils.serve("lora_resolver", ScriptedResolver())
    requests = [
        InferenceRequest(
            model_name="",
            inputs=[Tensor("lora_name", np.array(names, np.object_))],
            requested_output_names=["adapters"],
        )
        for names in ([], [b"pirate"])
    ]
    broken, sound = model.execute(requests)
    log = fake_pb_utils.LOG[-1][-1]
    model.finalize()
    fake_pb_utils.clear()

    assert TritonError.INTERNAL == broken.error().code()
    assert "IndexError" in log
    assert ["pirate"] == list(json.loads(sound.output_tensors()[0].as_numpy().reshape(-1)[0]))
