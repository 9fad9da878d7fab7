"""Readers that break the protocol get a typed answer; the server and other handoffs go on."""

from __future__ import annotations

import asyncio

import grpc
import pytest
from handoff_rig import TTL_S, Rig, open_rig, until

from kelp.core.errors import CapacityError, NotFound, ProtocolError
from kelp.core.handoff_messages import Acknowledge, Attach, Heartbeat, LeaseRenewed, PrefillDone


async def serves_on(rig: Rig) -> None:
    """The server still completes a handoff."""
    offer = rig.server.offer("next", lambda: rig.released.append("next"))
    offer.finish(1, 0.0)
    raw = rig.raw_reader()
    await raw.say(Attach(handoff_id="next"))
    assert isinstance(await raw.hear(), LeaseRenewed)
    assert isinstance(await raw.hear(), PrefillDone)
    await raw.say(Acknowledge())
    await until(lambda: "next" in rig.released)


def test_a_second_reader_of_a_handoff_is_refused() -> None:
    async def scenario() -> None:
        async with open_rig() as rig:
            rig.offer()
            first, second = rig.raw_reader(), rig.raw_reader()
            await first.say(Attach(handoff_id="h"))
            await first.hear()
            await second.say(Attach(handoff_id="h"))
            assert isinstance(await second.hear_error(), ProtocolError)
            assert rig.server.num_leases == 1
            await first.say(Acknowledge())
            await rig.all_is_returned()

    asyncio.run(scenario())


def test_a_second_reader_that_waits_for_the_same_offer_is_refused() -> None:
    async def scenario() -> None:
        async with open_rig() as rig:
            first, second = rig.raw_reader(), rig.raw_reader()
            await first.say(Attach(handoff_id="h"))
            await second.say(Attach(handoff_id="h"))
            refused, _ = await asyncio.wait(
                {asyncio.create_task(first.hear()), asyncio.create_task(second.hear())},
                return_when=asyncio.FIRST_COMPLETED,
            )
            assert len(refused) == 1
            await until(lambda: rig.server.num_readers == 1)
            rig.offer()
            await until(lambda: rig.server.num_leases == 1)

    asyncio.run(scenario())


@pytest.mark.parametrize(
    "first_message",
    [b"", b"garbage", b"\x80\x04\x95", b'{"kind":"attach"}', b'{"kind":"attach","handoff_id":"h","extra":1}'],
)
def test_garbage_gets_a_typed_answer_and_the_server_serves_on(first_message: bytes) -> None:
    async def scenario() -> None:
        async with open_rig() as rig:
            raw = rig.raw_reader()
            await raw.say(first_message)
            assert isinstance(await raw.hear_error(), ProtocolError)
            await serves_on(rig)
            await rig.all_is_returned()

    asyncio.run(scenario())


@pytest.mark.parametrize("first_message", [Heartbeat(number=1), Acknowledge()])
def test_a_stream_that_does_not_start_with_attach_is_refused(first_message: Heartbeat | Acknowledge) -> None:
    async def scenario() -> None:
        async with open_rig() as rig:
            raw = rig.raw_reader()
            await raw.say(first_message)
            assert isinstance(await raw.hear_error(), ProtocolError)
            await serves_on(rig)

    asyncio.run(scenario())


@pytest.mark.parametrize("message", [Attach(handoff_id="h"), Heartbeat(number=0), b"garbage"])
def test_wrong_messages_after_attach_end_the_stream_but_not_the_lease(
    message: Attach | Heartbeat | bytes,
) -> None:
    async def scenario() -> None:
        async with open_rig() as rig:
            rig.finished_offer()
            raw = rig.raw_reader()
            await raw.say(Attach(handoff_id="h"))
            for _ in range(3):
                await raw.hear()
            await raw.say(message)
            assert isinstance(await raw.hear_error(), ProtocolError)
            assert rig.released == [] and rig.server.num_leases == 1
            rig.prefill_clock.advance(TTL_S)
            rig.server.sweep()
            await rig.all_is_returned()

    asyncio.run(scenario())


def test_an_oversized_message_is_refused_by_the_channel() -> None:
    async def scenario() -> None:
        async with open_rig() as rig:
            raw = rig.raw_reader()
            await raw.say(b"x" * 100_000)
            with pytest.raises(grpc.aio.AioRpcError) as caught:
                await raw.hear()
            assert caught.value.code() is grpc.StatusCode.RESOURCE_EXHAUSTED
            await serves_on(rig)

    asyncio.run(scenario())


def test_a_reader_that_never_says_anything_is_sent_away() -> None:
    async def scenario() -> None:
        async with open_rig(attach_timeout_s=0.05) as rig:
            assert isinstance(await rig.raw_reader().hear_error(), ProtocolError)
            await rig.all_is_returned()

    asyncio.run(scenario())


def test_an_id_that_is_never_offered_is_not_found() -> None:
    async def scenario() -> None:
        async with open_rig(attach_timeout_s=0.5) as rig:
            raw = rig.raw_reader()
            await raw.say(Attach(handoff_id="unknown"))
            assert isinstance(await raw.hear_error(), NotFound)
            await serves_on(rig)

    asyncio.run(scenario())


def test_readers_beyond_the_limit_are_refused() -> None:
    async def scenario() -> None:
        async with open_rig(max_readers=1) as rig:
            first = rig.raw_reader()
            await first.say(Attach(handoff_id="h"))
            await until(lambda: rig.server.num_readers == 1)
            second = rig.raw_reader()
            await second.say(Attach(handoff_id="h"))
            assert isinstance(await second.hear_error(), CapacityError)
            first.hang_up()
            await until(lambda: rig.server.num_readers == 0)
            await serves_on(rig)

    asyncio.run(scenario())


def test_a_handoff_that_was_acknowledged_cannot_be_read_again() -> None:
    async def scenario() -> None:
        async with open_rig() as rig:
            await serves_on(rig)
            raw = rig.raw_reader()
            await raw.say(Attach(handoff_id="next"))
            assert isinstance(await raw.hear_error(), ProtocolError)
            assert rig.released == ["next"]

    asyncio.run(scenario())
