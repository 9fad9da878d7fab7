"""Leases that nobody renews: the blocks go back to the prefill worker's pool, counted."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator

import grpc
from fault_scenes import PROMPT, direct_request, used_blocks, wait_status

from kelp.core.errors import FatalTransferError, from_message
from kelp.core.handoff_messages import (
    HANDOFF_EVENT,
    Acknowledge,
    Announce,
    Attach,
    HandoffEvent,
    HandoffFailed,
    LeaseRenewed,
    PrefillDone,
)
from kelp.core.messages import Rendezvous
from kelp.core.peer_auth import PeerToken, seal
from kelp.core.types import Role
from kelp.core.wire import Message, decode_message, encode_message
from kelp.kv.handoff.wire import ATTACH, ATTACH_PROOF, proof_scope, rpc_path
from support.serving import KelpServer

NUM_BLOCKS = 3


def meeting(server: KelpServer, handoff_id: str) -> Rendezvous:
    record = server.records()["prefill"]
    return Rendezvous(handoff_id=handoff_id, endpoint=record.handoff_endpoint, prefill_epoch=record.epoch)


async def prefill(server: KelpServer, rendezvous: Rendezvous) -> None:
    """Have the prompt computed; its blocks are leased then."""
    async with direct_request(server, Role.PREFILL, rendezvous) as request:
        outputs = await request.outputs()
        assert sum(len(output.token_ids) for output in outputs) == 1
    leased = (await asyncio.to_thread(server.statuses))["prefill"]
    assert (leased.num_leases, used_blocks(leased)) == (1, NUM_BLOCKS)


async def returned(server: KelpServer) -> None:
    await asyncio.to_thread(
        wait_status,
        server,
        "the end of the lease",
        prefill=lambda status: (status.num_leases, used_blocks(status)) == (0, 0),
    )


class SilentReader:
    """A decode worker that attaches and then does only what a test tells it to."""

    def __init__(self, channel: grpc.aio.Channel) -> None:
        self._call = channel.stream_stream(rpc_path(ATTACH))()

    async def attach(self, rendezvous: Rendezvous, token: PeerToken | None) -> None:
        scope = proof_scope(rendezvous.endpoint, rendezvous.prefill_epoch)
        first = encode_message(Attach(handoff_id=rendezvous.handoff_id))
        await self._call.write(seal(token, ATTACH_PROOF, scope, first))

    async def say(self, message: Message) -> None:
        await self._call.write(encode_message(message))

    async def hear(self) -> HandoffEvent:
        return decode_message(HANDOFF_EVENT, await self._call.read(), "event")

    def hang_up(self) -> None:
        self._call.cancel()


@contextlib.asynccontextmanager
async def attached_reader(server: KelpServer, rendezvous: Rendezvous) -> AsyncIterator[SilentReader]:
    """A reader that has heard of the whole prompt."""
    async with grpc.aio.insecure_channel(rendezvous.endpoint) as channel:
        reader = SilentReader(channel)
        await reader.attach(rendezvous, server.peer_token)
        heard = [await reader.hear() for _ in range(3)]
        assert [type(event) for event in heard] == [LeaseRenewed, Announce, PrefillDone]
        assert isinstance(heard[1], Announce)
        assert (heard[1].num_tokens, len(heard[1].block_ids)) == (len(PROMPT), NUM_BLOCKS)
        yield reader


def test_a_prefill_that_no_decode_worker_comes_for_is_freed_after_its_lease(server: KelpServer) -> None:
    async def scene() -> None:
        await prefill(server, meeting(server, "nobody comes"))
        await returned(server)

    asyncio.run(scene())


def test_a_reader_that_falls_silent_loses_its_lease_and_hears_so(server: KelpServer) -> None:
    async def scene() -> None:
        rendezvous = meeting(server, "silence")
        await prefill(server, rendezvous)
        async with attached_reader(server, rendezvous) as reader:
            await returned(server)
            last = await reader.hear()
            assert isinstance(last, HandoffFailed)
            assert isinstance(from_message(last.message), FatalTransferError)

    asyncio.run(scene())


def test_a_reader_that_vanishes_is_given_its_lease_and_no_longer(server: KelpServer) -> None:
    async def scene() -> None:
        rendezvous = meeting(server, "vanished")
        await prefill(server, rendezvous)
        async with attached_reader(server, rendezvous) as reader:
            reader.hang_up()
        held = (await asyncio.to_thread(server.statuses))["prefill"]
        assert held.num_leases == 1, "a broken stream says nothing about READs that may still run"
        await returned(server)

    asyncio.run(scene())


def test_a_reader_that_acknowledges_ends_its_lease_at_once(server: KelpServer) -> None:
    async def scene() -> None:
        rendezvous = meeting(server, "done")
        await prefill(server, rendezvous)
        async with attached_reader(server, rendezvous) as reader:
            await reader.say(Acknowledge())
            await returned(server)

    asyncio.run(scene())
