"""The decode side: reserved blocks are filled before they are used and go back only when nothing writes into them."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator

import pytest
from worker_rig import WorkerRig, completed, last, open_worker, reserved, token

from kelp.core.errors import (
    DeadlineExceeded,
    FatalTransferError,
    KelpError,
    NotFound,
    ProtocolError,
    RequestCancelled,
    WorkerLost,
)
from kelp.core.messages import Rendezvous
from kelp.core.types import BlockId, FinishReason, Role
from kelp.executor.base import Failed
from kelp.kv.handoff import Offer
from support.exchange import FakeExchange
from support.waiting import until


class Pair:
    """A decode worker and a prefill worker of which only the handoff side is used."""

    def __init__(self, decode: WorkerRig, prefill: WorkerRig) -> None:
        self.decode = decode
        self.prefill = prefill
        self.released: list[str] = []

    def offer(self, is_finished: bool = True) -> Offer:
        """The prompt's KV in the prefill worker's blocks 3 (33) and 5 (55); first token 7."""
        self.prefill.executor.pool[3], self.prefill.executor.pool[5] = 33, 55
        offer = self.prefill.handoffs.offer("h", lambda: self.released.append("h"))
        offer.announce(4, [BlockId(3)])
        if is_finished:
            offer.announce(8, [BlockId(5)])
            offer.finish(7, -0.5)
        return offer

    async def start(self, *blocks: int, **fields: object) -> tuple[FakeExchange, asyncio.Task[None]]:
        """A request whose prompt got `blocks`; none: still in the queue."""
        exchange, task = await self.decode.generate(Role.DECODE, self.prefill.rendezvous(), **fields)
        if blocks:
            self.decode.executor.emit(reserved(*blocks))
        return exchange, task

    def arrived(self, *blocks: int) -> list[int]:
        return [int(self.decode.executor.pool[block][0]) for block in blocks]

    async def asked(self, *names: str) -> None:
        """Wait until the executor was asked for `names`, then check that it was asked for nothing else."""
        await until(lambda: len(self.decode.executor.calls) >= len(names), f"{names}")
        assert sorted(self.decode.executor.names()) == sorted(names)


@contextlib.asynccontextmanager
async def open_pair(**handoff: float) -> AsyncIterator[Pair]:
    async with open_worker(Role.DECODE, **handoff) as decode, open_worker(Role.PREFILL) as prefill:
        yield Pair(decode, prefill)


def test_the_kv_arrives_before_decoding_goes_on_from_the_first_token() -> None:
    async def scene() -> None:
        async with open_pair() as pair:
            pair.offer()
            exchange, task = await pair.start(1, 2)
            await pair.asked("complete_import")
            assert pair.arrived(1, 2) == [33, 55]
            assert pair.decode.executor.imported == [(7, -0.5, 2)]
            pair.decode.executor.emit(token(8), completed(FinishReason.STOP))
            await task
            assert exchange.token_ids == [8], "the first token is the prefill worker's to tell"
            finished = last(exchange)
            assert (finished.finish_reason, finished.usage.transferred_blocks) == (FinishReason.STOP, 2)
            assert 0 < finished.timings.transfer_start_ns <= finished.timings.transfer_done_ns
            await until(lambda: pair.released == ["h"], "the acknowledgement")

    asyncio.run(scene())


def test_blocks_that_are_cached_here_are_not_moved() -> None:
    async def scene() -> None:
        async with open_pair() as pair:
            pair.offer()
            _, _ = await pair.start()
            pair.decode.executor.emit(reserved(1, 2, num_cached=1))
            await pair.asked("complete_import")
            assert pair.arrived(1, 2) == [0, 55]
            assert pair.decode.executor.imported == [(7, -0.5, 1)]

    asyncio.run(scene())


def test_a_decode_worker_may_come_before_the_prefill_worker_has_begun() -> None:
    async def scene() -> None:
        async with open_pair() as pair:
            await pair.start(1, 2)
            await until(lambda: pair.prefill.handoffs.num_readers == 1, "the reader")
            pair.offer()
            await pair.asked("complete_import")

    asyncio.run(scene())


def test_a_router_that_goes_before_blocks_were_reserved_needs_no_end_of_import() -> None:
    async def scene() -> None:
        async with open_pair() as pair:
            exchange, task = await pair.start()
            exchange.cancel()
            with pytest.raises(RequestCancelled):
                await task
            await pair.asked("abort")

    asyncio.run(scene())


def test_a_router_that_goes_while_kv_is_awaited_gives_the_blocks_back_once() -> None:
    async def scene() -> None:
        async with open_pair() as pair:
            pair.offer(is_finished=False)
            exchange, task = await pair.start(1, 2)
            await until(lambda: pair.arrived(1) == [33], "the first chunk")
            exchange.cancel()
            with pytest.raises(RequestCancelled):
                await task
            await pair.asked("abort", "end_import")
            assert pair.decode.reader.num_fetches == 0

    asyncio.run(scene())


def test_a_router_that_goes_while_decoding_needs_no_end_of_import() -> None:
    async def scene() -> None:
        async with open_pair() as pair:
            pair.offer()
            exchange, task = await pair.start(1, 2)
            await pair.asked("complete_import")
            pair.decode.executor.emit(token(8))
            exchange.cancel()
            with pytest.raises(RequestCancelled):
                await task
            await pair.asked("complete_import", "abort")

    asyncio.run(scene())


def test_blocks_that_a_read_still_writes_into_wait_for_the_peer_to_be_disconnected() -> None:
    async def scene() -> None:
        async with open_pair(transfer_timeout_s=0.02) as pair:
            stalled = pair.decode.faults.stall(0)
            pair.offer()
            exchange, task = await pair.start(1, 2)
            await until(stalled.is_posted.is_set, "a READ in flight")
            assert "end_import" not in pair.decode.executor.names()
            exchange.cancel()
            with pytest.raises(KelpError):
                await task
            await pair.asked("abort", "end_import")
            stalled.resume()
            assert pair.arrived(1) == [0], "a READ wrote into blocks that had been given back"

    asyncio.run(scene())


@pytest.mark.parametrize(
    ("error", "code"),
    [(WorkerLost("prefill died"), WorkerLost), (DeadlineExceeded("late"), DeadlineExceeded)],
)
def test_a_failed_prefill_fails_the_decode_side_by_the_same_name(error: KelpError, code: type[KelpError]) -> None:
    async def scene() -> None:
        async with open_pair() as pair:
            offer = pair.offer(is_finished=False)
            _, task = await pair.start(1, 2)
            offer.fail(error)
            with pytest.raises(code, match=error.text):
                await task
            await pair.asked("abort", "end_import")

    asyncio.run(scene())


def test_a_read_that_fails_gives_the_blocks_back() -> None:
    async def scene() -> None:
        async with open_pair() as pair:
            pair.decode.faults.fail(0, FatalTransferError("the peer's memory is gone"))
            pair.offer()
            _, task = await pair.start(1, 2)
            with pytest.raises(FatalTransferError, match="memory is gone"):
                await task
            await pair.asked("abort", "end_import")

    asyncio.run(scene())


def test_a_handoff_that_nobody_offers_ends_in_not_found() -> None:
    async def scene() -> None:
        async with (
            open_worker(Role.DECODE) as decode,
            open_worker(Role.PREFILL, attach_timeout_s=0.05) as prefill,
        ):
            pair = Pair(decode, prefill)
            _, task = await pair.start(1, 2)
            with pytest.raises(NotFound):
                await task
            await pair.asked("abort", "end_import")

    asyncio.run(scene())


def test_a_prefill_worker_that_restarted_is_not_believed() -> None:
    async def scene() -> None:
        async with open_pair() as pair:
            pair.offer()
            stale = Rendezvous(handoff_id="h", endpoint=pair.prefill.endpoint, prefill_epoch="an earlier one")
            _, task = await pair.decode.generate(Role.DECODE, stale)
            pair.decode.executor.emit(reserved(1, 2))
            with pytest.raises(WorkerLost, match="an earlier one was chosen"):
                await task
            await pair.asked("abort", "end_import")

    asyncio.run(scene())


def test_a_peer_that_announces_blocks_it_does_not_have_is_refused() -> None:
    async def scene() -> None:
        async with open_pair() as pair:
            offer = pair.prefill.handoffs.offer("h", lambda: None)
            offer.announce(8, [BlockId(3), BlockId(999)])
            _, task = await pair.start(1, 2)
            with pytest.raises(ProtocolError, match="999"):
                await task
            await pair.asked("abort", "end_import")

    asyncio.run(scene())


def test_the_deadline_ends_a_fetch_that_brings_nothing() -> None:
    async def scene() -> None:
        async with open_pair() as pair:
            pair.offer(is_finished=False)
            _, task = await pair.start(1, 2, remaining_ms=50.0)
            with pytest.raises(DeadlineExceeded):
                await task
            await pair.asked("abort", "end_import")

    asyncio.run(scene())


def test_an_executor_that_gives_up_while_kv_is_awaited_hears_of_the_transfers_end_exactly_once() -> None:
    async def scene() -> None:
        async with open_pair() as pair:
            offer = pair.offer(is_finished=False)
            _, task = await pair.start(1, 2)
            await until(lambda: pair.arrived(1) == [33], "the first chunk")
            pair.decode.executor.emit(Failed(WorkerLost("engine step failed")))
            offer.announce(8, [BlockId(5)])
            offer.finish(7, -0.5)
            with pytest.raises(WorkerLost, match="engine step failed"):
                await task
            await pair.asked("complete_import", "abort")

    asyncio.run(scene())


def test_stopping_a_worker_with_a_fetch_in_flight_fails_its_request_and_closes_the_engine() -> None:
    async def scene() -> None:
        async with open_pair() as pair:
            pair.offer(is_finished=False)
            _, task = await pair.start(1, 2)
            await until(lambda: pair.arrived(1) == [33], "the first chunk")
            await pair.decode.service.stop()
            with pytest.raises(WorkerLost):
                await task
            assert pair.decode.executor.is_closed
            assert pair.decode.registry.withdrawn == [("host:1/decode", "epoch")]

    asyncio.run(scene())
