"""Requests that kill their workers are refused, and those that only ran beside them are not."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable

import pytest
from router_rig import FakeWorkers, RouterRig, on_paper, open_router, record
from router_scenes import STREAM, max_tokens, run, sent, tokens

from kelp.core.errors import MigrationsExceeded, PoisonRequest, WorkerDied, WorkerLost
from kelp.core.types import FinishReason, WorkerKey
from kelp.router.decision.request import RoutingRequest
from kelp.router.decision.selector import Decision
from kelp.router.placement import Placement, key_of
from kelp.router.suspects import Suspects, Suspicion
from support.virtual_time import run_in_virtual_time

FLEET = tuple(record(name) for name in ("a", "b", "c", "d", "e"))
A, B, C = map(key_of, FLEET[:3])
WAIT_S = 2.0
Find = Callable[[frozenset[WorkerKey]], Awaitable[Placement]]


class Ward:
    """Suspects among workers that the test kills."""

    def __init__(self) -> None:
        self.workers = FakeWorkers(*FLEET)
        self.suspects = Suspects(self.workers, WAIT_S)

    def place(self, name: str) -> Placement:
        (worker,) = [known for known in FLEET if known.model_name == name]
        return on_paper(Decision(RoutingRequest(4, ()), worker, None))

    async def crash(
        self, name: str, *suspicions: Suspicion, num_tokens: int = 0, was_heard: bool = True
    ) -> list[BaseException | None]:
        """Let the requests run on a worker, which then ends; what becomes of each."""
        placement = self.place(name)
        stays = [self.suspects.stay(suspicion, placement) for suspicion in suspicions]
        self.workers.dead.add(name)
        key = key_of(placement.decode)
        ends = await asyncio.gather(*(stay.died(key, num_tokens, was_heard) for stay in stays), return_exceptions=True)
        for stay in stays:
            stay.end()
        return ends


def stage(scene: Callable[[Ward], Awaitable[None]]) -> None:
    async def play() -> None:
        await scene(Ward())

    run_in_virtual_time(play())


def test_a_request_whose_second_worker_ends_too_is_refused_and_names_both() -> None:
    async def scene(ward: Ward) -> None:
        poison = Suspicion()
        assert await ward.crash("a", poison) == [None]
        (refusal,) = await ward.crash("b", poison)
        assert isinstance(refusal, PoisonRequest) and not refusal.is_retryable
        assert "host:1/a, host:1/b" in refusal.text

    stage(scene)


def test_fresh_requests_beside_a_refused_one_become_suspects_only() -> None:
    async def scene(ward: Ward) -> None:
        poison, beside = Suspicion(), Suspicion()
        await ward.crash("a", poison)
        refusal, innocent = await ward.crash("b", poison, beside)
        assert isinstance(refusal, PoisonRequest)
        assert innocent is None and beside.deaths == {B}

    stage(scene)


def test_of_two_suspects_that_lose_a_second_worker_together_none_is_refused_yet() -> None:
    async def scene(ward: Ward) -> None:
        poison, beside = Suspicion(), Suspicion()
        assert await ward.crash("a", poison, beside) == [None, None]
        assert await ward.crash("b", poison, beside) == [None, None]
        (refusal,) = await ward.crash("c", poison)
        assert isinstance(refusal, PoisonRequest)
        assert beside.deaths == {A, B}

    stage(scene)


def test_the_suspect_that_outlived_most_workers_is_the_culprit() -> None:
    async def scene(ward: Ward) -> None:
        poison, beside, later = Suspicion(), Suspicion(), Suspicion()
        await ward.crash("a", poison, beside)
        await ward.crash("b", poison, beside)
        await ward.crash("c", later)
        refusal, innocent = await ward.crash("d", poison, later)
        assert isinstance(refusal, PoisonRequest) and innocent is None

    stage(scene)


def test_a_suspect_that_gets_past_the_point_is_none_any_more() -> None:
    async def scene(ward: Ward) -> None:
        suspicion = Suspicion()
        await ward.crash("a", suspicion)
        stay = ward.suspects.stay(suspicion, ward.place("b"))
        stay.heard(7)
        assert suspicion.deaths == {A}
        stay.heard(1)
        assert suspicion.deaths == set()
        ward.workers.dead.add("b")
        await stay.died(B, 8, was_heard=True)
        assert suspicion.deaths == {B}

    stage(scene)


def test_the_same_death_told_by_every_sequence_of_a_request_counts_once() -> None:
    async def scene(ward: Ward) -> None:
        several = Suspicion()
        assert await ward.crash("a", several, several) == [None, None]
        assert several.deaths == {A}

    stage(scene)


def test_a_worker_that_the_registry_still_knows_has_not_died() -> None:
    async def scene(ward: Ward) -> None:
        cut_off = Suspicion()
        await ward.crash("a", cut_off)
        stay = ward.suspects.stay(cut_off, ward.place("b"))
        await stay.died(B, 0, was_heard=True)
        assert cut_off.deaths == {A}

    stage(scene)


def test_a_suspect_of_two_deaths_waits_until_no_other_one_is_where_it_goes() -> None:
    async def scene(ward: Ward) -> None:
        one, other = Suspicion(), Suspicion()
        await ward.crash("a", one, other)
        await ward.crash("b", one, other)
        asked: list[frozenset[WorkerKey]] = []

        async def find(occupied: frozenset[WorkerKey]) -> Placement:
            asked.append(occupied)
            return ward.place("c")

        first = ward.suspects.stay(one, await ward.suspects.place(one, find))
        second = asyncio.ensure_future(ward.suspects.place(other, find))
        await asyncio.sleep(60.0)
        assert not second.done()
        assert asked == [frozenset(), frozenset({C})]
        first.heard(8)
        assert (await second).decode.model_name == "c"

    stage(scene)


def test_a_suspect_that_a_dying_worker_never_acknowledged_is_not_judged_by_that_death() -> None:
    async def scene(ward: Ward) -> None:
        late = Suspicion()
        assert await ward.crash("a", late, was_heard=False) == [None]
        assert await ward.crash("b", late, was_heard=False) == [None]
        assert late.deaths == {A}

    stage(scene)


def finder(ward: Ward, asked: list[frozenset[WorkerKey]], *names: str) -> Find:
    """Finds the first of those workers that is not to be avoided, or the first one."""

    async def find(avoided: frozenset[WorkerKey]) -> Placement:
        asked.append(avoided)
        places = [ward.place(name) for name in names]
        return next((place for place in places if key_of(place.decode) not in avoided), places[0])

    return find


def test_a_suspect_without_a_token_waits_a_while_for_a_worker_of_its_own() -> None:
    async def scene(ward: Ward) -> None:
        silent, speaking = Suspicion(), Suspicion()
        await ward.crash("a", silent)
        await ward.crash("a", speaking, num_tokens=3)
        find = finder(ward, [], "b")
        ward.suspects.stay(speaking, await ward.suspects.place(speaking, find))
        waiting = asyncio.ensure_future(ward.suspects.place(silent, find))
        await asyncio.sleep(WAIT_S * 0.9)
        assert not waiting.done()
        await asyncio.sleep(WAIT_S * 0.2)
        assert (await waiting).decode.model_name == "b"

    stage(scene)


def test_a_suspect_that_had_begun_keeps_clear_of_one_that_had_not_and_never_waits() -> None:
    async def scene(ward: Ward) -> None:
        silent, speaking, another = Suspicion(), Suspicion(), Suspicion()
        await ward.crash("a", silent)
        await ward.crash("a", speaking, another, num_tokens=3)
        ward.suspects.stay(silent, await ward.suspects.place(silent, finder(ward, [], "b")))
        asked: list[frozenset[WorkerKey]] = []
        apart = await ward.suspects.place(speaking, finder(ward, asked, "b", "c"))
        ward.suspects.stay(speaking, apart)
        assert apart.decode.model_name == "c" and asked == [frozenset({B})]
        beside = await ward.suspects.place(another, finder(ward, [], "c"))
        assert beside.decode.model_name == "c"
        crowded = asyncio.ensure_future(ward.suspects.place(another, finder(ward, [], "b")))
        await asyncio.sleep(0)
        assert crowded.done()

    stage(scene)


def test_a_request_that_is_no_suspect_goes_where_it_would() -> None:
    async def scene(ward: Ward) -> None:
        silent = Suspicion()
        await ward.crash("a", silent)
        ward.suspects.stay(silent, ward.place("b"))
        asked: list[frozenset[WorkerKey]] = []
        assert (await ward.suspects.place(Suspicion(), finder(ward, asked, "b"))).decode.model_name == "b"
        assert asked == [frozenset()]

    stage(scene)


async def lose(rig: RouterRig, number: int, error: WorkerLost) -> str:
    """Fail a stream, and take its worker out of the registry if it died; the worker's name."""
    stream = await rig.workers.stream(number)
    if stream.command.wants_receipt:
        stream.say()
    if isinstance(error, WorkerDied):
        rig.workers.dead.add(stream.address.model_name)
    stream.fail(error)
    return stream.address.model_name


def test_a_router_refuses_the_request_after_two_deaths_and_tries_no_third_worker() -> None:
    async def scene() -> None:
        async with open_router(*FLEET) as rig:
            exchange, request = rig.ask()
            killed = [await lose(rig, number, WorkerDied("gone")) for number in range(2)]
            with pytest.raises(PoisonRequest):
                await request
            assert len(set(killed)) == len(rig.workers.streams) == 2
            assert rig.counters()["kelp_requests_total", (("outcome", "poison_request"),)] == 1

    run(scene)


def test_a_request_that_came_to_workers_that_had_just_ended_goes_on_to_one_that_lives() -> None:
    async def scene() -> None:
        async with open_router(*FLEET) as rig:
            exchange, request = rig.ask()
            for number in range(3):
                stream = await rig.workers.stream(number)
                assert stream.command.wants_receipt == (number > 0)
                rig.workers.dead.add(stream.address.model_name)
                stream.fail(WorkerDied("gone"))
            (await rig.workers.stream(3)).finish(FinishReason.LENGTH, *tokens("ab"))
            await request
            assert exchange.text == "ab"

    run(scene)


def test_a_request_whose_workers_are_lost_otherwise_is_not_called_poison() -> None:
    async def scene() -> None:
        async with open_router(*FLEET, max_migrations=2) as rig:
            exchange, request = rig.ask()
            for number in range(3):
                await lose(rig, number, WorkerLost("parted"))
            with pytest.raises(MigrationsExceeded):
                await request

    run(scene)


def test_a_request_that_gets_on_survives_the_death_of_every_worker_it_has_had() -> None:
    async def scene() -> None:
        async with open_router(*FLEET) as rig:
            exchange, request = rig.ask(**STREAM, **max_tokens(40))
            for number in range(3):
                (await rig.workers.stream(number)).say(*tokens("abcdefgh"))
                await sent(exchange, 8 * number + 7)
                await lose(rig, number, WorkerDied("gone"))
            (await rig.workers.stream(3)).finish(FinishReason.LENGTH, *tokens("ij"))
            await request
            assert exchange.text == "abcdefgh" * 3 + "ij"

    run(scene)
