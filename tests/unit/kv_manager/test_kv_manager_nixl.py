"""The manager as it runs in production: another process, NIXL, an arena in shared memory, and SIGKILL."""

from __future__ import annotations

import importlib.util
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
from manager_rig import TENANT, prompt_hashes

from kelp.core.config_kv import default_arena_folder
from kelp.core.hashing import tenant_digest
from kelp.core.kv_manager_messages import (
    Await,
    Commit,
    Done,
    GetStats,
    Join,
    Joined,
    Leased,
    OfferedBlock,
    Onboard,
    PoolRecord,
    Release,
    SpaceRecord,
    Store,
    Stored,
    decode_results,
    encode_batch,
)
from kelp.core.types import BlockId, Tier
from kelp.kv.tiers.clears import ClearJournal, OwedClear
from kelp.kv.tiers.records import checksum
from kelp.transport import open_agent
from kelp.transport.base import Region, TransferState
from support.waiting import wait_until

pytestmark = [
    pytest.mark.nixl,
    pytest.mark.skipif(
        not any(importlib.util.find_spec(name) for name in ("nixl", "nixl_cu12", "nixl_cu13")),
        reason="the nixl wheel is not installed",
    ),
]
SPACE = SpaceRecord(
    num_layers=2, num_kv_heads=2, block_size=16, head_dim=64, dtype="bfloat16", model_id="m", hash_version=1
)
BLOCK_BYTES = 2 * 2 * 2 * 16 * 64 * 2
NUM_BLOCKS = 24
HASHES = prompt_hashes(NUM_BLOCKS)
OTHER_TENANT = tenant_digest("other")
OTHERS = prompt_hashes(1, "other")


class ManagerProcess:
    """Started, asked batch by batch, stopped or killed."""

    def __init__(self, folder: Path, disk: Path) -> None:
        script = Path(__file__).with_name("kv_manager_process.py")
        settings = {
            "kv_manager.arena_folder": folder,
            "kv_manager.host_bytes": 32 * 16384,
            "disk_tier.path": disk,
            "disk_tier.max_bytes": 64 * 16384 * 2,
            "events.enabled": "false",
        }
        self._process = subprocess.Popen(
            [sys.executable, str(script), *(f"{key}={value}" for key, value in settings.items())],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
        self._hear("READY")

    def _hear(self, prefix: str) -> str:
        assert self._process.stdout is not None
        return next(line for line in self._process.stdout if line.startswith(prefix))

    def ask(self, operation):
        assert self._process.stdin is not None
        self._process.stdin.write(encode_batch([operation]).hex() + "\n")
        self._process.stdin.flush()
        (result,) = decode_results(bytes.fromhex(self._hear("RESULT ").split()[1]))
        return result

    def num_on_disk(self) -> float:
        return self.ask(GetStats()).values.get('kelp_kv_tier_blocks{state="resident",tier="disk"}', 0)

    def end(self) -> int:
        self._process.communicate("\n")
        return self._process.returncode

    def kill(self) -> None:
        self._process.kill()
        self._process.communicate()


class NixlWorker:
    """A pool of a worker, filled at random or empty."""

    def __init__(self, name: str, seed: int | None) -> None:
        self.name = name
        shape = (NUM_BLOCKS, BLOCK_BYTES)
        self.pool = np.zeros(shape, np.uint8)
        if seed is not None:
            self.pool[:] = np.random.default_rng(seed).integers(0, 256, shape, np.uint8)
        self.agent = open_agent("nixl", name)
        self.agent.register(Region(self.pool.ctypes.data, NUM_BLOCKS, BLOCK_BYTES, "cpu"), self.pool)

    def join(self, manager: ManagerProcess) -> Joined:
        address = self.pool.ctypes.data
        pool = PoolRecord(self.agent.metadata(), address, NUM_BLOCKS, BLOCK_BYTES, BLOCK_BYTES, "cpu")
        joined = manager.ask(Join(self.name, "e", SPACE, pool))
        assert isinstance(joined, Joined), joined
        return joined

    def onboard(self, manager: ManagerProcess, lease_id: int) -> Leased:
        """Lease everything, READ it, verify it, release it."""
        pool = self.join(manager).pool
        leased = manager.ask(Onboard(self.name, "e", lease_id, TENANT, tuple(HASHES), 0, 0.0, 30.0))
        assert isinstance(leased, Leased), leased
        ready = list(leased.ready)
        while len(ready) < leased.num_blocks:
            leased = manager.ask(Await(self.name, "e", lease_id, len(ready)))
            ready += leased.ready
        region = Region(pool.base_address, pool.num_blocks, pool.block_bytes, pool.device, pool.stride_bytes)
        peer = self.agent.connect(pool.agent_metadata, region)
        targets = [BlockId(index) for index in range(len(ready))]
        if targets:
            transfer = self.agent.start_read(peer, [BlockId(ref.slot) for ref in ready], targets)
            deadline_s = time.monotonic() + 10
            while transfer.poll() is not TransferState.DONE:
                assert time.monotonic() < deadline_s
            transfer.release()
        self.agent.disconnect(peer)
        for target, ref in zip(targets, ready, strict=True):
            assert checksum(self.pool[target].tobytes(), HASHES[target]) == ref.checksum
        manager.ask(Release(self.name, "e", (lease_id,)))
        return leased


def test_blocks_survive_the_manager_and_reach_another_worker_byte_for_byte(tmp_path: Path) -> None:
    folder, disk = default_arena_folder() / f"test-{tmp_path.name}-{tmp_path.parent.name}", tmp_path / "disk"
    first, second = NixlWorker("first", seed=1), NixlWorker("second", seed=None)
    manager = ManagerProcess(folder, disk)
    try:
        first.join(manager)
        blocks = tuple(OfferedBlock(name, HASHES[i - 1] if i else b"", i, i) for i, name in enumerate(HASHES))
        assert manager.ask(Store("first", "e", 1, TENANT, 20.0, blocks)) == Stored(NUM_BLOCKS, 0)
        assert manager.ask(Commit("first", "e", 1)) == Done(NUM_BLOCKS)
        assert second.onboard(manager, 1).num_blocks == NUM_BLOCKS
        assert np.array_equal(second.pool, first.pool)
        theirs = tuple(OfferedBlock(name, b"", 0, 0) for name in OTHERS)
        assert manager.ask(Store("first", "e", 2, OTHER_TENANT, 20.0, theirs)) == Stored(len(OTHERS), 0)
        assert manager.ask(Commit("first", "e", 2)) == Done(len(OTHERS))

        manager.kill()
        # As if it had been killed as soon as it had taken the clear on.
        (space_folder,) = disk.glob("v*")
        ClearJournal(space_folder / "clears").save([OwedClear(OTHER_TENANT, frozenset({Tier.HOST, Tier.DISK}))])
        second.pool[:] = 0
        manager = ManagerProcess(folder, disk)
        assert second.onboard(manager, 2).tiers == (0, NUM_BLOCKS, 0, 0)
        assert np.array_equal(second.pool, first.pool)
        wait_until(lambda: manager.num_on_disk() == NUM_BLOCKS, "all blocks on disk, and the cleared ones on none")
        wait_until(lambda: not (space_folder / "clears").exists(), "the clear is finished")
        found = manager.ask(Onboard("second", "e", 9, OTHER_TENANT, tuple(OTHERS), 0, 0.0, 30.0))
        assert found.num_blocks == 0
        assert manager.end() == 0
        assert not folder.exists(), "an orderly stop leaves no memory behind"

        second.pool[:] = 0
        manager = ManagerProcess(folder, disk)
        second.join(manager)
        wait_until(lambda: manager.num_on_disk() == NUM_BLOCKS, "the disk read")
        assert second.onboard(manager, 3).tiers == (0, 0, NUM_BLOCKS, 0)
        assert np.array_equal(second.pool, first.pool)
        assert manager.end() == 0
    finally:
        manager.kill()
        first.agent.close()
        second.agent.close()
