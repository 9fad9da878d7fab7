"""A handoff between workers that know the same token, and what becomes of one between others."""

from __future__ import annotations

import asyncio

import grpc
import pytest
from handoff_rig import EPOCH, open_rig, until

from kelp.core.errors import CapacityError, PeerRefused, from_message
from kelp.core.handoff_messages import Attach, HandoffFailed
from kelp.core.peer_auth import PeerToken, seal
from kelp.core.wire import encode_message
from kelp.kv.handoff.wire import ATTACH, ATTACH_PROOF, DESCRIBE, DESCRIBE_PROOF, proof_scope, rpc_path

TOKEN, OTHER = PeerToken(b"t" * 16), PeerToken(b"o" * 16)


def test_workers_that_know_the_same_token_hand_over() -> None:
    async def scenario() -> None:
        async with open_rig(tokens=(TOKEN, TOKEN)) as rig:
            rig.finished_offer()
            result = await rig.start_fetch()
            assert result.first_token == 42 and rig.arrived(2) == [3, 5]

    asyncio.run(scenario())


@pytest.mark.parametrize("tokens", [(TOKEN, OTHER), (TOKEN, None), (None, TOKEN)], ids=["other", "none", "no peer's"])
def test_workers_that_know_different_things_do_not(tokens: tuple[PeerToken | None, PeerToken | None]) -> None:
    async def scenario() -> None:
        async with open_rig(tokens=tokens) as rig:
            rig.finished_offer()
            with pytest.raises(PeerRefused, match=r"peers\.token_file"):
                await rig.start_fetch()
            assert rig.reader.num_peers == 0 and rig.server.num_leases == 1

    asyncio.run(scenario())


@pytest.mark.parametrize(
    "question",
    [
        b"",
        b"x" * 72,
        seal(OTHER, DESCRIBE_PROOF, proof_scope("e", EPOCH), b"n"),
        seal(TOKEN, DESCRIBE_PROOF, proof_scope("elsewhere:1", EPOCH), b"n"),
    ],
    ids=["nothing", "junk", "another token", "another address"],
)
def test_a_stranger_is_not_told_where_memory_is(question: bytes) -> None:
    async def scenario() -> None:
        async with open_rig(tokens=(TOKEN, TOKEN)) as rig:
            with pytest.raises(grpc.aio.AioRpcError) as caught:
                await rig.channel.unary_unary(rpc_path(DESCRIBE))(question)
            assert caught.value.code() is grpc.StatusCode.UNAUTHENTICATED

    asyncio.run(scenario())


def test_strangers_that_say_nothing_make_room_for_readers() -> None:
    async def scenario() -> None:
        async with open_rig(tokens=(TOKEN, TOKEN), max_readers=2) as rig:
            strangers = [rig.channel.stream_stream(rpc_path(ATTACH))() for _ in range(2)]
            await until(lambda: rig.server.num_readers == 2)
            rig.finished_offer()
            assert (await rig.start_fetch()).first_token == 42
            heard = [asyncio.ensure_future(stranger.read()) for stranger in strangers]
            (first,), (other,) = await asyncio.wait(heard, return_when=asyncio.FIRST_COMPLETED)
            event = HandoffFailed.model_validate_json(await first)
            assert isinstance(from_message(event.message), CapacityError)
            other.cancel()
            await asyncio.wait({other})

    asyncio.run(scenario())


@pytest.mark.parametrize("known", [None, OTHER], ids=["nothing", "another token"])
def test_a_stranger_that_has_learnt_a_handoffs_name_cannot_claim_it(known: PeerToken | None) -> None:
    async def scenario() -> None:
        async with open_rig(tokens=(TOKEN, TOKEN)) as rig:
            rig.finished_offer()
            call = rig.channel.stream_stream(rpc_path(ATTACH))()
            first = encode_message(Attach(handoff_id="h"))
            await call.write(seal(known, ATTACH_PROOF, proof_scope(rig.endpoint, EPOCH), first))
            event = HandoffFailed.model_validate_json(await call.read())
            assert isinstance(from_message(event.message), PeerRefused)
            assert (await rig.start_fetch()).first_token == 42, "it is there still for its reader"

    asyncio.run(scenario())
