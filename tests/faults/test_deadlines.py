"""A deadline that passes, in every phase: the client hears so by name, and every party lets go."""

from __future__ import annotations

import asyncio
import json

import pytest
from fault_scenes import busy_workers, direct_request, long_request, short_request, wait_queued

from kelp.core.errors import DeadlineExceeded
from kelp.core.handoff_messages import Announce
from kelp.core.types import Role
from support.llm_client import ServedError, http_error, http_post
from support.prefill_peer import PeerPool, open_prefill_peer
from support.serving import KelpServer

CODE = "DEADLINE_EXCEEDED"


def tokens_before_the_deadline(server: KelpServer, fields: dict[str, object]) -> int:
    """How many tokens came before the error."""
    num_tokens = 0
    with server.open(**fields) as call, pytest.raises(ServedError) as raised:
        for response in call:
            num_tokens += len(response.token_ids)
    assert raised.value.code == CODE
    assert "deadline_ms" in raised.value.message
    return num_tokens


def test_a_deadline_may_pass_while_the_request_is_queued(server: KelpServer) -> None:
    with busy_workers(server), server.open(**short_request(deadline_ms=1500)) as call:
        wait_queued(server)
        with pytest.raises(ServedError) as raised:
            call.answer()
        assert raised.value.code == CODE
        assert server.statuses()["decode"].num_running == 1, "the other request must not be touched"


def test_a_deadline_may_pass_while_the_prompt_computes(server: KelpServer) -> None:
    assert tokens_before_the_deadline(server, long_request(deadline_ms=500)) == 0


def test_a_deadline_may_pass_while_kv_is_transferred(server: KelpServer, peer_pool: PeerPool) -> None:
    async def scene() -> None:
        first_chunk = Announce(num_tokens=16, block_ids=(0,))
        async with (
            open_prefill_peer(peer_pool.describe(), [first_chunk], token=server.peer_token) as peer,
            direct_request(server, Role.DECODE, peer.rendezvous, remaining_ms=1000.0) as request,
        ):
            with pytest.raises(DeadlineExceeded):
                await request.outputs()
            assert peer.has_attached.is_set(), "the deadline passed before the transfer began"
            await peer.has_gone.wait()

    asyncio.run(scene())


def test_a_deadline_may_pass_while_tokens_stream(server: KelpServer) -> None:
    assert tokens_before_the_deadline(server, short_request(deadline_ms=1500)) > 0


def test_an_http_client_hears_of_a_passed_deadline(server: KelpServer) -> None:
    fields = {**short_request(deadline_ms=600), "max_tokens": 2000}
    status, body = http_post(f"{server.http_url}/v2/models/llm/generate", fields)
    assert (status, http_error(body).code) == (400, CODE)


def test_an_http_stream_hears_of_a_passed_deadline(server: KelpServer) -> None:
    fields = {**short_request(deadline_ms=1500), "stream": True}
    status, body = http_post(f"{server.http_url}/v2/models/llm/generate_stream", fields)
    last = json.loads(body.decode().strip().split("data: ")[-1])
    assert (status, ServedError(last["error"]).code) == (200, CODE)
