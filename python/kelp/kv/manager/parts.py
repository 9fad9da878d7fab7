"""What the manager is made of, given by whoever puts it together."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol

from kelp.core.clock import Clock
from kelp.core.config import KelpConfig
from kelp.core.errors import ProtocolError
from kelp.core.kv_manager_messages import SpaceRecord
from kelp.core.metrics import Metrics
from kelp.core.peer_auth import PeerToken
from kelp.core.types import KVLayout
from kelp.kv.eviction.base import EvictionPolicy
from kelp.kv.tiers.base import DiskTier, HostArena, ObjectTier
from kelp.kv.tiers.clears import ClearJournal
from kelp.timing.model import TimingModel
from kelp.transport.base import Agent


@dataclass(frozen=True, slots=True)
class Tiers:
    """The tiers of one space.

    Attributes:
        journal: Of clears; None where nothing outlives the manager.
    """

    arena: HostArena
    disk: DiskTier | None = None
    objects: ObjectTier | None = None
    journal: ClearJournal | None = None

    def close(self, is_kept: bool) -> None:
        """Close all; with `is_kept` the arena's content stays for the next process."""
        if self.objects is not None:
            self.objects.close()
        if self.disk is not None:
            self.disk.close()
        self.arena.close(is_kept)


class TierOpener(Protocol):
    """Makes or finds again the tiers of a space."""

    def __call__(self, space: SpaceRecord, block_bytes: int) -> Tiers:
        """May block for seconds.

        Raises:
            ConfigError: There is no room, or a tier is configured wrongly.
        """


@dataclass(frozen=True, slots=True)
class ManagerParts:
    """See the module docstring.

    Attributes:
        open_agent: A transport agent without memory.
        make_policy: Eviction policy for so many slots.
        token: Who follows the events must know it; None: everybody may.
    """

    open_tiers: TierOpener
    open_agent: Callable[[], Agent]
    make_policy: Callable[[int], EvictionPolicy]
    config: KelpConfig
    clock: Clock
    metrics: Metrics
    token: PeerToken | None = None


def block_bytes_of(space: SpaceRecord) -> int:
    """Bytes of one block.

    Raises:
        ProtocolError: The dtype is unknown.
    """
    layout = KVLayout(
        num_blocks=1,
        num_layers=space.num_layers,
        num_kv_heads=space.num_kv_heads,
        block_size=space.block_size,
        head_dim=space.head_dim,
        dtype=space.dtype,
        model_id=space.model_id,
    )
    try:
        return layout.block_bytes
    except KeyError:
        raise ProtocolError(f"space.dtype: {space.dtype!r} is unknown") from None


def recompute_cost(block_size: int) -> Callable[[int], float]:
    """What computing the block at a position takes, in seconds of a worker that nobody has measured."""
    model = TimingModel()
    return lambda position: model.prefill_s(block_size, position * block_size) - model.step_s
