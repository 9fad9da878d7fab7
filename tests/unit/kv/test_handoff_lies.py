"""What a peer claims about itself and its blocks is checked before anything is read."""

from __future__ import annotations

import asyncio
import dataclasses

import pytest
from handoff_rig import LAYOUT, open_rig

from kelp.core.errors import ProtocolError, WorkerLost
from kelp.core.types import BlockId


@pytest.mark.parametrize(
    ("num_tokens", "block_ids", "complaint"),
    [
        (8, (3, 999), "block id 999"),
        (8, (3, 4, 5), "3 block_ids exceed"),
        (9, (3, 4), "num_tokens 9"),
        (8, (3,), "1 blocks were announced, the prompt has 2"),
    ],
)
def test_a_peer_that_lies_about_its_blocks_is_refused(
    num_tokens: int, block_ids: tuple[int, ...], complaint: str
) -> None:
    async def scenario() -> None:
        async with open_rig() as rig:
            rig.finished_offer(num_tokens, block_ids)
            with pytest.raises(ProtocolError, match=complaint):
                await rig.start_fetch()
            await rig.all_is_returned()

    asyncio.run(scenario())


def test_announcements_that_go_backwards_are_refused() -> None:
    async def scenario() -> None:
        async with open_rig() as rig:
            offer = rig.offer()
            offer.announce(8, [BlockId(1)])
            offer.announce(4, [])
            with pytest.raises(ProtocolError, match="num_tokens 4"):
                await rig.start_fetch()

    asyncio.run(scenario())


def test_another_incarnation_of_the_prefill_worker_is_refused() -> None:
    async def scenario() -> None:
        async with open_rig() as rig:
            with pytest.raises(WorkerLost, match="epoch"):
                await rig.start_fetch(epoch="epoch-0")
            assert rig.reader.num_peers == 0

    asyncio.run(scenario())


@pytest.mark.parametrize("field", ["num_layers", "num_kv_heads", "block_size", "head_dim", "dtype", "model_id"])
def test_an_incompatible_pool_is_refused_by_the_name_of_the_field(field: str) -> None:
    changed = {"dtype": "float16", "model_id": "other"}.get(field, 8)
    layout = dataclasses.replace(LAYOUT, **{field: changed})

    async def scenario() -> None:
        async with open_rig(prefill_layout=layout) as rig:
            with pytest.raises(ProtocolError, match=field):
                await rig.start_fetch()

    asyncio.run(scenario())
