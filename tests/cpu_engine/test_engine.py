# SPDX-FileCopyrightText: the tritonlora authors
# SPDX-License-Identifier: Apache-2.0
"""What the CPU engine takes and refuses, in TensorRT-LLM's order and words, and how its requests live and end."""

from __future__ import annotations

import functools
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from engine_client import Received, ask, ask_batch, config_directory, tensors_of
from tritonlora.cpu_engine import engine as engine_module
from tritonlora.cpu_engine.engine import CpuEngine, load_engine
from tritonlora.cpu_engine.executor import Executor
from tritonlora.cpu_engine.peft_cache import LoraCacheError
from tritonlora.cpu_engine.request import LoraInputs
from tritonlora.cpu_engine.synthetic import SyntheticModel
from tritonlora.cpu_engine.validation import check_lora_config, check_lora_tensors
from tritonlora.engine.cpu_engine_settings import parse_settings
from tritonlora.engine.profile import EngineProfile, load_profile
from tritonlora.errors import EngineMismatch

HELLO = list(b"hello")
FOREVER = 1_000_000
PREFIX = "Executor failed process requestId {} due to the following error: "
FETCHING = "Encountered an error when fetching new request: "
MISS = "LoRA task {} not found in cache. Please send LoRA weights with request"
FULL = "Error storing task={} in PEFT cache -- Cache is full. There are no done tasks to evict"
PACE = {"synthetic_token_seconds": "0.002"}
SLOW = {"synthetic_token_seconds": "0.01"}

Open = Callable[..., CpuEngine]


@pytest.fixture
def open_engine(tmp_path: Path) -> Iterator[Open]:
    """`open_engine(decoupled=True, **parameters)`: a synthetic engine that is closed at the end of the test."""
    opened = []

    def open_(*, decoupled: bool = True, **parameters: str) -> CpuEngine:
        config_directory(tmp_path)
        defaults = {
            "gpt_model_path": str(tmp_path),
            "synthetic": "true",
            "exclude_input_in_output": "true",
            "cancellation_check_period_ms": "0",
        }
        opened.append(load_engine({**defaults, **parameters}, tmp_path, decoupled=decoupled))
        return opened[-1]

    yield open_
    for engine in opened:
        engine.close()


@pytest.fixture
def profile(tmp_path: Path) -> EngineProfile:
    """Hidden 16, heads of 4, mlp 32, two layers, bfloat16, max rank 8."""
    return replace(load_profile(config_directory(tmp_path)), max_lora_rank=8)


def adapter(rows: list[list[int]], width: int = 1024, dtype: torch.dtype = torch.bfloat16) -> dict[str, torch.Tensor]:
    """lora_weights and lora_config as they are sent."""
    return {
        "lora_weights": torch.zeros(1, len(rows), width, dtype=dtype),
        "lora_config": torch.tensor([rows], dtype=torch.int32),
    }


ONE_PAGE = adapter([[1, 0, 8]])
TWO_PAGES = adapter([[module, layer, 16] for layer in range(2) for module in range(1, 8)])


def three_pages(open_engine: Open, **parameters: str) -> CpuEngine:
    """An engine whose cache holds three pages, for rank 8 each."""
    # in + out of q k v dense gate up down: 32 24 24 32 48 48 48; a slot has 24; 2+1+1+2+2+2+2 = 12 slots for each rank
    page_bytes = 2 * 8 * 12 * 24 * 2
    return open_engine(lora_cache_max_adapter_size="8", lora_cache_host_memory_bytes=str(3 * page_bytes), **parameters)


def held(engine: CpuEngine, task: int, **lora: Any) -> Received:
    """A request for an adapter that stays active until the test cancels it."""
    tensors = tensors_of(HELLO, FOREVER, streaming=True, lora_task_id=task, **lora)
    return ask(engine, tensors).wait_for_pieces(1)


def end(*requests: Received) -> None:
    for request in requests:
        request.cancelled = True
        assert request.failure() is None


def answer_to(engine: CpuEngine, task: int, **lora: Any) -> str | None:
    """The error of a short request for an adapter, or None."""
    return ask(engine, tensors_of(HELLO, 1, lora_task_id=task, **lora)).failure()


# Answers


def test_the_synthetic_answer_is_the_task_id_and_the_prompt_in_turn(open_engine: Open) -> None:
    """With the task id 0 or none it is "base"."""
    engine = open_engine()
    texts = [
        bytes(ask(engine, tensors_of(HELLO, 18, **lora)).tokens())
        for lora in ({"lora_task_id": 12, **ONE_PAGE}, {"lora_task_id": 0, **ONE_PAGE}, {})
    ]

    assert [b"[12]hello[12]hello", b"[base]hello[base]h", b"[base]hello[base]h"] == texts


def test_a_stream_sends_each_token_once_and_never_the_prompt(open_engine: Open) -> None:
    """A piece for each token; without streaming, all of them in one."""
    engine = open_engine(exclude_input_in_output="false")
    streamed = ask(engine, tensors_of(HELLO, 3, streaming=True))
    whole = ask(engine, tensors_of(HELLO, 3))
    streamed.tokens(), whole.tokens()

    assert [[ord("[")], [ord("b")], [ord("a")]] == streamed.pieces
    assert [[*HELLO, *b"[ba"]] == whole.pieces


@pytest.mark.parametrize(("parameter", "request_says", "text"), [
    ("true", None, b"[b"), ("true", False, b"hello[b"), ("false", True, b"[b"), ("", None, b"hello[b"),
])  # fmt: skip
def test_the_request_has_the_last_word_on_the_prompt(
    open_engine: Open, parameter: str, request_says: bool | None, text: bytes
) -> None:
    """`exclude_input_in_output`: the request's, else the model's, else the prompt is part of the answer."""
    said = {} if request_says is None else {"exclude_input_in_output": request_says}
    engine = open_engine(exclude_input_in_output=parameter)

    assert text == bytes(ask(engine, tensors_of(HELLO, 2, **said)).tokens())


def test_the_end_token_ends_the_answer_and_is_not_part_of_it(open_engine: Open) -> None:
    """A stream then ends with an empty piece."""
    engine = open_engine()
    streamed = ask(engine, tensors_of(HELLO, 20, streaming=True, end_id=ord("l")))

    assert b"[base]he" == bytes(ask(engine, tensors_of(HELLO, 20, end_id=ord("l"))).tokens())
    assert b"[base]he" == bytes(streamed.tokens())
    assert [] == streamed.pieces[-1]
    assert 20 == len(ask(engine, tensors_of(HELLO, 20, end_id=-1)).tokens())


def test_a_stop_word_ends_the_answer_and_is_part_of_it(open_engine: Open) -> None:
    """Two words, of one and of three tokens; the first that comes counts."""
    engine = open_engine()
    words = np.array([[[ord("!"), *b"]he", 0], [1, 4, -1, -1, -1]]], np.int32)
    nothing = np.array([[[0], [-1]]], np.int32)

    assert b"[base]he" == bytes(ask(engine, tensors_of(HELLO, 20, stop_words_list=words)).tokens())
    assert 20 == len(ask(engine, tensors_of(HELLO, 20, stop_words_list=nothing)).tokens())


def test_only_the_first_input_lengths_tokens_are_the_prompt(open_engine: Open) -> None:
    """The rest of input_ids is padding."""
    padded = {**tensors_of([*HELLO, 0, 0], 12), "input_lengths": np.array([[5]], np.int32)}

    assert b"[base]hello[" == bytes(ask(open_engine(), padded).tokens())


def test_rows_of_a_batch_are_answered_apart(open_engine: Open) -> None:
    """Each with its own prompt, length and adapter."""
    engine = open_engine()
    held(engine, 2, **ONE_PAGE).cancelled = True
    batch = {
        "input_ids": np.array([list(b"abc"), list(b"xyz")], np.int32),
        "input_lengths": np.array([[3], [2]], np.int32),
        "request_output_len": np.array([[9], [4]], np.int32),
        "lora_task_id": np.array([[2], [2]], np.uint64),
    }

    assert [b"[2]abc[2]", b"[2]x"] == [bytes(row.tokens()) for row in ask_batch(engine, batch)]


# Refusals of inputs


@pytest.mark.parametrize(
    ("flavour", "decoupled", "change", "message"),
    [
        ("cpp", True, {"request_output_len": None}, "request_output_len is not present in the request"),
        ("cpp", True, {"input_ids": None}, "A value is required for input_ids"),
        ("cpp", True, {"request_output_len": 0}, "request_output_len is 0, expected at least 1"),
        ("cpp", True, {"input_lengths": 0}, "input_ids is empty, expected at least one token"),
        ("cpp", False, {"streaming": True}, "Streaming is only supported if model is deployed using decoupled mode."),
        ("cpp", False, {"input_ids": np.zeros((2, 1), np.int32), "input_lengths": np.ones(2, np.int32)},
         "Batch size > 1 requires the tensorrt_llm backend to be using decoupled transaction policy"),
        ("cpp", True, {"end_id": np.zeros(2, np.int32)},
         "Expected batch size doesn't match batch size for tensor end_id. Expected 1 got 2"),
        ("python", False, {"streaming": True}, "An error occurred when processing the input values for request id me, "
         "the error was 'Streaming is only supported in decoupled mode.'"),
        ("python", True, {"request_output_len": None}, "An error occurred when processing the input values for request "
         "id me, the error was 'A value is required for request_output_len'"),
        ("python", True, {"lora_task_id": 1, **ONE_PAGE}, "An error occurred when processing the input values for "
         "request id me, the error was 'Tensor dtype is BF16 and cannot be converted to NumPy. Use to_dlpack() and "
         "from_dlpack() instead.'"),
        ("python", True, adapter([[1, 0, 8]], dtype=torch.float16), "An error occurred when processing the input "
         "values for request id me, the error was 'LoraConfig() is missing the argument task_id'"),
    ],
)  # fmt: skip
def test_requests_that_cannot_be_queued_get_upstreams_words(
    open_engine: Open, flavour: str, decoupled: bool, change: dict[str, Any], message: str
) -> None:
    """Before any LoRA is looked at; the two backends differ."""
    engine = open_engine(decoupled=decoupled, engine_flavour=flavour)
    changed = tensors_of(HELLO, 1, **{name: value for name, value in change.items() if value is not None})
    tensors = {name: tensor for name, tensor in changed.items() if change.get(name, 0) is not None}

    assert message == ask(engine, tensors, label="me").failure()


def test_inputs_that_are_not_implemented_are_all_named(open_engine: Open) -> None:
    """They are not ignored."""
    tensors = tensors_of(HELLO, 1, beam_width=2, return_log_probs=True, embedding_bias=np.ones((1, 4), np.float32))

    assert [
        "inputs that the CPU engine does not implement:",
        "  'beam_width'",
        "  'embedding_bias'",
        "  'return_log_probs'",
    ] == str(ask(open_engine(), tensors).failure()).splitlines()


def test_inputs_that_ask_for_nothing_are_taken(open_engine: Open) -> None:
    """What preprocessing models always send, and what has no effect without beams."""
    tensors = tensors_of(
        HELLO,
        2,
        beam_width=1,
        return_log_probs=False,
        embedding_bias=np.zeros((1, 0), np.float32),
        draft_input_ids=np.zeros((1, 0), np.int32),
        bad_words_list=np.array([[[0], [-1]]], np.int32),
        pad_id=2,
        len_penalty=1,
        decoder_input_ids=np.array([[2]], np.int32),
    )

    assert b"[b" == bytes(ask(open_engine(), tensors).tokens())


def test_both_outputs_have_to_be_requested(open_engine: Open) -> None:
    """As with the C++ backend, which a router that lists outputs has to know; the Python one does not mind."""

    def answer(flavour: str) -> str | None:
        received = Received()
        engine = open_engine(engine_flavour=flavour)
        engine.submit(tensors_of(HELLO, 1), lambda row, rows: received, requested_outputs=["output_ids"])
        return received.failure()

    assert [
        "Error encountered while populating response: sequence_length tensor must be present in list of output tensors",
        None,
    ] == [answer(flavour) for flavour in ("cpp", "python")]


# Refusals of LoRA tensors

GOOD = [[1, 0, 8], [7, 1, 2]]
LORA_CHECKS: list[tuple[str, LoraInputs]] = [
    ("lora_task_id must be set for LoRA inference", LoraInputs()),
    ("Request for LoRA inference must have both lora_weights and lora_keys", LoraInputs(1, torch.zeros(1, 1, 1))),
    ("Invalid shape for lora_weights tensor", LoraInputs(1, torch.zeros(1, 1), torch.zeros(1, 1))),
    ("Invalid shape for lora_keys tensor", LoraInputs(1, torch.zeros(2, 1, 1), torch.zeros(1, 1))),
    (
        "Expected batch dimension to be 1 for each lora request",
        LoraInputs(1, torch.zeros(2, 1, 1), torch.zeros(1, 2, 2)),
    ),
    (
        "Expected  lora keys to have TYPE_INT32 but was float32",
        LoraInputs(1, torch.zeros(1, 1, 1), torch.zeros(1, 2, 2)),
    ),
    (
        "Expected dim1 lora_weights and lora_keys to have the same size",
        LoraInputs(1, torch.zeros(1, 1, 1), torch.zeros(1, 2, 2, dtype=torch.int32)),
    ),
    (
        "Expected dim2 of lora_keys to have a size in [3, 4]",
        LoraInputs(1, torch.zeros(1, 2, 1), torch.zeros(1, 2, 2, dtype=torch.int32)),
    ),
    (
        "Expected lora weights to be the same data type as base model",
        LoraInputs(1, torch.zeros(1, 2, 1), torch.zeros(1, 2, 3, dtype=torch.int32)),
    ),
]  # each has the faults of those after it too, so that the order shows
ROW_CHECKS = [
    ("Expected layerId to be in the range [0, numModelLayers)", [99, 2, 0]),
    ("Expected layerId to be in the range [0, numModelLayers)", [99, -1, 0]),
    ("Expected adapterSize to be > 0", [99, 1, 0]),
    ("lora module INVALID not enabled for this model", [99, 1, 9]),
    ("lora module attn_qkv not enabled for this model", [0, 1, 9]),
    ("lora_weights has to few values for mlp_gate", [7, 1, 9]),
    ("lora_weights has to few values for attn_q", [1, 1, 8, 1]),
    ("Invalid low_rank (9). low_rank must be smaller than mMaxLowRank (8)", [2, 1, 9]),
]


@pytest.mark.parametrize(("message", "lora"), LORA_CHECKS)
def test_lora_tensors_are_checked_in_the_engines_order(profile: EngineProfile, message: str, lora: LoraInputs) -> None:
    """Each case has later faults as well; the first is what the client is told."""
    with pytest.raises(LoraCacheError) as refused:
        check_lora_tensors(lora, profile)

    assert f"[TensorRT-LLM][ERROR] Assertion failed: {message}" == str(refused.value)


@pytest.mark.parametrize(("message", "row"), ROW_CHECKS)
def test_rows_are_checked_in_the_engines_order(profile: EngineProfile, message: str, row: list[int]) -> None:
    """After a good row, with 256 values to a row: enough for rank 8 of q without magnitudes, and for rank 9 of k."""
    rows = [[1, 0, 8, 0], [*row, 0][:4]]
    with pytest.raises(LoraCacheError) as refused:
        check_lora_tensors(LoraInputs(1, *adapter(rows, width=256).values()), profile)

    assert f"[TensorRT-LLM][ERROR] Assertion failed: {message}" == str(refused.value)


@pytest.mark.parametrize(
    ("message", "lora"),
    [
        ("Expected config tensor to have 2 dimensions", LoraInputs(1, None, torch.zeros(2, 1, 3))),
        ("Expected lora config tensor to have type kINT32", LoraInputs(1, None, torch.zeros(1, 1, 3))),
        (
            "Request for LoRA inference with lora weights must also have lora config",
            LoraInputs(1, torch.zeros(1, 1, 1, 1)),
        ),
        (
            "Expected weights tensor to have 2 dimensions",
            LoraInputs(1, torch.zeros(2, 1, 1), torch.zeros(1, 1, 3, dtype=torch.int32)),
        ),
        (
            "Expected dim 0 of lora weights and lora config to have the same size",
            LoraInputs(1, torch.zeros(1, 2, 1), torch.zeros(1, 1, 3, dtype=torch.int32)),
        ),
    ],
)
def test_the_request_itself_is_checked_before_it_is_queued(message: str, lora: LoraInputs) -> None:
    """The checks of executor::LoraConfig."""
    with pytest.raises(LoraCacheError) as refused:
        check_lora_config(lora)

    assert f"[TensorRT-LLM][ERROR] Assertion failed: {message}" == str(refused.value)


@pytest.mark.parametrize(("flavour", "prefix"), [("cpp", PREFIX.format(1)), ("python", "")])
def test_refusals_come_with_the_backend_s_prefix(open_engine: Open, flavour: str, prefix: str) -> None:
    """And those that are no miss say that the request was being fetched."""
    engine = open_engine(engine_flavour=flavour)
    wrong = adapter([[1, 0, 8]], dtype=torch.float16)

    assert (
        f"{prefix}{FETCHING}[TensorRT-LLM][ERROR] Assertion failed: "
        "Expected lora weights to be the same data type as base model"
    ) == answer_to(engine, 1, **wrong)


def test_weights_without_a_task_id_are_ignored(open_engine: Open) -> None:
    """So does the C++ backend: the base model answers."""
    assert b"[base]" == bytes(ask(open_engine(), tensors_of(HELLO, 6, **ONE_PAGE)).tokens())


def test_an_engine_without_lora_modules_ignores_adapters(open_engine: Open) -> None:
    """Whatever comes is taken, even an id that it has never seen."""
    engine = open_engine(lora_target_modules="none")

    assert b"[5]he" == bytes(ask(engine, tensors_of(HELLO, 5, lora_task_id=5)).tokens())


def test_target_modules_bound_what_an_adapter_may_have(open_engine: Open) -> None:
    """An engine for q and v refuses k by name."""
    engine = open_engine(lora_target_modules="attn_q attn_v")

    assert str(answer_to(engine, 1, **adapter([[2, 0, 8]]))).endswith("lora module attn_k not enabled for this model")


# The cache


def test_an_unknown_id_is_missed_in_the_engines_words(open_engine: Open) -> None:
    """The miss has no word about fetching in front of it."""
    assert PREFIX.format(1) + MISS.format(7) == answer_to(open_engine(), 7)


def test_an_id_alone_answers_once_its_weights_have_come(open_engine: Open) -> None:
    """Also right behind the request that carries them."""
    engine = open_engine()
    both = [ask(engine, tensors_of(HELLO, 3, lora_task_id=7, **lora)) for lora in (ONE_PAGE, {})]

    assert [b"[7]", b"[7]"] == [bytes(answer.tokens()) for answer in both]


def test_a_full_cache_of_running_adapters_refuses_the_next(open_engine: Open) -> None:
    """Scenarios 1 and 2: the fourth adapter for three pages is refused until one ends, which is then missed."""
    engine = three_pages(open_engine, **PACE)
    running = [held(engine, task, **ONE_PAGE) for task in (1, 2, 3)]
    refused = answer_to(engine, 4, **ONE_PAGE)
    end(running[0])
    taken = answer_to(engine, 4, **ONE_PAGE)
    missed = answer_to(engine, 1)
    end(*running[1:])

    assert PREFIX.format(4) + FETCHING + FULL.format(4) == refused
    assert taken is None
    assert PREFIX.format(6) + MISS.format(1) == missed


def test_the_least_recently_finished_adapter_goes_first(open_engine: Open) -> None:
    """Scenario 3."""
    engine = three_pages(open_engine)
    for task in (1, 2, 3):
        assert answer_to(engine, task, **ONE_PAGE) is None
    assert answer_to(engine, 1) is None
    assert answer_to(engine, 4, **ONE_PAGE) is None

    assert [False, True, False, False] == [answer_to(engine, task) is not None for task in (1, 2, 3, 4)]


def test_a_failed_eviction_loses_what_it_evicted(open_engine: Open) -> None:
    """Scenario 4: two pages are wanted and one can be had; task 1 is gone, and the request fails all the same."""
    engine = three_pages(open_engine, **PACE)
    running = [held(engine, task, **ONE_PAGE) for task in (2, 3)]
    assert answer_to(engine, 1, **ONE_PAGE) is None
    refused = answer_to(engine, 5, **TWO_PAGES)
    missed = answer_to(engine, 1)
    end(*running)

    assert "Error storing task=5 in PEFT cache -- " in str(refused)
    assert "Assertion failed: pageIds.has_value()" in str(refused)
    assert MISS.format(1) in str(missed)


def test_warming_more_than_fits_drops_the_first(open_engine: Open) -> None:
    """Scenario 6: none of four fails to load, and the first is missed afterwards."""
    engine = three_pages(open_engine)
    assert [None] * 4 == [answer_to(engine, task, **ONE_PAGE) for task in (1, 2, 3, 4)]

    assert MISS.format(1) in str(answer_to(engine, 1))


def test_requests_that_wait_pin_nothing(open_engine: Open) -> None:
    """One request at a time: the one behind it is not even looked at until the first ends."""
    engine = three_pages(open_engine, **PACE, max_num_requests="1")
    first = held(engine, 1, **TWO_PAGES)
    second = ask(engine, tensors_of(HELLO, 1, lora_task_id=2, **TWO_PAGES))
    first.wait_for_pieces(3)
    waiting = not second.ended
    end(first)

    assert waiting
    assert second.failure() is None


def test_a_cache_too_small_for_one_adapter_stops_the_engine_from_loading(open_engine: Open) -> None:
    """In the engine's words, and with what to set."""
    with pytest.raises(EngineMismatch, match=r"hold 1 max sized LoRA 20 < 1366; set lora_cache_host_memory_bytes to"):
        open_engine(lora_cache_host_memory_bytes="1000")


# An adapter with a row wider than a page: the engine of one module and one layer a rank has pages for rank 8

WIDE = adapter([[4, 0, 8]])


def narrow_engine(open_engine: Open, **parameters: str) -> CpuEngine:
    """Pages of 8 slots for attn_dense alone, in which a row of rank 16 does not fit; three of them."""
    narrow = {"lora_target_modules": "attn_dense", "lora_cache_optimal_adapter_size": "1"}
    memory = {"lora_cache_max_adapter_size": "4", "lora_cache_host_memory_bytes": str(3 * 4 * 32 * 2)}
    return open_engine(**narrow, **memory, **PACE, **parameters)


def test_an_adapter_that_cannot_be_loaded_ends_every_running_request(open_engine: Open) -> None:
    """As upstream: accepted, then all active requests fail; later that task fails so too, and its pages are lost."""
    engine = narrow_engine(open_engine)
    other = held(engine, 1, **adapter([[4, 0, 4]]))
    first = answer_to(engine, 2, **WIDE)
    later = [answer_to(engine, 2, **lora) for lora in (WIDE, {})]
    full = [answer_to(engine, task, **adapter([[4, 0, 4], [4, 1, 4]])) for task in (3, 4)]

    ended = "Encountered an error in forwardAsync function: "
    processing = "Caught exception during copyTask ensure batch -- can't move a processing task taskId=2"
    assert PREFIX.format(1) + ended + "slice 8 exceeds buffer size 4" == other.failure()
    assert PREFIX.format(2) + ended + "slice 8 exceeds buffer size 4" == first
    assert [PREFIX.format(id_) + ended + processing for id_ in (3, 4)] == later
    assert [True, True] == ["There are no done tasks" in str(error) or "pageIds" in str(error) for error in full]


# The life of a request


def test_a_client_that_goes_away_frees_its_adapter(open_engine: Open) -> None:
    """The request ends without another token, and its pages can be had."""
    engine = three_pages(open_engine, **PACE)
    running = [held(engine, task, **ONE_PAGE) for task in (1, 2, 3)]
    end(*running)

    assert all(request.saw_cancel for request in running)
    assert answer_to(engine, 4, **ONE_PAGE) is None


def test_cancellation_is_looked_for_only_every_so_often(open_engine: Open) -> None:
    """With a period of 50 ms an iteration of 2 ms does not ask, and the request ends within the period all the same."""
    engine = open_engine(cancellation_check_period_ms="50", **PACE)
    request = ask(engine, tensors_of(HELLO, FOREVER, streaming=True)).wait_for_pieces(50)

    assert request.asked < 40
    end(request)


def test_stop_ends_the_request_with_the_same_id(open_engine: Open) -> None:
    """At once, whenever clients are looked for next; others go on, and who says stop is answered with nothing."""
    engine = open_engine(cancellation_check_period_ms="900000", **PACE)
    mine = ask(engine, tensors_of(HELLO, FOREVER, streaming=True), label="mine").wait_for_pieces(1)
    other = ask(engine, tensors_of(HELLO, FOREVER, streaming=True), label="other").wait_for_pieces(1)
    stop = ask(engine, tensors_of(HELLO, 1, stop=True), label="mine")
    mine.failure()
    other.wait_for_pieces(len(other.pieces) + 2)
    still_there = not other.ended
    ask(engine, tensors_of(HELLO, 1, stop=True), label="other")
    other.failure()

    assert mine.saw_cancel
    assert still_there
    assert [] == stop.tokens()


def test_stop_finds_a_request_that_is_being_taken(open_engine: Open, monkeypatch: pytest.MonkeyPatch) -> None:
    """While its adapter is loaded it waits no more, and is not active yet."""
    begin = Executor._begin

    def stop_meanwhile(executor: Executor[Any, Any], submitted: Any) -> Any:
        executor.stop("mine")
        return begin(executor, submitted)

    monkeypatch.setattr(Executor, "_begin", stop_meanwhile)
    engine = open_engine(**PACE)

    assert ask(engine, tensors_of(HELLO, FOREVER, streaming=True), label="mine").failure() is None


def test_closing_answers_everything_that_is_open(open_engine: Open) -> None:
    """Active and waiting requests get an error."""
    engine = open_engine(**PACE, max_num_requests="1")
    active = ask(engine, tensors_of(HELLO, FOREVER, streaming=True)).wait_for_pieces(1)
    waiting = ask(engine, tensors_of(HELLO, 1))
    engine.close()

    assert [PREFIX.format(1) + "the engine is shutting down", PREFIX.format(2) + "the engine is shutting down"] == [
        active.failure(),
        waiting.failure(),
    ]


def test_an_iteration_lasts_as_long_for_many_as_for_one(open_engine: Open) -> None:
    """Eight requests of ten tokens at 10 ms take 0.1 s together, not 0.8 s."""
    engine = open_engine(**SLOW)
    began = time.monotonic()
    for request in [ask(engine, tensors_of(HELLO, 10)) for _ in range(8)]:
        request.tokens()

    assert 0.09 <= time.monotonic() - began < 0.5


def test_an_iteration_reads_no_more_prompts_than_the_model_takes(
    open_engine: Open, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Five prompts of five tokens, and at most about eight in an iteration: each one takes two of them."""
    batches: list[int] = []
    has_begun, go_on = threading.Event(), threading.Event()

    def forward(model: SyntheticModel, states: Sequence[Any]) -> None:
        batches.append(len(states))
        has_begun.set()
        go_on.wait()

    monkeypatch.setattr(SyntheticModel, "forward", forward)
    monkeypatch.setattr(engine_module, "SyntheticModel", functools.partial(SyntheticModel, max_num_tokens=8))
    engine = open_engine()
    first = ask(engine, tensors_of(HELLO, 1))
    has_begun.wait()
    requests = [first, *(ask(engine, tensors_of(HELLO, 3)) for _ in range(5))]
    go_on.set()

    assert [1, 3, 3, 3, 3, 3] == [len(request.tokens()) for request in requests]
    assert [1, 2, 4, 5, 3, 1] == batches


def test_a_model_that_fails_ends_the_requests_of_its_batch(open_engine: Open, monkeypatch: pytest.MonkeyPatch) -> None:
    """In upstream's words; the engine's thread goes on."""
    engine = open_engine(**PACE)
    active = ask(engine, tensors_of(HELLO, FOREVER, streaming=True)).wait_for_pieces(1)
    with monkeypatch.context() as broken:
        broken.setattr(SyntheticModel, "forward", lambda *_: 1 / 0)
        failure = active.failure()

    assert failure == f"{PREFIX.format(1)}Encountered an error in forwardAsync function: division by zero"
    assert b"[ba" == bytes(ask(engine, tensors_of(HELLO, 3)).tokens())


class Broken(Received):
    """Answers that do not get through."""

    def send(self, tokens: Sequence[int], *, last: bool) -> None:
        raise OSError(f"cannot send {len(tokens)} tokens, last: {last}")


def test_an_answer_that_cannot_be_sent_ends_only_its_own_request(open_engine: Open) -> None:
    """The engine's thread goes on."""
    engine = open_engine()
    broken = Broken()
    engine.submit(tensors_of(HELLO, 3, streaming=True), lambda row, rows: broken)

    assert "OSError: cannot send 1 tokens, last: False" in str(broken.failure())
    assert b"[ba" == bytes(ask(engine, tensors_of(HELLO, 3)).tokens())


# Parameters


def test_wrong_parameters_are_all_named() -> None:
    """In one error; unfilled placeholders and empty values count as not set."""
    parameters = {
        "gpt_model_path": "${engine_dir}",
        "max_lora_rank": "0",
        "engine_flavour": "rust",
        "synthetic": "maybe",
        "compute_dtype": "",
    }
    with pytest.raises(EngineMismatch) as refused:
        parse_settings(parameters, Path("/models/tensorrt_llm"))

    assert [
        "parameters of the CPU engine:",
        "  max_lora_rank is '0', expected a whole number above 0",
        "  engine_flavour is 'rust', expected one of cpp, python",
        "  synthetic is 'maybe', expected true or false",
        "  gpt_model_path is not set: give the directory of a Hugging Face checkpoint",
    ] == str(refused.value).splitlines()


def test_relative_checkpoints_are_relative_to_the_model() -> None:
    """An absolute path stays what it is."""
    paths = [parse_settings({"gpt_model_path": path}, Path("/m")).gpt_model_path for path in ("1", "/elsewhere")]

    assert [Path("/m/1"), Path("/elsewhere")] == paths


def test_a_missing_checkpoint_is_named(tmp_path: Path) -> None:
    """With the file that was looked for."""
    with pytest.raises(EngineMismatch, match=r"gpt_model_path: cannot read .*nowhere/config\.json"):
        load_engine({"gpt_model_path": "nowhere", "synthetic": "true"}, tmp_path, decoupled=True)
    (tmp_path / "config.json").write_text("[]")
    with pytest.raises(EngineMismatch, match=r"gpt_model_path: .*config\.json' is not a JSON object"):
        load_engine({"gpt_model_path": ".", "synthetic": "true"}, tmp_path, decoupled=True)
