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


class Ward:
    """Suspects among workers that the test kills."""

    def __init__(self) -> None:
        self.workers = FakeWorkers(*FLEET)
        self.suspects = Suspects(self.workers)

    def place(self, name: str) -> Placement:
        (worker,) = [known for known in FLEET if known.model_name == name]
        return on_paper(Decision(RoutingRequest(4, ()), worker, None))

    async def crash(self, name: str, *suspicions: Suspicion, num_tokens: int = 0) -> list[BaseException | None]:
        """Let the requests run on a worker, which then ends; what becomes of each."""
        placement = self.place(name)
        stays = [self.suspects.stay(suspicion, placement) for suspicion in suspicions]
        self.workers.dead.add(name)
        key = key_of(placement.decode)
        ends = await asyncio.gather(*(stay.died(key, num_tokens) for stay in stays), return_exceptions=True)
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
        await stay.died(B, 8)
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
        await stay.died(B, 0)
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


async def lose(rig: RouterRig, number: int, error: WorkerLost) -> str:
    """Fail a stream, and take its worker out of the registry if it died; the worker's name."""
    stream = await rig.workers.stream(number)
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
