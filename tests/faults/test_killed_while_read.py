"""A worker killed while the KV block manager READs from its pool: blocks of megabytes, some of which have arrived."""

from __future__ import annotations

import asyncio
import hashlib
import importlib.util
import subprocess
import sys
from pathlib import Path

import pytest

from kelp.build.kv_manager import build_kv_manager
from kelp.core.config import load_config
from kelp.core.hashing import tenant_digest
from kelp.core.kv_manager_messages import (
    Commit,
    Done,
    Join,
    Joined,
    OfferedBlock,
    PoolRecord,
    Refused,
    SpaceRecord,
    Store,
    Stored,
)
from kelp.core.metrics import Metrics
from kelp.kv.manager.parts import block_bytes_of
from kelp.kv.manager.service import KvBlockManager
from kelp.kv.manager.states import SlotState
from support.waiting import until

pytestmark = pytest.mark.skipif(
    not any(importlib.util.find_spec(name) for name in ("nixl", "nixl_cu12", "nixl_cu13")), reason="nixl is missing"
)
SPACE = SpaceRecord(
    num_layers=16, num_kv_heads=8, block_size=16, head_dim=256, dtype="float32", model_id="m", hash_version=1
)
NUM_BLOCKS = 32
NAMES = [hashlib.blake2b(b"%d" % index, digest_size=16).digest() for index in range(NUM_BLOCKS)]
_TRIES = 50


class Pool:
    """A process with blocks to READ, and what a worker says of them."""

    def __init__(self, name: str) -> None:
        self.name = name
        script = Path(__file__).with_name("kv_pool_process.py")
        arguments = [name, str(NUM_BLOCKS), str(block_bytes_of(SPACE))]
        self.process = subprocess.Popen(
            [sys.executable, str(script), *arguments], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
        )

    def store(self, store_id: int) -> Store:
        blocks = tuple(OfferedBlock(name, NAMES[i - 1] if i else b"", i, i) for i, name in enumerate(NAMES))
        return Store(self.name, "e", store_id, tenant_digest(""), 30.0, blocks)

    async def join(self, manager: KvBlockManager) -> None:
        assert self.process.stdout is not None
        line = next(line for line in self.process.stdout if line.startswith("POOL "))
        metadata, address = line.split()[1:]
        num_bytes = block_bytes_of(SPACE)
        pool = PoolRecord(bytes.fromhex(metadata), int(address), NUM_BLOCKS, num_bytes, num_bytes, "cpu")
        (joined,) = await manager.answer([Join(self.name, "e", SPACE, pool)])
        assert isinstance(joined, Joined), joined

    def close(self) -> None:
        self.process.kill()
        self.process.communicate()


def _num_arrived(manager: KvBlockManager) -> int:
    assert manager.space is not None
    arena = manager.space.host.arena
    return sum(arena.view(slot)[-1] != 0 for slot in range(NUM_BLOCKS))


async def _kill_in_the_act(manager: KvBlockManager, pool: Pool) -> None:
    """Kill it when some of its blocks have arrived and most have not; what was READ too fast for that is dropped."""
    assert manager.space is not None
    for store_id in range(_TRIES):
        for slot in range(NUM_BLOCKS):
            manager.space.host.arena.view(slot)[-1:] = b"\0"
        storing = asyncio.ensure_future(manager.answer([pool.store(store_id)]))
        while not storing.done():
            if 0 < _num_arrived(manager) < NUM_BLOCKS // 2:
                pool.process.kill()
                (result,) = await storing
                assert isinstance(result, Refused), result
                return
            await asyncio.sleep(0)
        await manager.answer([Commit(pool.name, "e", store_id, is_valid=False)])
    raise AssertionError(f"{_TRIES} READs were over before anybody saw them begin")


async def _stay_free(manager: KvBlockManager) -> None:
    assert manager.space is not None
    space = manager.space
    await until(lambda: space.host.shelf.slots.count(SlotState.FREE) == NUM_BLOCKS, "free slots", 60.0)
    assert len(space.stores) == 0
    space.host.shelf.check_integrity()


async def _have_one_killed(manager: KvBlockManager, victim: Pool, other: Pool) -> None:
    await victim.join(manager)
    await _kill_in_the_act(manager, victim)
    await _stay_free(manager)
    await other.join(manager)
    assert await manager.answer([other.store(1)]) == [Stored(NUM_BLOCKS, 0)]
    assert await manager.answer([Commit("other", "e", 1)]) == [Done(NUM_BLOCKS)]
    assert _num_arrived(manager) == NUM_BLOCKS


def test_a_worker_killed_while_its_blocks_are_read_leaves_nothing_but_free_slots(tmp_path: Path) -> None:
    settings = {
        "kv_manager.arena_folder": str(tmp_path),
        "kv_manager.host_bytes": str(NUM_BLOCKS * block_bytes_of(SPACE)),
        "kv_manager.lease_ttl_s": "1",
        "events.enabled": "false",
    }
    victim, other = Pool("victim"), Pool("other")

    async def run() -> None:
        manager = build_kv_manager(load_config(settings), "manager", Metrics())
        try:
            await _have_one_killed(manager, victim, other)
        finally:
            await manager.stop()

    try:
        asyncio.run(run())
    finally:
        victim.close()
        other.close()
