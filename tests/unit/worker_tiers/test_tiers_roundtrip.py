"""Blocks that go down to the manager and come back, without and with trouble on the way."""

from __future__ import annotations

import asyncio
import ctypes
from pathlib import Path

import pytest
from tiers_rig import BLOCK_SIZE, NUM_BLOCKS, PROMPT, names_of, open_rig

from kelp.core.errors import CapacityError, FatalTransferError, WorkerLost
from kelp.core.hashing import seed_hash, tenant_digest
from kelp.core.kv_manager_messages import Await, Commit, Onboard, Release, Renew, Store
from kelp.core.metrics import KV_MANAGER_FAILURES, KV_MANAGER_JOINED, OFFLOAD_BLOCKS, ONBOARD_BLOCKS, ONBOARD_REQUESTS
from kelp.core.types import FinishReason, Role
from kelp.executor.base import Completed, Reserved
from support.waiting import until


async def evicted_after_a_run(worker):
    """Run the prompt, have it stored below and forgotten here; returns its tokens."""
    first = await worker.run()
    await worker.stored()
    await worker.forget()
    return first.tokens


def test_a_prompt_comes_back_from_below_with_the_same_tokens(tmp_path: Path) -> None:
    async def scenario() -> None:
        async with open_rig(tmp_path) as (host, (worker,)):
            tokens = await evicted_after_a_run(worker)
            life = await worker.run()
            assert isinstance(life.end, Completed)
            assert life.tokens == tokens
            assert (life.end.usage.cached_tokens, life.end.usage.onboarded_blocks) == (3 * BLOCK_SIZE, 3)
            by_tier = (0, 3, 0, 0)
            assert worker.usage == {
                "cached_tokens": 3 * BLOCK_SIZE, "onboarded_blocks": 3, "onboarded_tiers": by_tier
            }  # fmt: skip
            assert 0 < worker.times_ns["onboard_start_ns"] <= worker.times_ns["onboard_done_ns"]
            assert not any(isinstance(event, Reserved) for event in life.events), "the worker keeps it to itself"
            await worker.quiet()
            assert worker.counted(ONBOARD_BLOCKS, outcome="onboarded") == 3
            assert worker.counted(ONBOARD_REQUESTS, outcome="hit") == 1
            assert worker.counted(OFFLOAD_BLOCKS, outcome="stored") >= 3

    asyncio.run(scenario())


def test_a_prefill_worker_onboards_what_another_worker_has_computed(tmp_path: Path) -> None:
    async def scenario() -> None:
        async with open_rig(tmp_path, num_workers=2) as (host, (worker, other)):
            first = await worker.run()
            await worker.stored()
            life = await other.run(role=Role.PREFILL)
            assert isinstance(life.end, Completed) and life.end.usage.onboarded_blocks == 3
            assert life.tokens == first.tokens[:1]

    asyncio.run(scenario())


def test_another_salt_finds_nothing(tmp_path: Path) -> None:
    async def scenario() -> None:
        async with open_rig(tmp_path) as (host, (worker,)):
            await evicted_after_a_run(worker)
            life = await worker.run(seed_hash=seed_hash("rig", cache_salt="s"), tenant=tenant_digest("s"))
            assert isinstance(life.end, Completed) and life.end.usage.onboarded_blocks == 0
            salted = tenant_digest("s")
            await until(lambda: any(call.tenant == salted for call in host.calls if isinstance(call, Store)), "a store")

            assert {call.tenant for call in host.calls if isinstance(call, Onboard)} == {tenant_digest(""), salted}

    asyncio.run(scenario())


def test_a_manager_that_is_known_to_have_no_more_than_the_engine_is_not_asked(tmp_path: Path) -> None:
    async def scenario() -> None:
        async with open_rig(tmp_path) as (host, (worker,)):
            await evicted_after_a_run(worker)
            for known_blocks, num_calls, num_onboarded in ((1, 0, 0), (3, 1, 3)):
                before = host.num_calls(Onboard)
                life = await worker.run(known_blocks=known_blocks)
                assert isinstance(life.end, Completed)
                assert life.end.usage.onboarded_blocks == num_onboarded
                assert host.num_calls(Onboard) - before == num_calls
                await worker.forget()

    asyncio.run(scenario())


def test_blocks_of_a_prompt_that_the_engine_has_are_not_asked_for(tmp_path: Path) -> None:
    async def scenario() -> None:
        async with open_rig(tmp_path) as (host, (worker,)):
            await worker.run()
            await worker.run()
            assert host.num_calls(Onboard) == 1, "of the first time"
            longer = [*PROMPT[: 3 * BLOCK_SIZE], *range(30, 50)]
            await worker.run(longer)
            asked = [call for call in host.calls if isinstance(call, Onboard)][-1]
            assert (asked.first_position, list(asked.hashes)) == (3, names_of(longer)[3:5])

    asyncio.run(scenario())


def test_short_prompts_are_computed_without_asking(tmp_path: Path) -> None:
    async def scenario() -> None:
        async with open_rig(tmp_path) as (host, (worker,)):
            await worker.run(PROMPT[: 2 * BLOCK_SIZE])
            assert host.num_calls(Onboard) == 0

    asyncio.run(scenario())


@pytest.mark.parametrize("damaged", [0, 1, 2])
def test_a_block_with_wrong_bytes_is_computed_and_the_manager_forgets_it(tmp_path: Path, damaged: int) -> None:
    async def scenario() -> None:
        async with open_rig(tmp_path) as (host, (worker,)):
            tokens = await evicted_after_a_run(worker)
            space = host.manager.space
            slot, region = space.host.shelf.slot(names_of(PROMPT)[damaged]), space.host.arena.region
            ctypes.c_ubyte.from_address(region.base_address + slot * region.stride).value ^= 1
            life = await worker.run()
            assert life.tokens == tokens
            assert life.end.usage.onboarded_blocks == damaged
            assert worker.counted(ONBOARD_BLOCKS, outcome="corrupt") == 1
            await worker.quiet()
            await until(lambda: host.num_calls(Release) == 1, "the release")

    asyncio.run(scenario())


def test_a_failing_read_is_computed_and_the_next_prompt_is_onboarded_again(tmp_path: Path) -> None:
    async def scenario() -> None:
        async with open_rig(tmp_path) as (host, (worker,)):
            tokens = await evicted_after_a_run(worker)
            worker.faults.fail(worker.faults.num_reads, FatalTransferError("gone"))
            life = await worker.run()
            assert (life.tokens, life.end.usage.onboarded_blocks) == (tokens, 0)
            assert worker.counted(KV_MANAGER_FAILURES) == 1
            await worker.quiet()
            await worker.join()
            await worker.stored()
            await worker.forget()
            life = await worker.run()
            assert (life.tokens, life.end.usage.onboarded_blocks) == (tokens, 3)
            await worker.quiet()

    asyncio.run(scenario())


def test_a_request_that_is_cancelled_while_its_blocks_come_leaves_nothing_behind(tmp_path: Path) -> None:
    async def scenario() -> None:
        async with open_rig(tmp_path) as (host, (worker,)):
            await evicted_after_a_run(worker)
            stalled = worker.faults.stall(worker.faults.num_reads)
            life, task = worker.start()
            await until(stalled.is_posted.is_set, "the READ")
            task.cancel()
            await asyncio.wait({task})
            await until(lambda: life.end is not None, "the abort")
            assert life.end.finish_reason is FinishReason.CANCELLED
            load = worker.executor.load()
            assert load.num_free_blocks + load.num_cached_blocks < NUM_BLOCKS, "a READ may still write"
            stalled.resume()
            await worker.quiet()

    asyncio.run(scenario())


@pytest.mark.parametrize("kind", [Onboard, Release, Commit, Store, Renew])
@pytest.mark.parametrize("error", [WorkerLost("gone"), CapacityError("full")])
def test_a_manager_that_fails_costs_a_request_nothing(tmp_path: Path, kind: type, error: Exception) -> None:
    async def scenario() -> None:
        async with open_rig(tmp_path, manager={"kv_manager.lease_ttl_s": "0.3"}) as (host, (worker,)):
            host.errors[kind] = error
            first = await worker.run()
            again = await worker.run()
            assert first.tokens == again.tokens
            del host.errors[kind]
            await worker.quiet()
            await worker.join()

    asyncio.run(scenario())


def test_a_cancelled_question_is_released_when_it_is_answered(tmp_path: Path) -> None:
    async def scenario() -> None:
        async with open_rig(tmp_path) as (host, (worker,)):
            await evicted_after_a_run(worker)
            gate = host.gates[Onboard] = asyncio.Event()
            num_asked = host.num_calls(Onboard)
            _, task = worker.start()
            await until(lambda: host.num_calls(Onboard) > num_asked, "the question")
            task.cancel()
            await asyncio.wait({task})
            gate.set()
            await until(lambda: host.num_calls(Release) == 1, "the release")
            await worker.quiet()

    asyncio.run(scenario())


def test_a_prompt_that_others_bring_meanwhile_gives_its_lease_back(tmp_path: Path) -> None:
    async def scenario() -> None:
        async with open_rig(tmp_path) as (host, (worker,)):
            tokens = await evicted_after_a_run(worker)
            lives = await asyncio.gather(*(worker.run() for _ in range(4)))
            assert all(life.tokens == tokens for life in lives)
            assert all(life.end.usage.cached_tokens == 3 * BLOCK_SIZE for life in lives)
            assert sum(life.end.usage.onboarded_blocks for life in lives) == 3
            await worker.quiet()

    asyncio.run(scenario())


def test_a_lease_that_is_not_renewed_counts_for_nothing(tmp_path: Path) -> None:
    async def scenario() -> None:
        async with open_rig(tmp_path, manager={"kv_manager.lease_ttl_s": "0.3"}) as (host, (worker,)):
            tokens = await evicted_after_a_run(worker)
            stalled = worker.faults.stall(worker.faults.num_reads)
            life, task = worker.start()
            await until(stalled.is_posted.is_set, "the READ")
            host.errors[Renew] = WorkerLost("cut off")
            await until(lambda: host.held()[0] == 0, "the end of the lease")
            stalled.resume()
            await task
            assert (life.tokens, life.end.usage.onboarded_blocks) == (tokens, 0)
            del host.errors[Renew]
            await worker.quiet()

    asyncio.run(scenario())


def test_a_lease_is_renewed_for_as_long_as_a_read_takes(tmp_path: Path) -> None:
    async def scenario() -> None:
        async with open_rig(tmp_path, manager={"kv_manager.lease_ttl_s": "0.3"}) as (host, (worker,)):
            tokens = await evicted_after_a_run(worker)
            stalled = worker.faults.stall(worker.faults.num_reads)
            life, task = worker.start()
            await until(stalled.is_posted.is_set, "the READ")
            num_renewals = host.num_calls(Renew)
            await until(lambda: host.num_calls(Renew) > num_renewals + 4, "renewals")
            stalled.resume()
            await task
            assert (life.tokens, life.end.usage.onboarded_blocks) == (tokens, 3)
            await worker.quiet()

    asyncio.run(scenario())


def test_the_state_is_shown_and_changes_are_told(tmp_path: Path) -> None:
    async def scenario() -> None:
        async with open_rig(tmp_path, manager={"kv_manager.lease_ttl_s": "0.1"}) as (host, (worker,)):
            assert worker.counted(KV_MANAGER_JOINED, state="joined") == 1
            assert worker.changes == ["host:1/kv"]
            await host.stop()
            await until(lambda: worker.counted(KV_MANAGER_JOINED, state="absent") == 1, "absence")
            assert worker.counted(KV_MANAGER_JOINED, state="joined") == 0
            host.start()
            await worker.join()
            assert worker.changes == ["host:1/kv", "", "host:1/kv"]
            assert host.num_calls(Await) == 0

    asyncio.run(scenario())
