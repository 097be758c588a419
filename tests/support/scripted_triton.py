# SPDX-FileCopyrightText: the tritonlora authors
# SPDX-License-Identifier: Apache-2.0
"""A gRPC server with Triton's API, and a door before it, both in the test's process.

A token is a byte. The engine repeats the last token of the prompt. After a prompt that ends with "!" it falls silent
when it has sent two tokens. After one that ends with "~" it takes a millisecond for each.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import socket
from collections.abc import AsyncIterator
from typing import Any

import grpc
import httpx
import numpy as np
import uvicorn
from google.protobuf import text_format
from tritonclient.grpc import model_config_pb2
from tritonclient.grpc import service_pb2 as pb
from tritonclient.grpc.service_pb2_grpc import GRPCInferenceServiceServicer, add_GRPCInferenceServiceServicer_to_server

from tritonlora.openai.app import create_app
from tritonlora.openai.settings import Settings
from tritonlora.openai.tracing import Tracing
from tritonlora.repository.shipped import shipped_models

ADAPTERS = {"pirate": {"aliases": ["arr"]}, "haiku": {"aliases": []}}
BEFORE_SILENCE = 2


class ScriptedTriton(GRPCInferenceServiceServicer):  # type: ignore[misc]
    """The server, and what it was asked."""

    def __init__(self) -> None:
        self.asked: list[Any] = []  # each ModelInferRequest that generates
        self.metadata: list[dict[str, str]] = []  # of the same
        self.stopped: asyncio.Queue[str] = asyncio.Queue()  # ids of requests that were to be stopped
        self._ended: set[str] = set()
        target = _config("tensorrt_llm")
        ensemble = _config("tensorrt_llm")
        ensemble.name = "lora_tokens"
        ensemble.input.add(name="lora_name", data_type=model_config_pb2.TYPE_STRING, dims=[1], optional=True)
        self._configs = {
            "tensorrt_llm": target,
            "lora_tokens": ensemble,
            "lora_adapters": _config("lora_adapters"),
            "preprocessing": _config("preprocessing"),
        }

    async def RepositoryIndex(self, _request: Any, _context: Any) -> Any:  # noqa: N802  gRPC's names
        found = pb.RepositoryIndexResponse()
        for name in self._configs:
            found.models.add(name=name)
        return found

    async def ModelConfig(self, request: Any, _context: Any) -> Any:  # noqa: N802
        return pb.ModelConfigResponse(config=self._configs[request.name])

    async def ModelReady(self, _request: Any, _context: Any) -> Any:  # noqa: N802
        return pb.ModelReadyResponse(ready=True)

    async def ModelInfer(self, _request: Any, _context: Any) -> Any:  # noqa: N802  of lora_adapters alone
        found = json.dumps(ADAPTERS).encode()
        return pb.ModelInferResponse(raw_output_contents=[len(found).to_bytes(4, "little") + found])

    async def ModelStreamInfer(self, requests: Any, context: Any) -> AsyncIterator[Any]:  # noqa: N802
        async for request in requests:
            inputs = dict(zip([one.name for one in request.inputs], request.raw_input_contents, strict=True))
            if "stop" in inputs:
                self.stopped.put_nowait(request.id)
                self._ended.add(request.id)
                continue
            self.asked.append(request)
            self.metadata.append(dict(context.invocation_metadata()))
            if (name := inputs.get("lora_name", b"")[4:].decode()) and name not in (*ADAPTERS, "arr"):
                names = ", ".join(sorted([*ADAPTERS, "arr"]))
                yield pb.ModelStreamInferResponse(error_message=f"unknown LoRA adapter {name!r}; available: {names}")
                continue
            token = int(np.frombuffer(inputs["input_ids"], np.int32)[-1])
            for number in range(int(np.frombuffer(inputs["request_output_len"], np.int32)[0])):
                if token == ord("!") and number == BEFORE_SILENCE:
                    await asyncio.Event().wait()
                if token == ord("~"):
                    await asyncio.sleep(0.001)
                if request.id in self._ended:
                    break
                yield pb.ModelStreamInferResponse(infer_response=_response(token))


def _config(name: str) -> Any:
    text = (shipped_models() / name / "config.pbtxt").read_text()
    return text_format.Parse(text, model_config_pb2.ModelConfig())


def _response(token: int) -> Any:
    response = pb.ModelInferResponse()
    for name, value in (("output_ids", token), ("sequence_length", 1)):
        response.outputs.add(name=name, datatype="INT32", shape=[1, 1, 1])
        response.raw_output_contents.append(np.array([value], np.int32).tobytes())
    return response


@contextlib.asynccontextmanager
async def opened(
    *, tracing: Tracing | None = None, **settings: Any
) -> AsyncIterator[tuple[ScriptedTriton, httpx.AsyncClient]]:
    """The server, and a client of the door before it, while the block runs."""
    triton, server = ScriptedTriton(), grpc.aio.server()
    add_GRPCInferenceServiceServicer_to_server(triton, server)
    port = server.add_insecure_port("127.0.0.1:0")
    await server.start()
    app = create_app(Settings(url=f"127.0.0.1:{port}", context_length=1000, **settings), tracing)
    door = uvicorn.Server(uvicorn.Config(app, lifespan="on", log_config=None, timeout_graceful_shutdown=1))
    with socket.create_server(("127.0.0.1", 0)) as listening:
        serving = asyncio.create_task(door.serve(sockets=[listening]))
        try:
            url = f"http://127.0.0.1:{listening.getsockname()[1]}"
            async with httpx.AsyncClient(base_url=url, timeout=30) as client:
                while (await client.get("/health")).status_code != httpx.codes.OK:
                    assert not serving.done()
                yield triton, client
        finally:
            door.should_exit = True
            await serving
            await server.stop(None)
