# SPDX-FileCopyrightText: the tritonlora authors
# SPDX-License-Identifier: Apache-2.0
"""The models `preprocessing` and `postprocessing`: text to the engine's tensors, and the engine's tokens to text.

They translate between Triton and `text`, which decides.
"""

from __future__ import annotations

import json
import traceback
from collections.abc import Mapping
from typing import Any

import triton_python_backend_utils as pb_utils

from .errors import ModelConfigError, RequestError
from .parameters import id_of
from .text import Tensors, begin, open_tokenizer, parse_options, postprocess, preprocess
from .text_streams import TextStreams
from .triton import failure, parameters_in


class _TextModel:
    """The code that both models share."""

    def initialize(self, args: dict[str, str]) -> None:
        """Load the tokenizer. The model does not load without one."""
        self._name = args["model_name"]
        config = json.loads(args["model_config"])
        try:
            self._options = parse_options(parameters_in(config))
            self._tokenizer = open_tokenizer(self._options)
        except ModelConfigError as error:
            raise pb_utils.TritonModelException(str(error)) from error
        if self._options.tokenizer_dir is None:
            pb_utils.Logger.log_warn(f"{self._name}: no tokenizer_dir is set, so each UTF-8 byte is a token")
        self._configure(config)

    def execute(self, requests: list[pb_utils.InferenceRequest]) -> list[pb_utils.InferenceResponse]:
        """Respond to each request by itself: a bad request harms no other."""
        return [self._respond(request) for request in requests]

    def _respond(self, request: pb_utils.InferenceRequest) -> pb_utils.InferenceResponse:
        try:
            outputs = self._outputs(request, {tensor.name(): tensor.as_numpy() for tensor in request.inputs()})
            tensors = [pb_utils.Tensor(name, array) for name, array in outputs.items()]
        except RequestError as error:
            return failure(str(error), error.code)
        except Exception:  # noqa: BLE001  an error of one request must not fail the others
            pb_utils.Logger.log_error(traceback.format_exc())
            return failure(f"{self._name} failed on this request; the server's log says why")
        return pb_utils.InferenceResponse(tensors)

    def _configure(self, config: Mapping[str, Any]) -> None:
        """Read the fields of the model's config that are not parameters."""

    def _outputs(self, request: pb_utils.InferenceRequest, inputs: Tensors) -> Tensors:
        raise NotImplementedError


class Preprocessing(_TextModel):
    """Text to the engine's tensors."""

    def _outputs(self, request: pb_utils.InferenceRequest, inputs: Tensors) -> Tensors:  # noqa: ARG002
        return preprocess(self._tokenizer, self._options, inputs)


class Postprocessing(_TextModel):
    """The engine's tokens to text.

    A request with REQUEST_OUTPUT_LEN announces a request that goes to the engine next, with the same request id.
    """

    def _configure(self, config: Mapping[str, Any]) -> None:
        """Remember streams only if this process sees each response of a stream, in order."""
        instance_count = sum(group.get("count", 1) for group in config.get("instance_group", [{}]))
        is_cached = config.get("response_cache", {}).get("enable", False)
        self._streams = None if instance_count > 1 or is_cached else TextStreams()
        if self._streams is None:
            pb_utils.Logger.log_warn(
                f"{self._name}: with several instances or a response cache, a streamed character of several tokens "
                "is broken in an ensemble without the router; set count: 1, and take response_cache out"
            )

    def _outputs(self, request: pb_utils.InferenceRequest, inputs: Tensors) -> Tensors:
        if "REQUEST_OUTPUT_LEN" not in inputs:
            return postprocess(self._tokenizer, inputs, self._streams, id_of(request) if self._streams else "")
        outputs, is_free = begin(self._streams, id_of(request), inputs)
        if not is_free:
            pb_utils.Logger.log_warn(
                f"{self._name}: request id {request.request_id()!r} came again before the end of its stream was seen, "
                "so each response with this id is decoded by itself; send a different id with each request"
            )
        return outputs
