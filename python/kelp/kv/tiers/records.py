"""What stands beside a block's bytes in the host arena and on disk: enough to find it again and to distrust it.

A record is 128 bytes. Its CRC covers the space it belongs to and the slot it describes, so one that is torn, damaged,
displaced or of another model counts as none. The checksum of the bytes covers the block's name.
"""

from __future__ import annotations

import hashlib
import json
import struct
import zlib
from dataclasses import dataclass

import xxhash

from kelp.core.kv_manager_messages import SpaceRecord
from kelp.core.types import SequenceHash
from kelp.kv.tiers.base import BlockRecord

RECORD_BYTES = 128
RECORD_VERSION = 1
SEAL_BYTES = 28
"""Nonce and tag of an encrypted block (`kv.tiers.sealing`)."""
NO_SEAL = bytes(SEAL_BYTES)
KEY_ID_BYTES = 8
PLAIN_KEY_ID = bytes(KEY_ID_BYTES)
"""Stands where a block is not encrypted."""

_MAGIC = b"kKVb"
_BODY = struct.Struct(f"<4sBBxxII16s16s16s8s{KEY_ID_BYTES}s{SEAL_BYTES}s")
_CRC = struct.Struct("<I")
_PADDING = bytes(RECORD_BYTES - _BODY.size - _CRC.size)
_HAS_PARENT = 1
_NO_PARENT = bytes(16)


def checksum(content: memoryview | bytes, name: SequenceHash) -> bytes:
    """8 bytes that change when a block's bytes or its name do; by accident, that is: nothing is authenticated."""
    digest = xxhash.xxh3_64(name)
    digest.update(content)
    return digest.digest()


def space_digest(space: SpaceRecord, block_bytes: int) -> bytes:
    """16 bytes that are equal only for bytes of the same meaning: model, layout and version of the block hash."""
    fields = {name: getattr(space, name) for name in space.__struct_fields__}
    text = json.dumps({**fields, "block_bytes": block_bytes}, sort_keys=True)
    return hashlib.blake2b(text.encode(), digest_size=16, person=b"kelp-kv-space").digest()


@dataclass(frozen=True, slots=True)
class SlotRecord:
    """A block in a slot.

    Attributes:
        payload_bytes: Of the block, as it lies there.
        key_id: Of the key it is encrypted with (`Sealer.key_id`); zeros for none.
        seal: Nonce and tag; zeros for none.
    """

    block: BlockRecord
    payload_bytes: int
    key_id: bytes = PLAIN_KEY_ID
    seal: bytes = NO_SEAL


class RecordFormat:
    """Records of one space."""

    def __init__(self, space: bytes) -> None:
        self._space_crc = zlib.crc32(space)

    def pack(self, slot: int, record: SlotRecord) -> bytes:
        """`RECORD_BYTES` bytes."""
        block = record.block
        body = _BODY.pack(
            _MAGIC,
            RECORD_VERSION,
            _HAS_PARENT if block.parent is not None else 0,
            block.position,
            record.payload_bytes,
            block.sequence_hash,
            block.parent or _NO_PARENT,
            block.tenant,
            block.checksum,
            record.key_id,
            record.seal,
        )
        return body + _CRC.pack(self._crc(slot, body)) + _PADDING

    def unpack(self, slot: int, raw: bytes | memoryview) -> SlotRecord | None:
        """The record of `slot`; None if there is none that can be trusted."""
        body = bytes(raw[: _BODY.size])
        if not body.startswith(_MAGIC) or len(raw) < RECORD_BYTES:
            return None
        if _CRC.unpack_from(raw, _BODY.size)[0] != self._crc(slot, body):
            return None
        _, version, flags, position, payload_bytes, name, parent, tenant, check, key_id, seal = _BODY.unpack(body)
        if version != RECORD_VERSION:
            return None
        above = SequenceHash(parent) if flags & _HAS_PARENT else None
        block = BlockRecord(SequenceHash(name), above, position, tenant, check)
        return SlotRecord(block, payload_bytes, key_id, seal)

    def _crc(self, slot: int, body: bytes) -> int:
        return zlib.crc32(body, zlib.crc32(slot.to_bytes(8, "little"), self._space_crc))
