# SPDX-FileCopyrightText: the tritonlora authors
# SPDX-License-Identifier: Apache-2.0
"""Functions on Triton's requests, responses and configs that all of tritonlora's models share."""

from __future__ import annotations

import functools
from collections.abc import Mapping
from typing import Any, TypeAlias

import triton_python_backend_utils as pb_utils

from .counters import OUTCOMES
from .engine_errors import is_unavailable
from .reused_tensor import KeptWeights

Inputs: TypeAlias = "Mapping[str, pb_utils.Tensor]"  # of a request, by name


def inputs_of(request: pb_utils.InferenceRequest) -> Inputs:
    """The inputs of a request by name."""
    return {tensor.name(): tensor for tensor in request.inputs()}


def values_of(inputs: Inputs, name: str) -> list[Any] | None:
    """The elements of an input, or None when the request does not have it."""
    tensor = inputs.get(name)
    return None if tensor is None else tensor.as_numpy().reshape(-1).tolist()


def parameters_in(config: Mapping[str, Any]) -> dict[str, str]:
    """The parameters of a model's config, which Triton gives as JSON."""
    return {key: value["string_value"] for key, value in config["parameters"].items()}


def failure(message: str, code: str = "INTERNAL") -> pb_utils.InferenceResponse:
    """An error response. `code` is a name in `pb_utils.TritonError`."""
    return pb_utils.InferenceResponse(error=pb_utils.TritonError(message, getattr(pb_utils.TritonError, code)))


def error_of(response: pb_utils.InferenceResponse) -> pb_utils.TritonError | None:
    """The error in a response to a BLS request, or None."""
    return response.error() if response.has_error() else None


def code_of(error: pb_utils.TritonError) -> str:
    """The name of an error's code in `pb_utils.TritonError`. UNAVAILABLE for a model that is not ready."""
    if is_unavailable(error.message()):
        return "UNAVAILABLE"
    names = (name for name in OUTCOMES if getattr(pb_utils.TritonError, name, None) == error.code())
    return next(names, "INTERNAL")


def new_kept_weights() -> KeptWeights[pb_utils.Tensor]:
    """A `KeptWeights` without a tensor, for the tensors that one thread sends."""
    return KeptWeights(functools.partial(pb_utils.Tensor.from_dlpack, "lora_weights"))
