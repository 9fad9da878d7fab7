"""The decode side: reserved blocks are filled before they are used and go back only when nothing writes into them."""

from __future__ import annotations

import asyncio
import threading

import pytest
from decode_rig import Pair, open_pair
from worker_rig import completed, last, open_worker, reserved, token

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
from support.waiting import until


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


def test_a_router_that_goes_before_blocks_were_seen_to_be_reserved_ends_the_import_all_the_same() -> None:
    async def scene() -> None:
        async with open_pair() as pair:
            exchange, task = await pair.start()
            exchange.cancel()
            with pytest.raises(RequestCancelled):
                await task
            await pair.asked("abort", "end_import")
            assert pair.decode.executor.names() == ["abort", "end_import"], "the executor may have reserved meanwhile"

    asyncio.run(scene())


def test_a_request_that_is_cancelled_again_while_its_reads_are_stopped_gives_its_blocks_back() -> None:
    async def scene() -> None:
        async with open_pair() as pair:
            stalled = pair.decode.faults.stall(0)
            pair.offer()
            _, task = await pair.start(1, 2)
            await until(stalled.is_posted.is_set, "a READ in flight")
            for _ in range(3):
                task.cancel()
                await asyncio.sleep(0.01)
            assert "end_import" not in pair.decode.executor.names(), "given back while a READ may write"
            stalled.resume()
            await pair.asked("abort", "end_import")
            await asyncio.gather(task, return_exceptions=True)

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


def test_blocks_stay_out_of_use_as_long_as_a_peer_cannot_be_disconnected(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("kelp.kv.handoff.fetch._DISCONNECT_TIMEOUT_S", 0.01)

    async def scene() -> None:
        async with open_pair(transfer_timeout_s=0.02) as pair:
            is_stuck, disconnect = threading.Event(), pair.decode.agent.disconnect
            monkeypatch.setattr(pair.decode.agent, "disconnect", lambda peer: (is_stuck.wait(10.0), disconnect(peer)))
            pair.decode.faults.stall(0)
            pair.offer()
            _, task = await pair.start(1, 2)
            with pytest.raises(KelpError, match="cannot be stopped"):
                await task
            await asyncio.sleep(0.02)
            assert pair.decode.executor.names() == ["abort"], "given back while a READ may still write"
            is_stuck.set()
            await pair.asked("abort", "end_import")

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
