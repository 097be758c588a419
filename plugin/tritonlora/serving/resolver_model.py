# SPDX-FileCopyrightText: the tritonlora authors
# SPDX-License-Identifier: Apache-2.0
"""The resolver: responds with the inputs that name a request's adapter, once the engine can serve the adapter.

It is a step of an ensemble, before the engine's model, so that tokens never pass through Python. The router asks it,
too. So this one process alone knows what the engine holds.

This module translates between Triton and the modules that decide: `routing`, `admission`, `dispatcher` and `leases`.
`execute` returns at once. Each request gets its response when it may go on.
"""

from __future__ import annotations

import json
import os
import time
import traceback
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import triton_python_backend_utils as pb_utils

from .adapter_table import AdapterTable, pins
from .adapter_tensors import AdapterFiles
from .admission import PROMPT_TOKENS_A_STEP, Admission
from .bindings import Bindings, contents_of
from .counters import BASE, OUTCOMES, UNKNOWN, Statistics, add_to
from .dispatcher import Dispatcher, Request
from .engine_cache import EngineCache
from .errors import InvalidRequest, RequestError
from .holder import is_held
from .leases import Key, Lease, Leases
from .metrics import Snapshot
from .own_requests import Guard, OwnRequests
from .parameters import check_parameters, parameters_of
from .publishing import Publishing
from .response_cache import check_config
from .routing import SPLIT_KEY, Route, resolve, resolve_rows
from .server_process import STARTING_SECONDS, is_starting, name_for, started_at, warmed_at_start
from .table_file import TableFile
from .tickets import MOST_CARRIED_NBYTES, Ticket
from .triton import failure, inputs_of, new_kept_weights, parameters_in, values_of
from .wire import CONTROL, INPUT_LENGTHS, REQUIRED, STATE, wire_of

LONGEST_OUTPUT = 4096  # tokens of a request that does not tell its output length or its input length
PINS_SECONDS = 1.0  # between two looks for pinned adapters in the table
FINAL = pb_utils.TRITONSERVER_RESPONSE_COMPLETE_FINAL
FAILED = "the resolver failed on this request; the server's log says why"
NOT_FOR_CLIENTS = f"{CONTROL} is no input for clients; leave it out"


class TritonPythonModel:
    """The only instance of the resolver."""

    def initialize(self, args: dict[str, str]) -> None:
        """Read the adapter table, and start the dispatcher. The model does not load without a valid table."""
        config = json.loads(args["model_config"])
        check_config(config)
        parameters = parameters_in(config)
        self._wire = wire_of([one["name"] for one in config["output"]])
        self._repository = Path(args["model_repository"]).parent
        self._batching = config["max_batch_size"] > 0
        self._patience = float(parameters["cache_full_timeout_seconds"])
        self._capacity = int(parameters["cache_pages"])
        path = self._repository / parameters["router"] / "adapters.json"
        self._statistics = Statistics()
        self._table = TableFile(path, self._table_failed)
        self._seen_table = table = self._table.table()
        self._pinned_of: AdapterTable | None = None  # the table whose pinned adapters the dispatcher keeps
        self._pins_at = time.monotonic() + PINS_SECONDS  # the server takes no requests of a model that it still loads
        self._files = AdapterFiles(self._repository)
        self._kept = new_kept_weights()
        # lora_task_id -> adapter: of the table at the start, and those that requests asked for since then.
        self._routes = {entry.lora_task_id: Route(name, entry) for name, entry in table.entries.items()}
        self._was_loaded: set[int] = set()
        server = os.getppid()
        is_fresh = is_starting(server)
        self._bindings = Bindings(
            Path("/dev/shm", name_for(args["model_name"])),  # noqa: S108
            contents_of(table, only_warm=is_fresh),
        )
        self._guard = Guard(args["model_name"])
        warm, late = warmed_at_start(table, started_at(server)) if is_fresh else ({}, set())
        self._engine: OwnRequests | None = None
        self._dispatcher: Dispatcher | None = None
        if self._wire.sends_weights:
            now = time.monotonic()
            self._engine = OwnRequests(
                parameters["target"],
                parameters["engine_request"],
                self._files,
                self._routes.get,
                self._bindings.bind,
                self._guard,
                decoupled=parameters["target_is_decoupled"] == "true",
            )
            self._dispatcher = Dispatcher(
                Admission(
                    EngineCache(
                        self._capacity,
                        warm,
                        now,
                        late=late,
                        is_fresh=is_fresh,
                        may_pause=parameters.get("target_may_pause") == "true",
                    ),
                    now,
                    cautious_for=0.0 if is_fresh else STARTING_SECONDS,
                ),
                self._engine,
                load_timeout=float(parameters["load_timeout_seconds"]),
                on_error=pb_utils.Logger.log_error,
                on_load=self._loaded,
                on_pass=self._went_on,
                on_miss=lambda task_id: self._statistics.add(self._routes[task_id].lora_name, "unexpected_misses"),
            )
        self._sender = self._dispatcher or PassOn(warm.keys() - late)
        self._leases = Leases(self._sender, is_held)
        if self._dispatcher:
            self._dispatcher.watch(self._sweep)
        self._publishing = Publishing(
            self._snapshot, float(parameters.get("refresh_seconds", "0.5")), args["model_name"]
        )

    def execute(self, requests: list[pb_utils.InferenceRequest]) -> None:
        """Begin each request by itself: a bad request harms no other, and no request waits for another one."""
        for request in requests:
            inputs = inputs_of(request)
            control = (values_of(inputs, CONTROL) or [None])[0]
            if control and control.startswith(self._guard.key.encode()):
                self._guard.arrive(request.get_response_sender())
                continue
            call = Call(self, request)
            try:
                if CONTROL in inputs:
                    self._answer_own(inputs, control, call)
                else:
                    self._begin(inputs, parameters_of(request), call)
            except Exception as error:  # noqa: BLE001  any error must become the request's response
                call.fail(error)

    def finalize(self) -> None:
        """Refuse the requests that wait, and stop publishing."""
        if self._dispatcher and self._engine:
            self._dispatcher.stop()
            self._engine.finalize()
        self._publishing.stop()
        self._bindings.close()

    # Requests

    def _begin(self, inputs: Any, parameters: dict[str, Any], call: Call) -> None:
        """Begin a request of an ensemble."""
        self._resolve(inputs, parameters, call)
        if not call.routes:
            call.pass_on(with_weights=False)
            return
        ticket = Ticket(
            {route.entry.lora_task_id: self._pages(route) for route in call.routes},
            _longest(inputs),
            time.monotonic(),
            self._patience,
            takes_weights=_may_carry(call.routes),
        )
        self._sender.ask(ticket, call)

    def _answer_own(self, inputs: Any, control: bytes, call: Call) -> None:
        """Respond to a message of the router or of `lora_adapters`."""
        try:
            message = json.loads(control or b"")
            key: Key = (message["holder"], message["number"])
            does = _OWN[message["do"]]
        except (ValueError, KeyError, TypeError):
            raise InvalidRequest(NOT_FOR_CLIENTS) from None
        if not is_held(key[0]):
            raise InvalidRequest(NOT_FOR_CLIENTS)
        call.is_own = True
        does(self, key, message, inputs, call)

    def _enter(self, key: Key, message: dict[str, Any], inputs: Any, call: Call) -> None:
        tokens, now = _longest(inputs), time.monotonic()

        def new_ticket(route: Route, misses: int) -> Ticket:
            pages = {route.entry.lora_task_id: self._pages(route)}
            return Ticket(pages, tokens, now, self._patience, takes_weights=False, is_routers=True, misses=misses)

        call.key = key
        self._resolve(inputs, message["parameters"], call)
        lease = call.lease = Lease(call.routes, new_ticket)
        self._count(call.routes, "running")
        self._leases.enter(key, lease, call)

    def _row(self, key: Key, message: dict[str, Any], inputs: Any, call: Call) -> None:  # noqa: ARG002
        call.lease = self._leases.find(key)
        self._leases.row(key, message["row"], call)

    def _lost(self, key: Key, message: dict[str, Any], inputs: Any, call: Call) -> None:  # noqa: ARG002
        call.lease = self._leases.find(key)
        self._leases.lost(key, call)

    def _leave(self, key: Key, message: dict[str, Any], inputs: Any, call: Call) -> None:  # noqa: ARG002
        self._leases.leave(key)
        call.respond({})

    def _end(self, key: Key, message: dict[str, Any], inputs: Any, call: Call) -> None:  # noqa: ARG002
        outcome = message["outcome"] if message["outcome"] in OUTCOMES else "INTERNAL"
        lease = self._leases.end(key, had_it=outcome == "OK", is_over=message["is_over"])
        self._ended(lease, outcome)
        if (seconds := message.get("first_token_seconds")) is not None:
            self._statistics.took("first_token", seconds)
        call.respond({})

    def _load(self, key: Key, message: dict[str, Any], inputs: Any, call: Call) -> None:  # noqa: ARG002
        """Respond once the engine has the adapter. The engine gets no request of a client, and none is counted."""
        if not self._wire.sends_weights:
            raise InvalidRequest("this engine loads adapters by itself, each on its first request")
        route = resolve(self._current_table(), str(message["name"]), None)
        if route is None:
            raise InvalidRequest(NOT_FOR_CLIENTS)
        call.routes = [route]
        self._use(route)
        adapters = {route.entry.lora_task_id: self._pages(route)}
        ticket = Ticket(adapters, 0.0, time.monotonic(), self._patience, takes_weights=False, only_loads=True)
        self._sender.ask(ticket, call)

    def _tell(self, key: Key, message: dict[str, Any], inputs: Any, call: Call) -> None:  # noqa: ARG002
        call.respond({"states": self._sender.states(), "contents": self._bindings.contents()})

    def _resolve(self, inputs: Any, parameters: dict[str, Any], call: Call) -> None:
        """Set the adapters of the request's rows: none for the base model."""
        table = self._current_table()
        check_parameters(table, parameters)
        names = ("lora_name", self._wire.task_id, SPLIT_KEY)
        lora_names, lora_task_ids, split_keys = (values_of(inputs, name) for name in names)
        rows = next(iter(inputs.values())).shape()[0] if self._batching else 1
        call.routes = [route for route in resolve_rows(table, lora_names, lora_task_ids, rows, split_keys) if route]
        for route in call.routes:
            self._use(route)

    def _use(self, route: Route) -> None:
        """Note that a request is for this adapter. AdapterUnavailable when the engine cannot have its content."""
        if self._wire.sends_weights:
            self._bindings.check(route)
        else:
            self._files.check(route)  # the engine's own error would have the server's paths
            self._bindings.bind(route)  # the engine may read the adapter's files at any time
        self._routes[route.entry.lora_task_id] = route

    def _current_table(self) -> AdapterTable:
        """The table as it is now."""
        table = self._table.table()
        if table is not self._seen_table:
            self._seen_table = table
            self._statistics.add(BASE, "table_reloads")
            files = {file for one in table.entries.values() for file in (one.lora_weights_file, one.lora_config_file)}
            self._files.forget_all_but(files)
            if self._dispatcher:
                self._dispatcher.expect(
                    {one.lora_task_id: one.pages or 1 for one in table.entries.values() if one.warm}
                )
        return table

    def _pages(self, route: Route) -> int:
        return route.entry.pages or self._capacity

    def _sweep(self) -> None:
        for lease in self._leases.sweep():
            self._ended(lease, "INTERNAL")
        if time.monotonic() >= self._pins_at:
            self._pins_at = time.monotonic() + PINS_SECONDS
            self._pin()

    def _pin(self) -> None:
        """Have the pinned adapters of the table kept in the engine, if the table has changed."""
        table = self._table.table()
        if self._dispatcher is None or table is self._pinned_of:
            return
        self._pinned_of, kept = table, pins(table, self._capacity)
        asked = {entry.lora_task_id: Route(name, entry) for name, entry in table.entries.items() if entry.pinned}
        self._routes |= asked
        self._dispatcher.pin(kept)
        if left := [route.lora_name for task_id, route in asked.items() if task_id not in kept]:
            pb_utils.Logger.log_error(f"pinned, and not kept in the engine: {', '.join(left)}; see: tritonlora check")

    # What `Call` needs

    @property
    def required(self) -> str:
        """The input that the engine's model does not run without, see `Wire`."""
        return self._wire.required

    def naming_tensors(self, routes: Sequence[Route]) -> list[pb_utils.Tensor]:
        """The inputs of the engine's model that name these adapters, one for each row."""
        values = self._wire.naming_inputs(self._repository, routes)
        return [pb_utils.Tensor(name, value) for name, value in values.items()]

    def state_tensor(self, state: dict[str, Any]) -> pb_utils.Tensor:
        """lora_state (1, 1) string: JSON."""
        return pb_utils.Tensor(STATE, np.array([[json.dumps(state).encode()]], np.object_))

    def weights_of(self, route: Route) -> list[pb_utils.Tensor]:
        """lora_weights and lora_config, to be sent once. Call `weights_sent` after sending them."""
        weights, config = self._kept.tensor(self._files.weights(route)), self._files.config(route)
        self._bindings.bind(route)
        return [weights, pb_utils.Tensor("lora_config", config)]

    def weights_sent(self, route: Route) -> None:
        """Note that the adapter's weights were sent to the engine's step."""
        self._kept.sent()
        self._count_load(route.entry.lora_task_id)

    def passed_on(self, call: Call) -> None:
        """Count a request of an ensemble that has gone on."""
        self._count(call.routes, "OK")

    def failed(self, call: Call, code: str) -> None:
        """Count a request that was refused. A later message of the router counts when its request ends."""
        if call.is_own and call.key is None:
            return
        if call.lease is not None and call.key is not None:
            self._leases.drop(call.key)
            self._count(call.routes, "running", -1)
        self._count(call.routes, code, without=UNKNOWN)

    # Counts

    def _ended(self, lease: Lease | None, outcome: str) -> None:
        self._count(lease.routes if lease else (), outcome)
        if lease is not None:
            self._count(lease.routes, "running", -1)

    def _count(self, routes: Sequence[Route], column: str, amount: float = 1.0, *, without: str = BASE) -> None:
        for name in [route.lora_name for route in routes] or [without]:
            self._statistics.add(name, column, amount)

    def _loaded(self, task_id: int, seconds: float) -> None:
        self._count_load(task_id)
        self._statistics.add(self._routes[task_id].lora_name, "load_seconds", seconds)
        self._statistics.took("load", seconds)

    def _count_load(self, task_id: int) -> None:
        reason = "evicted" if task_id in self._was_loaded else "first_use"
        self._statistics.add(self._routes[task_id].lora_name, reason)
        self._was_loaded.add(task_id)

    def _went_on(self, ticket: Ticket) -> None:
        for task_id in ticket.adapters:
            self._statistics.add(self._routes[task_id].lora_name, ticket.result)
        self._statistics.took("wait", ticket.sent_at - ticket.arrived_at)

    def _snapshot(self) -> Snapshot:
        """What is to be published now."""
        table, counts = self._table.table(), self._statistics.counts()
        in_use, waiting = self._sender.in_use(), self._sender.waiting()
        used, awaited = ([name for one in ids if (name := table.name_of(one))] for ids in (in_use, waiting))
        for task_id, number in waiting.items():
            add_to(counts, self._routes[task_id].lora_name, "waiting", number)
        return Snapshot(
            counts=counts,
            times=self._statistics.times(),
            in_use=used,
            waiting=awaited,
            adapters=table.entries,
            held=self._sender.held(),
            pages=self._capacity,
        )

    def _table_failed(self, problem: str) -> None:
        pb_utils.Logger.log_error(problem)
        self._statistics.add(BASE, "table_failures")


_OWN = {
    "enter": TritonPythonModel._enter,
    "row": TritonPythonModel._row,
    "lost": TritonPythonModel._lost,
    "leave": TritonPythonModel._leave,
    "end": TritonPythonModel._end,
    "load": TritonPythonModel._load,
    "tell": TritonPythonModel._tell,
}


def _may_carry(routes: Sequence[Route]) -> bool:
    """Whether a request for these adapters may carry weights. The engine takes them in a batch of one."""
    return len(routes) == 1 and routes[0].entry.lora_weights_nbytes <= MOST_CARRIED_NBYTES


def _longest(inputs: Any) -> float:
    """The most iterations of the engine that a request takes: its output, and its prompt in PROMPT_TOKENS_A_STEP."""
    lengths = values_of(inputs, REQUIRED) or [LONGEST_OUTPUT]
    prompts = values_of(inputs, INPUT_LENGTHS) or [LONGEST_OUTPUT]
    return float(max(1, *lengths) + max(0, *prompts) / PROMPT_TOKENS_A_STEP)


class PassOn:
    """In the place of a dispatcher, for an engine that reads adapters by itself: each request goes on at once."""

    def __init__(self, warm: Iterable[int]) -> None:
        """`warm` are the adapters that the engine's warmup loads."""
        self._states = dict.fromkeys(warm, False)

    def ask(self, ticket: Ticket, request: Request) -> None:
        """Send the request on."""
        request.pass_on(with_weights=False)
        self._states = dict.fromkeys(self._states, False) | dict.fromkeys(ticket.adapters, True)

    def states(self) -> dict[int, bool]:
        """The adapters that the engine may have. It certainly has the one that was used last."""
        return self._states

    def leave(self, ticket: Ticket) -> bool:  # noqa: ARG002
        """No request waits."""
        return False

    def held(self) -> None:
        """It is not known which adapters the engine holds."""

    def waiting(self) -> Mapping[int, int]:
        """No request waits."""
        return {}

    def in_use(self) -> list[int]:
        """It is not known which adapters are in use."""
        return []

    def end(self, ticket: Ticket, *, had_it: bool) -> None:
        """Nothing follows from the end of a request."""

    def lost(self, ticket: Ticket) -> None:
        """As `end`."""

    def leave_behind(self, ticket: Ticket) -> None:
        """As `end`."""


class Call:
    """A request to the resolver, from its arrival to its response. It implements `dispatcher.Request`."""

    def __init__(self, model: TritonPythonModel, request: pb_utils.InferenceRequest) -> None:
        self._model = model
        self._sender = request.get_response_sender()
        asked = {model.required} & set(request.requested_output_names())
        # The response returns this input as it came. Triton's response cache turns an error into an empty response,
        # which must not mean the base model. An older ensemble neither sends nor requests it.
        self._required = [(one.name(), one.as_numpy()) for one in request.inputs() if one.name() in asked]
        self.routes: list[Route] = []  # the adapters of its rows; empty for the base model
        self.is_own = False  # a message of the router or of `lora_adapters`
        self.key: Key | None = None  # of the router's request that this message begins
        self.lease: Lease | None = None  # the router's request that the message belongs to

    def pass_on(self, *, with_weights: bool) -> None:
        """Respond with the engine's LoRA inputs for the rows, with the weights if `with_weights`."""
        tensors = [pb_utils.Tensor(name, array) for name, array in self._required]
        if self.routes:
            tensors += self._model.naming_tensors(self.routes)
        if self.is_own:
            tensors.append(self._model.state_tensor({"lora_names": [route.lora_name for route in self.routes]}))
        if with_weights:
            tensors += self._model.weights_of(self.routes[0])
        self._sender.send(pb_utils.InferenceResponse(tensors), flags=FINAL)
        if with_weights:
            self._model.weights_sent(self.routes[0])
        if not self.is_own:
            self._model.passed_on(self)

    def respond(self, state: dict[str, Any]) -> None:
        """Respond with lora_state."""
        self._sender.send(pb_utils.InferenceResponse([self._model.state_tensor(state)]), flags=FINAL)

    def fail(self, error: Exception) -> None:
        """Respond with the error. A RequestError goes to the client; any other error to the log, and as INTERNAL."""
        code, message = "INTERNAL", FAILED
        if isinstance(error, RequestError):
            code, message = error.code, self._about(error)
        else:
            pb_utils.Logger.log_error("".join(traceback.format_exception(error)))
        if self.lease is not None:
            self.lease.give_up()
        self._model.failed(self, code)
        if self.is_own:  # a response to a BLS request would lose the code (Triton 2.51)
            self.respond({"refused": [message, code]})
        else:
            self._sender.send(failure(message, code), flags=FINAL)

    def _about(self, error: RequestError) -> str:
        """The error's text, with the adapter's name in front if the text does not have it."""
        message = str(error).encode(errors="replace").decode()  # Triton takes no lone surrogates
        routes = self.routes or (self.lease.routes if self.lease else [])
        if not routes or "LoRA adapter" in message:
            return message
        return f"LoRA adapter {routes[0].lora_name!r}: {message}"
