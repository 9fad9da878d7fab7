"""What a fleet's KV block manager is asked between faults: to forget a tier, and what it has found damaged."""

from __future__ import annotations

import asyncio

from kelp.chaos.done import Victimless
from kelp.chaos.fleet import ServedFleet
from kelp.client.grpc import GrpcKvManagerClient
from kelp.core.errors import KelpError
from kelp.core.kv_manager_messages import Clear, GetStats, Operation, Refused, Result, Stats
from kelp.core.metrics import KV_TIER_CORRUPT
from kelp.core.types import Tier

_CALL_S = 10.0


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
        stats = await self._ask(GetStats())
        if not isinstance(stats, Stats):
            raise Victimless(f"the KV block manager answered {type(stats).__name__}")
        return stats.values.get(f'{KV_TIER_CORRUPT.name}{{tier="{tier.name.lower()}"}}', 0.0)

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
