"""What a fleet's KV block manager is asked between faults: to forget a tier, and what it has found damaged."""

from __future__ import annotations

import asyncio
import re

from kelp.chaos.done import Victimless
from kelp.chaos.fleet import ServedFleet
from kelp.client.grpc import GrpcKvManagerClient
from kelp.core.errors import KelpError
from kelp.core.kv_manager_messages import Clear, GetStats, Operation, Refused, Result, Stats
from kelp.core.metrics import KV_MANAGER_HELD, KV_TIER_BLOCKS, KV_TIER_CORRUPT, KV_TIER_QUEUE
from kelp.core.types import Tier

_CALL_S = 10.0
_MOVING = ("filling", "stored", "doomed", "wiping")
_NO_LEAKS = ("workers", "unverified")
"""Of what a manager knows, what is there when nothing is under way, too."""


class ManagerDesk:
    """Belongs to one event loop; every call raises Victimless when no manager answers."""

    def __init__(self, fleet: ServedFleet) -> None:
        self._fleet = fleet
        self._client = GrpcKvManagerClient(fleet.token())

    async def close(self) -> None:
        """Close its connections."""
        await self._client.close()

    async def clear(self, *tiers: Tier) -> None:
        """Everybody's blocks leave these tiers; workers keep what they have in their own pools."""
        await self._ask(Clear(None, tiers))

    async def num_damaged(self, tier: Tier) -> float:
        """Blocks of a tier that were found damaged since the manager started."""
        return (await self._stats()).values.get(f'{KV_TIER_CORRUPT.name}{{tier="{tier.name.lower()}"}}', 0.0)

    async def held(self) -> dict[str, float]:
        """What it holds for somebody though nobody asks anything, by metric: leases, pins, blocks on the way."""
        return {key: value for key, value in (await self._stats()).values.items() if value and is_held(key)}

    async def _stats(self) -> Stats:
        stats = await self._ask(GetStats())
        if not isinstance(stats, Stats):
            raise Victimless(f"the KV block manager answered {type(stats).__name__}")
        return stats

    async def _ask(self, operation: Operation) -> Result:
        address = self._fleet.manager_address()
        if address is None:
            raise Victimless("no KV block manager is registered")
        try:
            (result,) = await asyncio.wait_for(self._client.call(address, [operation], _CALL_S), _CALL_S)
        except (KelpError, asyncio.TimeoutError) as error:
            raise Victimless(f"the KV block manager does not answer: {type(error).__name__}") from None
        if isinstance(result, Refused):
            raise Victimless(f"the KV block manager refused: {result.message}")
        return result


def is_held(metric: str) -> bool:
    """Whether a value of the manager's, by `name{label="value"}`, counts what has to come back."""
    name, kinds = metric.partition("{")[0], re.findall(r'(?:kind|state)="([\w-]+)"', metric)
    if name == KV_MANAGER_HELD.name:
        return kinds[0] not in _NO_LEAKS
    return name == KV_TIER_QUEUE.name or (name == KV_TIER_BLOCKS.name and kinds[0] in _MOVING)
