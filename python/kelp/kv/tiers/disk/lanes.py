"""How blocks go between the arena and the file: directly, or encrypted through memory of the tier's own."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Protocol

from kelp.kv.tiers.base import BlockRecord
from kelp.kv.tiers.disk.staging import Staging
from kelp.kv.tiers.records import NO_SEAL, PLAIN_KEY_ID
from kelp.kv.tiers.sealing import Sealer
from kelp.transport.base import FileTransfer, FileTransport, MoveOutcome, Region, SlotFile, StuckSlots
from kelp.transport.files import memory_view


@dataclass(frozen=True, slots=True)
class Move:
    """One block on its way.

    Attributes:
        index: Its place in the caller's list.
        seal: Of its encrypted bytes; zeros for plain ones.
    """

    index: int
    arena_slot: int
    disk_slot: int
    record: BlockRecord
    seal: bytes = NO_SEAL


@dataclass(eq=False)
class Batch:
    """Moves in flight; `staged` says where in staging memory each lies, empty for plain ones."""

    moves: Sequence[Move]
    transfer: FileTransfer
    staged: Sequence[int] = ()


class Lane(Protocol):
    """What the tier needs of either way."""

    @property
    def key_id(self) -> bytes:
        """Of the blocks it writes, and can read."""

    def start_write(self, moves: Sequence[Move]) -> Batch | None:
        """Towards the file; None if there is no memory to do it with."""

    def start_read(self, moves: Sequence[Move]) -> Batch | None:
        """Towards the arena; None if there is no memory to do it with."""

    def unpack(self, batch: Batch, place: int) -> bool:
        """Bring what a READ brought into its arena slot; False if it is not what was sealed."""

    def end(self, batch: Batch, outcomes: Sequence[MoveOutcome]) -> None:
        """The batch is over."""

    def settle(self, stuck: StuckSlots) -> None:
        """These slots are stuck now: all others that were have ended."""


class PlainLane:
    """Directly between arena and file.

    Args:
        arena: Its slots in full, padding included.
    """

    key_id = PLAIN_KEY_ID

    def __init__(self, transport: FileTransport, file: SlotFile, arena: Region) -> None:
        self._transport, self._file, self._arena = transport, file, arena

    def start_write(self, moves: Sequence[Move]) -> Batch:
        """See `Lane`."""
        return Batch(moves, self._transport.start_write(self._file, self._arena, self._pairs(moves)))

    def start_read(self, moves: Sequence[Move]) -> Batch:
        """See `Lane`."""
        return Batch(moves, self._transport.start_read(self._file, self._arena, self._pairs(moves)))

    def unpack(self, batch: Batch, place: int) -> bool:
        """See `Lane`."""
        return True

    def end(self, batch: Batch, outcomes: Sequence[MoveOutcome]) -> None:
        """See `Lane`."""

    def settle(self, stuck: StuckSlots) -> None:
        """See `Lane`."""

    def _pairs(self, moves: Sequence[Move]) -> list[tuple[int, int]]:
        return [(move.arena_slot, move.disk_slot) for move in moves]


class SealedLane:
    """Encrypted into and decrypted out of staging memory.

    Args:
        arena: As its blocks are, without padding.
    """

    def __init__(
        self, transport: FileTransport, file: SlotFile, arena: Region, sealer: Sealer, staging: Staging
    ) -> None:
        self._transport, self._file, self._arena = transport, file, arena
        self._sealer, self._staging = sealer, staging
        self.key_id = sealer.key_id

    def start_write(self, moves: Sequence[Move]) -> Batch | None:
        """See `Lane`."""
        staged = self._staging.take(len(moves))
        if staged is None:
            return None
        sealed = [self._seal(move, slot) for move, slot in zip(moves, staged, strict=True)]
        transfer = self._transport.start_write(self._file, self._staging.region, self._pairs(sealed, staged))
        return Batch(sealed, transfer, staged)

    def start_read(self, moves: Sequence[Move]) -> Batch | None:
        """See `Lane`."""
        staged = self._staging.take(len(moves))
        if staged is None:
            return None
        transfer = self._transport.start_read(self._file, self._staging.region, self._pairs(moves, staged))
        return Batch(moves, transfer, staged)

    def unpack(self, batch: Batch, place: int) -> bool:
        """See `Lane`."""
        move = batch.moves[place]
        ciphertext = self._staging.view(batch.staged[place], self._arena.block_bytes)
        return self._sealer.open_from(ciphertext, move.seal, move.record.sequence_hash, self._plain(move))

    def end(self, batch: Batch, outcomes: Sequence[MoveOutcome]) -> None:
        """See `Lane`."""
        for slot, outcome in zip(batch.staged, outcomes, strict=True):
            if outcome is MoveOutcome.LATE:
                self._staging.retire(slot)
            else:
                self._staging.give_back(slot)

    def settle(self, stuck: StuckSlots) -> None:
        """See `Lane`."""
        self._staging.restore(stuck)

    def _seal(self, move: Move, slot: int) -> Move:
        into = self._staging.view(slot, self._arena.block_bytes)
        return replace(move, seal=self._sealer.seal_into(self._plain(move), move.record.sequence_hash, into))

    def _plain(self, move: Move) -> memoryview:
        return memory_view(self._arena.base_address + move.arena_slot * self._arena.stride, self._arena.block_bytes)

    def _pairs(self, moves: Sequence[Move], staged: Sequence[int]) -> list[tuple[int, int]]:
        return [(slot, move.disk_slot) for slot, move in zip(staged, moves, strict=True)]
