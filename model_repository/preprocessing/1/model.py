# SPDX-FileCopyrightText: the tritonlora authors
# SPDX-License-Identifier: Apache-2.0
"""Text to the engine's tensors.

This file only translates between Triton and `tritonlora.text`, which decides.
"""

from __future__ import annotations

import json
import sys
import traceback
from pathlib import Path

import triton_python_backend_utils as pb_utils

sys.path.insert(0, str(Path(__file__).parent))  # the copy beside this file, whatever else is installed

from tritonlora.errors import ConfigError, RequestError
from tritonlora.text import open_tokenizer, parse_options, preprocess


class TritonPythonModel:
    """One instance of the model."""

    def initialize(self, args: dict[str, str]) -> None:
        """Load the tokenizer; the model does not load without."""
        parameters = json.loads(args["model_config"])["parameters"]
        try:
            self._options = parse_options({name: value["string_value"] for name, value in parameters.items()})
            self._tokenizer = open_tokenizer(self._options)
        except ConfigError as error:
            raise pb_utils.TritonModelException(str(error)) from error
        if self._options.tokenizer_dir is None:
            pb_utils.Logger.log_warn(f"{args['model_name']}: no tokenizer_dir is set, so each UTF-8 byte is a token")

    def execute(self, requests: list[pb_utils.InferenceRequest]) -> list[pb_utils.InferenceResponse]:
        """Answer each request by itself: a bad one harms no other."""
        return [self._answer(request) for request in requests]

    def _answer(self, request: pb_utils.InferenceRequest) -> pb_utils.InferenceResponse:
        try:
            inputs = {tensor.name(): tensor.as_numpy() for tensor in request.inputs()}
            outputs = preprocess(self._tokenizer, self._options, inputs)
            tensors = [pb_utils.Tensor(name, array) for name, array in outputs.items()]
        except RequestError as error:
            code = getattr(pb_utils.TritonError, error.code)
            return pb_utils.InferenceResponse(error=pb_utils.TritonError(str(error), code))
        except Exception:  # noqa: BLE001  whatever it is, the others in the batch are answered
            pb_utils.Logger.log_error(traceback.format_exc())
            message = "preprocessing failed on this request; the server's log says why"
            return pb_utils.InferenceResponse(error=pb_utils.TritonError(message))
        return pb_utils.InferenceResponse(tensors)
