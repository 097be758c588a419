# SPDX-FileCopyrightText: the tritonlora authors
# SPDX-License-Identifier: Apache-2.0
"""The model `lora_adapters`: lists the adapters for clients. It asks the resolver which ones the engine holds."""

from __future__ import annotations

import json
import traceback
from pathlib import Path

import numpy as np
import triton_python_backend_utils as pb_utils

from .errors import RequestError
from .listing import Engine, describe
from .resolver_client import ResolverClient, ResolverError
from .response_cache import check_config
from .routing import shares_of
from .table_file import TableFile
from .triton import failure, parameters_in


class TritonPythonModel:
    """The only instance of `lora_adapters`."""

    def initialize(self, args: dict[str, str]) -> None:
        """Read the router's adapter table. The model does not load without a valid table."""
        config = json.loads(args["model_config"])
        check_config(config)
        parameters = parameters_in(config)
        self._repository = Path(args["model_repository"]).parent
        self._table = TableFile(self._repository / parameters["router"] / "adapters.json", pb_utils.Logger.log_error)
        self._resolver = ResolverClient(parameters.get("resolver", "lora_resolver"))

    def execute(self, requests: list[pb_utils.InferenceRequest]) -> list[pb_utils.InferenceResponse]:
        """Respond to each request with the listing: JSON, in the output `adapters` (1,) string."""
        return [self._answer(request) for request in requests]

    def finalize(self) -> None:
        """End the proof that messages to the resolver come from here."""
        self._resolver.close()

    def _answer(self, request: pb_utils.InferenceRequest) -> pb_utils.InferenceResponse:
        try:
            asked = pb_utils.get_input_tensor_by_name(request, "lora_name")
            table = self._table.table()
            only = shares_of(table, asked.as_numpy().reshape(-1)[0]) if asked else None
            told = self._resolver.tell()
            states, contents = ({int(one): value for one, value in told[key].items()} for key in ("states", "contents"))
            found = describe(table, self._repository, Engine(states, contents), only)
        except (RequestError, ResolverError) as error:
            return failure(str(error), error.code)
        except Exception:  # noqa: BLE001  an error of one request must not fail the others
            pb_utils.Logger.log_error(traceback.format_exc())
            return failure("the listing failed on this request; the server's log says why", "INTERNAL")
        return pb_utils.InferenceResponse([pb_utils.Tensor("adapters", np.array([json.dumps(found)], np.object_))])
