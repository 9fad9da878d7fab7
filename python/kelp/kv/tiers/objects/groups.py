"""Groups of blocks between the arena and the store, every one verified on its way.

Part of the object-store process, which is killed when it is slow: nothing here has a deadline of its own.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Protocol

from kelp.core.errors import KelpError, RetryableTransferError
from kelp.kv.tiers.objects.header import GroupSpace, StoredBlock, header_bytes, pack_header, unpack_header
from kelp.kv.tiers.objects.memory import ArenaView, Lanes
from kelp.kv.tiers.objects.messages import Block, GetDone, GroupContent, GroupRead, GroupWrite, PutDone, PutOutcome
from kelp.kv.tiers.records import PLAIN_KEY_ID, checksum
from kelp.kv.tiers.sealing import Sealer
from kelp.transport.base import Transfer, TransferState
from kelp.transport.nixl.objects import NixlObjects, Part

_FIRST_PAUSE_S, _LONGEST_PAUSE_S = 50e-6, 1e-3
_MAX_SKIPPED_BYTES = 256 * 1024
"""Unwanted blocks of up to this size are read along: cheaper than one request more."""


class SizeSource(Protocol):
    """Tells how large an object is; see `bucket.Bucket.size_bytes`."""

    def size_bytes(self, key: str) -> int | None:
        """Size of an object; None if there is none."""


class GroupMover:
    """Moves groups of one space; single-threaded.

    Attributes:
        objects: May be replaced when credentials have changed; its memory is registered by whoever makes it.
    """

    def __init__(self, arena: ArenaView, block_bytes: int, lanes: Lanes, space: bytes, sealer: Sealer | None) -> None:
        self._arena = arena
        self._block_bytes = block_bytes
        self._lanes = lanes
        self._space = space
        self._sealer = sealer
        self.objects: NixlObjects | None = None

    def put(self, groups: Sequence[GroupWrite]) -> PutDone:
        """Write groups that the store does not have.

        Raises:
            RetryableTransferError: The store does not answer.
        """
        assert self.objects is not None
        asked = [index for index, group in enumerate(groups) if not group.is_forced]
        found = self.objects.exist([groups[index].key for index in asked]) if asked else []
        present = {index for index, is_there in zip(asked, found, strict=True) if is_there}
        outcomes: dict[int, PutOutcome] = dict.fromkeys(present, "present")
        requests: dict[int, Callable[[], Transfer]] = {}
        for index, group in enumerate(groups):
            if index in present:
                continue
            num_bytes = self._pack(index, group)
            if num_bytes:
                requests[index] = partial(self.objects.write, group.key, self._lanes.lane_address(index), num_bytes)
            else:
                outcomes[index] = "mismatch"
        errors = _carry_out(requests)
        outcomes.update({index: "failed" if error else "stored" for index, error in errors.items()})
        failure = next(filter(None, errors.values()), "")
        return PutDone(tuple(outcomes[index] for index in range(len(groups))), failure)

    def _pack(self, lane: int, group: GroupWrite) -> int:
        """Put an object together; its length, or 0 if the arena does not hold what the group says."""
        memory, start = self._lanes.lane(lane), header_bytes(len(group.blocks))
        stored = []
        for block, slot in zip(group.blocks, group.slots, strict=True):
            record, into = block.record(group.tenant), memory[start : start + self._block_bytes]
            into[:] = self._arena.slot(slot)
            if checksum(into, record.sequence_hash) != record.checksum:
                return 0
            if self._sealer is None:
                stored.append(StoredBlock(record))
            else:
                stored.append(StoredBlock(record, self._sealer.seal_into(into, record.sequence_hash, into)))
            start += self._block_bytes
        memory[: header_bytes(len(group.blocks))] = pack_header(self._group_space(group.tenant), stored)
        return start

    def get(self, groups: Sequence[GroupRead], group_blocks: int, sizes: SizeSource) -> GetDone:
        """Read from groups of `group_blocks` blocks."""
        assert self.objects is not None
        errors = _carry_out(
            {
                index: partial(self.objects.read, group.key, self._parts(index, group, group_blocks))
                for index, group in enumerate(groups)
            }
        )
        contents, failure = [], ""
        for index, group in enumerate(groups):
            if not errors[index]:
                contents.append(self._unpack(index, group, group_blocks))
                continue
            content, reason = self._explain(group, group_blocks, sizes, errors[index])
            contents.append(content)
            failure = failure or reason
        return GetDone(tuple(contents), failure)

    def _parts(self, lane: int, group: GroupRead, group_blocks: int) -> list[Part]:
        """What to read of an object, into the place in the lane that it has in the object.

        The lane is wiped first: an object that ends early leaves the rest of it untouched.
        """
        head = header_bytes(group_blocks)
        start = head + group.first * self._block_bytes
        num_bytes = len(group.names) * self._block_bytes
        memory, address = self._lanes.lane(lane), self._lanes.lane_address(lane)
        memory[: start + num_bytes] = bytes(start + num_bytes)
        if start - head <= _MAX_SKIPPED_BYTES:
            return [Part(0, address, start + num_bytes)]
        return [Part(0, address, head), Part(start, address + start, num_bytes)]

    def _unpack(self, lane: int, group: GroupRead, group_blocks: int) -> GroupContent:
        memory, head = self._lanes.lane(lane), header_bytes(group_blocks)
        listed = unpack_header(memory[:head], self._group_space(group.tenant), group_blocks)
        if listed is None:
            return GroupContent("damaged")
        blocks: list[Block | None] = []
        for offset, (name, slot) in enumerate(zip(group.names, group.slots, strict=True)):
            stored = listed[group.first + offset]
            start = head + (group.first + offset) * self._block_bytes
            is_right = stored.record.sequence_hash == name and self._take(
                memory[start : start + self._block_bytes], stored, self._arena.slot(slot)
            )
            blocks.append(Block.of(stored.record) if is_right else None)
        return GroupContent("damaged" if None in blocks else "read", tuple(blocks))

    def _take(self, content: memoryview, stored: StoredBlock, into: memoryview) -> bool:
        """Put one block into its slot; False if it is not what it should be, then the slot's content means nothing."""
        name = stored.record.sequence_hash
        if self._sealer is not None:
            is_open = self._sealer.open_from(content, stored.seal, name, into)
            return is_open and checksum(into, name) == stored.record.checksum
        if checksum(content, name) != stored.record.checksum:
            return False
        into[:] = content
        return True

    def _explain(self, group: GroupRead, group_blocks: int, sizes: SizeSource, reason: str) -> tuple[GroupContent, str]:
        """Why a READ failed: the object is missing, or too short, or else the store is at fault."""
        try:
            num_bytes = sizes.size_bytes(group.key)
        except RetryableTransferError as error:
            return GroupContent("failed"), error.text
        if num_bytes is None:
            return GroupContent("missing"), ""
        if num_bytes < header_bytes(group_blocks) + group_blocks * self._block_bytes:
            return GroupContent("damaged"), ""
        return GroupContent("failed"), reason

    def _group_space(self, tenant: bytes) -> GroupSpace:
        key_id = self._sealer.key_id if self._sealer is not None else PLAIN_KEY_ID
        return GroupSpace(self._space, tenant, self._block_bytes, key_id)


def _carry_out(requests: Mapping[int, Callable[[], Transfer]]) -> dict[int, str]:
    """Post all requests and wait until every one has ended; for each why it failed, empty if it did not."""
    errors: dict[int, str] = {}
    posted: dict[int, Transfer] = {}
    for index, post in requests.items():
        try:
            posted[index] = post()
        except KelpError as error:
            errors[index] = error.text
    pause_s = _FIRST_PAUSE_S
    while posted:
        ended = {index: reason for index, transfer in posted.items() if (reason := _outcome(transfer)) is not None}
        for index in ended:
            posted.pop(index).release()
        errors.update(ended)
        pause_s = _FIRST_PAUSE_S if ended else min(2 * pause_s, _LONGEST_PAUSE_S)
        time.sleep(pause_s)
    return errors


def _outcome(transfer: Transfer) -> str | None:
    """Why a request failed, empty if it did not, None while it runs."""
    try:
        return None if transfer.poll() is TransferState.RUNNING else ""
    except KelpError as error:
        return error.text
