"""Asking what is known of a prompt, without a lease."""

from __future__ import annotations

import asyncio

from fake_tiers import StoreMemory
from manager_rig import TENANT, Host, Worker, prompt_hashes, settled, space_of

from kelp.core.kv_manager_messages import GetStats, Match, Matched, Refused, Stats, decode_results, encode_batch
from kelp.core.metrics import KV_TIER_HITS, KV_TIER_MISSES

HASHES = prompt_hashes(6)


def test_a_match_counts_a_prompts_leading_blocks_by_tier_and_takes_nothing():
    async def scene():
        host = Host(num_slots=8, num_disk_slots=8, store=StoreMemory(2))
        async with host.manager() as manager:
            worker = Worker(manager)
            await worker.join()
            await worker.store(HASHES)
            await settled(manager)
            space = space_of(manager)
            assert space.disk is not None
            for name in HASHES[2:]:
                space.host.found_corrupt(name)
            for name in HASHES[4:]:
                space.disk.found_corrupt(name)

            asked = [Match(tuple(HASHES)), Match(tuple(HASHES), 0, TENANT), Match(tuple(HASHES[1:3]), 1), Match(())]
            answers = decode_results(await manager.handle(encode_batch([*asked, GetStats()])))
            found = [(0, 2, 2, 0), (0, 2, 2, 2), (0, 1, 1, 0), (0, 0, 0, 0)]
            assert answers[:4] == [Matched(counts) for counts in found]
            stats = answers[4]
            assert isinstance(stats, Stats)
            counted = (KV_TIER_HITS.name, KV_TIER_MISSES.name)
            assert not any(value for name, value in stats.values.items() if name.startswith(counted)), (
                "nobody used them"
            )
            assert (len(space.host.leases), space.host.shelf.slots.num_references) == (0, 0)
            assert await worker.ask(Match(tuple(prompt_hashes(2, "b")), 0, TENANT)) == Matched((0, 0, 0, 0))

    asyncio.run(scene())


def test_before_a_worker_has_joined_there_is_nothing_to_match():
    async def scene():
        async with Host().manager() as manager:
            (answer,) = await manager.answer([Match(tuple(HASHES))])
            assert isinstance(answer, Refused)
            assert "KELP_NOT_FOUND" in answer.message

    asyncio.run(scene())
