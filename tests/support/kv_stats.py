"""What a KV block manager counts, asked of the manager itself: it says so at once, metrics every few seconds."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from dataclasses import dataclass

from kelp.chaos.manager_desk import is_held
from kelp.client.base import WorkerAddress
from kelp.client.grpc.kv_manager import GrpcKvManagerClient
from kelp.core.errors import KelpError
from kelp.core.kv_manager_messages import GetStats, Match, Matched, Operation, Result, Stats
from kelp.core.peer_auth import PeerToken
from kelp.core.types import SequenceHash, Tier
from kelp.registry.directory import KvManagerDirectory
from support.serving import KelpServer
from support.waiting import wait_until

_EXPIRY_S = 5.0


@dataclass(frozen=True)
class KvStats:
    """Counts by `name{label="value"}`."""

    values: dict[str, float]

    def total(self, name: str, **labels: str) -> float:
        """Sum over what the labels leave open."""
        wanted = [f'{key}="{value}"' for key, value in labels.items()]
        return sum(
            value
            for key, value in self.values.items()
            if key.partition("{")[0] == name and all(label in key for label in wanted)
        )

    def hits(self, tier: str) -> int:
        """Blocks of prompts that were found there."""
        return int(self.total("kelp_kv_tier_hits_total", tier=tier))

    def resident(self, tier: str) -> int:
        """Blocks that can be found there now."""
        return int(self.total("kelp_kv_tier_blocks", tier=tier, state="resident"))

    def evicted(self, tier: str) -> int:
        """Blocks that have had to make room there."""
        return int(self.total("kelp_kv_tier_removed_total", tier=tier, reason="evicted"))

    def corrupt(self, tier: str) -> int:
        """Blocks that were found damaged there."""
        return int(self.total("kelp_kv_tier_corrupt_blocks_total", tier=tier))

    def written(self, tier: str) -> int:
        """Bytes that came there."""
        return int(self.total("kelp_kv_tier_moved_bytes_total", tier=tier, direction="write"))

    @property
    def listed_bytes(self) -> int:
        """In the object store when it was last listed."""
        return int(self.total("kelp_kv_object_store_bytes"))

    def held(self) -> dict[str, float]:
        """What is not back yet: leases, pins, stores, references, slots between two lives, moves that wait."""
        return {key: value for key, value in self.values.items() if value and is_held(key)}


def stats_at(address: WorkerAddress, timeout_s: float = 5.0) -> KvStats:
    """Counts of the manager behind an address.

    Raises:
        KelpError: It does not answer.
    """

    result = _ask(address, GetStats(), timeout_s)
    assert isinstance(result, Stats)
    return KvStats(dict(result.values))


def stats_of(server: KelpServer) -> KvStats | None:
    """Counts of a server's manager; None while it has none that answers."""
    for record in KvManagerDirectory(server.registry_folder, _EXPIRY_S).snapshot():
        try:
            return stats_at(WorkerAddress(record.endpoint, record.model_name))
        except KelpError:
            return None
    return None


def num_in_memory(server: KelpServer, names: Sequence[SequenceHash]) -> int:
    """How many of a prompt's leading blocks are in a server's host tier; 0 while it has no manager that answers."""
    for record in KvManagerDirectory(server.registry_folder, _EXPIRY_S).snapshot():
        try:
            address = WorkerAddress(record.endpoint, record.model_name, epoch=record.epoch)
            result = _ask(address, Match(tuple(names)), token=server.peer_token)
        except KelpError:
            return 0
        assert isinstance(result, Matched), result
        return result.tiers[Tier.HOST]
    return 0


def wait_stats(server: KelpServer, what: str, **least: float) -> KvStats:
    """Wait for at least these `<count>_<tier>`, named after the counts of `KvStats`."""
    seen = [KvStats({})]

    def has_come() -> bool:
        seen[0] = stats_of(server) or KvStats({})
        return all(_value(seen[0], name) >= value for name, value in least.items())

    try:
        wait_until(has_come, what, 60.0)
    except AssertionError:
        raise AssertionError(f"{what}: not {least} in {seen[0].values}") from None
    return seen[0]


def wait_nothing_held(place: KelpServer | WorkerAddress) -> KvStats:
    """Everything that requests took of a manager comes back by itself."""
    seen = [KvStats({})]

    def is_back() -> bool:
        found = stats_of(place) if isinstance(place, KelpServer) else stats_at(place)
        seen[0] = found or KvStats({})
        return found is not None and not found.held()

    try:
        wait_until(is_back, "nothing held", 30.0)
    except AssertionError:
        raise AssertionError(f"held: {seen[0].held()}") from None
    return seen[0]


def _ask(
    address: WorkerAddress, operation: Operation, timeout_s: float = 5.0, token: PeerToken | None = None
) -> Result:
    async def ask() -> Result:
        client = GrpcKvManagerClient(token)
        try:
            (result,) = await client.call(address, [operation], timeout_s)
        finally:
            await client.close()
        return result

    return asyncio.run(ask())


def _value(stats: KvStats, name: str) -> int:
    kind, _, tier = name.partition("_")
    counts = {"resident": stats.resident, "hits": stats.hits, "evicted": stats.evicted, "written": stats.written}
    return stats.listed_bytes if kind == "listed" else counts[kind](tier)
