"""Blocks between arena slots and disk slots (see `tiers.base.DiskTier`).

Batches overlap: while one is on its way, the one before is checked and the one after encrypted. A slot's record is
removed before its bytes are overwritten and written when they have arrived; the disk's own cache is flushed later, by
nobody who is waited for.
"""

from __future__ import annotations

import logging
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

from kelp.kv.tiers.base import BlockRecord, HostArena
from kelp.kv.tiers.disk.flusher import Flusher
from kelp.kv.tiers.disk.folder import SpaceFolder
from kelp.kv.tiers.disk.lanes import Batch, Lane, Move, PlainLane, SealedLane
from kelp.kv.tiers.disk.slots import DiskSlots
from kelp.kv.tiers.disk.staging import Staging
from kelp.kv.tiers.records import SlotRecord
from kelp.kv.tiers.sealing import Sealer
from kelp.transport.base import FileTransport, MoveOutcome, Region

_log = logging.getLogger(__name__)

_BATCH_BYTES = 4 * 1024 * 1024
_NUM_BATCHES = 8
"""In flight at once."""
_TIMEOUT_S = 10.0
_PROGRESS_SLOTS = 250_000


@dataclass
class DiskCounts:
    """What went wrong, for metrics.

    Attributes:
        num_corrupt: Blocks whose bytes or record were not what they should be.
        num_foreign: Blocks found at the start that another key encrypts, or none although there is one.
        num_failed: Blocks that the disk did not take or give, for want of space or otherwise.
        num_late: Blocks abandoned after their deadline.
    """

    num_corrupt: int = 0
    num_foreign: int = 0
    num_failed: int = 0
    num_late: int = 0


class FileDiskTier:
    """See `base.DiskTier`; made by `open_disk_tier`.

    Args:
        folder: Locked; released at `close`, like `slots` and `transport`.
        transport: Fresh.
        sealer: Encrypts; None for none.
    """

    def __init__(
        self,
        folder: SpaceFolder,
        slots: DiskSlots,
        transport: FileTransport,
        arena: HostArena,
        sealer: Sealer | None,
        timeout_s: float = _TIMEOUT_S,
    ) -> None:
        self.counts = DiskCounts()
        self._folder, self._slots, self._transport, self._arena = folder, slots, transport, arena
        self._timeout_s = timeout_s
        region = arena.region
        self._batch_blocks = max(1, _BATCH_BYTES // region.stride)
        self._memory = Region(region.base_address, region.num_blocks, region.stride, region.device, region.stride)
        transport.register(self._memory, arena.owner)
        transport.attach(slots.file)
        self._lane = self._open_lane(sealer)
        self._owed_wipes: set[int] = set()
        self._flusher = Flusher(slots.sync)
        self._is_closed = False

    def _open_lane(self, sealer: Sealer | None) -> Lane:
        if sealer is None:
            return PlainLane(self._transport, self._slots.file, self._memory)
        staging = Staging(self._memory.stride, _NUM_BATCHES * self._batch_blocks)
        self._transport.register(staging.region, staging.owner)
        return SealedLane(self._transport, self._slots.file, self._arena.region, sealer, staging)

    @property
    def num_slots(self) -> int:
        """See `base.DiskTier`."""
        return self._slots.num_slots

    @property
    def path(self) -> Path:
        """Folder of its files, which nobody else uses meanwhile."""
        return self._folder.path

    @property
    def events(self) -> Mapping[str, int]:
        """See `base.DiskTier`."""
        return {name.removeprefix("num_"): count for name, count in asdict(self.counts).items()}

    @property
    def stuck_slots(self) -> frozenset[int]:
        """See `base.DiskTier`."""
        return frozenset(slot for region, slot in self._transport.stuck().memory if region == self._memory)

    @property
    def num_stuck(self) -> int:
        """Disk slots that are out of use because a transfer has not ended."""
        return len(self._transport.stuck().files)

    def write(self, moves: Sequence[tuple[int, int, BlockRecord]]) -> list[bool]:
        """See `base.DiskTier`. Long lists are faster: batches overlap."""
        results = [False] * len(moves)
        stuck = self._settle()
        wanted = [Move(index, *move) for index, move in enumerate(moves) if move[1] not in stuck]
        try:
            self._slots.forget(move.disk_slot for move in wanted)
        except OSError as error:
            self._fail(len(wanted), error)
            return results
        self._overlap(wanted, self._lane.start_write, lambda batch: self._finish_write(batch, results))
        self._flusher.mark()
        return results

    def read(self, moves: Sequence[tuple[int, int, BlockRecord]]) -> list[bool]:
        """See `base.DiskTier`. Long lists are faster: batches overlap."""
        results = [False] * len(moves)
        stuck = self._settle()
        wanted = []
        for index, (disk_slot, arena_slot, record) in enumerate(moves):
            found = None if disk_slot in stuck else self._slots.record(disk_slot)
            if found is None or found.block != record or not self._is_ours(found):
                self.counts.num_corrupt += 1
            else:
                wanted.append(Move(index, arena_slot, disk_slot, record, found.seal))
        self._overlap(wanted, self._lane.start_read, lambda batch: self._finish_read(batch, results))
        return results

    def clear(self, slots: Iterable[int], is_wiped: bool = False) -> None:
        """See `base.DiskTier`. A wipe that the disk refuses now is tried again with every later call."""
        if is_wiped:
            self._owed_wipes.update(slots)
            self._settle()
        else:
            try:
                self._slots.forget(slots)
            except OSError as error:
                _log.warning("disk tier: records were not removed: %s", error)
        self._flusher.mark()

    @property
    def owes_wipes(self) -> bool:
        """See `base.DiskTier`."""
        return bool(self._owed_wipes)

    def recovered(self) -> Iterator[tuple[int, BlockRecord]]:
        """See `base.DiskTier`."""
        num_found, last_slot = 0, 0
        for slot, record in self._slots.records():
            if slot - last_slot >= _PROGRESS_SLOTS:
                last_slot = slot
                _log.info("disk tier: %d of %d slots looked at, %d blocks found", slot, self.num_slots, num_found)
            if not self._is_ours(record):
                self.counts.num_foreign += 1
            else:
                num_found += 1
                yield slot, record.block
        _log.info("disk tier: %d blocks found, %d of another key", num_found, self.counts.num_foreign)

    def close(self) -> None:
        """See `base.DiskTier`; idempotent. Files that a stuck transfer may touch stay open."""
        if self._is_closed:
            return
        self._is_closed = True
        self._flusher.stop()
        if self._transport.close():
            self._slots.close()
        self._folder.release()

    def _is_ours(self, record: SlotRecord) -> bool:
        return record.key_id == self._lane.key_id and record.payload_bytes == self._arena.region.block_bytes

    def _fail(self, num_blocks: int, error: OSError) -> None:
        self.counts.num_failed += num_blocks
        _log.warning("disk tier: %d blocks: %s", num_blocks, error)

    def _settle(self) -> set[int]:
        """Take back what abandoned transfers have let go of, wipe what is owed; gives the disk slots not to be used."""
        stuck = self._transport.stuck()
        files = {slot for _, slot in stuck.files}
        self._lane.settle(stuck)
        due = self._owed_wipes - files
        if self._owed_wipes:
            try:
                self._slots.forget(self._owed_wipes)
                self._slots.wipe(due)
                self._owed_wipes -= due
            except OSError as error:
                _log.error("disk tier: %d slots are not wiped yet: %s", len(due), error)
        return files | self._owed_wipes

    def _overlap(
        self,
        moves: Sequence[Move],
        start: Callable[[Sequence[Move]], Batch | None],
        finish: Callable[[Batch], None],
    ) -> None:
        in_flight: deque[Batch] = deque()
        for first in range(0, len(moves), self._batch_blocks):
            if len(in_flight) == _NUM_BATCHES:
                finish(in_flight.popleft())
            some = moves[first : first + self._batch_blocks]
            batch = start(some)
            if batch is None:
                self.counts.num_failed += len(some)
            else:
                in_flight.append(batch)
        while in_flight:
            finish(in_flight.popleft())

    def _finish_write(self, batch: Batch, results: list[bool]) -> None:
        outcomes = batch.transfer.wait(self._timeout_s)
        for move, outcome in zip(batch.moves, outcomes, strict=True):
            if self._has_moved(outcome):
                results[move.index] = self._record(move)
        self._lane.end(batch, outcomes)

    def _finish_read(self, batch: Batch, results: list[bool]) -> None:
        outcomes = batch.transfer.wait(self._timeout_s)
        for place, (move, outcome) in enumerate(zip(batch.moves, outcomes, strict=True)):
            if self._has_moved(outcome):
                is_right = self._lane.unpack(batch, place) and self._is_intact(move)
                self.counts.num_corrupt += not is_right
                results[move.index] = is_right
        self._lane.end(batch, outcomes)

    def _has_moved(self, outcome: MoveOutcome) -> bool:
        self.counts.num_late += outcome is MoveOutcome.LATE
        self.counts.num_failed += outcome in (MoveOutcome.FAILED, MoveOutcome.NO_SPACE, MoveOutcome.SHORT)
        return outcome is MoveOutcome.MOVED

    def _record(self, move: Move) -> bool:
        block_bytes = self._arena.region.block_bytes
        try:
            self._slots.write_record(move.disk_slot, SlotRecord(move.record, block_bytes, self._lane.key_id, move.seal))
        except OSError as error:
            self._fail(1, error)
            return False
        return True

    def _is_intact(self, move: Move) -> bool:
        return self._arena.checksum(move.arena_slot, move.record.sequence_hash) == move.record.checksum
