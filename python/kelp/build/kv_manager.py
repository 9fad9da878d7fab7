"""The `kv_block_manager` model."""

from __future__ import annotations

import asyncio
import contextlib
import socket

from kelp.core.clock import SystemClock
from kelp.core.config import KelpConfig
from kelp.core.errors import ConfigError
from kelp.core.kv_manager_messages import GetStats, SpaceRecord, decode_operations
from kelp.core.metrics import Metrics
from kelp.core.peer_auth import (
    KV_OPERATIONS_PROOF,
    KV_RESULTS_PROOF,
    MAX_OPEN_BYTES,
    SEAL,
    PeerToken,
    proof_in,
    seal,
    token_of_server,
    unseal,
)
from kelp.kv.eviction.catalogue import make_policy
from kelp.kv.manager.parts import ManagerParts, Tiers
from kelp.kv.manager.service import KvBlockManager
from kelp.kv.tiers.arena import FileArena, open_arena
from kelp.kv.tiers.base import DiskTier, ObjectTier
from kelp.kv.tiers.clears import JOURNAL_NAME, ClearJournal
from kelp.kv.tiers.disk import open_disk_tier
from kelp.kv.tiers.keys import load_key, open_sealer
from kelp.kv.tiers.objects.messages import ArenaMap
from kelp.kv.tiers.objects.tier import S3ObjectTier
from kelp.kv.tiers.records import space_digest
from kelp.registry.access import open_registry
from kelp.registry.base import KvManagerRecord
from kelp.registry.presence import Presence
from kelp.transport import open_agent


class KvManagerAssembly:
    """The manager with what makes it visible; made and used on one event loop.

    Args:
        endpoint: `host:port` at which its workers reach it.
    """

    def __init__(self, config: KelpConfig, endpoint: str, model_name: str, metrics: Metrics) -> None:
        self._config = config
        self._endpoint = endpoint
        self._model_name = model_name
        self._token = token_of_server(config.peers, "KV block manager")
        self._manager = build_kv_manager(config, f"{endpoint}/{model_name}", metrics, self._token)
        registry = open_registry(config.registry, self._token).kv_managers
        registry.sweep()

        def remove(record: KvManagerRecord) -> None:
            registry.withdraw(record.manager_id, record.epoch)

        self._presence = Presence(registry.publish, remove, self._record, config.registry.heartbeat_s)
        self._publishing: asyncio.Task[None] | None = None

    async def start(self) -> None:
        """Become visible, unless the configuration says that there shall be none."""
        if self._config.kv_manager.enabled:
            await self._presence.publish()
            self._publishing = asyncio.ensure_future(self._presence.run())

    async def handle(self, operations: bytes) -> bytes:
        """Answer a batch.

        Raises:
            ConfigError: The configuration says that there shall be no manager.
            PeerRefused: They change something, or are many, and do not prove that a peer sent them.
            ProtocolError: See `KvBlockManager.handle`.
        """
        if not self._config.kv_manager.enabled:
            raise ConfigError("kv_manager.enabled: false: there is no KV block manager here")
        if self._is_open(operations):
            return await self._manager.handle(operations)
        scope = (f"{self._endpoint}/{self._model_name}", self._manager.epoch)
        results = await self._manager.handle(unseal(self._token, KV_OPERATIONS_PROOF, scope, operations))
        return seal(self._token, KV_RESULTS_PROOF, scope, results, proof_in(operations))

    def _is_open(self, raw: bytes) -> bool:
        """Whether it is a small question for counts, which anybody may ask."""
        if self._token is None or len(raw) > MAX_OPEN_BYTES or raw.startswith(SEAL):
            return False
        return all(isinstance(operation, GetStats) for operation in decode_operations(raw))

    async def stop(self) -> None:
        """Leave the registry, then let go of everything; what is on disk stays."""
        if self._publishing is not None:
            self._publishing.cancel()
            await asyncio.gather(self._publishing, return_exceptions=True)
            await self._presence.withdraw()
        await self._manager.stop()

    def _record(self) -> KvManagerRecord:
        space = self._manager.space
        events = None if space is None else space.publisher
        return KvManagerRecord(
            manager_id=f"{self._endpoint}/{self._model_name}",
            epoch=self._manager.epoch,
            host=socket.gethostname(),
            endpoint=self._endpoint,
            model_name=self._model_name,
            events_endpoint="" if events is None else events.endpoint,
            replay_endpoint="" if events is None else events.replay_endpoint,
            shares_objects=bool(self._config.object_tier.bucket),
            asks_token=self._token is not None,
        )


def build_kv_manager(config: KelpConfig, name: str, metrics: Metrics, token: PeerToken | None = None) -> KvBlockManager:
    """The manager alone; opens nothing before the first worker joins."""

    def open_tiers(space: SpaceRecord, block_bytes: int) -> Tiers:
        return _open_tiers(config, space, block_bytes)

    parts = ManagerParts(
        open_tiers=open_tiers,
        open_agent=lambda: open_agent(config.handoff.transport, name),
        make_policy=lambda num_slots: make_policy(config.kv_manager.eviction, num_slots),
        config=config,
        clock=SystemClock(),
        metrics=metrics,
        token=token,
    )
    return KvBlockManager(parts)


def _open_tiers(config: KelpConfig, space: SpaceRecord, block_bytes: int) -> Tiers:
    arena = open_arena(config.kv_manager, space, block_bytes)
    with contextlib.ExitStack() as undo:
        undo.callback(arena.close, is_kept=True)
        disk: DiskTier | None = None
        # With the slot files, which outlive the host tier, if there are any.
        journal = arena.path.with_name(f"{JOURNAL_NAME}-{arena.path.name}")
        if config.disk_tier.path is not None:
            opened = open_disk_tier(config.disk_tier, space, arena, open_sealer(config.disk_tier, space, block_bytes))
            undo.callback(opened.close)
            disk, journal = opened, opened.path / JOURNAL_NAME
        objects = _open_objects(config, space, arena) if config.object_tier.bucket else None
        undo.pop_all()
    return Tiers(arena, disk, objects, ClearJournal(journal))


def _open_objects(config: KelpConfig, space: SpaceRecord, arena: FileArena) -> ObjectTier:
    region = arena.region
    shared = ArenaMap(
        path=str(arena.path),
        offset_bytes=arena.slots_offset,
        num_slots=region.num_blocks,
        block_bytes=region.block_bytes,
        stride_bytes=region.stride,
    )
    key, share = load_key(config.disk_tier), config.kv_manager.tenant_share
    digest = space_digest(space, region.block_bytes)
    return S3ObjectTier(config.object_tier, digest, shared, key, tenant_share=share)
