"""A fetch lets go of its local blocks only when nothing writes into them any more."""

from __future__ import annotations

import asyncio
import threading

import pytest
from handoff_rig import UNTOUCHED, open_rig, until

from kelp.core.errors import FatalTransferError, RetryableTransferError
from kelp.kv.handoff import QuarantinedTransferError, fetch
from kelp.transport.base import Peer
from kelp.transport.local import LocalAgent


class HangingAgent(LocalAgent):
    """Disconnects only when the test allows it."""

    may_disconnect = threading.Event()

    def disconnect(self, peer: Peer) -> None:
        self.may_disconnect.wait()
        super().disconnect(peer)


def test_a_cancelled_fetch_waits_for_its_read_and_then_ends_the_lease() -> None:
    async def scenario() -> None:
        async with open_rig() as rig:
            stalled = rig.faults.stall(0)
            rig.finished_offer()
            task = rig.start_fetch()
            await until(stalled.is_posted.is_set)
            for _ in range(3):
                task.cancel()
                await asyncio.wait({task}, timeout=0.01)
                assert not task.done()
            stalled.resume()
            with pytest.raises(asyncio.CancelledError):
                await task
            await until(lambda: rig.released == ["h"])
            await rig.all_is_returned()
            assert rig.reader.num_peers == 1

    asyncio.run(scenario())


def test_a_fetch_cancelled_before_the_offer_exists_leaves_nothing_behind() -> None:
    async def scenario() -> None:
        async with open_rig() as rig:
            task = rig.start_fetch()
            await until(lambda: rig.server.num_readers == 1)
            task.cancel()
            with pytest.raises(asyncio.CancelledError):
                await task
            await rig.all_is_returned()

    asyncio.run(scenario())


def test_a_fetch_cancelled_while_connecting_leaves_nothing_behind() -> None:
    async def scenario() -> None:
        async with open_rig() as rig:
            task = rig.start_fetch()
            await asyncio.wait({task}, timeout=0)
            task.cancel()
            with pytest.raises(asyncio.CancelledError):
                await task
            await until(lambda: rig.reader.num_peers == 1)
            await rig.all_is_returned()

    asyncio.run(scenario())


def test_a_read_that_never_ends_is_given_up_and_its_late_bytes_do_not_land() -> None:
    async def scenario() -> None:
        async with open_rig(transfer_timeout_s=1.0) as rig:
            stalled = rig.faults.stall(0)
            rig.finished_offer()
            task = rig.start_fetch()
            await until(stalled.is_posted.is_set)
            rig.decode_clock.advance(1.0)
            with pytest.raises(FatalTransferError, match="transfer_timeout_s") as caught:
                await task
            assert not isinstance(caught.value, QuarantinedTransferError)
            stalled.resume()
            assert rig.arrived(2) == [UNTOUCHED, UNTOUCHED]
            await until(lambda: rig.reader.num_peers == 0)

    asyncio.run(scenario())


@pytest.mark.parametrize("is_cancelled", [False, True])
def test_blocks_of_a_read_that_cannot_be_stopped_are_quarantined(
    monkeypatch: pytest.MonkeyPatch, is_cancelled: bool
) -> None:
    monkeypatch.setattr(fetch, "_DISCONNECT_TIMEOUT_S", 0.01)
    monkeypatch.setattr(HangingAgent, "may_disconnect", threading.Event())

    async def scenario() -> None:
        async with open_rig(transfer_timeout_s=1.0, decode_agent_type=HangingAgent) as rig:
            stalled = rig.faults.stall(0)
            rig.finished_offer()
            task = rig.start_fetch()
            await until(stalled.is_posted.is_set)
            if is_cancelled:
                task.cancel()
            rig.decode_clock.advance(1.0)
            with pytest.raises(QuarantinedTransferError) as caught:
                await task
            quarantine = asyncio.create_task(caught.value.quarantine_released())
            await asyncio.wait({quarantine}, timeout=0.01)
            assert not quarantine.done()
            HangingAgent.may_disconnect.set()
            await quarantine
            stalled.resume()
            assert rig.arrived(2) == [UNTOUCHED, UNTOUCHED]

    asyncio.run(scenario())


def test_after_a_failed_read_the_next_fetch_connects_anew() -> None:
    async def scenario() -> None:
        async with open_rig() as rig:
            rig.faults.fail(0, RetryableTransferError("read: flaky"))
            rig.finished_offer()
            with pytest.raises(RetryableTransferError, match="flaky"):
                await rig.start_fetch()
            await until(lambda: rig.reader.num_peers == 0)
            rig.prefill_clock.advance(100.0)
            rig.server.sweep()
            rig.finished_offer()
            assert (await rig.start_fetch()).num_transferred_blocks == 2
            await rig.all_is_returned()
            assert rig.released == ["h", "h"]

    asyncio.run(scenario())
