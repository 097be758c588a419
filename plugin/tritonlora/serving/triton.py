# SPDX-FileCopyrightText: the tritonlora authors
# SPDX-License-Identifier: Apache-2.0
"""Functions on Triton's requests, responses and configs that all of tritonlora's models share."""

from __future__ import annotations

import functools
from collections.abc import Mapping
from typing import Any, TypeAlias

import triton_python_backend_utils as pb_utils

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


def new_kept_weights() -> KeptWeights[pb_utils.Tensor]:
    """A `KeptWeights` without a tensor, for the tensors that one thread sends."""
    return KeptWeights(functools.partial(pb_utils.Tensor.from_dlpack, "lora_weights"))
