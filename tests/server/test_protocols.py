# SPDX-FileCopyrightText: the tritonlora authors
# SPDX-License-Identifier: Apache-2.0
"""The router's behaviour, each row of its table in every way of asking, on real tritonservers.

In front of a decoupled engine model and of one that is not; directly, and as a step of the ensemble. The engine's cache
holds one adapter. A synthetic answer repeats "[<lora_task_id>]" (or "[base]") and the prompt: it says whose it is.
"""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

import pytest

from asking import ENGINE, ENSEMBLE, PROMPT, ROUTER, TIMEOUT, Question, Refusal, Way, grpc_stream, ways
from repositories import register_copies, set_cache_full_timeout, synthetic_repository
from synthetic import samples
from tritonlora.launch.server import Server

STREAMS = 7  # of which one keeps the cache full
FULL_SECONDS = 2
ENDLESS = 20_000  # tokens, a millisecond each
INTERFACES = (ROUTER, ENSEMBLE)
WAYS = {decoupled: ways(INTERFACES, decoupled=decoupled) for decoupled in (True, False)}
COLD = tuple(f"cold{number}" for number in range(len(WAYS[True])))  # one for each way
TASK_IDS = {name: number for number, name in enumerate(("pirate", "haiku", *COLD), start=1)}
AVAILABLE = f"available: {', '.join(sorted(TASK_IDS))}"

Servers = Mapping[bool, Server]


@pytest.fixture(scope="module")
def servers(tmp_path_factory: pytest.TempPathFactory, launch: Callable[..., Server]) -> Servers:
    """One whose engine model is decoupled, and one whose is not."""

    def start(decoupled: bool) -> Server:
        opened = synthetic_repository(
            tmp_path_factory.mktemp("protocols") / "repo",
            cold=["pirate"],
            pages=1,
            decoupled=decoupled,
            streams=STREAMS,
            parameters={"synthetic_token_seconds": "0.001"},
        )
        register_copies(opened, list(TASK_IDS)[1:])
        set_cache_full_timeout(opened, FULL_SECONDS)
        return launch(opened.root)

    return {decoupled: start(decoupled) for decoupled in WAYS}


def text_of(lora_name: str | None, tokens: int = 12) -> str:
    """What the engine answers for an adapter, or for the base model."""
    whose = "base" if lora_name is None else str(TASK_IDS[lora_name])
    return (f"[{whose}]{PROMPT}" * tokens)[:tokens]


# What a request is answered, whatever the state of the engine's cache

Error = tuple[str, str]  # its name in `pb_utils.TritonError`, the message


@dataclass(frozen=True, slots=True)
class Row:
    """A row of the table: a question, and whose the answers to its rows are, or the error."""

    question: Question
    answers: tuple[str | None, ...] = ()
    error: Error | None = None
    error_if_not_decoupled: Error | None = None


def illegal(name: bytes, message: str) -> Row:
    """A lora_name that cannot be one."""
    return Row(Question([name]), error=("INVALID_ARG", message))


MIXED = ("INVALID_ARG", "the batch mixes rows for the base model and for adapters; send them apart")
NOT_SPLIT = ("INVALID_ARG", "a batch of several rows for LoRA adapters needs a decoupled engine model")
# TensorRT-LLM's own, triton_backend/inflight_batcher_llm/src/utils.cc
ONE_ROW = ("INTERNAL", "Batch size > 1 requires the tensorrt_llm backend to be using decoupled transaction policy")
DISAGREE = "lora_name 'pirate' has lora_task_id 1, but the request says 2; send one"
TOO_FEW = "request_output_len is -1, expected at least 1"

ROWS = {
    "base": Row(Question(), (None,)),
    "name": Row(Question([b"pirate"]), ("pirate",)),
    "other name": Row(Question([b"haiku"]), ("haiku",)),
    "id": Row(Question(lora_task_id=[2]), ("haiku",)),
    "name and its id": Row(Question([b"haiku"], [2]), ("haiku",)),
    "unknown name": Row(Question([b"nobody"]), error=("NOT_FOUND", f"unknown LoRA adapter 'nobody'; {AVAILABLE}")),
    "unknown id": Row(Question(lora_task_id=[99]), error=("NOT_FOUND", f"unknown lora_task_id 99; {AVAILABLE}")),
    "empty name": illegal(b"", "lora_name is empty; to ask the base model, leave it out"),
    "not UTF-8": illegal(b"\xff\xfe", r"lora_name is not UTF-8: b'\xff\xfe'"),
    "illegal name": illegal(b"../pirate", "lora_name '../pirate' is not a legal adapter name"),
    "name and another id": Row(Question([b"pirate"], [2]), error=("INVALID_ARG", DISAGREE)),
    "engine error": Row(Question([b"pirate"], tokens=[-1]), error=("INTERNAL", f"LoRA adapter 'pirate': {TOO_FEW}")),
    "engine error, base": Row(Question(tokens=[-1]), error=("INTERNAL", TOO_FEW)),
    "batch": Row(
        Question([b"pirate", b"haiku", b"pirate"], tokens=[12, 9, 6]), ("pirate", "haiku", "pirate"), None, NOT_SPLIT
    ),
    "batch of ids": Row(Question(lora_task_id=[2, 1], tokens=[12, 9]), ("haiku", "pirate"), None, NOT_SPLIT),
    "batch, base": Row(Question(tokens=[12, 9]), (None, None), None, ONE_ROW),
    "batch, mixed": Row(Question([b"pirate", b""], tokens=[12, 12]), error=MIXED),
    "batch, an unknown name": Row(
        Question([b"pirate", b"nobody"], tokens=[12, 12]),
        error=("NOT_FOUND", f"unknown LoRA adapter 'nobody'; {AVAILABLE}"),
    ),
}

# What Triton 2.51 itself refuses.
NOT_FOR_DECOUPLED = {
    "http_infer": Refusal("501", "HTTP end point doesn't support models with decoupled transaction policy"),
    "grpc_infer": Refusal(
        "StatusCode.UNIMPLEMENTED", "ModelInfer RPC doesn't support models with decoupled transaction policy"
    ),
}
ONE_ANSWER = Refusal(
    "200",
    "generate expects model to produce exactly 1 response, "
    "use generate stream for model that generates various number of responses",
)
NO_ROWS_OF_TOKENS = Refusal(
    "400", "[request id: <id_unknown>] input 'input_ids' batch size does not match other inputs for 'lora_router'"
)


def expected(row: Row, way: Way, *, decoupled: bool) -> tuple[str, ...] | Refusal:
    """What comes back of a row of the table."""
    if decoupled and way.protocol in NOT_FOR_DECOUPLED:
        return NOT_FOR_DECOUPLED[way.protocol]
    is_batch = len(row.question.tokens) > 1
    if is_batch and way.interface is ROUTER and way.protocol.startswith("generate"):
        return NO_ROWS_OF_TOKENS  # JSON's lists are flat there: a text for each row, but not tokens for each
    if error := row.error or (row.error_if_not_decoupled if not decoupled else None):
        return way.refusal(*error)
    if is_batch and way.protocol == "generate":
        return ONE_ANSWER
    return tuple(text_of(name, tokens) for name, tokens in zip(row.answers, row.question.tokens, strict=True))


def each_way(answering: bool = False) -> pytest.MarkDecorator:
    """Parametrise with every way, or with those in which Triton gives an answer at all."""
    return pytest.mark.parametrize(
        ("decoupled", "way"),
        [
            pytest.param(decoupled, way, id=f"{policy}-{way.interface.model}-{way.protocol}")
            for decoupled, policy in ((True, "decoupled"), (False, "whole"))
            for way in (answering_ways(decoupled) if answering else WAYS[decoupled])
        ],
    )


def answering_ways(decoupled: bool) -> list[Way]:
    """The ways in which Triton gives answers."""
    return [way for way in WAYS[decoupled] if not (decoupled and way.protocol in NOT_FOR_DECOUPLED)]


@pytest.mark.parametrize("name", ROWS)
@each_way()
def test_a_request_is_answered_as_the_table_says(servers: Servers, decoupled: bool, way: Way, name: str) -> None:
    """With the adapter's text, or an error that has its code wherever the protocol has codes."""
    row = ROWS[name]

    assert expected(row, way, decoupled=decoupled) == way.ask(servers[decoupled], row.question)


# What depends on the engine's cache


def asked_for(lora_name: str) -> Question:
    """A request for an adapter."""
    return Question([lora_name.encode()])


def is_cached(server: Server, lora_name: str) -> bool:
    """Whether the engine holds the adapter: asked without the router, by the id alone, it answers only then."""
    [engine] = [way for way in ways([ENGINE], decoupled=False) if way.protocol == "grpc_stream"]
    answer = engine.ask(server, Question(lora_task_id=[TASK_IDS[lora_name]], tokens=[1]))
    assert not isinstance(answer, Refusal) or "not found in cache" in answer.message
    return not isinstance(answer, Refusal)


@each_way(answering=True)
def test_an_adapter_is_loaded_and_loaded_again_when_it_was_evicted(servers: Servers, decoupled: bool, way: Way) -> None:
    """On its first request, and on the one after another adapter has taken its place; the client sees only text."""
    server = servers[decoupled]
    mine = COLD[WAYS[decoupled].index(way)]
    other = COLD[WAYS[decoupled].index(way) - 1]
    for name in (mine, other, mine):
        assert not is_cached(server, name)
        assert (text_of(name),) == way.ask(server, asked_for(name))


@contextlib.contextmanager
def full_cache(server: Server, lora_name: str) -> Iterator[None]:
    """A request for the adapter that does not end before this does."""
    label = {"request_id": "in use"}
    endless = ROUTER.tensors(Question([lora_name.encode()], tokens=[ENDLESS]), False)
    stop = {**ENGINE.tensors(Question(), False), "stop": endless["streaming"] | True}
    with ThreadPoolExecutor(1) as pool:
        answers = pool.submit(lambda: list(grpc_stream(server, "lora_router", endless, **label)))
        try:
            deadline = time.monotonic() + TIMEOUT
            while not is_cached(server, lora_name):
                assert time.monotonic() < deadline
            yield
            assert not answers.done()
        finally:
            list(grpc_stream(server, "tensorrt_llm", stop, **label))
        answers.result()


def await_waiting(server: Server, names: set[str]) -> None:
    """Return when the metrics say that exactly these adapters wait for room."""
    deadline = time.monotonic() + TIMEOUT
    while True:  # while its labels change there may be no such metric for a moment
        found = [dict(labels) for name, labels in samples(server) if name == "lora_requests_info"]
        if [names] == [set(labels["waiting_lora_adapters"].split(",")) for labels in found]:
            return
        assert time.monotonic() < deadline, found


@pytest.mark.parametrize("decoupled", [True, False])
def test_requests_wait_while_every_cached_adapter_is_in_use(servers: Servers, decoupled: bool) -> None:
    """Each for an adapter of its own, and in a way of its own; all are answered when there is room."""
    server = servers[decoupled]
    asked = list(zip(COLD, answering_ways(decoupled), strict=False))
    for first in range(0, len(asked), STREAMS - 1):
        side_by_side = asked[first : first + STREAMS - 1]
        with ThreadPoolExecutor(STREAMS) as pool, full_cache(server, "pirate"):
            answers = [pool.submit(way.ask, server, asked_for(name)) for name, way in side_by_side]
            await_waiting(server, {name for name, _ in side_by_side})

        assert [(text_of(name),) for name, _ in side_by_side] == [answer.result() for answer in answers]


@pytest.mark.parametrize("decoupled", [True, False])
def test_a_request_that_has_waited_too_long_is_unavailable(servers: Servers, decoupled: bool) -> None:
    """After cache_full_timeout_seconds, with the reason."""
    server = servers[decoupled]
    asked = answering_ways(decoupled)
    with full_cache(server, "pirate"), ThreadPoolExecutor(STREAMS - 1) as pool:
        answers = list(pool.map(lambda way: way.ask(server, asked_for("haiku")), asked))
    reason = f"LoRA adapter 'haiku': it does not fit beside the adapters in use; waited {FULL_SECONDS} s; ask again"

    assert [way.refusal("UNAVAILABLE", reason) for way in asked] == answers
