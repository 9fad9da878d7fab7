"""The object tier against boto3 with threads that put and get whole objects of the same size."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from kelp.core.config_kv import ObjectTierConfig
from kelp.kv.tiers.base import BlockRecord
from kelp.kv.tiers.objects.messages import ArenaMap
from kelp.kv.tiers.objects.tier import S3ObjectTier
from kelp.kv.tiers.records import space_digest
from perf.kv.blocks import TENANT, FilledArena, gb_per_s
from perf.kv.served_tiers import STORE_TIMEOUT_S
from perf.kv.store import REGION, Store
from perf.kv.tier_messages import TierRates, TierSpec
from perf.suite import BenchError

TIER = "tier"
NUM_THREADS = (8, 16)

_READY_S = 60.0


def limit_name(num_threads: int) -> str:
    """Such as `boto3_x8`."""
    return f"boto3_x{num_threads}"


class ObjectContest:
    """Made with the tier open; `close` it.

    Raises:
        BenchError: There is no store, or the tier does not get ready.
    """

    def __init__(self, spec: TierSpec, arena_folder: Path) -> None:
        if not spec.bucket:
            raise BenchError("there is no object store")
        self._spec = spec
        self._num_blocks = spec.num_groups * spec.group_blocks
        self._num_bytes = self._num_blocks * spec.block_bytes
        self._filled = FilledArena(arena_folder, self._num_blocks, spec.block_bytes)
        region = self._filled.arena.region
        self._tier = S3ObjectTier(
            ObjectTierConfig(
                bucket=spec.bucket,
                endpoint=spec.endpoint,
                region=REGION,
                object_bytes=spec.group_blocks * spec.block_bytes,
                timeout_s=STORE_TIMEOUT_S,
            ),
            space_digest(self._filled.space, spec.block_bytes),
            ArenaMap(
                str(self._filled.arena.path),
                self._filled.arena.slots_offset,
                region.num_blocks,
                region.block_bytes,
                region.stride,
            ),
        )
        self._client = Store(spec.endpoint).client()
        self._body = bytes(spec.group_blocks * spec.block_bytes)
        self._numbers = itertools.count()
        self._records: list[BlockRecord] = []
        self._keys: list[str] = []

    def run(self, rates: TierRates) -> None:
        """Put and get in turn.

        Raises:
            BenchError: Something was not stored, or not found again.
        """
        if not self._tier.wait_ready(_READY_S):
            raise BenchError(f"object tier: its process is not ready after {_READY_S:.0f} s")
        for number in range(self._spec.num_rounds + 1):
            for case, contestant, move in self._moves(number):
                rate = gb_per_s(move, self._num_bytes)
                if number:
                    rates.add(case, contestant, rate)

    def close(self) -> None:
        """Give everything back."""
        self._client.close()
        self._tier.close()
        self._filled.close()

    def _moves(self, number: int) -> list[tuple[str, str, Callable[[], None]]]:
        """What a round does; who is first alternates, and everybody reads what he wrote."""
        self._records = self._filled.records(seed=1000 + number)
        tier: list[tuple[str, str, Callable[[], None]]] = [("g4_write", TIER, self._put), ("g4_read", TIER, self._get)]
        others: list[tuple[str, str, Callable[[], None]]] = []
        for threads in NUM_THREADS:
            others.append(("g4_write", limit_name(threads), lambda threads=threads: self._boto_put(threads)))
            others.append(("g4_read", limit_name(threads), lambda threads=threads: self._boto_get(threads)))
        return [*tier, *others] if number % 2 else [*others, *tier]

    def _put(self) -> None:
        size = self._spec.group_blocks
        groups = [
            (list(range(first, first + size)), self._records[first : first + size])
            for first in range(0, self._num_blocks, size)
        ]
        if not all(self._tier.put_groups(groups)):
            raise BenchError("object tier: a group was not stored")

    def _get(self) -> None:
        moves = [(record.sequence_hash, slot) for slot, record in enumerate(self._records)]
        if None in self._tier.get(moves, 0, TENANT):
            raise BenchError("object tier: a block was not found again")

    def _boto_put(self, num_threads: int) -> None:
        self._keys = [f"boto3/{next(self._numbers)}" for _ in range(self._spec.num_groups)]
        self._on_threads(num_threads, self._put_object)

    def _boto_get(self, num_threads: int) -> None:
        self._on_threads(num_threads, self._get_object)

    def _on_threads(self, num_threads: int, move: Callable[[str], Any]) -> None:
        with ThreadPoolExecutor(num_threads) as threads:
            list(threads.map(move, self._keys))

    def _put_object(self, key: str) -> None:
        self._client.put_object(Bucket=self._spec.bucket, Key=key, Body=self._body)

    def _get_object(self, key: str) -> None:
        body = self._client.get_object(Bucket=self._spec.bucket, Key=key)["Body"].read()
        if len(body) != len(self._body):
            raise BenchError("boto3: a short object")
