# SPDX-FileCopyrightText: the tritonlora authors
# SPDX-License-Identifier: Apache-2.0
"""The connection of the door to one server, and what that server serves."""

from __future__ import annotations

import asyncio
import gc
import logging
from collections.abc import AsyncIterator, Mapping
from contextlib import asynccontextmanager
from typing import Any

from tritonlora.errors import TritonLoraError
from tritonlora.openai.api_error import ApiError, invalid, unavailable, unknown_model
from tritonlora.openai.discovery import Served, discover, listing
from tritonlora.openai.generation import Generations
from tritonlora.openai.metrics import Metrics
from tritonlora.openai.settings import Settings
from tritonlora.openai.triton_client import ServerGone, ServerRefused, TritonClient
from tritonlora.serving.adapter_table import NAME_PATTERN

log = logging.getLogger("tritonlora.openai")
RETRY_SECONDS = 1.0


class Door:
    """One door. It looks for its server until it has found out what the server serves."""

    client: TritonClient
    generations: Generations

    def __init__(self, settings: Settings, metrics: Metrics) -> None:
        self._settings = settings
        self._metrics = metrics
        self._served: Served | None = None
        self._problem = ""

    @asynccontextmanager
    async def opened(self) -> AsyncIterator[None]:
        """Connected while the block runs."""
        async with TritonClient(self._settings.url) as self.client:
            self.generations = Generations(self.client, self._settings.stall_seconds)
            looking = asyncio.create_task(self._look())
            try:
                yield
            finally:
                looking.cancel()
                await self.generations.close()

    def served(self) -> Served:
        """What the server serves; ApiError while that is not known."""
        if self._served is None:
            raise unavailable("the server behind this API is not ready; ask again")
        return self._served

    async def adapters(self) -> Mapping[str, Mapping[str, Any]]:
        """The adapters of the server, as they are now."""
        try:
            found = await listing(self.client)
        except (ServerGone, ServerRefused) as error:
            log.warning("the server at %s does not list its adapters: %s", self._settings.url, error)
            raise unavailable("the server behind this API does not answer; ask again") from None
        self._metrics.know(_names(found))
        return found

    async def check_name(self, served: Served, name: str) -> None:
        """Refuse a name that cannot be an adapter's, and one that is the base model's as well as an adapter's.

        The resolver refuses the unknown ones among the others.
        """
        if name == served.base_name:
            if NAME_PATTERN.fullmatch(name) and name in _names(await self.adapters()):
                raise invalid(f"{name!r} is both the base model and an adapter; rename one of them", "model")
        elif not NAME_PATTERN.fullmatch(name):
            raise await self.unknown(served, name)

    async def unknown(self, served: Served, name: str) -> ApiError:
        """The error of a request for a model that does not exist."""
        return unknown_model(name, served.base_name, ", ".join(_names(await self.adapters())))

    async def first_of(self, served: Served, name: str, error: ApiError) -> ApiError:
        """The error to answer with: if the model does not exist, that comes before `error`."""
        is_known = name == served.base_name or name in _names(await self.adapters())
        return error if is_known else await self.unknown(served, name)

    async def _look(self) -> None:
        while self._served is None:
            try:
                found = await discover(self.client, self._settings)
                # The libraries' objects stay for good. A collector that looked at all of them would hold up every
                # stream, for 50 to 150 ms each time.
                gc.collect()
                gc.freeze()
                self._served = found
                log.info("the base model is %s", self._served.base_name)
            except (ServerGone, ServerRefused, TritonLoraError) as error:
                problem = str(error)
                if isinstance(error, ServerGone):  # gRPC's own text differs each time, by the address that it tried
                    problem = f"no answer from {self._settings.url}; is that the gRPC endpoint of a running server?"
                if problem != self._problem:
                    log.warning("not ready yet: %s", problem)
                self._problem = problem
                await asyncio.sleep(RETRY_SECONDS)


def _names(found: Mapping[str, Mapping[str, Any]]) -> list[str]:
    return sorted({*found, *(alias for one in found.values() for alias in one.get("aliases", ()))})
