# SPDX-FileCopyrightText: the tritonlora authors
# SPDX-License-Identifier: Apache-2.0
"""Tables that are edited by hand while a real tritonserver answers, so that an id is another adapter's for a time.

The engine ignores weights under an id that it holds: it would answer from the first ones. What the router knows of
that, the resolver does, and the other way round. A synthetic answer says "[<lora_task_id>]".
"""

from __future__ import annotations

import itertools
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest

from asking import ENSEMBLE, ROUTER, Question, Refusal, Way
from repositories import resolving, synthetic_adapter
from synthetic import EXPLICIT, control, expected
from tritonlora.launch.server import Server
from tritonlora.repository import add
from tritonlora.repository.paths import Repository, read_table
from tritonlora.serving.adapter_table_json import render

WARM = ("pirate", "haiku")
COLD = tuple(f"cold{number}" for number in range(6))
REFUSED = "was given to other weights; the engine may hold them under it"
TOKENS = 12
ROUTES = {"router": Way("generate_stream", ROUTER, True), "resolver": Way("generate_stream", ENSEMBLE, True)}

Launch = Callable[..., Server]


@pytest.fixture
def opened(tmp_path: Path) -> Repository:
    """Two warm adapters and six cold ones, which all fit."""
    return resolving(tmp_path / "repo", WARM, COLD, pages=100)


def ask(server: Server, route: str, lora_name: str) -> str:
    """The answer by way of the router or of the resolver, or the error."""
    answer = ROUTES[route].ask(server, Question([lora_name.encode()], tokens=[TOKENS]))
    return answer.message if isinstance(answer, Refusal) else "".join(answer)


def swap(opened: Repository, one: str, other: str) -> None:
    """Two adapters have each other's ids."""
    table = read_table(opened)
    ids = {name: table.entries[name].lora_task_id for name in (one, other)}
    swapped = {name: replace(table.entries[name], lora_task_id=ids[of]) for name, of in ((one, other), (other, one))}
    opened.table_path.write_text(render(replace(table, entries={**table.entries, **swapped})))


def test_the_weights_of_the_start_answer_for_no_other_adapter(opened: Repository, launch: Launch) -> None:
    """Also when the table was edited before anybody asked, and for who is loaded then; and all is well when it is put
    right.
    """
    server = launch(opened.root, extra=EXPLICIT)
    asked = list(itertools.product(ROUTES, ("pirate", "haiku")))
    swap(opened, "pirate", "haiku")
    for verb, model in itertools.product(("unload", "load"), ("ensemble", "lora_resolver", "lora_router")):
        control(server, verb, model)
    wrong = [ask(server, route, name) for route, name in asked]
    swap(opened, "pirate", "haiku")

    assert all(REFUSED in answer for answer in wrong)
    assert [expected(read_table(opened), name, tokens=TOKENS) for _, name in asked] == [
        ask(server, route, name) for route, name in asked
    ]


@pytest.mark.parametrize(("first", "second"), [("router", "resolver"), ("resolver", "router")])
def test_who_saw_only_the_wrong_table_serves_the_right_one(
    opened: Repository, launch: Launch, tmp_path: Path, first: str, second: str
) -> None:
    """What one of them has sent, the other one knows, and what could not be sent counts for neither."""
    server = launch(opened.root)
    for seed, name in enumerate(("late", "later")):
        add.add(opened, name, synthetic_adapter(tmp_path / name, 50 + seed), add.Options(warm=False))
    right = [expected(read_table(opened), name, tokens=TOKENS) for name in ("late", "later")]
    answers = [ask(server, first, name) for name in ("late", "later")]
    swap(opened, "late", "later")
    wrong = [ask(server, route, name) for route in (second, first) for name in ("late", "later")]
    swap(opened, "late", "later")

    assert right == answers
    assert all(REFUSED in answer for answer in wrong)
    assert right * 2 == [ask(server, route, name) for route in (second, first) for name in ("late", "later")]
