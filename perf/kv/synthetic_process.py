"""Measures KV of an 8B model between a manager process and this one, which is a worker without an engine.

Reads a SyntheticSpec on stdin and writes SyntheticResult on stdout, both as JSON.
"""

from __future__ import annotations

import asyncio
import dataclasses
import json
import shutil
import sys
import tempfile
import time
from pathlib import Path

import numpy as np

from kelp.core.types import KVLayout, SequenceHash, Tier
from perf.kv.manager_link import running
from perf.kv.pool_worker import PoolWorker, names_of
from perf.kv.served_tiers import STORE_TIMEOUT_S, arena_folder
from perf.kv.store import REGION
from perf.kv.synthetic_messages import SyntheticResult, SyntheticSpec
from perf.suite import BenchError

_SPARE_SLOTS = 32
_G2_BLOCKS = 64
_SETTLE_S = 120.0
_POLL_S = 0.1
_TIER_NAMES = {Tier.HOST: "g2", Tier.DISK: "g3", Tier.OBJECT: "g4"}


def layout_of(spec: SyntheticSpec) -> KVLayout:
    """32 layers, 8 KV heads of 128, bf16, 16 tokens a block: 2 MiB."""
    return KVLayout(
        num_blocks=max(spec.lengths) // 16,
        num_layers=32,
        num_kv_heads=8,
        block_size=16,
        head_dim=128,
        dtype="bfloat16",
        model_id="synthetic-8b",
    )


class _Measuring:
    """One manager with one lower tier."""

    def __init__(self, spec: SyntheticSpec, worker: PoolWorker, result: SyntheticResult) -> None:
        self._spec = spec
        self._worker = worker
        self._result = result
        self._names = names_of(7, worker.layout)

    async def prepare(self, tier: Tier) -> None:
        """Have all blocks in the lower tier."""
        await self._worker.join()
        if tier is Tier.OBJECT:
            await self._reaches('kelp_kv_object_store{state="closed"}', 1)
        await self._worker.store(self._names)
        await self._reaches(f'kelp_kv_tier_blocks{{state="resident",tier="{tier.name.lower()}"}}', len(self._names))

    async def _reaches(self, series: str, value: float) -> None:
        deadline_s = time.monotonic() + _SETTLE_S
        while (await self._worker.stats()).get(series, 0) < value:
            if time.monotonic() > deadline_s:
                raise BenchError(f"{series}: less than {value:g} after {_SETTLE_S:.0f} s")
            await asyncio.sleep(_POLL_S)

    async def onboard(self, tier: Tier) -> None:
        """Every length from the lower tier, then from the host tier, in turn."""
        for number in range(self._spec.num_rounds + 1):
            for length in self._spec.lengths:
                names = self._names[: length // 16]
                await self._worker.drop_from_host(names)
                for source in (tier, Tier.HOST):
                    seconds = (await self._worker.onboard(names)).require(len(names), source)
                    # The first round finds cold caches and connections.
                    if number:
                        self._result.add(_TIER_NAMES[source], length, seconds)

    async def host_rates(self) -> None:
        """GB/s into the host tier and out of it, in turn with numpy."""
        worker = self._worker
        num_blocks = min(_G2_BLOCKS, worker.layout.num_blocks)
        num_bytes = num_blocks * worker.layout.block_bytes
        source, target = np.ones(num_bytes, np.uint8), np.zeros(num_bytes, np.uint8)
        for number in range(self._spec.num_rounds + 1):
            names: list[SequenceHash] = names_of(100 + number, worker.layout)[:num_blocks]
            write_s = await worker.store(names)
            read_s = (await worker.onboard(names)).require(num_blocks, Tier.HOST)
            started_s = time.perf_counter()
            np.copyto(target, source)
            copy_s = time.perf_counter() - started_s
            if number:
                self._result.g2_write.append((num_bytes / write_s / 1e9, num_bytes / copy_s / 1e9))
                self._result.g2_read.append((num_bytes / read_s / 1e9, num_bytes / copy_s / 1e9))


async def _measure(spec: SyntheticSpec, work: Path, tier: Tier, result: SyntheticResult) -> None:
    layout = layout_of(spec)
    settings: dict[str, object] = {
        "events.enabled": "false",
        "kv_manager.arena_folder": arena_folder("synthetic", work),
        "kv_manager.host_bytes": (layout.num_blocks + _SPARE_SLOTS) * layout.block_bytes,
        "kv_manager.eviction": "lru",
    }
    if tier is Tier.DISK:
        settings |= {"disk_tier.path": work / "disk", "disk_tier.max_bytes": 3 * layout.num_blocks * layout.block_bytes}
    else:
        settings |= {
            "object_tier.bucket": spec.bucket,
            "object_tier.endpoint": spec.endpoint,
            "object_tier.region": REGION,
            "object_tier.timeout_s": STORE_TIMEOUT_S,
        }
    async with running(work, settings) as client:
        worker = PoolWorker(layout, client)
        try:
            measuring = _Measuring(spec, worker, result)
            await measuring.prepare(tier)
            await measuring.onboard(tier)
            if tier is Tier.DISK:
                await measuring.host_rates()
        finally:
            worker.close()


def main() -> None:
    spec = SyntheticSpec.from_json(sys.stdin.read())
    result = SyntheticResult()
    with tempfile.TemporaryDirectory(prefix="kelp-bench-", ignore_cleanup_errors=True) as folder:
        work = Path(folder)
        try:
            asyncio.run(_measure(spec, work, Tier.DISK, result))
            shutil.rmtree(work / "disk")
            if spec.bucket:
                asyncio.run(_measure(spec, work, Tier.OBJECT, result))
        except BenchError as error:
            result.trouble = str(error)
    print(json.dumps(dataclasses.asdict(result)))


if __name__ == "__main__":
    main()
