"""Random bytes flipped where KV blocks lie at rest: in the slot files of a disk tier, in objects of a store."""

from __future__ import annotations

import json
import random
from pathlib import Path

from kelp.core.kv_manager_messages import SpaceRecord
from kelp.core.types import SequenceHash
from kelp.kv.tiers.records import RECORD_BYTES, RecordFormat, space_digest
from support.object_rig import Bucket

_NUM_FLIPS = 5


def spoil_on_disk(folder: Path, name: SequenceHash, seed: int) -> None:
    """Flip bytes of one block of a disk tier that no process uses now."""
    (blocks,) = folder.rglob("blocks")
    manifest = json.loads(blocks.with_name("manifest.json").read_text())
    slot = _slot_of(name, blocks.with_name("records"), manifest)
    with blocks.open("r+b") as file:
        file.seek(slot * manifest["slot_bytes"])
        content = bytearray(file.read(manifest["block_bytes"]))
        _flip(content, 0, seed)
        file.seek(slot * manifest["slot_bytes"])
        file.write(content)


def _slot_of(name: SequenceHash, records: Path, manifest: dict[str, object]) -> int:
    space, num_bytes = manifest["space"], manifest["block_bytes"]
    assert isinstance(space, dict) and isinstance(num_bytes, int)
    form = RecordFormat(space_digest(SpaceRecord(**space), num_bytes))
    raw = records.read_bytes()
    for slot in range(len(raw) // RECORD_BYTES):
        record = form.unpack(slot, raw[slot * RECORD_BYTES : (slot + 1) * RECORD_BYTES])
        if record is not None and record.block.sequence_hash == name:
            return slot
    raise AssertionError(f"{name.hex()} is not on disk")


def spoil_in_store(bucket: Bucket, last: SequenceHash, block_bytes: int, seed: int) -> None:
    """Flip bytes of the last block of the group that ends with it."""
    (key,) = (key for key in bucket.list_keys() if last.hex() in key)
    bucket.change(key, lambda content: _flip(content, len(content) - block_bytes, seed))


def _flip(content: bytearray, start: int, seed: int) -> None:
    chance = random.Random(seed)
    for offset in chance.sample(range(start, len(content)), _NUM_FLIPS):
        content[offset] ^= chance.randrange(1, 256)
