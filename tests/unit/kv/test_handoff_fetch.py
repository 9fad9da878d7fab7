from __future__ import annotations

import asyncio

import pytest
from handoff_rig import EPOCH, TTL_S, UNTOUCHED, open_rig, until

from kelp.core.errors import (
    CapacityError,
    DeadlineExceeded,
    FatalTransferError,
    InvalidRequest,
    NotFound,
    WorkerLost,
)
from kelp.core.messages import Rendezvous
from kelp.core.types import BlockId
from kelp.kv.handoff import FetchPlan
from kelp.kv.handoff.lease import Lease


def test_announced_blocks_arrive_while_the_next_chunk_is_still_computed() -> None:
    async def scenario() -> None:
        async with open_rig() as rig:
            offer = rig.offer()
            fetch = rig.start_fetch(num_tokens=10)
            offer.announce(4, [BlockId(7)])
            await until(lambda: rig.arrived(3) == [7, UNTOUCHED, UNTOUCHED])
            offer.announce(10, [BlockId(2), BlockId(9)])
            await until(lambda: rig.arrived(3) == [7, 2, 9])
            assert not fetch.done() and rig.released == []
            offer.finish(42, -0.5)
            result = await fetch
            assert (result.first_token, result.first_log_prob) == (42, -0.5)
            assert result.num_transferred_blocks == 3
            assert 0 < result.transfer_start_ns <= result.transfer_done_ns
            assert (rig.local[:3] == rig.remote[[7, 2, 9]]).all()
            await rig.all_is_returned()
            assert rig.released == ["h"]

    asyncio.run(scenario())


def test_cached_blocks_are_not_fetched() -> None:
    async def scenario() -> None:
        async with open_rig() as rig:
            rig.finished_offer(num_tokens=12, block_ids=(3, 5, 6))
            result = await rig.start_fetch(num_tokens=12, num_cached=2)
            assert rig.arrived(3) == [UNTOUCHED, UNTOUCHED, 6]
            assert result.num_transferred_blocks == 1

    asyncio.run(scenario())


def test_a_fully_cached_prompt_needs_no_read_but_still_the_first_token() -> None:
    async def scenario() -> None:
        async with open_rig() as rig:
            rig.finished_offer()
            result = await rig.start_fetch(num_cached=2)
            assert (result.first_token, result.num_transferred_blocks, result.transfer_start_ns) == (42, 0, 0)
            assert rig.faults.num_reads == 0
            await rig.all_is_returned()

    asyncio.run(scenario())


def test_a_reader_may_attach_before_the_offer_exists() -> None:
    async def scenario() -> None:
        async with open_rig() as rig:
            fetch = rig.start_fetch()
            await until(lambda: rig.server.num_readers == 1)
            rig.finished_offer()
            assert (await fetch).first_token == 42

    asyncio.run(scenario())


def test_a_ticket_is_redeemed_after_the_prefill_has_finished() -> None:
    async def scenario() -> None:
        async with open_rig() as rig:
            rig.finished_offer()
            rig.prefill_clock.advance(TTL_S - 1)
            rig.server.sweep()
            assert (await rig.start_fetch()).first_token == 42
            await rig.all_is_returned()

    asyncio.run(scenario())


def test_peers_are_described_once_and_reused() -> None:
    async def scenario() -> None:
        async with open_rig() as rig:
            for _ in range(2):
                rig.finished_offer()
                await rig.start_fetch()
                await rig.all_is_returned()
            assert rig.reader.num_peers == 1

    asyncio.run(scenario())


def test_heartbeats_of_a_busy_reader_keep_the_lease_alive(monkeypatch: pytest.MonkeyPatch) -> None:
    renewals: list[float] = []
    renew = Lease.renew

    def counted(lease: Lease) -> bool:
        renewals.append(0)
        return renew(lease)

    monkeypatch.setattr(Lease, "renew", counted)

    async def scenario() -> None:
        async with open_rig(lease_ttl_s=0.2) as rig:
            stalled = rig.faults.stall(0)
            rig.finished_offer()
            fetch = rig.start_fetch()
            for _ in range(4):
                seen = len(renewals)
                await until(lambda seen=seen: len(renewals) > seen)
                rig.prefill_clock.advance(0.15)
                rig.server.sweep()
                assert rig.server.num_leases == 1
            stalled.resume()
            assert (await fetch).first_token == 42

    asyncio.run(scenario())


def test_what_arrives_after_the_lease_is_discarded() -> None:
    async def scenario() -> None:
        async with open_rig() as rig:
            stalled = rig.faults.stall(0)
            rig.finished_offer()
            fetch = rig.start_fetch()
            await until(stalled.is_posted.is_set)
            rig.decode_clock.advance(TTL_S)
            stalled.resume()
            with pytest.raises(FatalTransferError, match="lease expired"):
                await fetch

    asyncio.run(scenario())


def test_an_expired_lease_is_released_though_the_reader_still_reads() -> None:
    async def scenario() -> None:
        async with open_rig() as rig:
            stalled = rig.faults.stall(0)
            rig.finished_offer()
            fetch = rig.start_fetch()
            await until(stalled.is_posted.is_set)
            rig.prefill_clock.advance(TTL_S)
            rig.server.sweep()
            assert rig.released == ["h"] and rig.server.num_leases == 0
            await until(lambda: rig.server.num_readers == 0)
            assert not fetch.done()
            stalled.resume()
            with pytest.raises(FatalTransferError, match="expired"):
                await fetch

    asyncio.run(scenario())


def test_the_error_of_a_failed_prefill_reaches_the_reader_typed() -> None:
    async def scenario() -> None:
        async with open_rig() as rig:
            offer = rig.offer()
            fetch = rig.start_fetch()
            offer.announce(4, [BlockId(1)])
            await until(lambda: rig.arrived(1) == [1])
            offer.fail(InvalidRequest("input_ids: bad"))
            assert rig.released == ["h"]
            with pytest.raises(InvalidRequest, match="input_ids: bad"):
                await fetch
            await rig.all_is_returned()

    asyncio.run(scenario())


def test_a_prefill_that_failed_before_the_attach_is_reported_at_once() -> None:
    async def scenario() -> None:
        async with open_rig(attach_timeout_s=300.0) as rig:
            rig.offer().fail(CapacityError("queue full"))
            with pytest.raises(CapacityError, match="queue full"):
                await rig.start_fetch()

    asyncio.run(scenario())


def test_an_unknown_handoff_is_not_found() -> None:
    async def scenario() -> None:
        async with open_rig(attach_timeout_s=1.0) as rig:
            with pytest.raises(NotFound):
                await rig.start_fetch()

    asyncio.run(scenario())


def test_an_unreachable_prefill_worker_is_lost() -> None:
    async def scenario() -> None:
        async with open_rig(attach_timeout_s=0.3) as rig:
            await rig.server.stop()
            with pytest.raises(WorkerLost):
                await rig.start_fetch()

    asyncio.run(scenario())


def test_a_prefill_worker_that_stops_fails_its_readers_and_holds_nothing() -> None:
    async def scenario() -> None:
        async with open_rig() as rig:
            rig.offer().announce(4, [BlockId(1)])
            fetch = rig.start_fetch()
            await until(lambda: rig.arrived(1) == [1])
            await rig.server.stop()
            with pytest.raises(WorkerLost):
                await fetch
            assert rig.released == ["h"] and rig.server.num_leases == 0

    asyncio.run(scenario())


def test_a_passed_deadline_ends_the_fetch() -> None:
    async def scenario() -> None:
        async with open_rig() as rig:
            rig.offer()
            fetch = rig.start_fetch(deadline_s=rig.decode_clock.monotonic_s() + 0.5)
            with pytest.raises(DeadlineExceeded):
                await fetch

    asyncio.run(scenario())


def test_a_reader_serves_several_handoffs_at_once() -> None:
    async def scenario() -> None:
        async with open_rig() as rig:
            offers = [rig.offer(f"h{i}") for i in range(4)]
            fetches = [
                asyncio.create_task(
                    rig.reader.fetch(
                        Rendezvous(handoff_id=f"h{i}", endpoint=rig.endpoint, prefill_epoch=EPOCH),
                        FetchPlan((BlockId(i),), 0, 4),
                    )
                )
                for i in range(4)
            ]
            for i, offer in enumerate(offers):
                offer.announce(4, [BlockId(10 + i)])
                offer.finish(i, 0.0)
            assert [(await fetch).first_token for fetch in fetches] == [0, 1, 2, 3]
            assert rig.arrived(4) == [10, 11, 12, 13]
            assert rig.reader.num_peers == 1
            await rig.all_is_returned()
            assert sorted(rig.released) == ["h0", "h1", "h2", "h3"]

    asyncio.run(scenario())
