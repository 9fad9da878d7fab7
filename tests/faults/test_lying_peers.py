"""Peers that talk nonsense: a typed error for the request that met them, and nothing for anybody else."""

from __future__ import annotations

import asyncio
import os
import socket
from collections.abc import Callable

import grpc
import pytest
from fault_scenes import PROMPT, QUESTION, direct_request

from kelp.core.errors import KelpError, NotFound, ProtocolError, WorkerLost, from_message
from kelp.core.handoff_messages import (
    HANDOFF_EVENT,
    Announce,
    HandoffFailed,
    LeaseRenewed,
    PeerDescription,
    PrefillDone,
)
from kelp.core.messages import Rendezvous
from kelp.core.peer_auth import seal
from kelp.core.types import Role
from kelp.core.wire import Message, decode_message
from kelp.kv.handoff.wire import ATTACH, ATTACH_PROOF, proof_scope, rpc_path
from support.prefill_peer import EPOCH, HANDOFF_ID, PeerPool, open_prefill_peer
from support.serving import KelpServer

NUM_TOKENS = len(PROMPT)
Describe = Callable[[PeerPool], PeerDescription | bytes]

LYING_DESCRIPTIONS: dict[str, tuple[Describe, type[KelpError], str]] = {
    "no description": (lambda pool: b"garbage", ProtocolError, "description of .*: Invalid JSON"),
    "a field too many": (lambda pool: b'{"surprise": 1}', ProtocolError, "description of .*: worker"),
    "metadata of no agent": (
        lambda pool: pool.describe(agent_metadata_hex=os.urandom(600).hex()),
        ProtocolError,
        "connect: the metadata",
    ),
    "damaged metadata": (
        lambda pool: pool.describe(agent_metadata_hex=pool.agent.metadata()[:-40].hex()),
        ProtocolError,
        "connect: the metadata is damaged",
    ),
    "another type": (lambda pool: pool.describe(dtype="bfloat16"), ProtocolError, "dtype is 'bfloat16'"),
    "other blocks": (lambda pool: pool.describe(block_size=8), ProtocolError, "block_size is 8"),
    "another model": (lambda pool: pool.describe(model_id="its own"), ProtocolError, "model_id is 'its own'"),
    "another device": (lambda pool: pool.describe(device="cuda:0"), ProtocolError, "connect: "),
    "memory that is not its own": (lambda pool: pool.describe(base_address=4096), ProtocolError, "connect: "),
    "a larger pool than it has": (lambda pool: pool.describe(num_blocks=64), ProtocolError, "connect: "),
    "another incarnation": (lambda pool: pool.describe(epoch="a later one"), WorkerLost, "a later one answers"),
}
LYING_SCRIPTS: dict[str, tuple[list[Message | bytes], type[KelpError], str]] = {
    "no event": ([b"\xff\x00"], ProtocolError, "handoff event of .*: Invalid JSON"),
    "blocks beyond its pool": (
        [Announce(num_tokens=NUM_TOKENS, block_ids=(0, 1, 99))],
        ProtocolError,
        "block id 99 is outside the pool of 4 blocks",
    ),
    "more blocks than tokens": (
        [Announce(num_tokens=16, block_ids=(0, 1, 2))],
        ProtocolError,
        "3 block_ids exceed the 1 of num_tokens 16",
    ),
    "more tokens than the prompt": (
        [Announce(num_tokens=4000, block_ids=(0,))],
        ProtocolError,
        "num_tokens 4000 is outside of 0 to 40",
    ),
    "done before all is announced": (
        [PrefillDone(first_token=5, first_log_prob=-1.0)],
        ProtocolError,
        "0 blocks were announced, the prompt has 3",
    ),
    "a token outside the vocabulary": (
        [Announce(num_tokens=NUM_TOKENS, block_ids=(0, 1, 2)), PrefillDone(first_token=2**30, first_log_prob=-1.0)],
        ProtocolError,
        "first_token: 1073741824 is outside the vocabulary",
    ),
    "an answer to nothing": ([LeaseRenewed(heartbeat=77, ttl_s=5.0)], ProtocolError, "77 .* not outstanding"),
    "a failure of its own": ([HandoffFailed(message="[KELP_NOT_FOUND] no such")], NotFound, "no such"),
    "a failure without a name": ([HandoffFailed(message="it broke")], WorkerLost, "it broke"),
}


@pytest.mark.parametrize("lie", LYING_DESCRIPTIONS)
def test_a_peer_that_lies_about_itself_is_refused_by_name(server: KelpServer, peer_pool: PeerPool, lie: str) -> None:
    describe, error, text = LYING_DESCRIPTIONS[lie]

    async def scene() -> None:
        async with (
            open_prefill_peer(describe(peer_pool), token=server.peer_token) as peer,
            direct_request(server, Role.DECODE, peer.rendezvous) as request,
        ):
            with pytest.raises(error, match=text):
                await request.outputs()

    asyncio.run(scene())


@pytest.mark.parametrize("lie", LYING_SCRIPTS)
def test_a_peer_that_lies_about_a_handoff_is_refused_by_name(server: KelpServer, peer_pool: PeerPool, lie: str) -> None:
    script, error, text = LYING_SCRIPTS[lie]

    async def scene() -> None:
        async with (
            open_prefill_peer(peer_pool.describe(), script, token=server.peer_token) as peer,
            direct_request(server, Role.DECODE, peer.rendezvous) as request,
        ):
            with pytest.raises(error, match=text):
                await request.outputs()

    asyncio.run(scene())


def test_an_honest_peer_is_served(server: KelpServer, peer_pool: PeerPool) -> None:
    async def scene() -> None:
        script = [
            Announce(num_tokens=NUM_TOKENS, block_ids=(2, 0, 3)),
            PrefillDone(first_token=5, first_log_prob=-1.0),
        ]
        async with (
            open_prefill_peer(peer_pool.describe(), script, token=server.peer_token) as peer,
            direct_request(server, Role.DECODE, peer.rendezvous) as request,
        ):
            outputs = await request.outputs()
            assert sum(len(output.token_ids) for output in outputs) == 7, "all but the peer's first token"
            await peer.has_gone.wait()
            assert peer.is_acknowledged

    asyncio.run(scene())


def test_a_peer_that_is_not_there_is_a_lost_worker(server: KelpServer) -> None:
    with socket.socket() as nobody:
        nobody.bind(("127.0.0.1", 0))
        endpoint = f"127.0.0.1:{nobody.getsockname()[1]}"

        async def scene() -> None:
            rendezvous = Rendezvous(handoff_id=HANDOFF_ID, endpoint=endpoint, prefill_epoch=EPOCH)
            async with direct_request(server, Role.DECODE, rendezvous) as request:
                with pytest.raises(WorkerLost):
                    await request.outputs()

        asyncio.run(scene())


def handoff_address(server: KelpServer) -> tuple[str, int]:
    host, _, port = server.records()["prefill"].handoff_endpoint.rpartition(":")
    return host, int(port)


@pytest.mark.parametrize(
    "garbage",
    [
        b"",
        b"\x00" * 4096,
        os.urandom(4096),
        b"GET / HTTP/1.1\r\n\r\n",
        b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n" + b"\xff" * 999,
    ],
    ids=["nothing", "zeros", "noise", "HTTP/1", "broken HTTP/2"],
)
def test_garbage_on_the_handoff_port_disturbs_nobody(server: KelpServer, garbage: bytes) -> None:
    with socket.create_connection(handoff_address(server), timeout=10.0) as connection:
        connection.sendall(garbage)
        connection.shutdown(socket.SHUT_WR)
        while connection.recv(65536):
            pass
    assert server.ask(**QUESTION).last.worker_ids[0].endswith("/prefill"), "the handoff service still serves"


@pytest.mark.parametrize(
    "command",
    [b"garbage", b'{"kind": "heartbeat", "number": 1}', b'{"kind": "attach"}'],
    ids=["no JSON", "no attach first", "no handoff id"],
)
def test_garbage_in_a_handoff_stream_is_answered_by_name(server: KelpServer, command: bytes) -> None:
    async def scene() -> None:
        endpoint = "{}:{}".format(*handoff_address(server))
        async with grpc.aio.insecure_channel(endpoint) as channel:
            call = channel.stream_stream(rpc_path(ATTACH))()
            scope = proof_scope(endpoint, server.records()["prefill"].epoch)
            await call.write(seal(server.peer_token, ATTACH_PROOF, scope, command))
            event = decode_message(HANDOFF_EVENT, await call.read(), "event")
            assert isinstance(event, HandoffFailed)
            assert isinstance(from_message(event.message), ProtocolError)

    asyncio.run(scene())
