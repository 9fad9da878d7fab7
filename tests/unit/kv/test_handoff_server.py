from __future__ import annotations

import asyncio

import pytest
from handoff_rig import EPOCH, TTL_S, open_rig, until

from kelp.core.errors import (
    ConfigError,
    FatalTransferError,
    ProtocolError,
    WorkerLost,
)
from kelp.core.handoff_messages import (
    PEER_DESCRIPTION,
    Acknowledge,
    Announce,
    Attach,
    Heartbeat,
    LeaseRenewed,
    PrefillDone,
)
from kelp.core.types import BlockId
from kelp.core.wire import decode_message
from kelp.kv.handoff.wire import DESCRIBE, rpc_path


def test_it_describes_the_pool_it_serves() -> None:
    async def scenario() -> None:
        async with open_rig() as rig:
            raw = await rig.channel.unary_unary(rpc_path(DESCRIBE))(b"")
            description = decode_message(PEER_DESCRIPTION, raw, "description")
            assert (description.epoch, description.num_blocks) == (EPOCH, 16)
            assert description.base_address == rig.remote.ctypes.data

    asyncio.run(scenario())


def test_a_late_reader_gets_all_announcements_in_order() -> None:
    async def scenario() -> None:
        async with open_rig() as rig:
            offer = rig.offer()
            offer.announce(4, [BlockId(1)])
            raw = rig.raw_reader()
            await raw.say(Attach(handoff_id="h"))
            assert await raw.hear() == LeaseRenewed(heartbeat=0, ttl_s=TTL_S)
            assert await raw.hear() == Announce(num_tokens=4, block_ids=(1,))
            offer.announce(8, [BlockId(2)])
            assert await raw.hear() == Announce(num_tokens=8, block_ids=(2,))
            offer.finish(7, -1.0)
            assert await raw.hear() == PrefillDone(first_token=7, first_log_prob=-1.0)
            await raw.say(Acknowledge())
            await until(lambda: rig.released == ["h"])
            await rig.all_is_returned()

    asyncio.run(scenario())


def test_an_offer_without_a_reader_outlives_the_ttl_only_while_the_prefill_runs() -> None:
    async def scenario() -> None:
        async with open_rig() as rig:
            offer = rig.offer()
            rig.prefill_clock.advance(100 * TTL_S)
            rig.server.sweep()
            assert rig.server.num_leases == 1
            offer.finish(1, 0.0)
            rig.prefill_clock.advance(TTL_S - 0.1)
            rig.server.sweep()
            assert rig.server.num_leases == 1
            rig.prefill_clock.advance(0.1)
            rig.server.sweep()
            assert rig.server.num_leases == 0 and rig.released == ["h"]

    asyncio.run(scenario())


def test_the_server_sweeps_by_itself() -> None:
    async def scenario() -> None:
        async with open_rig(lease_ttl_s=0.2) as rig:
            rig.offer().finish(1, 0.0)
            rig.prefill_clock.advance(0.2)
            await until(lambda: rig.released == ["h"])

    asyncio.run(scenario())


def test_every_heartbeat_is_answered_and_extends_the_lease() -> None:
    async def scenario() -> None:
        async with open_rig() as rig:
            rig.offer()
            raw = rig.raw_reader()
            await raw.say(Attach(handoff_id="h"))
            assert await raw.hear() == LeaseRenewed(heartbeat=0, ttl_s=TTL_S)
            for number in (1, 2, 3):
                rig.prefill_clock.advance(TTL_S - 0.1)
                rig.server.sweep()
                await raw.say(Heartbeat(number=number))
                assert await raw.hear() == LeaseRenewed(heartbeat=number, ttl_s=TTL_S)
            assert rig.server.num_leases == 1

    asyncio.run(scenario())


def test_a_reader_that_falls_silent_loses_the_lease_even_during_the_prefill() -> None:
    async def scenario() -> None:
        async with open_rig() as rig:
            offer = rig.offer()
            raw = rig.raw_reader()
            await raw.say(Attach(handoff_id="h"))
            await raw.hear()
            rig.prefill_clock.advance(TTL_S)
            rig.server.sweep()
            assert rig.released == ["h"] and not offer.is_live
            assert isinstance(await raw.hear_error(), FatalTransferError)
            offer.announce(4, [BlockId(1)])
            offer.finish(1, 0.0)
            assert rig.released == ["h"]

    asyncio.run(scenario())


def test_a_broken_stream_holds_the_blocks_until_the_ttl_has_run_out() -> None:
    async def scenario() -> None:
        async with open_rig() as rig:
            rig.finished_offer()
            raw = rig.raw_reader()
            await raw.say(Attach(handoff_id="h"))
            await raw.hear()
            raw.hang_up()
            await until(lambda: rig.server.num_readers == 0)
            rig.prefill_clock.advance(TTL_S - 0.1)
            rig.server.sweep()
            assert rig.released == []
            rig.prefill_clock.advance(0.1)
            rig.server.sweep()
            assert rig.released == ["h"]

    asyncio.run(scenario())


def test_an_id_in_use_cannot_be_offered_again() -> None:
    async def scenario() -> None:
        async with open_rig() as rig:
            rig.offer()
            with pytest.raises(ProtocolError, match="in use"):
                rig.offer()
            assert rig.server.num_leases == 1

    asyncio.run(scenario())


def test_a_finished_handoff_that_a_reader_holds_is_not_revoked() -> None:
    async def scenario() -> None:
        async with open_rig() as rig:
            offer = rig.finished_offer()
            raw = rig.raw_reader()
            await raw.say(Attach(handoff_id="h"))
            await raw.hear()
            offer.fail(WorkerLost("cancelled"))
            assert rig.released == []
            await raw.say(Acknowledge())
            await until(lambda: rig.released == ["h"])

    asyncio.run(scenario())


def test_a_finished_handoff_that_nobody_holds_can_be_revoked() -> None:
    async def scenario() -> None:
        async with open_rig() as rig:
            rig.finished_offer().fail(WorkerLost("cancelled"))
            assert rig.released == ["h"] and rig.server.num_leases == 0

    asyncio.run(scenario())


def test_stopping_releases_everything_once() -> None:
    async def scenario() -> None:
        async with open_rig() as rig:
            offer = rig.offer()
            raw = rig.raw_reader()
            await raw.say(Attach(handoff_id="h"))
            await raw.hear()
            await rig.server.stop()
            await rig.server.stop()
            offer.fail(WorkerLost("late"))
            assert rig.released == ["h"] and rig.server.num_leases == 0
            await until(lambda: rig.server.num_readers == 0)

    asyncio.run(scenario())


def test_an_address_that_cannot_be_bound_is_a_configuration_error() -> None:
    async def scenario() -> None:
        async with open_rig() as rig:
            host, _, port = rig.endpoint.partition(":")
            async with open_rig() as other:
                await other.server.stop()
                with pytest.raises(ConfigError, match=port):
                    await other.server.start(host, int(port))

    asyncio.run(scenario())
