# SPDX-FileCopyrightText: the tritonlora authors
# SPDX-License-Identifier: Apache-2.0
"""The models `preprocessing` and `postprocessing`: text to the engine's tensors, and its tokens to text.

They translate between Triton and `text`, which decides.
"""

from __future__ import annotations

import json
import traceback

import triton_python_backend_utils as pb_utils

from .errors import ModelConfigError, RequestError
from .text import Tensors, open_tokenizer, parse_options, postprocess, preprocess
from .triton import failure, inputs_of, parameters_in


class _TextModel:
    """One instance of either model."""

    def initialize(self, args: dict[str, str]) -> None:
        """Load the tokenizer; the model does not load without."""
        self._name = args["model_name"]
        try:
            self._options = parse_options(parameters_in(json.loads(args["model_config"])))
            self._tokenizer = open_tokenizer(self._options)
        except ModelConfigError as error:
            raise pb_utils.TritonModelException(str(error)) from error
        if self._options.tokenizer_dir is None:
            pb_utils.Logger.log_warn(f"{self._name}: no tokenizer_dir is set, so each UTF-8 byte is a token")

    def execute(self, requests: list[pb_utils.InferenceRequest]) -> list[pb_utils.InferenceResponse]:
        """Answer each request by itself: a bad one harms no other."""
        return [self._respond(request) for request in requests]

    def _respond(self, request: pb_utils.InferenceRequest) -> pb_utils.InferenceResponse:
        try:
            outputs = self._outputs({name: tensor.as_numpy() for name, tensor in inputs_of(request).items()})
            tensors = [pb_utils.Tensor(name, array) for name, array in outputs.items()]
        except RequestError as error:
            return failure(str(error), error.code)
        except Exception:  # noqa: BLE001  whatever it is, the other requests get their responses
            pb_utils.Logger.log_error(traceback.format_exc())
            return failure(f"{self._name} failed on this request; the server's log says why")
        return pb_utils.InferenceResponse(tensors)

    def _outputs(self, inputs: Tensors) -> Tensors:
        raise NotImplementedError


class Preprocessing(_TextModel):
    """Text to the engine's tensors."""

    def _outputs(self, inputs: Tensors) -> Tensors:
        return preprocess(self._tokenizer, self._options, inputs)


class Postprocessing(_TextModel):
    """The engine's tokens to text."""

    def _outputs(self, inputs: Tensors) -> Tensors:
        return postprocess(self._tokenizer, inputs)
