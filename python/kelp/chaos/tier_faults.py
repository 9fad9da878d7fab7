"""Bytes of the disk tier and of the object store change, and are then really read.

By requests whose blocks lie nowhere else, as they were asked long ago and the tiers above have been emptied. What
nobody has read is no fault that was done. It knows files, not what a slot or a record is.
"""

from __future__ import annotations

import asyncio
import random
from collections.abc import Awaitable, Callable
from pathlib import Path

from kelp.chaos.done import Impossible, Victimless
from kelp.chaos.faults import Fault, FaultKind
from kelp.chaos.fleet import ServedFleet
from kelp.chaos.load import Load
from kelp.chaos.manager_desk import ManagerDesk
from kelp.chaos.questions import Questions
from kelp.core.types import Tier

_NUM_ASKED = 8
_MAX_TRIES = 3
_BLOCKS, _RECORDS = "blocks", "records"
_PIECE_BYTES = {_BLOCKS: 4096, _RECORDS: 128}
_FIRST_BYTES = 32
"""Of a piece; a small block fills no more than the beginning of its slot."""


class TierFaults:
    """Does them to a fleet of ours; made on the event loop that the load runs on.

    Attributes:
        actions: By kind.
    """

    def __init__(self, fleet: ServedFleet, load: Load, questions: Questions, rng: random.Random) -> None:
        self._fleet = fleet
        self._load = load
        self._questions = questions
        self._rng = rng
        self._desk = ManagerDesk(fleet)
        self.actions: dict[FaultKind, Callable[[Fault], Awaitable[str]]] = {
            FaultKind.BLOCK_CORRUPTED: self._corrupt_disk,
            FaultKind.STORE_CORRUPT: self._corrupt_store,
        }

    async def close(self) -> None:
        """Close its connections."""
        await self._desk.close()

    async def _corrupt_disk(self, _: Fault) -> str:
        before = await self._desk.num_damaged(Tier.DISK)
        for _number in range(_MAX_TRIES):
            # In a thread: the disk may be slow meanwhile.
            name, num_pieces = await asyncio.to_thread(self._damage_files)
            await self._desk.clear(Tier.HOST)
            await self._ask_again()
            found = await self._desk.num_damaged(Tier.DISK)
            if found > before:
                return f"{num_pieces} pieces of {name}; {found - before:.0f} blocks were read and found damaged"
            before = found
        raise Victimless("no damaged block was read")

    def _damage_files(self) -> tuple[str, int]:
        name = self._rng.choice((_BLOCKS, _RECORDS))
        files = sorted(path for path in self._fleet.seen(self._fleet.disk).rglob(name) if path.is_file())
        num_pieces = sum(damage(path, self._rng, _PIECE_BYTES[name]) for path in files)
        if not num_pieces:
            raise Victimless("there is nothing on disk")
        return name, num_pieces

    async def _corrupt_store(self, fault: Fault) -> str:
        relay = self._fleet.store_relay
        if relay is None:
            raise Impossible("there is no object store")
        before, damaged_before = relay.num_spoiled, await self._desk.num_damaged(Tier.OBJECT)
        suffering = asyncio.ensure_future(relay.suffer(fault.kind, fault.lasts_s))
        try:
            while not suffering.done():
                await self._desk.clear(Tier.HOST, Tier.DISK)
                await self._ask_again()
            await suffering
        finally:
            suffering.cancel()
        if relay.num_spoiled == before:
            raise Victimless(f"nothing was read from the store in {fault.lasts_s:.1f} s")
        num_read = relay.num_spoiled - before
        found = max(0.0, await self._desk.num_damaged(Tier.OBJECT) - damaged_before)
        return f"for {fault.lasts_s:.1f} s, {num_read} objects were read changed, {found:.0f} blocks found damaged"

    async def _ask_again(self) -> None:
        asked = self._questions.asked_before(_NUM_ASKED)
        if not asked:
            raise Victimless("nothing was asked yet")
        await self._load.ask_all(asked)


def damage(path: Path, rng: random.Random, piece_bytes: int) -> int:
    """Turn over one byte of each piece of a file that holds anything; how many those are."""
    num_damaged, nothing = 0, bytes(piece_bytes)
    with path.open("r+b", buffering=0) as file:
        place = 0
        while piece := file.read(piece_bytes):
            if piece != nothing[: len(piece)]:
                offset = rng.randrange(min(_FIRST_BYTES, len(piece)))
                file.seek(place + offset)
                file.write(bytes([piece[offset] ^ 0xFF]))
                file.seek(place + len(piece))
                num_damaged += 1
            place += len(piece)
    return num_damaged
