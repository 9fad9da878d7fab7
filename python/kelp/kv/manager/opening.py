"""Tiers and transport of a space, opened together: what blocks, before its books are made on the event loop."""

from __future__ import annotations

from dataclasses import dataclass

from kelp.core.kv_manager_messages import PoolRecord, SpaceRecord
from kelp.kv.manager.parts import ManagerParts, Tiers, block_bytes_of
from kelp.transport.base import Agent


@dataclass(frozen=True, slots=True)
class OpenedTiers:
    """Tiers, and the agent that the host tier is registered with."""

    tiers: Tiers
    agent: Agent

    def pool(self) -> PoolRecord:
        """The host tier, as workers READ it."""
        region = self.tiers.arena.region
        return PoolRecord(
            agent_metadata=self.agent.metadata(),
            base_address=region.base_address,
            num_blocks=region.num_blocks,
            block_bytes=region.block_bytes,
            stride_bytes=region.stride,
            device=region.device,
        )

    def close(self) -> None:
        """Let go of them; all content stays. Blocks."""
        self.agent.close()
        self.tiers.close(is_kept=True)


def open_tiers(record: SpaceRecord, parts: ManagerParts) -> OpenedTiers:
    """Open everything; blocks.

    Raises:
        KelpError: Nothing is left open.
    """
    tiers = parts.open_tiers(record, block_bytes_of(record))
    try:
        agent = parts.open_agent()
        agent.register(tiers.arena.region, tiers.arena.owner)
    except BaseException:
        tiers.close(is_kept=True)
        raise
    return OpenedTiers(tiers, agent)
