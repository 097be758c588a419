# SPDX-FileCopyrightText: the tritonlora authors
# SPDX-License-Identifier: Apache-2.0
"""Admission and engine_cache, with an engine in virtual time whose cache is TensorRT-LLM's: no request is refused."""

from __future__ import annotations

import math
import random

import pytest

from tritonlora.serving.admission import OVERTAKING_SECONDS, Admission, Load, Probe
from tritonlora.serving.engine_cache import EngineCache
from tritonlora.serving.errors import InvalidRequest
from tritonlora.serving.tickets import Ticket
from virtual_time import Clients, Engine, Outcome, Resolver, World, run

PACE = 0.02  # seconds a token


def zipf(rank: int) -> float:
    """How often the adapter at this rank is asked for."""
    return 1 / rank


def served(
    clients: Clients, pages: int, *, pace: float = PACE, seconds: float = 30, are_large: bool = False
) -> tuple[Outcome, Resolver]:
    """What clients see past the resolver."""
    world = World()
    engine = Engine(world, pages, lambda _: pace)
    resolver = Resolver(world, engine, pages, {}, are_large=are_large)
    return run(world, resolver.ask, clients, seconds, counted_from=seconds / 3), resolver


def direct(clients: Clients, pages: int, *, pace: float = PACE, seconds: float = 30) -> Outcome:
    """What clients see of the engine itself, when each sends its weights along."""
    world = World()
    engine = Engine(world, pages, lambda _: pace)
    return run(
        world,
        lambda task_id, tokens, _, respond: engine.submit(task_id, tokens, True, respond),
        clients,
        seconds,
        counted_from=seconds / 3,
    )


def test_where_all_adapters_fit_the_first_token_comes_as_from_the_engine_itself() -> None:
    """However loose max_tokens is; each adapter's weights travel a time or two."""
    clients = Clients(adapters=60, streams=128, tokens=64, looseness=32)
    outcome, resolver = served(clients, 64, pace=0.04)
    expected = direct(clients, 64, pace=0.04)

    assert {"ok"} == outcome.responses.keys()
    assert outcome.responses["ok"] > 0.98 * expected.responses["ok"]
    assert outcome.quantile(0.99) < expected.quantile(0.99) + 0.04
    assert resolver.counts["weights"] < 5 * clients.adapters
    assert resolver.counts["waited"] == 0


def test_many_streams_that_begin_together_carry_weights_one_after_the_other_without_a_pause() -> None:
    """No weights evict anything where all adapters fit, so they need not wait for what was sent before them."""
    world = World()
    engine = Engine(world, 50, lambda _: 0.08)
    clients = Clients(adapters=50, streams=256, tokens=64)
    outcome = run(world, Resolver(world, engine, 50, {}).ask, clients, 10)

    assert {"ok"} == outcome.responses.keys()
    assert outcome.quantile(0.99) < 3 * 0.08


def test_when_nobody_asks_any_more_no_adapter_is_in_use() -> None:
    """Also where all adapters fit, so that no request depends on it: metrics say which adapters run."""
    world = World()
    resolver = Resolver(world, Engine(world, 8, lambda _: PACE), 8, {})
    outcome = run(world, resolver.ask, Clients(adapters=4, streams=4, tokens=16, looseness=4, until=5), 20)

    assert {"ok"} == outcome.responses.keys()
    assert [] == resolver.admission.cache.in_use


def test_requests_by_id_leave_nothing_behind() -> None:
    """However many they are, and though no weights are ever sent again."""
    admission = Admission(EngineCache(4, {1: 1}, 0.0), 0.0)
    for number in range(1000):
        now = number / 100
        ticket = Ticket({1: 1}, 4, now, 30)
        assert admission.ask(ticket, now)
        admission.sent(ticket, now)

    assert 1 == admission.under_way


def test_where_all_in_use_fit_the_first_token_comes_as_from_the_engine_itself() -> None:
    """100 adapters, 50 pages, 32 streams."""
    clients = Clients(adapters=100, streams=32, tokens=40)
    outcome, _ = served(clients, 50)
    expected = direct(clients, 50)

    assert {"ok"} == outcome.responses.keys()
    assert outcome.quantile(0.5) == pytest.approx(expected.quantile(0.5), abs=PACE)
    assert outcome.quantile(0.9) < expected.quantile(0.9) + PACE


@pytest.mark.parametrize("pace", [0.005, PACE, 0.08])
def test_a_large_adapter_is_sent_once_and_waits_for_no_long_probe(pace: float) -> None:
    """A load and the request after it take two tokens' time each; before them come a probe or two, or other loads."""
    clients = Clients(adapters=20, streams=3, tokens=24)
    outcome, resolver = served(clients, 8, pace=pace, are_large=True)

    assert {"ok"} == outcome.responses.keys()
    assert 0 == resolver.counts["weights"]
    assert outcome.quantile(0.9) < 0.05 + 8 * pace


def test_a_loose_max_tokens_costs_time_and_no_error() -> None:
    """1,024 of which 32 are used: no more than to load one adapter after the other, two tokens' time for each."""
    clients = Clients(adapters=100, streams=32, tokens=32, looseness=32)
    outcome, resolver = served(clients, 50)

    assert {"ok"} == outcome.responses.keys()
    assert outcome.quantile(0.99) < 32 * 2.5 * PACE
    assert resolver.counts["load ok"] > 0


def test_where_not_all_in_use_fit_the_pages_are_used() -> None:
    """32 adapters in use over 4 pages: 0.8 of what the pages allow, and no adapter waits much longer than another."""
    clients = Clients(adapters=32, streams=32, tokens=32, sticky=True)
    outcome, _ = served(clients, 4, seconds=90)
    possible = 4 / (32 * PACE)
    counted = 60 - outcome.quantile(0.5)  # those that wait at the end are not answered any more

    assert {"ok"} == outcome.responses.keys()
    assert outcome.responses["ok"] / counted > 0.8 * possible
    assert outcome.quantile(1) < 1.5 * outcome.quantile(0.5)


@pytest.mark.parametrize("pace", [0.0005, PACE])
@pytest.mark.parametrize("is_cyclic", [False, True])
def test_200_adapters_over_8_pages(pace: float, is_cyclic: bool) -> None:
    """With an engine that is faster than any, too."""
    clients = Clients(adapters=200, streams=32, tokens=16, cyclic=is_cyclic)
    outcome, _ = served(clients, 8, pace=pace)

    assert {"ok"} == outcome.responses.keys()


@pytest.mark.parametrize("seed", range(60))
def test_no_request_is_refused_whatever_the_engine_and_the_clients_are(seed: int) -> None:
    """Random sizes, paces that change, engines with a queue, weights that take their time, clients who come and go."""
    chance = random.Random(seed)  # noqa: S311
    world = World()
    pages, streams = chance.randint(1, 40), chance.randint(1, 80)
    paces = [chance.choice([0.001, 0.005, 0.02, 0.04]) * chance.uniform(0.8, 1.2) for _ in range(20)]
    engine = Engine(
        world, pages, lambda now: paces[int(now) % 20] if chance.random() < 0.9 else 0.05, chance.choice([8, 64, 512])
    )
    sending, routed = chance.choice([0, 0.001, 0.1]), chance.choice([0, 0, 0.5, 1])
    resolver = Resolver(world, engine, pages, {}, sending=sending, patience=math.inf, routed=routed)
    clients = Clients(
        adapters=chance.randint(1, 120),
        streams=streams,
        tokens=chance.choice([2, 16, 64]),
        looseness=chance.choice([1, 1, 4]),
        think=chance.choice([0.001, 0.5, 3]),
        weight=chance.choice([zipf, lambda rank: 1.0]),
    )
    outcome = run(world, resolver.ask, clients, 30, seed=seed)

    assert {"ok"} == outcome.responses.keys(), (pages, clients, resolver.counts)
    assert 0 == resolver.counts["unexpected miss"]


@pytest.mark.parametrize(("pages", "most_loads"), [(12, 1000), (24, 30)])
@pytest.mark.parametrize("seed", range(4))
def test_an_engine_that_pauses_requests_refuses_none(pages: int, most_loads: int, seed: int) -> None:
    """Its iterations tell of no end. So only loads are certain, unless all of the 20 adapters fit."""
    world = World()
    engine = Engine(world, pages, lambda _: PACE, pausing=0.01)
    resolver = Resolver(world, engine, pages, {}, may_pause=True)
    outcome = run(world, resolver.ask, Clients(adapters=20, streams=10, tokens=16), 40, seed=seed)

    assert {"ok"} == outcome.responses.keys()
    assert 0 == resolver.counts["unexpected miss"]
    assert resolver.counts["load ok"] < most_loads


@pytest.mark.parametrize(("waiting", "released"), [(1, 1), (2, 0)])
def test_no_request_relies_on_the_weights_of_another_one(waiting: int, released: int) -> None:
    """The engine may refuse the one that carries them, or its client may leave. So a load comes before two requests."""
    admission = Admission(EngineCache(1, {}, 0.0), 0.0)
    busy, *others = [Ticket({task_id: 1}, 4, 0.0, 30) for task_id in (1, *[2] * waiting)]
    assert admission.ask(busy, 0.0)
    admission.sent(busy, 0.0)
    assert [False] * waiting == [admission.ask(one, 0.0) for one in others]
    for _ in range(16):
        admission.responded(0.5, 0.5)  # by now the busy one has ended
    step = admission.step(0.5)

    assert others[:released] == admission.released()
    assert (released == 0) == (step == Load(2, 1))


def test_a_batch_that_never_fits_keeps_no_other_waiting() -> None:
    adapters = {2: 3, 3: 2}
    why = "the 2 adapters of the batch take 5 pages, and the engine's adapter cache has 4; send fewer rows at a time"
    pauses = Admission(EngineCache(4, {}, 0.0, is_fresh=False, may_pause=True), 0.0)
    with pytest.raises(InvalidRequest, match=f"^{why}$"):
        pauses.ask(Ticket(adapters, 4, 0.0, 30), 0.0)
    admission = Admission(EngineCache(4, {1: 1}, 0.0), 0.0)
    with pytest.raises(InvalidRequest, match=f"^{why}$"):
        admission.ask(Ticket(adapters, 4, 0.0, 30), 0.0)

    assert admission.ask(Ticket({1: 1}, 4, OVERTAKING_SECONDS, 30), OVERTAKING_SECONDS)
    assert not Admission(EngineCache(0, {}, 0.0), 0.0).ask(Ticket(adapters, 4, 0.0, 30), 0.0)


def with_three_of_four_pages_in_use() -> Admission:
    """As far as is known: the requests may take any time."""
    admission = Admission(EngineCache(4, {}, 0.0), 0.0)
    for task_id in (1, 2, 3):
        busy = Ticket({task_id: 1}, 1e9, 0.0, 30)
        assert admission.ask(busy, 0.0)
        admission.sent(busy, 0.0)
    return admission


def test_a_batch_goes_on_once_probes_have_found_all_of_its_adapters() -> None:
    """Requests that may take far longer than they do leave nothing certain, and keep no batch waiting."""
    admission = with_three_of_four_pages_in_use()
    batch = Ticket({4: 1, 5: 1}, 4, 0.0, 30, takes_weights=False)
    assert not admission.ask(batch, 0.0)
    steps = []
    was_evicted = False
    for _ in range(6):
        assert [] == admission.released()
        steps.append(step := admission.step(0.1))
        if isinstance(step, Load):
            admission.loaded(step, 0.1, 0.1)
        elif isinstance(step, Probe) and step.task_id == 4 and not was_evicted:
            was_evicted = True
            assert not admission.missed(step, 0.1)
        elif isinstance(step, Probe):
            admission.probed(step, 0.1, 0.1)

    assert [batch] == admission.released()
    assert [4, 5, 4, 4, 4, 5] == [step.task_id for step in steps if isinstance(step, Load | Probe)]
    assert [True, True, False, True, False, False] == [isinstance(step, Load) for step in steps]


def test_weights_that_come_after_a_batch_was_loaded_may_evict_its_adapters() -> None:
    """They may still be on their way when probes find the adapters. A load is sent after them, and the probes again."""
    admission = with_three_of_four_pages_in_use()
    batch, other = Ticket({4: 1, 5: 1}, 4, 0.0, 30, takes_weights=False), Ticket({6: 1}, 4, 0.1, 30)
    assert not admission.ask(batch, 0.0)
    steps = []
    for _ in range(6):
        steps.append(step := admission.step(0.1))
        if isinstance(step, Load):
            admission.loaded(step, 0.1, 0.1)
        elif isinstance(step, Probe):
            admission.probed(step, 0.1, 0.1)
            if other.number < 0:
                assert admission.ask(other, 0.1)

    assert [batch] == admission.released()
    assert [True, True, False, True, False, False] == [isinstance(step, Load) for step in steps]


@pytest.mark.parametrize("seed", range(4, 8))
@pytest.mark.parametrize("routed", [0.0, 0.5])
def test_a_request_that_the_engine_refuses_costs_no_other_request_its_adapter(seed: int, routed: float) -> None:
    """It has not used its adapter, and its weights have not arrived."""
    world = World()
    pages = 8 + 4 * seed
    resolver = Resolver(world, Engine(world, pages, lambda _: 0.005), pages, {}, routed=routed)
    clients = Clients(adapters=3 * pages, streams=24, tokens=8, think=0.1, refused=0.2)
    outcome = run(world, resolver.ask, clients, 20, seed=seed)

    assert {"ok", "refused by the engine"} == outcome.responses.keys()
    assert 0 == resolver.counts["unexpected miss"]


@pytest.mark.parametrize("pages", [8, 64])
@pytest.mark.parametrize("seed", range(5))
def test_an_engine_that_is_loaded_again_is_found_out_within_two_seconds(pages: int, seed: int) -> None:
    """What it had is gone. Requests fail that it was answering, or that were sent in these seconds."""
    world = World()
    engine = Engine(world, pages, lambda _: PACE)
    resolver = Resolver(world, engine, pages, {})
    world.after(15.3, engine.reload)
    outcome = run(world, resolver.ask, Clients(adapters=32, streams=16, tokens=16), 30, seed=seed)

    assert outcome.errors_at
    assert max(outcome.errors_at) < 15.3 + 2
    assert resolver.counts["unexpected miss"] <= 1


def test_the_router_s_clients_see_nothing_of_an_engine_that_was_loaded_again_before_they_asked() -> None:
    """Nor of somebody else who evicts their adapters: the router asks again."""
    world = World()
    engine = Engine(world, 8, lambda _: PACE)
    resolver = Resolver(world, engine, 8, {}, routed=1)
    clients = Clients(adapters=8, streams=8, tokens=4, think=1)
    for number in range(80):
        world.after(1 + number / 4, engine.submit, 1000 + number, 1, True, lambda *_: None)
    outcome = run(world, resolver.ask, clients, 30)

    assert {"ok"} == outcome.responses.keys()
    assert resolver.counts["lost"] > 3


def test_the_router_s_requests_go_by_id_where_the_size_of_the_cache_is_not_known() -> None:
    """Each adapter is loaded once, if all fit. Where they do not, a miss brings it back."""
    for pages, most_loads in ((64, 40), (8, math.inf)):
        world = World()
        engine = Engine(world, pages, lambda _: PACE)
        resolver = Resolver(world, engine, 0, {}, routed=1)
        outcome = run(world, resolver.ask, Clients(adapters=30, streams=6, tokens=8), 30)

        assert {"ok"} == outcome.responses.keys()
        assert resolver.counts["load ok"] <= most_loads


def test_a_request_whose_router_has_ended_is_bounded_like_an_ensemble_s() -> None:
    """The engine may still work on it."""
    cache = EngineCache(1, {}, 0.0)
    admission = Admission(cache, 0.0)
    ticket = Ticket({1: 1}, 4, 0.0, 30, takes_weights=False, is_routers=True)
    assert not admission.ask(ticket, 0.0)
    load = admission.step(0.0)
    assert isinstance(load, Load)
    admission.loaded(load, 0.0, 0.1)
    admission.sent(ticket, 0.1)
    admission.left_behind(ticket, 0.2)
    assert [1] == cache.in_use
    for number in range(20):
        admission.responded(1.0 + number, 1.1 + number)

    assert [] == cache.in_use


def test_an_engine_that_was_loaded_again_while_nobody_asked_refuses_nobody() -> None:
    """Nothing is believed that was not seen lately."""
    world = World()
    engine = Engine(world, 64, lambda _: PACE)
    resolver = Resolver(world, engine, 64, {})
    before = run(world, resolver.ask, Clients(adapters=32, streams=16, tokens=16, until=10), 60)
    engine.reload()
    after = run(world, resolver.ask, Clients(adapters=32, streams=16, tokens=16), 10)

    assert [{"ok"}, {"ok"}] == [{*before.responses}, {*after.responses}]


@pytest.mark.parametrize(
    ("warm", "pins", "clients"),
    [
        ({}, {}, Clients(adapters=20, streams=6, tokens=16)),
        ({1: 1, 2: 1, 3: 1}, {}, Clients(adapters=20, streams=22, tokens=2)),
        ({}, {1000: 1}, Clients(adapters=19, streams=4, tokens=16, looseness=16, think=0.5)),
    ],
    ids=["all in use", "warm adapters, too", "beside a pinned adapter that nobody asks for"],
)
def test_another_client_of_the_engine_that_loads_adapters_is_found_out(
    warm: dict[int, int], pins: dict[int, int], clients: Clients
) -> None:
    """It evicts what was done first. That is noticed, and then nobody is refused."""
    world = World()
    engine = Engine(world, 20, lambda _: PACE)
    engine.reload(warm)
    resolver = Resolver(world, engine, 20, warm, pins=pins)

    def load(task_id: int) -> None:
        engine.submit(task_id, 1, True, lambda *_: None)

    for number in range(12):
        world.after(10 + number / 100, load, 2000 + number)
    outcome = run(world, resolver.ask, clients, 40)

    assert 1 <= resolver.counts["unexpected miss"] <= 3
    assert max(outcome.errors_at, default=0) < 14


def test_idle_adapters_of_the_warmup_make_no_request_carry_weights() -> None:
    """A probe of one of them does not tell that the engine was not loaded again. Others tell that often enough."""
    world = World()
    warm = {1001: 1, 1002: 1, 1003: 1}
    engine = Engine(world, 40, lambda _: PACE)
    engine.reload(warm)
    resolver = Resolver(world, engine, 40, warm)
    clients = Clients(adapters=20, streams=22, tokens=16)
    run(world, resolver.ask, clients, 10)
    before = resolver.counts["weights"]
    outcome = run(world, resolver.ask, clients, 30)

    assert {"ok"} == outcome.responses.keys()
    assert before == resolver.counts["weights"]


PINS = {1000: 1, 1001: 1}


def kept(
    clients: Clients, pages: int, *, pace: float = PACE, routed: float = 0.0, pins: dict[int, int] = PINS, seed: int = 1
) -> tuple[Outcome, Resolver, float]:
    """What clients see beside pinned adapters that none of them asks for, and how often the engine had these."""
    world = World()
    engine = Engine(world, pages, lambda _: pace)
    resolver = Resolver(world, engine, pages, {}, patience=math.inf, routed=routed, pins=pins)
    seen = list[bool]()

    def look() -> None:
        seen.extend(engine.holds(pin) for pin in pins)
        world.after(0.01, look)

    world.after(5, look)  # while all pages are asked for, it takes seconds to load the pinned ones
    outcome = run(world, resolver.ask, clients, 20, seed=seed)
    return outcome, resolver, sum(seen) / len(seen)


@pytest.mark.parametrize("streams", [1, 4, 32])
@pytest.mark.parametrize(("pace", "routed"), [(PACE, 0), (PACE, 1), (0.0005, 0)])
def test_pinned_adapters_stay_while_200_adapters_go_through_8_pages(streams: int, pace: float, routed: float) -> None:
    """Past the resolver, through the router, and with an engine that is faster than any. Each is loaded once."""
    clients = Clients(adapters=200, streams=streams, tokens=16)
    outcome, resolver, share = kept(clients, 8, pace=pace, routed=routed)

    assert ({"ok"}, 1.0) == ({*outcome.responses}, share)
    assert 0 == resolver.counts["unexpected miss"]


@pytest.mark.parametrize("seed", range(4, 8))
def test_no_request_is_refused_for_the_sake_of_a_pin(seed: int) -> None:
    """Whatever the numbers are. A pin is kept where the requests under way do not need all pages."""
    chance = random.Random(seed)  # noqa: S311
    pins = {1000 + number: 1 for number in range(chance.randint(1, 5))}
    streams = chance.randint(1, 30)
    clients = Clients(
        adapters=chance.randint(1, 120),
        streams=streams,
        tokens=chance.choice([2, 16, 40]),
        think=chance.choice([0.001, 0.5]),
    )
    spare = chance.choice([chance.randint(1, 10), 2 * streams + 4])
    outcome, resolver, share = kept(
        clients, len(pins) + spare, routed=chance.choice([0, 0, 0.5, 1]), pins=pins, seed=seed
    )

    assert ({"ok"}, 0) == ({*outcome.responses}, resolver.counts["unexpected miss"])
    assert share == 1 or spare < 2 * streams, (spare, clients, resolver.counts)


def test_pinned_adapters_go_before_requests_wait_for_long() -> None:
    """A max_tokens of 16 times what is used makes the engine's cache look full: a second in ten is waited."""
    clients = Clients(adapters=200, streams=32, tokens=16, looseness=16)
    outcome, _, share = kept(clients, 8)
    without, _, _ = kept(clients, 8, pins={1000: 0})

    assert {"ok"} == outcome.responses.keys()
    assert outcome.responses["ok"] > 0.8 * without.responses["ok"]
    assert share < 0.5


@pytest.mark.parametrize("is_asked", [True, False])
def test_pinned_adapters_come_back_to_an_engine_that_was_loaded_again(is_asked: bool) -> None:
    """Within ten seconds, though nobody asks for anything."""
    world = World()
    engine = Engine(world, 8, lambda _: PACE)
    resolver = Resolver(world, engine, 8, {}, pins=PINS)
    clients = Clients(adapters=3, streams=2, tokens=4, until=math.inf if is_asked else 1)
    run(world, resolver.ask, clients, 10)
    engine.reload()
    assert not any(map(engine.holds, PINS))
    world.run(world.now + (3 if is_asked else 10))

    assert all(map(engine.holds, PINS))


def test_a_pinned_adapter_that_cannot_be_loaded_is_tried_again_at_the_given_time() -> None:
    """The others are loaded meanwhile. A table that pins it anew is a reason to try at once."""
    admission = Admission(EngineCache(4, {}, 0.0), 0.0)
    admission.pin(PINS)
    first = admission.step(0.0)
    assert first == Load(1000, 0, is_of_pin=True)
    assert [] == admission.failed(first, 0.1, pin_at=60.0)
    second = admission.step(0.1)
    assert isinstance(second, Load)
    admission.loaded(second, 0.1, 0.2)
    steps = [admission.step(now) for now in (0.3, 59.9, 60.0)]

    assert 1001 == second.task_id
    assert [False, False, True] == [isinstance(step, Load) for step in steps]


@pytest.mark.parametrize("pages", [0, 8])
def test_a_ticket_that_only_loads_ends_when_the_engine_has_the_adapter(pages: int) -> None:
    """Whether or not the size of the cache is known. It leaves nothing behind, and asked again it goes on at once."""
    cache = EngineCache(pages, {}, 0.0)
    admission = Admission(cache, 0.0)
    ticket, again = (Ticket({1: 1}, 0, 0.0, 30, takes_weights=False, only_loads=True) for _ in range(2))
    assert not admission.ask(ticket, 0.0)
    load = admission.step(0.0)
    assert isinstance(load, Load)
    admission.loaded(load, 0.0, 0.1)
    assert [ticket] == admission.released()
    admission.sent(ticket, 0.1)

    assert ([], 0, False) == (cache.in_use, admission.under_way, cache.has_open)
    assert {1: True} == cache.states()
    assert bool(pages) == admission.ask(again, 0.2)
