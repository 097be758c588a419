# SPDX-FileCopyrightText: the tritonlora authors
# SPDX-License-Identifier: Apache-2.0
"""The differences between upstream's two backends for the same engine that a client can see."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Backend:
    """The error texts of one of upstream's backends, as templates for `str.format`."""

    executor_error: str
    input_error: str
    no_output_len: str
    needs_decoupled_to_stream: str
    ignores_weights_without_task: bool
    reads_bfloat16: bool
    insists_on_both_outputs: bool


BACKENDS = {
    # tensorrtllm_backend inflight_batcher_llm/src/model_instance_state.cc and utils.cc
    "cpp": Backend(
        executor_error="Executor failed process requestId {id} due to the following error: {error}",
        input_error="{error}",
        no_output_len="request_output_len is not present in the request",
        needs_decoupled_to_stream="Streaming is only supported if model is deployed using decoupled mode.",
        ignores_weights_without_task=True,
        reads_bfloat16=True,
        insists_on_both_outputs=True,
    ),
    # tensorrtllm_backend all_models/inflight_batcher_llm/tensorrt_llm/1/model.py
    "python": Backend(
        executor_error="{error}",
        input_error="An error occurred when processing the input values for request id {id}, the error was '{error}'",
        no_output_len="A value is required for request_output_len",
        needs_decoupled_to_stream="Streaming is only supported in decoupled mode.",
        ignores_weights_without_task=False,
        reads_bfloat16=False,
        insists_on_both_outputs=False,
    ),
}
