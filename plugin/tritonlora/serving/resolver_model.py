# SPDX-FileCopyrightText: the tritonlora authors
# SPDX-License-Identifier: Apache-2.0
"""The resolver: says which lora_task_id a request means, and gives the adapter's weights where the engine may not have
them. A step of an ensemble, before the engine's model, so that tokens never pass through Python.

This module translates between Triton and `routing` and `residency_estimate`, which decide.
"""

from __future__ import annotations

import functools
import json
import os
import time
import traceback
from pathlib import Path

import numpy as np
import triton_python_backend_utils as pb_utils

from .adapter_tensors import DIGESTS, AdapterFiles
from .counters import BASE, STATISTICS, Statistics
from .errors import InvalidRequest, RequestError
from .parameters import check_parameters, parameters_of
from .residency import open_inside, take_part
from .residency_estimate import ResidencyEstimate, started_at, warmed_at_start
from .response_cache import check_config
from .reused_tensor import KeptWeights
from .routing import Route, check_id, resolve_rows
from .table_file import TableFile
from .triton import failure, inputs_of, parameters_in, values_of
from .wire import ENGINE_MODEL

# An input that the engine refuses to be without, and that it gets from here: an empty response, which Triton's response
# cache makes of an error, cannot mean the base model.
REQUIRED = "request_output_len"


class TritonPythonModel:
    """One instance of the resolver."""

    def initialize(self, args: dict[str, str]) -> None:
        """Read the router's adapter table; the model does not load when there is no good one."""
        config = json.loads(args["model_config"])
        check_config(config)
        parameters = parameters_in(config)
        repository = Path(args["model_repository"]).parent
        self._batching = config["max_batch_size"] > 0
        path = repository / parameters["router"] / "adapters.json"
        table = TableFile(path, lambda _: None).table()  # what is wrong is said below, once
        self._residency = take_part(parameters["router"], table)
        shared = self._residency.descriptor
        self._statistics = Statistics(open_inside(shared, STATISTICS))
        self._files = AdapterFiles(repository, open_inside(shared, DIGESTS))
        self._kept = KeptWeights(functools.partial(pb_utils.Tensor.from_dlpack, "lora_weights"))
        self._table = TableFile(path, self._table_failed)
        self._seen_table = self._table.table()
        self._estimate = ResidencyEstimate(
            self._seen_table,
            warmed_at_start(self._seen_table, started_at(os.getppid())),
            self._residency.retired_before(),
            int(parameters["cache_pages"]),
            sees_all=sum(group["count"] for group in config["instance_group"]) == 1,
            resend_seconds=float(parameters["resend_seconds"]),
            longest_request_seconds=float(parameters["longest_request_seconds"]),
        )

    def execute(self, requests: list[pb_utils.InferenceRequest]) -> list[pb_utils.InferenceResponse]:
        """Answer each request by itself: a bad one harms no other."""
        # Triton has copied the outputs of a call before it makes the next one (python_backend src/python_be.cc,
        # ModelInstanceState::ProcessRequests).
        self._kept.sent()
        return [self._answer(request) for request in requests]

    def finalize(self) -> None:
        """Leave what the instances share."""
        self._residency.close()

    def _answer(self, request: pb_utils.InferenceRequest) -> pb_utils.InferenceResponse:
        names: list[str] = []
        try:
            routes = self._routes(request)
            names = [route.lora_name if route else BASE for route in routes]
            tensors = self._tensors([route for route in routes if route])
            response = pb_utils.InferenceResponse([*required(request), *tensors])
            outcome = "OK"
        except RequestError as error:
            outcome = error.code
            response = failure(str(error), outcome)
        except Exception:  # noqa: BLE001  whatever it is, the others are answered
            pb_utils.Logger.log_error(traceback.format_exc())
            outcome = "INTERNAL"
            response = failure("the resolver failed on this request; the server's log says why", outcome)
        for name in names or [BASE]:
            self._statistics.add(name, outcome)
        return response

    def _routes(self, request: pb_utils.InferenceRequest) -> list[Route | None]:
        """The adapter of each row."""
        table = self._table.table()
        if table is not self._seen_table:
            self._seen_table = table
            self._estimate.see(table)
            self._statistics.add(BASE, "table_reloads")
        check_parameters(table, parameters_of(request))
        inputs = inputs_of(request)
        lora_names, lora_task_ids = (values_of(inputs, name) for name in ("lora_name", ENGINE_MODEL.task_id))
        rows = request.inputs()[0].shape()[0] if self._batching else 1
        return resolve_rows(table, lora_names, lora_task_ids, rows)

    def _tensors(self, routes: list[Route]) -> list[pb_utils.Tensor]:
        """What the engine's model is given for these rows; nothing for the base model."""
        if not routes:
            return []
        for route in routes:
            check_id(route, self._residency.may_give)
        task_ids = np.array([[route.entry.lora_task_id] for route in routes], np.uint64)
        tensors = [pb_utils.Tensor(ENGINE_MODEL.task_id, task_ids)]
        now = time.monotonic()
        if any(self._estimate.must_send(route.entry.lora_task_id, now) for route in routes):
            if len(routes) > 1:
                raise InvalidRequest(
                    "the engine may have to be given weights, which it takes in a batch of one; send the rows apart"
                )
            weights, config = self._kept.tensor(self._files.weights(routes[0])), self._files.config(routes[0])
            check_id(routes[0], self._residency.gives)
            self._estimate.sent(routes[0].entry.lora_task_id, now)
            tensors += [weights, pb_utils.Tensor("lora_config", config)]
        return tensors

    def _table_failed(self, problem: str) -> None:
        pb_utils.Logger.log_error(problem)
        self._statistics.add(BASE, "table_failures")


def required(request: pb_utils.InferenceRequest) -> list[pb_utils.Tensor]:
    """REQUIRED as it came; nothing for an ensemble from before, which neither gives it nor asks for it."""
    asked = {REQUIRED} & set(request.requested_output_names())
    return [pb_utils.Tensor(tensor.name(), tensor.as_numpy()) for tensor in request.inputs() if tensor.name() in asked]
