# SPDX-FileCopyrightText: the tritonlora authors
# SPDX-License-Identifier: Apache-2.0
"""The executor's loop: one thread takes requests from a queue, and each iteration computes a token for each of them.

A request is first *submitted* (it waits in the queue and holds nothing), then *taken* (its LoRA is checked and its
pages are pinned), then *active* until it ends. At most `max_num_requests` are active. An iteration takes no more
requests once their prompts have the model's `max_num_tokens`. This module knows neither the model nor Triton.
"""

from __future__ import annotations

import contextlib
import itertools
import threading
import time
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Generic, Protocol, TypeVar

from tritonlora.cpu_engine.backend import Backend
from tritonlora.cpu_engine.peft_cache import LoraCache, LoraCacheError, PeftCache, TaskNotCachedError
from tritonlora.cpu_engine.request import GenerationRequest, LoraInputs
from tritonlora.cpu_engine.validation import Rows, check_lora_tensors
from tritonlora.engine.lora_cache import CacheParameters, PageGeometry, rank_geometries
from tritonlora.engine.profile import EngineProfile
from tritonlora.errors import EngineMismatch

AdapterT = TypeVar("AdapterT")
StateT = TypeVar("StateT")


class Model(Protocol[AdapterT, StateT]):
    """A model that computes tokens. All calls come from the executor's thread."""

    @property
    def iteration_seconds(self) -> float:
        """The least duration of an iteration."""

    @property
    def max_sequence_length(self) -> int:
        """The most tokens of prompt and response together."""

    @property
    def max_num_tokens(self) -> int:
        """About the most tokens of prompts that one iteration should read."""

    def load_adapter(self, lora: LoraInputs) -> AdapterT:
        """Load an adapter from its checked wire tensors. Copy them: their memory is the request's."""

    def begin(self, request: GenerationRequest, adapter: AdapterT | None) -> StateT:
        """The state of a request between its tokens."""

    def forward(self, states: Sequence[StateT]) -> None:
        """Compute what `next_token` needs, for all active requests at once."""

    def next_token(self, state: StateT) -> int:
        """Choose the next token of a request."""


class Sender(Protocol):
    """Sends the responses to one request."""

    def send(self, tokens: Sequence[int], *, last: bool) -> None:
        """Send new tokens; `last` ends the request."""

    def fail(self, message: str) -> None:
        """End the request with an error."""

    def cancel(self) -> None:
        """End the request because its client asked for it."""

    def is_cancelled(self) -> bool:
        """Whether the client has left."""


@dataclass(slots=True)
class _Submitted:
    id: int
    request: GenerationRequest
    sender: Sender
    label: str
    stopped: bool = False


@dataclass(slots=True)
class _Active(Generic[StateT]):
    submitted: _Submitted
    max_tokens: int
    state: StateT
    tokens: list[int] = field(default_factory=list)


class Executor(Generic[AdapterT, StateT]):
    """The executor of one engine. Its thread runs until `close`."""

    def __init__(
        self,
        model: Model[AdapterT, StateT],
        profile: EngineProfile,
        parameters: CacheParameters,
        backend: Backend,
        *,
        max_num_requests: int = 64,
        cancellation_check_seconds: float = 0.1,
    ) -> None:
        """Start the thread. Raises EngineMismatch if the engine would not load with so small a LoRA cache."""
        self._model = model
        self._profile = profile
        self._backend = backend
        self._max_num_requests = max_num_requests
        # A question to Triton takes as long as half a token, so not every iteration asks.
        self._cancellation_check_seconds = cancellation_check_seconds
        self._next_cancellation_check = 0.0
        self._geometry = _geometry(profile, parameters)
        self._peft: PeftCache[AdapterT] = PeftCache(LoraCache(self._geometry.host_pages if self._geometry else 0))
        self._ids = itertools.count(1)
        self._changed = threading.Condition()
        self._queue: deque[_Submitted] = deque()
        self._active: list[_Active[StateT]] = []
        self._closing = threading.Event()
        self._thread = threading.Thread(target=self._run, name="executor", daemon=True)
        self._thread.start()

    def submit(self, request: GenerationRequest, sender: Sender, *, label: str = "") -> None:
        """Queue a request. `sender` is called from the executor's thread; `stop` ends the request by its `label`."""
        with self._changed:
            self._queue.append(_Submitted(next(self._ids), request, sender, label))
            self._changed.notify()

    def stop(self, label: str) -> None:
        """End the requests that were submitted with this label."""
        with self._changed:
            for submitted in [*self._queue, *(active.submitted for active in self._active)]:
                if label and submitted.label == label:
                    submitted.stopped = True

    def close(self) -> None:
        """End the thread. Requests that have not ended get an error."""
        with self._changed:
            self._closing.set()
            self._changed.notify()
        self._thread.join()

    # The rest runs in the thread.

    def _run(self) -> None:
        while self._wait_for_work():
            began = time.monotonic()
            self._take()
            asks = began >= self._next_cancellation_check
            if asks:
                self._next_cancellation_check = began + self._cancellation_check_seconds
            self._active = [active for active in self._active if self._is_wanted(active, asks)]
            if self._active:
                self._forward()
            self._active = [active for active in self._active if self._advance(active)]
            left = began + self._model.iteration_seconds - time.monotonic()
            if left > 0 and self._active:
                self._closing.wait(left)
        for submitted in [*(active.submitted for active in self._active), *self._queue]:
            self._fail(submitted, "the engine is shutting down")

    def _wait_for_work(self) -> bool:
        with self._changed:
            self._changed.wait_for(lambda: self._queue or self._active or self._closing.is_set())
        return not self._closing.is_set()

    def _take(self) -> None:
        tokens = 0
        while self._queue and len(self._active) < self._max_num_requests and tokens < self._model.max_num_tokens:
            submitted = self._queue[0]  # where `stop` finds it until it is active
            tokens += len(submitted.request.prompt)
            try:
                self._active.append(self._begin(submitted))
            except TaskNotCachedError as error:
                self._fail(submitted, str(error))
            except Exception as error:  # noqa: BLE001  a fault of one request must not end the others
                self._fail(submitted, f"Encountered an error when fetching new request: {error}")
            with self._changed:
                self._queue.popleft()

    def _begin(self, submitted: _Submitted) -> _Active[StateT]:
        request, lora = submitted.request, submitted.request.lora
        room = self._model.max_sequence_length - len(request.prompt)
        if room <= 0:
            raise LoraCacheError(
                f"Prompt length ({len(request.prompt)}) exceeds maximum input length "
                f"({self._model.max_sequence_length - 1})."
            )
        adapter = None
        if self._geometry and lora.task_id is not None:
            rows = check_lora_tensors(lora, self._profile)
            weights, load_error = None, ""
            if rows is not None:
                weights = self._geometry.pages(rows), lambda: self._model.load_adapter(lora)
                load_error = _load_error(rows, self._geometry)
            self._peft.add(lora.task_id, submitted.id, weights, load_error=load_error)
            adapter = self._peft.cache.value(lora.task_id)
        try:
            # The executor keeps the request while it is active, but not its weights.
            submitted.request = replace(request, lora=LoraInputs(lora.task_id))
            state = self._model.begin(submitted.request, adapter)
        except Exception:
            self._release(submitted)
            raise
        return _Active(submitted, min(request.max_tokens, room), state)

    def _forward(self) -> None:
        """Run the model for all active requests.

        An error of the model, or an adapter that could not be loaded, ends all of them, as upstream's does.
        """
        task_ids = (active.submitted.request.lora.task_id for active in self._active)
        try:
            self._peft.check_batch(task_id for task_id in task_ids if self._geometry and task_id is not None)
            self._model.forward([active.state for active in self._active])
        except Exception as error:  # noqa: BLE001  the thread must go on
            ended, self._active = self._active, []
            for active in ended:
                self._release(active.submitted)
                self._fail(active.submitted, f"Encountered an error in forwardAsync function: {error}")

    def _is_wanted(self, active: _Active[StateT], asks: bool) -> bool:
        """Whether the request goes on. It ends if it was stopped or, with `asks`, if its client has left."""
        submitted = active.submitted
        if not (submitted.stopped or (asks and submitted.sender.is_cancelled())):
            return True
        self._release(submitted)
        with contextlib.suppress(Exception):  # nobody is left to tell
            submitted.sender.cancel()
        return False

    def _advance(self, active: _Active[StateT]) -> bool:
        """Choose the next token of a request, and send what is due. Returns whether the request goes on."""
        submitted = active.submitted
        request, sender = submitted.request, submitted.sender
        try:
            token = self._model.next_token(active.state)
            piece = [] if token == request.end_id else [token]  # as upstream: the end token is not sent
            active.tokens += piece
            last = not piece or len(active.tokens) >= active.max_tokens or _ends_in(active.tokens, request)
            if last:
                self._release(submitted)  # first: a client that has the response may rely on the pages being free
            if request.streaming:
                sender.send(piece, last=last)
            elif last:
                sender.send(active.tokens if request.exclude_input else [*request.prompt, *active.tokens], last=True)
            return not last
        except Exception as error:  # noqa: BLE001  a fault of one request must not end the others
            self._release(submitted)
            self._fail(submitted, f"{type(error).__name__}: {error}")
            return False

    def _release(self, submitted: _Submitted) -> None:
        if self._geometry and submitted.request.lora.task_id is not None:
            self._peft.finish(submitted.request.lora.task_id, submitted.id)

    def _fail(self, submitted: _Submitted, error: str) -> None:
        with contextlib.suppress(Exception):  # nobody is left to tell
            submitted.sender.fail(self._backend.executor_error.format(id=submitted.id, error=error))


def _geometry(profile: EngineProfile, parameters: CacheParameters) -> PageGeometry | None:
    """The page geometry of the engine; EngineMismatch if its cache is too small.

    None for an engine without LoRA, which ignores LoRA inputs (upstream's NoOpPeftCacheManager).
    """
    if not profile.modules or profile.rank_limit <= 0:
        return None
    geometry = rank_geometries(profile, parameters)[0]
    if refusal := geometry.too_small():
        raise EngineMismatch(f"{refusal}; set lora_cache_host_memory_bytes to at least {geometry.min_bytes}")
    return geometry


def _load_error(rows: Rows, geometry: PageGeometry) -> str:
    """Upstream's error text if the adapter does not fit into its pages, else ""."""
    row = geometry.too_wide(rows)
    return f"slice {geometry.row_slots(row)} exceeds buffer size {geometry.slots_per_page}" if row else ""


def _ends_in(tokens: list[int], request: GenerationRequest) -> bool:
    return any(tuple(tokens[-len(word) :]) == word for word in request.stop_words)
