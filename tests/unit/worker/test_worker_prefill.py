"""The prefill side: chunks are announced, blocks held under a lease, and given back exactly once."""

from __future__ import annotations

import asyncio

import pytest
from worker_rig import PROMPT, WorkerRig, completed, last, open_worker, prefilled, token

from kelp.core.errors import InternalError, InvalidRequest, ProtocolError, RequestCancelled, WorkerLost
from kelp.core.types import BlockId, FinishReason, Role
from kelp.executor.base import Failed
from kelp.kv.handoff import FetchPlan, FetchResult
from support.exchange import FakeExchange
from support.waiting import until

NUM_BLOCKS = 2


async def start(rig: WorkerRig, handoff_id: str = "h") -> tuple[FakeExchange, asyncio.Task[None]]:
    return await rig.generate(Role.PREFILL, rig.rendezvous(handoff_id))


def finish(rig: WorkerRig, number: int = -1) -> None:
    """Prefill in one chunk, first token 7."""
    rig.executor.emit(prefilled(len(PROMPT), 3, 5), token(7), completed(None), number=number)


async def fetch(rig: WorkerRig, reader: WorkerRig, handoff_id: str = "h") -> FetchResult:
    """What a decode worker does."""
    plan = FetchPlan(tuple(map(BlockId, range(NUM_BLOCKS))), 0, len(PROMPT))
    return await reader.reader.fetch(rig.rendezvous(handoff_id), plan)


async def released(rig: WorkerRig, number: int = 0) -> None:
    await until(lambda: ("release_export", number) in rig.executor.calls, "release of the blocks")
    assert rig.executor.calls.count(("release_export", number)) == 1
    assert rig.handoffs.num_leases == 0


def test_the_first_token_and_a_ticket_go_to_the_router_and_the_kv_waits_for_its_reader() -> None:
    async def scene() -> None:
        async with open_worker(Role.PREFILL) as rig, open_worker() as reader:
            exchange, task = await start(rig)
            rig.executor.pool[3], rig.executor.pool[5] = 33, 55
            finish(rig)
            await task
            assert exchange.token_ids == [7]
            finished = last(exchange)
            assert (finished.finish_reason, finished.rendezvous) == (None, rig.rendezvous())
            assert (await rig.status()).num_leases == 1
            assert rig.executor.calls == []
            fetched = await fetch(rig, reader)
            assert (fetched.first_token, fetched.first_log_prob, fetched.num_transferred_blocks) == (7, -0.5, 2)
            assert [int(row[0]) for row in reader.executor.pool[:2]] == [33, 55]
            await released(rig)

    asyncio.run(scene())


def test_chunks_are_readable_while_the_next_one_computes() -> None:
    async def scene() -> None:
        async with open_worker(Role.PREFILL) as rig, open_worker() as reader:
            _, task = await start(rig)
            fetching = asyncio.ensure_future(fetch(rig, reader))
            rig.executor.pool[3] = 33
            rig.executor.emit(prefilled(4, 3))
            await until(lambda: int(reader.executor.pool[0][0]) == 33, "arrival of the first chunk")
            assert not fetching.done()
            rig.executor.emit(prefilled(8, 5), token(7), completed(None))
            await task
            assert (await fetching).num_transferred_blocks == 2
            await released(rig)

    asyncio.run(scene())


def test_a_sequence_that_ends_with_its_first_token_frees_its_blocks_at_once() -> None:
    async def scene() -> None:
        async with open_worker(Role.PREFILL) as rig, open_worker() as reader:
            exchange, task = await start(rig)
            fetching = asyncio.ensure_future(fetch(rig, reader))
            rig.executor.emit(prefilled(8, 3, 5), token(7), completed(FinishReason.STOP))
            await task
            finished = last(exchange)
            assert (finished.finish_reason, finished.rendezvous) == (FinishReason.STOP, None)
            await released(rig)
            with pytest.raises(RequestCancelled, match="ended with its first token"):
                await fetching

    asyncio.run(scene())


def test_a_router_that_goes_while_the_prompt_computes_frees_everything_and_tells_the_reader() -> None:
    async def scene() -> None:
        async with open_worker(Role.PREFILL) as rig, open_worker() as reader:
            exchange, task = await start(rig)
            fetching = asyncio.ensure_future(fetch(rig, reader))
            rig.executor.emit(prefilled(4, 3))
            exchange.cancel()
            with pytest.raises(RequestCancelled):
                await task
            assert "abort" in rig.executor.names()
            await released(rig)
            with pytest.raises(RequestCancelled, match="the prefill was cancelled"):
                await fetching

    asyncio.run(scene())


def test_a_prefill_that_the_executor_gives_up_frees_its_blocks_and_tells_the_reader_why() -> None:
    async def scene() -> None:
        async with open_worker(Role.PREFILL) as rig, open_worker() as reader:
            _, task = await start(rig)
            fetching = asyncio.ensure_future(fetch(rig, reader))
            rig.executor.emit(prefilled(4, 3), Failed(WorkerLost("out of memory")))
            with pytest.raises(WorkerLost, match="out of memory"):
                await task
            await released(rig)
            with pytest.raises(WorkerLost, match="out of memory"):
                await fetching

    asyncio.run(scene())


def test_a_prompt_that_the_executor_refuses_leaves_no_offer() -> None:
    async def scene() -> None:
        async with open_worker(Role.PREFILL) as rig:
            rig.executor.refusal = InvalidRequest("input_ids: 5000 is outside of the vocabulary")
            _, task = await start(rig)
            with pytest.raises(InvalidRequest):
                await task
            assert rig.handoffs.num_leases == 0

    asyncio.run(scene())


def test_an_executor_that_completes_without_a_first_token_is_caught() -> None:
    async def scene() -> None:
        async with open_worker(Role.PREFILL) as rig:
            _, task = await start(rig)
            rig.executor.emit(prefilled(8, 3, 5), completed(None))
            with pytest.raises(InternalError, match="without a first token"):
                await task
            await released(rig)

    asyncio.run(scene())


def test_a_handoff_id_is_used_by_one_request_at_a_time() -> None:
    async def scene() -> None:
        async with open_worker(Role.PREFILL) as rig:
            _, first = await start(rig)
            _, second = await start(rig)
            with pytest.raises(ProtocolError, match="in use"):
                await second
            assert len(rig.executor.requests) == 1 and not first.done()
            assert rig.handoffs.num_leases == 1, "the first one's lease must stay"

    asyncio.run(scene())


def test_a_prefill_that_nobody_reads_is_freed_when_its_lease_runs_out() -> None:
    async def scene() -> None:
        async with open_worker(Role.PREFILL, lease_ttl_s=0.05) as rig:
            _, task = await start(rig)
            finish(rig)
            await task
            await released(rig)

    asyncio.run(scene())


def test_many_requests_that_end_in_every_way_leave_nothing() -> None:
    async def scene() -> None:
        async with open_worker(Role.PREFILL, lease_ttl_s=0.05) as rig, open_worker() as reader:
            endings = ["read", "silent", "cancelled", "failed", "ended"] * 2
            for number, ending in enumerate(endings):
                exchange, task = await start(rig, f"h{number}")
                rig.executor.emit(prefilled(8, 3, 5), number=number)
                if ending == "cancelled":
                    exchange.cancel()
                elif ending == "failed":
                    rig.executor.emit(Failed(WorkerLost("gone")), number=number)
                else:
                    reason = FinishReason.LENGTH if ending == "ended" else None
                    rig.executor.emit(token(7), completed(reason), number=number)
                await asyncio.gather(task, return_exceptions=True)
                if ending == "read":
                    await fetch(rig, reader, f"h{number}")
            await until(lambda: rig.handoffs.num_leases == 0, "end of all leases")
            for number in range(len(endings)):
                await released(rig, number)

    asyncio.run(scene())


def test_stopping_the_worker_tells_the_reader_and_the_router() -> None:
    async def scene() -> None:
        async with open_worker(Role.PREFILL) as rig, open_worker() as reader:
            _, task = await start(rig)
            fetching = asyncio.ensure_future(fetch(rig, reader))
            await until(lambda: rig.handoffs.num_readers == 1, "the reader")
            await rig.service.stop()
            with pytest.raises(WorkerLost, match="is stopping"):
                await task
            with pytest.raises(WorkerLost, match="the prefill worker stops"):
                await fetching
            assert rig.executor.is_closed and rig.handoffs.num_leases == 0

    asyncio.run(scene())


def test_stopping_the_worker_ends_the_leases_that_nobody_reads() -> None:
    async def scene() -> None:
        async with open_worker(Role.PREFILL) as rig:
            _, task = await start(rig)
            finish(rig)
            await task
            await rig.service.stop()
            await released(rig)

    asyncio.run(scene())
