# SPDX-FileCopyrightText: the tritonlora authors
# SPDX-License-Identifier: Apache-2.0
"""The model `lora_adapters`: lists the adapters for clients, and has the engine load them.

It asks the resolver, which knows what the engine holds.
"""

from __future__ import annotations

import json
import traceback
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import triton_python_backend_utils as pb_utils

from .errors import InvalidRequest, RequestError
from .listing import HELD, Engine, describe
from .resolver_client import ResolverClient, ResolverError
from .response_cache import check_config
from .routing import shares_of
from .table_file import TableFile
from .triton import failure, inputs_of, parameters_in, values_of

LOADS_AT_A_TIME = 4  # that wait at the resolver, which sends the engine one adapter after the other


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
        self._loads = ThreadPoolExecutor(LOADS_AT_A_TIME)

    def execute(self, requests: list[pb_utils.InferenceRequest]) -> None:
        """Respond to each request with the listing: JSON, in the output `adapters` (1,) string.

        A request with `load` waits in a thread until the engine has the adapters, so that no listing waits for it.
        """
        for request in requests:
            inputs = inputs_of(request)
            sender, names = request.get_response_sender(), values_of(inputs, "lora_name")
            if any(values_of(inputs, "load") or ()):
                self._loads.submit(self._respond, sender, names, self._loaded)
            else:
                self._respond(sender, names, self._listed)

    def finalize(self) -> None:
        """End the proof that messages to the resolver come from here."""
        self._loads.shutdown()
        self._resolver.close()

    def _respond(
        self, sender: Any, names: list[bytes] | None, listing: Callable[[bytes | None], dict[str, dict[str, Any]]]
    ) -> None:
        try:
            listed = listing(None if names is None else names[0])
            tensor = pb_utils.Tensor("adapters", np.array([json.dumps(listed)], np.object_))
            response = pb_utils.InferenceResponse([tensor])
        except (RequestError, ResolverError) as error:
            response = failure(str(error), error.code)
        except Exception:  # noqa: BLE001  an error of one request must not fail the others
            pb_utils.Logger.log_error(traceback.format_exc())
            response = failure("the listing failed on this request; the server's log says why", "INTERNAL")
        sender.send(response, flags=pb_utils.TRITONSERVER_RESPONSE_COMPLETE_FINAL)

    def _listed(self, lora_name: bytes | None) -> dict[str, dict[str, Any]]:
        table = self._table.table()
        only = None if lora_name is None else shares_of(table, lora_name)
        told = self._resolver.tell()
        states, contents = ({int(one): value for one, value in told[key].items()} for key in ("states", "contents"))
        return describe(table, self._repository, Engine(states, contents), only)

    def _loaded(self, lora_name: bytes | None) -> dict[str, dict[str, Any]]:
        """The listing of the adapters that a name leads to, once the engine has them, each with its `load`."""
        if lora_name is None:
            raise InvalidRequest("load goes with a lora_name")
        loads = {}
        for name, before in self._listed(lora_name).items():
            loads[name] = {"result": "held" if before["state"] in HELD else "loaded"}
            try:
                self._resolver.load(name)
            except ResolverError as error:
                loads[name] = {"result": "refused", "reason": str(error)}
        return {
            name: {**about, "load": loads[name]} for name, about in self._listed(lora_name).items() if name in loads
        }
