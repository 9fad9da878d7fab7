"""What stands before the blocks of an object: which they are, and enough to distrust each of them.

Layout, little-endian, padded with zeros to a multiple of 4096 bytes:

    magic 8 | space 16 | tenant 16 | key id 8 | block_bytes 4 | count 4 | count entries | CRC-32 of all before
    entry: hash 16 | parent 16 | has parent 1, padding 3 | position 4 | checksum 8 | stored length 4 | seal 28

Blocks follow side by side, `block_bytes` each: encryption keeps the length, its nonce and tag are the seal. Knows
neither stores nor keys.
"""

from __future__ import annotations

import struct
import zlib
from collections.abc import Sequence
from dataclasses import dataclass

from kelp.core.types import SequenceHash
from kelp.kv.tiers.base import BlockRecord
from kelp.kv.tiers.records import KEY_ID_BYTES, PLAIN_KEY_ID, SEAL_BYTES

MAGIC = b"kelpKV\x00\x01"
_ALIGNMENT = 4096
_HEAD = struct.Struct(f"<8s16s16s{KEY_ID_BYTES}sII")
_ENTRY = struct.Struct(f"<16s16sB3xI8sI{SEAL_BYTES}s")
_CRC = struct.Struct("<I")
_NO_PARENT = bytes(16)
NO_SEAL = bytes(SEAL_BYTES)


@dataclass(frozen=True, slots=True)
class GroupSpace:
    """What all groups of one tenant and variant have in common.

    Attributes:
        space: `kv.tiers.records.space_digest`.
        key_id: Of the key they are encrypted with; `records.PLAIN_KEY_ID` for none.
    """

    space: bytes
    tenant: bytes
    block_bytes: int
    key_id: bytes = PLAIN_KEY_ID


@dataclass(frozen=True, slots=True)
class StoredBlock:
    """One block of an object; `seal` is nonce and tag of its encryption, zeros for none."""

    record: BlockRecord
    seal: bytes = NO_SEAL


def header_bytes(group_blocks: int) -> int:
    """Where the first block of an object of `group_blocks` blocks begins."""
    num_bytes = _HEAD.size + group_blocks * _ENTRY.size + _CRC.size
    return -(-num_bytes // _ALIGNMENT) * _ALIGNMENT


def pack_header(space: GroupSpace, blocks: Sequence[StoredBlock]) -> bytes:
    """`header_bytes(len(blocks))` bytes."""
    body = _HEAD.pack(MAGIC, space.space, space.tenant, space.key_id, space.block_bytes, len(blocks))
    for block in blocks:
        record = block.record
        body += _ENTRY.pack(
            record.sequence_hash,
            record.parent or _NO_PARENT,
            record.parent is not None,
            record.position,
            record.checksum,
            space.block_bytes,
            block.seal,
        )
    return (body + _CRC.pack(zlib.crc32(body))).ljust(header_bytes(len(blocks)), b"\0")


def unpack_header(raw: bytes | memoryview, space: GroupSpace, group_blocks: int) -> list[StoredBlock] | None:
    """The blocks of an object in order; None if it is damaged, or not a group of `group_blocks` of this space.

    `raw` is `header_bytes(group_blocks)` bytes long, or anything at all.
    """
    size = _HEAD.size + group_blocks * _ENTRY.size
    if len(raw) < size + _CRC.size:
        return None
    body = bytes(raw[:size])
    expected = _HEAD.pack(MAGIC, space.space, space.tenant, space.key_id, space.block_bytes, group_blocks)
    if not body.startswith(expected) or _CRC.unpack_from(raw, size)[0] != zlib.crc32(body):
        return None
    blocks = []
    for name, parent, has_parent, position, check, stored_bytes, seal in _ENTRY.iter_unpack(body[_HEAD.size :]):
        if stored_bytes != space.block_bytes:
            return None
        above = SequenceHash(parent) if has_parent else None
        blocks.append(StoredBlock(BlockRecord(SequenceHash(name), above, position, space.tenant, check), seal))
    return blocks if _is_chain(blocks) else None


def _is_chain(blocks: Sequence[StoredBlock]) -> bool:
    pairs = zip((block.record for block in blocks), (block.record for block in blocks[1:]), strict=False)
    return all(
        after.parent == before.sequence_hash and after.position == before.position + 1 for before, after in pairs
    )
