"""Faults of what a fleet writes to and reads from: registry, shared memory, disk, object store."""

from __future__ import annotations

import asyncio
import contextlib
import shutil
from collections.abc import Awaitable, Callable
from pathlib import Path

from kelp.chaos.done import Impossible, Victimless
from kelp.chaos.faults import OF_STORE, Fault, FaultKind
from kelp.chaos.fleet import ServedFleet
from kelp.chaos.room import Room

_MAX_RENAMES = 100
_MIB = 1 << 20


class StorageFaults:
    """Does them to a fleet of ours; every action takes a fault and tells what it did.

    Attributes:
        actions: By kind.
    """

    def __init__(self, fleet: ServedFleet) -> None:
        self._fleet = fleet
        self.actions: dict[FaultKind, Callable[[Fault], Awaitable[str]]] = {
            FaultKind.REGISTRY_GONE: self._hide_registry,
            FaultKind.MEMORY_FULL: self._fill_memory,
            FaultKind.DISK_FULL: self._fill_disk,
            FaultKind.DISK_SLOW: self._slow_disk,
            **dict.fromkeys(OF_STORE - {FaultKind.STORE_CORRUPT}, self._break_store),
        }

    async def _hide_registry(self, fault: Fault) -> str:
        registry = self._fleet.registry
        await _without(registry, fault.lasts_s)
        return f"{registry.name} away for {fault.lasts_s:.1f} s"

    async def _fill_memory(self, fault: Fault) -> str:
        num_bytes = await self._room.fill_memory(fault.lasts_s)
        return f"{num_bytes // _MIB} MiB of /dev/shm taken for {fault.lasts_s:.1f} s"

    async def _fill_disk(self, fault: Fault) -> str:
        num_bytes = await self._room.fill_disk(fault.lasts_s)
        return f"{num_bytes // _MIB} MiB of the disk taken for {fault.lasts_s:.1f} s"

    async def _slow_disk(self, fault: Fault) -> str:
        await self._room.slow_disk(fault.lasts_s)
        return f"writes wait, for {fault.lasts_s:.1f} s"

    async def _break_store(self, fault: Fault) -> str:
        relay = self._fleet.store_relay
        if relay is None:
            raise Impossible("there is no object store")
        before = relay.num_hit
        await relay.suffer(fault.kind, fault.lasts_s)
        if relay.num_hit == before:
            raise Victimless(f"nothing was asked of the store, or nothing came from it, in {fault.lasts_s:.1f} s")
        return f"for {fault.lasts_s:.1f} s, {relay.num_hit - before} pieces or connections hit"

    @property
    def _room(self) -> Room:
        if self._fleet.room is None:
            raise Impossible(self._fleet.no_room)
        return self._fleet.room


async def _without(folder: Path, seconds: float) -> None:
    """A file in the folder's place: nothing in it can be read, and nobody makes it anew."""
    if not folder.is_dir():
        raise Victimless(f"{folder.name} is away already")
    away, plug = folder.with_name(f"{folder.name}.away"), folder.with_name(f"{folder.name}.plug")
    plug.touch()
    folder.rename(away)
    try:
        put_in_place(plug, folder)
        await asyncio.sleep(seconds)
    finally:
        put_in_place(away, folder)


def put_in_place(source: Path, target: Path) -> None:
    """Rename, whatever is there: a writer that finds no folder makes one, between any two steps of ours."""
    for _ in range(_MAX_RENAMES):
        with contextlib.suppress(OSError):
            if target.is_dir():
                shutil.rmtree(target)
            elif source.is_dir():
                target.unlink(missing_ok=True)
            source.rename(target)
            return
    source.rename(target)
