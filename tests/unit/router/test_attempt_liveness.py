"""When a worker counts as lost: silence, heartbeats, keep-alives."""

from __future__ import annotations

import asyncio

import pytest
from attempt_rig import PREFILL, Trial, play
from router_rig import job, record

from kelp.core.errors import InternalError, WorkerDied, WorkerLost, WorkerStuck
from kelp.core.messages import Finished
from kelp.core.types import FinishReason, Role


def test_an_output_that_cannot_be_handled_ends_the_attempt_at_once() -> None:
    async def story(trial: Trial, running: asyncio.Task[Finished]) -> None:
        trial.tokens = None  # type: ignore[assignment]
        trial.workers.streams[0].say(1)
        started_s = asyncio.get_running_loop().time()
        with pytest.raises(InternalError, match="AttributeError: 'NoneType'"):
            await running
        assert asyncio.get_running_loop().time() - started_s < 1.0

    play(story)


def test_a_silent_worker_whose_heartbeat_stopped_is_lost_within_two_checks() -> None:
    async def story(trial: Trial, running: asyncio.Task[Finished]) -> None:
        trial.workers.dead.add("decode")
        started_s = asyncio.get_running_loop().time()
        with pytest.raises(WorkerLost, match="host:1/decode stopped its heartbeat"):
            await running
        assert asyncio.get_running_loop().time() - started_s <= 2.0

    play(story)


def test_a_restarted_worker_is_another_one() -> None:
    async def story(trial: Trial, running: asyncio.Task[Finished]) -> None:
        trial.workers.known = [record("decode", epoch="a later one")]
        with pytest.raises(WorkerDied, match="stopped its heartbeat"):
            await running

    play(story)


def test_a_worker_that_no_longer_listens_has_died_whatever_the_registry_says() -> None:
    async def story(trial: Trial, running: asyncio.Task[Finished]) -> None:
        trial.workers.gone.add("decode")
        with pytest.raises(WorkerDied, match="no longer listens"):
            await running

    play(story)


def test_a_worker_that_talks_is_not_lost_whatever_the_registry_says() -> None:
    async def story(trial: Trial, running: asyncio.Task[Finished]) -> None:
        trial.workers.dead.add("decode")
        for _ in range(10):
            trial.workers.streams[0].say()
            await asyncio.sleep(0.4)
        assert not running.done()
        trial.workers.streams[0].finish(FinishReason.LENGTH, 1)
        await running

    play(story)


def test_a_living_worker_may_be_silent_until_the_idle_timeout() -> None:
    async def story(trial: Trial, running: asyncio.Task[Finished]) -> None:
        started_s = asyncio.get_running_loop().time()
        with pytest.raises(WorkerLost, match="host:1/decode was silent for 2[01] s"):
            await running
        assert 19.9 <= asyncio.get_running_loop().time() - started_s <= 21.5

    play(story, idle_timeout_s=20.0)


def test_keep_alives_postpone_the_idle_timeout_and_are_not_relayed() -> None:
    async def story(trial: Trial, running: asyncio.Task[Finished]) -> None:
        for _ in range(8):
            await asyncio.sleep(15.0)
            trial.workers.streams[0].say()
        assert not running.done()
        trial.workers.streams[0].finish(FinishReason.LENGTH, 1)
        await running
        assert trial.tokens == [1]

    play(story, idle_timeout_s=20.0)


def test_a_worker_that_lives_but_never_says_its_first_token_is_stuck() -> None:
    async def story(trial: Trial, running: asyncio.Task[Finished]) -> None:
        for _ in range(5):
            await asyncio.sleep(9.0)
            trial.workers.streams[0].say()
        await asyncio.sleep(6.5)
        with pytest.raises(WorkerStuck, match="host:1/decode lives, but has said no token for 5[01] s"):
            await running

    play(story, idle_timeout_s=20.0, first_token_timeout_s=50.0, next_token_timeout_s=5.0)


def test_between_tokens_another_limit_holds_and_every_token_starts_it_anew() -> None:
    async def story(trial: Trial, running: asyncio.Task[Finished]) -> None:
        for token_id in range(1, 5):
            trial.workers.streams[0].say(token_id)
            await asyncio.sleep(4.5)
        assert not running.done()
        trial.workers.streams[0].say()
        with pytest.raises(WorkerStuck, match="has said no token for [56] s"):
            await running
        assert trial.tokens == [1, 2, 3, 4]

    play(story, idle_timeout_s=20.0, first_token_timeout_s=50.0, next_token_timeout_s=5.5)


def test_a_prefill_worker_that_stops_its_heartbeat_ends_the_attempt() -> None:
    async def story(trial: Trial, running: asyncio.Task[Finished]) -> None:
        trial.workers.dead.add("prefill")
        with pytest.raises(WorkerLost, match="host:1/prefill stopped its heartbeat"):
            await running
        assert trial.attempt.failure is not None and trial.attempt.failure.worker == PREFILL

    play(story, PREFILL)


def test_a_request_with_another_worker_to_go_to_waits_no_longer_than_its_deadline_leaves() -> None:
    async def story(trial: Trial, running: asyncio.Task[Finished]) -> None:
        trial.workers.known.append(record("decode_1"))
        started_s = asyncio.get_running_loop().time()
        with pytest.raises(WorkerLost, match="has said no token for 2[01] s, all that the deadline leaves"):
            while True:
                trial.workers.streams[0].say()
                await asyncio.wait([running], timeout=0.5)
                if running.done():
                    await running
        assert asyncio.get_running_loop().time() - started_s <= 22.0

    play(story, request=job(seconds_left=20.0))


@pytest.mark.parametrize("has_token", [False, True])
def test_a_request_with_nowhere_else_to_go_waits_on(has_token: bool) -> None:
    async def story(trial: Trial, running: asyncio.Task[Finished]) -> None:
        trial.workers.known.append(record("prefill", role=Role.PREFILL))
        trial.workers.streams[0].say(*([1] if has_token else []))
        for _ in range(100):
            await asyncio.sleep(0.5)
            trial.workers.streams[0].say()
        assert not running.done()
        trial.workers.streams[0].finish(FinishReason.LENGTH, 1)
        await running

    play(story, request=job(seconds_left=20.0))


def test_a_prefill_worker_that_takes_all_the_time_is_given_up_because_the_decode_worker_can_do_it() -> None:
    async def story(trial: Trial, running: asyncio.Task[Finished]) -> None:
        with pytest.raises(WorkerLost, match="host:1/prefill has said no token for .* all that the deadline leaves"):
            while True:
                for stream in trial.workers.streams:
                    stream.say()
                await asyncio.wait([running], timeout=0.5)
                if running.done():
                    await running
        assert trial.attempt.is_handoff_failure

    play(story, prefill=PREFILL, request=job(seconds_left=20.0))
